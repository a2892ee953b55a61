"""Several runs on the same pairs: ORPO against SFT and SFT then DPO, and the probe of or_weight and learning_rate.

Each run has a process of its own, so that its peak memory is its own, and a folder; a finished one is not run again. This
process only waits, reads what the runs left and draws it.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..folder import folder_of, read_json, take, write_atomically
from ..results import card
from ..results.evaluate import changes, measures
from ..settings import Settings

RECIPES = ("SFT", "SFT then DPO", "ORPO")
QUALITY = {"accuracy": "accuracy", "log_odds_ratio": "log-odds ratio, nats", "nll": "nll, nats per token"}
COST = {
    "training_minutes": "training minutes", "tokens": "tokens", "forward_passes": "forward passes",
    "training_peak_gib": "training's peak, GiB",
}  # fmt: skip
SHARES = {"habit_after": "answers with the habit"}


def compare_recipes(
    settings: Settings, *, seeds: int = 3, dpo_learning_rate: float = 0.0, show: Callable[[str], None] = print
) -> Path:
    """SFT, SFT then DPO and ORPO from the same base, on the same pairs, with the same number of optimizer steps.

    SFT then DPO spends half of the epochs (or max_steps) on each stage; with an even number of epochs every recipe sees
    every pair equally often. DPO starts from the merged model of its SFT, which is also its reference. A seed decides the order of
    the pairs, the adapters' start and which pairs are held out; within a seed all recipes are tested on the same ones.

    Args:
        settings: what the recipes share; `objective`, `seed` and `output_dir` are set here.
        seeds: how many, from 1 on.
        dpo_learning_rate: of the DPO stage; 0: a thirtieth of `learning_rate`, about the usual ratio.

    Returns:
        `comparison/` in the run's folder that the settings name: a folder for each run; comparison.json, {"runs": [{"recipe",
        "seed", figure: value}], "said": [sentence]}; comparison.md and comparison.png, the same as a table and a picture.

    Raises:
        UserError: no pair is held out, or a run failed.
    """
    if not settings.eval_pairs:
        raise UserError("eval_pairs is 0: a comparison needs held-out pairs; give at least 40.")
    home = _home(settings, "comparison")
    plan = [(recipe, seed) for seed in range(1, seeds + 1) for recipe in RECIPES]
    runs, folders = [], {}
    for recipe, seed in plan:
        stages = _stages(settings, home, recipe, seed, dpo_learning_rate or settings.learning_rate / 30)
        for before, stage in zip([None, *stages], stages, strict=False):
            _run(stage, show, merge=before and before.output_dir)
        folders.setdefault(recipe, []).append(Path(stages[-1].output_dir))
        runs.append({"recipe": recipe, "seed": seed} | _figures([Path(s.output_dir) for s in stages]))
        show(
            f"{recipe}, seed {seed}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in list(runs[-1].items())[2:])
        )
    said = [*(_verdict(folders, other) for other in RECIPES[:2]), _sft_tokens(folders["SFT"][0])]
    return _write(home, runs, "recipe", {"said": said})


def _stages(settings: Settings, home: Path, recipe: str, seed: int, dpo_rate: float) -> list[Settings]:
    def stage(name, **changes):
        return dataclasses.replace(
            settings,
            seed=seed,
            output_dir=str(home / f"{name}-{seed}"),
            resume="auto",
            hub_repo="",
            **changes,
        )

    if recipe != "SFT then DPO":
        return [stage(recipe.lower(), objective=recipe.lower())]
    half = {"max_steps": math.ceil(settings.max_steps / 2), "epochs": settings.epochs / 2}
    sft = stage("half-sft", objective="sft", answers=0, **half)
    return [
        sft,
        stage(
            "sft-then-dpo",
            objective="dpo",
            base_model=f"{sft.output_dir}/merged",
            learning_rate=dpo_rate,
            **half,
        ),
    ]


def _figures(stages: list[Path]) -> dict[str, float]:
    """Of a recipe's runs: quality after the last stage, cost summed over the stages (memory: the largest)."""
    summaries = [read_json(folder / "summary.json") for folder in stages]
    last = summaries[-1]
    figures = {name: last["held_out"][name]["after"] for name in QUALITY}
    figures |= {name: last[name] for name in SHARES if name in last}
    costs = [s | {"training_peak_gib": s["planned_against_measured"]["peak_gib"][1]} for s in summaries]
    return figures | {
        name: (max if name == "training_peak_gib" else sum)(s[name] for s in costs) for name in COST
    }


