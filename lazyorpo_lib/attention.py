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

from .batching import Batch, EncodedPair, Span, collate

NAME = "lazyorpo"
CPU_KERNEL = {"cpu"}  # devices with torch's kernel for the CPU: from 2.9 on it reads one key for several heads; not every other does
SHORT = 256  # tokens of a pair up to which that kernel is slower in bfloat16 than in float32, its backward most


@dataclass
class _Row:
    """The shared row that is being computed: its spans, and what its layers have in common."""

    spans: list[Span]
    masks: dict = field(default_factory=dict)
    varlen: tuple | None = None


# A plain global: a context variable would be empty in autograd's own threads, where checkpointed layers run again.
_row: _Row | None = None


def start_batch(batch: Batch | None) -> None:
    """Say which batch the next forward computes. It stays in force through its backward, until the next call;
    None, or a batch of another layout, gives ordinary attention."""
    global _row
    _row = _Row(batch.spans) if batch is not None and batch.spans else None


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    """Attention function in transformers' interface.

    Args:
        query, key, value: (1, heads, N, head_dim); key and value may have fewer heads.
        sliding_window: how many tokens back a token sees, itself included.

    Returns:
        (1, N, heads, head_dim) and None for the weights.
    """
    if _row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings of float32 weights leave query and key in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if query.is_cuda and dropout == 0.0 and _varlen_works(query, key, value):
        return _varlen(query, key, value, scaling, sliding_window), None
    grouped = key.shape[1] != query.shape[1]
    if grouped and not (query.device.type in CPU_KERNEL and is_torch_greater_or_equal("2.9")):
        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
        grouped = False
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type in CPU_KERNEL and max(sum(span[1:]) for span in _row.spans) <= SHORT:
        query, key, value = (x.float() for x in (query, key, value))
    options = dict(dropout_p=dropout, scale=scaling, enable_gqa=grouped)
    # One split, whose backward is one copy: a slice's would be a row of zeros and a sum over it, for every pair.
    pieces = [x.split([n for _, p, c, r in _row.spans for n in (p + c, r)], dim=2) for x in (query, key, value)]
    parts = []
    with torch.autocast(query.device.type, enabled=False):  # it would turn the short pairs back
        for i, (_, p, _, _) in enumerate(_row.spans):
            (q, q_rejected), *first_and_rejected = (x[2 * i : 2 * i + 2] for x in pieces)
            k, v = (first for first, _ in first_and_rejected)
            parts.append(_attend(q, k, v, sliding_window, options))
            k, v = (torch.cat([first[:, :, :p], rejected], dim=2) for first, rejected in first_and_rejected)
            parts.append(_attend(q_rejected, k, v, sliding_window, options))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous().to(dtype), None


AttentionInterface.register(NAME, attention)
# While a shared row runs no mask may be built: positions that start again would be read as documents of a pack.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None if _row else sdpa_mask(*args, **kwargs))


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
        distance = torch.arange(total - n, total, device=like.device)[:, None] - torch.arange(total, device=like.device)
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        _row.masks[key] = torch.zeros(n, total, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
    return _row.masks[key]


# Variable-length kernel (CUDA, compute capability 8 and later): the whole row in two calls a layer.


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling, window) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if _row.varlen is None:
        _row.varlen = _varlen_index(_row.spans, query.device)
    first, second, keys_of_second, (cu1, max1), (cu2q, max2q), (cu2k, max2k) = _row.varlen
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head_dim)
    options = dict(scale=scaling, window_size=(-1 if window is None else window - 1, 0), enable_gqa=k.shape[1] != q.shape[1])
    out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype, device=q.device)
    one = varlen_attn(q[first], k[first], v[first], cu1, cu1, max1, max1, **options)
    two = varlen_attn(q[second], k[keys_of_second], v[keys_of_second], cu2q, cu2k, max2q, max2k, **options)
    return out.index_copy(0, first, one).index_copy(0, second, two)[None]


def _varlen_index(spans: list[Span], device):
    first, second, keys = [], [], []
    for start, p, c, r in spans:
        first += range(start, start + p + c)
        second += range(start + p + c, start + p + c + r)
        keys += [*range(start, start + p), *range(start + p + c, start + p + c + r)]

    def cumulated(lengths):
        return torch.tensor([0, *lengths], device=device).cumsum(0).int(), max(lengths)

    index = [torch.tensor(x, device=device) for x in (first, second, keys)]
    return (
        *index,
        cumulated([p + c for _, p, c, _ in spans]),
        cumulated([r for *_, r in spans]),
        cumulated([p + r for _, p, _, r in spans]),
    )


_varlen_verdict: dict[tuple, bool] = {}


