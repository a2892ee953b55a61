"""What a notebook needs before anything else: packages, a token, Google Drive. Standard library only at import.

It installs what is missing or too old and touches nothing else, so that Colab's own packages stay as they are. It asks
for nothing, and never imports torch.
"""

import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from .. import has_gpu
from ..errors import UserError

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
NO_GPU = (
    "This runtime has no GPU: the demo trains on the CPU in a few minutes. For larger models choose "
    "Runtime > Change runtime type > T4 GPU, then Run all."
)


def prepare() -> None:
    """The first cell: install what is missing, find the token, say what there is. No network when nothing is missing.

    Raises:
        UserError: pip failed, or a package in use was replaced and the session must be restarted.
    """
    if missing := missing_requirements():
        install(missing)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    shown = ("torch", "transformers", "peft", "datasets", "ipywidgets")
    versions = " · ".join(f"{name} {_version(name)}" for name in shown)
    print(f"Python {sys.version.split()[0]} · {versions}\nHugging Face token: {find_token()}.")
    if on_colab() and not has_gpu():
        print(NO_GPU)


def on_colab() -> bool:
    return "google.colab" in sys.modules  # its kernel imports it at the start


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> list:
    """The lines of requirements.txt, as `packaging` requirements."""
    from packaging.requirements import Requirement

    lines = (line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def missing_requirements() -> list[str]:
    """What of the requirements is not installed, or older than its floor."""
    return [
        str(wanted)
        for wanted in requirements()
        if not ((found := _version(wanted.name)) and wanted.specifier.contains(found, prereleases=True))
    ]


def install(missing: list[str]) -> None:
    """pip install exactly these; never -U, so that what is good enough stays."""
    loaded = {wanted.name: _version(wanted.name) for wanted in requirements() if wanted.name in sys.modules}
    print(f"Installing {', '.join(missing)} …")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *missing]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(
            f"pip could not install {', '.join(missing)} ({reason}): check the connection, or install from a terminal."
        )
    importlib.invalidate_caches()
    if stale := [name for name, version in loaded.items() if _version(name) != version]:
        raise UserError(
            f"{', '.join(stale)} had to be replaced while in use: choose Restart session (or kernel), then Run all."
        )


def find_token() -> str:
    """Where the Hugging Face token comes from, in words. Colab's goes into the environment; it is never shown."""
    if os.environ.get("HF_TOKEN"):
        return "from the environment"
    if on_colab():
        token, problem = _colab_secret()
        if token:
            os.environ["HF_TOKEN"] = token
            return "from Colab's secrets"
        return f"none ({problem}); public models and datasets need none"
    return "none in the environment; public models and datasets need none"


@functools.cache  # each call may wait ten seconds for the page
def _colab_secret() -> tuple[str, str]:
    try:
        from google.colab import userdata

        return userdata.get("HF_TOKEN") or "", "the secret HF_TOKEN is empty"
    except Exception as error:  # not there, not allowed, timed out: its errors have no common class
        return "", f"Colab's secrets: {type(error).__name__}"


# Google Drive: the run stays on the local disk, since Drive can drop at any time, and what is complete is copied.