def _verdict(folders: dict[str, list[Path]], other: str) -> str:
    """ORPO against another recipe, pair by pair over the held-out pairs of all seeds."""

    def pooled(recipe):
        sides = [measures(read_json(folder / "held_out.json"), "after") for folder in folders[recipe]]
        return {name: np.concatenate([side[name] for side in sides]) for name in QUALITY}

    figures = changes(pooled(other), pooled("ORPO"))
    parts = [
        f"{name} {card.spread(f, 'change', '+.3f')}, {'more than' if f['more_than_noise'] else 'within the'} noise"
        for name, f in figures.items()
    ]
    return f"ORPO minus {other}, on {figures['accuracy']['pairs']} held-out pairs: {'; '.join(parts)}."


def _sft_tokens(folder: Path) -> str:
    means = {side: n["mean"] for side, n in read_json(folder / "data_report.json")["tokens"].items()}
    share = 1 - means["rejected"] / sum(means.values())
    return f"SFT here also scores the rejected answers, for its curves; without them it would need {share:.0%} of its tokens and time."


# The probe.


def probe(settings: Settings, *, steps: int = 20, show: Callable[[str], None] = print) -> Path:
    """A few short runs around the given or_weight and learning_rate, each also a third and three times as large.

    The rule: among the trials whose held-out nll did not rise, the largest gain of the held-out log-odds ratio; of equal
    ones the smaller learning rate. Where nll rose in all of them, the one in which it rose least.

    Args:
        steps: optimizer steps of a trial. It reads just as many pairs as these need.

    Returns:
        `probe/` in the run's folder that the settings name: a folder for each trial; probe.json, {"runs": [{"trial", "or_weight",
        "learning_rate", gains}], "recommended": {setting: value}, "said": [sentence]}; probe.md and probe.png.
    """
    home, held_out = _home(settings, "probe"), min(settings.eval_pairs or 32, 32)
    short = dataclasses.replace(
        settings, objective="orpo", max_steps=steps, warmup_steps=min(settings.warmup_steps, steps // 5), eval_pairs=held_out,
        max_pairs=min(settings.max_pairs or 10**9, 2 * (held_out + steps * settings.pairs_per_step)), answers=0, resume="auto",
        hub_repo="", watch_every_steps=0,
    )  # fmt: skip
    w, r = settings.or_weight, settings.learning_rate
    runs = []
    for or_weight, rate in ((w, r), (w, r / 3), (w, r * 3), (w / 3, r), (w * 3, r)):
        values = {"or_weight": float(f"{or_weight:.2g}"), "learning_rate": float(f"{rate:.2g}")}
        name = " ".join(f"{k}={v:g}" for k, v in values.items())
        folder = home / name.replace(" ", "-")
        _run(dataclasses.replace(short, output_dir=str(folder), **values), show)
        held = read_json(folder / "summary.json")["held_out"]
        gains = {
            f"{n} gain" if n != "nll" else "nll change": held[n]["change"]
            for n in ("log_odds_ratio", "nll", "accuracy")
        }
        runs.append({"trial": name} | values | gains)
    return _write(home, runs, "trial", recommend(runs))


def recommend(runs: Sequence[dict]) -> dict:
    """The rule of `probe`, as {"recommended": {setting: value}, "said": [sentence]}."""
    kept = [run for run in runs if run["nll change"] <= 0]
    best = (
        min(kept, key=lambda run: (-run["log_odds_ratio gain"], run["learning_rate"]))
        if kept
        else min(runs, key=lambda r: r["nll change"])
    )
    why = (
        f"the largest gain of the held-out log-odds ratio ({best['log_odds_ratio gain']:+.3f}) among the {len(kept)} of {len(runs)} "
        f"trials whose held-out nll did not rise ({best['nll change']:+.3f})"
        if kept
        else f"held-out nll rose in every trial, least in this one ({best['nll change']:+.3f}): lower the learning rate further"
    )
    said = f"Recommended: --or-weight {best['or_weight']:g} --learning-rate {best['learning_rate']:g}: {why}."
    return {"recommended": {name: best[name] for name in ("or_weight", "learning_rate")}, "said": [said]}


# Both.


def _home(settings: Settings, name: str) -> Path:
    """The folder `name` in the run's that the settings name, ready for several runs and what comes of them."""
    home = take(folder_of(settings), "run", f"{name}/") / name
    return take(home, "set of runs", *(f"{name}.{ending}" for ending in ("json", "md", "png")))


def _run(settings: Settings, show: Callable[[str], None], merge: str | None = None) -> None:
    """A run in a process of its own; what it says goes to log.txt in its folder.

    Args:
        merge: folder of a finished run whose merged model is this one's base.
    """
    folder = Path(settings.output_dir)
    if read_json(folder / "summary.json").get("finished"):
        return
    show(f"{folder.name}: at work; see live.png and log.txt in {folder}")
    take(folder, "run", "log.txt", "STOP")
    # A fork server imports torch and transformers once for all runs. Windows has none, and with CUDA at hand these
    # imports initialise it (peft's of bitsandbytes asks for the card's capability), which no forked process survives.
    forks = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(["transformers.trainer", "peft", "datasets", f"{__package__}.run"])
    process = context.Process(target=_in_process, args=(settings, merge))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        (folder / "STOP").touch()  # it ends its step and saves
        process.join()
    if not read_json(folder / "summary.json").get("finished"):
        log = folder / "log.txt"
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] if log.is_file() else []
        raise UserError(
            f"The run in {folder} is not finished ({' '.join(last)}): mend that and run this again, it goes on from there."
        )


