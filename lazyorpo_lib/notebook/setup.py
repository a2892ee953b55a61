"""What is needed before anything else: packages, a token. Standard library only at import.

It installs what is missing or too old and touches nothing else, so that Colab's own packages stay as they
are. It asks for nothing, and never imports torch.
"""

import functools
import importlib
import os
import re
import sys
from importlib import metadata
from pathlib import Path

from .. import has_gpu, pip
from ..errors import UserError

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
OPTIONAL = {"bitsandbytes", "pyarrow", "ipywidgets", "matplotlib", "nbval", "gguf"}  # a run can do without
NO_GPU = "This runtime has no GPU: the demo trains on the CPU in a few minutes. For larger models choose "
NO_GPU += "Runtime > Change runtime type > T4 GPU, then Run all."
KAGGLE = "Kaggle: what you add as Input is in /kaggle/input, read only; runs are kept in /kaggle/working. "
KAGGLE += "This notebook uses one of its two GPUs. GPU and internet are switched on under Settings."


def prepare() -> None:
    """Install what is missing, find the token, say what there is: the first cell; offline if all is there."""
    if missing := missing_requirements():
        install(missing)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    shown = ("torch", "transformers", "peft", "datasets", "ipywidgets")
    versions = " · ".join(f"{name} {_version(name)}" for name in shown)
    print(f"Python {sys.version.split()[0]} · {versions}\nHugging Face token: {find_token()}.")
    if on_colab() and not has_gpu():
        print(NO_GPU)
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        print(KAGGLE)


def on_colab() -> bool:
    """Tell whether this is a notebook of Colab, whose kernel imports its package at the start."""
    return "google.colab" in sys.modules


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[tuple[str, str]]:
    """Give the packages of requirements.txt, or those that the kit was installed with, and their floors."""
    # Beside an installed package such a file is somebody else's.
    is_ours = REQUIREMENTS.is_file() and not REQUIREMENTS.parent.name.endswith("-packages")
    lines = REQUIREMENTS.read_text("utf-8").splitlines() if is_ours else metadata.requires("lazyorpo")
    return [found.groups() for line in lines if (found := re.match(r"([\w.-]+)>=([\d.]+)", line))]


def missing_requirements() -> list[str]:
    """List what of the requirements is not installed, or older than its floor."""

    def numbers(version):  # 2.11.0+cu128 is as new as 2.11; without packaging, which may be missing too
        return [int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split(".")]

    found = [(name, floor, _version(name)) for name, floor in requirements()]
    return [f"{name}>={floor}" for name, floor, has in found if not has or numbers(has) < numbers(floor)]


def check_requirements() -> None:
    """Raise UserError where something that a run needs is missing or too old; imports none of it."""
    pairs = (wanted.split(">=") for wanted in missing_requirements())
    if needed := [(name, floor) for name, floor in pairs if name not in OPTIONAL]:
        said = (f"{n} is {_version(n) or 'not installed'}, but >={floor} is needed" for n, floor in needed)
        command = " ".join(f"'{name}>={floor}'" for name, floor in needed)
        raise UserError(f"{'; '.join(said)}: pip install {command}, then start anew.")


def install(missing: list[str]) -> None:
    """Install exactly these with pip; never -U, so that what is good enough stays."""
    loaded = {name: _version(name) for name, _ in requirements() if name in sys.modules}
    print(f"Installing {', '.join(missing)} …")
    if reason := pip("install", *missing):
        way_out = "check the connection, or install from a terminal"
        raise UserError(f"pip could not install {', '.join(missing)} ({reason}): {way_out}.")
    importlib.invalidate_caches()
    if stale := [name for name, version in loaded.items() if _version(name) != version]:
        way_out = "choose Restart session (or kernel), then Run all"
        raise UserError(f"{', '.join(stale)} had to be replaced while in use: {way_out}.")


def find_token() -> str:
    """Say where the Hugging Face token comes from. Colab's goes into the environment; it is never shown."""
    if os.environ.get("HF_TOKEN"):
        return "from the environment"
    token, problem = _colab_secret() if on_colab() else ("", "")
    if token:
        os.environ["HF_TOKEN"] = token
        return "from Colab's secrets"
    return f"none {f'({problem})' if problem else 'in the environment'}; public models and datasets need none"


@functools.cache  # each call may wait ten seconds for the page, and the hub's own get_token asks again
def _colab_secret() -> tuple[str, str]:
    try:
        from google.colab import userdata

        return userdata.get("HF_TOKEN") or "", "the secret HF_TOKEN is empty"
    except Exception as error:  # not there, not allowed, timed out: its errors have no common class
        return "", f"Colab's secrets: {type(error).__name__}"
