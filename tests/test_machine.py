"""machine.py: the machine at hand, on a pretended GPU; what is set for CUDA's allocator; nothing kept of an
earlier run."""

import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch

from lazyorpo_lib import machine, model
from lazyorpo_lib.__main__ import main
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.machine import this_machine
from tests.conftest import bitsandbytes_on_the_cpu, random_pairs
from tests.orpo.test_trainer import make, trained

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """A card of 40 GiB: 9 reserved here (10 at the peak) with 6 in use (8), 1 of context and others, 30
    free."""
    numbers = dict(
        is_available=True, mem_get_info=(30 * GIB, 40 * GIB), memory_reserved=9 * GIB,
        max_memory_reserved=10 * GIB,
        memory_allocated=6 * GIB, max_memory_allocated=8 * GIB, get_device_capability=(8, 6),
        get_arch_list=["sm_75", "sm_100", "compute_120"],
        get_device_properties=types.SimpleNamespace(name="A40", total_memory=40 * GIB),
    )  # fmt: skip
    for name in numbers:
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: numbers[name])
    return numbers


def test_the_peak_of_a_gpu_counts_what_its_allocator_reserved_and_what_lies_outside_it(gpu):
    assert machine.memory_gib("cuda") == 10 + 1 and machine.allocated_gib("cuda") == 8
    assert machine.allocated_gib("cpu") is None and machine.memory_gib("cpu") > 0.01


def test_the_cache_is_emptied_before_the_peak_of_a_gpu_starts_anew(gpu, monkeypatch):
    done = []
    monkeypatch.setattr(machine, "clear_device_cache", lambda **options: done.append(options))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    machine.forget_peak_memory()
    assert done == [{"garbage_collection": True}, "reset"]


def test_free_memory_counts_what_the_allocator_holds_unused(gpu):
    assert machine.free_bytes("cuda") == (30 + 9 - 6) * GIB
    assert 0 < machine.free_bytes("cpu") < 2**50


def test_the_machine_says_what_of_its_gpu_this_process_may_have(gpu):
    machine = this_machine()
    assert (machine.device, machine.name, machine.memory_gib, machine.free_gib) == ("cuda", "A40", 40, 39)


def test_a_gpu_that_others_fill_is_one_sentence_that_says_how_to_go_on(gpu):
    gpu["mem_get_info"] = GIB // 2, 40 * GIB
    assert this_machine().free_gib == 9.5, "what this process holds it may have"
    gpu["memory_reserved"] = gpu["memory_allocated"] = 0
    with pytest.raises(UserError, match=r"all but 0\.5 of the 40\.0 GiB of A40.*nvidia-smi"):
        this_machine()


def test_a_gpu_that_this_torch_was_not_built_for_is_one_sentence(gpu):
    gpu["get_device_capability"] = 7, 0
    with pytest.raises(
        UserError,
        match=r"A40 has compute capability 7\.0, and torch .* was built for 7\.5 and later: install an older",
    ):
        this_machine()


def test_each_of_several_processes_looks_at_its_own_gpu(gpu, monkeypatch):
    asked = set()
    for name in (
        "mem_get_info",
        "memory_reserved",
        "memory_allocated",
        "get_device_properties",
        "get_device_capability",
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda device, name=name: (asked.add(str(device)), gpu[name])[1]
        )
    monkeypatch.setenv("LOCAL_RANK", "3")
    this_machine()
    assert asked == {"3", "cuda:3"}


def test_a_plan_for_a_named_card_does_not_ask_what_is_wrong_with_the_one_at_hand(gpu, capsys):
    gpu["mem_get_info"], gpu["memory_reserved"], gpu["memory_allocated"] = (0, 40 * GIB), 0, 0
    assert (
        main(["--plan", "--preset", "tiny", "--device", "T4"]) == 0 and "this T4" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "hidden,told",
    [(None, True), ("0", True), ("GPU-5f", True), ("-1", False), ("", False), ("NoDevFiles", False)],
)
def test_a_driver_that_torch_cannot_use_is_one_sentence_unless_the_gpu_is_hidden(monkeypatch, hidden, told):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    if told:
        with pytest.raises(UserError, match=r"driver is too old for CUDA 13\.0.*CUDA_VISIBLE_DEVICES=-1"):
            this_machine()
    else:
        assert this_machine().device == "cpu"


