"""What a run leaves behind: name, lock, JSON lines, atomic writes, copies to Drive.

Every folder that the kit writes holds a marker with the names of the kit's own files in it. A folder without
one is written into only while it is empty; a name in it that is not listed is somebody else's and stays;
links are never followed. The only module that deletes; it knows nothing of what the files hold.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from xxhash import xxh3_128

from .errors import UserError
from .settings import Settings

MARKER = ".lazyorpo.json"
DRAFT = "draft"  # what a folder is until it is complete: nobody else writes there, so it goes as a whole
# What a run writes into its folder, checkpoints apart.
FILES = (
    ".lock", "STOP", "settings.json", "data_report.json", "dropped.jsonl", "dropped.jsonl.tmp",
    "history.jsonl", "watched.jsonl", "held_out.json", "live.png", "summary.json", "README.md", "model/",
    ".saving/", "tensorboard/", "wandb/",
)  # fmt: skip
# Settings that change where and how a run is carried out, but not what comes out of it.
NOT_THE_RESULT = {
    "preset", "output_dir", "resume", "save_to", "report_to", "hub_repo", "max_minutes", "save_every_minutes",
    "save_every_steps", "keep_checkpoints", "log_every_steps", "eval_every_steps", "watch_every_steps",
    "answers", "answer_tokens", "tokens_per_batch", "checkpointed_layers",
}  # fmt: skip
_held: dict[Path, FileLock] = {}  # folders this process is at work in


# ---- a run's folder
def fingerprint(settings: Settings) -> str:
    """Digest, in ten characters, everything in the settings that shapes the result."""
    shaping = {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_THE_RESULT}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:10]


def folder_of(settings: Settings) -> Path:
    """Name the run's folder, which need not be there yet."""
    if settings.output_dir != "auto":
        folder = Path(settings.output_dir).expanduser()
    else:
        homes = [Path("/workspace"), Path("/content")]  # RunPod's volume; Colab
        home = next((h / "lazyorpo" for h in homes if os.access(h, os.W_OK)), Path("lazyorpo_runs"))
        names = [re.sub(r"[^\w.-]+", "-", Path(x).name) for x in (settings.base_model, settings.dataset)]
        names = [name.encode()[:80].decode(errors="ignore") for name in names]  # a file system's limit is 255
        folder = home / "-".join([*names, fingerprint(settings)])
    os.umask(os.umask(0o002) | 0o002)  # whatever the shell allows: not writable for everybody
    return folder.resolve()


def keep_base_apart(base_model: str, folder: Path) -> None:
    """Refuse a base model in the folder that is going to be written over."""
    base = Path(base_model).expanduser()
    if base.exists() and base.resolve().is_relative_to(folder):
        where = f"which lies in the run's own folder {folder}"
        raise UserError(f"base_model is {base_model!r}, {where}: choose another output_dir.")


def claim(folder: Path) -> None:
    """Hold the folder for this process, until `release` or its end.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    if folder in _held:
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another run is at work in {folder}: wait for it to end, or choose another output_dir."
        ) from None
    except PermissionError as error:
        raise _unwritable(folder, error) from None
    except OSError:  # a volume without locks, as networks have: the lock is a courtesy
        return
    _held[folder] = lock


def release(folder: Path) -> None:
    """Let go of a folder that this process held."""
    if lock := _held.pop(folder, None):
        lock.release()


def is_begun(folder: Path, settings: Settings) -> bool:
    """Tell whether the folder holds this run, begun.

    Raises:
        UserError: it holds one with other settings, or this one and `resume` is never.
    """
    older = read_json(folder / "settings.json")
    if not any((folder / name).exists() for name in ("history.jsonl", "summary.json")):
        return False
    if older.get("fingerprint") != fingerprint(settings):
        now, then = dataclasses.asdict(settings), older.get("settings", {})
        differ = [name for name in then and now if name not in NOT_THE_RESULT and then.get(name) != now[name]]
        other = "; ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in differ)
        raise UserError(
            f"{folder} holds a run with other settings "
            f"({other or 'its settings.json is gone, or of another version of the kit'}): choose another "
            "output_dir, or delete that folder."
        )
    if settings.resume == "never":
        raise UserError(
            f"{folder} holds a run already and resume is never: choose another output_dir, or resume=auto."
        )
    return True


# ---- files that a kill leaves whole
def append_row(path, row: dict) -> None:
    """Add one flat row as one line in one unbuffered write; what a kill left of one before is cut off."""
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
    if value is None or isinstance(value, int | str):
        return value
    value = float(value)  # NumPy and torch scalars too
    return value if math.isfinite(value) else None


def read_rows(path) -> list[dict]:
    """Read every complete row, oldest first; a torn last line is left out, and no file is no rows.

    Raises:
        UserError: a complete line is not a JSON object, so something else has changed the file.
    """
    rows, data = [], Path(path).read_bytes() if os.path.exists(path) else b""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # what follows the last newline is torn
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
        if len(rows) < number or not isinstance(rows[-1], dict):
            raise UserError(f"Line {number} of {path} is {line[:40]!r}, not a JSON object; delete that line.")
    return rows


def read_json(path) -> dict:
    """Read one of the kit's files; no file is an empty one.

    Raises:
        UserError: it is damaged, as by a failing disk, or cannot be read.
    """
    try:
        found = json.loads(Path(path).read_bytes()) if os.path.lexists(path) else {}
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give its owner's rights, or another."
        ) from None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    raise UserError(
        f"{path} is damaged, it holds no JSON object: bring it back from a copy, or delete {path}."
    )


def truncate_after(path, step: int) -> None:
    """Drop the rows of later steps, for a run that goes on from the checkpoint of `step`; -1: all."""
    if os.path.exists(path):
        kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        write_atomically(path, "".join(kept).encode())


def flush(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself before anything that comes after."""
    if not path.is_dir():
        with open(path, "r+b" if os.name == "nt" else "rb") as file:
            os.fsync(file.fileno())
        return
    with contextlib.suppress(OSError):  # Windows opens no folder, and some volumes flush none
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def settle(folder: Path) -> None:
    """Have all of the kit's own files in a folder on the disk, as far as they are written."""
    for name in (marked(folder) or {"files": {}})["files"]:
        if (folder / name).is_file():
            flush(folder / name)
    flush(folder)


