"""The probe: a few short runs that recommend or_weight and learning_rate. It changes no setting itself."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..folder import read_json
from ..plan.planner import settled
from ..results.evaluate import WHEN, by_prompt, measures
from ..settings import Settings
from .runs import prepare_home, run_apart, write_up

GAINS = {"log_odds_ratio": "log_odds_ratio gain", "nll": "nll change", "accuracy": "accuracy gain"}
LEVEL = 0.99  # of the intervals, all together
ROUNDS = 6  # each with twice the steps and twice the held-out pairs of the one before


def probe(settings: Settings, *, steps: int = 20, show: Callable[[str], None] = print) -> Path:
    """Carry out short runs with the or_weight and learning_rate, and each also a third and thrice as large.

    While they do not tell, and `max_minutes` leaves the time, all take twice the steps and are held against
    each other on twice the pairs; with 0 there is one round. The rule is that of `recommend`.

    Args:
        steps: optimizer steps of a trial of the first round. It reads just as many pairs as these need.

    Returns:
        `probe/` in the run's folder that the settings name: a folder for each trial; probe.json, {"runs":
        [{"trial", "or_weight", "learning_rate", gains}] of the last round, "recommended": {setting: value},
        empty where no trial differs beyond its interval, "said": [sentence]}; probe.md, probe.png.
    """
    home, minutes, settings = prepare_home(settings, "probe"), 0.0, settled(settings)
    held_out = 32 if settings.eval_pairs == "auto" else min(settings.eval_pairs or 32, 32)
    for k in range(ROUNDS):
        size = dict(steps=steps * 2**k, held_out=held_out * 2**k)
        runs, pairs, prompts, took = _round(settings, home, show, **size)
        rest, minutes = recommend(runs, pairs, prompts), minutes + took
        if rest["recommended"] or minutes + 2 * took > settings.max_minutes:
            break
        show(f"{rest['said'][0]} Once more, with twice the steps and pairs: about {2 * took:.0f} min.")
    if not rest["recommended"]:
        need = f"a max_minutes of {minutes + 2 * took:.0f} or more lets it go on, with twice the steps"
        need = need if k + 1 < ROUNDS else f"{ROUNDS} rounds are the most: give it more pairs"
        rest["said"].append(f"The probe took {minutes:.1f} min; {need}.")
    return write_up(home, "trial", runs, {gain: gain for gain in GAINS.values()}, rest)


def _round(settings: Settings, home: Path, show, *, steps: int, held_out: int):
    """Carry out the trials: their figures, {figure: (trials, pairs)}, the pairs' prompts, and the minutes."""
    pairs_needed = 2 * (held_out + steps * settings.pairs_per_step)
    short = dataclasses.replace(
        settings, objective="orpo", max_steps=steps, warmup_steps=min(settings.warmup_steps, steps // 5),
        eval_pairs=held_out, max_pairs=min(settings.max_pairs or pairs_needed, pairs_needed),
        answers=0, evaluate="", keep="last", patience=0, resume="auto", hub_repo="", watch_every_steps=0,
        max_minutes=0.0,
    )  # fmt: skip
    w, r = settings.or_weight, settings.learning_rate
    runs, changes, prompts, minutes = [], [], [], 0.0
    for or_weight, rate in ((w, r), (w, r / 3), (w, r * 3), (w / 3, r), (w * 3, r)):
        values = {"or_weight": float(f"{or_weight:.2g}"), "learning_rate": float(f"{rate:.2g}")}
        name = " ".join(f"{k}={v:g}" for k, v in values.items())
        folder = home / f"{name.replace(' ', '-')}-{steps}-steps"
        run_apart(dataclasses.replace(short, output_dir=str(folder), **values), show)
        minutes += read_json(folder / "summary.json").get("minutes", 0.0)
        kept = read_json(folder / "held_out.json")
        before, after = (measures(kept, when) if when in kept else {} for when in WHEN)
        change = [after[of] - before[of] for of in GAINS if of in before and of in after]
        if len(change) == len(GAINS) and np.isfinite(change).all():
            means = zip(GAINS.values(), np.mean(change, axis=1).tolist(), strict=True)
            runs.append({"trial": name, **values, **dict(means)})
            changes.append(change)
            prompts = kept.get("prompt_ids", range(len(kept["after"]["pairs"])))
        elif not runs:  # with which the others are compared
            raise UserError(f"The loss of the trial with {name} is no longer a number: lower learning_rate.")
    return runs, dict(zip(GAINS, np.array(changes).swapaxes(0, 1), strict=True)), prompts, minutes


def recommend(runs: Sequence[dict], pairs: dict[str, np.ndarray], prompts: Sequence) -> dict:
    """Hold each trial against the first one, that of the settings as they are, pair by pair.

    The rule: among the trials whose held-out nll did not rise, the largest gain of the held-out log-odds
    ratio, of equal ones the smaller rate, if it is larger than the first one's beyond the interval. Where
    the first one's nll rose, one whose nll is lower beyond the interval. The intervals hold for all trials
    and both figures at once.

    Args:
        runs: {gain: mean, "or_weight", "learning_rate"} of each. pairs: {"log_odds_ratio", "nll": (trials,
            pairs)}, changes. prompts: a name for the prompt of each pair; pairs of one go together.

    Returns:
        {"recommended": {setting: value}, empty where nothing is proven, "said": [sentence]}.
    """
    gain, fall = _weighed(pairs, prompts)
    rising, gained = runs[0]["nll change"] > 0, "log_odds_ratio gain"
    by, of = (fall, "fall of the held-out nll") if rising else (gain, "gain of the held-out log-odds ratio")
    others = [
        run | {"more": more, "low": low, "told": f"{more:+.3f} ({low:+.3f} to {high:+.3f}) more {of}"}
        for run, (more, low, high) in zip(runs, by, strict=True)
    ][1:]
    better = [trial for trial in others if trial["low"] > 0]
    kept = [trial for trial in better if trial["nll change"] <= 0]
    found = kept or (better if rising else [])
    count = pairs["nll"].shape[1]
    tried = f"{len(runs)} trials on {count} held-out pairs ({LEVEL:.0%} intervals for all together)"
    if not found:
        said = f"None of {tried} is better than the settings as they are beyond its interval"
        if others:
            widest = max(others, key=lambda trial: trial["more"])
            said += f"; the most is {widest['trial']}, {widest['told']}"
        return {"recommended": {}, "said": [f"{said}: nothing is recommended."]}
    best = min(found, key=lambda t: (-t[gained] if kept else t["nll change"], t["learning_rate"]))
    recommended = {name: best[name] for name in ("or_weight", "learning_rate")}
    flags = "--or-weight {or_weight:g} --learning-rate {learning_rate:g}".format(**recommended)
    why = f"{best['told']} than with the settings as they are; {tried}"
    if not kept:
        why += "; held-out nll rose in all that are better, so lower the learning rate further"
    return {"recommended": recommended, "said": [f"Recommended: {flags}: {why}."]}


def _weighed(pairs: dict[str, np.ndarray], prompts: Sequence) -> list[np.ndarray]:
    """Give how much more log-odds ratio, and how much less nll, each trial has than the first, and from where
    to where: (trials, 3) of each. The largest of all differences is weighed against what it is with the signs
    of the pairs, prompt by prompt, drawn by lot."""
    gain, nll = (by_prompt(pairs[name] - pairs[name][0], prompts) for name in ("log_odds_ratio", "nll"))
    sums = np.concatenate([gain, -nll])
    scale = np.sqrt((sums**2).sum(axis=1)) + 1e-12
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (5000, sums.shape[1]))
    limit = np.quantile(np.abs(signs @ (sums / scale[:, None]).T).max(axis=1), LEVEL)
    mean, half = np.array([sums.sum(axis=1), limit * scale]) / pairs["nll"].shape[1]
    return np.split(np.stack([mean, mean - half, mean + half], axis=1), 2)
