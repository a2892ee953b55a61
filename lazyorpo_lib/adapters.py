"""A LoRA layer's forward and backward in one piece: no scaled copy of its output, no second sum over its input.

PEFT owns the adapters: it makes, saves, loads, disables and merges them. `fuse` only replaces how a layer is computed while
it is trained; the maths is the same. It knows no pairs and no losses.
"""

import functools

import torch
from torch import Tensor, nn


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a frozen linear layer, (out, in) in `dtype`; a 4-bit one is dequantised, anew each time."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


class _AdaptedLinear(torch.autograd.Function):
    """x @ W.T + bias + scale * x @ A.T @ B.T, in the dtype of x, with gradients for x, A and B alone."""

    @staticmethod
    def forward(ctx, x, a, b, layer, scale):
        # x (M, in), A (rank, in), B (out, rank)
        down = x @ a.to(x.dtype).T
        out = nn.functional.linear(x, frozen_weight(layer, x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
        ctx.save_for_backward(x, a, b, down)
        ctx.layer, ctx.scale = layer, scale
        return out.addmm_(down, b.to(x.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, a, b, down = ctx.saved_tensors
        grad_down = (grad @ b.to(x.dtype)).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ frozen_weight(ctx.layer, x.dtype)).addmm_(grad_down, a.to(x.dtype))
        grad_b = (grad.T @ down).mul_(ctx.scale)
        return grad_x, (grad_down.T @ x).to(a.dtype), grad_b.to(b.dtype), None, None


def _forward(lora, plain, x: Tensor, *args, **kwargs) -> Tensor:
    if lora.disable_adapters or lora.merged or not torch.is_grad_enabled():
        return plain(x, *args, **kwargs)
    (name,) = lora.active_adapters
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        weights = lora.lora_A[name].weight, lora.lora_B[name].weight
        return _AdaptedLinear.apply(flat, *weights, lora.base_layer, lora.scaling[name]).view(*x.shape[:-1], -1)


def fuse(model) -> None:
    """Have the LoRA layers of a PEFT model computed in one piece: those without dropout over an `nn.Linear`, 4-bit or not.

    The forward is replaced on each instance, and PEFT's own is used where no gradient is asked for, or the adapter is off.
    """
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear) and hasattr(module, "lora_A"):
            if all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values()):
                module.forward = functools.partial(_forward, module, module.forward)
