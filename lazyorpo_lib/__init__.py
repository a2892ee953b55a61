"""LazyORPO: fine-tune a language model with ORPO (arXiv 2403.07691) from a notebook or a terminal."""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys

__version__ = "0.1.0"

# When transformers imports bitsandbytes, that warns on some CPUs of a package which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
# Rows differ in length, and torch's CPU library keeps every length's kernels: 17 MiB a step of the demo, in
# two caches of 1,024, of which a step uses some 50. Read when torch is imported, which happens after this.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")

# Rows differ in length, and so would the blocks that CUDA's allocator keeps; segments that grow leave far
# less memory idle. Windows and its Linux do not have them. What somebody has set stays.
_ALLOCATOR = "expandable_segments:True"
_names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the new name, and the old one
_has_segments = sys.platform == "linux" and "microsoft" not in os.uname().release.lower()
if _has_segments and not any(name in os.environ for name in _names):
    os.environ |= dict.fromkeys(_names, _ALLOCATOR)
    _torch = sys.modules.get("torch")  # it may have read its environment by now
    if _torch is not None and _torch.version.cuda and not _torch.cuda.is_initialized():
        _set = getattr(_torch._C, "_accelerator_setAllocatorSettings", None)  # private, and young
        _set = _set or getattr(_torch.cuda.memory, "_set_allocator_settings", None)
        if _set is not None:
            _set(_ALLOCATOR)


def has_gpu() -> bool:
    """Ask the driver for a GPU of NVIDIA's; before torch is imported, and where torch cannot use it."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pip(*arguments: str) -> str:
    """Run pip for this Python, or uv's where there is none, as `uv venv` leaves it; why it failed, or ""."""
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        command = [uv, "tool", "run", "-q", "--python", sys.executable, "pip", "--python", sys.executable]
    else:
        return f"there is neither pip nor uv: run {sys.executable} -m ensurepip, then again"
    command += [arguments[0], "-q", "--disable-pip-version-check", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr.strip() or "no reason given").splitlines()[-1] if done.returncode else ""
