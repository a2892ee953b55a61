"""What a run leaves behind: its folder's name, its lock, JSON and JSON lines; deletes nothing."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError, expanded
from .marker import unwritable, write_atomically
from .settings import Settings

# What a run writes into its folder, checkpoints apart.
FILES = (
    ".lock", "STOP", "settings.json", "data_report.json", "dropped.jsonl", "dropped.jsonl.tmp",
    "history.jsonl", "watched.jsonl", "held_out.json", "live.png", "summary.json", "README.md", "model/",
    ".saving/", ".pairs", "tensorboard/", "wandb/", "model_outputs.json", "reference_outputs.json",
)  # fmt: skip
# Settings that change where and how a run is carried out, but not what comes out of it.
NOT_THE_RESULT = {
    "preset", "output_dir", "resume", "save_to", "report_to", "hub_repo", "max_minutes", "max_cost",
    "price_per_hour", "on_finish", "save_every_minutes", "save_every_steps", "keep_checkpoints",
    "log_every_steps", "eval_every_steps", "watch_every_steps", "answers", "answer_tokens", "evaluate",
    "tokens_per_batch", "checkpointed_layers", "tracker_project", "tracker_run",
    "trackio_space",
}  # fmt: skip
_held: dict[Path, FileLock] = {}  # folders this process is at work in


def fingerprint(settings: Settings) -> str:
    """Digest, in ten characters, everything in the settings that shapes the result."""
    return hashlib.sha256(json.dumps(_shaping(settings), sort_keys=True).encode()).hexdigest()[:10]


def _shaping(settings: Settings) -> dict:
    others = NOT_THE_RESULT - ({"eval_every_steps"} if settings.keep == "best" else set())
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in others}


def folder_of(settings: Settings) -> Path:
    """Name the run's folder, which need not be there yet."""
    if settings.output_dir != "auto":
        folder = expanded(settings.output_dir)
    else:
        homes = [Path("/workspace"), Path("/content")]  # RunPod's volume; Colab
        home = next((h / "lazyorpo" for h in homes if os.access(h, os.W_OK)), Path("lazyorpo_runs"))
        names = [re.sub(r"[^\w.-]+", "-", Path(x).name) for x in (settings.base_model, settings.dataset)]
        names = [name.encode()[:80].decode(errors="ignore") for name in names]  # a file system's limit is 255
        folder = home / "-".join([*names, fingerprint(settings)])
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f"output_dir is {str(folder)!r}, a name that is not UTF-8: choose another.") from None
    os.umask(os.umask(0o002) | 0o002)  # whatever the shell allows: not writable for everybody
    return folder.resolve()


def keep_base_apart(base_model: str, folder: Path) -> None:
    """Refuse a base model in the folder that is going to be written over."""
    base = expanded(base_model)
    if base.exists() and base.resolve().is_relative_to(folder):
        where = f"which lies in the run's own folder {folder}"
        raise UserError(f"base_model is {base_model!r}, {where}: choose another output_dir.")


def claim(folder: Path, setting: str = "output_dir") -> bool:
    """Hold the folder for this process, until `release` or its end; tell whether it did not so far."""
    if folder in _held:
        return False
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        way_out = f"wait for it to end, or choose another {setting}"
        raise UserError(f"Another run is at work in {folder}: {way_out}.") from None
    except PermissionError as error:
        raise unwritable(folder, error) from None
    except OSError:  # a volume without locks, as networks have: the lock is a courtesy
        return True
    _held[folder] = lock
    return True


def release(folder: Path) -> None:
    """Let go of a folder that this process held."""
    if lock := _held.pop(folder, None):
        lock.release()


def is_begun(folder: Path, settings: Settings) -> bool:
    """Tell whether the folder holds this run, begun."""
    older = read_json(folder / "settings.json")
    if not any((folder / name).exists() for name in ("history.jsonl", "summary.json")):
        return False
    if older.get("fingerprint") != fingerprint(settings):
        now, then = _shaping(settings), older.get("settings", {})
        differ = [name for name in then and now if then.get(name) != now[name]]
        other = "; ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in differ)
        other = other or "its settings.json is gone, or of another version of the kit"
        why, way_out = f"with other settings ({other})", "or delete that folder"
    elif settings.resume == "never":
        why, way_out = "already and resume is never", "or resume=auto"
    else:
        return True
    raise UserError(f"{folder} holds a run {why}: choose another output_dir, {way_out}.")


def is_finished(folder: Path) -> bool:
    """Tell whether the run in a folder has come to its end."""
    return bool(read_json(folder / "summary.json").get("finished"))


def append_row(path, row: dict) -> None:
    """Add one row as one line in one unbuffered write; what a kill left of one before is cut off."""
    line = json.dumps({name: _plain(value) for name, value in row.items()}) + "\n"
    with open(path, "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        if file.write(line.encode()) < len(line):  # unbuffered writes fall short without an error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _plain(value):
    if value is None or isinstance(value, int | str | list):
        return value
    value = float(value)  # NumPy and torch scalars too
    return value if math.isfinite(value) else None


def read_rows(path) -> list[dict]:
    """Read every complete row, oldest first; a torn last line is left out, and no file is no rows."""
    rows, data = [], Path(path).read_bytes() if os.path.exists(path) else b""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # what follows the last newline is torn
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
        if len(rows) < number or not isinstance(rows[-1], dict):
            raise UserError(f"Line {number} of {path} is {line[:40]!r}, not a JSON object; delete that line.")
    return rows


def read_json(path) -> dict:
    """Read one of the kit's files; no file is an empty one."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe might never end
            raise ValueError
        found = json.loads(Path(path).read_bytes()) if os.path.lexists(path) else {}
    except OSError as error:
        why = f"cannot be read ({error.strerror}): give its owner's rights, or another"
        raise UserError(f"{path} {why}.") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        way_out = "bring it back from a copy, or choose a new folder"
        raise UserError(f"{path} is damaged, it holds no JSON object: {way_out}.")
    return found


def truncate_after(path, step: int) -> None:
    """Drop the rows of later steps, for a run that goes on from the checkpoint of `step`; -1: all."""
    if os.path.exists(path):
        kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        write_atomically(path, "".join(kept).encode())
