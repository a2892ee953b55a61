"""One training step of a shortened model on fake tensors: what each phase of it holds in memory.

A cut of three layers takes the kit's own path: forward, attention, head, loss, backward. Only shapes are
computed: no weights, no GPU, no kernel of one. Weights and optimizer state are costs.py's.
"""

import contextlib
import copy
import functools
import importlib.util
import logging
import sys
import warnings
import weakref
from dataclasses import replace

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe
from transformers.pytorch_utils import Conv1D

from ..errors import explain_model
from ..fast.attention import RowAttention, keys_of_heads, takes_sdpa
from ..fast.head import BLOCK_BYTES, ScoringForward
from ..fast.layouts import dense_masks
from ..fast.lora import replace_forwards
from ..kinds import class_of
from ..machine import Machine
from ..model import add_adapters
from ..orpo.batching import collate
from ..orpo.body import causal_lm, checkpoint_layers, sizes_of, text_layers
from ..settings import Settings
from .profile import LAYERS, PHASES, Phase, Profile, rough_profile

NAME = "lazyorpo-simulated"  # of the attention
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}  # their time is operations over a rate
LOOKUPS = {"embedding", "index_select", "gather", "index"}  # read no more than they write


class _Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that live, and the phases of a step as a Profile has them."""

    def __init__(self, model):
        super().__init__()
        weights = [*model.parameters(), *model.buffers()]  # not counted: their views would seem new
        self.live, self.alive = 0, {t.untyped_storage()._cdata for t in weights}

    def mark(self, name: str) -> None:
        """Begin a phase; `start` begins a step. Layers that run again in the backward begin none."""
        if name == "start":
            self.rows, self.grads, self.in_backward = {}, 0, False
        self.in_backward |= name.startswith("backward")
        if name.startswith("backward") or not self.in_backward:
            self.row = self.rows.setdefault(name, [self.live, self.live, self.live - self.grads, 0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # by far the most frequent call, and no operation
        out, before = func(*args, **(kwargs or {})), self.live
        made = _tensors(out)
        for tensor in made:
            if (key := (storage := tensor.untyped_storage())._cdata) not in self.alive:
                size = -(-storage.nbytes() // 512) * 512  # the CUDA allocator's rounding
                self.alive.add(key)
                self.live += size
                weakref.finalize(storage, self._free, key, size)
        self.row[1] = max(self.row[1], self.live)
        self.row[2] = max(self.row[2], self.live - self.grads)
        name = func._schema.name.removeprefix("aten::")
        if (self.live > before or func._schema.is_mutable) and not name.startswith(("empty", "new_empty")):
            self.row[4] += 1
            if name not in PRODUCTS:
                read = made if name in LOOKUPS else _tensors((args, kwargs))
                self.row[3] += sum(x.nbytes for x in made + read)
        return out

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.live -= size

    def watch(self, model, layers) -> None:
        """Note when layers and head begin, forward and backward, and every gradient that is made."""

        def begin(name):
            return lambda *_: self.mark(name)

        def begin_backward(name, module, args, out):
            if not self.in_backward:
                (out if isinstance(out, torch.Tensor) else out[0]).register_hook(begin(name))

        def count(parameter):
            self.grads += parameter.nbytes

        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(begin(f"forward {i}"))
            layer.register_forward_hook(functools.partial(begin_backward, f"backward {i}"))
        layers[-1].register_forward_hook(begin("head"))
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(count)


def _tensors(nested) -> list[torch.Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, torch.Tensor)]


def _dequantised(layer, dtype):
    """Stand in for `lora.frozen_weight`: hold what it holds for a moment."""
    if not hasattr(layer, "in_four_bit"):
        return layer.weight.to(dtype)
    scales = torch.zeros(layer.weight.numel() // 64, dtype=torch.float32)  # double quantisation undone, first
    weight = torch.zeros(layer.weight.shape, dtype=dtype)
    del scales
    return weight


def quantised_layers(model) -> list[nn.Module]:
    """List the layers that bitsandbytes takes in 4 bit: no fused experts, no kinds of their own."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if type(m) in (nn.Linear, Conv1D) and m is not head]


