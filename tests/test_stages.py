"""The cells of the notebook in any order, once or again, and after what happened between two presses: each
shows the right result or says in one sentence what comes first, or what has changed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lazyorpo_lib import folder as folders
from lazyorpo_lib import marker, model, run, stages
from lazyorpo_lib.demo.model import TINY_MODEL
from lazyorpo_lib.drive import mirror
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import read_json, read_rows
from lazyorpo_lib.notebook import show
from lazyorpo_lib.orpo import checkpoints
from lazyorpo_lib.plan import planner
from lazyorpo_lib.results import held_out
from lazyorpo_lib.results.summary import Spent
from lazyorpo_lib.run import Run, execute
from lazyorpo_lib.session import Stop, Stopped
from lazyorpo_lib.settings import resolve
from tests.test_run import tiny, weights

CELLS = {
    "open": lambda run: run.open(),
    "load_pairs": lambda run: run.load_pairs() and show.pair(run),
    "load_model": lambda run: run.load_model(),
    "train": lambda run: run.train(),
    "finish": lambda run: run.finish() and show.files(run),
}
SHOWS = (show.cards, show.pair, show.loss, show.answers, show.held_out)
SMALL = dict(max_steps=2, save_every_steps=1, answers=0, eval_pairs=4, max_pairs=16)


def quiet(folder, **changes):
    return Run(*tiny(folder, **SMALL | changes), show=lambda text: None)


@pytest.fixture(autouse=True)
def a_terminal_that_may_close():
    """Under nohup, as CI may run this, a closed terminal is no end."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return execute(*tiny(folder, **SMALL), show=lambda text: None)


@pytest.fixture(scope="module")
def one_plan():
    """A plan is the same each time and takes a second."""
    plans, make = {}, planner.make_plan

    def kept(config, settings, machine, *given, **options):
        key = (machine.name, options.get("begun"))
        plans[key] = plans.get(key) or make(config, settings, machine, *given, **options)
        return plans[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "make_plan", kept)
        yield


def is_as_straight(folder: Path, straight: Run) -> None:
    rows = [
        [row for row in read_rows(f / "history.jsonl") if "loss" in row] for f in (folder, straight.folder)
    ]
    assert [row["step"] for row in rows[0]] == [1, 2] and [r["loss"] for r in rows[0]] == [
        r["loss"] for r in rows[1]
    ]
    for name, value in weights(straight.folder).items():
        assert (value == weights(folder)[name]).all(), name
    before = (read_json(f / "held_out.json")["before"] for f in (folder, straight.folder))
    assert next(before) == next(before)


@pytest.mark.slow
def test_every_order_of_up_to_four_cells_is_right_or_one_sentence(straight, one_plan, tmp_path):
    """What a refused cell leaves is what was there, so that only orders of accepted ones are gone on with."""
    refused, walked = set(), 0
    for length in range(1, 5):
        for number, order in enumerate(itertools.product(CELLS, repeat=length)):
            if any(order[:k] in refused for k in range(1, length)):
                continue
            walked, run = walked + 1, quiet(tmp_path / f"{length}-{number}")
            for cell in order[:-1]:
                CELLS[cell](run)
            try:
                CELLS[order[-1]](run)
            except UserError as error:
                assert str(error).startswith("run.") and "comes first" in str(error), order
                refused.add(order)
            for shown in SHOWS:
                try:
                    assert str(shown(run))
                except UserError as error:
                    assert "comes first" in str(error)
            if (run.folder / "summary.json").exists():
                is_as_straight(run.folder, straight)
            shutil.rmtree(run.folder, ignore_errors=True)
    assert (
        walked > 50
        and ("finish",) in refused
        and ("load_pairs", "load_model", "train", "finish") not in refused
    )


@pytest.mark.parametrize("again", list(itertools.product(CELLS, repeat=2)) + [("train", "train", "finish")])
def test_after_a_finished_run_every_cell_shows_it_and_changes_nothing(again, straight):
    kept = {p.name: p.read_bytes() for p in straight.folder.iterdir() if p.is_file() and p.name != "live.png"}
    straight.open()
    straight.load_pairs()
    for cell in again:
        CELLS[cell](straight) if cell != "load_pairs" else straight.load_pairs()
    now = {p.name: p.read_bytes() for p in straight.folder.iterdir() if p.is_file() and p.name != "live.png"}
    assert now == kept


