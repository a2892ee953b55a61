import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lazyorpo_lib.attention import LADDER, SHORT, PairScorer, start_batch
from lazyorpo_lib.batching import collate
from lazyorpo_lib.head import ScoringForward
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


def scored(name, seed=0):
    model = tiny_model(name, seed)
    truth = model.forward
    return model, truth, PairScorer(ScoringForward(model))


@pytest.mark.parametrize("name", SHARED)
def test_shared_rows_equal_separate_forwards(name):
    model, _, scorer = scored(name)
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
    model, _, scorer = scored(name)
    pairs, gradients = random_pairs(3, seed=2, longest=20), []
    weights = torch.randn(sum(len(a) for p in pairs for a in p[2:]))
    for shared in (True, False):
        model.zero_grad()
        model.set_attn_implementation("lazyorpo" if shared else scorer.own_attention)
        logps = model(**scorer.inputs(collate(pairs)))["logps"] if shared else separate(model, pairs)
        (logps @ weights).backward()
        start_batch(None)
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
def test_under_bfloat16_the_cpus_kernel_takes_short_pairs_in_float32_and_never_copies_a_key_for_its_heads(prompt, dtype):
    _, _, scorer = scored("llama")  # with fewer keys than queries
    (pair,) = random_pairs(1, seed=3, longest=5)
    pair = pair._replace(prompt=[7] * prompt)
    with Kernels() as kernels, torch.autocast("cpu", torch.bfloat16):
        scorer.model(**scorer.inputs(collate([pair])))["logps"].sum().backward()
    start_batch(None)
    assert kernels.seen == {
        f"aten::_scaled_dot_product_flash_attention_for_cpu{way}": {dtype} for way in ("", "_backward")
    }  # the one kernel that is quick


@pytest.mark.parametrize("name", DENSE)
def test_models_with_eager_attention_share_through_dense_masks(name):
    model, _, scorer = scored(name)
    assert scorer.rung == "shared, dense masks", scorer.refused
    pairs = random_pairs(3, seed=1, longest=20)
    with torch.no_grad():
        torch.testing.assert_close(scorer.logps(collate(pairs)), separate(model, pairs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NOT_SHARED)
def test_models_that_cannot_share_are_refused_and_still_score_rightly(name):
    model, _, scorer = scored(name)
    assert scorer.rung in ("packed", "padded")
    assert scorer.refused["shared"] and scorer.refused["shared, dense masks"]
    pairs = random_pairs(3, seed=1, longest=20)
    with torch.no_grad():
        ours = scorer.logps(collate(pairs, layout=scorer.layout))
        torch.testing.assert_close(ours, separate(model, pairs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rung,layout,implementation", LADDER)
def test_every_rung_gives_the_same_numbers_where_the_model_takes_all(rung, layout, implementation):
    model, _, scorer = scored("llama")
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
    scorer = PairScorer(ScoringForward(model))
    assert scorer.rung == "shared" and not scorer.forward.plain
    pairs = random_pairs(2, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(scorer.logps(collate(pairs)), separate(model, pairs), rtol=1e-6, atol=1e-6)


def test_outside_a_batch_the_attention_is_transformers_own():
    model, _, scorer = scored("mistral")
    ids = torch.randint(5, 100, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(ours[:, 7:], model(input_ids=ids, attention_mask=mask).logits[:, 7:])


def test_router_loss_of_a_mixture_of_experts_is_kept():
    model, _, scorer = scored("mixtral")
    out = model(**scorer.inputs(collate(random_pairs(2))))
    assert out["router_loss"].item() > 0 and out["router_loss"].requires_grad
