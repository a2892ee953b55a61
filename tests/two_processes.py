"""Trains the little model, and a whole tiny run, as one of several processes; started by test_scale.py.

accelerate spreads weights over GPUs alone, so for FSDP it is told that these CPU processes are GPUs.
"""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object

from lazyorpo_lib import run, settings
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo import processes
from lazyorpo_lib.orpo.body import checkpoint_layers
from lazyorpo_lib.session import Stop
from tests.conftest import random_pairs
from tests.orpo import test_trainer

STEPS = dict(max_steps=3, tokens_per_batch=90, learning_rate=1e-3, save_every_steps=2)
TINY = {"preset": "tiny", "precision": "float32", "tokens_per_batch": 150, "save_every_steps": 4}
# At this rate the second step is worse than the first one, which is kept.
BEST = {"keep": "best", "patience": 1, "eval_every_steps": 1, "learning_rate": 5e-2}


WAYS = {"lora": dict(method="lora"), "full": dict(method="full"), "dpo": dict(method="lora", objective="dpo")}


def train(folder, what, resume=None):
    """Three steps, with a checkpoint after the second; the trained weights, in one piece on the first
    process."""
    made = test_trainer.make(folder, random_pairs(30), **WAYS[what], **STEPS)
    checkpoint_layers(made.model, 1)
    test_trainer.trained(made, resume)
    gathered = made.gathered_weights() if made.sharded else test_trainer.weights(made)
    return gathered and {name: weight.clone() for name, weight in gathered.items()}


def stopped(folder):
    """The step after which this process leaves where the second one alone was asked to stop."""
    stop = Stop(folder / "STOP")
    made = test_trainer.make(folder, random_pairs(30), **STEPS, hooks={"stop": stop})
    stop.reason = "asked" * (made.accelerator.process_index == 1)
    return test_trainer.trained(made).step


def tiny_run(folder, **changes):
    given = settings.resolve([("flag", TINY | changes | {"output_dir": str(folder)})])[:2]
    return run.execute(*given, show=lambda text: None)


def refused(home):
    """What this process says of a dataset of which nothing is left."""
    if PartialState().is_main_process:
        (home / "same.jsonl").write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "So."}\n')
    with pytest.raises(UserError) as said:
        tiny_run(home / "none", dataset=str(home / "same.jsonl"))
    return str(said.value)


def on_gpus(**kwargs):
    """An Accelerator that takes these processes for GPUs."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(**kwargs)


if __name__ == "__main__":
    home, way = Path(sys.argv[1]), sys.argv[2]
    if way == "fsdp2":
        processes.Accelerator = on_gpus
    for what in WAYS if way == "ddp" else ("lora", "full"):
        weights = {
            "through": train(home / what, what),
            "resumed": train(home / "again", what, home / what / "checkpoint-2"),
        }
        if PartialState().is_main_process:
            torch.save(weights, home / f"{what}.pt")
    steps, opened, open_rows = gather_object([stopped(home / "stopped")]), [], run.open_rows
    run.open_rows = lambda *given, **options: opened.append(given) or open_rows(*given, **options)
    tiny_run(home / "run")
    tiny_run(home / "best", **BEST)
    told = gather_object([(len(opened), refused(home))])
    if PartialState().is_main_process:
        torch.save({"stopped": steps, "read": told}, home / "told.pt")
