"""Attention for rows in which the two answers of a pair share one prompt, and the choice of a layout that a model can take.

`attention` is registered with transformers under NAME. While a `shared` batch is running it computes, for each pair,
causal attention over [prompt, chosen] and of rejected over [prompt, rejected]: no mask over the row, no padding, and
neither answer sees the other. At all other times it is transformers' own SDPA. It picks no token budget and computes no loss.
"""

import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_torch_greater_or_equal

from ..errors import UserError
from ..orpo.batching import Batch, EncodedPair, Span, collate
from .head import ScoringForward

NAME = "lazyorpo"
CPU_KERNEL = {
    "cpu"
}  # devices with torch's kernel for the CPU: from 2.9 on it reads one key for several heads; not every other does
SHORT = (
    256  # tokens of a pair up to which that kernel is slower in bfloat16 than in float32, its backward most
)


@dataclass
class _Row:
    """What the layers of the shared row that is being computed have in common: where its pairs lie, masks made so far."""

    spans: list[Span]
    keys: Tensor
    starts: Tensor
    longest: tuple[int, int, int]  # [prompt, chosen], rejected, [prompt, rejected]
    masks: dict = field(default_factory=dict)


# A plain global: a context variable would be empty in autograd's own threads, where checkpointed layers run again.
_row: _Row | None = None


def start_batch(batch: Batch | None) -> None:
    """Say which batch the next forward computes. It stays in force through its backward, until the next call;
    None, or a batch of another layout, gives ordinary attention."""
    global _row
    _row = None
    if batch is not None and batch.spans:
        longest = [max(n) for n in zip(*((p + c, r, p + r) for _, _, p, c, r in batch.spans), strict=True)]
        _row = _Row(batch.spans, batch.keys, batch.starts, tuple(longest))


def attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs
):
    """Attention function in transformers' interface.

    Args:
        query, key, value: (1, heads, N, head_dim); key and value may have fewer heads.
        sliding_window: how many tokens back a token sees, itself included.

    Returns:
        (1, N, heads, head_dim) and None for the weights.
    """
    if kwargs.get("softcap"):
        raise NotImplementedError("scores are soft-capped, which SDPA cannot do")
    if _row is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if torch.is_autocast_enabled(
        query.device.type
    ):  # rotary embeddings of float32 weights leave query and key in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if sliding_window is not None and sliding_window >= max(_row.longest):
        sliding_window = None  # it hides nothing, and not every kernel is right with one
    kernel = None
    if query.device.type in KERNEL_DEVICES and dropout == 0.0:
        kernel = _proven_kernel(query, key, value, scaling, sliding_window)
    if kernel is not None:
        return _in_two_calls(kernel, query, key, value, scaling, sliding_window), None
    return _by_pairs(query, key, value, dropout, scaling, sliding_window), None


AttentionInterface.register(NAME, attention)
# While a shared row runs no mask may be built: positions that start again would be read as documents of a pack.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None if _row else sdpa_mask(*args, **kwargs))


def _by_pairs(query, key, value, dropout, scaling, window) -> Tensor:
    """The row in two calls of SDPA a pair: on the CPU, and wherever no kernel takes it whole."""
    grouped = key.shape[1] != query.shape[1]
    if grouped and not (query.device.type in CPU_KERNEL and is_torch_greater_or_equal("2.9")):
        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
        grouped = False
    dtype, spans = query.dtype, _row.spans
    if (
        dtype == torch.bfloat16
        and query.device.type in CPU_KERNEL
        and max(sum(span[2:]) for span in spans) <= SHORT
    ):
        query, key, value = (x.float() for x in (query, key, value))
    options = dict(dropout_p=dropout, scale=scaling, enable_gqa=grouped)
    # One split, whose backward is one copy: a slice's would be a row of zeros and a sum over it, for every pair.
    sizes = [s.prompt + s.chosen for s in spans] + [s.rejected for s in spans]
    pieces = [x.split(sizes, dim=2) for x in (query, key, value)]
    parts = [None] * len(sizes)
    with torch.autocast(query.device.type, enabled=False):  # it would turn the short pairs back
        for i, span in enumerate(spans):
            q, k, v = (x[i] for x in pieces)
            parts[i] = _attend(q, k, v, window, options)
            j = len(spans) + i
            k, v = (
                torch.cat([first[:, :, : span.prompt], x[j]], dim=2)
                for first, x in ((k, pieces[1]), (v, pieces[2]))
            )
            parts[j] = _attend(pieces[0][j], k, v, window, options)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous().to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, options: dict) -> Tensor:
    """The last len(q) tokens of a document attend to all of it, causally."""
    n, total = q.shape[2], k.shape[2]
    windowed = window is not None and window < total
    if n == total and not windowed:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    if q.is_cuda and not windowed:
        mask = causal_lower_right(n, total)  # the CUDA kernels know this shape without a mask in memory
    else:
        mask = _mask(n, total, window if windowed else None, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _mask(n: int, total: int, window: int | None, like: Tensor) -> Tensor:
    """Additive (n, total) mask of one answer, made once a row and shared by its layers."""
    key = (n, total, window, like.dtype, like.device)
    if key not in _row.masks:
        distance = torch.arange(total - n, total, device=like.device)[:, None] - torch.arange(
            total, device=like.device
        )
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        _row.masks[key] = torch.zeros(n, total, dtype=like.dtype, device=like.device).masked_fill_(
            hidden, -torch.inf
        )
    return _row.masks[key]


# Kernels that take pieces of different lengths (CUDA): the whole row in two calls a layer, each proven before it is used.


def _in_two_calls(kernel, query: Tensor, key: Tensor, value: Tensor, scaling, window) -> Tensor:
    """Every [prompt, chosen], then every rejected over its prompt and itself: two slices of the queries, one gather of the keys."""
    first = _row.spans[0].rejected_start
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head_dim)
    chosen, rejected = q.split([first, len(q) - first])  # the backward of a split is one copy
    whole, answers, seen = _row.starts
    longest_whole, longest_answer, longest_seen = _row.longest
    one = kernel(chosen, k[:first], v[:first], whole, whole, longest_whole, longest_whole, scaling, window)
    k, v = (x.index_select(0, _row.keys) for x in (k, v))
    two = kernel(rejected, k, v, answers, seen, longest_answer, longest_seen, scaling, window)
    return torch.cat([one, two])[None]


