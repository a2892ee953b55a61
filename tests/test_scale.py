"""Two processes train what one trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lazyorpo_lib import trainer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def train(folder, processes, *resume):
    folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0", "--standalone"]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "tests.two_processes", str(folder), *map(str, resume)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "weights.pt", weights_only=True)


def difference(a, b):
    flat = [torch.cat([x[k].flatten() for k in sorted(x)]) for x in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def test_two_processes_train_the_same_weights_as_one_and_take_over_its_checkpoint(tmp_path):
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert difference(two, one) < 1e-5
    (checkpoint,) = (c for c in trainer.checkpoints(tmp_path / "one" / "run") if c.name == "checkpoint-2")
    assert difference(train(tmp_path / "three", 2, checkpoint), one) < 1e-5
