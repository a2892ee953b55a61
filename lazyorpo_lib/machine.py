"""Memory of the device: the peak of a run, what is free, and the one way in which running out is met."""

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache

from . import has_gpu
from .errors import UserError
from .settings import Settings

GIB = 2**30


def memory_gib(device) -> float:
    """Give the peak since `forget_peak_memory`, GiB: of the GPU all that its allocator reserved, and what is not in its
    count (CUDA's context, other processes); else of the process."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (
            torch.cuda.max_memory_reserved(device) + total - free - torch.cuda.memory_reserved(device)
        ) / GIB
    with contextlib.suppress(OSError, IndexError):  # Linux alone keeps a peak that can be reset
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    process = psutil.Process().memory_info()
    return max(getattr(process, "peak_wset", 0), process.rss) / GIB


def allocated_gib(device) -> float | None:
    """Give the peak of what tensors held of a GPU, GiB; None elsewhere."""
    return (
        round(torch.cuda.max_memory_allocated(device) / GIB, 3)
        if torch.device(device).type == "cuda"
        else None
    )


def forget_peak_memory() -> None:
    """Start the peak anew. On a GPU it starts at what is reserved, so what lies unused in the cache goes first."""
    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def free_bytes(device) -> int:
    """Count what can still be allocated: of the GPU, with what its allocator holds unused; else of the machine."""
    if torch.device(device).type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available


def attempt(compute: Callable[[], Any]) -> tuple[Any, str]:
    """Call `compute`; give what it returns and "", or None and the message where memory ran out, the cache emptied.

    Of several processes none can go back alone, for the others wait in a collective: there the error is raised.
    """
    try:
        return compute(), ""
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not _is_out_of_memory(error) or _in_company():
            raise
        message = (str(error).splitlines() or ["no more is said"])[0][:160]
    # Outside the except block, so that the traceback no longer holds the tensors of what failed.
    clear_device_cache()
    return None, message


def _is_out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _in_company() -> bool:
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


@dataclass(frozen=True)
class Machine:
    """What there is to compute with. `memory_gib` is the GPU's, or the machine's without one; `free_gib` is what this
    process may have of the GPU at hand, None where that is not known."""

    device: str  # cuda, mps or cpu
    name: str
    memory_gib: float
    capability: tuple[int, int] = (0, 0)  # CUDA's
    free_gib: float | None = None

    @property
    def gpu_gib(self) -> float:
        return self.memory_gib if self.device == "cuda" else 0.0


def this_machine() -> Machine:
    """Look at what there is.

    Raises:
        UserError: a torch that cannot use the GPU that the driver has; a GPU that others fill.
    """
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", 0))  # of several processes each has a GPU of its own
        card, capability = torch.cuda.get_device_properties(index), torch.cuda.get_device_capability(index)
        built_for = [
            tuple(map(int, re.findall(r"_(\d+)(\d)", arch)[0])) for arch in torch.cuda.get_arch_list()
        ]
        if built_for and capability < min(built_for):
            raise UserError(
                f"{card.name} has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} was built for "
                f"{min(built_for)[0]}.{min(built_for)[1]} and later: install an older build of torch, or hide this GPU with "
                "CUDA_VISIBLE_DEVICES=-1."
            )
        free = (free_bytes(f"cuda:{index}") + torch.cuda.memory_allocated(index)) / GIB
        if free < 1:
            raise UserError(
                f"Other processes hold all but {free:.1f} of the {card.total_memory / GIB:.1f} GiB of {card.name}: end them "
                "(nvidia-smi lists them; another notebook's kernel is one), or hide this GPU with CUDA_VISIBLE_DEVICES."
            )
        return Machine("cuda", card.name, card.total_memory / GIB, capability, free)
    visible = re.match(
        r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    )  # any other value hides all
    if torch.version.cuda and visible and has_gpu():
        raise UserError(
            f"There is a GPU, but torch {torch.__version__} cannot use it: its driver is too old for CUDA {torch.version.cuda}, does not "
            "answer, or CUDA_VISIBLE_DEVICES names another: update it, install a torch built for it, or set CUDA_VISIBLE_DEVICES=-1 to "
            "use the CPU."
        )
    ram = psutil.virtual_memory().total / 2**30
    if torch.backends.mps.is_available():
        return Machine("mps", "Apple GPU", ram)
    return Machine("cpu", f"CPU, {torch.get_num_threads()} threads", ram)


def check_apple(settings: Settings, machine: Machine) -> None:
    """Apple GPUs have no bitsandbytes. Raises UserError where the settings need it, before anything is downloaded."""
    for name, instead in (("method", "lora"), ("optimizer", "adamw or adafactor")):
        value = getattr(settings, name)
        if machine.device == "mps" and (value == "qlora" or "8bit" in value or value.startswith("paged")):
            raise UserError(
                f"{name} is {value}, which needs bitsandbytes, and that does not run on Apple GPUs; choose {instead}."
            )


def pick_precision(setting: str, machine: Machine) -> tuple[torch.dtype, str]:
    """The number format of the computation and one sentence why.

    By compute capability, never by `torch.cuda.is_bf16_supported()`, which counts emulation and says yes on a T4.
    """
    if setting != "auto":
        if setting == "bfloat16" and machine.device == "cuda" and machine.capability[0] < 8:
            raise UserError(
                f"precision is bfloat16, but {machine.name} only emulates it (compute capability "
                f"{machine.capability[0]}.{machine.capability[1]}, 8.0 is needed); choose float16 or auto."
            )
        return getattr(torch, setting), f"{setting}: chosen"
    if machine.device == "cuda":
        major, minor = machine.capability
        if major >= 8:
            return (
                torch.bfloat16,
                f"bfloat16: {machine.name} has it in hardware (compute capability {major}.{minor})",
            )
        return (
            torch.float16,
            f"float16: {machine.name} has no bfloat16 in hardware (compute capability {major}.{minor})",
        )
    if machine.device == "mps":
        return torch.float32, "float32: the safe choice on Apple GPUs; float16 is the faster one"
    gain = _bfloat16_gain()
    if gain > 1.5:
        return torch.bfloat16, f"bfloat16: {gain:.1f} times as fast as float32 on this CPU in a short timing"
    return (
        torch.float32,
        f"float32: bfloat16 runs at {gain:.2f} times its speed on this CPU in a short timing",
    )


@functools.cache  # so that the runs of a process agree
def _bfloat16_gain() -> float:
    """How many times faster this CPU multiplies bfloat16 matrices than float32 ones."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 512, dtype=dtype)
        b = torch.ones(512, 512, dtype=dtype)
        a @ b
        times = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def checkpoint_layers(model, count: int) -> int:
    """Recompute the activations of `count` layers in the backward (all of them if there are fewer); give how many."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if count and layers:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < count
    return min(count, len(layers))
