"""The optimizers by the names of the settings; what happens when their state does not fit.

8-bit and paged ones are bitsandbytes', adafactor is transformers'. It takes no step by itself.
"""

from functools import partial
from types import MethodType

import torch
from torch import nn

from ..errors import UserError
from ..machine import attempt
from ..settings import Settings


def make_optimizer(settings: Settings, model: nn.Module, *, retry: bool) -> torch.optim.Optimizer:
    """Make the optimizer of a run over the weights that are trained; vectors and biases do not decay.

    Args:
        retry: take the first step again where memory ran out in it; no process of several may do so.
    """
    decaying, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decaying if p.dim() > 1 and "bias" not in name else others).append(p)
    kinds = (decaying, settings.weight_decay), (others, 0.0)
    groups = [{"params": some, "weight_decay": decay} for some, decay in kinds if some]
    rate, name = settings.learning_rate, settings.optimizer
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    elif name == "adafactor":
        from transformers.optimization import Adafactor

        optimizer = Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    else:
        optimizer = _bitsandbytes(groups, rate, name, model)
    if retry:
        # Schedules ask for the step's __func__.
        optimizer.step = MethodType(partial(step_again, type(optimizer).step), optimizer)
    return optimizer


def _bitsandbytes(groups: list[dict], rate: float, name: str, model: nn.Module):
    from bitsandbytes.optim import AdamW, GlobalOptimManager

    bits, paged = 8 if "8bit" in name else 32, name.startswith("paged")
    if bits == 8:  # its rows are updated rarely, which 8 bits do not bear
        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer = AdamW(groups, lr=rate, optim_bits=bits, is_paged=paged)
    if paged:
        optimizer.load_state_dict = partial(_load_paged, optimizer)
    return optimizer


def step_again(step, optimizer, *args, **kwargs):
    """Take an optimizer's step. The first allocates the state; where memory ran out, it is taken again."""
    take = partial(step, optimizer, *args, **kwargs)
    if optimizer.state:
        return take()
    if attempt(take)[1]:
        # The last one was at work when it happened; some count the step before they take it.
        *_, last = optimizer.state or [None]
        for parameter, state in list(optimizer.state.items()):
            if state.get("step", 0) > 0 and parameter is not last:
                parameter.grad = None  # it has been updated
            else:
                del optimizer.state[parameter]
        if message := attempt(take)[1]:
            way_out = "choose optimizer=adamw_8bit, or method=lora"
            raise UserError(f"Out of memory for the optimizer's state ({message}); {way_out}.")


def _load_paged(optimizer, state_dict: dict) -> None:
    """Load a paged optimizer's state into pages again; bitsandbytes' own would leave it on the GPU."""
    # The small rest follows at the first step.
    type(optimizer).load_state_dict(optimizer, state_dict, move_to_device=False)
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                if parameter.is_cuda:
                    torch.cuda.synchronize()  # its zeros are on their way
                state[name] = buffer.copy_(state[name])
