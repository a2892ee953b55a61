"""What the curves of a run show, in words.

Rows are those of history.jsonl: of training with `step` and the curves by name (`nll`, `or_loss`, …), of
evaluations with `step` and the same names after `eval_`. It reads no file, computes no metric, draws nothing.
"""

import math
from itertools import pairwise
from statistics import fmean

CURVES = ("loss", "nll", "or_loss", "log_odds_chosen", "log_odds_rejected", "log_odds_ratio", "accuracy")
ENOUGH_POINTS = 10  # logged steps before `reading` judges


def is_evaluation(row: dict) -> bool:
    """Tell whether this row is an evaluation on held-out pairs, not a training step."""
    return any(name.startswith("eval_") for name in row)


def values(rows: list[dict], name: str) -> list[float]:
    """Give the finite values of one curve, in order; rows without it are passed over."""
    found = (row.get(name) for row in rows)
    return [value for value in found if value is not None and math.isfinite(value)]


def trend(curve: list[float], floor: float) -> tuple[int, float]:
    """Tell where a noisy curve went: the mean of its last fifth against that of its first.

    The noise comes from the differences of neighbours, in which a slow trend cancels: with values of variance
    s² their mean square is 2s², and the difference of two means of k values has the variance 2s²/k.

    Args:
        curve: at least two values.
        floor: smaller changes do not count, however certain; in the curve's unit.

    Returns:
        1 rising, -1 falling, 0 neither; the smallest change that would have counted (three times the noise).
    """
    fifth = max(1, len(curve) // 5)
    change = fmean(curve[-fifth:]) - fmean(curve[:fifth])
    needed = max(floor, 3 * math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(curve)) / fifth))
    return (change > needed) - (change < -needed), needed


def read_curves(rows: list[dict]) -> str:
    """Say in one line what the curves show and what to do, e.g. "margin rising, nll flat: healthy".

    The rules follow the paper's ablation of λ, our or_weight (arXiv 2403.07691): at 0.1 the sides stay close,
    at 0.5 chosen rises and rejected falls, at 1.0 both fall while the margin grows. Signs, no proofs.
    """
    train = [row for row in rows if not is_evaluation(row)]
    if train and train[-1].get("loss", 0) is None:
        return "the loss is no longer a number: stop, and go on from a checkpoint with a lower learning rate"
    names = ("log_odds_chosen", "log_odds_rejected", "log_odds_ratio", "nll")
    curves = [values(train, name) for name in names]
    seen = min(map(len, curves))
    if seen < ENOUGH_POINTS:
        return f"too early to say: {seen} of at least {ENOUGH_POINTS} logged steps"
    (chosen, _), (rejected, _), (margin, needed) = (trend(curve, floor=0.1) for curve in curves[:3])
    nll, _ = trend(curves[3], floor=0.02)
    rates, held_out = values(train, "learning_rate"), values(rows, "eval_nll")
    rising, both_fall = margin > 0, chosen < 0 and rejected < 0
    past_lowest = held_out and held_out[-1] > min(held_out) + 0.05
    rules = (
        (rising and both_fall, "both falling, margin rising: or_weight is too high; try half"),
        (
            rising and nll > 0,
            "margin rising but nll rising too: or_weight or learning rate is too high; try half",
        ),
        (rising and past_lowest, "margin rising but held-out nll past its lowest: it memorises; train less"),
        (rising, f"margin rising, nll {'falling' if nll < 0 else 'flat'}: healthy"),
        (nll > 0, "nll rising, margin not: the learning rate is too high; try a third"),
        (both_fall, "both falling, margin not rising: the learning rate is too high; try a third"),
        (margin < 0, "margin falling: raise or_weight, and check that chosen and rejected are not swapped"),
        (rates[-1:] > rates[-2:-1], "margin flat, learning rate still warming up: wait"),
        (needed > 0.5, "margin not yet out of its noise: wait for more steps"),
        (nll < 0, "margin flat, nll falling: it learns the answers, not the preference; or_weight is low"),
        (True, "margin flat, nll flat: learning rate or or_weight is low"),
    )
    return next(sentence for holds, sentence in rules if holds)
