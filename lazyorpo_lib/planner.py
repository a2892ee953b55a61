"""Will it fit, and how long will it take: answered from a model's config.json, before anything else is downloaded.

One training step of a three-layer cut of the model (two layers checkpointed, one not) runs on fake tensors, through the kit's own
forward, attention, head and loss, at two lengths; every phase of a step is linear in tokens, stored layers and checkpointed layers,
so that the peak of any depth and budget follows from those two runs. Minutes are arithmetic operations over a rate.

Measured against real runs on CPU only (tests/benchmarks/planner_check.py). What is CUDA's own is a stated constant that no run has
checked: CUDA_CONTEXT_GIB, FRAGMENTATION, EFFICIENCY. It loads no weights and knows neither several GPUs nor generation.
"""

import contextlib
import copy
import functools
import math
import re
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from unittest.mock import patch

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from . import attention, trainer
from .batching import EncodedPair, collate
from .head import BLOCK_BYTES, ScoringForward
from .model import Machine, add_adapters, causal_lm, explained, pick_precision, this_machine
from .settings import Settings, UserError

METHODS = ("full", "lora", "qlora")  # strongest first
MARGIN = 0.08  # share of the memory that a plan leaves free
CUDA_CONTEXT_GIB = 0.5  # context 0.35 to 0.45, cuBLAS workspace 0.03 to 0.1
FRAGMENTATION = {"cuda": 0.05, "mps": 0.05, "cpu": 0.03}  # of what comes and goes in a step
EFFICIENCY = 0.45  # of a card's peak, reached by a whole training step; a T4 throttles at 70 W
MEASURED_EFFICIENCY = 0.65  # of the rate of one large matrix product timed on the machine at hand
APPLE_SHARE = 0.75  # of the RAM may be the GPU's working set
HOST_LINK = 12e9  # bytes a second between card and host, for paged optimizers
FULL_LEARNING_RATE = 5e-5  # above it, full tuning is not taken automatically: it would destroy the model
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet. Memory as the driver reports it, GiB; dense TFLOP/s; memory bandwidth in GB/s."""

    name: str
    memory_gib: float
    tflops_16: float
    tflops_32: float
    bandwidth: float
    capability: tuple[int, int]
    efficiency: float = EFFICIENCY

    @property
    def machine(self) -> Machine:
        return Machine("cuda", self.name, self.memory_gib, self.capability)


CARDS = {
    c.name: c
    for c in (
        Card("T4", 14.7, 65, 8.1, 320, (7, 5), 0.3),
        Card("L4", 22.0, 121, 30.3, 300, (8, 9)),
        Card("A10", 22.0, 125, 31.2, 600, (8, 6)),
        Card("A40", 44.4, 150, 37.4, 696, (8, 6)),
        Card("A100-40", 39.4, 312, 19.5, 1555, (8, 0)),
        Card("A100-80", 79.1, 312, 19.5, 2039, (8, 0)),
        Card("H100", 79.1, 989, 67, 3350, (9, 0)),
        Card("H200", 139.8, 989, 67, 4800, (9, 0)),
    )
}


def find_card(name: str) -> Card | Machine:
    """A card of CARDS by name, in any case; or `cpu` or `apple`, with GiB of RAM behind a dash or this machine's.

    Raises:
        UserError: no such name.
    """
    wanted = re.sub(r"^(nvidia|tesla)[ -]|gb$", "", name.strip().lower()).strip().replace(" ", "-")
    for card in CARDS.values():
        if card.name.lower() == wanted:
            return card
    if match := re.fullmatch(r"(cpu|apple)(?:-(\d+))?", wanted):
        ram = float(match[2] or psutil.virtual_memory().total / GIB)
        return Machine("cpu", "CPU", ram) if match[1] == "cpu" else Machine("mps", "Apple GPU", ram)
    raise UserError(f"device is {name!r}, but must be one of {', '.join(CARDS)}, cpu-<GiB> or apple-<GiB>; choose one of these.")


# How long the pairs are.


@dataclass(frozen=True)
class Lengths:
    """Of the training pairs: how many, mean tokens of their parts, tokens of the longest pair with its prompt once."""

    pairs: int
    prompt: float
    chosen: float
    rejected: float
    longest: int
    source: str = "the dataset"

    @property
    def mean(self) -> float:
        return self.prompt + self.chosen + self.rejected


def measured_lengths(pairs: Sequence[EncodedPair]) -> Lengths:
    """Of pairs already encoded."""
    n = max(len(pairs), 1)
    parts = [sum(len(pair[i]) for pair in pairs) / n for i in (1, 2, 3)]
    return Lengths(len(pairs), *parts, max((pair.tokens() for pair in pairs), default=16))


# Tokens of (prompt, chosen, rejected): every sixth, by length, of 300 pairs of argilla/dpo-mix-7k's sources in a 49k vocabulary.
_MIX = (
    (103, 5, 30), (104, 93, 8), (56, 24, 179), (48, 48, 237), (73, 196, 93), (95, 218, 142), (52, 342, 117), (484, 73, 5),
    (481, 109, 6), (480, 68, 76), (277, 129, 278), (100, 187, 436), (657, 15, 116), (63, 575, 214), (47, 550, 301), (98, 531, 343),
    (85, 495, 444), (164, 438, 502), (507, 257, 455), (608, 314, 384), (48, 647, 703), (732, 384, 345), (739, 414, 386),
    (891, 314, 446), (775, 351, 584), (1237, 98, 474), (831, 395, 679), (1180, 411, 525), (1300, 494, 511), (1551, 411, 604),
)  # fmt: skip
_KNOWN_PAIRS = {
    "argilla/dpo-mix-7k": 6750, "argilla/ultrafeedback-binarized-preferences-cleaned": 60917,
    "HuggingFaceH4/ultrafeedback_binarized": 61135,
}  # fmt: skip


def preset_lengths(dataset: str, settings: Settings) -> Lengths:
    """Of a dataset not yet downloaded: its published size and the lengths of a known mix, under the settings' limits.
    A dataset that is not known is planned as 7,000 pairs of that mix, and `source` says so."""
    name = dataset.split(":")[0]
    sample, pairs, source = _MIX, _KNOWN_PAIRS.get(name, 7000), f"the known lengths of {name}"
    if name == "demo":
        sample, pairs, source = ((45, 30, 30),), 264, "the demo's lengths"
    elif name not in _KNOWN_PAIRS:
        source = "a guess: 7,000 pairs as long as argilla/dpo-mix-7k's"
    kept = []
    for p, c, r in sample:
        if settings.overlong == "truncate":
            p = min(p, settings.max_prompt_tokens)
            room = settings.max_tokens - p
            kept.append((p, min(c, room), min(r, room)))
        elif p <= settings.max_prompt_tokens and p + max(c, r) <= settings.max_tokens:
            kept.append((p, c, r))
    share = len(kept) / len(sample)
    kept = kept or [(settings.max_tokens // 3,) * 3]
    pairs = max(1, round(min(pairs, settings.max_pairs or pairs) * share) - settings.eval_pairs)
    # Real data has tails that 30 pairs do not show: the longest is taken as long as the limits let this mix be.
    longest = max(max(map(sum, kept)), min(round(1.25 * max(map(sum, kept))), 2 * settings.max_tokens - 1))
    return Lengths(pairs, *(sum(x) / len(kept) for x in zip(*kept, strict=True)), longest, source)


# One step on fake tensors.

SIMULATED = "lazyorpo-planner"  # the kit's attention, as the planned device would compute it
LAYERS = 3  # two checkpointed, then one that is not: enough to tell what one more of either kind adds


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


class _FourBitProduct(torch.autograd.Function):
    """What bitsandbytes holds during a 4-bit layer: the weight, dequantised in the forward and again in the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return nn.functional.linear(x, _FourBitProduct.dequantised(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ _FourBitProduct.dequantised(ctx.weight, grad.dtype), None, None

    @staticmethod
    def dequantised(weight, dtype):
        scales = torch.empty(weight.numel() // 64, dtype=torch.float32)  # double quantisation undone, first
        weight = torch.empty(weight.shape, dtype=dtype)
        del scales
        return weight


class _FourBit(nn.Linear):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        out = _FourBitProduct.apply(x.to(self.compute_dtype), self.weight, bias)
        return out.to(x.dtype).clone()  # PEFT clones what comes out of a 4-bit layer


def _adapted(model) -> list[nn.Module]:
    """The layers that PEFT's all-linear adapts and bitsandbytes quantises."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _on_meta(config, dtype):
    with torch.device("meta"), explained("model", getattr(config, "_name_or_path", "") or config.model_type):
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


def _small_model(config, settings: Settings, method: str, dtype, cuda: bool):
    """The cut model as `method` trains it, its parameters on meta."""
    model = _on_meta(_cut(config), torch.float32 if method == "full" else dtype)
    if method == "full":
        return model
    if method == "qlora":
        for layer in _adapted(model):
            if isinstance(layer, nn.Linear):
                layer.__class__, layer.compute_dtype = _FourBit, dtype
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name.lower():
                parameter.data = parameter.data.float()
    with torch.device("meta"):
        model = add_adapters(model, settings)
    for module in model.modules():
        if cuda and method == "qlora" and hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # PEFT's 4-bit layers do not cast under autocast
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
        return attention._varlen(query, key, value, scaling, sliding_window), None
    return attention.attention(module, query, key, value, attention_mask, dropout, scaling, sliding_window, **kwargs)


_simulated_attention.varlen = False
AttentionInterface.register(SIMULATED, _simulated_attention)
AttentionMaskInterface.register(SIMULATED, lambda *args, **kwargs: None)


def _no_mask(n, total, window, like):
    """A mask that takes no memory: CUDA builds none, and the CPU's are added by `_mask_bytes`."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(n, total)


def _mask_bytes(machine: Machine, dtype, lengths: Lengths) -> float:
    """Of the masks of rejected answers, a token; only the CPU's kernel wants them."""
    if machine.device == "cuda":
        return 0.0
    return lengths.rejected * (lengths.prompt + lengths.rejected) * dtype.itemsize / lengths.mean


_layer_norm = nn.functional.layer_norm


def _float32_layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """As autocast runs it on CUDA; on the CPU it leaves layer_norm alone."""
    x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
    return _layer_norm(x, shape, weight, bias, eps)


def _run(config, settings: Settings, method: str, dtype, machine: Machine, rows: list[list[EncodedPair]]):
    """Forward and backward of a micro-batch on fakes, for each of `rows`: the ledger's phases; and one layer's gradient bytes."""
    cuda, autocast = machine.device == "cuda", dtype != torch.float32
    model = _small_model(config, settings, method, dtype, cuda)
    lm = causal_lm(model)
    dense = not lm._supports_sdpa  # soft-capping and sinks run in eager code with dense masks
    mode, results = FakeTensorMode(), []
    with mode, contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _fake(model)
        lm.set_attn_implementation("eager" if dense else SIMULATED)
        ScoringForward(lm)
        model.train()
        trainer.checkpoint_layers(model, LAYERS - 1)
        ledger = _Ledger(model)
        layer_bytes = _watch(lm, model, ledger)
        stack.enter_context(patch.object(attention, "_mask", _no_mask))
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
        attention.start_batch(None)
    return results, layer_bytes


def _fake_batch(mode, pairs, settings):
    with _disable_current_modes():
        batch = collate(pairs, nll_over=settings.nll_over)
    for name in ("input_ids", "position_ids", "hidden_index", "targets", "segment", "lengths"):
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
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(ledger.add_gradient)
    return float(sum(p.numel() * p.element_size() for p in layers[-1].parameters() if p.requires_grad))


# From two runs of three layers to every depth, budget and number of checkpointed layers.


@dataclass(frozen=True)
class _Inventory:
    """The whole model's parameters, counted on meta. `bulk` = in adapted (and 4-bit) layers; `active` = used by one token."""

    total: int
    bulk: int
    active: int
    head: int
    adapters: int
    largest: int
    norms: int
    factored: int  # numbers in adafactor's row and column averages
    layers: int
    attention_width: int

    def weights(self, method: str, dtype) -> float:
        if method == "full":
            return 4.0 * self.total
        if method == "lora":
            return float(dtype.itemsize * self.total)
        # NF4: 4 bits, an 8-bit scale for each 64 weights, a float32 one for each 256 scales.
        return self.bulk * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + dtype.itemsize * (self.total - self.bulk) + (4 - dtype.itemsize) * self.norms


def _take_inventory(config, rank: int) -> _Inventory:
    model, text = _on_meta(config, torch.float32), config.get_text_config()
    parameters = dict(model.named_parameters())  # tied ones once
    shapes = [(m.weight.shape[0], m.weight.shape[1]) for m in _adapted(model)]
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    experts = sum(p.numel() for p in parameters.values() if p.dim() == 3)
    of = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or getattr(text, "n_routed_experts", None)
    share = getattr(text, "num_experts_per_tok", 1) / of if of else 1.0
    bulk = sum(a * b for a, b in shapes)
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return _Inventory(
        total=sum(p.numel() for p in parameters.values()),
        bulk=bulk,
        active=round(bulk + experts * share),
        head=(embedding if head is None else head.weight).numel(),
        adapters=sum(rank * (a + b) for a, b in shapes),
        largest=max(p.numel() for p in parameters.values()),
        norms=sum(p.numel() for n, p in parameters.items() if p.dim() == 1 and "norm" in n.lower()),
        factored=sum(p.numel() if p.dim() < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in parameters.values()),
        layers=text.num_hidden_layers,
        attention_width=heads,
    )


@dataclass(frozen=True)
class _Profile:
    """Simulated phases at some token counts, in bytes; `at` gives them at any other, piecewise linear."""

    points: tuple[tuple[int, dict], ...]
    layer_gradient: float

    def at(self, tokens: int) -> dict[str, list[float]]:
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
            moments |= {"forward 2": forward, "backward 2": back + stored_back * stored_more}
            moments["backward 2 "] = back + made * stored_more
        if checkpointed:
            moments["backward 1"] = back + made * stored_more
        heights = {name: phases[name.strip()][column] + more for name, more in moments.items()}
        top = max(heights, key=heights.get)
        head = phases["head"][column] - start["head"] if top == "head" else 0.0
        grads = 0.0 if held else phases[top.strip()][1] - phases[top.strip()][2] + (made * (layers - LAYERS) if top == "backward 0" else 0.0)
        return heights[top], max(head, 0.0), grads


_inventories: dict[tuple, _Inventory] = {}
_profiles: dict[tuple, _Profile] = {}  # a panel plans again at every change; few changes need a new simulation


def _profile(config, settings: Settings, method: str, dtype, machine: Machine, lengths: Lengths, cap: int) -> _Profile:
    """Simulations at lengths on either side of where the head's blocks are full, from then on all is linear."""
    shares = [part / lengths.mean for part in (lengths.prompt, lengths.chosen, lengths.rejected)]
    scored = 1.0 if settings.nll_over != "answer" else 1 - shares[0]
    vocabulary = config.get_text_config().vocab_size
    full = math.ceil(BLOCK_BYTES / (4 * vocabulary) / scored) + 64
    if machine.device == "mps":  # attention with all its scores: pairs as long as they are
        points = [round(lengths.mean), 2 * round(lengths.mean)]
    elif full >= cap:
        points = [max(64, cap // 2), max(128, cap)]
    else:
        points = [min(lengths.longest, full // 2)] * (lengths.longest < full) + [full, 2 * full]
    key = (config.to_json_string(), method, dtype, machine.device, machine.capability[0] >= 8, settings.lora_rank,
           settings.lora_dropout > 0, settings.nll_over, *(round(x, 2) for x in shares), *points)  # fmt: skip
    if key not in _profiles:
        rows = []
        for tokens in points:
            count = max(1, round(tokens / lengths.mean)) if machine.device == "mps" else 1
            p, c, r = (max(1, round(share * tokens / count)) for share in shares)
            rows.append([EncodedPair(i, [1] * p, [1] * c, [1] * r) for i in range(count)])
        results, layer_gradient = _run(config, settings, method, dtype, machine, rows)
        _profiles[key] = _Profile(tuple(zip(points, results, strict=True)), layer_gradient)
    return _profiles[key]


def _optimizer_bytes(settings: Settings, method: str, shape: _Inventory, cuda: bool) -> tuple[float, float]:
    """Of the optimizer's state in a step, and of what an update holds for a moment."""
    trained = shape.total if method == "full" else shape.adapters
    largest = 4.0 * min(shape.largest, trained)
    passing = {
        "adamw": 0.0 if "fused" in trainer.OPTIMIZERS["adamw"] else 4.0 * trained if cuda else 2 * largest,
        "adafactor": 3 * largest,
    }
    state = {
        "adamw": 8.0 * trained,
        "adamw_8bit": 2.03 * trained,
        "paged_adamw_8bit": 0.0 if cuda else 2.03 * trained,
        "paged_adamw_32bit": 0.0 if cuda else 8.0 * trained,
        "adafactor": 4.0 * shape.factored if method == "full" else 0.1 * trained,
    }
    return state[settings.optimizer], passing.get(settings.optimizer, 0.0)


# How long.


@functools.lru_cache(maxsize=8)
def _timed_rate(device: str, dtype) -> float:
    """Operations a second of one matrix product on the machine at hand."""
    n = 768 if device == "cpu" else 4096
    a = torch.ones(n, n, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def _rates(machine: Machine, card: Card | None, dtype) -> tuple[float, float, str]:
    """Achievable operations and bytes a second, and where they come from."""
    if card is None and machine.device == "cuda":
        same = [c for c in CARDS.values() if re.search(rf"\b{c.name.split('-')[0]}\b", machine.name)]
        card = min(same, key=lambda c: abs(c.memory_gib - machine.memory_gib), default=None)
    if card is not None:
        peak = card.tflops_32 if dtype == torch.float32 else card.tflops_16
        return peak * 1e12 * card.efficiency, card.bandwidth * 1e9, f"{card.name}: {peak:g} TFLOP/s x {card.efficiency:g}"
    if machine.device == "mps" and not torch.backends.mps.is_available():
        return 3e12 * EFFICIENCY, 100e9, f"Apple GPU, assumed: 3 TFLOP/s x {EFFICIENCY:g}"
    rate = _timed_rate(machine.device, dtype)
    bandwidth = {"cpu": 10e9, "mps": 100e9, "cuda": 400e9}[machine.device]
    return rate * MEASURED_EFFICIENCY, bandwidth, f"{machine.name}, timed: {rate / 1e12:.3g} TFLOP/s x {MEASURED_EFFICIENCY:g}"


@dataclass(frozen=True)
class _Work:
    """What one pair, one micro-batch and one step cost; see `MethodPlan.explain`."""

    body: float  # operations of a pair's forward in the layers
    attention: float
    head: float  # forward and backward
    passes: float  # of the body: forward 1, gradients of activations 1, of weights 1
    batch_bytes: float  # read and written once a pass over the weights
    step_bytes: float  # by the optimizer
    paged_bytes: float  # optimizer state that may leave the card
    pairs: float
    steps: int
    eval_pairs: float


def _work(settings: Settings, method: str, shape: _Inventory, lengths: Lengths, dtype, cuda: bool) -> _Work:
    p, c, r = lengths.prompt, lengths.chosen, lengths.rejected
    products = (p + c) ** 2 / 2 + r * p + r * r / 2
    scored = c + r + (p if settings.nll_over != "answer" else 0)
    full = method == "full"
    traffic = {"full": (4 + dtype.itemsize) * shape.total, "lora": dtype.itemsize * shape.total,
               "qlora": (0.5 + 2 * dtype.itemsize) * shape.bulk}[method]  # fmt: skip
    trained = shape.total if full else shape.adapters
    steps = max(1, math.ceil(settings.epochs * math.ceil(lengths.pairs / settings.pairs_per_step)))
    steps = min(steps, settings.max_steps or steps)
    evaluations = 2 + (steps // settings.eval_every_steps if settings.eval_every_steps else 0)
    paged = cuda and settings.optimizer.startswith("paged")
    return _Work(
        body=2.0 * shape.active * lengths.mean + (0 if full else 2.0 * shape.adapters * lengths.mean),
        attention=4.0 * products * shape.attention_width * shape.layers,
        head=(8.0 if full else 4.0) * scored * shape.head,
        passes=3.0 if full else 2.0,
        batch_bytes=traffic,
        step_bytes=28.0 * trained,
        paged_bytes=0.0 if not paged else (8.0 if "32" in settings.optimizer else 2.03) * trained,
        pairs=min(settings.epochs * lengths.pairs, steps * settings.pairs_per_step),
        steps=steps,
        eval_pairs=float(min(settings.eval_pairs, lengths.pairs) * evaluations),
    )


# The plan.


@dataclass(frozen=True)
class MethodPlan:
    """One method: where the peak goes (GiB by part; they sum to `peak_gib`), how long, with which split of a step."""

    method: str
    peak_gib: float
    parts: dict[str, float]
    minutes: float
    fits: bool
    tokens_per_batch: int
    checkpointed_layers: int
    layers: int
    arithmetic: tuple[str, ...] = ()

    def explain(self) -> str:
        """The arithmetic behind `minutes`, a line an item."""
        return "\n".join(self.arithmetic)


@dataclass(frozen=True)
class Plan:
    """Every method on one device; which is chosen and why; where that one does not fit, the nearest changes that would."""

    device: str
    memory_gib: float
    methods: list[MethodPlan]
    chosen: str
    why: str
    changes: list[str] = field(default_factory=list)
    dtype: str = "bfloat16"
    lengths: Lengths | None = None

    @property
    def method(self) -> MethodPlan:
        return next(m for m in self.methods if m.method == self.chosen)

    def as_dict(self) -> dict:
        """As JSON: device, memory_gib, methods, chosen, why, changes, dtype, lengths."""
        return asdict(self)

    def line(self) -> str:
        """In one line, for the panel."""
        m, here = self.method, "this CPU" if self.device.startswith("CPU") else f"this {self.device}"
        verdict = "fits" if m.fits else "does not fit"
        more = f"; {self.changes[0]}" if self.changes else ""
        return f"{m.peak_gib:.1f} of {self.memory_gib:.1f} GiB, about {_duration(m.minutes)} on {here}: {verdict}{more}"

    def table(self) -> str:
        """The methods as text, a line each; the chosen one has a star."""
        rows = [f"{'':2}{'method':8}{'GiB':>8}{'of':>8}  {'':14}{'time':>12}{'tokens':>9}{'checkpointed':>14}"]
        for m in self.methods:
            verdict, star = "fits" if m.fits else "does not fit", "*" if m.method == self.chosen else ""
            rows.append(
                f"{star:2}{m.method:8}{m.peak_gib:8.1f}{self.memory_gib:8.1f}  {verdict:14}{_duration(m.minutes):>12}"
                f"{m.tokens_per_batch:9}{f'{m.checkpointed_layers} of {m.layers}':>14}"
            )
        return "\n".join([*rows, self.why, *self.changes])


def _duration(minutes: float) -> str:
    if minutes < 1:
        return f"{max(1, round(60 * minutes))} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


class _Planner:
    """One method on one device: the peak and the time of any split, and the best split."""

    def __init__(self, config, settings: Settings, machine: Machine, card, lengths: Lengths, dtype, method: str):
        self.settings, self.machine, self.lengths, self.dtype, self.method = settings, machine, lengths, dtype, method
        self.cuda = machine.device == "cuda"
        key = config.to_json_string(), settings.lora_rank
        if key not in _inventories:
            _inventories[key] = _take_inventory(config, settings.lora_rank)
        self.shape = _inventories[key]
        # A step of random pairs is rarely half as long again as the mean one; the longest pair always has room.
        step = min(settings.pairs_per_step * lengths.longest, round(1.5 * settings.pairs_per_step * lengths.mean))
        self.cap = max(lengths.longest, step, 16)
        self.profile = _profile(config, settings, method, dtype, machine, lengths, self.cap)
        self.rate, self.bandwidth, self.rate_source = _rates(machine, card, dtype)
        self.work = _work(settings, method, self.shape, lengths, dtype, self.cuda)
        self.optimizer, self.passing = _optimizer_bytes(settings, method, self.shape, self.cuda)
        self.memory = machine.memory_gib * (APPLE_SHARE if machine.device == "mps" else 1)
        self.framework = CUDA_CONTEXT_GIB * GIB if self.cuda else float(psutil.Process().memory_info().rss)

    def parts(self, tokens: int, checkpointed: int) -> dict[str, float]:
        """The peak by part, GiB."""
        shape, full = self.shape, self.method == "full"
        trained = 4.0 * (shape.total if full else shape.adapters)
        held = not full or tokens < self.cap  # adapters' gradients are small: always counted
        moving, head, grads = self.profile.peak(tokens, shape.layers, checkpointed, held)
        moving += tokens * _mask_bytes(self.machine, self.dtype, self.lengths)
        grads = trained if held else grads
        step = self.passing + trained  # the optimizer's own peak, activations gone
        if step > moving + (trained if held else 0.0):
            moving, head, grads, held = self.passing, 0.0, trained, True
        activations = moving - head - (0.0 if held else grads)
        parts = {
            "weights": shape.weights(self.method, self.dtype), "adapters": 0.0 if full else trained, "gradients": grads,
            "optimizer": self.optimizer, "activations": activations, "head": head,
            "framework": self.framework + FRAGMENTATION[self.machine.device] * (activations + head),
        }  # fmt: skip
        return {name: value / GIB for name, value in parts.items()}

    def minutes(self, tokens: int, checkpointed: int) -> tuple[float, tuple[str, ...]]:
        w, layers = self.work, self.shape.layers
        again = checkpointed / layers
        body = w.body * (w.passes + again)
        attention = w.attention * (3.5 + again)  # flash attention's backward is 2.5 forwards
        pair = body + attention + w.head
        # First-fit leaves about a tenth of the budget empty, where a step does not go in at once.
        batches = max(1, math.ceil(self.settings.pairs_per_step * self.lengths.mean / tokens * (1.1 if tokens < self.cap else 1)))
        memory = batches * w.batch_bytes * (2 + again) + w.step_bytes
        # What does not fit beside the peak leaves the card and comes back, once a step.
        over = sum(self.parts(self.computed(tokens), checkpointed).values()) * GIB + w.paged_bytes - self.memory
        paging = 2 * min(max(over, 0.0), w.paged_bytes) / HOST_LINK
        step = self.settings.pairs_per_step * pair / self.rate + memory / self.bandwidth + paging
        evaluation = w.eval_pairs * (w.body + w.attention + w.head / 2) / self.rate
        training = step * w.pairs / self.settings.pairs_per_step
        total = (training + evaluation) / 60
        lines = (
            f"a pair: {self.lengths.mean:.0f} tokens; layers {body / 1e12:.3g} + attention {attention / 1e12:.3g} + head {w.head / 1e12:.3g} TFLOP"
            f" ({w.passes:.0f} passes, {checkpointed} of {layers} layers computed again)",
            f"a step: {self.settings.pairs_per_step} pairs in {batches} micro-batches; {self.settings.pairs_per_step * pair / self.rate:.3g} s"
            f" at {self.rate / 1e12:.3g} TFLOP/s ({self.rate_source}), {memory / self.bandwidth:.3g} s moving weights and optimizer state"
            + (f", {paging:.3g} s paging it over the host link" if w.paged_bytes else ""),
            f"the run: {w.pairs:.0f} pairs = {w.pairs / self.settings.pairs_per_step:.0f} steps x {step:.3g} s, evaluation {evaluation:.3g} s:"
            f" {total:.3g} min (answers written for comparison not counted)",
        )
        return total, lines

    def splits(self):
        """Token budgets and numbers of checkpointed layers that the settings leave open, largest budgets first."""
        tokens, checkpointed = self.settings.tokens_per_batch, self.settings.checkpointed_layers
        layers = self.shape.layers
        count = 12
        ratio = self.lengths.longest / self.cap
        budgets = [round(self.cap * ratio ** (i / count)) for i in range(count + 1)] if tokens == "auto" else [tokens]
        # A pair longer than the budget is a micro-batch of its own all the same.
        budgets = list(dict.fromkeys(budgets))
        return budgets, (range(layers + 1) if checkpointed == "auto" else [min(checkpointed, layers)])

    def computed(self, budget: int) -> int:
        return min(max(budget, self.lengths.longest), self.cap)

    def best(self) -> MethodPlan:
        """The quickest split that fits, of equally quick ones the larger budget; else the one that needs least."""
        budgets, counts = self.splits()
        limit, found = self.memory * (1 - MARGIN), []
        for budget in budgets:
            for count in counts:
                peak = sum(self.parts(self.computed(budget), count).values())
                if peak <= limit:
                    found.append((self.minutes(budget, count)[0], budget, count))
                    break  # more checkpointed layers only take longer
        if found:
            quickest = min(m for m, *_ in found)
            _, budget, count = next(f for f in found if f[0] <= 1.001 * quickest)
        else:
            budget, count = budgets[-1], counts[-1]
        parts = self.parts(self.computed(budget), count)
        minutes, lines = self.minutes(budget, count)
        return MethodPlan(
            self.method, sum(parts.values()), parts, minutes, bool(found), budget, count, self.shape.layers, lines
        )


def make_plan(config, settings: Settings, target: Machine | Card | str, lengths: Lengths, *, dtype=None) -> Plan:
    """Plan every method of a run.

    Args:
        config: of the model (`model.load_config`).
        target: a machine, a card, or a name that `find_card` knows.
        lengths: `measured_lengths` of encoded pairs, or `preset_lengths` before there are any.
        dtype: of the computation; None takes what `pick_precision` gives.

    Raises:
        UserError: an unknown card, or a model class that transformers cannot build or that cannot be simulated.
    """
    target = find_card(target) if isinstance(target, str) else target
    card = target if isinstance(target, Card) else None
    machine = card.machine if card else target
    dtype = dtype or pick_precision(settings.precision, machine)[0]
    planners = [_Planner(config, settings, machine, card, lengths, dtype, method) for method in METHODS]
    methods = [p.best() for p in planners]
    chosen, why = _choose(settings, methods, machine)
    plan = Plan(machine.name, planners[0].memory, methods, chosen, why, dtype=str(dtype).removeprefix("torch."), lengths=lengths)
    if not plan.method.fits:
        plan.changes.extend(_changes(plan, settings, planners[METHODS.index(chosen)]))
    return plan


def _choose(settings: Settings, methods: list[MethodPlan], machine: Machine) -> tuple[str, str]:
    if settings.method != "auto":
        return settings.method, f"{settings.method}: chosen in the settings"
    full, lora, qlora = methods
    if full.fits and settings.learning_rate <= FULL_LEARNING_RATE:
        return "full", f"full: every weight can be trained within {machine.name}'s memory, the strongest method"
    if full.fits:
        reason = f"full tuning would fit too, but learning_rate {settings.learning_rate:g} suits adapters (full: up to {FULL_LEARNING_RATE:g})"
    else:
        reason = f"full tuning would need {full.peak_gib:.0f} GiB"
    if lora.fits:
        return "lora", f"lora: the strongest method that fits; {reason}"
    if qlora.fits:
        return "qlora", f"qlora: only with 4-bit weights does it fit; {reason}, lora {lora.peak_gib:.1f} GiB"
    return "qlora", f"qlora: nothing fits, and this is nearest ({qlora.peak_gib:.1f} GiB)"


def _changes(plan: Plan, settings: Settings, planner: _Planner) -> list[str]:
    """What would make the chosen method fit, nearest first."""
    found, m = [], plan.method
    limit = planner.memory * (1 - MARGIN)
    least = sum(planner.parts(planner.lengths.longest, planner.shape.layers).values())
    if least <= limit:
        found.append("set tokens_per_batch and checkpointed_layers to auto")
    else:
        shorter = next((t for t in range(planner.lengths.longest, 64, -32) if sum(planner.parts(t, planner.shape.layers).values()) <= limit), 0)
        if shorter:
            found.append(f"drop pairs of more than {shorter} tokens: max_tokens={max(64, shorter * settings.max_tokens // planner.lengths.longest)}")
    lighter = [x for x in plan.methods if x.fits and METHODS.index(x.method) > METHODS.index(m.method)]
    found += [f"method={x.method} needs {x.peak_gib:.1f} GiB" for x in lighter[:1]]
    if m.method == "full" and settings.optimizer == "adamw" and m.peak_gib - 0.74 * m.parts["optimizer"] <= limit:
        found.append("optimizer=adamw_8bit would do")
    larger = [c for c in sorted(CARDS.values(), key=lambda c: c.memory_gib) if m.peak_gib <= c.memory_gib * (1 - MARGIN)]
    found += [f"a {larger[0].name} would do ({larger[0].memory_gib:g} GiB)"] if larger else []
    return found or ["choose a smaller base_model"]