def on_meta(config, dtype):
    """Make the model of a config, its parameters shapes alone; UserError where transformers has none."""
    config = copy.deepcopy(config)  # on which transformers would write its dtype
    with torch.device("meta"), explain_model(getattr(config, "_name_or_path", "") or config.model_type):
        return class_of(config).from_config(config, dtype=dtype)


def _cut(config):
    """Copy a config with LAYERS layers and plain rotary positions: others branch on values."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
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
    """Make the cut as `method` trains it, on meta. FSDP gathers weights in the dtype of the computation."""
    model = on_meta(_cut(config), torch.float32 if method == "full" and not sharded else dtype)
    if method == "qlora":
        for layer in quantised_layers(model):
            layer.in_four_bit = True
    if method != "full":
        with torch.device("meta"):
            model = add_adapters(model, settings)
        replace_forwards(model, _dequantised)
    return model


def _fake(model) -> None:
    """Replace parameters and buffers by fake ones on the CPU; ties stay ties."""
    made, every = {}, dict(remove_duplicate=False)
    for place, old in [*model.named_parameters(**every), *model.named_buffers(**every)]:
        if old not in made:
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, made[old])


class _Kernel(torch.autograd.Function):
    """What a GPU's attention kernel holds: q (n, heads, head_dim), k and v (m, heads or fewer, head_dim)."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, sums = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)  # the last: of the softmax
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        scratch = [q.new_empty(q.shape, dtype=torch.float32)]
        scratch += [k.new_empty(len(k), *q.shape[1:]), v.new_empty(len(v), *grad.shape[1:])]
        gradients = tuple(map(torch.empty_like, (q, k, v)))
        del scratch
        return gradients


class _GpuAttention(RowAttention):
    """Attention of a shared row on a GPU, whatever its dropout: two calls of a kernel that needs no proof.
    `few_keys`: it takes fewer keys than queries, as the one for 16 bit does."""

    def __init__(self, few_keys: bool):
        super().__init__(kernel_devices=("cpu",), mask=_no_mask, name=NAME)
        self.few_keys = few_keys

    def __call__(self, *inputs, dropout=0.0, **options):
        return super().__call__(*inputs, **options)

    def proven_kernel(self, *inputs, **options):
        return lambda q, *kv: _Kernel.apply(q, *(kv[:2] if self.few_keys else keys_of_heads(q, *kv[:2])))


