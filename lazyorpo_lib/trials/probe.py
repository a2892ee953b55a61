"""The probe: a few short runs that recommend or_weight and learning_rate. It changes no setting itself."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..folder import read_json
from ..plan.planner import settled
from ..settings import Settings
from .runs import prepare_home, run_apart, write_up

GAINS = {"log_odds_ratio": "log_odds_ratio gain", "nll": "nll change", "accuracy": "accuracy gain"}


def probe(settings: Settings, *, steps: int = 20, show: Callable[[str], None] = print) -> Path:
    """Carry out short runs around the or_weight and learning_rate, each also a third and thrice as large.

    The rule: among the trials whose held-out nll did not rise, the largest gain of the held-out log-odds
    ratio; of equal ones the smaller learning rate. Where nll rose in all, the one in which it rose least.

    Args:
        steps: optimizer steps of a trial. It reads just as many pairs as these need.

    Returns:
        `probe/` in the run's folder that the settings name: a folder for each trial; probe.json, {"runs":
        [{"trial", "or_weight", "learning_rate", gains}], "recommended": {setting: value}, "said":
        [sentence]}; probe.md, probe.png.
    """
    home, held_out, settings = prepare_home(settings, "probe"), 32, settled(settings)
    if settings.eval_pairs != "auto":
        held_out = min(settings.eval_pairs or 32, 32)
    pairs_needed = 2 * (held_out + steps * settings.pairs_per_step)
    short = dataclasses.replace(
        settings, objective="orpo", max_steps=steps, warmup_steps=min(settings.warmup_steps, steps // 5),
        eval_pairs=held_out, max_pairs=min(settings.max_pairs or pairs_needed, pairs_needed),
        answers=0, resume="auto", hub_repo="", watch_every_steps=0,
    )  # fmt: skip
    w, r = settings.or_weight, settings.learning_rate
    runs = []
    for or_weight, rate in ((w, r), (w, r / 3), (w, r * 3), (w / 3, r), (w * 3, r)):
        values = {"or_weight": float(f"{or_weight:.2g}"), "learning_rate": float(f"{rate:.2g}")}
        name = " ".join(f"{k}={v:g}" for k, v in values.items())
        folder = home / name.replace(" ", "-")
        run_apart(dataclasses.replace(short, output_dir=str(folder), **values), show)
        held = read_json(folder / "summary.json").get("held_out", {})
        if held.keys() >= GAINS.keys():  # else its loss is no longer a number
            runs.append({"trial": name} | values | {gain: held[of]["change"] for of, gain in GAINS.items()})
    if not runs:
        raise UserError(f"The loss of every trial is no longer a number: lower learning_rate, {r:g}.")
    return write_up(home, "trial", runs, {gain: gain for gain in GAINS.values()}, recommend(runs))


def recommend(runs: Sequence[dict]) -> dict:
    """Apply the rule of `probe`: {"recommended": {setting: value}, "said": [sentence]}."""
    kept = [run for run in runs if run["nll change"] <= 0]
    if kept:
        best = min(kept, key=lambda run: (-run["log_odds_ratio gain"], run["learning_rate"]))
        why = (
            f"the largest gain of the held-out log-odds ratio ({best['log_odds_ratio gain']:+.3f}) among the "
            f"{len(kept)} of {len(runs)} trials whose held-out nll did not rise ({best['nll change']:+.3f})"
        )
    else:
        best = min(runs, key=lambda run: run["nll change"])
        rise = f"({best['nll change']:+.3f}): lower the learning rate further"
        why = f"held-out nll rose in every trial, least in this one {rise}"
    recommended = {name: best[name] for name in ("or_weight", "learning_rate")}
    flags = "--or-weight {or_weight:g} --learning-rate {learning_rate:g}".format(**recommended)
    return {"recommended": recommended, "said": [f"Recommended: {flags}: {why}."]}
