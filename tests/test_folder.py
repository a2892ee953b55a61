"""marker.py: nothing that the kit did not write is ever written over or deleted, whichever door it is reached
by."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lazyorpo_lib
from lazyorpo_lib import drive as drive_module
from lazyorpo_lib import folder as folder_module
from lazyorpo_lib import marker as marker_module
from lazyorpo_lib import model
from lazyorpo_lib.__main__ import main
from lazyorpo_lib.demo.model import TINY_MODEL
from lazyorpo_lib.drive import drive_folder, mirror
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import folder_of
from lazyorpo_lib.marker import MARKER, damaged, is_whole, marked, remove, replacing, seal, take
from lazyorpo_lib.orpo import checkpoints
from lazyorpo_lib.results import share
from lazyorpo_lib.run import Run
from lazyorpo_lib.settings import coerce, resolve
from lazyorpo_lib.trials import recipes
from lazyorpo_lib.trials.probe import probe
from tests.results.test_card import write_run


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"theirs: {name}")
    return folder


def state(folder: Path) -> dict:
    """Everything below a folder: what each file holds, where each link leads, and the folders."""
    return {
        p.relative_to(folder).as_posix(): str(p.readlink())
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(folder.rglob("*"))
    }


def settings(folder, **more):
    return resolve([("test", {"preset": "tiny", "output_dir": str(folder)} | more)])[0]


PROJECTS = {
    "a thesis": ["thesis.tex", "data/table.csv"],
    "another trainer's run": [
        "README.md",
        "settings.json",
        "model/model.safetensors",
        "checkpoint-500/optimizer.pt",
    ],
    "one hidden file": [".env"],
    "an empty folder in it": ["notes/.keep"],
    "a run of another tool": ["history.jsonl", "summary.json", ".lock"],
    "a marker of no meaning": [MARKER, "thesis.tex"],
}


@pytest.fixture(params=PROJECTS)
def project(request, tmp_path):
    return write(tmp_path / "theirs", *PROJECTS[request.param])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run whose model is a copy of the base; never changed by a test."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "a", settings={"base_model": TINY_MODEL})
    tokenizer = model.load_tokenizer(TINY_MODEL)
    base = model.load_base(TINY_MODEL, dtype=model.torch.float32, device="cpu")
    model.save_model(base, tokenizer, folder / "model", base_model=TINY_MODEL)
    return folder


DOORS = {
    "run": lambda folder, run: Run(settings(folder), {}, show=str).open(),
    "run through a link": lambda folder, run: Run(settings(link(folder)), {}, show=str).open(),
    "merge": lambda folder, run: share.merge(run, folder),
    "merge through a link": lambda folder, run: share.merge(run, link(folder)),
    "probe": lambda folder, run: probe(settings(folder), show=str),
    "comparison": lambda folder, run: recipes.compare_recipes(settings(folder), seeds=1, show=str),
    "save": lambda folder, run: model.save_model(None, None, folder, base_model="x"),
}


def link(folder):
    (place := folder.parent / "link").symlink_to(folder)
    return place


@pytest.mark.parametrize("door", DOORS)
def test_a_folder_of_somebody_elses_is_refused_before_anything_is_touched(door, project, finished):
    before = state(project)
    with pytest.raises(
        UserError, match="did not write: nothing in it was touched; choose a new or an empty folder"
    ):
        DOORS[door](project, finished)
    assert state(project) == before


def test_the_drives_folder_of_somebody_elses_is_left_alone_and_the_run_goes_on(project, finished, capsys):
    before = state(project)
    assert not mirror(finished, project)
    assert state(project) == before and "the run goes on" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["merged", "model", "."])
def test_a_merge_replaces_an_older_merged_model_and_nothing_else(where, finished, tmp_path):
    share.merge(finished, tmp_path / "merged")
    folder = {"merged": tmp_path / "merged", "model": finished / "model", ".": finished}[where]
    if where == "merged":
        write(folder, "notes.txt")
        share.merge(finished, folder)
        assert (folder / "notes.txt").read_text() == "theirs: notes.txt" and is_whole(folder, "merged model")
    else:
        before = state(folder)
        with pytest.raises(
            UserError, match=f"holds a {'run' if where == '.' else 'model'}, not a merged model"
        ):
            share.merge(finished, folder)
        assert state(folder) == before


def test_a_merged_model_is_never_written_over_the_base_that_it_comes_from(tmp_path, finished):
    base = share.merge(finished, tmp_path / "base")
    run = write_run(tmp_path / "second", settings={"base_model": str(base)})
    write(run, "model/x")
    (run / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = state(base)
    with pytest.raises(UserError, match="from which it is made: give another folder"):
        share.merge(run, base)
    assert state(base) == before


def test_a_base_model_in_the_runs_own_folder_is_refused(finished):
    before = state(finished)
    with pytest.raises(UserError, match="lies in the run's own folder"):
        Run(settings(finished, base_model=str(finished / "model")), {}, show=str).open()
    assert state(finished) == before


@pytest.mark.parametrize("name", ["checkpoint-500", "model", "tensorboard", "README.md", ".saving"])
def test_what_others_put_into_a_runs_folder_under_a_name_of_ours_stops_a_new_run_before_it_begins(
    name, tmp_path
):
    take(tmp_path, "run")
    write(tmp_path, f"{name}/weights" if "." not in name[1:] else name)
    before = state(tmp_path)
    with pytest.raises(UserError, match="was not written by this kit"):
        Run(settings(tmp_path), {}, show=str).open()
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", [".lock", "settings.json", "model", "STOP", "live.png"])
def test_a_planted_link_is_refused_and_what_it_leads_to_stays(name, tmp_path):
    write(tmp_path, "precious")
    run = take(tmp_path / "run", "run", name)
    (run / name).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="was not written by this kit"):
        Run(settings(run), {}, show=str).open()
    assert (tmp_path / "precious").read_text() == "theirs: precious" and (run / name).is_symlink()


def test_a_draft_planted_as_a_link_is_not_written_through(tmp_path):
    write(tmp_path, "precious")
    take(tmp_path / "run", "run")
    (tmp_path / "run" / f"{MARKER}.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"):
        take(tmp_path / "run", "run", "summary.json")
    assert (tmp_path / "precious").read_text() == "theirs: precious"


def test_a_kill_in_the_very_first_write_bars_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{MARKER}.tmp").write_text("{")
    take(tmp_path / "run", "run")
    assert marked(tmp_path / "run")["what"] == "run"


def test_a_place_where_a_volume_is_mounted_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
    with pytest.raises(UserError, match="is where a volume is mounted: give a folder in it"):
        with replacing(tmp_path / "out", "merged model"):
            raise AssertionError
    assert not list(tmp_path.iterdir())


def test_a_file_without_its_digest_is_taken_as_damaged(tmp_path):
    with replacing(tmp_path / "model", "model") as draft:
        write(draft, "weights")
    assert not damaged(tmp_path / "model")
    found = json.loads((tmp_path / "model" / MARKER).read_text())
    (tmp_path / "model" / MARKER).write_text(json.dumps({k: found[k] for k in ("what", "files")}))
    assert damaged(tmp_path / "model") == ["weights"]


@pytest.mark.parametrize("name", ["output_dir", "base_model", "dataset"])
def test_an_unset_variable_is_a_sentence(name, tmp_path, monkeypatch, capsys):
    write(tmp_path, "README.md")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{name} is empty"):
        main(["--preset", "tiny", f"--{name.replace('_', '-')}", ""])
    with pytest.raises(UserError, match=f"{name} is empty"):
        coerce(name, " ")
    assert state(tmp_path) == {"README.md": b"theirs: README.md"}


@pytest.mark.parametrize("place", [".", "..", "~"])
def test_a_home_or_a_clone_given_as_output_dir_is_refused(place, tmp_path, monkeypatch):
    write(tmp_path, "README.md", "in/file")
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="did not write"):
        Run(settings(place), {}, show=str).open()


# Deleting.


def sealed(folder, what="checkpoint"):
    write(folder, "weights", "deep/state")
    seal(folder, what)
    return folder


def test_removing_takes_what_is_listed_and_leaves_what_others_added(tmp_path):
    folder = write(sealed(tmp_path / "c"), "notes.txt", "deep/more.txt")
    remove(folder)
    assert set(state(folder)) == {MARKER, "notes.txt", "deep", "deep/more.txt"}
    remove(sealed(tmp_path / "d"))
    assert not (tmp_path / "d").exists()


def test_removing_does_nothing_to_what_no_marker_lists(tmp_path):
    write(tmp_path, "checkpoint-1/weights", "file")
    before = state(tmp_path)
    remove(tmp_path / "checkpoint-1"), remove(tmp_path / "file"), remove(tmp_path / "missing")
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["../precious", "/precious", "link/precious", "..", "."])
def test_a_marker_that_names_files_outside_its_folder_deletes_none(name, tmp_path):
    write(tmp_path, "precious", "elsewhere/precious")
    folder = sealed(tmp_path / "c")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    name = name.replace("/precious", f"{tmp_path}/precious") if name[0] == "/" else name
    (folder / MARKER).write_text(json.dumps({"what": "checkpoint", "files": {name: 1, "weights": 2}}))
    remove(folder)
    assert (
        (tmp_path / "precious").exists()
        and (tmp_path / "elsewhere" / "precious").exists()
        and (tmp_path / "c").exists()
    )


def test_a_link_that_was_listed_goes_alone(tmp_path):
    write(tmp_path, "precious/file")
    take(tmp_path / "run", "run", "model/")
    (tmp_path / "run" / "model").symlink_to(tmp_path / "precious")
    remove(tmp_path / "run" / "model")
    assert not (tmp_path / "run" / "model").is_symlink() and (tmp_path / "precious" / "file").exists()


# Replacing.


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "m"
    with replacing(target, "model") as draft:
        write(draft, "a", "b")
    old = state(target)
    with pytest.raises(KeyError), replacing(target, "model") as draft:
        write(draft, "c")
        raise KeyError
    assert state(target) == old and [p.name for p in tmp_path.iterdir()] == ["m"]
    with replacing(target, "model") as draft:
        write(draft, "c")
    assert set(state(target)) == {"c", MARKER}


def test_what_a_kill_left_of_a_draft_is_replaced_and_a_strangers_draft_is_not(tmp_path):
    take(tmp_path / ".m.partial", "draft")
    write(tmp_path, ".m.partial/half")
    with replacing(tmp_path / "m", "model") as draft:
        write(draft, "whole")
    assert set(state(tmp_path)) == {"m", "m/whole", f"m/{MARKER}"}
    write(tmp_path, ".n.partial/half")
    with pytest.raises(UserError, match="did not write"), replacing(tmp_path / "n", "model"):
        pass
    assert (tmp_path / ".n.partial" / "half").exists()


def test_a_file_that_others_added_is_never_written_over_by_a_new_one(tmp_path):
    with replacing(tmp_path / "m", "model") as draft:
        write(draft, "a")
    write(tmp_path, "m/b")
    before = state(tmp_path)
    with (
        pytest.raises(UserError, match="was not written by this kit"),
        replacing(tmp_path / "m", "model") as draft,
    ):
        (draft / "b").write_text("ours")
    assert state(tmp_path) == before


def test_a_comparisons_picture_takes_a_name_that_is_free(tmp_path, monkeypatch, capsys):
    runs = [str(write_run(tmp_path / name)) for name in "ab"]
    write(tmp_path, "here/compare.png", "here/compare-2.png")
    monkeypatch.chdir(tmp_path / "here")
    assert main(["compare", *runs]) == 0 and "compare-3.png" in capsys.readouterr().out
    assert (tmp_path / "here" / "compare.png").read_text() == "theirs: here/compare.png"


def test_only_one_module_deletes():
    deleting = re.compile(r"rmtree|unlink|rmdir|os\.remove\b|removedirs|send2trash|shutil\.move")
    for file in Path(lazyorpo_lib.__file__).parent.rglob("*.py"):
        found = deleting.findall(file.read_text())
        assert not found or file.name == "marker.py", (file.name, found)


def test_a_new_run_takes_an_empty_folder_and_its_own_again(tmp_path):
    for again in (False, True):
        run = Run(settings(tmp_path / "run"), {}, show=str)
        assert run.folder == folder_of(settings(tmp_path / "run")) and run.folder.exists() == again
        run.open()
        assert marked(run.folder)["what"] == "run"


# Names that were the kit's once.


def test_a_checkpoint_that_another_trainer_wrote_under_an_old_name_of_ours_stays(tmp_path):
    run = take(tmp_path / "run", "run", "checkpoint-50/")
    sealed(run / "checkpoint-50")
    checkpoints.remove(run)
    write(run, "checkpoint-50/theirs")
    checkpoints.remove(run)
    assert (run / "checkpoint-50" / "theirs").exists()
    with pytest.raises(UserError, match="was not written by this kit"):
        Run(settings(run), {}, show=str).open()


def test_a_torn_checkpoint_of_ours_goes_and_a_users_folder_under_the_name_of_a_file_of_ours_stays(tmp_path):
    run = take(tmp_path / "run", "run", "checkpoint-50/", "STOP")
    write(run, "checkpoint-50/torn", "STOP/theirs")
    checkpoints.remove(run), remove(run / "STOP")
    assert not (run / "checkpoint-50").exists() and (run / "STOP" / "theirs").exists()


def test_an_emptied_checkpoint_is_not_complete(tmp_path):
    write(sealed(tmp_path / "checkpoint-1"), "notes.txt")
    remove(tmp_path / "checkpoint-1")
    assert not is_whole(tmp_path / "checkpoint-1", "checkpoint")


@pytest.mark.parametrize("moment", ["rename", "replace"])
def test_a_kill_while_a_folder_is_replaced_does_not_stop_the_next_time(moment, tmp_path, monkeypatch):
    def killed(*args):
        raise SystemExit

    for notes in ((), ("m/notes",)):
        with replacing(tmp_path / "m", "model") as draft:
            write(draft, "a", "b")
        write(tmp_path, *notes)
    with monkeypatch.context() as patch:
        patch.setattr(marker_module.shutil, "rmtree", lambda *args, **options: None)
        place = {
            "rename": (marker_module, "remove", killed),
            "replace": (marker_module.os, "replace", once(os.replace)),
        }
        patch.setattr(*place[moment])
        with pytest.raises(SystemExit), replacing(tmp_path / "m", "model") as draft:
            write(draft, "a", "b")
    with replacing(tmp_path / "m", "model") as draft:
        write(draft, "b", "c")
    assert is_whole(tmp_path / "m", "model") and set(state(tmp_path)) == {
        "m",
        "m/b",
        "m/c",
        "m/notes",
        f"m/{MARKER}",
    }


def once(call):
    """Like `call` for markers and the first other file, then a kill."""
    seen = []

    def wrapped(old, new):
        seen.append(Path(new).name)
        if len([name for name in seen if name != MARKER]) > 1:
            raise SystemExit
        return call(old, new)

    return wrapped


def test_a_run_without_its_marker_is_told_from_a_strangers_folder(tmp_path):
    (tmp_path / "settings.json").write_text(
        json.dumps({"version": "0.1.0", "fingerprint": "x", "sources": {}, "settings": {}})
    )
    with pytest.raises(
        UserError, match="a run of an earlier version, or one that was copied without its hidden file"
    ):
        Run(settings(tmp_path), {}, show=str).open()


# One run at a time.


def test_a_folder_is_one_processes_until_that_ends_however_it_ends(tmp_path):
    code = "import sys, pathlib; from lazyorpo_lib.folder import claim; "
    code += "claim(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    root = Path(lazyorpo_lib.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline()
        with pytest.raises(UserError, match="Another run is at work in .*: wait for it to end, or choose"):
            folder_module.claim(tmp_path)
        other.kill()
    for _ in range(2):  # a second run of this process is this process's matter
        folder_module.claim(tmp_path)
    folder_module._held.pop(tmp_path).release()


# Google Drive.


def test_a_drive_that_cannot_be_mounted_is_a_warning(monkeypatch, capsys):
    def mount(path):
        raise ValueError("mount failed\nwith much detail")

    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mount)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert drive_folder("run") is None
    assert "(ValueError: mount failed): everything stays on local disk" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path):
    own = ("checkpoint-5", "checkpoint-10", "checkpoint-100", "model")
    folder = take(
        tmp_path / "run", "run", *(f"{name}/" for name in own), "history.jsonl", ".lock", "live.png.tmp"
    )
    for name in (*own, "their notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text(name)
        if name in own:
            seal(folder / name, name.split("-")[0])
    for name in ("history.jsonl", ".lock", "live.png.tmp"):
        (folder / name).write_text(name)
    return folder


def names(folder):
    return sorted(item.name for item in folder.iterdir() if item.name != MARKER)


def test_mirror_copies_what_is_complete_and_removes_the_checkpoints_that_the_run_no_longer_has(run, tmp_path):
    drive = tmp_path / "drive"
    assert mirror(run, drive)
    assert names(drive) == ["checkpoint-10", "checkpoint-100", "checkpoint-5", "history.jsonl", "model"]
    assert (drive / "checkpoint-100" / "weights").read_text() == "checkpoint-100"
    remove(run / "checkpoint-5")
    write(drive, "checkpoint-7/theirs")
    assert mirror(run, drive)
    assert names(drive) == ["checkpoint-10", "checkpoint-100", "checkpoint-7", "history.jsonl", "model"]


def test_mirror_the_other_way_brings_a_run_back(run, tmp_path):
    mirror(run, tmp_path / "drive")
    mirror(tmp_path / "drive", tmp_path / "new")
    assert names(tmp_path / "new") == names(tmp_path / "drive")


def test_a_torn_checkpoint_on_the_drive_stays_torn(run, tmp_path):
    mirror(run, tmp_path / "drive")
    (tmp_path / "drive" / "checkpoint-100" / "weights").write_text("cut")
    mirror(tmp_path / "drive", tmp_path / "new")
    assert [c.name for c in checkpoints.complete(tmp_path / "new")] == ["checkpoint-5", "checkpoint-10"]


def test_a_link_where_a_copy_is_drafted_is_not_followed(run, tmp_path):
    (tmp_path / "precious").write_text("theirs")
    take(tmp_path / "drive", "run")
    (tmp_path / "drive" / "history.jsonl.tmp").symlink_to(tmp_path / "precious")
    assert not mirror(run, tmp_path / "drive")
    assert (tmp_path / "precious").read_text() == "theirs"


def test_mirror_takes_in_what_changed(run, tmp_path):
    mirror(run, tmp_path / "drive")
    (run / "history.jsonl").write_text("more")
    (run / "model" / "weights").write_text("better")
    mirror(run, tmp_path / "drive")
    assert (tmp_path / "drive" / "history.jsonl").read_text() == "more"
    assert (tmp_path / "drive" / "model" / "weights").read_text() == "better"


def test_a_disk_that_fails_half_way_leaves_no_half_checkpoint(run, tmp_path, monkeypatch, capsys):
    def copytree(source, target, **options):
        target.mkdir(exist_ok=True)
        (target / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drive_module.shutil, "copytree", copytree)
    assert not mirror(run, tmp_path / "drive")
    assert "No space left on device" in capsys.readouterr().out
    assert not [
        c for c in names(tmp_path / "drive") if c.startswith("checkpoint-") and not c.endswith(".tmp")
    ]
    monkeypatch.undo()
    assert mirror(run, tmp_path / "drive")
    assert not [c for c in names(tmp_path / "drive") if c.endswith(".tmp")]
