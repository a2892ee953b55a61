"""Attention for rows in which the two answers of a pair share one prompt.

Of each pair it computes causal attention over [prompt, chosen], and of rejected over [prompt, rejected]: no
mask over the row, no padding, neither answer sees the other. Outside of a row it is transformers' own SDPA.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_torch_greater_or_equal

from ..orpo.batching import Batch, EncodedPair, collate

NAME = "lazyorpo"
SHORT = 256  # tokens of a pair up to which torch's kernel for the CPU is slower in bfloat16 than in float32


class Row:
    """What all layers need to compute one shared row: where its pairs lie, the masks made so far."""

    def __init__(self, batch: Batch):
        self.spans, self.keys, self.starts, self.masks = batch.spans, batch.keys, batch.starts, {}
        lengths = [(p + c, r, p + r) for _, _, p, c, r in self.spans]
        self.longest = [max(n) for n in zip(*lengths, strict=True)]  # of whole, rejected, [prompt, rejected]


def causal_mask(n: int, total: int, window: int | None, like: Tensor) -> Tensor:
    """Make the additive (n, total) mask of one answer, in the dtype and on the device of `like`."""
    at = torch.arange(total, device=like.device)
    distance = at[total - n :, None] - at
    hidden = (distance < 0) | (distance >= (window or total))
    return torch.zeros_like(distance, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


class RowAttention:
    """Attention function in transformers' interface; it computes `row` while there is one.

    Args:
        kernels: {name: function as `_flash`}, the best first; None for KERNELS; each is proven first.
        kernel_devices: device types that have these kernels. cpu_kernel_devices: those with torch's kernel
            for the CPU; from 2.9 on it reads a key for many heads.
        mask: makes the mask of one answer, as `causal_mask`. name: of the implementation in transformers.

    Attributes:
        row: what is computed now, or None. No context variable: autograd's own threads, in which checkpointed
            layers run again, must see it. windows: the sliding windows that layers handed over with a row.
    """

    def __init__(
        self, kernels=None, kernel_devices=("cuda",), cpu_kernel_devices=("cpu",), mask=causal_mask, name=NAME
    ):
        self.kernels = KERNELS if kernels is None else kernels
        self.kernel_devices, self.cpu_kernel_devices = kernel_devices, cpu_kernel_devices
        self.mask, self.name, self.row, self.windows = mask, name, None, set()
        self.register()

    def register(self) -> None:
        """Have transformers call this attention for models whose implementation is `name`."""
        AttentionInterface.register(self.name, self)
        # None over a row: its positions, which start again, would be read as documents of a pack.
        AttentionMaskInterface.register(self.name, lambda *a, **k: None if self.row else sdpa_mask(*a, **k))

    @contextlib.contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Compute this shared row, forward and backward, until the block ends."""
        self.register()  # another model's may have been registered since
        before, self.row = self.row, Row(batch)
        try:
            yield
        finally:
            self.row = before

    def __call__(
        self, module, query, key, value, attention_mask, dropout=0, scaling=None, sliding_window=None, **more
    ):
        """Attend: (1, heads, N, head_dim) each, of key and value perhaps fewer heads, to (1, N, heads,
        head_dim) and None for the weights. `sliding_window`: tokens back that one sees, itself included."""
        if more.get("softcap"):
            raise NotImplementedError("scores are soft-capped, which SDPA cannot do")
        inputs, device, row = (query, key, value), query.device.type, self.row
        if row is None:
            return sdpa_attention_forward(module, *inputs, attention_mask, dropout, scaling, **more)
        self.windows.add(sliding_window)
        if torch.is_autocast_enabled(device):  # rotary embeddings of float32 weights leave float32
            inputs = [x.to(torch.get_autocast_dtype(device)) for x in inputs]
        if sliding_window is not None and sliding_window >= max(row.longest):
            sliding_window = None  # it hides nothing, and not every kernel is right with one
        options = dict(scaling=scaling, window=sliding_window)
        if device in self.kernel_devices and dropout == 0.0:
            if kernel := self.proven_kernel(*inputs, **options):
                return in_two_calls(kernel, row, *inputs, **options), None
        return self.by_pairs(row, *inputs, dropout=dropout, **options), None

    # A pair at a time: on the CPU, and wherever no kernel takes the row whole.

    def by_pairs(self, row: Row, query, key, value, scaling=None, window=None, dropout=0.0) -> Tensor:
        """Compute a row in two calls of SDPA a pair; (1, N, heads, head_dim)."""
        grouped, on_cpu = key.shape[1] != query.shape[1], query.device.type in self.cpu_kernel_devices
        if grouped and not (on_cpu and is_torch_greater_or_equal("2.9")):
            key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
            grouped = False
        dtype, spans = query.dtype, row.spans
        if on_cpu and dtype == torch.bfloat16 and max(sum(span[2:]) for span in spans) <= SHORT:
            query, key, value = (x.float() for x in (query, key, value))
        options = dict(dropout_p=dropout, scale=scaling, enable_gqa=grouped)
        # One split, whose backward is one copy: each slice's would be a row of zeros and a sum over it.
        sizes = [s.prompt + s.chosen for s in spans] + [s.rejected for s in spans]
        queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
        parts = [None] * len(sizes)
        with torch.autocast(query.device.type, enabled=False):  # it would turn the short pairs back
            for i, span in enumerate(spans):
                j = len(spans) + i
                k, v = (torch.cat([x[i][:, :, : span.prompt], x[j]], dim=2) for x in (keys, values))
                parts[i] = self._attend(row, queries[i], keys[i], values[i], window, options)
                parts[j] = self._attend(row, queries[j], k, v, window, options)
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous().to(dtype)

    def _attend(self, row: Row, q: Tensor, k: Tensor, v: Tensor, window: int | None, options: dict) -> Tensor:
        """Have the last len(q) tokens of a document attend to all of it, causally."""
        n, total = q.shape[2], k.shape[2]
        window = None if window is None or window >= total else window
        if n == total and window is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        if q.is_cuda and window is None:
            mask = causal_lower_right(n, total)  # the CUDA kernels know this shape without a mask in memory
        else:
            key = (n, total, window, q.dtype, q.device)
            mask = row.masks[key] = row.masks[key] if key in row.masks else self.mask(n, total, window, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    # Kernels that take pieces of different lengths (CUDA): the whole row in two calls a layer, once proven.

    def proven_kernel(self, query: Tensor, key: Tensor, value: Tensor, scaling, window) -> Callable | None:
        """Find the first kernel that equals `by_pairs` for such heads, in value and gradient; tried once."""
        shapes = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        kind = (*self.kernels.values(), query.device, query.dtype, *shapes, window is not None)
        if kind not in _verdicts:
            refused = []
            for name, kernel in [*self.kernels.items(), ("a pair at a time", None)]:
                try:
                    why = kernel and self._disagreement(kernel, query, key, value, scaling, window)
                except torch.OutOfMemoryError:
                    return None  # it says nothing of the kernel
                except Exception as error:  # whatever a private operation raises, it means: do without
                    why = brief(error)
                if not why:
                    break
                refused.append(f"{name}: {why}")
            _verdicts[kind] = kernel, "; not ".join([name, *refused])
        return _verdicts[kind][0]

    def _disagreement(self, kernel, query, key, value, scaling, window) -> str:
        """Say how far the kernel is from float32 attention pair by pair; nothing where that is rounding."""
        like, generator = (query.device, query.dtype), torch.Generator().manual_seed(0)
        for lengths in PROOF:
            row = Row(collate([EncodedPair(0, *([0] * n for n in pair)) for pair in lengths]).to(like[0]))
            n, options = sum(map(sum, lengths)), dict(scaling=scaling, window=window and min(window, 13))
            shapes = [(1, x.shape[1], n, x.shape[-1]) for x in (query, key, value)]
            shapes.append((1, n, query.shape[1], value.shape[-1]))
            *inputs, upstream = (torch.randn(shape, generator=generator).to(*like) for shape in shapes)
            true = _with_gradients(partial(self.by_pairs, row, **options), upstream.float(), inputs)
            ours = _with_gradients(partial(in_two_calls, kernel, row, **options), upstream, inputs)
            for what, x, y in zip(("values", "d query", "d key", "d value"), ours, true, strict=True):
                error = ((x.float() - y).norm() / y.norm()).item()
                if not error <= TOLERANCE[query.dtype]:  # NaN is no agreement
                    return f"its {what} are off by {error:.2g}"
        return ""


def in_two_calls(kernel, row: Row, query, key, value, scaling=None, window=None) -> Tensor:
    """Compute every [prompt, chosen], then every rejected over its prompt and itself: two slices of the
    queries, one gather of the keys; (1, N, heads, head_dim)."""
    first = row.spans[0].rejected_start
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head_dim)
    chosen, rejected = q.split([first, len(q) - first])  # the backward of a split is one copy
    whole, answers, seen = row.starts
    longest_whole, longest_answer, longest_seen = row.longest
    one = kernel(chosen, k[:first], v[:first], whole, whole, longest_whole, longest_whole, scaling, window)
    k, v = (x.index_select(0, row.keys) for x in (k, v))
    two = kernel(rejected, k, v, answers, seen, longest_answer, longest_seen, scaling, window)
    return torch.cat([one, two])[None]


