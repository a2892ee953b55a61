"""Memory of the device: the peak of a run, what is free, and the one way in which running out is met."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache

GIB = 2**30


def memory_gib(device) -> float:
    """Give the peak since `forget_peak_memory`, GiB: of the GPU all that its allocator reserved, and what is not in its
    count (CUDA's context, other processes); else of the process."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (torch.cuda.max_memory_reserved(device) + total - free - torch.cuda.memory_reserved(device)) / GIB
    with contextlib.suppress(OSError, IndexError):  # Linux alone keeps a peak that can be reset
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    process = psutil.Process().memory_info()
    return max(getattr(process, "peak_wset", 0), process.rss) / GIB


def allocated_gib(device) -> float | None:
    """Give the peak of what tensors held of a GPU, GiB; None elsewhere."""
    return round(torch.cuda.max_memory_allocated(device) / GIB, 3) if torch.device(device).type == "cuda" else None


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
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
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