def rows_file(path: Path, word: str) -> Path:
    rows = [{"prompt": f"Say {k}.", "chosen": f"{word} {k}.", "rejected": f"No {k}."} for k in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_no_stage_has_made_yet_is_not_there(tmp_path):
    assert not hasattr(quiet(tmp_path), "model") and not hasattr(quiet(tmp_path), "no such thing")


def test_data_that_change_after_the_end_are_told_and_the_reports_stay(tmp_path):
    own, said = rows_file(tmp_path / "own.jsonl", "Yes"), []
    given = tiny(tmp_path / "run", **SMALL | {"dataset": str(own)})
    execute(*given, show=said.append)
    kept = {
        name: (tmp_path / "run" / name).read_bytes()
        for name in ("data_report.json", "dropped.jsonl", "README.md")
    }
    rows_file(own, "Sure")
    execute(*given, show=said.append)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in kept} == kept
    assert any("is not what it was" in line and "choose another output_dir" in line for line in said)


def test_a_finished_run_is_shown_also_where_its_dataset_is_gone(tmp_path):
    own, said = rows_file(tmp_path / "own.jsonl", "Yes"), []
    given = tiny(tmp_path / "run", **SMALL | {"dataset": str(own)})
    execute(*given, show=str)
    own.unlink()
    assert execute(*given, show=said.append).finished and any(
        "results follow all the same" in s for s in said
    )