def _flash(q, k, v, starts_q, starts_k, longest_q, longest_k, scaling, window) -> Tensor:
    """Causal attention, aligned at the ends, of pieces of q (Nq, heads, head_dim) over pieces of k and v (Nk, fewer heads, head_dim)."""
    left, right = (None, None) if window is None else (window - 1, 0)
    longest_q = max(longest_q, 2)  # 1 would take a way of its own, meant for generation
    return torch.ops.aten._flash_attention_forward(
        q, k, v, starts_q, starts_k, longest_q, longest_k, 0.0, True, False,
        scale=scaling, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip


def _efficient(q, k, v, starts_q, starts_k, longest_q, longest_k, scaling, window) -> Tensor:
    """The same, also before compute capability 8 and in float32; it wants a key for every head."""
    k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1).flatten(1, 2) for x in (k, v))
    causal_from_the_end, for_the_backward = 2, True
    return torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, starts_q, starts_k, longest_q, longest_k, 0.0, causal_from_the_end, for_the_backward,
        scale=scaling, window_size=window,
    )[0][0]  # fmt: skip


KERNEL_DEVICES = {"cuda"}
KERNELS = {
    "flash": _flash,
    "efficient": _efficient,
}  # the best first; both private in torch, so none is believed
PROOF = (
    ((70, 150, 1), (3, 2, 140), (1, 9, 6)),
    ((20, 3, 1),),
)  # (prompt, chosen, rejected) of rows: several blocks of a kernel, one token
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}  # of a tensor's norm; rounding is a third of it
_verdicts: dict[tuple, tuple] = {}  # (the kernel or None, what is said of it), by what it was tried on


def _proven_kernel(query: Tensor, key: Tensor, value: Tensor, scaling, window):
    """The first of KERNELS that agrees with `_by_pairs` for these heads, in value and gradient, or None. Tried once."""
    kind = (
        query.device,
        query.dtype,
        query.shape[1],
        key.shape[1],
        query.shape[-1],
        value.shape[-1],
        window is not None,
    )
    if kind not in _verdicts:
        refused = {}
        for name, kernel in KERNELS.items():
            try:
                why = _disagreement(kernel, query, key, value, scaling, window and min(window, 13))
            except torch.OutOfMemoryError:
                return None  # it says nothing of the kernel
            except (
                Exception
            ) as error:  # whatever a private operation raises, in whichever torch, it means: do without
                why = _brief(error)
            if not why:
                break
            refused[name] = why
        else:
            name, kernel = "a pair at a time", None
        _verdicts[kind] = kernel, name + "".join(f"; not {other}: {why}" for other, why in refused.items())
    return _verdicts[kind][0]


def kernels_taken() -> list[str]:
    """Say how shared rows were computed on a GPU so far, with the reason where a better kernel was refused. Empty on the CPU."""
    return sorted({said for _, said in _verdicts.values()})


