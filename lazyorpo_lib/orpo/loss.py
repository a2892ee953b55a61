"""The ORPO loss (Hong et al. 2024, arXiv 2403.07691), and DPO's beside it: pure functions on float32 tensors.

No model, no device moves, no logging, no masks: inputs are already reduced to one number an answer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLosses(NamedTuple):
    """What the odds term gives for each pair, all of shape (B,) and float32."""

    or_loss: Tensor
    log_odds_chosen: Tensor
    log_odds_rejected: Tensor

    @property
    def log_odds_ratio(self) -> Tensor:
        return self.log_odds_chosen - self.log_odds_rejected


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of an answer with mean token log-probability `logp` (Eq. 4).

    Finite, with a finite gradient, for every input at or below 0: one clamp and one branch. A
    `torch.where` between two formulas gives NaN gradients, since the unused branch is differentiated too.

    Args:
        logp: nats per token, at most 0. Any shape; computed in float32.
    """
    # The upper bound keeps 1 - P away from 0 (past it the gradient is 0); the lower one only catches -inf.
    x = logp.float().clamp(min=-1e30, max=-1e-6)
    return x - torch.log(-torch.expm1(x))


def odds_ratio_loss(logp_chosen: Tensor, logp_rejected: Tensor) -> PairLosses:
    """-log sigmoid of the log odds ratio (Eqs. 5 and 7), for each pair.

    Args:
        logp_chosen: mean log-probability per token of each chosen answer (Eq. 3), nats. Shape (B,).
        logp_rejected: the same of the rejected answers. Shape (B,).

    Raises:
        ValueError: the two shapes differ.

    Example:
        >>> out = odds_ratio_loss(torch.tensor([-0.5]), torch.tensor([-1.0]))
        >>> round(out.or_loss.item(), 4), round(out.log_odds_ratio.item(), 4)
        (0.3203, 0.9741)
    """
    if logp_chosen.shape != logp_rejected.shape:
        raise ValueError(
            f"chosen has shape {tuple(logp_chosen.shape)}, rejected {tuple(logp_rejected.shape)}."
        )
    chosen, rejected = log_odds(logp_chosen), log_odds(logp_rejected)
    return PairLosses(-F.logsigmoid(chosen - rejected), chosen, rejected)


def orpo_loss(nll: Tensor, or_loss: Tensor, or_weight: float) -> Tensor:
    """nll + or_weight * mean or_loss (Eq. 6); `or_weight` is the paper's lambda, `beta` in TRL.

    Args:
        nll: negative log-likelihood per token of the chosen side. Scalar, nats.
        or_loss: the odds term of each pair. Shape (B,).
    """
    return nll + or_weight * or_loss.mean()


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """DPO's loss for each pair (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7).

    Args:
        chosen, rejected: summed log-probability of each answer under the model in training, nats. Shape (B,).
        ref_chosen, ref_rejected: the same under the frozen reference. Shape (B,).
    """
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
