"""recipes.py and runs.py: recipes differ in what they should alone, finished runs are not run again."""

import json
import math
import multiprocessing
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.loss import TERMS
from lazyorpo_lib.results.evaluate import WHEN, changes, interval, measures
from lazyorpo_lib.session import Stopped
from lazyorpo_lib.settings import resolve
from lazyorpo_lib.trials import recipes, runs

FOUR = ["SFT", "SFT then DPO", "ORPO", "SFT then ORPO"]
FIGURES = set(recipes.QUALITY) | set(recipes.COST)


def tiny(folder, **changes):
    quick = {"preset": "tiny", "output_dir": str(folder), "max_steps": 2, "answers": 0}
    return resolve([("test", quick | changes)])[0]


@pytest.fixture(autouse=True, scope="module")
def plan():
    """A plan of 3 minutes for every run, in no time."""
    with pytest.MonkeyPatch.context() as patch:
        whole = types.SimpleNamespace(method=types.SimpleNamespace(minutes=3.0))
        patch.setattr(recipes.planner, "estimate", lambda settings: whole)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory, plan):
    settings = tiny(tmp_path_factory.mktemp("runs") / "tiny", answers=1)
    return settings, recipes.compare_recipes(settings, seeds=1, show=lambda text: None)


@pytest.fixture
def trained(monkeypatch):
    """In the place of training: each run leaves the figures that `figure` gives; the runs' settings."""
    seen = []

    def run(stage, show, merge=None):
        folder = Path(stage.output_dir)
        seen.append(stage)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [figure(stage, pair) for pair in range(40)]
        before = [[(row | {"log_odds_chosen": 0.0})[name] for name in TERMS] for row in rows]
        tables = before, [[row[name] for name in TERMS] for row in rows]
        prompts = [pair // 4 for pair in range(40)]
        held_out = {"columns": TERMS, "chosen_shorter": [True] * 40, "prompt_ids": prompts}
        held_out |= {when: {"pairs": t, "answers": []} for when, t in zip(WHEN, tables, strict=True)}
        figures = changes(*(measures(held_out, when) for when in WHEN))
        summary = {"finished": True, "verdict": "", "held_out": figures, "training_minutes": 1.0}
        summary |= {"tokens": 9, "forward_passes": 2, "planned_against_measured": {"peak_gib": [1.0, 1.0]}}
        report = {"tokens": {side: {"mean": 10.0} for side in ("prompt", "chosen", "rejected")}}
        files = {"held_out": held_out, "summary": summary, "data_report": report, "settings": {}}
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))

    def figure(stage, pair):
        """Accuracy is best at a rate of 3e-3, of a second stage at less; a seed moves all its pairs."""
        best = 3e-3 if "merged" not in stage.base_model else 3e-4 if stage.objective == "orpo" else 1e-4
        odds = 1 - abs(math.log(stage.learning_rate / best)) + 0.1 * (stage.objective == "orpo")
        noise = math.sin(pair * 7 + stage.seed) + 0.5 * stage.seed
        return dict.fromkeys(TERMS, 0.0) | {
            "log_odds_chosen": odds + noise, "accuracy": float(odds + noise / 2 > 0), "nll": 2.0,
            "nll_tokens": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(recipes, "run_apart", run)
    return seen


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


def test_a_finished_run_of_another_budget_is_not_taken_for_this_one(trained, tmp_path, monkeypatch):
    settings = tiny(tmp_path / "run")
    recipes.compare_recipes(settings, seeds=1, show=lambda text: None)
    folder = Path(trained[0].output_dir)
    record = {"fingerprint": "another", "settings": vars(trained[0]) | {"max_steps": 7}}
    (folder / "settings.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match="with other settings .max_steps was 7, is 2.: choose another output_dir"
    ):
        runs.run_apart(trained[0], lambda text: None)


@pytest.mark.parametrize("fallen", ["ORPO", "SFT"])
def test_a_model_that_fell_to_pieces_on_either_side_makes_no_proof(fallen, tmp_path):
    folders = {}
    for name in ("ORPO", "SFT"):
        rows = [dict.fromkeys(TERMS, 1.0) | {"accuracy": float(name == "ORPO")} for _ in range(40)]
        after = [row | {"nll": 9.0 if name == fallen else 1.0} for row in rows]
        tables = zip(WHEN, (rows, after), strict=True)
        kept = {
            when: {"pairs": [[row[n] for n in TERMS] for row in some], "answers": []} for when, some in tables
        }
        (folder := tmp_path / name).mkdir()
        held_out = {"columns": TERMS, "chosen_shorter": [True] * 40} | kept
        (folder / "held_out.json").write_text(json.dumps(held_out))
        folders[name] = [folder]
    said = recipes._verdict(folders, "ORPO", "SFT")
    assert f"no gain all the same, for of {fallen}'s model its nll went" in said and "than noise" not in said


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


def carried_out(trained):
    return [(Path(s.output_dir).name, s.objective, s.learning_rate, s.epochs) for s in trained]


def test_the_four_recipes_share_their_sft_and_the_second_stage_starts_from_it(trained, tmp_path):
    settings = tiny(tmp_path, max_steps=0, epochs=2.0, learning_rate=3e-3)
    home = recipes.compare_recipes(settings, seeds=1, recipes=", ".join(FOUR), show=str)
    runs = {name: rest for name, *rest in carried_out(trained)}
    assert runs == {
        "sft-1": ["sft", 3e-3, 2.0], "half-sft-1": ["sft", 3e-3, 1.0], "orpo-1": ["orpo", 3e-3, 2.0],
        "sft-then-dpo-1": ["dpo", 3e-3 / 30, 1.0], "sft-then-orpo-1": ["orpo", 3e-3 / 10, 1.0],
    }  # fmt: skip
    assert {s.base_model for s in trained if "then" in s.output_dir} == {str(home / "half-sft-1" / "merged")}
    said = read(home, "comparison.json")["said"]
    pairs = [one.split(", on")[0] for one in said if " minus " in one]
    assert pairs == [
        "ORPO minus SFT", "SFT then ORPO minus SFT", "ORPO minus SFT then DPO",
        "SFT then ORPO minus SFT then DPO", "SFT then ORPO minus ORPO",
    ]  # fmt: skip
    assert "no rate was searched" in " ".join(said)


def test_the_second_stage_without_nll_is_the_odds_term_all_but_alone(trained, tmp_path):
    settings, both = tiny(tmp_path, or_weight=0.3), "SFT then ORPO, SFT then ORPO without nll"
    recipes.compare_recipes(settings, seeds=1, recipes=both, show=str)
    weights = {Path(s.output_dir).name: s.or_weight for s in trained}
    assert weights == {"half-sft-1": 0.3, "sft-then-orpo-1": 0.3, "sft-then-orpo-without-nll-1": 100.0}


@pytest.mark.parametrize(("epochs", "share"), [(1.0, 1 / 3), (2.0, 1 / 3), (3.0, 1 / 3), (4.0, 0.375)])
def test_on_a_budget_of_tokens_as_many_go_through_the_model_with_dpos_reference(
    trained, tmp_path, epochs, share
):
    settings = tiny(tmp_path, max_steps=0, epochs=epochs)
    recipes.compare_recipes(settings, seeds=1, recipes=FOUR, budget="tokens", show=str)
    runs = {name: passes for name, *_, passes in carried_out(trained)}
    assert runs["part-sft-1"] == runs["sft-then-dpo-1"] == pytest.approx(share * epochs)
    through = runs["part-sft-1"] + runs["sft-then-dpo-1"] + min(1, runs["sft-then-dpo-1"])
    assert through == pytest.approx(runs["orpo-1"]) == pytest.approx(runs["half-sft-1"] * 2)


def test_a_rate_is_searched_for_each_recipe_with_the_same_effort_on_a_split_of_its_own(trained, tmp_path):
    settings = tiny(tmp_path, max_steps=0, epochs=2.0, learning_rate=1e-3)
    home = recipes.compare_recipes(settings, seeds=1, recipes=FOUR, tries=3, show=str)
    searched = [Path(s.output_dir).name for s in trained if s.seed == 0]
    assert [sum(name.startswith(f"{stage}-0-") for name in searched) for stage in (
        "sft", "sft-then-dpo", "orpo", "sft-then-orpo",
    )] == [3, 3, 3, 3]  # fmt: skip
    out = read(home, "comparison.json")
    assert out["rates"]["SFT"] == out["rates"]["ORPO"] == 3e-3
    assert out["rates"]["SFT then ORPO"] == pytest.approx(3e-4) and "the best of 3" in " ".join(out["said"])
    final = {Path(s.output_dir).name: s.learning_rate for s in trained if s.seed}
    assert final["sft-1"] == final["half-sft-1"] == final["orpo-1"] == 3e-3
    assert {row["seed"] for row in out["runs"]} == {1}


def test_length_and_what_is_left_are_told_before_anything_starts(trained, tmp_path):
    said = []

    def show(text):
        said.append((len(trained), text))

    settings = tiny(tmp_path, max_steps=0, epochs=2.0, learning_rate=1e-3)
    recipes.compare_recipes(settings, seeds=2, show=show)
    assert said[0][0] == 0 and said[0][1].startswith(
        "8 runs, 0 of them finished; the others take about 19 min"
    )
    recipes.compare_recipes(settings, seeds=3, show=show)
    assert [text for _, text in said if "finished" in text][1].startswith("12 runs, 8 of them finished")
    recipes.compare_recipes(tiny(tmp_path / "b"), seeds=1, tries=3, show=show)
    assert said[-4][1].startswith("14 runs, 0 of them finished")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            dict(recipes="SFT, DPO"),
            "There is no recipe 'DPO': give some of SFT, SFT then DPO, ORPO, SFT then",
        ),
        (dict(recipes=[]), "No recipe was given: give some of"),
        (dict(recipes=""), "There is no recipe '': give some of"),
        (dict(budget="minutes"), "budget is 'minutes', but must be one of steps, tokens"),
        (dict(seeds=0), "seeds is 0, but must be a whole number from 1 on"),
        (dict(seeds=2.5), "seeds is 2.5, but must be a whole number"),
        (dict(tries=-1), "tries is -1, but must be"),
    ],
)
def test_what_no_comparison_can_be_made_of_is_one_sentence_and_leaves_no_folder(tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        recipes.compare_recipes(tiny(tmp_path / "x"), **given)
    assert not (tmp_path / "x").exists()


def test_the_first_run_fixes_the_number_format_of_the_others(tmp_path):
    def begun(name, precision, chosen):
        (tmp_path / name).mkdir()
        record = {"settings": {"precision": precision}, "chosen": {"precision": chosen} if chosen else {}}
        (tmp_path / name / "settings.json").write_text(json.dumps(record))

    def pinned(name):
        return runs._pinned(tiny(tmp_path / name)).precision

    assert pinned("b") == "auto"
    begun("a", "auto", "")
    assert pinned("b") == "auto"
    begun("c", "auto", "float16")
    assert pinned("b") == "float16" and pinned("a") == pinned("c") == "auto"  # what has begun goes on


def test_intervals_are_over_prompts_and_seeds():
    chance = np.random.default_rng(0)
    ids, few, same = np.arange(400), np.arange(400) // 20, chance.normal(size=400)

    def width(values, prompts):
        low, high = interval(values, prompts)
        assert low < np.concatenate(values).mean() < high
        return high - low

    plain = width([same], [ids])
    assert plain == pytest.approx(2 * 1.96 * same.std() / 20, rel=0.1)
    of_prompts = same.reshape(20, 20)[:, :1].repeat(20, axis=1).ravel()  # 20 pairs of a prompt say the same
    assert width([of_prompts], [few]) > 2.5 * width([of_prompts], [ids])
    assert width([same, same, same], [ids] * 3) == pytest.approx(
        plain, rel=0.1
    )  # no more prompts than before
    apart = [same - 1, same, same + 1]  # seeds differ by more than pairs do
    assert width(apart, [ids] * 3) > 5 * plain


def test_intervals_hold_what_they_promise():
    chance, held = np.random.default_rng(1), 0
    for _ in range(200):
        seeds, prompts = chance.normal(0, 0.3, 5), chance.normal(0, 0.3, 60)
        ids = [chance.choice(60, 40) for _ in range(5)]
        values = [seeds[s] + prompts[ids[s]] + chance.normal(0, 0.3, 40) for s in range(5)]
        low, high = interval(values, ids, draws=400)
        held += low < 0 < high
    assert held >= 170  # of five seeds 95 % intervals by the bootstrap hold 88 % or so
