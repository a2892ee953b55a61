import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.fast import attention
from lazyorpo_lib.fast.attention import SHORT, Row, RowAttention, in_two_calls
from lazyorpo_lib.fast.layouts import LADDER, PairScorer
from lazyorpo_lib.orpo.batching import EncodedPair, collate
from tests.architectures import DENSE, NOT_SHARED, SHARED, tiny_model
from tests.conftest import random_pairs


def separate(model, pairs):
    """The right answer: each text alone, unpadded, through the model's own forward."""
    out = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([[*pair.prompt, *answer]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt) - 1 : -1]
            out.append(torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(out)


def scored(name, seed=0, attention=None):
    model = tiny_model(name, seed)
    return model, PairScorer(model, attention)


@pytest.mark.parametrize("name", SHARED)
def test_shared_rows_equal_separate_forwards(name):
    model, scorer = scored(name)
    assert scorer.rung == "shared", scorer.refused
    assert scorer.forward.plain
    pairs = random_pairs(3, seed=1, longest=20)
    with torch.no_grad():
        model.set_attn_implementation(scorer.own_attention)
        true = separate(model, pairs)
        model.set_attn_implementation("lazyorpo")
        ours = scorer.logps(collate(pairs))
    torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "mixtral", "gpt2"])
def test_gradients_of_shared_rows_equal_those_of_separate_forwards(name):
    model, scorer = scored(name)
    pairs, gradients = random_pairs(3, seed=2, longest=20), []
    weights = torch.randn(sum(len(a) for p in pairs for a in p[2:]))
    for shared in (True, False):
        model.zero_grad()
        model.set_attn_implementation("lazyorpo" if shared else scorer.own_attention)
        with scorer.inputs(collate(pairs)) if shared else contextlib.nullcontext() as inputs:
            logps = model(**inputs)["logps"] if shared else separate(model, pairs)
            (logps @ weights).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for parameter, true in gradients[1].items():
        error = (gradients[0][parameter] - true).norm() / true.norm().clamp(min=1e-6)
        assert error < 1e-5, parameter