def stopped(folder: Path, **changes) -> tuple:
    """The settings of a run that stopped after one step."""
    given = tiny(folder, **SMALL | {"max_steps": 3, "max_minutes": 1e-6} | changes)
    assert not execute(*given, show=lambda text: None).finished
    return tiny(folder, **SMALL | {"max_steps": 3} | changes)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """The folder of a run of three steps that stopped after the first; a test copies it and goes on."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    stopped(folder)
    return folder


def copied(folder: Path, to: Path) -> tuple:
    """The settings of such a run, in a folder of its own."""
    return tiny(shutil.copytree(folder, to), **SMALL | {"max_steps": 3})


def test_data_that_change_between_two_sittings_are_refused_before_a_file_changes(tmp_path):
    own = rows_file(tmp_path / "own.jsonl", "Yes")
    given = stopped(tmp_path / "run", dataset=str(own))
    report = (tmp_path / "run" / "data_report.json").read_bytes()
    rows_file(own, "Sure")
    with pytest.raises(UserError, match="dataset .* is not what it was .* bring the old dataset back"):
        execute(*given, show=str)
    assert (tmp_path / "run" / "data_report.json").read_bytes() == report
    rows_file(own, "Yes")
    assert execute(*given, show=str).finished


def test_a_base_model_that_changes_between_two_sittings_is_refused_and_the_old_one_goes_on(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model.locate(TINY_MODEL), base)
    given, file = stopped(tmp_path / "run", base_model=str(base)), base / "model.safetensors"
    old = file.read_bytes()
    file.write_bytes(old[:-100] + bytes(100))
    with pytest.raises(UserError, match="base model .* is not what it was .* bring the old base model back"):
        execute(*given, show=str)
    file.write_bytes(old)
    assert execute(*given, show=str).finished


def test_sittings_add_up(halfway, tmp_path):
    given = copied(halfway, tmp_path / "run")
    first = read_json(tmp_path / "run" / "summary.json")
    time.sleep(0.5)  # between sittings, which counts for nothing
    run = execute(*given, show=str)
    both, here = read_json(tmp_path / "run" / "summary.json"), run.spent
    earlier = here.earlier["all"]
    assert 0 < earlier <= first["minutes"] + 1e-3 and both["minutes"] == pytest.approx(
        here.totals()["all"], abs=0.1
    )
    assert both["minutes"] > earlier and both["training_minutes"] > here.seconds["training"] / 60
    assert both["tokens"] > first["tokens"] and both["peak_memory_gib"] >= round(here.earlier["peak_gib"], 3)


def test_a_sitting_that_trains_nothing_leaves_the_peak_of_training_as_it_was():
    earlier = {"all": 1.0, "training_gib": 9.0, "allocated_gib": None, "peak_gib": 9.5}
    totals = Spent(time.monotonic(), torch.device("cpu"), earlier).totals()
    assert (totals["training_gib"], totals.get("allocated_gib")) == (9.0, None) and totals["peak_gib"] >= 9.5


def test_the_model_is_in_a_checkpoint_before_it_is_examined(straight, tmp_path, monkeypatch):
    def fail(run, when, measure=held_out.measure):
        if when == "after":
            raise MemoryError
        measure(run, when)

    given = tiny(tmp_path / "run", **SMALL | {"save_every_steps": 0})
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(held_out, "measure", fail)
        execute(*given, show=str)
    (last,) = checkpoints.complete(tmp_path / "run")
    assert last.name == "checkpoint-2" and not (last / "optimizer.pt").exists()
    assert execute(*given, show=str).finished
    is_as_straight(tmp_path / "run", straight)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("place", ["before", "after", "saving"])
def test_a_signal_outside_of_the_steps_ends_at_once_and_loses_nothing(
    place, number, straight, tmp_path, monkeypatch
):
    given, run = tiny(tmp_path / "run", **SMALL), None
    where = {"saving": (model, "save_model")}.get(place, (held_out, "_answer"))
    inner, handler = getattr(*where), signal.getsignal(getattr(signal, number))

    def struck(*given, **options):
        if place != "after" or run.trainer.step:
            os.kill(os.getpid(), getattr(signal, number))
            time.sleep(5)
            raise AssertionError("it went on")
        return inner(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*where, struck)
        run = Run(*given, show=str)
        for cell in ("open", "load_pairs", "load_model", "train"):
            CELLS[cell](run)
        if place == "saving":
            with pytest.raises(Stopped, match=number):
                run.finish()
        else:
            summary = run.finish() if place == "before" else None
            assert run.interrupted and number in run.stopped and not (summary or {}).get("finished")
    assert signal.getsignal(getattr(signal, number)) is handler
    folders.release(run.folder)
    assert execute(*given, show=str).finished
    is_as_straight(tmp_path / "run", straight)


def test_nohup_goes_on_when_the_terminal_closes(tmp_path):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(tmp_path / "STOP").listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_loses_in_a_finalizer_ends_the_stage_all_the_same(tmp_path):
    class Any_(stages.Staged):
        MAKES = {"work": ()}
        folder, stop = tmp_path, Stop(tmp_path / "STOP")
        begin_stage = staticmethod(lambda: None)

        @stages.stage
        def work(self):
            class Lost:
                def __del__(self):
                    os.kill(os.getpid(), signal.SIGINT)

            Lost()

    with pytest.raises(Stopped):
        Any_().work()


def test_a_stop_file_made_while_pairs_are_cleaned_is_honoured_and_an_older_one_is_not(tmp_path):
    (tmp_path / "run").mkdir()
    first = quiet(tmp_path / "run")
    first.open()
    (first.folder / "STOP").touch()  # of an earlier day
    folders.release(first.folder)
    run = quiet(tmp_path / "run")
    run.open()
    assert not (run.folder / "STOP").exists()
    (run.folder / "STOP").touch()
    for cell in ("load_pairs", "load_model", "train"):
        CELLS[cell](run)
    assert run.interrupted and "STOP" in run.finish()["why"] and run.trainer.step <= 1


def bits(file: Path, where: int) -> None:
    data = bytearray(file.read_bytes())
    data[where] ^= 64
    file.write_bytes(data)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The folder of a run of three steps that stopped after the second; a test copies it and goes on."""
    run = quiet(tmp_path_factory.mktemp("two") / "run", max_steps=3)
    for cell in ("open", "load_pairs", "load_model"):
        CELLS[cell](run)
    run.trainer.on_step = lambda step: step == 2 and setattr(run.stop, "reason", "asked")
    run.train()
    run.finish()
    return run.folder


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "random_0.pt", "progress.json"])
def test_a_flipped_bit_in_a_checkpoint_is_told_and_the_one_before_taken(name, two_checkpoints, tmp_path):
    given, said = copied(two_checkpoints, tmp_path / "run"), []
    newest = tmp_path / "run" / "checkpoint-2"
    bits(newest / name, (newest / name).stat().st_size // 2)
    again = execute(*given, show=said.append)
    assert again.finished and any(name in line and "passed over" in line for line in said)
    assert any("Going on from step 1" in line for line in said)
    assert [r["step"] for r in read_rows(again.folder / "history.jsonl") if "loss" in r] == [1, 2, 3]


@pytest.mark.parametrize("name", ["settings.json", "summary.json", "held_out.json", "data_report.json"])
@pytest.mark.parametrize("content", [b"", b'{"settings": {', b"[1]", b"\xff\xfe", b"null"])
def test_a_damaged_file_of_a_run_is_one_sentence_that_names_it(name, content, straight, tmp_path):
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    (folder / name).write_bytes(content)
    try:
        done = execute(*tiny(folder, **SMALL), show=str)
        assert done.finished and not list(folder.glob("checkpoint-*"))
    except UserError as error:
        assert name in str(error) and "damaged" in str(error)


def test_only_a_lock_that_is_held_means_another_run(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        folders.claim(marker.take(tmp_path / "network", "run"))
    held = marker.take(tmp_path / "held", "run")
    code = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True)"
    )
    code, stdout = f"{code}; time.sleep(60)", subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", code, str(held / ".lock")], stdout=stdout)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match="Another run is at work"):
            folders.claim(held)
    finally:
        other.kill()
        other.wait()
    folders.claim(held)
    folders.release(held)


