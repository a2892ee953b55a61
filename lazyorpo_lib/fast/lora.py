"""A LoRA layer's forward and backward in one piece: no scaled copy of its output, no second sum of its input.

PEFT owns the adapters: it makes, saves, loads, disables and merges them. `replace_forwards` only replaces how
a layer is computed while it is trained; the maths is the same. It knows no pairs and no losses.
"""

import functools

import torch
from torch import Tensor, nn


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Give the weight of a frozen linear layer, (out, in) in `dtype`; a 4-bit one is dequantised anew."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


class _AdaptedLinear(torch.autograd.Function):
    """x @ W.T + bias + scale * y @ A.T @ B.T, with gradients; y is x after dropout, or None for x itself."""

    @staticmethod
    def forward(ctx, x, y, a, b, layer, scale, weight_of):
        # x, y (M, in), A (rank, in), B (out, rank)
        seen = x if y is None else y
        down = seen @ a.to(x.dtype).T
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        out = nn.functional.linear(x, weight_of(layer, x.dtype), bias)
        ctx.save_for_backward(seen, a, b, down)
        ctx.layer, ctx.scale, ctx.weight_of = layer, scale, weight_of
        return out.addmm_(down, b.to(x.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        seen, a, b, down = ctx.saved_tensors
        up, narrow = (w.to(seen.dtype) for w in (b, a))
        grad_down = (grad @ up).mul_(ctx.scale)
        grad_x = grad @ ctx.weight_of(ctx.layer, seen.dtype) if ctx.needs_input_grad[0] else None
        grad_y = None
        if ctx.needs_input_grad[1]:
            grad_y = grad_down @ narrow
        elif grad_x is not None:
            grad_x.addmm_(grad_down, narrow)
        grad_a, grad_b = (grad_down.T @ seen).to(a.dtype), (grad.T @ down).mul_(ctx.scale).to(b.dtype)
        return grad_x, grad_y, grad_a, grad_b, None, None, None


def _forward(lora, plain, weight_of, x: Tensor, *args, **kwargs) -> Tensor:
    if lora.disable_adapters or lora.merged or not torch.is_grad_enabled():
        return plain(x, *args, **kwargs)
    (name,) = lora.active_adapters
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    dropout = lora.lora_dropout[name]
    dropped = None if isinstance(dropout, nn.Identity) else dropout(flat)
    weights = lora.lora_A[name].weight, lora.lora_B[name].weight
    out = _AdaptedLinear.apply(flat, dropped, *weights, lora.base_layer, lora.scaling[name], weight_of)
    return out.view(*x.shape[:-1], out.shape[-1])


def replace_forwards(model, weight_of=frozen_weight) -> None:
    """Have the LoRA layers of a PEFT model over an `nn.Linear`, plain or in 4 bit, computed in one piece, by
    each instance's forward; PEFT's own runs where no gradient is asked for, or adapters are off."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if hasattr(module, "lora_A") and isinstance(base, nn.Linear):
            # Other quantised layers (8-bit, FP8) compute in ways of their own, which stay PEFT's.
            if type(base) is nn.Linear or getattr(base.weight, "quant_state", None) is not None:
                module.forward = functools.partial(_forward, module, module.forward, weight_of)
