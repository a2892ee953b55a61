"""One training step of a shortened model on fake tensors: what each phase of it holds in memory.

A cut of three layers (two checkpointed, one not) takes the kit's own path: forward, attention, head, loss, backward. Every phase of
a step is linear in tokens, in stored layers and in checkpointed ones, so that two lengths give the peak of any depth and budget.
Only shapes are computed: no weights, no GPU, no kernel of one. It counts what a step makes, the bytes that it moves and what it
launches; weights and optimizer state are planner.py's.
"""

import contextlib
import copy
import importlib.util
import logging
import math
import sys
import warnings
import weakref
from dataclasses import dataclass, fields

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..errors import UserError, explain_model
from ..fast.attention import RowAttention, in_two_calls, takes_sdpa
from ..fast.head import BLOCK_BYTES, ScoringForward
from ..fast.layouts import dense_masks
from ..fast.lora import fuse
from ..machine import Machine, checkpoint_layers
from ..model import add_adapters, causal_lm
from ..orpo.batching import EncodedPair, collate
from ..settings import Settings

LAYERS = 3  # two checkpointed, then one that is not: enough to tell what one more of either kind adds
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}  # their time is operations over a rate
LOOKUPS = {"embedding", "index_select", "gather", "index"}  # read no more than they write


@dataclass(frozen=True)
class Profile:
    """The phases of a step at some token counts, {phase: bytes at its start, at its peak, at its peak without gradients; bytes that
    what is no product moves; launches}."""

    points: tuple[tuple[int, dict], ...]
    layer_gradient: float  # bytes
    dense: bool = False  # its attention scores are of every token with every other: quadratic
    stood_in: str = ""  # what the figures are of, where they are not of this model

    def at(self, tokens: int) -> dict[str, list[float]]:
        """Lines between the points, and beyond them; parabolas where it is dense."""
        last = next((k for k, (count, _) in enumerate(self.points) if tokens <= count), len(self.points) - 1)
        degree = 2 if self.dense else 1
        near = self.points[max(0, last - degree) : max(last, degree) + 1]
        shares = [
            math.prod((tokens - other) / (count - other) for other, _ in near if other != count)
            for count, _ in near
        ]
        columns = {name: zip(*(phases[name] for _, phases in near), strict=True) for name in near[0][1]}
        return {
            name: [sum(w * x for w, x in zip(shares, column, strict=True)) for column in rows]
            for name, rows in columns.items()
        }

    def work(self, tokens: int, layers: int, checkpointed: int) -> tuple[float, float]:
        """Bytes moved besides products, and launches, of a micro-batch, forward and backward."""
        more = {1: checkpointed - 2, 2: layers - checkpointed - 1}
        times = {f"{way} {k}": 1 + more[k] for way in ("forward", "backward") for k in more}
        return tuple(
            sum(times.get(name, 1) * row[k] for name, row in self.at(tokens).items()) for k in (3, 4)
        )

    def peak(self, tokens: int, layers: int, checkpointed: int, held: bool) -> tuple[float, float, float]:
        """The highest point of a micro-batch: its bytes without weights, the head's share, the gradients'.

        Args:
            held: gradients of earlier micro-batches are there from the start.
        """
        phases, column = self.at(tokens), 2 if held else 1
        start = {name: row[0] for name, row in phases.items()}
        made = 0.0 if held else self.layer_gradient  # by each layer, as the backward goes down
        stored_more, kept_more = layers - checkpointed - 1, checkpointed - 2
        # Autocast keeps its casts of the weights until the forward ends: a layer weighs more before than after.
        kept, stored = start["forward 1"] - start["forward 0"], start["head"] - start["forward 2"]
        kept_back = start["backward 1"] - start["backward 0"] + self.layer_gradient
        stored_back = start["backward 2"] - start["backward 1"] + self.layer_gradient
        forward, back = kept * kept_more + stored * stored_more, kept_back * kept_more
        moments = [("head", forward), ("backward 0", made * (layers - LAYERS))]
        if stored_more >= 0:  # the first stored layer of the backward, and the last
            moments += [
                ("forward 2", forward),
                ("backward 2", back + stored_back * stored_more),
                ("backward 2", back + made * stored_more),
            ]
        if checkpointed:
            moments.append(("backward 1", back + made * stored_more))
        height, top = max((phases[name][column] + more, name) for name, more in moments)
        head = phases["head"][column] - start["head"] if top == "head" else 0.0
        grads = 0.0 if held else phases[top][1] - phases[top][2]
        if top == "backward 0":
            grads += made * (layers - LAYERS)
        return height, max(head, 0.0), grads


