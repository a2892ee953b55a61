"""Every formula that is trained: odds, ORPO, SFT, DPO; one objective().

Source: Hong et al. 2024 (arXiv 2403.07691) for ORPO, Gorbatovski et al. 2025 (arXiv 2502.01237) for its
or_beta, Rafailov et al. 2023 (arXiv 2305.18290) for DPO. Pure functions on float32 tensors: no model, no
device moves, no logging. Training, evaluation and the log all call `objective`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_P_MAX = -1e-6  # nats; closer to 0 than this, 1 - P is rounding, and the odds are held
# What is known of each pair, in this order; the columns of held_out.json.
TERMS = (
    "nll", "nll_tokens", "or_loss", "log_odds_chosen", "log_odds_rejected", "logp_chosen", "logp_rejected",
    "accuracy", "dpo", "pairs",
)  # fmt: skip


class PairLosses(NamedTuple):
    """What the odds term gives for each pair, all of shape (B,) and float32."""

    or_loss: Tensor
    log_odds_chosen: Tensor
    log_odds_rejected: Tensor

    @property
    def log_odds_ratio(self) -> Tensor:
        return self.log_odds_chosen - self.log_odds_rejected


def log_odds(logp: Tensor) -> Tensor:
    """Give log(P / (1 - P)) of an answer with mean token log-probability `logp` (Eq. 4).

    Finite, with a finite gradient, for every input at or below 0: one clamp and one branch. A
    `torch.where` between two formulas gives NaN gradients, since the unused branch is differentiated too.

    Args:
        logp: nats per token, at most 0. Any shape; computed in float32.
    """
    # The upper bound keeps 1 - P away from 0 (past it the gradient is 0); the lower one only catches -inf.
    x = logp.float().clamp(min=-1e30, max=LOG_P_MAX)
    return x - torch.log(-torch.expm1(x))


def odds_ratio_loss(logp_chosen: Tensor, logp_rejected: Tensor, or_beta: float = 1.0) -> PairLosses:
    """Give -log sigmoid of or_beta times the log odds ratio for each pair: the paper's (Eqs. 5 and 7) of 1,
    else the tempered one of arXiv 2502.01237, Sec. 3.1.2.

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
        raise ValueError(f"chosen has shape {[*logp_chosen.shape]}, rejected {[*logp_rejected.shape]}.")
    chosen, rejected = log_odds(logp_chosen), log_odds(logp_rejected)
    return PairLosses(-F.logsigmoid(or_beta * (chosen - rejected)), chosen, rejected)


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta) -> Tensor:
    """Give DPO's loss for each pair (its Eq. 7).

    Args:
        chosen, rejected: summed log-probability of each answer under the model in training, nats. Shape (B,).
        ref_chosen, ref_rejected: the same under the frozen reference. Shape (B,).
    """
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def objective(sums: Mapping, *, nll_tokens: float, pairs: float, or_weight: float, name: str = "orpo"):
    """Give the loss of an optimizer step: the one place that says what is trained.

    orpo: nll + or_weight * or_loss (Eq. 6)    sft: nll alone    dpo: its own loss

    Args:
        sums: of TERMS over the pairs at hand, tensors or numbers: the whole step's, or a micro-batch's share.
        nll_tokens, pairs: of the whole step, so that the shares of its micro-batches add up to its loss.
        or_weight: the paper's lambda, `alpha` in the authors' code, `beta` in TRL.
    """
    if name == "dpo":
        return sums["dpo"] / pairs
    weight = or_weight if name == "orpo" else 0.0
    return sums["nll"] / nll_tokens + weight * sums["or_loss"] / pairs


def sums_of(logps: Tensor, segment: Tensor, lengths: Tensor) -> Tensor:
    """Sum the log-probabilities of each pair's chosen, rejected and prompt, (3, B); see pair_table."""
    return torch.zeros(len(lengths), device=logps.device).index_add(0, segment, logps.float()).view(3, -1)


def pair_table(
    logps: Tensor, segment: Tensor, lengths: Tensor, reference: Tensor | None = None, dpo_beta: float = 0.1,
    or_beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """Give what is known of each pair, a column a name of TERMS: (B, len(TERMS)) float32, with gradient.

    Args:
        logps: (M,) log-probability of each scored token, nats. segment, lengths: see `batching.Batch`.
        reference: (B, 2) summed log-probabilities of chosen and rejected under DPO's frozen reference.
    """
    chosen, rejected, prompt = sums_of(logps, segment, lengths)
    chosen_tokens, rejected_tokens, prompt_tokens = lengths.view(3, -1)
    logp_chosen, logp_rejected = chosen / chosen_tokens, rejected / rejected_tokens
    odds = odds_ratio_loss(logp_chosen, logp_rejected, or_beta)
    known = {
        "nll": -(chosen + prompt),
        "nll_tokens": chosen_tokens + prompt_tokens,
        "logp_chosen": logp_chosen,
        "logp_rejected": logp_rejected,
        "accuracy": (odds.log_odds_ratio > 0).float(),
        "dpo": torch.zeros_like(chosen),
        "pairs": torch.ones_like(chosen),
    } | odds._asdict()
    if reference is not None:
        known["dpo"] = dpo_loss(chosen, rejected, *reference.T, dpo_beta)
    return torch.stack([known[name] for name in TERMS], dim=1)


def by_name(table: Tensor) -> dict[str, Tensor]:
    """Give the column sums of a `pair_table` by their names, for `objective`."""
    return dict(zip(TERMS, table.sum(0).unbind(), strict=True))


def metrics(sums: Sequence[float], or_weight: float, name: str = "orpo") -> dict[str, float]:
    """Give the logged figures of a set of pairs from the column sums of its `pair_table`."""
    total = dict(zip(TERMS, sums, strict=True))
    pairs, tokens = max(total["pairs"], 1.0), max(total["nll_tokens"], 1.0)
    loss = objective(total, nll_tokens=tokens, pairs=pairs, or_weight=or_weight, name=name)
    means = {term: total[term] / pairs for term in TERMS if term not in ("nll", "nll_tokens", "dpo", "pairs")}
    ratio = means["log_odds_chosen"] - means["log_odds_rejected"]
    return {"nll": total["nll"] / tokens} | means | {"log_odds_ratio": ratio, "loss": loss}


def gradient_norms(
    table: Tensor, lengths: Tensor, *, nll_tokens: float, pairs: float, or_weight: float, or_beta: float = 1.0
) -> Tensor:
    """Give the squared norms of the gradients of the nll and of the weighted odds term with respect to the
    token log-probabilities, where the two terms meet: (2,).

    Args:
        table: of a micro-batch, without gradient. lengths: see `batching.Batch`. nll_tokens, pairs: a step's.
    """
    column = dict(zip(TERMS, table.T, strict=True))
    of_nll = column["nll_tokens"].sum() / nll_tokens**2
    logp = torch.stack([column["logp_chosen"], column["logp_rejected"]])
    # d or_loss / d log odds; d log odds / d logp = 1 / (1 - P), which the clamp makes 0 where P is all but 1.
    against = torch.sigmoid(or_beta * (column["log_odds_rejected"] - column["log_odds_chosen"]))
    outer = against * or_beta * or_weight / pairs
    slope = torch.where(logp <= LOG_P_MAX, -outer / torch.expm1(logp), 0.0)
    return torch.stack([of_nll, (slope.square() / lengths.view(3, -1)[:2]).sum()])
