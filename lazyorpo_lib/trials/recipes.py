"""ORPO against SFT, SFT then DPO, SFT then ORPO: same base, pairs and budget; runs.py trains."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..folder import read_json
from ..plan import planner
from ..results import card
from ..results.evaluate import broken, changes, interval, measures
from ..results.reading import FEWEST
from ..session import duration
from ..settings import Settings
from .runs import is_finished, prepare_home, run_apart, write_up

# The objective of each stage, and its learning rate as a share of the settings': a thirtieth is usual for
# DPO; a tenth, without nll a twentieth, are about what arXiv 2502.01237 (Table 1) found for ORPO after SFT.
STAGES = {
    "SFT": {"sft": 1.0},
    "SFT then DPO": {"sft": 1.0, "dpo": 1 / 30},
    "ORPO": {"orpo": 1.0},
    "SFT then ORPO": {"sft": 1.0, "orpo": 1 / 10},
    "SFT then ORPO without nll": {"sft": 1.0, "orpo": 1 / 20},
}
ALONE = 100.0  # or_weight with which the odds term is all but alone: AdamW does not see the scale of a loss
RECIPES = ("SFT", "SFT then DPO", "ORPO")
BUDGETS = ("steps", "tokens")
QUALITY = {"accuracy": "accuracy", "log_odds_ratio": "log-odds ratio, nats", "nll": "nll, nats per token"}
HABIT = {"habit_after": "answers with the habit"}  # of the demo
COST = {"training_minutes": "training minutes", "tokens": "tokens", "forward_passes": "forward passes"}
COST |= {"training_peak_gib": "training's peak, GiB"}


def compare_recipes(
    settings: Settings, *, seeds: int = 3, dpo_learning_rate: float = 0.0,
    recipes: str | Sequence[str] = RECIPES, budget: str = "steps", tries: int = 1,
    show: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Carry out recipes, a few seeds of each in one number format, and compare them on held-out pairs.

    A recipe of two stages spends half of the epochs (or max_steps) on each. The second stage starts from the
    merged model of its SFT, which is also DPO's reference. A seed decides the order of the pairs, the
    adapters' start and which pairs are held out; within a seed all are tested on the same ones.

    Args:
        settings: what the recipes share; `objective`, `seed` and `output_dir` are set here.
        dpo_learning_rate: of the DPO stage; 0: a thirtieth of `learning_rate`, about the usual ratio.
        recipes: of STAGES, a list or a text with commas.
        budget: "steps", or "tokens": as many through the model, DPO's reference included, which takes its
            recipe fewer steps.
        tries: learning rates tried for each last stage, by factors of 3, on the split of seed 0.

    Returns:
        `comparison/` in the run's folder: a folder a run; comparison.json, {"runs": [{"recipe", "seed",
        figure: value}], "rates", "budget", "said": [sentence]}; as comparison.md, a table, and .png too.
    """
    recipes = _checked(settings, recipes, budget, seeds, tries)
    settings, home = planner.settled(settings), prepare_home(settings, "comparison")
    rates = {name: settings.learning_rate * list(STAGES[name].values())[-1] for name in STAGES}
    rates["SFT then DPO"] = dpo_learning_rate or rates["SFT then DPO"]
    plan = Comparison(settings, home, budget, rates, show)
    factors = [3.0 ** (k - tries // 2) for k in range(tries)] if tries > 1 else []
    tried = {name: [float(f"{rates[name] * factor:.3g}") for factor in factors] for name in recipes}
    wanted = [(recipe, seed) for seed in range(1, seeds + 1) for recipe in recipes]
    show(plan.told(wanted + [(name, 0, f"-{rate:g}") for name in recipes for rate in tried[name]]))
    for recipe in [name for name in STAGES if tried.get(name)]:  # SFT first: others begin with it
        rates[recipe] = plan.best_rate(recipe, tried[recipe])
    runs, folders = [], {recipe: [] for recipe in recipes}
    for recipe, seed in wanted:
        stages = plan.carry_out(recipe, seed)
        figures = _figures(stages)
        folders[recipe].append(stages[-1])
        runs.append({"recipe": recipe, "seed": seed} | figures)
        show(f"{recipe}, seed {seed}: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}")
    pairs = [(b, a) for a, b in combinations(recipes, 2) if "ORPO" in b] or list(combinations(recipes, 2))
    rates = {name: float(f"{rates[name]:.3g}") for name in recipes}
    said = [*(_verdict(folders, *two) for two in pairs), _about(rates, budget, tries)]
    said += [_sft_tokens(folders["SFT"][0])] if "SFT" in folders else []
    return write_up(home, "recipe", runs, QUALITY | HABIT | COST, dict(rates=rates, budget=budget, said=said))


def _checked(settings: Settings, recipes, budget: str, seeds: int, tries: int) -> list[str]:
    names = recipes.split(",") if isinstance(recipes, str) else recipes
    names = list(dict.fromkeys(name.strip() for name in names))
    if not names or not STAGES.keys() >= set(names):
        unknown = [f"There is no recipe {name!r}" for name in names if name not in STAGES]
        raise UserError(f"{[*unknown, 'No recipe was given'][0]}: give some of {', '.join(STAGES)}.")
    if budget not in BUDGETS:
        raise UserError(f"budget is {budget!r}, but must be one of {', '.join(BUDGETS)}.")
    for name, number in {"seeds": seeds, "tries": tries}.items():
        if type(number) is not int or number < 1:
            raise UserError(f"{name} is {number!r}, but must be a whole number from 1 on.")
    if not settings.eval_pairs:
        raise UserError("eval_pairs is 0: a comparison needs held-out pairs; give at least 40.")
    return names


@dataclasses.dataclass
class Comparison:
    """The runs of a comparison: their settings, in `home`, with the learning rates as they are so far."""

    settings: Settings
    home: Path
    budget: str
    rates: dict[str, float]
    show: Callable[[str], None]

    def stages(self, recipe: str, seed: int, suffix: str = "") -> list[Settings]:
        """Give the settings of each stage; an SFT that two recipes begin with is one run."""
        s, objectives = self.settings, list(STAGES[recipe])
        share = 1 / len(objectives)
        if self.budget == "tokens" and "dpo" in objectives:  # whose reference reads each pair once
            share = 1 / 3 if s.max_steps else max(1 / 3, (1 - 1 / s.epochs) / 2)
        part = dict(max_steps=math.ceil(s.max_steps * share), epochs=s.epochs * share)
        part = dataclasses.replace(s, **part, seed=seed, resume="auto", hub_repo="")
        last = dataclasses.replace(
            part, objective=objectives[-1], learning_rate=self.rates[recipe],
            or_weight=ALONE if "without nll" in recipe else s.or_weight,
            output_dir=str(self.home / f"{recipe.lower().replace(' ', '-')}-{seed}{suffix}"),
        )  # fmt: skip
        if len(objectives) == 1:
            return [last]
        home = str(self.home / f"{'half' if share == 0.5 else 'part'}-sft-{seed}")
        first = dict(objective="sft", learning_rate=self.rates["SFT"], answers=0, evaluate="")
        first = dataclasses.replace(part, **first, output_dir=home)
        return [first, dataclasses.replace(last, base_model=f"{home}/merged")]

    def carry_out(self, recipe: str, seed: int, suffix: str = "") -> list[Path]:
        """Carry out the stages, each from the merged model of the one before; their folders."""
        before, stages = None, self.stages(recipe, seed, suffix)
        for stage in stages:
            run_apart(stage, self.show, merge=before)
            before = stage.output_dir
        return [Path(stage.output_dir) for stage in stages]

    def told(self, wanted: list[tuple]) -> str:
        """Say how many runs there are, and how long they will take, by the planner's arithmetic."""
        jobs = {stage.output_dir: stage for one in wanted for stage in self.stages(*one)}
        left = [stage for folder, stage in jobs.items() if not is_finished(Path(folder))]
        said = f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished"
        with contextlib.suppress(UserError):  # the run tells it
            whole = planner.estimate(dataclasses.replace(self.settings, objective="orpo")).method.minutes
            passes = sum((4 / 3 if one.objective == "dpo" else 1) * one.epochs for one in left)
            took = duration(whole * passes / self.settings.epochs)
            said += f"; the others take about {took} by plan, answers apart"
        return f"{said}. Interrupted, it goes on where it was."

    def best_rate(self, recipe: str, tried: list[float]) -> float:
        """Try rates on the split of seed 0, and give the one with the highest accuracy."""
        found = {}
        for rate in tried:
            self.rates[recipe] = rate
            summary = read_json(self.carry_out(recipe, 0, f"-{rate:g}")[-1] / "summary.json")
            held = summary.get("held_out", {})
            if held.keys() >= QUALITY.keys() and "no gain all the same" not in summary["verdict"]:
                found[rate] = held["accuracy"]["after"], -held["nll"]["after"]
        if not found:
            raise UserError(f"No learning rate of {recipe} left a sound model: lower learning_rate.")
        return max(found, key=found.get)


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


def _verdict(folders: dict[str, list[Path]], one: str, other: str) -> str:
    """Hold a recipe against another, pair by pair over the held-out pairs of all seeds."""
    kept = {name: [read_json(folder / "held_out.json") for folder in folders[name]] for name in (one, other)}
    noise, parts = "more than noise", []
    for name, side in kept.items():
        for k in side:
            if why := broken(changes(measures(k, "before"), measures(k, "after")), k["after"]):
                noise = f"no gain all the same, for of {name}'s model {why}"
    sides = [[measures(k, "after") for k in side] for side in kept.values()]
    prompts = [k.get("prompt_ids", range(len(k["after"]["pairs"]))) for k in kept[one]]
    enough = len(set().union(*prompts)) >= FEWEST
    for name in QUALITY:
        values = [a[name] - b[name] for a, b in zip(*sides, strict=True)]
        low, high = interval(values, prompts)
        figure = {"change": np.nanmean(np.concatenate(values)), "change_interval": (low, high)}
        proven = noise if enough and (low > 0 or high < 0) else "within the noise"
        parts.append(f"{name} {card.spread(figure, 'change', '+.3f')}, {proven}")
    pairs = f"{sum(map(len, values))} held-out pairs of {len(values)} seed{'s' * (len(values) > 1)}"
    return f"{one} minus {other}, on {pairs}: {'; '.join(parts)}."


def _about(rates: dict[str, float], budget: str, tries: int) -> str:
    how = f"each the best of {tries} on the split of seed 0" if tries > 1 else "no rate was searched"
    taken = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return f"Learning rates of the last stages: {taken}; {how}. Budget: the same {budget} for all."


def _sft_tokens(folder: Path) -> str:
    means = {side: n["mean"] for side, n in read_json(folder / "data_report.json")["tokens"].items()}
    share = 1 - means["rejected"] / sum(means.values())
    less = f"without them it would need {share:.0%} of its tokens and time"
    return f"SFT here also scores the rejected answers, for its curves; {less}."