class Kernels(TorchDispatchMode):
    """The dtypes in which attention's kernel ran, forward or backward, by its name."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.name():
            self.seen.setdefault(func.name(), set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("prompt", "dtype"), [(SHORT - 10, torch.float32), (SHORT, torch.bfloat16)])
def test_under_bfloat16_the_cpus_kernel_takes_short_pairs_in_float32_and_never_copies_a_key_for_its_heads(
    prompt, dtype
):
    _, scorer = scored("llama")  # with fewer keys than queries
    (pair,) = random_pairs(1, seed=3, longest=5)
    pair = pair._replace(prompt=[7] * prompt)
    with (
        Kernels() as kernels,
        torch.autocast("cpu", torch.bfloat16),
        scorer.inputs(collate([pair])) as inputs,
    ):
        scorer.model(**inputs)["logps"].sum().backward()
    assert kernels.seen == {
        f"aten::_scaled_dot_product_flash_attention_for_cpu{way}": {dtype} for way in ("", "_backward")
    }  # the one kernel that is quick


@pytest.mark.parametrize("name", DENSE)
def test_models_with_eager_attention_share_through_dense_masks(name):
    model, scorer = scored(name)
    assert scorer.rung == "shared, dense masks", scorer.refused
    pairs = random_pairs(3, seed=1, longest=20)
    with torch.no_grad():
        torch.testing.assert_close(scorer.logps(collate(pairs)), separate(model, pairs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NOT_SHARED)
def test_models_that_cannot_share_are_refused_and_still_score_rightly(name):
    model, scorer = scored(name)
    assert scorer.rung in ("packed", "padded")
    assert scorer.refused["shared"] and scorer.refused["shared, dense masks"]
    pairs = random_pairs(3, seed=1, longest=20)
    with torch.no_grad():
        ours = scorer.logps(collate(pairs, layout=scorer.layout))
        torch.testing.assert_close(ours, separate(model, pairs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rung,layout,implementation", LADDER)
def test_every_rung_gives_the_same_numbers_where_the_model_takes_all(rung, layout, implementation):
    model, scorer = scored("llama")
    scorer.rung, scorer.layout = rung, layout
    pairs = random_pairs(4, seed=3)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        true = separate(model, pairs)
        model.set_attn_implementation(implementation or "sdpa")
        torch.testing.assert_close(scorer.logps(collate(pairs, layout=layout)), true, rtol=1e-6, atol=1e-6)


def test_probe_catches_a_head_that_is_not_what_it_seems():
    model = tiny_model("llama")
    layer, plain = model.get_output_embeddings(), torch.nn.Linear.forward
    layer.forward = lambda x: plain(layer, x) * 1.7  # what an adapter on the head would do
    scorer = PairScorer(model)
    assert scorer.rung == "shared" and not scorer.forward.plain
    pairs = random_pairs(2, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(scorer.logps(collate(pairs)), separate(model, pairs), rtol=1e-6, atol=1e-6)


def test_outside_a_batch_the_attention_is_transformers_own():
    model, scorer = scored("mistral")
    ids = torch.randint(5, 100, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(ours[:, 7:], model(input_ids=ids, attention_mask=mask).logits[:, 7:])


def test_router_loss_of_a_mixture_of_experts_is_kept():
    model, scorer = scored("mixtral")
    with scorer.inputs(batch := collate(random_pairs(2))) as inputs:
        _, router_loss = scorer.read(model(**inputs), batch)
    assert router_loss.item() > 0 and router_loss.requires_grad


# A row in two calls, as a GPU computes it: here with a stand-in for the kernel.


def attend(q, k, v, scale, window):
    """The last len(q) tokens of one document attend to all of it: float64, (tokens, heads, head_dim)."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    back = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    hidden = (back < 0) | (back >= (window or len(k)))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * (scale or q.shape[-1] ** -0.5)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(q.dtype)


def reference(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, window):
    lengths_q, lengths_k = starts_q.diff().tolist(), starts_k.diff().tolist()
    assert (
        starts_q.dtype == starts_k.dtype == torch.int32
        and max(lengths_q) <= longest_q
        and max(lengths_k) <= longest_k
    )
    pieces = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([attend(*piece, scale, window) for piece in pieces])


@pytest.fixture(autouse=True)
def nothing_proven(monkeypatch):
    monkeypatch.setattr(attention, "_verdicts", {})


@pytest.fixture
def ours():
    """Attention with a kernel that takes a whole row, on the CPU."""
    return RowAttention(kernels={"reference": reference}, kernel_devices=("cpu",))


def row_of(lengths, heads=4, few=2, size=8):
    """A shared row's batch, and random query, key, value and output gradient for it."""
    batch = collate([EncodedPair(i, *([7] * n for n in pair)) for i, pair in enumerate(lengths)])
    shapes = [(1, h, batch.input_ids.numel(), size) for h in (heads, few, few)]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return batch, inputs, torch.randn(1, batch.input_ids.numel(), heads, size)


ROWS = {
    "one pair": [(5, 4, 6)],
    "one token": [(5, 4, 1)],
    "an answer of one token among others": [(5, 1, 3), (2, 7, 1), (9, 3, 3)],
    "nine pairs": [(2 + i, 10 - i, 1 + i % 4) for i in range(9)],
    "more than a thousand tokens": [(300, 280, 350), (40, 150, 1)],
}


