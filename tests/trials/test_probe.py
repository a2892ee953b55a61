"""probe.py: each setting is tried lower and higher, and the recommendation follows its rule."""

import json
from pathlib import Path

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.trials.probe import probe, recommend
from lazyorpo_lib.trials.runs import write_up
from tests.trials.test_recipes import read, tiny


def trial(margin, nll, rate):
    return {"log_odds_ratio gain": margin, "nll change": nll, "learning_rate": rate, "or_weight": 0.1}


@pytest.mark.parametrize(
    ("runs", "best", "said"),
    [
        ([trial(1, -1, 3e-4), trial(5, 0.1, 1e-3), trial(2, 0, 1e-4)], 2, "2 of 3"),
        ([trial(2, -1, 3e-4), trial(2, -1, 1e-4)], 1, "2 of 2"),
        ([trial(9, 0.5, 3e-4), trial(1, 0.1, 1e-3)], 1, "rose in every trial"),
    ],
)
def test_the_rule_of_the_probe(runs, best, said):
    out = recommend(runs)
    assert (
        out["recommended"] == {"or_weight": 0.1, "learning_rate": runs[best]["learning_rate"]}
        and said in out["said"][0]
    )


def test_probe_tries_each_setting_lower_and_higher_and_writes_what_it_decided_from(tmp_path, monkeypatch):
    def run(settings, show):
        """Its margin is the larger the larger or_weight and rate; too large a rate costs likelihood."""
        assert (settings.max_steps, settings.objective, settings.answers) == (
            5,
            "orpo",
            0,
        ) and settings.eval_pairs <= 32
        changes = {
            "log_odds_ratio": settings.or_weight * settings.learning_rate,
            "nll": settings.learning_rate - 5e-3,
            "accuracy": 0.1,
        }
        Path(settings.output_dir).mkdir(parents=True)
        held_out = {"held_out": {name: {"change": change} for name, change in changes.items()}}
        Path(settings.output_dir, "summary.json").write_text(json.dumps(held_out))

    monkeypatch.setattr("lazyorpo_lib.trials.probe.run_apart", run)
    home = probe(tiny(tmp_path, or_weight=0.3, learning_rate=3e-3), steps=5)
    out = read(home, "probe.json")
    assert [(run["or_weight"], run["learning_rate"]) for run in out["runs"]] == [
        (0.3, 3e-3), (0.3, 1e-3), (0.3, 9e-3), (0.1, 3e-3), (0.9, 3e-3),
    ]  # fmt: skip
    assert out["recommended"] == {"or_weight": 0.9, "learning_rate": 3e-3}
    assert "Recommended: --or-weight 0.9 --learning-rate 0.003" in (home / "probe.md").read_text()
    assert (home / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_a_trial_whose_loss_is_no_number_recommends_nothing(tmp_path, monkeypatch):
    def run(settings, show):
        Path(settings.output_dir).mkdir(parents=True)
        figures = {"accuracy": {"change": 0.0}}
        if settings.learning_rate < limit:
            figures |= {name: {"change": 0.1} for name in ("log_odds_ratio", "nll")}
        Path(settings.output_dir, "summary.json").write_text(json.dumps({"held_out": figures}))

    monkeypatch.setattr("lazyorpo_lib.trials.probe.run_apart", run)
    limit = 5e-3
    home = probe(tiny(tmp_path / "a", learning_rate=3e-3), steps=5)
    assert len(read(home, "probe.json")["runs"]) == 4
    limit = 0
    with pytest.raises(UserError, match="no longer a number: lower learning_rate"):
        probe(tiny(tmp_path / "b", learning_rate=3e-3), steps=5)


@pytest.mark.parametrize("failing", ["probe.json", "probe.md", "probe.png"])
def test_a_full_disk_under_what_a_probe_writes_is_one_sentence(tmp_path, monkeypatch, failing):
    def write(path, data):
        if path.name == failing:
            raise OSError(28, "No space left on device", str(path))

    for module in ("trials.runs", "results.live"):
        monkeypatch.setattr(f"lazyorpo_lib.{module}.write_atomically", write)
    (tmp_path / "probe").mkdir()
    with pytest.raises(UserError, match="Nothing more can be written to .*probe.*run this again"):
        write_up(tmp_path / "probe", "trial", [{"trial": "a", "x": 1.0}], {"x": "x"}, {"said": []})