@contextlib.contextmanager
def writing(path):
    """Give a file to write; a kill or a power cut leaves the old content or the new. No link is followed."""
    path, no_link = Path(path), getattr(os, "O_NOFOLLOW", 0)
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "wb", opener=lambda name, flags: os.open(name, flags | no_link, 0o666)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    flush(path.parent)


def write_atomically(path, data: bytes) -> None:
    """Write a whole file, as `writing` does."""
    with writing(path) as file:
        file.write(data)


# ---- whose a file is
def marked(folder: Path) -> dict | None:
    """Read a marker: {"what": kind, "files": {path (a folder's ends in /): bytes or null}}, and of a sealed
    folder {"digests": {path: text}}; or None."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads((folder / MARKER).read_bytes())
        if isinstance(found.get("files"), dict) and isinstance(found.get("what"), str):
            return found
    return None


def check(folder: Path, what: str) -> dict:
    """Give the marker that `folder` has, or would get.

    Raises:
        UserError: it holds what the kit did not write, or another kind of thing, or is no folder.
    """
    found, why, way_out = marked(folder), "", "choose another folder"
    try:
        other = [] if found or not os.path.lexists(folder) else sorted(os.listdir(folder))
    except OSError as error:
        raise _unwritable(folder, error) from None
    if other:
        why = f"{', '.join(other[:3])}{' …' if len(other) > 3 else ''}, which this kit did not write"
        way_out = "choose a new or an empty folder"
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if {"fingerprint", "sources"} <= read_json(folder / "settings.json").keys():
                why = f"a run of an earlier version, or one that was copied without its hidden file {MARKER}"
                way_out = "copy the folder whole, or choose another one"
    elif found and found["what"] != what:
        why = f"a {found['what']}, not a {what}"
    if why:
        raise UserError(f"{str(folder)!r} holds {why}: nothing in it was touched; {way_out}.")
    return found or {"what": what, "files": {}}


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{str(folder)!r} cannot be written ({error.strerror}): choose another folder.")


def _foreign(path: Path, way_out: str) -> UserError:
    return UserError(f"{str(path)!r} was not written by this kit, and it would be: {way_out}.")


def take(folder, what: str, *names: str) -> Path:
    """Make a folder the kit's, and `names` in it (a folder's ends with a slash), before anything is written.

    Args:
        what: kind of the folder; one that was taken as another kind is refused.

    Returns:
        the folder, made, absolute, without links.

    Raises:
        UserError: somebody else's file is there, under one of `names` or without a marker; or no right to.
    """
    folder = Path(folder).expanduser()
    try:
        found = check(folder, what)
        for path in (folder / name for name in names):
            own = path.name + "/" * path.is_dir() in found["files"] or marked(path)
            if path.is_symlink() or path.exists() and not own:
                raise _foreign(path, "move it away, or choose another folder")
        if not folder.is_dir():
            folder.mkdir(parents=True)
            flush(folder.parent)
        files = dict.fromkeys(names) | found["files"]
        if files != found["files"] or not marked(folder):
            _mark(folder, found | {"files": files})
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder.resolve()


def _mark(folder: Path, content: dict) -> None:
    write_atomically(folder / MARKER, json.dumps(content, indent=1).encode())


def seal(folder: Path, what: str) -> None:
    """Flush a finished folder to the disk; list its files with their sizes and digests, by which a torn or a
    damaged one is known."""
    sizes, digests = {}, {}
    for item in sorted(folder.rglob("*")):
        if item.name != MARKER:
            flush(item)
        if item.is_file() and item.name != MARKER:
            name = item.relative_to(folder).as_posix()
            sizes[name], digests[name] = item.stat().st_size, _digest(item)
    _mark(folder, {"what": what, "files": sizes, "digests": digests})


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, xxh3_128).hexdigest()


def damaged(folder: Path) -> list[str]:
    """List the files of a sealed folder that are gone, cannot be read, or do not hold what they held."""
    found = []
    for name, digest in (marked(folder) or {}).get("digests", {}).items():
        try:
            whole = _digest(folder / name) == digest
        except OSError:
            whole = False
        found += [name] * (not whole)
    return found


def is_whole(folder: Path, what: str) -> bool:
    """Tell whether a folder that was sealed as `what` still has all that it had."""
    found = marked(folder)
    with contextlib.suppress(OSError):
        if found and found["what"] == what and found["files"]:
            return all((folder / name).stat().st_size == size for name, size in found["files"].items())
    return False


@contextlib.contextmanager
def replacing(target: Path, what: str):
    """Give an empty folder to fill; where the block ends well it becomes `target`, complete or not at all.

    Files of `target` that the kit did not write stay, beside the new ones.

    Raises:
        UserError: `target` is not the kit's, is no `what`, or has another's file where a new one belongs.
    """
    if target.is_symlink():
        raise UserError(f"{str(target)!r} is a link, and links are not followed: give the folder itself.")
    draft = target.with_name(f".{target.name}.partial")
    check(target, what)
    if os.path.lexists(draft):
        sealed = (marked(draft) or {}).get("what") == what  # and then killed
        check(draft, what if sealed else DRAFT)
        remove(draft)
    take(draft, DRAFT)
    try:
        yield draft
        put(draft, target, what)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)


def put(draft: Path, target: Path, what: str) -> None:
    """Seal a finished folder and put it in the place of an older `what`, beside what others put there."""
    before = check(target, what)
    seal(draft, what)
    new = marked(draft)
    for name in new["files"]:
        if name not in before["files"] and os.path.lexists(target / name):
            raise _foreign(target / name, "move it away first")
    remove(target)
    if not target.exists():
        draft.rename(target)
        flush(target.parent)
        return
    _mark(target, new)  # first, so that what a kill leaves of it is known
    for name in new["files"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / name, target / name)
        flush((target / name).parent)


def remove(path: Path) -> None:
    """Delete a file of the kit's, or what a folder's marker lists; all that others put there stays.

    What is listed neither in a marker of its own nor in that of the folder around it is left alone.
    """
    inside, around, name = marked(path), marked(path.parent) or {"what": "", "files": {}}, f"{path.name}/"
    if path.is_symlink() or not path.is_dir():
        if {path.name, name} & around["files"].keys() or around["what"] == DRAFT:
            path.unlink(missing_ok=True)
        return
    if inside and inside["what"] != DRAFT:
        _remove_listed(path, inside)
    elif inside or name in around["files"]:  # made as a whole by the kit, and torn before it was sealed
        shutil.rmtree(path, ignore_errors=True)
    if name in around["files"]:  # what appears there next is not the kit's, unless it is taken again
        _mark(path.parent, around | {"files": {k: v for k, v in around["files"].items() if k != name}})


def _remove_listed(folder: Path, found: dict) -> None:
    home = folder.resolve()
    files = [folder / name for name in found["files"]]
    files = [f for f in files if f.parent.resolve().is_relative_to(home)]  # a marker may have been changed
    for file in files:
        if file.is_symlink() or not file.is_dir():
            file.unlink(missing_ok=True)
    within = {p for file in files for p in file.parents if p != folder and p.is_relative_to(folder)}
    for place in sorted(within, reverse=True):
        with contextlib.suppress(OSError):  # it still holds something
            place.rmdir()
    if [entry.name for entry in folder.iterdir()] != [MARKER]:
        _mark(folder, {"what": found["what"], "files": {}})
        return
    (folder / MARKER).unlink()
    with contextlib.suppress(OSError):  # a place that something is mounted on
        folder.rmdir()


# ---- Google Drive: the run stays on the local disk, since Drive can drop; what is complete is copied
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
        print(f"{why}: everything stays on local disk.")
        return None


def mirror(source: Path, target: Path) -> bool:
    """Copy a run's files, complete checkpoints and model; with the two swapped it brings a run back.

    Returns:
        False, with a line that says why, if the disk failed; what had been there is still there.
    """
    try:
        for name in sorted((marked(source) or {"files": {}})["files"]):
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
        print(f"Could not copy to {target} ({reason}); the run goes on, its files are in {source}.")
        return False
    return True


def copy_complete(source: Path, target: Path) -> None:
    """Copy a file or folder so that `target` is there whole or not at all."""
    if not source.is_dir():
        with open(source, "rb") as old, writing(target) as new:
            shutil.copyfileobj(old, new)
        return
    with replacing(target, (marked(source) or {"what": "copy"})["what"]) as draft:

        def marker(at, names):  # which the copy gets anew
            return {MARKER} if at == str(source) else ()

        shutil.copytree(source, draft, dirs_exist_ok=True, ignore=marker)
