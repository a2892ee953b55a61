"""One training step of a shortened model on fake tensors: what each phase of it holds in memory.

A cut of three layers (two checkpointed, one not) takes the kit's own path: forward, attention, head, loss, backward. Every phase of
a step is linear in tokens, in stored layers and in checkpointed ones, so that two lengths give the peak of any depth and budget.
Only shapes are computed: no weights, no GPU. It counts what a step makes; weights and optimizer state are planner.py's.
"""

import contextlib
import copy
import logging
import warnings
import weakref
from dataclasses import dataclass
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations import moe
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from . import adapters, attention, trainer
from .batching import EncodedPair, collate
from .head import ScoringForward
from .model import Machine, add_adapters, causal_lm, explained
from .settings import Settings, UserError

SIMULATED = "lazyorpo-simulated"  # the kit's attention, as the planned device would compute it
LAYERS = 3  # two checkpointed, then one that is not: enough to tell what one more of either kind adds


@dataclass(frozen=True)
class Profile:
    """The phases of a step at two or more token counts, {phase: bytes at its start, at its peak, at its peak without gradients}."""

    points: tuple[tuple[int, dict], ...]
    layer_gradient: float  # bytes
    stood_in: bool = False  # by a Llama of the same shape

    def at(self, tokens: int) -> dict[str, list[float]]:
        """Piecewise linear between the points, and beyond them."""
        k = next((k for k in range(1, len(self.points) - 1) if tokens <= self.points[k][0]), len(self.points) - 1)
        (t0, low), (t1, high) = self.points[k - 1 : k + 1]
        w = (tokens - t0) / (t1 - t0)
        return {name: [a + w * (b - a) for a, b in zip(low[name], high[name], strict=True)] for name in low}

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
        moments = {"head": forward, "backward 0": made * (layers - LAYERS)}
        if stored_more >= 0:  # the first stored layer of the backward, and the last
            moments["forward 2"] = forward
            moments["backward 2"] = back + stored_back * stored_more
            moments["backward 2 "] = back + made * stored_more
        if checkpointed:
            moments["backward 1"] = back + made * stored_more
        heights = {name: phases[name.strip()][column] + more for name, more in moments.items()}
        top = max(heights, key=heights.get)
        head = phases["head"][column] - start["head"] if top == "head" else 0.0
        grads = 0.0 if held else phases[top.strip()][1] - phases[top.strip()][2]
        if top == "backward 0":
            grads += made * (layers - LAYERS)
        return heights[top], max(head, 0.0), grads