def _flash(q, k, v, starts_q, starts_k, longest_q, longest_k, scaling, window) -> Tensor:
    """Attend causally, aligned at the ends, from pieces of q (Nq, heads, head_dim) to k and v (Nk, …)."""
    left, right = (None, None) if window is None else (window - 1, 0)
    longest_q = max(longest_q, 2)  # 1 would take a way of its own, meant for generation
    given = q, k, v, starts_q, starts_k, longest_q, longest_k, 0.0, True, False
    options = dict(scale=scaling, window_size_left=left, window_size_right=right)
    return torch.ops.aten._flash_attention_forward(*given, **options)[0]


def _efficient(q, k, v, starts_q, starts_k, longest_q, longest_k, scaling, window) -> Tensor:
    """Do the same, also before compute capability 8 and in float32; it wants a key for every head."""
    given = (x[None] for x in (q, *keys_of_heads(q, k, v)))
    lengths, causal_from_the_end, for_the_backward = (starts_q, starts_k, longest_q, longest_k), 2, True
    how = None, *lengths, 0.0, causal_from_the_end, for_the_backward
    options = dict(scale=scaling, window_size=window)
    return torch.ops.aten._efficient_attention_forward(*given, *how, **options)[0][0]


def keys_of_heads(q: Tensor, *few: Tensor) -> Iterator[Tensor]:
    """Repeat keys and values (Nk, fewer heads, head_dim), so that there is one for every head of `q`."""
    return (x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1).flatten(1, 2) for x in few)


