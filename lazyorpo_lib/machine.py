"""Device, number format and why, memory; it measures and names, and plans nothing."""

import contextlib
import functools
import math
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
_FAST_BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}  # the last is ARM's


@dataclass(frozen=True)
class Machine:
    """What there is to compute with."""

    device: str  # cuda, mps or cpu
    name: str
    memory_gib: float  # the GPU's, or the machine's without one
    capability: tuple[int, int] = (0, 0)  # CUDA's
    free_gib: float | None = None  # what this process may have of the GPU at hand, where that is known

    @property
    def gpu_gib(self) -> float:
        return self.memory_gib if self.device == "cuda" else 0.0


def this_machine() -> Machine:
    """Look at what there is; UserError for a GPU that torch cannot use, or that others fill."""
    if torch.cuda.is_available():
        return _this_gpu(int(os.environ.get("LOCAL_RANK", 0)))  # each of several processes has its own
    visible = re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))  # all else hides all
    if torch.version.cuda and visible and has_gpu():
        raise UserError(
            f"There is a GPU, but torch {torch.__version__} cannot use it: its driver is too old for CUDA "
            f"{torch.version.cuda}, does not answer, or CUDA_VISIBLE_DEVICES names another: update it, "
            "install a torch built for it, or set CUDA_VISIBLE_DEVICES=-1 to use the CPU."
        )
    ram = psutil.virtual_memory().total / GIB
    if torch.backends.mps.is_available():
        return Machine("mps", "Apple GPU", ram)
    return Machine("cpu", f"CPU, {torch.get_num_threads()} threads", ram)


def _this_gpu(index: int) -> Machine:
    card, capability = torch.cuda.get_device_properties(index), torch.cuda.get_device_capability(index)
    total = card.total_memory / GIB
    built = [re.findall(r"_(\d+)(\d)", arch)[0] for arch in torch.cuda.get_arch_list()]
    oldest = min((tuple(map(int, pair)) for pair in built), default=(0, 0))
    if capability < oldest:
        given = "{} has compute capability {}.{}".format(card.name, *capability)
        needs = "torch {} was built for {}.{} and later".format(torch.__version__, *oldest)
        way_out = "install an older build of torch, or hide this GPU with CUDA_VISIBLE_DEVICES=-1"
        raise UserError(f"{given}, and {needs}: {way_out}.")
    if (free := (free_bytes(f"cuda:{index}") + torch.cuda.memory_allocated(index)) / GIB) < 1:
        held = f"all but {free:.1f} of the {total:.1f} GiB of {card.name}"
        ends = "end them (nvidia-smi lists them; another notebook's kernel is one)"
        raise UserError(f"Other processes hold {held}: {ends}, or hide this GPU with CUDA_VISIBLE_DEVICES.")
    return Machine("cuda", card.name, total, capability, free)


def check_apple(settings: Settings, machine: Machine) -> None:
    """Raise UserError where the settings need bitsandbytes on an Apple GPU, before anything is downloaded."""
    for name, instead in (("method", "lora"), ("optimizer", "adamw or adafactor")):
        value = getattr(settings, name)
        if machine.device == "mps" and (value == "qlora" or "8bit" in value or value.startswith("paged")):
            why = "which needs bitsandbytes, and that does not run on Apple GPUs"
            raise UserError(f"{name} is {value}, {why}; choose {instead}.")


def pick_precision(setting: str, machine: Machine) -> tuple[torch.dtype, str]:
    """Choose the number format of the computation, with one sentence why; never by
    `torch.cuda.is_bf16_supported()`, which counts emulation and says yes on a T4."""
    has_bfloat16 = machine.capability >= (8, 0)
    capability = "compute capability {}.{}".format(*machine.capability)
    if setting != "auto":
        if setting == "bfloat16" and machine.device == "cuda" and not has_bfloat16:
            why = f"{machine.name} only emulates it ({capability}, 8.0 is needed)"
            raise UserError(f"precision is bfloat16, but {why}; choose float16 or auto.")
        return getattr(torch, setting), f"{setting}: chosen"
    if machine.device == "cuda":
        if has_bfloat16:
            return torch.bfloat16, f"bfloat16: {machine.name} has it in hardware ({capability})"
        return torch.float16, f"float16: {machine.name} has no bfloat16 in hardware ({capability})"
    if machine.device == "mps":
        return torch.float32, "float32: the safe choice on Apple GPUs; float16 is the faster one"
    if has := sorted(_FAST_BFLOAT16 & _cpu_flags()):
        return torch.bfloat16, f"bfloat16: this CPU multiplies it in hardware ({', '.join(has)})"
    return torch.float32, "float32: this CPU has no fast bfloat16"


def _cpu_flags() -> set[str]:
    """Name what this processor can do, as Linux lists it; elsewhere nothing is known. A timing would flip."""
    with contextlib.suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text().split())
    return set()


@functools.cache  # so that the runs of a process agree
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Time a large product of random matrices (of equal numbers it is quicker); operations a second."""
    n = 768 if device == "cpu" else 4096
    own = torch.Generator(device).manual_seed(0)  # the run's random numbers stay as they are
    a = torch.randn(n, n, dtype=dtype, device=device, generator=own)
    return 2 * n**3 / quickest(lambda: (a @ a)[0, 0].item(), within=0.5)


def quickest(work: Callable[[], Any], within: float = math.inf) -> float:
    """Time the quickest of five calls, of fewer where they take longer than `within`; all in seconds."""
    seconds = []
    while len(seconds) < 5 and sum(seconds) < within:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def memory_gib(device) -> float:
    """Give the peak since `forget_peak_memory`, GiB: of the process, or of the GPU what its allocator
    reserved and what is not in its count (CUDA's context, other processes)."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
        return (torch.cuda.max_memory_reserved(device) + outside) / GIB
    with contextlib.suppress(OSError, IndexError):  # Linux alone keeps a peak that can be reset
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    process = psutil.Process().memory_info()
    return max(getattr(process, "peak_wset", 0), process.rss) / GIB


def allocated_gib(device) -> float | None:
    """Give the peak of what tensors held of a GPU, GiB; None elsewhere."""
    is_gpu = torch.device(device).type == "cuda"
    return round(torch.cuda.max_memory_allocated(device) / GIB, 3) if is_gpu else None


def forget_peak_memory() -> None:
    """Start the peak anew. A GPU's starts at what is reserved, so what its cache holds unused goes first."""
    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def free_bytes(device) -> int:
    """Count what can still be allocated: on a GPU with what its allocator holds unused."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def attempt(compute: Callable[[], Any]) -> tuple[Any, str]:
    """Call `compute`; give what it returns and "", or None and why where memory ran out, the cache emptied.

    Of several processes none can go back alone: the others wait in a collective, so the error is raised.
    """
    try:
        return compute(), ""
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error) or _in_company():
            raise
        message = (str(error).splitlines() or ["no more is said"])[0][:160]
    # Outside the except block, so that the traceback no longer holds the tensors of what failed.
    clear_device_cache()
    return None, message


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error of torch, CUDA or a library of theirs says that memory ran out."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _in_company() -> bool:
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1