@pytest.mark.parametrize("few", [4, 2])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("path", ["reference", "pair by pair"])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_rows_equal_attention_of_each_text_alone_in_value_and_gradient(lengths, path, window, few, ours):
    if path != "reference":
        ours.kernels.clear()
    batch, inputs, upstream = row_of(lengths, few=few)
    with ours.over(batch):
        out = ours(None, *inputs, None, scaling=0.4, sliding_window=window)[0]
        computed = [out, *torch.autograd.grad(out, inputs, upstream)]
    assert attention.kernels_taken() == ["reference" if path == "reference" else "a pair at a time"]
    q, k, v = (x[0].transpose(0, 1) for x in inputs)
    alone = torch.empty_like(out)
    for start, rejected, p, c, r in batch.spans:
        whole = slice(start, start + p + c)
        alone[0, whole] = attend(q[whole], k[whole], v[whole], 0.4, window)
        seen = [*range(start, start + p), *range(rejected, rejected + r)]
        alone[0, rejected : rejected + r] = attend(q[rejected : rejected + r], k[seen], v[seen], 0.4, window)
    for mine, true in zip(computed, [alone, *torch.autograd.grad(alone, inputs, upstream)], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "gemma3_text", "deepseek_v3"])
def test_models_through_a_kernel_equal_separate_forwards(name, ours):
    model, scorer = scored(name, attention=ours)
    assert scorer.rung == "shared" and set(attention.kernels_taken()) == {"reference"}
    pairs = random_pairs(3, seed=1, longest=20)
    with torch.no_grad():
        model.set_attn_implementation(scorer.own_attention)
        true = separate(model, pairs)
        model.set_attn_implementation("lazyorpo")
        torch.testing.assert_close(scorer.logps(collate(pairs)), true, rtol=1e-6, atol=1e-6)


