"""compare.py: what differs between runs, told fairly and only where it can be told."""

import json

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.results import live
from lazyorpo_lib.results.compare import compare
from lazyorpo_lib.settings import DEFAULTS
from tests.results.test_card import write_run


@pytest.fixture
def copy(tmp_path):
    """A function that makes the folder of another run."""
    return lambda name, **options: write_run(tmp_path / name, **options)


def test_compare_shows_what_differs_and_the_results(copy):
    a = copy("a", settings={"or_weight": 0.1})
    b = copy("b", settings={"or_weight": 0.5, "output_dir": "/elsewhere"}, summary={"training_minutes": 7.0})
    found = compare([a, b])
    assert found["settings"] == {"or_weight": [0.1, 0.5]}
    assert [row["accuracy"] for row in found["results"]] == ["0.800 (0.675 to 0.900)"] * 2
    assert found["results"][1]["training minutes"] == "7.0"
    assert "| or_weight | 0.1 | 0.5 |" in found["markdown"] and found["png"].startswith(b"\x89PNG")


def held_out(accuracies):
    return {"columns": ["nll", "accuracy"], "after": {"pairs": [[9.0, a] for a in accuracies]}}


def test_runs_on_the_same_held_out_pairs_are_compared_pair_by_pair(copy):
    a = copy("a", held_out=held_out([0.0] * 10 + [1.0] * 10))
    b = copy("b", held_out=held_out([1.0] * 20))
    c = copy("c", settings={"seed": 1}, held_out=held_out([1.0] * 20))
    rows = compare([a, b, c])["results"]
    name = "accuracy minus the first run's"
    assert rows[1][name].startswith("0.500 (0.") and rows[2][name] == "other held-out pairs"
    assert f"| {name} |" in compare([a, b])["markdown"]
    d = copy("d", held_out=held_out([1.0] * 19 + [None]))  # a pair whose loss was no number
    e = copy("e", held_out=held_out([None] * 20))
    assert [row[name][:5] for row in compare([a, d, e])["results"][1:]] == ["0.526", "–"]


def test_names_of_runs_and_values_are_plain_text_in_the_tables(copy):
    text = compare([copy("a|*b*"), copy("c", settings={"columns": "<b>|x"})])["markdown"]
    assert "| a&#124;&#42;b&#42; |" in text and "&#60;b&#62;&#124;x" in text and "<b>" not in text


def test_an_unfinished_run_can_be_compared(copy):
    rows = compare([copy("a"), copy("b", without=("summary.json", "held_out.json"))])["results"]
    assert rows[1]["steps"] == "12, not finished" and rows[1]["accuracy minus the first run's"] == "–"


def test_runs_of_one_name_are_told_apart_and_one_run_is_no_two(copy, tmp_path):
    (tmp_path / "x").mkdir()
    a, b = copy("a"), copy("x/a")
    assert compare([a, b])["results"][1]["run"] == "x/a"
    with pytest.raises(UserError, match="twice"):
        compare([a, a])


def test_picture_of_runs_has_a_line_for_each(tmp_path):
    rows = [{"step": s, "nll": 1.0, "log_odds_ratio": s / 9} for s in range(9)] + [
        {"step": 9, "eval_nll": 1.0}
    ]
    one = live.draw_runs({"$a$": rows}, tmp_path / "one.png")
    two = live.draw_runs({"$a$": rows, "b": [row | {"log_odds_ratio": 1.0} for row in rows], "empty": []})
    assert (tmp_path / "one.png").read_bytes() == one and one != two


def test_settings_of_a_run_that_no_longer_exist_are_shown_too(copy):
    a = copy("a")
    kept = json.loads((a / "settings.json").read_text())
    kept["settings"] = dict(DEFAULTS) | {"gone": 1}
    (a / "settings.json").write_text(json.dumps(kept))
    assert compare([a, copy("b")])["settings"]["gone"] == [1, None]


@pytest.mark.parametrize(
    "place", ["/proc/compare.png", "/dev/null/compare.png", "no/such/folder/compare.png"]
)
def test_a_picture_that_cannot_be_written_is_one_sentence(copy, place):
    with pytest.raises(UserError, match="cannot be used|can be written"):
        compare([copy("a"), copy("b")], place)


def test_a_full_disk_under_the_picture_is_one_sentence(copy, tmp_path, monkeypatch):
    def fails(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(live, "write_atomically", fails)
    with pytest.raises(UserError, match="Nothing more can be written to .*No space left.*compare again"):
        compare([copy("a"), copy("b")], tmp_path / "compare.png")


def test_one_run_and_a_folder_that_is_no_run_are_told(copy, tmp_path):
    with pytest.raises(UserError, match="1 run was given"):
        compare([copy("a")])
    with pytest.raises(UserError, match="not the folder of a run"):
        compare([tmp_path / "a", tmp_path / "none"])
