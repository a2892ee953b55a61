"""What a run says of itself: its pairs, what is trained, what it came to.

It is handed the run, and computes nothing that the run does not know.
"""

import time
from functools import partial
from importlib.metadata import version

import numpy as np

from ..fast.attention import kernels_taken
from ..folder import read_rows
from ..machine import memory_gib
from .reading import values


def data_report(run, pairs, digest: str) -> dict:
    """Give the content of data_report.json: rows by fate, and the lengths of the pairs' sides, in tokens."""
    figures = {"mean": np.mean, "p50": np.median, "p95": partial(np.quantile, q=0.95), "max": np.max}
    sides = pairs.lengths_of_sides().items()
    tokens = {side: {name: f(lengths).item() for name, f in figures.items()} for side, lengths in sides}
    counts = {"train": len(run.train_pairs), "held_out": len(run.eval_pairs)}
    return run.report.as_dict() | counts | {"bag_of_words": run.style, "tokens": tokens, "digest": digest}


def about_training(run) -> str:
    """Say what is trained, in which layout, and by which attention."""
    total, scorer = sum(p.numel() for p in run.model.parameters()), run.trainer.scorer
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    refused = "".join(f" Not {name}: {why}." for name, why in scorer.refused.items())
    lines = [f"{run.method}: {trained:,} of {total:,} weights are trained ({trained / total:.1%})."]
    lines += [f"Layout of a batch: {scorer.rung}.{refused}"]
    lines += [f"Attention by: {'; '.join(kernels)}."] if (kernels := kernels_taken()) else []
    return "\n".join(lines)


def summarise(run) -> dict:
    """Give the content of summary.json; the held-out results stand in it too."""
    trainer, plan, rows = run.trainer, run.plan.method, read_rows(run.folder / "history.jsonl")
    training, evaluation = run.seconds["training"], run.seconds["evaluation"]
    return {
        "finished": not run.stopped,
        "why": run.stopped or "every step was taken",
        "steps": trainer.step,
        "epochs": round(trainer.epoch, 4),
        "method": run.method,
        "layout": trainer.scorer.rung,
        "precision": str(run.dtype).removeprefix("torch."),
        "device": run.machine.name,
        "minutes": round((time.time() - run.started) / 60, 3),
        "training_minutes": round(training / 60, 3),
        # From the history, which a stop and going on leave whole.
        **{name: int(sum(values(rows, name))) for name in ("tokens", "forward_passes")},
        # Of the whole run, with what is outside of torch's count; of training's tensors on a GPU, without
        # that.
        "peak_memory_gib": round(max(run.peak_before, memory_gib(trainer.device)), 3),
        "peak_allocated_gib": run.peak_allocated,
        "bad_steps": trainer.bad_steps,
        "out_of_memory": trainer.oom_notes,
        "drawing_share": round(run.plot.cost_seconds / max(training, 1e-9), 4),
        "plan": run.plan.as_dict(),
        "planned_against_measured": {
            "peak_gib": [round(plan.peak_gib, 3), round(run.peak_training, 3)],
            # A plan knows neither answers nor loading.
            "minutes": [round(plan.minutes, 3), round((training + evaluation) / 60, 3)],
        },
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "accelerate", "datasets")},
        **run.held_out_results(),
    }