def _varlen_works(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel exists for these heads and agrees with SDPA in value and gradient on a small row; tried once."""
    shape = (query.dtype, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])
    if query.dtype not in (torch.float16, torch.bfloat16) or torch.cuda.get_device_capability(query.device)[0] < 8:
        return False
    if shape not in _varlen_verdict:
        _varlen_verdict[shape] = False  # holds during the test itself, which takes the other path
        with contextlib.suppress(Exception):  # any failure of an optional kernel means: do without
            _varlen_verdict[shape] = _varlen_agrees(query, key, value)
    return _varlen_verdict[shape]


def _varlen_agrees(query, key, value) -> bool:
    global _row
    spans = [Span(0, 9, 7, 5), Span(21, 3, 2, 6)]
    n, saved, results = 32, _row, []
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[query.device]):
            inputs = [torch.randn(1, x.shape[1], n, x.shape[-1], device=x.device, dtype=x.dtype) for x in (query, key, value)]
            for path in (lambda q, k, v: attention(None, q, k, v, None)[0], lambda q, k, v: _varlen(q, k, v, None, None)):
                _row = _Row(spans)
                leaves = [x.clone().requires_grad_() for x in inputs]
                out = path(*leaves)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    finally:
        _row = saved
    return all(torch.allclose(a.float(), b.float(), atol=3e-2, rtol=3e-2) for a, b in zip(*results, strict=True))


# Dense masks, for models whose attention must run in transformers' own eager code (soft-capping, sinks, chunks).


def dense_masks(batch: Batch, config, dtype) -> Tensor | dict[str, Tensor]:
    """Additive (1, 1, N, N) mask of a shared row, or one for each of the config's layer types."""
    position = batch.position_ids[0]
    n = position.shape[0]
    pair, rejected = torch.empty(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
    chosen = torch.zeros(n, dtype=torch.bool)
    for i, (start, p, c, r) in enumerate(batch.spans):
        pair[start : start + p + c + r] = i
        chosen[start + p : start + p + c] = True
        rejected[start + p + c : start + p + c + r] = True
    index = torch.arange(n)
    allowed = (pair[:, None] == pair) & (index[:, None] >= index) & ~(rejected[:, None] & chosen)
    allowed = allowed.to(position.device)
    distance = position[:, None] - position
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)

    def additive(mask):
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)[None, None]

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
LADDER = (("shared", "shared", NAME), ("shared, dense masks", "shared", "eager"), ("packed", "packed", None), ("padded", "padded", None))


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

    def __init__(self, forward):
        self.forward, self.model = forward, forward.model
        self.own_attention = self.model.config._attn_implementation
        self.refused: dict[str, str] = {}
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            probe = _Probe(self)
            for self.rung, self.layout, implementation in LADDER:
                self.model.set_attn_implementation(implementation or self.own_attention)
                why = probe.refusal() if self.rung != "padded" else ""
                if not why:
                    break
                self.refused[self.rung] = why
        self.model.train(training)

    def inputs(self, batch: Batch) -> dict:
        """The keyword arguments with which the (possibly wrapped) model computes `batch`; call it right before."""
        start_batch(batch if self.rung == "shared" else None)
        given = dict(input_ids=batch.input_ids, hidden_index=batch.hidden_index, targets=batch.targets)
        if self.layout == "padded":
            return given | dict(attention_mask=batch.attention_mask)
        given["position_ids"] = batch.position_ids
        if self.rung == "shared":
            # Not read; without a mask transformers would look through the positions for documents, and wait for the device.
            given["attention_mask"] = torch.ones_like(batch.input_ids)
        if self.rung == "shared, dense masks":
            given["attention_mask"] = dense_masks(batch, self.model.config.get_text_config(), self.model.dtype)
        return given

    def logps(self, batch: Batch) -> Tensor:
        """Log-probability of each scored token, (M,) float32, without wrappers around the model."""
        logps = self.model(**self.inputs(batch))["logps"]
        start_batch(None)
        return logps


class _Probe:
    """Two pairs of random tokens, longer than the model's window where that stays cheap, and their right log-probabilities."""

    def __init__(self, scorer: PairScorer):
        self.scorer, model = scorer, scorer.model
        self.device = model.get_input_embeddings().weight.device
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
        p = window + 5 if window + 5 <= (4608 if self.device.type == "cuda" else 256) else 17

        def tokens(n):
            return torch.randint(5, min(config.vocab_size, 1000), (n,)).tolist()

        self.pairs = [EncodedPair(0, tokens(p), tokens(9), tokens(7)), EncodedPair(1, tokens(5), tokens(3), tokens(6))]
        self.other = [self.pairs[0]._replace(chosen=tokens(9)), self.pairs[1]]
        self.truth = torch.cat([self._separate(pair, answer) for pair in self.pairs for answer in pair[2:]])
        # In 16 bit even the right answer depends on how rows are batched; that noise is measured, and allowed for.
        half = model.dtype != torch.float32 or torch.is_autocast_enabled(self.device.type)
        self.tolerance = 1e-2 if half else 1e-4
        if half:
            padded = torch.cat([self._separate(pair, answer, pad=3) for pair in self.pairs for answer in pair[2:]])
            self.tolerance += 4 * (padded - self.truth).abs().max().item()

    def _separate(self, pair: EncodedPair, answer, pad: int = 0) -> Tensor:
        ids = torch.tensor([[*pair.prompt, *answer, *[0] * pad]], device=self.device)
        mask = torch.tensor([[1] * (ids.shape[1] - pad) + [0] * pad], device=self.device)
        logits = self.scorer.forward.original(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        last = len(pair.prompt) + len(answer) - 1
        logps = torch.log_softmax(logits[len(pair.prompt) - 1 : last].float(), dim=-1)
        return logps.gather(1, ids[0, len(pair.prompt) : last + 1, None])[:, 0]

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
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
        finally:
            start_batch(None)

    def _mismatch(self) -> str:
        batch, moved = (self.scorer.logps(collate(pairs, layout=self.scorer.layout).to(self.device)) for pairs in (self.pairs, self.other))
        if (error := (batch - self.truth).abs().max().item()) > self.tolerance:
            return f"differs from separate forwards by {error:.2g} nats"
        rest = slice(len(self.pairs[0].chosen), None)
        if (leak := (moved - batch)[rest].abs().max().item()) > self.tolerance:
            return f"one answer leaks into another ({leak:.2g} nats)"
        return ""
