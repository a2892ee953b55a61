"""Runs side by side: the settings that differ, the results, the curves. It reads folders and runs nothing."""

from pathlib import Path

import numpy as np

from ..errors import UserError, expanded, explain_disk
from ..folder import read_json, read_rows
from . import card, live, reading
from .evaluate import interval
from .share import explain_run, folder_of_run

WHERE = ("output_dir", "resume", "hub_repo", "preset")  # settings that say nothing of how two runs differ
FIGURES = ("accuracy", "log_odds_ratio", "nll")


def compare(folders, picture=None) -> dict:
    """Put two runs or more side by side, finished or not; `picture`: a file for the curves.

    Returns:
        settings: {name: [value of each run]} where they differ; results: [{figure: text} of each run];
        markdown: both as tables; png: the curves over each other.
    """
    folders = [folder_of_run(folder) for folder in folders]
    if len(folders) < 2:
        raise UserError(f"{len(folders)} run was given to compare: give two folders or more.")
    names, picture = _names(folders), picture and expanded(picture)
    place = picture.parent if picture else Path()
    with explain_run(", ".join(map(str, folders))), explain_disk(place, "compare again"):
        kept = [read_json(folder / "settings.json") for folder in folders]
        values = [one["settings"] | one.get("chosen", {}) for one in kept]
        differ = {name: [v.get(name) for v in values] for one in values for name in one if name not in WHERE}
        differ = {name: each for name, each in differ.items() if any(one != each[0] for one in each)}
        results = [{"run": name} | _results(folder) for name, folder in zip(names, folders, strict=True)]
        for row, folder in zip(results[1:], folders[1:], strict=True):
            row["accuracy minus the first run's"] = _more_accurate(folder, than=folders[0])
        heads = list(dict.fromkeys(name for row in results for name in row))
        markdown = "\n\n".join([
            "Settings that differ",
            card.table(["setting", *map(card.inline, names)], [[name, *differ[name]] for name in differ]),
            "Results on held-out pairs after training, with 95 % intervals",
            card.table(heads, [[row.get(name, "–") for name in heads] for row in results]),
        ])  # fmt: skip
        histories = (read_rows(folder / "history.jsonl") for folder in folders)
        png = live.draw_runs(dict(zip(names, histories, strict=True)), picture)
    return {"settings": differ, "results": results, "markdown": markdown, "png": png}


def _names(folders: list[Path]) -> list[str]:
    """Find a short name for each folder: its own, with as many of its parents' as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("The same run was given twice: give two different folders.")


def _results(folder: Path) -> dict[str, str]:
    summary = read_json(folder / "summary.json")
    if not summary:
        steps = reading.last_step(read_rows(folder / "history.jsonl"))
        return {"steps": f"{steps:,}, not finished"}
    figures = summary.get("held_out", {})
    return {
        "steps": f"{summary['steps']:,}" + ("" if summary["finished"] else ", not finished"),
        **{name: card.spread(figures[name], "after") for name in FIGURES if name in figures},
        "training minutes": f"{summary['training_minutes']:.1f}",
        "peak GiB": f"{summary['peak_memory_gib']:.2f}",
    }


def _more_accurate(other: Path, than: Path) -> str:
    """Say how much more accurate a run is than another, pair by pair, if both were tested on the same."""
    pairs = []  # what decides which ones a run held out
    for folder in (than, other):
        values = read_json(folder / "settings.json")["settings"]
        digest = read_json(folder / "data_report.json").get("digest")
        pairs.append((digest, values["eval_pairs"], values["seed"]))
    if pairs[0] != pairs[1]:
        return "other held-out pairs"
    tested = [read_json(folder / "held_out.json") for folder in (than, other)]
    if not all("after" in kept for kept in tested):
        return "–"
    tables = [np.array(kept["after"]["pairs"], dtype=float) for kept in tested]
    a, b = (some[:, kept["columns"].index("accuracy")] for some, kept in zip(tables, tested, strict=True))
    if not np.isfinite(b - a).any():
        return "–"
    known = interval([b - a], [tested[0].get("prompt_ids", range(len(a)))])
    return card.spread({"change": np.nanmean(b - a), "change_interval": known}, "change")