@pytest.mark.parametrize(
    "flags,dtype",
    [
        ("fpu avx512_bf16 sse", torch.bfloat16), ("amx_tile amx_bf16", torch.bfloat16),
        ("Features : fp asimd bf16", torch.bfloat16), ("fpu avx2 avx512f", torch.float32),
        ("", torch.float32),
    ],
)  # fmt: skip
def test_a_cpus_number_format_is_what_its_flags_say_and_no_timing(monkeypatch, flags, dtype):
    monkeypatch.setattr(machine, "product_rate", lambda *given: pytest.fail("timed"))
    monkeypatch.setattr(machine, "_cpu_flags", lambda: set(flags.split()))
    here = machine.Machine("cpu", "CPU", 8.0)
    found, why = machine.pick_precision("auto", here)
    assert found == dtype and why.startswith(str(dtype)[6:]) and "this CPU" in why
    assert [machine.pick_precision("auto", here)[0] for _ in range(3)] == [dtype] * 3


def test_a_system_that_does_not_list_its_cpus_flags_gives_none(monkeypatch):
    monkeypatch.setattr(machine, "Path", lambda name: Path("/no/such/file"))
    assert machine._cpu_flags() == set()


# Running out.


def test_out_of_memory_is_told_and_everything_else_raised():
    def fails(error):
        raise error

    assert machine.attempt(lambda: 3) == (3, "")
    for error in (
        torch.OutOfMemoryError("much"),
        torch.OutOfMemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        result, message = machine.attempt(lambda error=error: fails(error))
        assert result is None and message
    for error in (RuntimeError("shapes differ"), ValueError("out of memory")):
        with pytest.raises(type(error)):
            machine.attempt(lambda error=error: fails(error))


def test_of_several_processes_none_goes_back_alone(monkeypatch):
    def fails():
        raise torch.OutOfMemoryError("much")

    monkeypatch.setattr(machine, "_in_company", lambda: True)
    with pytest.raises(torch.OutOfMemoryError):
        machine.attempt(fails)


# CUDA's allocator.


def allocator(before="", **environment):
    """What a new process has set once lazyorpo_lib is imported."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    code = f"import os, sys, types; told = []; {before}; import lazyorpo_lib; "
    code += f"print([os.environ.get(n) for n in {names}], told)"
    env = {name: value for name, value in os.environ.items() if name not in names} | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    ).stdout.strip()


SEGMENTS = "expandable_segments:True"
TORCH = (
    "sys.modules['torch'] = types.SimpleNamespace("
    "version=types.SimpleNamespace(cuda='13.0'), _C=types.SimpleNamespace({new}),"
    "cuda=types.SimpleNamespace(is_initialized=lambda: {begun}, memory=types.SimpleNamespace({old})))"
)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has them")
@pytest.mark.parametrize(
    "before,environment,found",
    [
        ("", {}, f"{[SEGMENTS, SEGMENTS]} []"),
        ("", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "[None, 'backend:native'] []"),
        ("", {"PYTORCH_ALLOC_CONF": "backend:native"}, "['backend:native', None] []"),
        (
            "os.uname = lambda: types.SimpleNamespace(release='5.15-microsoft-standard-WSL2')",
            {},
            "[None, None] []",
        ),
        (
            TORCH.format(new="_accelerator_setAllocatorSettings=told.append", old="", begun=False),
            {},
            f"{[SEGMENTS] * 2} {[SEGMENTS]}",
        ),
        (
            TORCH.format(new="", old="_set_allocator_settings=told.append", begun=False),
            {},
            f"{[SEGMENTS] * 2} {[SEGMENTS]}",
        ),
        (
            TORCH.format(new="", old="_set_allocator_settings=told.append", begun=True),
            {},
            f"{[SEGMENTS] * 2} []",
        ),
        (TORCH.format(new="", old="", begun=False), {}, f"{[SEGMENTS] * 2} []"),
    ],
)
def test_cudas_allocator_is_told_to_grow_its_segments_unless_somebody_chose_otherwise(
    before, environment, found
):
    assert allocator(before or "0", **environment) == found


# Two runs in one process.


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_nothing_of_an_earlier_run_is_alive_when_the_next_one_begins(
    tmp_path, monkeypatch, optimizer, failed
):
    if optimizer == "adamw_8bit":
        bitsandbytes_on_the_cpu()
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    kept = []

    def cell():
        trainer = make(tmp_path, random_pairs(8), max_steps=2, method="full", optimizer=optimizer)
        trained(trainer)
        kept.extend(weakref.ref(p) for p in trainer.model.parameters())
        kept.append(weakref.ref(trainer))
        if failed:
            raise RuntimeError("as a failed cell does") from KeyError("and one before it")

    try:
        cell()
    except RuntimeError as error:
        sys.last_value = error
        shell = error  # IPython's last result holds it too
    model.forget_earlier_run()
    assert kept and not any(reference() is not None for reference in kept)
    assert sys.last_value is None and (not failed or shell)
