"""Log-probabilities of the scored tokens from hidden states, without ever holding the logits.

`token_logps` is the maths; `ScoringForward` finds a model's output layer and what is done to its logits.
It knows no layout: hidden states in, one number a token out.
"""

import inspect

import torch
from torch import Tensor

from ..orpo.body import body_of
from ..orpo.scoring import logps_of

BLOCK_BYTES = 128 * 2**20  # float32 logits held at once; larger blocks were not faster on CPU
SOFTCAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"  # in configs
TILE = 128  # rows that a GPU's matrix product takes at once: part of a tile costs as much as a whole one


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias=None, softcap=0.0, scale=1.0
) -> Tensor:
    """Compute log softmax(cap(scale * (hidden @ weight.T + bias)))[target] of each token, in blocks.

    A frozen weight (LoRA, QLoRA) stores d logp / d hidden in the forward, so the backward needs no logits; a
    trained one recomputes its blocks. Matrix products run in the dtype of `weight` (autocast's, where it is
    on), softmax and sums in float32. torch's own linear_cross_entropy is young, recomputes, and knows no cap.

    Args:
        hidden: (M, H). weight: (V, H). targets: (M,) int64. bias: (V,).
        softcap: cap(z) = softcap * tanh(z / softcap), 0 for none (Gemma 2).
        scale: factor of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).

    Returns:
        (M,) float32, nats.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    with torch.autocast(device, enabled=False):
        return _Head.apply(hidden.to(dtype), weight.to(dtype), bias, targets, softcap, scale, trained)


def _log_softmax(hidden, weight, bias, softcap, scale):
    """Give a block of log-probabilities (m, V) in float32, and d capped / d raw or None without a cap."""
    logits = hidden @ weight.T
    if logits.dtype != torch.float16 or bias is not None or scale != 1.0 or softcap:
        logits = logits.float()  # else log_softmax casts as it reads (on CUDA)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    slope = None
    if softcap:
        t = torch.tanh_(logits.div_(softcap))
        slope = 1 - t * t
        logits = t.mul_(softcap)
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32), slope


def _blocks(weight: Tensor, tokens: int):
    rows = max(16, BLOCK_BYTES // (4 * weight.shape[0]))
    rows -= rows % TILE if rows > TILE else 0
    return (slice(i, i + rows) for i in range(0, tokens, rows))


def _block_gradient(logps, slope, targets, scale):
    """Give d logp / d (hidden @ weight.T + bias) of a block (m, V); `logps` are overwritten."""
    gradient = logps.exp_().neg_()
    gradient.scatter_add_(1, targets[:, None], torch.ones_like(gradient[:, :1]))
    if slope is not None:
        gradient *= slope
    return gradient.mul_(scale) if scale != 1.0 else gradient


def _block(hidden, weight, bias, targets, softcap, scale, jacobian: Tensor | None) -> Tensor:
    """Compute the log-probabilities of a block (m,). A function, so that no block's logits outlive it."""
    all_logps, slope = _log_softmax(hidden, weight, bias, softcap, scale)
    logps = all_logps.gather(1, targets[:, None])[:, 0]
    if jacobian is None:
        return logps
    if slope is not None:
        torch.mm(_block_gradient(all_logps, slope, targets, scale).to(weight.dtype), weight, out=jacobian)
    else:  # scale * (weight[target] - p @ weight): 1 - p of a target is never rounded to 16 bit
        same = weight.dtype == torch.float32
        p = torch.exp(all_logps, out=all_logps if same else torch.empty_like(all_logps, dtype=weight.dtype))
        torch.addmm(weight.index_select(0, targets), p, weight, beta=scale, alpha=-scale, out=jacobian)
    return logps


class _Head(torch.autograd.Function):
    """Log-probabilities (M,) block by block; `trained`: weight and bias get gradients too."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, scale, trained):
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not trained else None
        ctx.save_for_backward(*((hidden, weight, bias, targets) if trained else (jacobian,)))
        ctx.softcap, ctx.scale, ctx.trained = softcap, scale, trained
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for s in _blocks(weight, len(targets)):
            part = None if jacobian is None else jacobian[s]
            logps[s] = _block(hidden[s], weight, bias, targets[s], softcap, scale, part)
        return logps

    @staticmethod
    def backward(ctx, grad):
        if not ctx.trained:
            (jacobian,) = ctx.saved_tensors
            # In float32: fp16's loss scaling makes `grad` too large for the 16-bit type.
            return (jacobian.float() * grad[:, None]).to(jacobian.dtype), *[None] * 6
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for s in _blocks(weight, len(targets)):
            block = hidden[s], weight, bias, ctx.softcap, ctx.scale
            gradient = _block_gradient(*_log_softmax(*block), targets[s], ctx.scale).mul_(grad[s, None])
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            torch.mm(gradient, weight, out=grad_hidden[s])
            if weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, hidden[s])
            else:
                grad_weight += gradient.T @ hidden[s]
            del gradient  # before the next block's logits exist
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, *[None] * 4


class ScoringForward:
    """Gives a causal LM a second way of being called: `model(input_ids=…, hidden_index=…, targets=…)` returns
    {"logps": the log-probability of each target (M,), "router_loss": a scalar or None} in place of logits.

    It replaces `forward` on the one instance, so that all that wraps it (PEFT, DDP, FSDP, autocast) acts as
    for any forward. The model's own forward still runs (and adds its router loss), asked for the logits of no
    position; the hidden states are caught where they leave the body.

    Attributes:
        plain: whether `token_logps` stands in for the output layer. Where it cannot (an adapter on the head,
            an unknown class; layouts.py's probe decides), the model's own logits are used, of the scored
            tokens alone.
    """

    def __init__(self, model):
        config = model.config.get_text_config(decoder=True)

        def factor(*names: str, default: float = 1.0) -> float:
            values = (getattr(config, name, None) for name in names)
            return float(next((x for x in values if x and isinstance(x, int | float)), default))

        self.model, self.original, self.hidden = model, model.forward, None
        self.plain = type(model.get_output_embeddings()) is torch.nn.Linear
        self.softcap = factor(*SOFTCAPS, default=0.0)
        self.scale = factor("logit_scale", "lm_head_multiplier") / factor("logits_scaling")
        self.router_loss = factor("router_aux_loss_coef", default=0.0)
        body_of(model).register_forward_hook(self._catch)
        self.__signature__ = inspect.signature(model.forward)  # generate() asks what a forward takes
        model.forward = self

    def _catch(self, module, args, output):
        self.hidden = output[0]

    def __call__(self, *args, hidden_index=None, targets=None, **kwargs):
        if targets is None:
            return self.original(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        router = self.router_loss and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2))
        if router:  # transformers' router loss cannot read a dense mask, so gpt-oss goes without
            kwargs["output_router_logits"] = True
        keep = hidden_index[:0] if self.plain else 0  # the positions whose logits are wanted, or 0 for all
        try:
            out = self.original(*args, use_cache=False, logits_to_keep=keep, **kwargs)
        finally:  # also where memory ran out: the graph behind it must not live on
            hidden, self.hidden = self.hidden, None
        if self.plain:
            hidden = hidden.flatten(0, 1).index_select(0, hidden_index)  # the others need not be held
            layer = self.model.get_output_embeddings()
            options = dict(bias=layer.bias, softcap=self.softcap, scale=self.scale)
            logps = token_logps(hidden, layer.weight, targets, **options)
        else:
            logps = logps_of(out.logits, hidden_index, targets)
        loss = getattr(out, "aux_loss", None) if router else None
        return {"logps": logps, "router_loss": None if loss is None else self.router_loss * loss}