def _disagreement(kernel, query, key, value, scaling, window) -> str:
    """How far the kernel is from float32 attention pair by pair; empty where that is rounding."""
    global _row
    saved, device, generator = _row, query.device, torch.Generator().manual_seed(0)
    try:
        for lengths in PROOF:
            start_batch(collate([EncodedPair(0, *([0] * n for n in row)) for row in lengths]).to(device))
            n, heads, size = sum(map(sum, lengths)), query.shape[1], value.shape[-1]
            shapes = [(1, x.shape[1], n, x.shape[-1]) for x in (query, key, value)] + [(1, n, heads, size)]
            q, k, v, upstream = (
                torch.randn(shape, generator=generator).to(device, query.dtype) for shape in shapes
            )
            true = _with_gradients(lambda *x: _by_pairs(*x, 0.0, scaling, window), upstream.float(), q, k, v)
            ours = _with_gradients(lambda *x: _in_two_calls(kernel, *x, scaling, window), upstream, q, k, v)
            for what, x, y in zip(("values", "d query", "d key", "d value"), ours, true, strict=True):
                error = ((x.float() - y).norm() / y.norm()).item()
                if not error <= TOLERANCE[query.dtype]:  # NaN is no agreement
                    return f"its {what} are off by {error:.2g}"
    finally:
        _row = saved
    return ""


