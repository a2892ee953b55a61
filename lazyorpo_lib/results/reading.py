"""What the curves of a run show, in words.

Rows are those of history.jsonl, an evaluation's figures after `eval_`. Where the held-out pairs were measured
before and after, they decide, and no curve. It reads no file, computes no metric, draws nothing.
"""

import math
from functools import cache
from operator import mul
from statistics import fmean

CURVES = ("loss", "nll", "or_loss", "log_odds_chosen", "log_odds_rejected", "log_odds_ratio", "accuracy")
ENOUGH_POINTS = 10  # logged steps before `reading` judges
FEWEST = 6  # prompts to prove a change by: fewer agree by luck in over one run of 20
# Of a curve, in its unit: smaller changes do not count, however certain; what is larger is not flat.
SIZES = {name: (0.1, 0.25) for name in CURVES if name.startswith("log_odds")} | {"nll": (0.02, 0.1)}


def is_evaluation(row: dict) -> bool:
    """Tell whether this row is an evaluation on held-out pairs, not a training step."""
    return any(name.startswith("eval_") for name in row)


def last_step(rows: list[dict]) -> int:
    """Give the last optimizer step that these rows tell of; 0 without any."""
    return max((row["step"] for row in rows), default=0)


def values(rows: list[dict], name: str) -> list[float]:
    """Give the finite values of one curve, in order; rows without it are passed over."""
    found = (row.get(name) for row in rows)
    return [value for value in found if value is not None and math.isfinite(value)]


def _dot(a, b) -> float:
    return sum(map(mul, a, b))


@cache
def _lines(n: int) -> list[list[float]]:
    """Give a constant, a line and a logarithm over n points, each of length 1 and square to the others."""
    found = []
    for line in ([1.0] * n, [i / n for i in range(n)], [math.log1p(20 * i / n) for i in range(n)]):
        line = _without(line, found)
        found.append([x / math.sqrt(_dot(line, line)) for x in line])
    return found


def _without(curve: list[float], lines: list[list[float]]) -> list[float]:
    """Take from a curve what it has of each line."""
    for line in lines:
        share = _dot(curve, line)
        curve = [y - share * x for x, y in zip(line, curve, strict=True)]
    return curve