class Operations(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_a_row_in_two_calls_waits_for_no_copy_and_gathers_keys_and_values_once_a_layer(ours, monkeypatch):
    _, scorer = scored("llama", attention=ours)
    light = lambda q, k, v, *rest: q * k.sum() + v.sum()  # noqa: E731
    monkeypatch.setattr(ours, "proven_kernel", lambda *args, **options: light)
    with scorer.inputs(collate(random_pairs(3))) as inputs, Operations() as ran:
        scorer.model(**inputs)["logps"].sum().backward()
    layers = scorer.model.config.num_hidden_layers
    assert ran.count["index_select"] == 2 * layers + 1  # and the scored hidden states
    # A sort, a wait for the device, a tensor made of a list on the host.
    assert not {"index_put", "index_put_", "_index_put_impl_", "_local_scalar_dense", "lift_fresh"} & set(
        ran.count
    )


def test_a_window_that_hides_nothing_is_not_asked_of_a_kernel(ours):
    asked = []
    ours.kernels["reference"] = lambda *args: asked.append(args[-1]) or reference(*args)
    batch, inputs, _ = row_of([(5, 4, 6), (3, 2, 1)])
    for window in (11, 10):
        with ours.over(batch):
            ours(None, *inputs, None, sliding_window=window)
        assert asked[-1] == (None if window == 11 else 10)


# What torch has, or has not: each kernel is tried before it is believed.


def flash(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout,
    causal,
    debug,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    assert (dropout, causal, debug) == (0.0, True, False) and window_size_right in (None, 0)
    window = None if window_size_left is None else window_size_left + 1
    return reference(q, k, v, cu_q, cu_k, max_q, max_k, scale, window), None


def efficient(
    q,
    k,
    v,
    bias,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout,
    mask_type,
    compute_log_sumexp=False,
    *,
    scale=None,
    window_size=None,
):
    assert (bias, dropout, mask_type, compute_log_sumexp) == (None, 0.0, 2, True) and q.shape[2] == k.shape[
        2
    ] == v.shape[2]
    return reference(q[0], k[0], v[0], cu_q, cu_k, max_q, max_k, scale, window_size)[None], None


def missing(*args, **kwargs):
    raise AttributeError("'_OpNamespace' 'aten' object has no attribute")


def older(q, k, v, cu_q, cu_k, max_q, max_k, causal=False):
    return flash(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False)


def renamed(*args, **kwargs):
    return {"output": flash(*args, **kwargs)[0]}


def not_a_number(*args, **kwargs):
    return flash(*args, **kwargs)[0] * torch.nan, None


def mixes_values(q, k, v, *rest, **options):
    return flash(q, k, v.flip(0), *rest, **options)


def aligned_at_the_start(q, k, v, cu_q, cu_k, *rest, **options):
    return flash(q, k[: len(q)], v[: len(q)], cu_q, cu_q, *rest, **options)


def without_window(*args, scale=None, **window):
    return flash(*args, scale=scale)


def without_gradient(*args, **kwargs):
    return flash(*args, **kwargs)[0].detach(), None


def wrong_gradient(q, k, v, *rest, **options):
    return flash(q, k + (k - k.detach()), v, *rest, **options)


def wrong_for_one_token(q, k, v, cu_q, *rest, **options):
    out = flash(q, k, v, cu_q, *rest, **options)[0]
    return out * (cu_q.diff() > 1).float().repeat_interleave(cu_q.diff())[:, None, None], None


BROKEN = [
    missing,
    older,
    renamed,
    not_a_number,
    mixes_values,
    aligned_at_the_start,
    without_window,
    without_gradient,
    wrong_gradient,
    wrong_for_one_token,
]


@pytest.fixture
def two_operations(monkeypatch):
    """A way to say what torch's two private operations are."""

    def have(flash, efficient):
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
        monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)

    return have


@pytest.mark.parametrize("other", [efficient, missing])
@pytest.mark.parametrize("first", [flash, *BROKEN])
def test_whatever_torch_has_or_lacks_the_row_is_right_and_the_reason_kept(first, other, two_operations):
    batch, inputs, _ = row_of([(5, 4, 1), (30, 20, 25)])
    ours = RowAttention(kernel_devices=("cpu",))
    with torch.no_grad(), ours.over(batch):
        true = ours.by_pairs(ours.row, *inputs, window=6)
        two_operations(first, other)
        computed = ours(None, *inputs, None, sliding_window=6)[0]
    torch.testing.assert_close(computed, true, rtol=1e-5, atol=2e-6)
    taken = "flash" if first is flash else "efficient" if other is efficient else "a pair at a time"
    (said,) = attention.kernels_taken()
    assert said.split(";")[0] == taken and said.count("; not ") == [
        "flash",
        "efficient",
        "a pair at a time",
    ].index(taken)
    assert all(len(why) > 15 for why in said.split("; not ")[1:])


@pytest.mark.parametrize("few,window", [(4, None), (2, 6)])
def test_the_calls_fit_the_operations_of_the_torch_at_hand(few, window):
    batch, inputs, _ = row_of([(5, 4, 1), (30, 20, 25)], few=few)
    row, inputs = Row(batch.to("meta")), [x.to("meta") for x in inputs]
    for kernel in attention.KERNELS.values():
        assert in_two_calls(kernel, row, *inputs, None, window).shape == (1, 85, 4, 8)


# The probe.


def test_a_model_that_gives_no_numbers_is_told_before_it_is_trained():
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data[:] = torch.nan
    with pytest.raises(
        UserError, match="float32 overflows.*not finite; load its weights anew or choose another"
    ):
        PairScorer(model)


def test_a_layout_that_gives_no_numbers_is_refused(ours):
    model = tiny_model("llama")

    def spoil(module, args, out):
        if ours.row is not None:
            out.last_hidden_state = out.last_hidden_state * torch.nan
        return out

    model.model.register_forward_hook(spoil)
    scorer = PairScorer(model, ours)
    assert scorer.rung == "shared, dense masks" and "nan" in scorer.refused["shared"]


def test_the_probe_draws_no_random_number_of_the_run_and_seeds_no_device(monkeypatch):
    model, before = tiny_model("llama"), torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("it seeds every device"))
    PairScorer(model)
    assert torch.equal(torch.get_rng_state(), before)


FULL = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