def _in_process(settings: Settings, merge: str | None) -> None:
    with open(Path(settings.output_dir) / "log.txt", "a", buffering=1, encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            from .. import run
            from ..results import share

            try:
                if merge and not Path(settings.base_model).is_dir():
                    share.merge(merge, settings.base_model)
                run.execute(settings, dict.fromkeys(dataclasses.asdict(settings), "trial"))
            except UserError as error:
                print(error)
                sys.exit(2)
            except Exception:
                traceback.print_exc()
                sys.exit(1)


def _write(home: Path, runs: list[dict], key: str, rest: dict) -> Path:
    """Write what came out into `home`, as JSON, Markdown and a picture of its name."""
    from ..results import live

    groups = {}
    for run in runs:
        groups.setdefault(run[key], []).append(run)
    words = QUALITY | SHARES | COST
    figures = [f for f in runs[0] if f not in (key, "seed", "or_weight", "learning_rate")]
    values = {
        group: {words.get(f, f): [run[f] for run in some] for f in figures} for group, some in groups.items()
    }
    head, rows = (
        [key, *next(iter(values.values()))],
        [[group, *map(_spread, v.values())] for group, v in values.items()],
    )
    text = "\n\n".join([card.table(head, rows), *rest["said"]]) + "\n"
    write_atomically(home / f"{home.name}.json", json.dumps({"runs": runs} | rest, indent=1).encode())
    write_atomically(home / f"{home.name}.md", text.encode())
    live.draw_trials(values, home / f"{home.name}.png")
    return home


def _spread(values: Sequence[float]) -> str:
    """Mean, and from lowest to highest."""
    form = ",.0f" if isinstance(values[0], int) else ".3f"
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"