def _with_gradients(run, upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    """run(*inputs) and the inputs' gradients, in the dtype of `upstream`."""
    # The first row may be computed in a checkpointed layer, whose own hooks must not see what is saved here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        leaves = [x.to(upstream.dtype, copy=True).requires_grad_() for x in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def takes_sdpa(model) -> bool:
    """Whether SDPA is right for a model. Before 5.21 transformers says so of Gemma 2 too, and computes it without its soft cap."""
    return model._supports_sdpa and not getattr(
        model.config.get_text_config(), "attn_logit_softcapping", None
    )


# Dense masks, for models whose attention must run in transformers' own eager code (soft-capping, sinks, chunks).


def dense_masks(batch: Batch, config, dtype) -> Tensor | dict[str, Tensor]:
    """Additive (1, 1, N, N) mask of a shared row, or one for each of the config's layer types."""
    position = batch.position_ids[0]
    n = position.shape[0]
    pair, side = torch.zeros(2, n, dtype=torch.int32)
    for i, (start, rejected_start, p, c, r) in enumerate(batch.spans):
        pair[start : start + p + c] = pair[rejected_start : rejected_start + r] = i
        side[start + p : start + p + c], side[rejected_start : rejected_start + r] = 1, 2
    pair, side, index = (
        pair.to(position.device),
        side.to(position.device),
        torch.arange(n, device=position.device),
    )
    allowed = (pair[:, None] == pair) & (index[:, None] >= index) & ~((side[:, None] == 2) & (side == 1))
    distance = position[:, None] - position
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)

    def additive(mask):
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(dtype).min
        )[None, None]

    masks = {"full_attention": additive(allowed)}
    if window:
        masks["sliding_attention"] = additive(allowed & (distance < window))
    if chunk:
        masks["chunked_attention"] = additive(allowed & (position[:, None] // chunk == position // chunk))
    if getattr(config, "layer_types", None):
        return {kind: masks[kind] for kind in set(config.layer_types)}
    return masks.get("sliding_attention", masks["full_attention"])


# Which layout a model takes: the ladder, and the test that decides.

# (name, layout of batching.py, attention implementation or None for the model's own), best first; the last is always right.
LADDER = (
    ("shared", "shared", NAME),
    ("shared, dense masks", "shared", "eager"),
    ("packed", "packed", None),
    ("padded", "padded", None),
)


class PairScorer:
    """Runs batches through a causal LM in the best layout that it provably takes.

    On construction each rung of LADDER is tried on the real model with random tokens, without gradient: the log-probabilities
    must equal those of separate, unpadded forwards (equality), and must not move when another answer's tokens
    change (leak). Both are needed: ALiBi by index passes the second and fails the first.

    Args:
        forward: the model's `head.ScoringForward`.

    Attributes:
        rung: name of the chosen rung; layout: its layout for `batching.collate`; refused: {rung: why not}.
    """

    def __init__(self, model):
        self.forward, self.model = ScoringForward(model), model
        self.own_attention = self.model.config._attn_implementation
        self.refused: dict[str, str] = {}
        training = self.model.training
        self.model.eval()
        start_batch(None)  # of an earlier model: its row may still be in force
        with torch.no_grad():
            probe = _Probe(self)
            for self.rung, self.layout, implementation in LADDER:
                self.model.set_attn_implementation(implementation or self.own_attention)
                why = probe.refusal() if self.rung != "padded" else ""
                if not why:
                    break
                self.refused[self.rung] = why
        self.model.train(training)

    @contextlib.contextmanager
    def inputs(self, batch: Batch):
        """Give the keyword arguments with which the (possibly wrapped) model computes `batch`; attention is this
        row's until the block ends, its backward included."""
        start_batch(batch if self.rung == "shared" else None)
        given = dict(input_ids=batch.input_ids, hidden_index=batch.hidden_index, targets=batch.targets)
        if self.layout == "padded":
            given |= dict(attention_mask=batch.attention_mask)
        else:
            given["position_ids"] = batch.position_ids
        if self.rung == "shared":
            # Not read; without a mask transformers would look through the positions for documents, and wait for the device.
            given["attention_mask"] = torch.ones_like(batch.input_ids)
        if self.rung == "shared, dense masks":
            given["attention_mask"] = dense_masks(
                batch, self.model.config.get_text_config(), self.model.dtype
            )
        try:
            yield given
        finally:
            start_batch(None)

    def read(self, out, batch: Batch) -> tuple[Tensor, Tensor | None]:
        return out["logps"], out["router_loss"]

    def logps(self, batch: Batch) -> Tensor:
        """Log-probability of each scored token, (M,) float32, without wrappers around the model."""
        with self.inputs(batch) as inputs:
            return self.model(**inputs)["logps"]


class _Probe:
    """Two pairs of random tokens, longer than the model's window where that stays cheap, and their right log-probabilities."""

    def __init__(self, scorer: PairScorer):
        self.scorer, model = scorer, scorer.model
        self.device = model.get_input_embeddings().weight.device
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
        self.words = min(config.vocab_size, 1000)
        for prompt in [window + 5] * (window + 5 <= (4608 if self.device.type == "cuda" else 256)) + [17]:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._draw(prompt)
        raise UserError(
            f"The weights leave no memory on {self.device} for a forward of 26 tokens: choose a smaller base_model, or method=qlora."
        )

    def _draw(self, prompt: int) -> None:
        generator = torch.Generator().manual_seed(
            0
        )  # of its own: no run's random numbers may depend on the probe

        def tokens(n):
            return torch.randint(5, self.words, (n,), generator=generator).tolist()

        first = EncodedPair(0, tokens(prompt), tokens(9), tokens(7))
        self.pairs = [first, EncodedPair(1, tokens(5), tokens(3), tokens(6))]
        self.other = [first._replace(chosen=tokens(9)), self.pairs[1]]
        self.truth = torch.cat([self._separate(pair, answer) for pair in self.pairs for answer in pair[2:]])
        half = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if half else self.scorer.model.dtype
        if not self.truth.isfinite().all():
            mend = {
                torch.float16: "set precision=float32, take a GPU that has bfloat16,",
                torch.bfloat16: "set precision=float32",
            }
            raise UserError(
                f"{str(dtype)[6:]} overflows in this model, or its weights are damaged: its log-probabilities are not finite; "
                f"{mend.get(dtype, 'load its weights anew')} or choose another base_model."
            )
        # In 16 bit even the right answer depends on how rows are batched; that noise is measured, and allowed for.
        self.tolerance = 1e-4
        if dtype != torch.float32:
            padded = torch.cat(
                [self._separate(pair, answer, pad=3) for pair in self.pairs for answer in pair[2:]]
            )
            self.tolerance = 1e-2 + 4 * (padded - self.truth).abs().max().item()

    def _separate(self, pair: EncodedPair, answer, pad: int = 0) -> Tensor:
        ids = torch.tensor([[*pair.prompt, *answer, *[0] * pad]], device=self.device)
        mask = torch.tensor([[1] * (ids.shape[1] - pad) + [0] * pad], device=self.device)
        keep = len(answer) + 1 + pad  # not the logits of a prompt as long as a window
        logits = self.scorer.forward.original(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep
        ).logits[0]
        logps = torch.log_softmax(logits[-keep:][: len(answer)].float(), dim=-1)
        return logps.gather(1, ids[0, len(pair.prompt) : ids.shape[1] - pad, None])[:, 0]

    def refusal(self) -> str:
        """Why the scorer's present rung is wrong for the model; empty if it is right."""
        try:
            why = self._mismatch()
            if why and self.scorer.forward.plain:
                self.scorer.forward.plain = False  # perhaps it is only the head that is not what it seems
                why, first = self._mismatch(), why
                self.scorer.forward.plain = bool(why)
                why = why and first
            return why
        except Exception as error:  # whatever a model raises at an unusual row, it means: not this one
            return _brief(error)
        finally:
            start_batch(None)

    def _mismatch(self) -> str:
        batch, moved = (
            self.scorer.logps(collate(pairs, layout=self.scorer.layout).to(self.device))
            for pairs in (self.pairs, self.other)
        )
        if not (error := (batch - self.truth).abs().max().item()) <= self.tolerance:  # NaN is no agreement
            return f"differs from separate forwards by {error:.2g} nats"
        rest = slice(len(self.pairs[0].chosen), None)
        if not (leak := (moved - batch)[rest].abs().max().item()) <= self.tolerance:
            return f"one answer leaks into another ({leak:.2g} nats)"
        return ""


def _brief(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
    )
