"""Whose a file is: the marker of each folder that the kit writes; whole files alone, and all deleting.

A folder without a marker is written into only while it is empty; a name that is not listed in it is somebody
else's and stays; links are never followed. The only module that deletes.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from xxhash import xxh3_128

from .errors import UserError, expanded

MARKER = ".lazyorpo.json"
DRAFT = "draft"  # what a folder is until it is complete: nobody else writes there, so it goes as a whole


def unwritable(folder: Path, error: OSError) -> UserError:
    """Say that a folder cannot be written, and why."""
    return UserError(f"{str(folder)!r} cannot be written ({error.strerror}): choose another folder.")


def flush(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself before anything that comes after."""
    # Windows opens no folder, and some volumes flush none.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def writing(path):
    """Give a file to write; a kill or a power cut leaves the old content or the new. No link is followed."""
    path, no_link = Path(path), getattr(os, "O_NOFOLLOW", 0)
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "wb", opener=lambda name, flags: os.open(name, flags | no_link, 0o666)) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            file.close()  # Windows deletes nothing that is open
            draft.unlink()
            raise
    os.replace(draft, path)
    flush(path.parent)


def write_atomically(path, data: bytes) -> None:
    """Write a whole file, as `writing` does."""
    with writing(path) as file:
        file.write(data)


def marked(folder: Path) -> dict:
    """Read a marker: {"what": kind, "files": {path (a folder's ends in /): bytes or null}}, and of a sealed
    folder {"digests": {path: text}}; where there is none, what is "" and files is empty."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads((folder / MARKER).read_bytes())
        if isinstance(found.get("files"), dict) and isinstance(found.get("what"), str):
            return found
    return {"what": "", "files": {}}


def check(folder: Path, what: str) -> dict:
    """Give the marker that `folder` has, or would get."""
    found, why, way_out = marked(folder), "", "choose another folder"
    try:
        other = [] if found["what"] or not os.path.lexists(folder) else sorted(os.listdir(folder))
        other = [name for name in other if name != f"{MARKER}.tmp"]  # of a kill in the very first write
    except OSError as error:
        raise unwritable(folder, error) from None
    if other:
        why = f"{', '.join(other[:3])}{' …' if len(other) > 3 else ''}, which this kit did not write"
        way_out = "choose a new or an empty folder"
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if {"fingerprint", "sources"} <= json.loads((folder / "settings.json").read_bytes()).keys():
                why = f"a run of an earlier version, or one that was copied without its hidden file {MARKER}"
                way_out = "copy the folder whole, or choose another one"
    elif found["what"] not in ("", what):
        why = f"a {found['what']}, not a {what}"
    if why:
        raise UserError(f"{str(folder)!r} holds {why}: nothing in it was touched; {way_out}.")
    return found | {"what": what}


def _foreign(path: Path, way_out: str) -> UserError:
    return UserError(f"{str(path)!r} was not written by this kit, and it would be: {way_out}.")


def take(folder, what: str, *names: str) -> Path:
    """Make a folder of the kind `what` the kit's, and `names` in it (a folder's ends with a slash), before
    anything is written; give it made, absolute, without links.

    Raises:
        UserError: somebody else's file is there, under one of `names` or without a marker, or another kind of
            folder; or no right to.
    """
    folder = expanded(folder)
    try:
        found = check(folder, what)
        for path in map(folder.joinpath, names):
            own = path.name + "/" * path.is_dir() in found["files"] or marked(path)["what"]
            if path.is_symlink() or path.exists() and not own:
                raise _foreign(path, "move it away, or choose another folder")
        for place in [p for p in (*reversed(folder.parents), folder) if not p.is_dir()]:
            place.mkdir(exist_ok=True)
            flush(place.parent)
        files = dict.fromkeys(names) | found["files"]
        if files != found["files"] or not marked(folder)["what"]:
            _mark(folder, found | {"files": files})
    except OSError as error:
        raise unwritable(folder, error) from None
    return folder.resolve()


def _mark(folder: Path, content: dict) -> None:
    write_atomically(folder / MARKER, json.dumps(content, indent=1).encode())


def seal(folder: Path, what: str) -> None:
    """Flush a finished folder to the disk; list its files with their sizes and digests, by which a torn or a
    damaged one is known."""
    sizes, digests = {}, {}
    for item in sorted(item for item in folder.rglob("*") if item.name != MARKER):
        flush(item)
        if item.is_file():
            name = item.relative_to(folder).as_posix()
            sizes[name], digests[name] = item.stat().st_size, _digest(item)
    _mark(folder, {"what": what, "files": sizes, "digests": digests})


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, xxh3_128).hexdigest()


def damaged(folder: Path) -> list[str]:
    """List the files of a sealed folder that are gone, cannot be read, or do not hold what they held."""
    found, whole = marked(folder), set()
    for name in found["files"]:
        with contextlib.suppress(OSError):
            if _digest(folder / name) == found.get("digests", {}).get(name):
                whole.add(name)
    return [name for name in found["files"] if name not in whole]


def is_whole(folder: Path, what: str) -> bool:
    """Tell whether a folder that was sealed as `what` still has all that it had."""
    found = marked(folder)
    with contextlib.suppress(OSError):
        sizes = found["files"].items() if found["what"] == what else ()
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes)
    return False


@contextlib.contextmanager
def replacing(target: Path, what: str):
    """Give an empty folder to fill; where the block ends well it becomes `target`, complete or not at all,
    and files of `target` that the kit did not write stay beside the new ones.

    Raises:
        UserError: `target` is not the kit's, is no `what`, or has another's file where a new one belongs.
    """
    if target.is_symlink():
        raise UserError(f"{str(target)!r} is a link, and links are not followed: give the folder itself.")
    if os.path.ismount(target):
        raise UserError(f"{str(target)!r} is where a volume is mounted: give a folder in it.")
    draft = target.with_name(f".{target.name}.partial")
    check(target, what)
    if os.path.lexists(draft):
        check(draft, what if marked(draft)["what"] == what else DRAFT)  # sealed, and then killed
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
    home = marked(target.parent)
    remove(target)
    if home != marked(target.parent):  # it was listed there, and is again
        _mark(target.parent, home)
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
    """Delete a file of the kit's, or what a folder's marker lists; all that others put there stays, and what
    is listed neither in a marker of its own nor in that of the folder around it."""
    inside, around, name = marked(path), marked(path.parent), f"{path.name}/"
    if path.is_symlink() or not path.is_dir():
        if {path.name, name} & around["files"].keys() or around["what"] == DRAFT:
            path.unlink(missing_ok=True)
        return
    if inside["what"] not in ("", DRAFT):
        _remove_listed(path, inside)
    elif inside["what"] or name in around["files"]:  # made as a whole, and torn before it was sealed
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


def settle(folder: Path) -> None:
    """Have all of the kit's own files in a folder on the disk, as far as they are written."""
    for name in marked(folder)["files"]:
        if (folder / name).is_file():
            flush(folder / name)
    flush(folder)
