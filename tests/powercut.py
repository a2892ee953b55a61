"""What a power cut may leave of a folder: a recording layer under `os.fsync`.

A disk owes nobody what was not flushed. `Recorder` notes, in the process that writes, what each flush of a
file or folder made sure of; `cut` builds from that and from the folder as it stands what a machine may find
after it was switched off at this moment:

    strict   nothing but what was flushed: names that a flushed folder had, contents that a flushed file had
    names    every name as it is now, but of a file only what was flushed: what a journal of names leaves
    mixed    each folder and each file either as it is now, or as flushed, or cut short in between
"""

import json
import os
import random
import stat
from pathlib import Path

MODES = ("strict", "names", "mixed")


class Recorder:
    """Note in `shadow` every flush below `home`, which is sure as it stands at the beginning."""

    def __init__(self, home: Path, shadow: Path):
        self.home, self.shadow, self._open, self._flush = Path(home), Path(shadow), {}, os.fsync
        self.shadow.mkdir()
        self.calls, self.at_call = 0, lambda calls: None
        for place in [self.home, *self.home.rglob("*")]:
            if not place.is_symlink() and (place.is_dir() or place.is_file()):
                handle = os.open(place, os.O_RDONLY)
                self._note(handle)
                os.close(handle)

    def install(self) -> "Recorder":
        """Take the place of `os.fsync` in this process; the disk itself is spared."""
        os.fsync = self.fsync
        return self

    def fsync(self, file) -> None:
        """Note what the folder or file behind a handle holds."""
        self.calls += 1
        self.at_call(self.calls)  # the moment before is the worst one
        handle = file if isinstance(file, int) else file.fileno()
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_relative_to(self.home):
            self._note(handle)

    def _note(self, handle: int) -> None:
        node = os.fstat(handle)
        if stat.S_ISDIR(node.st_mode):
            found = {}
            for entry in os.scandir(handle):
                inside = Path(os.readlink(f"/proc/self/fd/{handle}")) / entry.name
                found[entry.name] = entry.inode()
                self._hold(inside, entry.inode())
            self._write(f"folder-{node.st_ino}", json.dumps(found).encode())
        else:
            self._write(f"file-{node.st_ino}", Path(f"/proc/self/fd/{handle}").read_bytes())
        self._hold(Path(f"/proc/self/fd/{handle}").resolve(), node.st_ino)

    def _hold(self, path: Path, number: int) -> None:
        """Keep an inode from being given to another file."""
        if number not in self._open and (path.is_dir() or path.is_file()):
            self._open[number] = os.open(path, os.O_RDONLY)
        if path.is_file() and not (self.shadow / f"held-{number}").exists():
            os.link(path, self.shadow / f"held-{number}")

    def _write(self, name: str, data: bytes) -> None:
        (self.shadow / "draft").write_bytes(data)
        os.replace(self.shadow / "draft", self.shadow / name)


def cut(home: Path, shadow: Path, target: Path, mode: str, chance: random.Random) -> Path:
    """Build in `target` what a power cut leaves of `home`."""
    if mode == "strict":
        _build(home.stat().st_ino, None, Path(shadow), Path(target), mode, chance)
    else:
        _build(home.stat().st_ino, Path(home), Path(shadow), Path(target), mode, chance)
    return Path(target)


def _build(number: int, now: Path | None, shadow: Path, target: Path, mode: str, chance) -> None:
    """Build one folder, whose inode is `number` and which is now at `now`, or no longer anywhere."""
    target.mkdir(parents=True)
    listed = shadow / f"folder-{number}"
    names = json.loads(listed.read_bytes()) if listed.exists() else {}
    if now and (mode == "names" or chance.random() < 0.5):
        names = {entry.name: entry.inode() for entry in os.scandir(now)}
    for name, inode in names.items():
        path = now / name if now else None
        here = path if path and os.path.lexists(path) and path.lstat().st_ino == inode else None
        if (shadow / f"folder-{inode}").exists() or here and here.is_dir():
            _build(inode, here, shadow, target / name, mode, chance)
        else:
            (target / name).write_bytes(_content(inode, here, shadow, mode, chance))


def _content(inode: int, here: Path | None, shadow: Path, mode: str, chance) -> bytes:
    flushed = shadow / f"file-{inode}"
    sure = flushed.read_bytes() if flushed.exists() else b""
    held = here or shadow / f"held-{inode}"
    if mode != "mixed" or not held.exists():
        return sure
    now = held.read_bytes()
    return chance.choice([sure, now, now[: max(len(sure), len(now) // 2)]])