def test_a_finished_run_is_let_go_so_that_another_process_may_show_it(straight):
    command = [sys.executable, "-m", "lazyorpo_lib", "--preset", "tiny", "--output-dir", str(straight.folder)]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = subprocess.run(command + flags, capture_output=True, text=True)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr


def test_a_name_that_auto_makes_fits_every_file_system():
    long = resolve([("test", {"dataset": "x" * 246 + ".jsonl", "base_model": "ü" * 200})])[0]
    assert len(folders.folder_of(long).name.encode()) < 200


def test_a_hub_repo_that_is_set_after_the_end_is_pushed_to_once(straight, tmp_path, monkeypatch):
    folder, pushed = Path(shutil.copytree(straight.folder, tmp_path / "run")), []
    monkeypatch.setattr(run.share, "push", lambda folder, repo: pushed.append(repo) or "https://hub/me/it")
    for _ in range(2):
        execute(*tiny(folder, **SMALL | {"hub_repo": "me/it"}), show=str)
    assert pushed == ["me/it"] and read_json(folder / "summary.json")["pushed_to"] == "me/it"


def test_a_model_that_does_not_read_back_keeps_the_checkpoint(tmp_path, monkeypatch):
    given = tiny(tmp_path / "run", **SMALL)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="does not read back as it was written"),
    ):
        patch.setattr(marker, "damaged", lambda place: ["adapter_model.safetensors"])
        execute(*given, show=str)
    assert checkpoints.complete(tmp_path / "run") and not (tmp_path / "run" / "summary.json").exists()
    assert execute(*given, show=str).finished


def test_drive_gets_the_model_of_the_end_and_not_of_a_stop_before(halfway, tmp_path):
    given = copied(halfway, tmp_path / "run")
    drive_copy = tmp_path / "drive"
    drive_copy.mkdir()
    run = Run(*given, show=str)
    run.open()
    assert mirror(run.folder, drive_copy)
    run.drive = drive_copy
    for cell in ("load_pairs", "load_model", "train", "finish"):
        CELLS[cell](run)
    assert read_json(drive_copy / "summary.json")["finished"]
    for name, value in weights(run.folder).items():
        assert (value == weights(drive_copy)[name]).all(), name


def test_a_kernel_that_is_behind_shows_what_another_process_finished(halfway, tmp_path):
    given = copied(halfway, tmp_path / "run")
    behind = Run(*given, show=str)
    behind.settings = behind.given
    for cell in ("open", "load_pairs", "load_model"):
        CELLS[cell](behind)
    folders.release(behind.folder)  # as after its own stop
    assert execute(*given, show=str).finished
    kept = (tmp_path / "run" / "history.jsonl").read_bytes()
    behind.train()
    assert behind.finished and behind.finish()["finished"]
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == kept


