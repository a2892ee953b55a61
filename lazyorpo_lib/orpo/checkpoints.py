"""The checkpoints in the folder of a run: which are complete, who wrote them, which go.

The Trainer writes and reads what is in them. A checkpoint that a kill, a full disk or a failing disk has torn is never gone on from.
"""

from pathlib import Path

from .. import folder as folders


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run by their names, oldest first, torn ones too."""
    found = [c for c in Path(folder).glob("checkpoint-*") if c.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda c: int(c.name.split("-")[1]))


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [c for c in numbered(folder) if folders.is_whole(c, "checkpoint")]


def sharding_of(checkpoint: Path) -> str:
    """FSDP or DeepSpeed, where one of them wrote the checkpoint; else empty."""
    return (
        "FSDP"
        if any(checkpoint.glob("pytorch_model_fsdp*"))
        else "DeepSpeed" * (checkpoint / "latest").is_file()
    )


def remove(folder: Path, *, keep: int = 0) -> None:
    """Remove all but the last `keep` complete checkpoints, torn ones too."""
    kept = complete(folder)[-keep:] if keep else []
    for checkpoint in numbered(folder):
        if checkpoint not in kept:
            folders.remove(checkpoint)