def trend(curve: list[float]) -> tuple[float, float]:
    """Give how far a noisy curve went, the mean of its last fifth less that of its first, and the standard
    deviation of that: of what a line and a logarithm (of what rises soon, then stays) leave of the curve, in
    which neighbours lean on each other as in an autoregression, by as much as so few points allow.
    """
    width = math.ceil(len(curve) / 200)
    curve = [fmean(curve[i : i + width]) for i in range(0, len(curve), width)]
    fifth, n = max(1, len(curve) // 5), len(curve)
    rest = _without(curve, _lines(n))
    squares = _dot(rest, rest) or 1e-30
    lag = max(0.0, _dot(rest, rest[1:]) / squares)
    lag = min(0.97, lag + (6 + 4 * lag) / n)
    alike = (1 + lag) / (1 - lag)  # points that count as one
    variance = squares / (n - 3) / max(0.25, 1 - alike / n)
    change = fmean(curve[-fifth:]) - fmean(curve[:fifth])
    return change, math.sqrt(2 * variance / fifth * min(alike, fifth))


def _sign(rows: list[dict], train: list[dict], name: str, figures: dict) -> int | None:
    """Tell whether a curve rises (1), falls (-1) or is flat (0); None: not out of its noise."""
    least, flat = SIZES.get(name, (0.0, 0.0))
    if name in figures:
        low, high = figures[name]["change_interval"]
        if figures[name].get("prompts", FEWEST) < FEWEST:
            return None
        return 1 if low > 0 else -1 if high < 0 else 0 if -flat <= low and high <= flat else None
    change, noise = trend(values(train, name))
    first, *_, last = values(rows, f"eval_{name}") * 2 or (0.0, 0.0)  # of one they are the same
    if abs(change) > max(least, 3 * noise):
        sign = 1 if change > 0 else -1
        return sign if sign * (last - first) >= -least else None
    return 0 if abs(change) + 2 * noise <= flat and abs(last - first) <= flat else None


def _memorises(seen: list[float]) -> bool:
    """Tell whether the held-out nll, evaluation by evaluation, has passed its lowest."""
    bends = [(a - 2 * b + c) ** 2 for a, b, c in zip(seen, seen[1:], seen[2:], strict=False)]
    noise = math.sqrt(fmean(bends) / 6) if len(bends) > 2 else 0.0
    return bool(seen) and seen[-1] > min(seen) + max(0.05, 4 * noise)


def read_curves(rows: list[dict], results: dict | None = None) -> str:
    """Say in one line what the curves show and what to do, e.g. "margin rising, nll flat: healthy".

    What is not beyond its noise is told as such, never as flat, and no advice stands on it. The rules follow
    the paper's ablation of λ, our or_weight (arXiv 2403.07691): at 0.1 the sides stay close, at 0.5 chosen
    rises and rejected falls, at 1.0 both fall while the margin grows. Signs, no proofs. `results`: of the
    held-out pairs, `held_out` and `verdict` of summary.json, and `kept_step`, where it is not the last.
    """
    train, results = [row for row in rows if not is_evaluation(row)], results or {}
    if train and train[-1].get("loss", 0) is None:
        return "the loss is no longer a number: stop, and go on from a checkpoint with a lower learning rate"
    if "no gain all the same" in results.get("verdict", ""):
        return "the model fell to pieces, see the held-out figures: lower learning_rate or or_weight"
    names = ("log_odds_chosen", "log_odds_rejected", "log_odds_ratio", "nll")
    figures = results.get("held_out") or {}
    seen = min(len(values(train, name)) for name in names)
    if seen < ENOUGH_POINTS and not figures.keys() >= set(names):
        return f"too early to say: {seen} of at least {ENOUGH_POINTS} logged steps"
    chosen, rejected, margin, nll = (_sign(rows, train, name, figures) for name in names)
    what, accuracy = "margin", _sign(rows, train, "accuracy", figures) if "accuracy" in figures else None
    if accuracy and not margin:
        what, margin = "accuracy", accuracy
    elif accuracy and margin == -accuracy:
        return "held-out accuracy and margin go different ways: look at the pairs before you change anything"
    held_out, kept = "log_odds_ratio" in figures or what == "accuracy", results.get("kept_step", math.inf)
    evaluated = values([row for row in rows if row["step"] <= kept], "eval_nll")
    sides, rates = {chosen, rejected}, values(train, "learning_rate")
    told = _judged(
        what, margin, nll, both_fall=sides == {-1}, side_holds=bool(sides & {0, 1}),
        memorises=_memorises(evaluated), warming=rates[-1:] > rates[-2:-1],
        more="hold out more pairs, or train longer" if held_out else "wait for more steps",
    )  # fmt: skip
    return f"on held-out pairs {told}" if held_out else told


def _judged(what, margin, nll, *, both_fall, side_holds, memorises, warming, more) -> str:
    rising, unproven, noise = margin == 1, margin is None, "not yet out of its noise"
    moves = {1: "rising", 0: "flat", -1: "falling", None: noise}[nll]
    sound = more if not side_holds else "so far healthy" if nll is None else "healthy"
    both_high = "or_weight or learning rate is too high"
    low = {-1: "it learns the answers, not the preference; or_weight is low", None: more}
    rules = (
        (rising and both_fall, f"both falling, {what} rising: or_weight is too high; try half"),
        (rising and nll == 1, f"{what} rising but nll rising too: {both_high}; try half"),
        (rising and memorises, f"{what} rising but held-out nll past its lowest: it memorises; train less"),
        (rising, f"{what} rising, nll {moves}: {sound}"),
        (unproven and nll == 1, "nll rising: the learning rate is too high; try a third"),
        (unproven, f"{what} {noise}: {more}"),
        (nll == 1, f"nll rising, {what} not: the learning rate is too high; try a third"),
        (both_fall, f"both falling, {what} not rising: the learning rate is too high; try a third"),
        (margin == -1, f"{what} falling: raise or_weight; check that chosen and rejected are not swapped"),
        (warming, f"{what} flat, learning rate still warming up: wait"),
        (True, f"{what} flat, nll {moves}: {low.get(nll, 'learning rate or or_weight is low')}"),
    )
    return next(sentence for holds, sentence in rules if holds)