class _Ledger(TorchDispatchMode):
    """Bytes of the storages that live, and the phases of a step as a Profile has them."""

    def __init__(self, model):
        super().__init__()
        self.live = 0
        weights = [*model.parameters(), *model.buffers()]  # not counted: their views would seem new
        self.alive = {t.untyped_storage()._cdata for t in weights}
        self.restart()

    def restart(self) -> None:
        self.phases: dict[str, list[float]] = {}
        self.grads, self.in_backward = 0, False
        self.mark("start")

    def mark(self, name: str) -> None:
        self.in_backward |= name.startswith("backward")
        self.phase = self.phases.setdefault(name, [self.live, self.live, self.live - self.grads, 0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # by far the most frequent call, and no operation
        out, before = func(*args, **(kwargs or {})), self.live
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        for tensor in made:
            if (key := (storage := tensor.untyped_storage())._cdata) not in self.alive:
                size = -(-storage.nbytes() // 512) * 512  # the CUDA allocator's rounding
                self.alive.add(key)
                self.live += size
                weakref.finalize(storage, self._free, key, size)
        self.phase[1] = max(self.phase[1], self.live)
        self.phase[2] = max(self.phase[2], self.live - self.grads)
        name = func._schema.name.removeprefix("aten::")
        if (self.live > before or func._schema.is_mutable) and not name.startswith(("empty", "new_empty")):
            self.phase[4] += 1
            read = (
                made
                if name in LOOKUPS
                else [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            )
            self.phase[3] += (
                sum(x.numel() * x.element_size() for x in made + read) if name not in PRODUCTS else 0
            )
        return out

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.live -= size

    def add_gradient(self, parameter) -> None:
        self.grads += parameter.numel() * parameter.element_size()


class _FourBit(nn.Linear):
    """Stands for bitsandbytes' layer."""


def _dequantised(layer, dtype):
    """Stand in for `lora.frozen_weight`: hold what it holds for a moment, of a 4-bit layer and of any other."""
    if not isinstance(layer, _FourBit):
        return layer.weight.to(dtype)
    scales = torch.zeros(layer.weight.numel() // 64, dtype=torch.float32)  # double quantisation undone, first
    weight = torch.zeros(layer.weight.shape, dtype=dtype)
    del scales
    return weight


def adapted_layers(model) -> list[nn.Module]:
    """The layers that PEFT's all-linear adapts and bitsandbytes quantises."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def on_meta(config, dtype):
    """The causal LM of a config, its parameters shapes alone.

    Raises:
        UserError: transformers has no causal LM for it.
    """
    with torch.device("meta"), explain_model(getattr(config, "_name_or_path", "") or config.model_type):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _cut(config):
    """The same model with LAYERS layers and plain rotary positions (the others branch on values, which fakes have not)."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, (value * LAYERS)[:LAYERS])
    text.num_hidden_layers = LAYERS
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            kind["rope_type"] = "default"
    text.use_cache = False
    return config


def _small_model(config, settings: Settings, method: str, dtype, sharded: bool):
    """The cut model as `method` trains it, its parameters on meta. FSDP gathers weights in the dtype of the computation."""
    model = on_meta(_cut(config), torch.float32 if method == "full" and not sharded else dtype)
    if method == "full":
        return model
    if method == "qlora":
        for layer in adapted_layers(model):
            if isinstance(layer, nn.Linear):
                layer.__class__, layer.weight.quant_state = _FourBit, "simulated"
    with torch.device("meta"):
        model = add_adapters(model, settings)
    return model


def _fake(model) -> None:
    """Replace parameters and buffers by fake ones on the CPU; ties stay ties."""
    made = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                        made[id(old)] = (
                            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                        )
                    tensors[name] = made[id(old)]


class _Kernel(torch.autograd.Function):
    """What a GPU's attention kernel holds, whichever torch has it: q (n, heads, head_dim), k and v (m, heads or fewer, head_dim)."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        ctx.save_for_backward(
            q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32)
        )  # the last: the sums of the softmax
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        scratch = (
            q.new_empty(q.shape, dtype=torch.float32),
            k.new_empty(len(k), *q.shape[1:]),
            v.new_empty(len(v), *grad.shape[1:]),
        )
        gradients = tuple(map(torch.empty_like, (q, k, v)))
        del scratch
        return gradients


class _GpuAttention(RowAttention):
    """Attention of a shared row on a GPU, whatever its dropout: two calls of a kernel that needs no proof."""

    flash = False

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        if not self.flash:  # the memory-efficient kernel wants a key for every head
            key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
        return in_two_calls(lambda q, k, v, *rest: _Kernel.apply(q, k, v), self.row, query, key, value), None


def _no_mask(n, total, window, like):
    """Stand in for a mask: CUDA builds none, and the planner adds the CPU's, which grow with each pair's square."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(n, total)


class _OfTheDevice(TorchFunctionMode):
    """What the planned device computes in another way than fakes on the CPU would.

    Args:
        wide_norms: layer_norm in float32, as autocast runs it on CUDA; on the CPU it leaves it alone.
    """

    def __init__(self, wide_norms: bool):
        super().__init__()
        self.wide_norms = wide_norms

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("grouped_mm", "_grouped_mm"):  # whose fake takes bfloat16 alone
            return torch.ops.transformers.grouped_mm_fallback(*args, **kwargs)
        if name == "layer_norm" and func is nn.functional.layer_norm and self.wide_norms:
            args = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
            kwargs = {k: x.float() if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}
        return func(*args, **kwargs)


def simulate(
    config,
    settings: Settings,
    method: str,
    dtype,
    machine: Machine,
    rows: list[list[EncodedPair]],
    sharded: bool = False,
) -> Profile:
    """Forward and backward of a micro-batch of each of `rows`, as `machine` would do them; `sharded`: with weights that FSDP gathers.

    A model that looks at values on its way (fakes have none), or takes no shared row, is stood in for by a Llama of its shape;
    where this torch cannot simulate that either, by a few products of its sizes.

    Raises:
        UserError: transformers has no causal LM for the config.
    """
    counts, text = [sum(pair.tokens() for pair in row) for row in rows], config.get_text_config()
    for model, stood_in in ((config, ""), (_llama_like(text), "those of a Llama of its shape")):
        try:
            with _quiet(), _written_by_transformers(model):
                phases, *found = _run(model, settings, method, dtype, machine, rows, sharded)
            return Profile(tuple(zip(counts, phases, strict=True)), *found, stood_in)
        except UserError:
            raise
        except Exception:  # whatever a model raises on fakes, it means the same: not this one
            continue
    return Profile(
        tuple((n, _estimate(n, text, dtype.itemsize)) for n in counts), 0.0, False, "a rough estimate"
    )


def _estimate(tokens: int, text, size: int) -> dict[str, list[float]]:
    """The phases of a step by arithmetic: a layer stores about 12 hidden and 5 inner states, a checkpointed one its input."""
    kept = tokens * size * text.hidden_size
    stored = 12 * kept + 5 * tokens * size * (
        getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    )
    phases, live = {}, kept
    for name, more, passing in (
        ("start", 0, 0), ("forward 0", kept, stored), ("forward 1", kept, stored), ("forward 2", stored, 0), ("head", 0, 3 * BLOCK_BYTES),
        ("backward 2", -stored, stored), ("backward 1", -kept, 2 * stored), ("backward 0", -kept, 2 * stored),
    ):  # fmt: skip
        phases[name] = [live, live + passing, live + passing, 3 * stored, 100]
        live += more
    return phases


@contextlib.contextmanager
def _written_by_transformers(config):
    """Take back what Liger has put into the model's module for the whole process: its Triton kernels compute no fakes."""
    module = sys.modules[type(on_meta(_cut(config), torch.float32)).__module__]
    swapped = [
        name
        for name, x in vars(module).items()
        if (getattr(x, "__module__", None) or "").startswith("liger_kernel")
    ]
    if not swapped:
        yield
        return
    fresh = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(fresh)
    liger = {name: getattr(module, name) for name in swapped}
    vars(module).update({name: getattr(fresh, name) for name in swapped})
    try:
        yield
    finally:
        vars(module).update(liger)


@contextlib.contextmanager
def _quiet():
    """Without what torch and transformers log about operations on fakes."""
    logger, verbosity = (
        logging.getLogger("torch._subclasses.fake_tensor"),
        transformers.logging.get_verbosity(),
    )
    logger.disabled = True
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = False
        transformers.logging.set_verbosity(verbosity)


def _llama_like(text):
    return transformers.LlamaConfig(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, num_hidden_layers=text.num_hidden_layers,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_attention_heads=getattr(text, "num_attention_heads", None) or max(1, text.hidden_size // 64),
        num_key_value_heads=getattr(text, "num_key_value_heads", None), tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip


def _run(config, settings, method, dtype, machine, rows, sharded) -> tuple[list[dict], float, bool]:
    cuda, autocast = machine.device == "cuda", dtype != torch.float32
    model = _small_model(config, settings, method, dtype, sharded)
    lm = causal_lm(model)
    dense = not takes_sdpa(lm)  # soft-capping and sinks run in eager code with dense masks
    at_home = ("cpu",) if machine.device == "cpu" else ()
    attention = (_GpuAttention if cuda else RowAttention)(
        cpu_kernel_devices=at_home, mask=_no_mask, name="lazyorpo-simulated"
    )
    attention.flash = autocast and machine.capability[0] >= 8
    mode, results = FakeTensorMode(), []
    with mode, _OfTheDevice(cuda and autocast), contextlib.ExitStack() as stack:
        _fake(model)
        fuse(model, _dequantised)
        lm.set_attn_implementation("eager" if dense else attention.name)
        ScoringForward(lm)
        model.train()
        checkpoint_layers(model, LAYERS - 1)
        ledger = _Ledger(model)
        layer_bytes = _watch(lm, model, ledger)
        if machine.device == "mps":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for pairs in rows:
            batch = _fake_batch(mode, pairs, settings)
            given = dict(input_ids=batch.input_ids, position_ids=batch.position_ids)
            given |= dict(hidden_index=batch.hidden_index, targets=batch.targets)
            if dense:
                given["attention_mask"] = dense_masks(batch, lm.config.get_text_config(), lm.dtype)
            ledger.restart()
            with contextlib.nullcontext() if dense else attention.over(batch), ledger:
                with torch.autocast("cpu", dtype, enabled=autocast):
                    out = model(**given)
                loss = out["logps"].sum()
                if out["router_loss"] is not None:
                    loss = loss + out["router_loss"]
                loss.backward()
            results.append(ledger.phases)
            del out, loss, batch, given
            model.zero_grad()
    return results, layer_bytes, dense


def _fake_batch(mode, pairs, settings):
    with _disable_current_modes():
        batch = collate(pairs, nll_over=settings.nll_over)
    for name in [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)]:
        setattr(batch, name, mode.from_tensor(getattr(batch, name)))
    return batch


def _watch(lm, model, ledger: _Ledger) -> float:
    """Have the ledger told when each layer and the head begin, forward and backward; one layer's gradient bytes."""
    layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)][:LAYERS]

    def begins(i):
        return lambda *_: None if ledger.in_backward else ledger.mark(f"forward {i}")

    def ends(i):
        def hook(module, args, out):
            if not ledger.in_backward:
                if i == LAYERS - 1:
                    ledger.mark("head")
                hidden = out if isinstance(out, torch.Tensor) else out[0]
                hidden.register_hook(lambda grad: ledger.mark(f"backward {i}"))

        return hook

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(begins(i))
        layer.register_forward_hook(ends(i))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(ledger.add_gradient)
    return float(sum(p.numel() * p.element_size() for p in layers[-1].parameters() if p.requires_grad))
