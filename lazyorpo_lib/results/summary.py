"""What a run says of itself: its pairs, what is trained, what it came to.

It is handed the run, and computes nothing that the run does not know.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from functools import partial
from importlib.metadata import version

import numpy as np
import torch

from .. import __version__
from ..fast.attention import kernels_taken
from ..folder import fingerprint, read_rows
from ..kinds import class_of
from ..machine import allocated_gib, forget_peak_memory, memory_gib
from ..model import about_adapters
from ..orpo.body import causal_lm
from .reading import values


def settings_record(run, older: dict, *, begun: bool) -> dict:
    """Give the content of settings.json as a run is opened; `older`: what it holds, of a run that `begun`."""
    # What auto chose when the run began holds to its end, also on another kind of machine.
    kept = older if begun else {}
    chosen, why = kept.get("chosen", {}), kept.get("sources", {})
    record = {"version": __version__, "fingerprint": fingerprint(run.given)}
    record |= {"settings": dataclasses.asdict(run.given), "chosen": chosen}
    record["sources"] = run.sources | {name: why[name] for name in chosen if name in why}
    record |= {name: kept[name] for name in ("version", "base") if name in kept}
    return record | {"clock": older.get("clock") or time.time()}  # what a chat template is told as the time


def data_report(run, pairs) -> dict:
    """Give the content of data_report.json: rows by fate, and the lengths of the pairs' sides, in tokens."""
    figures = {"mean": np.mean, "p50": np.median, "p95": partial(np.quantile, q=0.95), "max": np.max}
    sides = pairs.lengths_of_sides().items()
    tokens = {side: {name: f(lengths).item() for name, f in figures.items()} for side, lengths in sides}
    counts = {"train": len(run.train_pairs), "held_out": len(run.eval_pairs)}
    more = {"bag_of_words": run.style, "tokens": tokens, "digest": run.report.digest}
    return run.report.as_dict() | counts | more


def about_training(run) -> str:
    """Say what is trained, in which layout, and by which attention."""
    total, scorer = sum(p.numel() for p in run.model.parameters()), run.trainer.scorer
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    refused = "".join(f" Not {name}: {why}." for name, why in scorer.refused.items())
    lines = [f"{run.method}: {trained:,} of {total:,} weights are trained ({trained / total:.1%})."]
    lines += [f"Layout of a batch: {scorer.proven or scorer.rung}.{refused}"]
    lines += [f"Attention by: {'; '.join(kernels)}."] if (kernels := kernels_taken()) else []
    return "\n".join(lines)


class Spent:
    """Minutes and peaks of memory, in GiB, of a run in all its sittings. `began`: when this one did, by the
    monotonic clock; `device`: that trains; `earlier`: `totals` of the sittings that this one goes on from."""

    def __init__(self, began: float, device: torch.device, earlier: dict[str, float | None]):
        self.device, self.earlier, self.seconds, self._since = device, earlier, Counter(), {"all": began}
        self._before, self._peaks = memory_gib(device), {"training_gib": 0.0}

    @contextlib.contextmanager
    def on(self, what: str):
        """Count what happens meanwhile: "training", whose peak is told apart, or "evaluation"."""
        if what == "training":
            self._before = memory_gib(self.device)
            forget_peak_memory()
        self._since[what] = time.monotonic()
        try:
            yield
        finally:
            self.totals()
            self.seconds[what] += time.monotonic() - self._since.pop(what)

    def totals(self) -> dict[str, float | None]:
        """Give `all`, `training`, `evaluation` in minutes; `training_gib`, `allocated_gib`, `peak_gib`."""
        now, had, peak = time.monotonic(), self.earlier.get, memory_gib(self.device)
        if "training" in self._since:
            self._peaks = {"training_gib": peak, "allocated_gib": allocated_gib(self.device)}
        seconds = self.seconds + Counter({what: now - since for what, since in self._since.items()})
        peaks = self._peaks | {"peak_gib": max(self._before, peak)}
        minutes = {what: had(what, 0) + seconds[what] / 60 for what in ("all", "training", "evaluation")}
        peaks = {name: max(had(name) or 0, peak) if peak else had(name, peak) for name, peak in peaks.items()}
        return minutes | peaks


def summarise(run, stopped: str) -> dict:
    """Give the content of summary.json; the held-out results stand in it too. `stopped`: why, or empty."""
    trainer, plan, rows = run.trainer, run.plan.method, read_rows(run.folder / "history.jsonl")
    spent, price = run.spent.totals(), run.settings.price_per_hour
    return {
        "finished": not stopped,
        "why": stopped or trainer.best.early() or "every step was taken",
        "steps": trainer.step,
        "epochs": round(trainer.epoch, 4),
        "method": run.method,
        "layout": trainer.scorer.rung,
        "proven": trainer.scorer.proven,
        "adapters": about_adapters(run.model),
        "class": class_of(causal_lm(run.model).config).__name__,
        "precision": str(run.dtype).removeprefix("torch."),
        "device": run.machine.name,
        "minutes": round(spent["all"], 3),
        "training_minutes": round(spent["training"], 3),
        "cost": round(spent["all"] / 60 * price, 2) if price else None,
        # From the history, which a stop and going on leave whole.
        **{name: int(sum(values(rows, name))) for name in ("tokens", "forward_passes")},
        # Of the whole run, with what torch does not count; of training's tensors on a GPU, without that.
        "peak_memory_gib": round(spent["peak_gib"], 3),
        "peak_allocated_gib": spent.get("allocated_gib"),
        "bad_steps": trainer.bad_steps,
        "out_of_memory": trainer.oom_notes,
        "drawing_share": round(run.plot.cost_seconds / max(60 * spent["training"], 1.0), 4),
        "plan": run.plan.as_dict(),
        "planned_against_measured": {
            "peak_gib": [round(plan.peak_gib, 3), round(spent["training_gib"], 3)],
            # A plan knows neither answers nor loading.
            "minutes": [round(plan.minutes, 3), round(spent["training"] + spent["evaluation"], 3)],
        },
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "accelerate", "datasets")},
        **run.held_out_results(),
        **trainer.best.told(),
    }
