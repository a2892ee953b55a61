"""Several processes train what one trains, whichever way the weights lie on them, and stop together."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from lazyorpo_lib.orpo.checkpoints import sharding_of
from tests.two_processes import TINY, WAYS, tiny_run, train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NOTEBOOK = """
import sys
from accelerate.utils import PrepareForLaunch, patch_environment
from torch.multiprocessing import start_processes
from lazyorpo_lib.__main__ import main

if __name__ == "__main__":
    with patch_environment(nproc=2, node_rank=0, world_size=2, master_addr="127.0.0.1", master_port=sys.argv[1]):
        start_processes(PrepareForLaunch(main, distributed_type="MULTI_CPU"), args=(sys.argv[2:],), nprocs=2, start_method="fork")
"""


def launched_with(way):
    """The environment that `accelerate launch --config_file configs/<way>.yaml` gives its processes, but for the addresses."""
    arguments = [
        "--config_file",
        str(ROOT / "configs" / f"{way}.yaml"),
        "--num_processes",
        "2",
        "-m",
        "lazyorpo_lib",
    ]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    parsed.deepspeed_fields_from_accelerate_config = ""
    given = prepare_deepspeed_cmd_env(parsed)[1] if parsed.use_deepspeed else prepare_multi_gpu_env(parsed)
    return {name: value for name, value in given.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def started(*command, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process trains: the weights of each way to train, and the folder of a run."""
    home = tmp_path_factory.mktemp("one")
    tiny_run(home / "run")
    return {what: train(home / what, what) for what in WAYS}, home / "run"


def difference(a, b):
    assert a.keys() <= b.keys() or b.keys() <= a.keys()  # DeepSpeed's also holds what is not trained
    flat = [torch.cat([x[k].flatten() for k in sorted(a.keys() & b.keys())]) for x in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def same_run(a, b):
    """The same adapter, and the same held-out figures and answers before and after."""
    assert difference(*(load_file(run / "model" / "adapter_model.safetensors") for run in (a, b))) < 1e-5
    kept = [json.loads((run / "held_out.json").read_text()) for run in (a, b)]
    for when in ("before", "after"):
        assert torch.allclose(*(torch.tensor(k[when]["pairs"]) for k in kept), atol=1e-4)
        assert kept[0][when]["answers"] == kept[1][when]["answers"]


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero2"])
def test_two_processes_train_what_one_trains(way, one, tmp_path):
    if way.startswith("zero") and not find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed")
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.two_processes",
        str(tmp_path),
        way,
    ]
    started(*command, **launched_with(way), DS_ACCELERATOR="cpu")
    weights, run = one
    for what in WAYS if way == "ddp" else ("lora", "full"):
        two = torch.load(tmp_path / f"{what}.pt", weights_only=True)
        assert difference(two["through"], weights[what]) < 1e-5
        assert difference(two["resumed"], weights[what]) < 1e-5
    assert sharding_of(tmp_path / "lora" / "checkpoint-2") == {"ddp": "", "fsdp2": "FSDP"}.get(
        way, "DeepSpeed"
    )
    assert torch.load(tmp_path / "stopped.pt", weights_only=True) == [1, 1]
    same_run(tmp_path / "run", run)
    if way == "ddp":  # whose checkpoints fit any number of processes
        assert (
            difference(train(tmp_path / "alone", "lora", tmp_path / "lora" / "checkpoint-2"), weights["lora"])
            < 1e-5
        )


def test_a_notebook_starts_two_processes(one, tmp_path):
    # What notebook_launcher does once it has seen two GPUs.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in (TINY | {"output_dir": tmp_path / "run"}).items()
    ]
    assert started("-c", NOTEBOOK, port, *flags).stdout.count("Everything is in") == 1
    same_run(tmp_path / "run", one[1])