def windowed(limit, error=FULL[0]):
    """A model with a window of 100, and the lengths of the texts that its forward was given; too little
    memory past `limit` tokens."""
    model, lengths = tiny_model("mistral", sliding_window=100), []
    original = model.forward

    def forward(*args, input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        if lengths[-1] > limit:
            raise error
        return original(*args, input_ids=input_ids, **kwargs)

    model.forward = forward
    return model, lengths


def test_the_probe_reaches_past_a_window_but_makes_no_logits_of_the_prompt():
    model, lengths = windowed(limit=1000)
    made = []
    model.lm_head.register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    assert PairScorer(model).rung == "shared" and max(lengths) > 105
    assert max(made) <= 10


@pytest.mark.parametrize("error", FULL, ids=str)
def test_where_memory_does_not_reach_past_a_window_the_probe_is_shorter(error):
    model, lengths = windowed(100, error)
    assert PairScorer(model).rung == "shared" and lengths[0] > 105 > max(lengths[1:])


@pytest.mark.parametrize("error", FULL, ids=str)
def test_weights_that_leave_no_memory_are_told_in_a_sentence(error):
    with pytest.raises(UserError, match="no memory on cpu.*smaller base_model"):
        PairScorer(windowed(0, error)[0])


def test_a_soft_cap_is_never_lost_where_transformers_says_that_sdpa_would_do(monkeypatch):
    model = tiny_model("gemma2")
    monkeypatch.setattr(type(model).__mro__[1], "_supports_sdpa", True)  # as before 5.21
    model = tiny_model("gemma2")
    scorer = PairScorer(model)
    assert scorer.rung == "shared, dense masks" and "soft-capped" in scorer.refused["shared"]
    pairs = random_pairs(2, seed=1)
    with torch.no_grad():
        capped = scorer.logps(collate(pairs))
        model.config.attn_logit_softcapping = None
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = scorer.logps(collate(pairs))
    assert (capped - uncapped).abs().max() > 1e-3


def test_a_kernel_that_is_first_tried_in_a_checkpointed_layer_is_judged_as_outside_of_one(ours):
    batch, inputs, upstream = row_of(ROWS["nine pairs"])
    results = []
    for checkpointed in (False, True):
        attention._verdicts.clear()

        def layer(*x):
            return ours(None, *x, None)[0] * 2

        with ours.over(batch):
            if checkpointed:
                out = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)
            else:
                out = layer(*inputs)
            assert attention.kernels_taken() == ["reference"]
            results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for some, plain in zip(*results, strict=True):
        torch.testing.assert_close(some, plain, rtol=0, atol=0)


def test_out_of_memory_while_a_kernel_is_tried_says_nothing_of_the_kernel(ours):
    def reference_with_little_memory(*args):
        if full:
            raise torch.OutOfMemoryError("full")
        return reference(*args)

    ours.kernels["reference"] = reference_with_little_memory
    batch, inputs, _ = row_of(ROWS["one pair"])
    for full in (True, False):
        with ours.over(batch):
            ours(None, *inputs, None)
        assert attention.kernels_taken() == ([] if full else ["reference"])


# Whose row it is.


def test_a_row_ends_with_its_block_also_after_an_error_and_the_one_around_it_goes_on(ours):
    outer, inner = (row_of(ROWS[name])[0] for name in ("one pair", "nine pairs"))
    with pytest.raises(RuntimeError, match="on the way"), ours.over(outer):
        row = ours.row
        with pytest.raises(ValueError), ours.over(inner):
            assert ours.row.spans == inner.spans
            raise ValueError
        assert ours.row is row
        raise RuntimeError("on the way")
    assert ours.row is None


def test_two_models_that_take_turns_each_have_their_own_row():
    (one, first), (two, second) = (scored("llama", seed) for seed in (0, 1))
    pairs = random_pairs(2, seed=1)
    with torch.no_grad():
        ours = [scorer.logps(collate(pairs)) for scorer in (first, second, first)]
        for model, scorer in ((one, first), (two, second)):
            model.set_attn_implementation(scorer.own_attention)
        true = [separate(model, pairs) for model in (one, two, one)]
    for some, right in zip(ours, true, strict=True):
        torch.testing.assert_close(some, right, rtol=1e-6, atol=1e-6)