def _no_mask(n, total, window, like):
    """Stand in for a mask: CUDA builds none; costs.py adds the CPU's, which grow with a pair's square."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(n, total)


def _in_float32(norm: nn.LayerNorm, x):
    """Normalise as autocast does on CUDA; on the CPU it leaves layer_norm alone."""
    weight, bias = (None if t is None else t.float() for t in (norm.weight, norm.bias))
    return nn.functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def simulate(config, settings: Settings, method, dtype, machine: Machine, rows, sharded=False) -> Profile:
    """Run forward and backward of a micro-batch of each of `rows`, lists of EncodedPair, as `machine` would;
    `sharded`: the weights are gathered by FSDP.

    A model that looks at values on its way (fakes have none), or takes no shared row, is stood in for by a
    Llama of its shape; where this torch cannot simulate that either, by a few products of its sizes.
    """
    counts, llama = [sum(pair.tokens() for pair in row) for row in rows], _llama_like(config)
    for model, stood_in in ((config, ""), (llama, "those of a Llama of its shape")):
        try:
            with _plain(model):
                phases, *found = _run(model, settings, method, dtype, machine, rows, sharded)
            return Profile(tuple(zip(counts, phases, strict=True)), *found, stood_in)
        except Exception:  # whatever a model raises on fakes, it means the same: not this one
            continue
    return rough_profile(counts, llama.hidden_size, llama.intermediate_size, dtype.itemsize, 3 * BLOCK_BYTES)


@contextlib.contextmanager
def _plain(config):
    """Take back what Liger put into the model's module for the process: its kernels compute no fakes. Also
    silence what torch and transformers log about operations on fakes."""
    with contextlib.ExitStack() as stack, warnings.catch_warnings(action="ignore"):
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.ERROR)
        module = sys.modules[type(on_meta(_cut(config), torch.float32)).__module__]
        names = vars(module).items()
        liger = [k for k, x in names if str(getattr(x, "__module__", "")).startswith("liger_kernel")]
        fresh = importlib.util.module_from_spec(module.__spec__)
        if liger:
            module.__spec__.loader.exec_module(fresh)
        swaps = [(module, name, getattr(fresh, name)) for name in liger]
        if hasattr(moe, "_can_use_grouped_mm"):  # the fake of a grouped product takes bfloat16 alone
            swaps.append((moe, "_can_use_grouped_mm", lambda *args: False))
        for place, name, plain in swaps:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, plain)
        yield


def _llama_like(config):
    """Make the config of a Llama with the sizes of another, the largest where its layers differ."""
    vocabulary, hidden = on_meta(config, torch.float32).get_input_embeddings().weight.shape
    usual = dict(intermediate_size=4 * hidden, num_attention_heads=max(1, hidden // 64))
    usual |= dict(num_key_value_heads=None)  # as many
    sizes = {name: max(sizes_of(config, name), default=size) for name, size in usual.items()}
    tied = getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False)
    sizes |= dict(vocab_size=vocabulary, hidden_size=hidden, tie_word_embeddings=tied)
    return transformers.LlamaConfig(num_hidden_layers=LAYERS, **sizes)


def _run(config, settings, method, dtype, machine, rows, sharded) -> tuple[list[dict], float, bool]:
    """Simulate; give each row's phases, one layer's gradient bytes, whether attention's masks are dense."""
    autocast, results = dtype != torch.float32, []
    batches = [collate(pairs, nll_over=settings.nll_over) for pairs in rows]
    kernel = sdpa_kernel(SDPBackend.MATH) if machine.device == "mps" else contextlib.nullcontext()
    model = _small_model(config, settings, method, dtype, sharded)
    lm = causal_lm(model)
    text, dense = lm.config.get_text_config(decoder=True), not takes_sdpa(lm)  # dense masks in eager code
    if machine.device == "cuda":
        attention = _GpuAttention(few_keys=autocast and machine.capability[0] >= 8)
    else:
        attention = RowAttention(cpu_kernel_devices=(machine.device,), mask=_no_mask, name=NAME)
    with FakeTensorMode() as mode, kernel:
        _fake(model)
        for norm in model.modules() if autocast and machine.device == "cuda" else ():
            if type(norm) is nn.LayerNorm:
                norm.forward = functools.partial(_in_float32, norm)
        lm.set_attn_implementation("eager" if dense else NAME)
        ScoringForward(lm)
        model.train()
        checkpoint_layers(model, LAYERS - 1)
        layers, ledger = text_layers(lm)[:LAYERS], _Ledger(model)
        ledger.watch(model, layers)
        for real in batches:
            tensors = {name: t for name, t in vars(real).items() if isinstance(t, torch.Tensor)}
            batch = replace(real, **{name: mode.from_tensor(t) for name, t in tensors.items()})
            given = {n: getattr(batch, n) for n in ("input_ids", "position_ids", "hidden_index", "targets")}
            if dense:
                given["attention_mask"] = dense_masks(batch, text, lm.dtype)
            ledger.mark("start")
            with contextlib.nullcontext() if dense else attention.over(batch), ledger:
                with torch.autocast("cpu", dtype, enabled=autocast):
                    out = model(**given)
                loss = out["logps"].sum()
                if out["router_loss"] is not None:
                    loss = loss + out["router_loss"]
                loss.backward()
            results.append({name: Phase(*row) for name, row in ledger.rows.items()})
            if missing := PHASES - ledger.rows.keys():  # its layers are not gone through one by one
                raise ValueError(f"{missing} were not passed")
            del out, loss, batch, given
            model.zero_grad()
    gradient = sum(p.nbytes for p in layers[-1].parameters() if p.requires_grad)
    return results, float(gradient), dense
