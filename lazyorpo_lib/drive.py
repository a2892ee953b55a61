"""Copies of a run on Google Drive, which outlive a free Colab.

The run stays on the local disk, since Drive can drop; what is complete is copied. Nothing is downloaded.
"""

import shutil
from pathlib import Path

from .errors import UserError, say
from .marker import MARKER, is_whole, marked, remove, replacing, take, writing


def drive_folder(name: str) -> Path | None:
    """Mount Google Drive and give this run's folder there; None, and a line why, where that fails."""
    home = Path("/content/drive")
    try:
        from google.colab import drive

        drive.mount(str(home))
        folder = home / "MyDrive" / "LazyORPO" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except Exception as error:  # refused, closed, not on Colab: the run goes on without it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        why = f"save_to is drive, but Google Drive could not be mounted ({reason})"
        say(f"{why}: everything stays on local disk.")
        return None


def mirror(source: Path, target: Path) -> bool:
    """Copy a run's files, complete checkpoints and model; with the two swapped it brings a run back.

    Returns:
        False, with a line that says why, if the disk failed; what had been there is still there.
    """
    try:
        for name in sorted(marked(source)["files"]):
            item = source / name
            if not item.exists() or name.startswith(".") or item.suffix == ".tmp":
                continue
            is_checkpoint = name.startswith("checkpoint-")  # which never changes
            if not is_checkpoint or is_whole(item, "checkpoint") and not (target / name).exists():
                copy_complete(item, take(target, "run", name) / name)
        for old in target.glob("checkpoint-*"):
            if not (source / old.name).exists():
                remove(old)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        say(f"Could not copy to {target} ({reason}); the run goes on, its files are in {source}.")
        return False
    return True


def copy_complete(source: Path, target: Path) -> None:
    """Copy a file or folder so that `target` is there whole or not at all."""
    if not source.is_dir():
        with open(source, "rb") as old, writing(target) as new:
            shutil.copyfileobj(old, new)
        return
    with replacing(target, marked(source)["what"] or "copy") as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MARKER))
