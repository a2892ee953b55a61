"""Several processes train what one trains, whichever way the weights lie on them, and stop together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.processes import check_sharding, make_accelerator
from lazyorpo_lib.settings import Settings
from tests.two_processes import BEST, TINY, WAYS, tiny_run, train

ROOT = Path(__file__).parents[2]
NOTEBOOK = """
import sys
from accelerate.utils import PrepareForLaunch, patch_environment
from torch.multiprocessing import start_processes
from lazyorpo_lib.__main__ import main

if __name__ == "__main__":
    address = dict(master_addr="127.0.0.1", master_port=sys.argv[1])
    with patch_environment(nproc=2, node_rank=0, world_size=2, **address):
        prepared = PrepareForLaunch(main, distributed_type="MULTI_CPU")
        start_processes(prepared, args=(sys.argv[2:],), nprocs=2, start_method="fork")
"""


def launched_with(way):
    """The environment that `accelerate launch --config_file configs/<way>.yaml` gives its processes, without
    addresses."""
    arguments = [
        "--config_file",
        str(ROOT / "configs" / f"{way}.yaml"),
        "--num_processes",
        "2",
        "-m",
        "lazyorpo_lib",
    ]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    given = prepare_multi_gpu_env(parsed)
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
    tiny_run(home / "best", **BEST)
    return {what: train(home / what, what) for what in WAYS}, home / "run"


def difference(a, b):
    assert a.keys() == b.keys()
    flat = [torch.cat([x[k].flatten() for k in sorted(a)]) for x in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def same_run(a, b):
    """The same adapter, and the same held-out figures and answers before and after."""
    assert difference(*(load_file(run / "model" / "adapter_model.safetensors") for run in (a, b))) < 1e-5
    kept = [json.loads((run / "held_out.json").read_text()) for run in (a, b)]
    for when in ("before", "after"):
        assert torch.allclose(*(torch.tensor(k[when]["pairs"]) for k in kept), atol=1e-4)
        assert kept[0][when]["answers"] == kept[1][when]["answers"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(way, one, tmp_path):
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
    started(*command, **launched_with(way))
    weights, run = one
    for what in WAYS if way == "ddp" else ("lora", "full"):
        two = torch.load(tmp_path / f"{what}.pt", weights_only=True)
        assert difference(two["through"], weights[what]) < 1e-5
        assert difference(two["resumed"], weights[what]) < 1e-5
    assert any((tmp_path / "lora" / "checkpoint-2").glob("pytorch_model_fsdp*")) == (way == "fsdp2")
    told = torch.load(tmp_path / "told.pt", weights_only=True)
    assert told["stopped"] == [1, 1]
    (first, sentence), (second, also) = told["read"]
    assert (first, second) == (2, 0)  # of two runs: the first process read each dataset, once
    assert sentence == also and sentence.startswith("No pair of the dataset") and "1 identical" in sentence
    assert not list(tmp_path.rglob(".pairs"))
    same_run(tmp_path / "run", run)
    same_run(tmp_path / "best", run.parent / "best")
    ended = [json.loads((home / "best/summary.json").read_text()) for home in (tmp_path, run.parent)]
    assert all(one["kept_step"] == 1 and one["steps"] == 2 and "patience" in one["why"] for one in ended)
    if way == "ddp":  # whose checkpoints fit any number of processes
        alone = train(tmp_path / "alone", "lora", tmp_path / "lora" / "checkpoint-2")
        assert difference(alone, weights["lora"]) < 1e-5


@pytest.mark.slow
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


def test_a_config_for_deepspeed_is_one_sentence_that_names_the_one_to_take(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch tells its processes
    with pytest.raises(UserError, match=r"DeepSpeed.* take configs/fsdp2\.yaml") as said:
        make_accelerator(Settings(), dtype=torch.float32, device="cpu", folder=tmp_path)
    assert str(said.value).endswith(".") and "\n" not in str(said.value)


def under_fsdp(**changes):
    """An Accelerator, as far as it is asked."""
    given = dict(fsdp_version=2, cpu_ram_efficient_loading=False) | changes
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**given)))


FOUR_BIT = SimpleNamespace(is_loaded_in_4bit=True)


@pytest.mark.parametrize(
    "plugin, model, settings, said",
    [
        (dict(fsdp_version=1), None, {}, "set fsdp_version: 2"),
        (dict(cpu_ram_efficient_loading=True), None, {}, "set fsdp_cpu_ram_efficient_loading: false"),
        ({}, FOUR_BIT, {}, "4-bit"),
        ({}, None, {"objective": "dpo"}, "objective=dpo"),
    ],
    ids=["first version", "weights on one process", "four bit", "dpo"],
)
def test_what_fsdp_would_train_wrongly_is_refused(plugin, model, settings, said):
    with pytest.raises(UserError, match=said):
        check_sharding(under_fsdp(**plugin), model, Settings(**settings))


def test_fsdp_sums_gradients_and_gives_log_probabilities_in_32_bit():
    accelerator = under_fsdp()
    assert check_sharding(accelerator, None, Settings())
    plugin = accelerator.state.fsdp_plugin
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16
    check_sharding(accelerator, None, Settings())
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16
    assert policy.reduce_dtype == torch.float32 and policy.output_dtype is None
