"""recipes.py and runs.py: recipes differ in what they should alone, finished runs are not run again."""

import json
import multiprocessing
import types
from pathlib import Path

import pytest
import torch

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.session import Stopped
from lazyorpo_lib.settings import resolve
from lazyorpo_lib.trials import recipes, runs

FIGURES = set(recipes.QUALITY) | set(recipes.COST)


def tiny(folder, **changes):
    quick = {"preset": "tiny", "output_dir": str(folder), "max_steps": 2, "answers": 0}
    return resolve([("test", quick | changes)])[0]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    settings = tiny(tmp_path_factory.mktemp("runs") / "tiny", answers=1)
    return settings, recipes.compare_recipes(settings, seeds=1, show=lambda text: None)


def read(home, *names):
    return json.loads(home.joinpath(*names).read_text())


def test_recipes_share_pairs_and_steps_and_dpo_starts_from_the_merged_sft(compared):
    _, home = compared
    kept = {f.name: read(f, "settings.json")["settings"] for f in home.iterdir() if f.is_dir()}
    assert kept.keys() == {"sft-1", "half-sft-1", "sft-then-dpo-1", "orpo-1"}
    assert [kept[name]["objective"] for name in ("sft-1", "half-sft-1", "sft-then-dpo-1", "orpo-1")] == [
        "sft",
        "sft",
        "dpo",
        "orpo",
    ]
    assert kept["sft-1"]["max_steps"] == kept["orpo-1"]["max_steps"] == 2
    assert kept["half-sft-1"]["max_steps"] == kept["sft-then-dpo-1"]["max_steps"] == 1
    assert kept["sft-then-dpo-1"]["base_model"] == str(home / "half-sft-1" / "merged")
    assert len({read(home, name, "data_report.json")["digest"] for name in kept}) == 1
    first, second = (read(home, name, "held_out.json") for name in ("half-sft-1", "sft-then-dpo-1"))
    nll = [[row[0] for row in pairs] for pairs in (first["after"]["pairs"], second["before"]["pairs"])]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4), "DPO's start is the end of its SFT"


def test_the_table_has_every_figure_and_dpo_counts_its_reference(compared):
    _, home = compared
    out = read(home, "comparison.json")
    rows = {row["recipe"]: row for row in out["runs"]}
    assert list(rows) == list(recipes.RECIPES) and all(FIGURES < row.keys() for row in rows.values())
    assert (
        rows["ORPO"]["forward_passes"] == rows["SFT"]["forward_passes"] == 2
        and rows["SFT then DPO"]["forward_passes"] == 3
    )
    text = (home / "comparison.md").read_text()
    assert text.count("ORPO minus") == 2 and "8 held-out pairs" in text and "| ORPO |" in text
    assert (home / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_run_again(compared, monkeypatch):
    settings, home = compared
    monkeypatch.setattr(runs.multiprocessing, "get_context", None)
    before = (home / "comparison.json").read_bytes()
    recipes.compare_recipes(settings, seeds=1, show=lambda text: None)
    assert (home / "comparison.json").read_bytes() == before


def test_a_run_that_fails_is_one_sentence_that_names_its_folder(tmp_path):
    with pytest.raises(UserError, match="sft-1.*nowhere.jsonl"):
        recipes.compare_recipes(tiny(tmp_path, dataset="nowhere.jsonl"), seeds=1, show=lambda text: None)
    with pytest.raises(UserError, match="eval_pairs is 0"):
        recipes.compare_recipes(tiny(tmp_path, eval_pairs=0))


FORKS = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@pytest.mark.parametrize("cuda,kind", [(True, "spawn"), (False, FORKS)])
def test_an_interrupt_lets_the_run_end_its_step_and_says_how_to_go_on(tmp_path, monkeypatch, cuda, kind):
    class Process:
        started, asked = 0, False

        def __init__(self, target, args, daemon):
            self.folder = Path(args[0].output_dir)

        def start(self):
            Process.started += 1

        def terminate(self):
            self.asked = True

        def join(self):
            if not self.asked:
                raise KeyboardInterrupt
            (self.folder / "log.txt").write_text("Stopped at step 1.\n")

    context = types.SimpleNamespace(Process=Process, set_forkserver_preload=lambda names: None)
    kinds = []
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda kind: kinds.append(kind) or context)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(Stopped, match="sft-1 is not finished.*Stopped at step 1.*goes on from there"):
        recipes.compare_recipes(tiny(tmp_path), seeds=1, show=lambda text: None)
    assert Process.started == 1, "nothing more is begun"
    assert kinds == [kind], "CUDA survives no fork, and what the fork server imports initialises it"
