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

from .history import write_atomically
from .settings import UserError

MARKER = ".lazyorpo.json"
DRAFT = "draft"  # what a folder is until it is complete: nobody else writes there, so it goes as a whole


def marked(folder: Path) -> dict | None:
    """The marker of a folder, {"what": kind of folder, "files": {path in it: bytes or null}}; None where it has none that can be read."""
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
    if other:
        raise UserError(
            f"{str(folder)!r} holds {', '.join(other[:3])}{' …' if len(other) > 3 else ''}, which this kit did not write: "
            "nothing in it was touched; choose a new or an empty folder."
        )
    if found and found["what"] != what:
        raise UserError(f"{str(folder)!r} holds a {found['what']}, not a {what}: nothing in it was touched; choose another folder.")
    return found or {"what": what, "files": {}}


def take(folder, what: str, *names: str) -> Path:
    """Make a folder the kit's, and `names` in it, where nobody else's files are in the way; known before anything is written.

    Args:
        what: kind of the folder; one that was taken as another kind is refused.

    Returns:
        the folder, made, absolute, without links.

    Raises:
        UserError: it holds what the kit did not write, under one of `names` or without a marker, or cannot be written.
    """
    folder = Path(folder).expanduser()
    try:
        found = check(folder, what)
        for path in (folder / name for name in names):
            if path.is_symlink() or (path.exists() and path.name not in found["files"]):
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


def is_whole(folder: Path) -> bool:
    """Whether a sealed folder still has all that it had."""
    found = marked(folder)
    try:
        return bool(found) and all((folder / name).stat().st_size == size for name, size in found["files"].items())
    except OSError:
        return False


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
    before = check(target, what)
    if os.path.lexists(draft):
        check(draft, DRAFT)
        remove(draft)
    take(draft, DRAFT)
    try:
        yield draft
        seal(draft, what)
        new = marked(draft)["files"]
        if others := [name for name in new if os.path.lexists(target / name) and name not in before["files"]]:
            raise UserError(f"{str(target / others[0])!r} was not written by this kit, and it would be: move it away first.")
        remove(target)
        if not target.exists():
            draft.rename(target)
        else:
            for name in [*new, MARKER]:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(draft / name, target / name)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or folder of the kit's; of a folder the files that its marker lists, so that what others put there stays.

    What is listed neither in a marker of its own nor in that of the folder around it is left alone.
    """
    inside, around = marked(path), marked(path.parent) or {"what": "", "files": {}}
    listed = path.name in around["files"] or around["what"] == DRAFT
    if path.is_symlink() or not path.is_dir():
        if listed:
            path.unlink(missing_ok=True)
    elif inside is None or inside["what"] == DRAFT:
        if inside or listed:  # made as a whole by the kit, and torn before it was sealed
            shutil.rmtree(path, ignore_errors=True)
    else:
        _remove_listed(path, inside)


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