def test_a_signal_in_the_last_save_waits_for_it(straight, tmp_path, monkeypatch):
    given, inner = tiny(tmp_path / "run", **SMALL | {"save_every_steps": 0}), checkpoints.save

    def struck(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        inner(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", struck)
        run = Run(*given, show=str)
        for cell in ("open", "load_pairs", "load_model", "train", "finish"):
            CELLS[cell](run)
    assert run.interrupted and [c.name for c in checkpoints.complete(run.folder)] == ["checkpoint-2"]
    folders.release(run.folder)
    assert execute(*given, show=str).finished
    is_as_straight(tmp_path / "run", straight)


def test_a_damaged_checkpoint_pushes_no_good_one_out(tmp_path):
    given = stopped(tmp_path / "run", max_steps=4, keep_checkpoints=1)
    good = checkpoints.complete(tmp_path / "run")[-1]
    newer = Path(shutil.copytree(good, good.with_name("checkpoint-3")))
    found = json.loads((tmp_path / "run" / marker.MARKER).read_bytes())
    found["files"]["checkpoint-3/"] = None
    (tmp_path / "run" / marker.MARKER).write_text(json.dumps(found))
    bits(newer / "weights.safetensors", -1)
    run = Run(*given, show=str)
    for cell in ("open", "load_pairs", "load_model"):
        CELLS[cell](run)
    run.trainer.on_step = lambda step: step == 2 and setattr(run.stop, "reason", "asked")
    run.train()
    assert [c.name for c in checkpoints.complete(run.folder)] == ["checkpoint-2"]


def test_two_interrupts_and_then_finish_write_no_half_trained_model(tmp_path):
    run = quiet(tmp_path / "run")
    for cell in ("open", "load_pairs", "load_model"):
        CELLS[cell](run)
    run.trainer.on_step = lambda step: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(UserError, match=r"run.train\(\) comes first"):
        run.finish()
    assert not (run.folder / "model").exists()


def test_a_stop_and_another_press_in_one_kernel_count_each_minute_once(tmp_path):
    began, run = time.monotonic(), Run(*tiny(tmp_path / "run", **SMALL | {"max_steps": 3}), show=str)
    for cell in ("open", "load_pairs", "load_model"):
        CELLS[cell](run)
    inner = run.trainer.on_step
    run.trainer.on_step = lambda step: (inner(step), step == 1 and setattr(run.stop, "reason", "asked"))
    run.train()
    run.finish()
    run.train()
    assert run.finish()["minutes"] * 60 <= time.monotonic() - began + 0.1


def test_a_finished_run_keeps_the_record_of_what_it_ran_with(straight, tmp_path):
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    kept = (folder / "settings.json").read_bytes()
    execute(*tiny(folder, **SMALL | {"answers": 3}), show=str)
    assert (folder / "settings.json").read_bytes() == kept


def test_an_evaluation_between_steps_is_broken_off_by_a_signal(tmp_path, monkeypatch):
    run = quiet(tmp_path / "run", eval_every_steps=1)
    for cell in ("open", "load_pairs", "load_model"):
        CELLS[cell](run)

    def struck():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    run.trainer.evaluate = struck
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "measure", lambda run, when: None)
        run.train()
    assert run.interrupted and run.trainer.step == 1 and checkpoints.complete(run.folder)


def test_a_damaged_model_is_refused_wherever_it_is_loaded(straight, tmp_path):
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    bits(folder / "model" / "adapter_model.safetensors", -8)
    for load in (lambda: model.load_finished(folder / "model"), lambda: run.share.merge(folder)):
        with pytest.raises(UserError, match="is damaged .adapter_model.safetensors."):
            load()


def test_a_missing_tracker_is_told_before_a_row_is_read(tmp_path):
    with pytest.raises(UserError, match="report_to is trackio, which is not installed: pip install trackio"):
        quiet(tmp_path / "run", report_to="trackio", dataset="no such file").open()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("work", ["cleaning", "merge", "probe"])
def test_a_signal_in_any_work_ends_it_within_ten_seconds_with_nothing_half_written(
    work, number, straight, tmp_path
):
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    if work == "cleaning":
        with open(rows, "w") as file:
            row = '{{"prompt": "p{0}", "chosen": "good {0}", "rejected": "bad"}}\n'
            file.writelines(row.format(k) for k in range(400_000))
    elif work == "merge":
        shutil.copytree(straight.folder, run)
    flags = {
        "cleaning": [
            "--preset",
            "tiny",
            "--dataset",
            str(rows),
            "--max-pairs",
            "0",
            "--output-dir",
            str(run),
        ],
        "merge": ["merge", str(run), str(tmp_path / "merged")],
        "probe": ["--probe", "--preset", "tiny", "--output-dir", str(run)],
    }[work]
    ready = {"cleaning": "Folder:", "merge": "", "probe": "at work"}[work]
    said = tmp_path / "said"
    with open(said, "w") as file:  # no pipe, which a fork server would hold open for longer
        command = [sys.executable, "-u", "-m", "lazyorpo_lib", *flags]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    while ready not in said.read_text() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(2)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(60) == 130 and time.monotonic() - began < 10, said.read_text()
    assert "Traceback" not in said.read_text() and "lazyorpo: " in said.read_text()
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*partial"))
