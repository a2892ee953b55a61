"""Whole runs on the tiny preset: the folder they leave, how they stop and go on, and what a user's mistakes
cost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lazyorpo_lib import model, run, session
from lazyorpo_lib.__main__ import console, main
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import fingerprint, read_json, read_rows
from lazyorpo_lib.machine import forget_peak_memory, memory_gib, pick_precision
from lazyorpo_lib.marker import MARKER, take
from lazyorpo_lib.plan import planner
from lazyorpo_lib.results import held_out, reading
from lazyorpo_lib.run import Run, execute
from lazyorpo_lib.session import Stop
from lazyorpo_lib.settings import DEFAULTS, FIELDS, Settings, resolve
from tests.conftest import files_holding

SHARED = Path(__file__).parents[2] / "shared" / "data" / "preference-sample-en.json"
CONTRACT = {
    "settings.json",
    "data_report.json",
    "dropped.jsonl",
    "history.jsonl",
    "live.png",
    "summary.json",
    "README.md",
    "model",
}


def tiny(folder, **changes):
    return resolve([("test", {"preset": "tiny", "output_dir": str(folder)} | changes)])[:2]


def command(*flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lazyorpo_lib", *map(str, flags)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def console_says(monkeypatch, capsys, *flags) -> tuple[int, str]:
    """The exit status of the command line and what it writes to stderr, in this process: torch is there."""
    monkeypatch.setattr(sys, "argv", ["lazyorpo", *map(str, flags)])
    for name, stream in {"stdin": open(os.devnull), "stdout": sys.stdout, "stderr": sys.stderr}.items():
        monkeypatch.setattr(sys, name, stream)  # so that they come back
    with pytest.raises(SystemExit) as ended:
        console()
    return ended.value.code, capsys.readouterr().err


def opened(given, show=lambda text: None):
    run = Run(*given, show=show)
    run.open()
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return execute(*tiny(folder), show=lambda text: None)


def test_a_run_leaves_every_file_of_the_contract(finished):
    names = {p.name for p in finished.folder.iterdir()}
    assert names >= CONTRACT and not any(n.startswith("checkpoint") for n in names)
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in (finished.folder / "model").iterdir()
    }
    assert not [p for p in finished.folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    assert not any(p.stat().st_mode & 0o002 for p in finished.folder.rglob("*"))


def test_history_has_every_step_once_with_the_names_of_the_contract(finished):
    rows = read_rows(finished.folder / "history.jsonl")
    steps = [r["step"] for r in rows if not reading.is_evaluation(r)]
    assert steps == [1, 2, 3, 4, 5, 6]
    wanted = {
        "step",
        "epoch",
        "loss",
        "nll",
        "or_loss",
        "log_odds_chosen",
        "log_odds_rejected",
        "log_odds_ratio",
        "logp_chosen",
        "logp_rejected",
        "accuracy",
        "learning_rate",
        "grad_norm",
        "pairs_per_second",
        "tokens_per_second",
        "memory_gib",
    }
    assert wanted <= rows[1].keys()
    assert [r["step"] for r in rows if reading.is_evaluation(r)] == [0, 6]


def test_a_process_that_does_not_see_the_first_ones_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="all of them see"):
        execute(*tiny(tmp_path / "mine"), show=lambda text: None)


def test_reports_add_up(finished):
    report = json.loads((finished.folder / "data_report.json").read_text())
    assert report["kept"] + sum(report["dropped"].values()) == report["read"] == 48
    assert report["train"] + report["held_out"] == report["kept"]
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == 6
    assert (
        0 <= summary["accuracy_before"] <= 1
        and summary["held_out"]["accuracy"]["pairs"] == report["held_out"]
    )
    sources = json.loads((finished.folder / "settings.json").read_text())["sources"]
    assert (
        sources["output_dir"] == "test"
        and sources["lora_rank"] == "default"
        and sources["max_steps"] == "preset tiny"
    )


def test_base_and_tuned_model_answer_and_the_work_is_counted(finished):
    kept = json.loads((finished.folder / "held_out.json").read_text())
    assert all(len(kept[when]["answers"]) == 2 for when in ("before", "after"))
    summary = json.loads((finished.folder / "summary.json").read_text())
    rows = read_rows(finished.folder / "history.jsonl")
    assert summary["forward_passes"] == sum(row.get("forward_passes", 0) for row in rows) == 6
    assert summary["tokens"] == sum(row.get("tokens", 0) for row in rows) > 6 * 4 * 10


def test_watched_prompts_are_shown_and_kept_and_change_nothing(finished, tmp_path):
    said = []
    execute(*tiny(tmp_path, watch_every_steps=3), show=said.append)
    rows = read_rows(tmp_path / "watched.jsonl")
    assert [row["step"] for row in rows] == [3, 3, 3, 6, 6, 6] and all(row["prompt"] for row in rows)
    assert len([text for text in said if text.startswith("step 3 · ")]) == 3
    for name, value in weights(finished.folder).items():
        assert (value == weights(tmp_path)[name]).all(), name


def test_running_a_finished_run_again_trains_nothing(finished):
    before = (finished.folder / "history.jsonl").read_bytes()
    said = []
    again = execute(*tiny(finished.folder), show=said.append)
    assert again.finished and "finished" in " ".join(said)
    assert (finished.folder / "history.jsonl").read_bytes() == before
    assert again.finish() == json.loads((finished.folder / "summary.json").read_text())
    assert len(again.answers()) == 2


def test_other_settings_never_overwrite_a_run_and_the_difference_is_named(finished):
    with pytest.raises(UserError, match="learning_rate was 0.01, is 0.5"):
        opened(tiny(finished.folder, learning_rate=0.5))
    with pytest.raises(UserError, match="resume is never"):
        opened(tiny(finished.folder, resume="never"))


def test_fingerprint_sees_what_shapes_the_result_and_nothing_else():
    base = Settings()
    assert fingerprint(Settings(seed=1)) != fingerprint(base) != fingerprint(Settings(or_weight=0.2))
    assert fingerprint(Settings(max_minutes=5, output_dir="x", tokens_per_batch=99)) == fingerprint(base)


def test_a_prompt_is_never_on_both_sides_of_the_split(tmp_path):
    rows = [{"prompt": f"q{i // 3}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(90)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    run = Run(*tiny(tmp_path / "run", dataset=str(file), eval_pairs=12, max_pairs=0), show=lambda text: None)
    run.load_pairs()
    sides = [
        {tuple(pairs[i].prompt) for i in range(len(pairs))} for pairs in (run.train_pairs, run.eval_pairs)
    ]
    assert len(run.eval_pairs) == 12 and not sides[0] & sides[1]


def test_overlong_pairs_are_counted_and_kept_with_their_content(tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": "long " * (100 if i == 3 else 1), "rejected": f"bad {i}"}
        for i in range(20)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    run = Run(*tiny(tmp_path / "run", dataset=str(file)), show=lambda text: None)
    run.load_pairs()
    (dropped,) = read_rows(tmp_path / "run" / "dropped.jsonl")
    assert (
        dropped["index"] == 3
        and dropped["reason"] == "overlong"
        and "long long" in json.dumps(dropped["row"])
    )


def test_a_full_tuning_run_leaves_a_model_that_loads(tmp_path):
    from lazyorpo_lib.model import load_finished

    run = execute(*tiny(tmp_path, method="full", max_steps=2, learning_rate=1e-4), show=lambda text: None)
    loaded, tokenizer = load_finished(run.folder / "model")
    assert (run.folder / "model" / "model.safetensors").is_file() and tokenizer.chat_template
    for (name, a), b in zip(run.model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert (a == b).all(), name


def test_without_held_out_pairs_a_run_still_ends_well(tmp_path):
    run = execute(*tiny(tmp_path, eval_pairs=0, max_steps=2), show=lambda text: None)
    assert run.finished and run.answers() == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_qlora_runs_on_a_cpu(tmp_path, precision):
    options = dict(method="qlora", optimizer="adamw_8bit", max_steps=2, precision=precision)
    run = execute(*tiny(tmp_path, **options), show=lambda text: None)
    kinds = {type(m).__name__ for m in run.model.modules()}
    assert "Linear4bit" in kinds and run.finished
    head = run.model.get_output_embeddings().weight
    assert head.dtype == run.dtype


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_file(), reason="the shared sample of real pairs is not here")
def test_real_multi_turn_pairs_train(tmp_path):
    run = execute(
        *tiny(
            tmp_path, dataset=str(SHARED), max_tokens=4000, max_prompt_tokens=3000, max_pairs=60, max_steps=2
        ),
        show=lambda text: None,
    )
    report = json.loads((run.folder / "data_report.json").read_text())
    assert report["shapes"] == {"conversations": report["kept"]} and report["kept"] > 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "tracker,left", [("tensorboard", "**/events.out.tfevents.*"), ("wandb", "wandb/offline-run-*")]
)
def test_trackers_work_through_the_trainers_own_integrations_and_stay_in_the_folder(tmp_path, tracker, left):
    pytest.importorskip(tracker)
    done = command(
        "--preset",
        "tiny",
        "--max-steps",
        2,
        "--report-to",
        tracker,
        "--output-dir",
        tmp_path,
        WANDB_MODE="offline",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob(left))
    digest = read_json(tmp_path / "data_report.json")["digest"]
    assert any(tmp_path / tracker in file.parents for file in files_holding(tmp_path, digest))


# Stopping and going on.


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "adapter_model.safetensors")


def test_a_stopped_run_goes_on_to_the_same_weights(finished, tmp_path):
    said = []
    first = Run(*tiny(tmp_path), show=said.append)
    first.load_pairs()
    first.load_model()
    inner = first.trainer.on_row

    def stop_at_four(row):
        inner(row)
        if row["step"] == 4 and "loss" in row:
            (tmp_path / "STOP").touch()

    first.trainer.on_row = stop_at_four
    first.train()
    summary = first.finish()
    assert not summary["finished"] and "STOP" in summary["why"] and first.interrupted
    second = execute(*tiny(tmp_path), show=said.append)
    assert second.finished and any("Going on from step 4" in s or "Going on from step 5" in s for s in said)
    rows = [r["step"] for r in read_rows(tmp_path / "history.jsonl") if "loss" in r]
    assert rows == [1, 2, 3, 4, 5, 6]
    for name, value in weights(finished.folder).items():
        assert (value == weights(tmp_path)[name]).all(), name


def test_what_a_run_leaves_is_its_best_step_also_after_a_stop(tmp_path):
    best = dict(keep="best", method="full", learning_rate=0.05, lr_schedule="constant", answers=0)
    kept = []
    for name in ("straight", "stopped"):
        folder, run = tmp_path / name, Run(*tiny(tmp_path / name, **best), show=lambda text: None)
        run.load_pairs()
        run.load_model()
        inner = run.trainer.on_row

        def stop_at_five(row, inner=inner, run=run):
            inner(row)
            run.stop.reason = "asked" * (row["step"] == 5)

        if name == "stopped":
            run.trainer.on_row = stop_at_five
            run.train()
            assert run.finish()["kept_step"] == kept[0][0] and not run.finished
            assert (folder / f"checkpoint-{kept[0][0]}").is_dir() and (folder / "checkpoint-5").is_dir()
            run = Run(*tiny(folder, **best), show=lambda text: None)
            run.load_pairs()
            run.load_model()
        run.train()
        summary, rows = run.finish(), read_rows(folder / "history.jsonl")
        losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row and row["step"]}
        nlls = {row["step"]: row["eval_nll"] for row in rows if "eval_nll" in row}
        assert summary["kept_step"] == min(losses, key=losses.get) < 5 and list(losses) == [1, 2, 3, 4, 5, 6]
        nll, tokens, *_ = map(sum, zip(*read_json(folder / "held_out.json")["after"]["pairs"], strict=True))
        assert nll / tokens == pytest.approx(nlls[summary["kept_step"]], rel=1e-6)
        assert summary["finished"] and summary["steps"] == 6 and run.plot.results["kept_step"] < 5
        assert (
            f"Kept: step {summary['kept_step']} of 6: its held-out loss" in (folder / "README.md").read_text()
        )
        assert not list(folder.glob("checkpoint-*"))
        left = (folder / "model" / "model.safetensors").read_bytes(), read_json(folder / "held_out.json")
        kept.append((summary["kept_step"], summary["kept"], *left))
    assert kept[0] == kept[1]


def test_an_interrupt_before_the_first_step_takes_none_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    said = []
    run = Run(*tiny(tmp_path, max_steps=2), show=said.append)
    run.load_pairs()
    run.load_model()
    answer, handler = held_out._answer, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        held_out, "_answer", lambda *args: os.kill(os.getpid(), signal.SIGINT) or answer(*args)
    )
    run.train()
    summary = run.finish()
    assert (summary["steps"], summary["finished"], run.interrupted) == (
        0,
        False,
        True,
    ) and "SIGINT" in summary["why"]
    assert signal.getsignal(signal.SIGINT) is handler and "Stopped at step 0" in " ".join(said)
    left = {p.name for p in tmp_path.iterdir()}
    assert not left & {"held_out.json", "history.jsonl", "model"} and not [
        name for name in left if "checkpoint" in name
    ]
    monkeypatch.undo()
    again = execute(*tiny(tmp_path, max_steps=2), show=said.append)
    assert again.finished and again.held_out_results() and (tmp_path / "model").is_dir()


def test_a_second_press_after_training_changes_nothing_and_after_an_abort_begins_anew(tmp_path):
    run = Run(*tiny(tmp_path, max_steps=3, answers=0), show=lambda text: None)
    run.load_pairs()
    run.load_model()
    inner = run.trainer.on_row

    def abort(row):
        if row["step"] == 2:
            raise KeyboardInterrupt
        inner(row)

    run.trainer.on_row = abort
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    rows = (tmp_path / "history.jsonl").read_bytes()
    assert [r["step"] for r in read_rows(tmp_path / "history.jsonl") if "loss" in r] == [1, 2, 3]
    run.train()
    assert (tmp_path / "history.jsonl").read_bytes() == rows and run.finish()["finished"]


def test_a_second_interrupt_acts_at_once_and_the_old_handler_comes_back(tmp_path):
    before, stop = signal.getsignal(signal.SIGINT), Stop(tmp_path / "STOP")
    with stop.listening(), stop.waiting():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.was_asked() and "SIGINT" in stop.reason
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_auto_chose_holds_where_a_run_goes_on_on_another_kind_of_machine(tmp_path, monkeypatch):
    options = dict(method="auto", max_minutes=1e-4, max_steps=50)
    first = execute(*tiny(tmp_path, **options), show=lambda text: None)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept["settings"]["method"] == kept["settings"]["precision"] == "auto"
    assert kept["chosen"] == {"method": first.method, "precision": str(first.dtype).removeprefix("torch.")}
    dtype, pick = first.dtype, pick_precision
    monkeypatch.setattr(
        run,
        "pick_precision",
        lambda setting, machine: pick("float16" if setting == "auto" else setting, machine),
    )
    monkeypatch.setattr(planner, "FULL_LEARNING_RATE", 1.0)  # auto would now choose full
    second = Run(*tiny(tmp_path, **options), show=lambda text: None)
    second.load_pairs()
    second.load_model()
    assert (second.method, second.dtype) == (first.method, dtype) == ("lora", dtype)


def test_a_run_that_auto_began_in_bfloat16_goes_on_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "pick_precision", lambda setting, machine: (model.torch.bfloat16, "chosen"))
    settings, sources, _ = resolve([("test", {"preset": "tiny", "output_dir": str(tmp_path / "run")})])
    first = Run(settings, sources, show=lambda text: None)
    first.load_pairs()
    first.load_model()
    (first.folder / "history.jsonl").touch()

    def on_a_t4(setting, machine):
        if setting == "bfloat16":
            raise UserError("no bfloat16 here")
        return model.torch.float16, "auto"

    monkeypatch.setattr(run, "pick_precision", on_a_t4)
    assert opened((settings, sources)).dtype == model.torch.float16


def test_the_first_interrupt_after_another_reason_to_stop_is_still_the_first(tmp_path):
    stop = Stop(tmp_path / "STOP", 1)
    with stop.listening(), stop.waiting():
        stop.reason = "max_minutes=1 are over"
        stop._signal(signal.SIGINT, None)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            stop._signal(signal.SIGINT, None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets go of a process's peak")
def test_a_second_run_in_one_process_has_a_peak_of_its_own():
    block = bytearray(400 * 2**20)
    del block
    before = memory_gib("cpu")
    forget_peak_memory()
    assert memory_gib("cpu") < before - 0.3


def test_a_kill_while_the_run_is_wrapped_up_leaves_a_finished_run_whole(finished, tmp_path):
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    (folder / "README.md").unlink()
    take(folder, "run", "checkpoint-6/")  # as it was before it was taken away
    (folder / "checkpoint-6").mkdir()
    execute(*tiny(folder), show=lambda text: None)
    assert (folder / "README.md").read_text() == (finished.folder / "README.md").read_text()
    assert not (folder / "checkpoint-6").exists()


def test_sigterm_saves_and_spends_no_time_on_evaluation(tmp_path):
    run = Run(*tiny(tmp_path, save_every_steps=0), show=lambda text: None)
    run.load_pairs()
    run.load_model()
    inner = run.trainer.on_row

    def taken_away(row):
        inner(row)
        if row["step"] == 2 and "loss" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    run.trainer.on_row = taken_away
    run.train()
    summary = run.finish()
    assert (
        "SIGTERM" in summary["why"]
        and run.interrupted
        and (tmp_path / f"checkpoint-{summary['steps']}").is_dir()
    )
    assert [r["step"] for r in read_rows(tmp_path / "history.jsonl") if reading.is_evaluation(r)] == [0]
    assert summary["steps"] < 6 and "accuracy_after" not in summary


def test_files_are_not_for_everybody_to_write_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        opened(tiny(tmp_path / "run"))
        assert not any(p.stat().st_mode & 0o002 for p in [tmp_path / "run", *(tmp_path / "run").rglob("*")])
    finally:
        os.umask(old)


def test_what_auto_took_is_told_kept_and_taken_again_where_a_run_goes_on(tmp_path, monkeypatch):
    auto = dict.fromkeys(("epochs", "learning_rate", "or_weight", "warmup_steps", "max_tokens"), "auto")
    options = auto | dict(price_per_hour=3600.0, max_cost=1e-3, max_steps=40)
    said = []
    first = execute(*tiny(tmp_path, **options), show=said.append)
    kept, summary = read_json(tmp_path / "settings.json"), read_json(tmp_path / "summary.json")
    assert "max_cost=0.001 is spent" in summary["why"] and summary["steps"] == 1 and not first.interrupted
    assert summary["cost"] == pytest.approx(60 * summary["minutes"], abs=0.1)
    wanted = dict(learning_rate=5e-4, or_weight=0.5, epochs=3.0, warmup_steps=2, max_tokens=512)
    wanted["max_tokens"] = kept["chosen"]["max_tokens"]
    assert wanted.items() <= kept["chosen"].items() and kept["settings"]["learning_rate"] == "auto"
    assert all(kept["sources"][name].startswith("auto: ") for name in auto)
    assert "Auto: " in "\n".join(said) and "learning_rate 0.0005" in "\n".join(said)
    assert "| learning_rate | 0.0005 | auto | auto: adapters on" in (tmp_path / "README.md").read_text()
    assert first.trainer.settings.warmup_steps == 2
    monkeypatch.setattr("lazyorpo_lib.settings._BY_WEIGHTS", {float("inf"): ((9, 9, 9),) * 3})
    second = Run(*tiny(tmp_path, **options), show=lambda text: None)
    for carry_out in (second.open, second.load_pairs, second.load_model):
        carry_out()
    assert {name: getattr(second.settings, name) for name in wanted} == wanted
    assert read_json(tmp_path / "settings.json")["sources"] == kept["sources"]


@pytest.mark.parametrize(
    "pod,tool,said",
    [
        ("", "", "no pod"),
        ("p1", "", "runpodctl is not"),
        ("p1", "0", ""),
        ("p1", "1", "did not stop the pod"),
    ],
)
def test_a_pod_is_stopped_where_it_is_one_else_it_is_said(tmp_path, monkeypatch, pod, tool, said):
    script = tmp_path / "runpodctl"
    if tool:
        script.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/called; exit {tool}\n")
        script.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("RUNPOD_POD_ID", pod)
    told = []
    session.stop_pod(told.append)
    assert said in " ".join(told) and (tmp_path / "called").exists() == bool(tool)
    if tool:
        assert (tmp_path / "called").read_text() == "stop pod p1\n"
    assert bool(session.pod_stopper()[1]) == (not tool)


@pytest.mark.parametrize("figures,status", [
    ({"accuracy_before": 0.5, "accuracy_after": 0.9, "verdict": "50% -> 90%: more than noise."}, 0),
    ({"accuracy_before": 0.9, "accuracy_after": 0.5, "verdict": "90% -> 50%: more than noise."}, 3),
    ({"accuracy_before": 0.5, "accuracy_after": 0.6, "verdict": "within the noise of so few pairs"}, 3),
    ({"accuracy_before": 0.5, "accuracy_after": 0.9, "verdict": "no gain all the same, for …"}, 3), ({}, 3),
])  # fmt: skip
def test_a_gain_within_the_noise_fails_whoever_asked_for_that(monkeypatch, figures, status, tmp_path):
    done = SimpleNamespace(show=print, folder="here", interrupted=False, held_out_results=lambda: figures)
    monkeypatch.setattr(run, "execute", lambda settings, sources: done)
    flags = ["--preset", "tiny", "--output-dir", str(tmp_path)]
    assert main([*flags, "--fail-within-noise"]) == status and main(flags) == 0
    with pytest.raises(UserError, match="--fail-within-noise needs held-out pairs"):
        main([*flags, "--eval-pairs", "0", "--fail-within-noise"])


def test_max_minutes_stops_with_a_checkpoint_and_is_no_interruption(tmp_path):
    run = execute(*tiny(tmp_path, max_minutes=1e-4, max_steps=50), show=lambda text: None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "max_minutes" in summary["why"] and summary["steps"] == 1 and not run.interrupted
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_exits_130(tmp_path, number):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lazyorpo_lib",
            "--preset",
            "tiny",
            "--max-steps",
            "2000",
            "--max-pairs",
            "0",
            "--save-every-steps",
            "0",
            "--output-dir",
            str(tmp_path),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while (
        len([r for r in read_rows(tmp_path / "history.jsonl") if "loss" in r]) < 3
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors[-2000:]
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    steps = [r["step"] for r in read_rows(tmp_path / "history.jsonl") if "loss" in r]
    assert steps == list(range(1, int(checkpoint.name.split("-")[1]) + 1))


def test_two_runs_on_one_folder_the_second_stops(tmp_path):
    take(tmp_path, "run", ".lock")
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print(1, flush=True); sys.stdin.read()",
            str(tmp_path / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    held.stdout.readline()
    with pytest.raises(UserError, match="Another run is at work"):
        opened(tiny(tmp_path))
    held.communicate()


# The command line.


def test_help_lists_every_setting_with_default_and_meaning():
    text = " ".join(command("--help").stdout.split())
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in text
        assert " ".join(field.metadata["help"].split()) in text
        assert f"Default: {DEFAULTS[name] if DEFAULTS[name] != '' else 'empty'}" in text


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--learning-rate", "fast"], "learning_rate is 'fast'"),
        (["--lerning-rate", "1"], "--lerning-rate"),
        (["--base-model", "./nowhere"], "there is no such folder"),
        (["--preset", "tiny", "--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--preset", "tiny", "--output-dir", "/proc/none"], "cannot be written"),
        (["--preset", "tiny", "--precision", "int8"], "one of auto, bfloat16"),
        (["--preset", "tiny", "--max-tokens", "10"], "max_prompt_tokens is 256 and max_tokens is 10"),
        (["--preset", "tiny", "--plan", "--device", "A41"], "device is 'A41', but must be one of T4, P100"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_status_2(flags, said, tmp_path, monkeypatch, capsys):
    outside = [] if "--output-dir" in flags else ["--output-dir", tmp_path / "run"]
    status, errors = console_says(monkeypatch, capsys, *flags, *outside)
    assert status == 2 and said in errors and "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("lazyorpo:")]) == 1
    left = [
        p
        for p in (tmp_path / "run").rglob("*")
        if p.is_file() and p.name not in (".lock", "settings.json", MARKER)
    ]
    assert left == [], "nothing half-written"


def test_a_dataset_with_nothing_left_is_one_sentence(tmp_path):
    file = tmp_path / "same.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": f"q{i}", "chosen": "x", "rejected": "x "}) for i in range(5))
    )
    done = command("--preset", "tiny", "--dataset", file, "--output-dir", tmp_path / "run")
    assert done.returncode == 2 and "5 identical answers" in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("lazyorpo:")]) == 1


def test_an_optimizer_that_was_chosen_is_kept_with_the_run(tmp_path):
    given = tiny(tmp_path, optimizer="paged_adamw_32bit", answers=0)
    first = run.Run(*given, show=lambda text: None)
    first.load_pairs(), first.load_model()
    kept = read_json(tmp_path / "settings.json")
    assert kept["settings"]["optimizer"] == "paged_adamw_32bit" and kept["chosen"]["optimizer"] == "adamw"
    assert first.trainer.settings.optimizer == "adamw"
    (tmp_path / "history.jsonl").write_text("")
    assert opened(given).settings.optimizer == "adamw"


def test_liger_that_is_not_there_is_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    flags = ["--preset", "tiny", "--output-dir", tmp_path / "run", "--liger-kernel", "true"]
    status, errors = console_says(monkeypatch, capsys, *flags)
    assert status == 2 and "pip install liger-kernel" in errors and not (tmp_path / "run").exists()
