"""Limits of time and memory on what strangers wrote: templates, archives, tables.

Time is kept by a second thread, which raises in the first one as soon as that runs Python again; memory by
the address space that the system allows the process, where it keeps such a limit (Linux). It judges nothing.
"""

import contextlib
import ctypes
import threading
from pathlib import Path

MIB = 2**20
ROW = 4 * MIB  # bytes of one row: a million tokens of English, for which a tokenizer takes 150 times as much
WHOLE = 256 * MIB  # bytes of a file that is read as one value
MEMORY = 1024 * MIB  # bytes that one step of reading or of writing a template may add


class OverLimit(BaseException):
    """A limit was reached. No Exception, so that nobody on the way takes it for a fault of their own."""


@contextlib.contextmanager
def seconds(most: float):
    """Run a block for at most so many seconds. Raises OverLimit; one long call into C ends first."""
    lock, done, here = threading.Lock(), threading.Event(), ctypes.c_ulong(threading.get_ident())

    def strike():
        if not done.wait(most):
            with lock:
                if not done.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(here, ctypes.py_object(_OverTime))

    threading.Thread(target=strike, daemon=True).start()
    try:
        try:
            yield
        finally:
            with lock:
                done.set()
    except _OverTime:
        raise OverLimit(f"takes longer than {most:g} seconds") from None


class _OverTime(BaseException):
    pass


@contextlib.contextmanager
def memory(most: int = MEMORY):
    """Run a block that may add at most so many bytes to the process. Raises OverLimit."""
    before = None
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows; a Mac has no /proc
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        found = resource.getrlimit(resource.RLIMIT_AS)
        now = min([used + most, *(limit for limit in found if limit != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_AS, (now, found[1]))
        before = found
    try:
        yield
    except MemoryError:
        raise OverLimit(f"needs more than {most // MIB:,} MiB of memory at once") from None
    finally:
        if before:
            resource.setrlimit(resource.RLIMIT_AS, before)
