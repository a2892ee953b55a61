"""What the kit wrote, and so may write over or delete. The only module that deletes.

Every folder that the kit writes holds a marker with the names of the kit's own files in it. A folder without one is written
into only while it is empty; a name in it that is not listed is somebody else's and stays; links are never followed.
It knows nothing of what the files hold.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from .results.history import read_json, write_atomically
from .settings import UserError

MARKER = ".lazyorpo.json"
DRAFT = "draft"  # what a folder is until it is complete: nobody else writes there, so it goes as a whole


def marked(folder: Path) -> dict | None:
    """Read a folder's marker, {"what": kind of folder, "files": {path in it: bytes or null}}; None where it has none that can be
    read. A folder's name ends with a slash."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / MARKER).read_bytes())
        if isinstance(found, dict) and isinstance(found.get("files"), dict) and isinstance(found.get("what"), str):
            return found
    return None


def check(folder: Path, what: str) -> dict:
    """Give the marker that `folder` has, or would get.

    Raises:
        UserError: it holds what the kit did not write, or another kind of thing that it wrote, or is no folder.
    """
    found = marked(folder)
    try:
        other = [] if found or not os.path.lexists(folder) else sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written ({error.strerror}): choose another folder.") from None
    if other and _is_run(folder):
        raise UserError(
            f"{str(folder)!r} holds a run of an earlier version, or one that was copied without its hidden file {MARKER}: nothing in it "
            "was touched; copy the folder whole, or choose another one."
        )
    if other:
        raise UserError(
            f"{str(folder)!r} holds {', '.join(other[:3])}{' …' if len(other) > 3 else ''}, which this kit did not write: "
            "nothing in it was touched; choose a new or an empty folder."
        )
    if found and found["what"] != what:
        raise UserError(f"{str(folder)!r} holds a {found['what']}, not a {what}: nothing in it was touched; choose another folder.")
    return found or {"what": what, "files": {}}


def _is_run(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return {"fingerprint", "sources"} <= read_json(folder / "settings.json").keys()
    return False


def _name(path: Path) -> str:
    return path.name + "/" * path.is_dir()


def take(folder, what: str, *names: str) -> Path:
    """Make a folder the kit's, and `names` in it, where nobody else's files are in the way; known before anything is written.

    Args:
        what: kind of the folder; one that was taken as another kind is refused.
        names: of files; those of folders end with a slash.

    Returns:
        the folder, made, absolute, without links.

    Raises:
        UserError: it holds what the kit did not write, under one of `names` or without a marker, or cannot be written.
    """
    folder = Path(folder).expanduser()
    try:
        found = check(folder, what)
        for path in (folder / name for name in names):
            if path.is_symlink() or (path.exists() and _name(path) not in found["files"] and not marked(path)):
                raise UserError(f"{str(path)!r} was not written by this kit, and it would be: move it away, or choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        _mark(folder, found | {"files": dict.fromkeys(names) | found["files"]})
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written ({error.strerror}): choose another folder.") from None
    return folder.resolve()


def _mark(folder: Path, content: dict) -> None:
    write_atomically(folder / MARKER, json.dumps(content, indent=1).encode())


def seal(folder: Path, what: str) -> None:
    """Flush a finished folder to the disk, and list its files with their sizes, by which a torn one is known."""
    sizes = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MARKER):
        with open(file, "r+b") as opened:
            os.fsync(opened.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    _mark(folder, {"what": what, "files": sizes})


def is_whole(folder: Path, what: str) -> bool:
    """Tell whether a folder that was sealed as `what` still has all that it had."""
    found = marked(folder) or {"what": "", "files": {}}
    try:
        sizes = [(folder / name).stat().st_size == size for name, size in found["files"].items()]
    except OSError:
        return False
    return found["what"] == what and bool(sizes) and all(sizes)


@contextlib.contextmanager
def replacing(target: Path, what: str):
    """Give an empty folder to fill; where the block ends well it becomes `target`, complete or not at all.

    Files of `target` that the kit did not write stay, beside the new ones.

    Raises:
        UserError: `target` is not the kit's, is no `what`, or has another's file where one of the new ones belongs.
    """
    if target.is_symlink():
        raise UserError(f"{str(target)!r} is a link, and links are not followed: give the folder itself.")
    draft = target.with_name(f".{target.name}.partial")
    check(target, what)
    if (marked(draft) or {}).get("what") == what:  # sealed, and then killed
        remove(draft)
    elif os.path.lexists(draft):
        check(draft, DRAFT)
        remove(draft)
    take(draft, DRAFT)
    try:
        yield draft
        put(draft, target, what)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)


def put(draft: Path, target: Path, what: str) -> None:
    """Seal a finished folder and put it in the place of an older `what`, beside what others have put there."""
    before = check(target, what)
    seal(draft, what)
    new = marked(draft)
    if others := [name for name in new["files"] if os.path.lexists(target / name) and name not in before["files"]]:
        raise UserError(f"{str(target / others[0])!r} was not written by this kit, and it would be: move it away first.")
    remove(target)
    if not target.exists():
        draft.rename(target)
        return
    _mark(target, new)  # first, so that what a kill leaves of it is known
    for name in new["files"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / name, target / name)


def remove(path: Path) -> None:
    """Delete a file or folder of the kit's; of a folder the files that its marker lists, so that what others put there stays.

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
    files = [f for f in files if f.parent.resolve().is_relative_to(home)]  # a marker is a file: it may name others
    for file in files:
        if file.is_symlink() or not file.is_dir():
            file.unlink(missing_ok=True)
    for within in sorted({p for f in files for p in f.parents if p != folder and p.is_relative_to(folder)}, reverse=True):
        with contextlib.suppress(OSError):  # it still holds something
            within.rmdir()
    _mark(folder, found | {"files": {}})
    if [entry.name for entry in folder.iterdir()] == [MARKER]:
        (folder / MARKER).unlink()
        with contextlib.suppress(OSError):  # a place that something is mounted on
            folder.rmdir()
