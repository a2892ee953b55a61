"""ORPO against SFT and SFT then DPO: from the same base, on the same pairs, with the same number of steps."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..folder import read_json
from ..plan.planner import settled
from ..results import card
from ..results.evaluate import broken, changes, measures
from ..settings import Settings
from .runs import prepare_home, run_apart, write_up

RECIPES = ("SFT", "SFT then DPO", "ORPO")
QUALITY = {"accuracy": "accuracy", "log_odds_ratio": "log-odds ratio, nats", "nll": "nll, nats per token"}
HABIT = {"habit_after": "answers with the habit"}  # of the demo
COST = {
    "training_minutes": "training minutes",
    "tokens": "tokens",
    "forward_passes": "forward passes",
    "training_peak_gib": "training's peak, GiB",
}


def compare_recipes(
    settings: Settings, *, seeds: int = 3, dpo_learning_rate: float = 0.0, show: Callable[[str], None] = print
) -> Path:
    """Carry out SFT, SFT then DPO and ORPO, a few seeds of each, and compare them on held-out pairs.

    SFT then DPO spends half of the epochs (or max_steps) on each stage; with an even number of epochs every
    recipe sees every pair equally often. DPO starts from the merged model of its SFT, which is also its
    reference. A seed decides the order of the pairs, the adapters' start and which pairs are held out; within
    a seed all recipes are tested on the same ones.

    Args:
        settings: what the recipes share; `objective`, `seed` and `output_dir` are set here.
        seeds: how many, from 1 on.
        dpo_learning_rate: of the DPO stage; 0: a thirtieth of `learning_rate`, about the usual ratio.

    Returns:
        `comparison/` in the run's folder: a folder a run; comparison.json, {"runs": [{"recipe", "seed",
        figure: value}], "said": [sentence]}; the same as comparison.md, a table, and .png.
    """
    if not settings.eval_pairs:
        raise UserError("eval_pairs is 0: a comparison needs held-out pairs; give at least 40.")
    home, runs, folders = prepare_home(settings, "comparison"), [], {}
    settings = settled(settings)
    for seed in range(1, seeds + 1):
        for recipe in RECIPES:
            stages = _stages(settings, home, recipe, seed, dpo_learning_rate or settings.learning_rate / 30)
            for before, stage in zip([None, *stages], stages, strict=False):
                run_apart(stage, show, merge=before and before.output_dir)
            folders.setdefault(recipe, []).append(Path(stages[-1].output_dir))
            figures = _figures([Path(stage.output_dir) for stage in stages])
            runs.append({"recipe": recipe, "seed": seed} | figures)
            words = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            show(f"{recipe}, seed {seed}: {words}")
    said = [*(_verdict(folders, other) for other in RECIPES[:2]), _sft_tokens(folders["SFT"][0])]
    return write_up(home, "recipe", runs, QUALITY | HABIT | COST, {"said": said})


def _stages(settings: Settings, home: Path, recipe: str, seed: int, dpo_rate: float) -> list[Settings]:
    def stage(name, **changed):
        own = {"seed": seed, "output_dir": str(home / f"{name}-{seed}"), "resume": "auto", "hub_repo": ""}
        return dataclasses.replace(settings, **own, **changed)

    if recipe != "SFT then DPO":
        return [stage(recipe.lower(), objective=recipe.lower())]
    half = {"max_steps": math.ceil(settings.max_steps / 2), "epochs": settings.epochs / 2}
    sft = stage("half-sft", objective="sft", answers=0, **half)
    base = f"{sft.output_dir}/merged"
    return [sft, stage("sft-then-dpo", objective="dpo", base_model=base, learning_rate=dpo_rate, **half)]


def _figures(stages: list[Path]) -> dict[str, float]:
    """Give a recipe's quality after the last stage, and its cost over all of them (of memory the largest)."""
    summaries = [read_json(folder / "summary.json") for folder in stages]
    last = summaries[-1]
    if not last.get("held_out", {}).keys() >= QUALITY.keys():
        raise UserError(f"The loss of {stages[-1]} is no longer a number: lower the learning rate.")
    figures = {name: last["held_out"][name]["after"] for name in QUALITY}
    figures |= {name: last[name] for name in HABIT if name in last}
    peaks = [summary["planned_against_measured"]["peak_gib"][1] for summary in summaries]
    sums = {name: sum(summary[name] for summary in summaries) for name in list(COST)[:-1]}
    return figures | sums | {"training_peak_gib": max(peaks)}


def _verdict(folders: dict[str, list[Path]], other: str) -> str:
    """Hold ORPO against another recipe, pair by pair over the held-out pairs of all seeds."""

    def pooled(recipe):
        sides = [measures(read_json(folder / "held_out.json"), "after") for folder in folders[recipe]]
        return {name: np.concatenate([side[name] for side in sides]) for name in QUALITY}

    def fallen(folder):
        kept = read_json(folder / "held_out.json")
        return broken(changes(measures(kept, "before"), measures(kept, "after")), kept["after"])

    figures = changes(pooled(other), pooled("ORPO"))
    noise = {True: "more than noise", False: "within the noise"}
    if why := next(filter(None, map(fallen, folders["ORPO"])), ""):
        noise[True] = f"no gain all the same, for of ORPO's model {why}"
    parts = [
        f"{name} {card.spread(f, 'change', '+.3f')}, {noise[f['more_than_noise']]}"
        for name, f in figures.items()
    ]
    return f"ORPO minus {other}, on {figures['accuracy']['pairs']} held-out pairs: {'; '.join(parts)}."


def _sft_tokens(folder: Path) -> str:
    means = {side: n["mean"] for side, n in read_json(folder / "data_report.json")["tokens"].items()}
    share = 1 - means["rejected"] / sum(means.values())
    less = f"without them it would need {share:.0%} of its tokens and time"
    return f"SFT here also scores the rejected answers, for its curves; {less}."