class _Ledger(TorchDispatchMode):
    """Bytes of the storages that live, and for each phase of a step: at its start, the peak, the peak without gradients."""

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
        self.phase = self.phases.setdefault(name, [self.live, self.live, self.live - self.grads])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # by far the most frequent call, and no operation
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.alive:
                size = -(-storage.nbytes() // 512) * 512  # the CUDA allocator's rounding
                self.alive.add(key)
                self.live += size
                weakref.finalize(storage, self._free, key, size)
        self.phase[1] = max(self.phase[1], self.live)
        self.phase[2] = max(self.phase[2], self.live - self.grads)
        return out

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.live -= size

    def add_gradient(self, parameter) -> None:
        self.grads += parameter.numel() * parameter.element_size()


class _FourBit(nn.Linear):
    """Stands for bitsandbytes' layer."""


def _dequantised(layer, dtype):
    """What `adapters.frozen_weight` holds for a moment, of a 4-bit layer and of any other."""
    if not isinstance(layer, _FourBit):
        return layer.weight.to(dtype)
    scales = torch.empty(layer.weight.numel() // 64, dtype=torch.float32)  # double quantisation undone, first
    weight = torch.empty(layer.weight.shape, dtype=dtype)
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
    with torch.device("meta"), explained(getattr(config, "_name_or_path", "") or config.model_type):
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
                        made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    tensors[name] = made[id(old)]


def _simulated_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    if _simulated_attention.varlen and dropout == 0.0:
        return attention._in_two_calls(attention._flash, query, key, value, scaling, sliding_window), None
    return attention.attention(module, query, key, value, attention_mask, dropout, scaling, sliding_window, **kwargs)


_simulated_attention.varlen = False
AttentionInterface.register(SIMULATED, _simulated_attention)
AttentionMaskInterface.register(SIMULATED, lambda *args, **kwargs: None)


def _no_mask(n, total, window, like):
    """A mask that takes no memory: CUDA builds none, and the planner adds the CPU's, which grow with each pair's square."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(n, total)


_layer_norm = nn.functional.layer_norm


def _float32_layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """As autocast runs it on CUDA; on the CPU it leaves layer_norm alone."""
    x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
    return _layer_norm(x, shape, weight, bias, eps)


def simulate(
    config, settings: Settings, method: str, dtype, machine: Machine, rows: list[list[EncodedPair]], sharded: bool = False
) -> Profile:
    """Forward and backward of a micro-batch of each of `rows`, as `machine` would do them; `sharded`: with weights that FSDP gathers.

    A model that looks at values on its way (fakes have none), or takes no shared row, is stood in for by a Llama of its shape.

    Raises:
        UserError: transformers has no causal LM for the config.
    """
    stood_in = False
    with _quiet():
        try:
            phases, layer_gradient = _run(config, settings, method, dtype, machine, rows, sharded)
        except UserError:
            raise
        except Exception:  # whatever a model raises on fakes, it means the same: not this one
            stood_in = True
            phases, layer_gradient = _run(_llama_like(config.get_text_config()), settings, method, dtype, machine, rows, sharded)
        finally:
            attention.start_batch(None)
    counts = [sum(pair.tokens() for pair in row) for row in rows]
    return Profile(tuple(zip(counts, phases, strict=True)), layer_gradient, stood_in)


@contextlib.contextmanager
def _quiet():
    """Without what torch and transformers log about operations on fakes."""
    logger, verbosity = logging.getLogger("torch._subclasses.fake_tensor"), transformers.logging.get_verbosity()
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


def _run(config, settings, method, dtype, machine, rows, sharded) -> tuple[list[dict], float]:
    cuda, autocast = machine.device == "cuda", dtype != torch.float32
    model = _small_model(config, settings, method, dtype, sharded)
    lm = causal_lm(model)
    dense = not lm._supports_sdpa  # soft-capping and sinks run in eager code with dense masks
    mode, results = FakeTensorMode(), []
    with mode, contextlib.ExitStack() as stack:
        _fake(model)
        lm.set_attn_implementation("eager" if dense else SIMULATED)
        ScoringForward(lm)
        model.train()
        trainer.checkpoint_layers(model, LAYERS - 1)
        ledger = _Ledger(model)
        layer_bytes = _watch(lm, model, ledger)
        stack.enter_context(patch.object(adapters, "frozen_weight", _dequantised))
        stack.enter_context(patch.object(attention, "_mask", _no_mask))
        stack.enter_context(patch.object(moe, "_can_use_grouped_mm", lambda *args: False))  # its fake takes bfloat16 alone
        if machine.device != "cpu":
            stack.enter_context(patch.object(attention, "CPU_KERNEL", ()))
        _simulated_attention.varlen = cuda and autocast and machine.capability[0] >= 8
        if cuda and autocast:
            stack.enter_context(patch.object(nn.functional, "layer_norm", _float32_layer_norm))
        if machine.device == "mps":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for pairs in rows:
            batch = _fake_batch(mode, pairs, settings)
            given = dict(attention_mask=attention.dense_masks(batch, lm.config.get_text_config(), lm.dtype)) if dense else {}
            attention.start_batch(None if dense else batch)
            ledger.restart()
            with ledger:
                with torch.autocast("cpu", dtype, enabled=autocast):
                    out = model(
                        input_ids=batch.input_ids, position_ids=batch.position_ids,
                        hidden_index=batch.hidden_index, targets=batch.targets, **given,
                    )  # fmt: skip
                loss = trainer.pair_table(out["logps"], batch).sum()
                if out["router_loss"] is not None:
                    loss = loss + out["router_loss"]
                loss.backward()
            results.append(ledger.phases)
            del out, loss, batch, given
            model.zero_grad()
    return results, layer_bytes


def _fake_batch(mode, pairs, settings):
    with _disable_current_modes():
        batch = collate(pairs, nll_over=settings.nll_over)
    for name in ("input_ids", "position_ids", "hidden_index", "targets", "segment", "lengths", "keys", "starts"):
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
