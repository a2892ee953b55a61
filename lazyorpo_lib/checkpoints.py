"""The checkpoints in the folder of a run: which are complete, who wrote them, which go.

The Trainer writes and reads what is in them. A checkpoint that a kill, a full disk or a failing disk has torn is never gone on from.
"""

import json
import os
import shutil
from pathlib import Path

from . import history


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint to the disk and write down the sizes of its files, by which a torn one is known."""
    sizes = {}
    for file in sorted(f for f in checkpoint.rglob("*") if f.is_file()):
        with open(file, "r+b") as opened:
            os.fsync(opened.fileno())
        sizes[file.relative_to(checkpoint).as_posix()] = file.stat().st_size
    history.write_atomically(checkpoint / "sizes.json", json.dumps(sizes, indent=1).encode())


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / "sizes.json").read_bytes())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _numbered(folder: Path) -> list[Path]:
    found = [c for c in Path(folder).glob("checkpoint-*") if c.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda c: int(c.name.split("-")[1]))


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [c for c in _numbered(folder) if _is_whole(c)]


def sharding_of(checkpoint: Path) -> str:
    """FSDP or DeepSpeed, where one of them wrote the checkpoint; else empty."""
    return "FSDP" if any(checkpoint.glob("pytorch_model_fsdp*")) else "DeepSpeed" * (checkpoint / "latest").is_file()


def remove(folder: Path, *, keep: int = 0) -> None:
    """Remove all but the last `keep` complete checkpoints, torn ones too."""
    kept = complete(folder)[-keep:] if keep else []
    for checkpoint in _numbered(folder):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint, ignore_errors=True)
