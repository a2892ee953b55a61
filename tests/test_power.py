"""A power cut at any moment: what was said to be saved is there, and what is left can be gone on from."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyorpo_lib import marker
from lazyorpo_lib.folder import read_json, read_rows
from lazyorpo_lib.marker import damaged, is_whole
from lazyorpo_lib.orpo import checkpoints
from lazyorpo_lib.run import execute
from tests import powercut
from tests.test_run import tiny, weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="handles are looked up in /proc")
STEPS = 4


def quiet(folder):
    return dict(given=tiny(folder, max_steps=STEPS, save_every_steps=1, answers=1), show=lambda text: None)


def run_in(folder):
    options = quiet(folder)
    return execute(*options["given"], show=options["show"])


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """What cuts just before each flush of a run would leave, and cuts after its end."""
    home, chance, left = tmp_path_factory.mktemp("power"), random.Random(0), []
    (home / "disk").mkdir()
    recorder, flush = powercut.Recorder(home / "disk", home / "shadow"), os.fsync

    def keep(calls):
        mode = powercut.MODES[calls % len(powercut.MODES)]
        powercut.cut(home / "disk", home / "shadow", home / f"left-{calls}", mode, chance)
        saved = [int(c.name.split("-")[1]) for c in checkpoints.complete(home / "disk" / "run")]
        left.append((home / f"left-{calls}" / "run", max(saved, default=0)))

    recorder.at_call = keep
    try:
        recorder.install()
        done = run_in(home / "disk" / "run")
    finally:
        os.fsync = flush
    for mode in powercut.MODES:
        powercut.cut(home / "disk", home / "shadow", home / f"end-{mode}", mode, chance)
    return home, left, done


def test_after_everything_is_in_its_folder_a_cut_takes_nothing(moments):
    home, _, done = moments
    for mode in powercut.MODES:
        folder = home / f"end-{mode}" / "run"
        assert not damaged(folder / "model") and is_whole(folder / "model", "model")
        for name in (
            "settings.json",
            "data_report.json",
            "held_out.json",
            "summary.json",
            "history.jsonl",
            "README.md",
        ):
            assert (folder / name).read_bytes() == (done.folder / name).read_bytes(), (mode, name)
        assert (folder / "live.png").stat().st_size and not checkpoints.numbered(folder)


def test_at_every_moment_what_is_there_is_whole_and_a_checkpoint_is_never_more_than_one_behind(moments):
    _, left, done = moments
    assert len(left) >= 50, "each flush is a moment"
    for folder, saved in left:
        if not folder.is_dir():
            continue
        found = checkpoints.complete(folder)
        assert not any(damaged(checkpoint) for checkpoint in found)
        summary = read_json(folder / "summary.json")
        for name in ("settings.json", "data_report.json", "held_out.json"):
            read_json(folder / name)
        newest = checkpoints.step_of(found[-1]) if found else 0
        if summary.get("finished"):
            assert not damaged(folder / "model") and is_whole(folder / "model", "model")
        else:
            assert newest >= saved - 1, (folder, newest, saved)
        logged = [row["step"] for row in read_rows(folder / "history.jsonl") if "loss" in row]
        assert logged[:newest] == list(range(1, newest + 1))


def test_without_flushing_the_same_cuts_lose_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(marker, "flush", lambda path: None)
    (tmp_path / "disk").mkdir()
    recorder, flush = powercut.Recorder(tmp_path / "disk", tmp_path / "shadow"), os.fsync
    try:
        recorder.install()
        run_in(tmp_path / "disk" / "run")
    finally:
        os.fsync = flush
    left = powercut.cut(tmp_path / "disk", tmp_path / "shadow", tmp_path / "left", "names", random.Random(0))
    assert damaged(left / "run" / "model") or not (left / "run" / "model").is_dir()


@pytest.mark.slow
def test_what_a_cut_leaves_is_gone_on_from_to_the_same_weights(moments):
    _, left, done = moments
    there = [folder for folder, _ in left if folder.is_dir()]
    for folder in random.Random(1).sample(there, 6):
        assert run_in(folder).finished
        for name, value in weights(done.folder).items():
            assert (value == weights(folder)[name]).all(), (folder, name)


KINDS = [kind for kind in ("ext4", "xfs", "btrfs") if shutil.which(f"mkfs.{kind}")] or ["ext4"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_file_system_that_is_switched_off_keeps_what_was_said_to_be_saved(kind, tmp_path):
    """With its default options; its image is copied as it is while the run goes on, and once at its end."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    size = {"xfs": 320, "btrfs": 256}.get(kind, 128) * 2**20
    with open(image, "wb") as file:
        file.truncate(size)
    for order in (
        [f"mkfs.{kind}", *(["-q"] if kind != "btrfs" else ["-q", "-f"]), str(image)],
        mount(image, place),
    ):
        if not shutil.which(order[0]) or subprocess.run(order, capture_output=True).returncode:
            pytest.skip(f"{' '.join(order[:3])}: not allowed here")
    copies = []
    try:
        flags = [
            "--preset",
            "tiny",
            "--max-steps",
            "12",
            "--save-every-steps",
            "1",
            "--output-dir",
            str(place / "run"),
        ]
        run = subprocess.Popen(
            [sys.executable, "-m", "lazyorpo_lib", *flags], stdout=subprocess.PIPE, text=True
        )
        while run.poll() is None and len(copies) < 49:
            time.sleep(0.3)
            saved = max([checkpoints.step_of(c) for c in checkpoints.complete(place / "run")], default=0)
            copies.append((switch_off(image, tmp_path / f"image-{len(copies)}"), saved))
        said = run.communicate()[0]
        copies.append((switch_off(image, tmp_path / "image-end"), None))
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert run.returncode == 0 and "Everything is in" in said
    for copy, saved in copies:
        subprocess.run(mount(copy, place), check=True)
        try:
            check(place / "run", saved)
        finally:
            subprocess.run(["umount", str(place)], check=True)


def mount(image, place) -> list[str]:
    return ["mount", "-o", "loop", str(image), str(place)]


def switch_off(image: Path, copy: Path) -> Path:
    """Copy what has reached the disk."""
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
    return copy


def check(folder: Path, saved: int | None) -> None:
    summary = read_json(folder / "summary.json")
    if saved is None:
        assert summary["finished"]
    if summary.get("finished"):
        assert not damaged(folder / "model") and is_whole(folder / "model", "model")
        assert json.loads((folder / "model" / "tokenizer.json").read_text())
        assert [r["step"] for r in read_rows(folder / "history.jsonl") if "loss" in r] == list(range(1, 13))
    elif saved:
        found = checkpoints.complete(folder)
        assert found and not damaged(found[-1]) and checkpoints.step_of(found[-1]) >= saved - 1