KERNELS = {"flash": _flash, "efficient": _efficient}  # the best first; both private in torch
# (prompt, chosen, rejected) of the pairs of rows: several blocks of a kernel; one token.
PROOF = (((70, 150, 1), (3, 2, 140), (1, 9, 6)), ((20, 3, 1),))
# Of a tensor's norm; rounding is a third of it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_verdicts: dict[tuple, tuple] = {}  # (the kernel or None, what is said of it), by what was tried on what


def kernels_taken() -> list[str]:
    """Say how a GPU computed shared rows so far, and why a better kernel was refused. Empty on the CPU."""
    return sorted({said for _, said in _verdicts.values()})


def _with_gradients(run, upstream: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Give run(*inputs) and the inputs' gradients, in the dtype of `upstream`."""
    # The first row may be computed in a checkpointed layer, whose own hooks must not see what is saved here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        leaves = [x.to(upstream.dtype, copy=True).requires_grad_() for x in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def takes_sdpa(model) -> bool:
    """Tell whether SDPA is right for a model; before 5.21 transformers says so of Gemma 2, uncapped."""
    config = model.config.get_text_config()
    return model._supports_sdpa and not getattr(config, "attn_logit_softcapping", None)


def brief(error: Exception) -> str:
    """Name an error and the beginning of what it says."""
    return ": ".join([type(error).__name__, *str(error)[:120].splitlines()[:1]])
