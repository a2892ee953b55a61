"""What a run came to, for its summary.json: steps, why it ended, time, memory, planned against measured.

It is handed the run, and computes nothing that the run does not know.
"""

import time
from importlib.metadata import version

from ..folder import read_rows
from ..machine import memory_gib
from .reading import values


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
        # Of the whole run, with what is outside of torch's count; of training's tensors on a GPU, without that.
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
