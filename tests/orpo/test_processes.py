"""processes.py: what a tracker is told; what is wrong with it is one sentence before anything is loaded."""

import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate.utils import LoggerType

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import fingerprint
from lazyorpo_lib.orpo import processes
from lazyorpo_lib.settings import Settings

MINE = dict(tracker_project="pets", tracker_run="first try")


@pytest.fixture(autouse=True)
def a_token(monkeypatch):
    monkeypatch.setattr(processes, "get_token", lambda: "hf_" + "test")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def told(**settings):
    found = processes.tracked(Settings(**settings), Path("runs/one"))
    return found["project_name"], found["init_kwargs"]


def test_project_run_and_space_reach_the_tracker_that_has_them(monkeypatch):
    assert told() == ("lazyorpo", {"none": {}})
    assert told(report_to="wandb", **MINE) == ("pets", {"wandb": {"name": "first try"}})
    assert told(report_to="tensorboard", **MINE) == ("pets", {"tensorboard": {}})
    space = {"trackio": {"name": "first try", "space_id": "me/board"}}
    assert told(report_to="trackio", trackio_space="me/board", **MINE) == ("pets", space)
    monkeypatch.setenv("WANDB_PROJECT", "from outside")
    assert told(report_to="wandb")[0] == "from outside" and told(report_to="wandb", **MINE)[0] == "pets"


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio"])
def test_every_tracker_is_told_the_runs_name_its_seed_and_the_digest_of_its_pairs(tracker, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "data_report.json").write_text('{"digest": "0123abcd"}')
    told = processes.tracked(Settings(report_to=tracker, seed=7), tmp_path / "one")["config"]
    assert (told["run"], told["seed"], told["data_digest"]) == ("one", 7, "0123abcd")
    told = processes.tracked(Settings(report_to=tracker, **MINE), tmp_path)["config"]
    assert (told["run"], told["data_digest"]) == ("first try", "")


WRONG = {
    "a project that is a path": (dict(tracker_project="../x"), "tracker_project is '../x': give up to 100"),
    "a project of dots": (dict(tracker_project=".."), "tracker_project is"),
    "a space of another tracker": (dict(trackio_space="a/b"), "set report_to=trackio, or leave it empty"),
    "no name of a space": (dict(report_to="trackio", trackio_space="board"), "give it as owner/name"),
    "an address": (dict(report_to="trackio", trackio_space="https://hf.co/spaces/a/b"), "as owner/name"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_tracker_is_one_sentence_before_anything_is_loaded(wrong, tmp_path, monkeypatch):
    given, said = WRONG[wrong]
    monkeypatch.setattr(processes, "check_tracker", lambda name: None)
    with pytest.raises(UserError, match=said):
        processes.make_accelerator(Settings(**given), dtype=torch.float32, device="cpu", folder=tmp_path)


def test_a_space_without_a_token_is_one_sentence_and_nothing_is_uploaded(monkeypatch):
    monkeypatch.setattr(processes, "get_token", lambda: None)
    with pytest.raises(
        UserError, match="trackio_space is 'me/board', which needs a token .* set HF_TOKEN, or leave"
    ):
        told(report_to="trackio", trackio_space="me/board")


def test_where_a_run_is_tracked_does_not_make_it_another_run():
    assert fingerprint(Settings()) == fingerprint(Settings(report_to="trackio", trackio_space="a/b", **MINE))


def run_with_tracker(tmp_path, **settings):
    from tests.conftest import random_pairs
    from tests.orpo.test_trainer import make, trained

    trainer = trained(make(tmp_path, random_pairs(16), max_steps=2, report_to="trackio", **MINE, **settings))
    trainer.close()


def test_trackio_is_begun_once_fed_every_step_and_ended(tmp_path, monkeypatch):
    """A stand-in for the package, with what accelerate calls of it."""
    seen = []
    run = types.SimpleNamespace(
        config={}, log=lambda values, **more: seen.append(values), finish=lambda: seen.append("ended")
    )
    fake = types.ModuleType("trackio")
    fake.config = {}
    fake.init = lambda **given: seen.append(given) or run
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(processes, "check_tracker", lambda name: None)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])
    (tmp_path / "data_report.json").write_text('{"digest": "0123abcd"}')
    run_with_tracker(tmp_path)
    assert (fake.config | run.config)["data_digest"] == "0123abcd"
    assert seen[0] == {"project": "pets", "name": "first try"} and seen[-1] == "ended"
    assert sum("train/loss" in row for row in seen[1:-1]) == 2


@pytest.mark.slow
def test_the_real_trackio_keeps_a_run_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    run_with_tracker(tmp_path / "run")
    (run,) = trackio.Api().runs("pets")
    assert run.name == "first try" and list((tmp_path / "trackio").glob("pets*"))
