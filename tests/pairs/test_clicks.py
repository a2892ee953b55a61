"""clicks.py: known values of the test, sides that tell nothing, undo, any number of sittings."""

import json
from pathlib import Path

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.pairs import clicks
from lazyorpo_lib.pairs.clicks import ClickPanel, Clicks, interval, questions, sign_test, verdict


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "wins,losses,p",
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 5, 1),
        (10, 0, 0.001953),
        (8, 2, 0.109375),
        (15, 5, 0.041389),
        (2, 8, 0.109375),
    ],
)
def test_the_sign_test_has_its_known_values(wins, losses, p):
    assert sign_test(wins, wins + losses) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize(
    "wins,n,low,high",
    [
        (10, 20, 0.2720, 0.7280),
        (0, 10, 0, 0.3085),
        (10, 10, 0.6915, 1),
        (9, 10, 0.5550, 0.9975),
        (1, 1, 0.025, 1),
    ],
)
def test_the_interval_is_the_exact_one(wins, n, low, high):
    assert interval(wins, n) == pytest.approx((low, high), abs=1e-4)


def test_thousands_of_clicks_are_no_overflow():
    assert 0 < sign_test(5200, 10000) < 1e-3 and sign_test(30000, 30000) == 0
    assert interval(5200, 10000) == pytest.approx((0.5101, 0.5298), abs=2e-4)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    said = {"base": [f"b{i}" for i in range(40)] + ["same"], "tuned": [f"t{i}" for i in range(40)] + ["same"]}
    kept = {"prompts": [f"q{i}" for i in range(41)]}
    kept |= {when: {"answers": said[who]} for when, who in (("before", "base"), ("after", "tuned"))}
    (tmp_path / "run" / "held_out.json").write_text(json.dumps(kept))
    (tmp_path / "run" / "settings.json").write_text("{}")
    return str(tmp_path / "run")


def test_a_run_gives_the_prompts_that_both_models_answered_differently(run):
    asked = questions(run)
    assert len(asked) == 40 and asked[3]["answers"] == {"base": "b3", "tuned": "t3"}


@pytest.mark.parametrize(
    "row",
    [{"prompt": "q", "response_a": "x", "response_b": "y"}, {"prompt": "q", "chosen": "x", "rejected": "y"}],
)
def test_a_file_with_two_answers_a_row_is_judged_without_its_label(row):
    with open("two.jsonl", "w") as file:
        file.write(json.dumps(row) + "\n" + json.dumps({"prompt": "alone"}) + "\n")
    (asked,) = questions("two.jsonl")
    assert list(asked["answers"].values()) == ["x", "y"] and asked["prompt"][0]["content"] == "q"


def judge(sitting, better=lambda found: "left", times=100):
    seen = []
    while len(seen) < times and (found := sitting.next()):
        seen.append(found)
        sitting.click(better(found))
    return seen


def test_sides_and_order_are_random_and_of_the_seed_alone(run):
    def sides(seed, file):
        return [(found["item"], found["whose"][0]) for found in judge(Clicks(run, file, seed))]

    first = sides(1, "a.jsonl")
    assert 8 < [who for _, who in first].count("tuned") < 32
    asked = [Clicks(run).asked[item]["prompt"] for item, _ in sides(42, "d.jsonl")]
    assert asked != sorted(asked, key=lambda prompt: int(prompt[0]["content"][1:]))
    assert sides(1, "b.jsonl") == first != sides(2, "c.jsonl")


def test_any_number_of_sittings_go_on_with_what_is_unseen_also_after_a_cut(run):
    first = judge(Clicks(run), times=15)
    with open("clicks.jsonl", "ab") as file:
        file.write(b'{"by": "lazyorpo cl')  # a kill while a click was written
    rest = judge(Clicks(run))
    assert len({found["item"] for found in first + rest}) == 40 == len(first) + len(rest)
    assert Clicks(run).next() is None and Clicks(run).left() == []


def test_undo_takes_the_last_click_back_and_no_more_than_there_are(run):
    sitting = Clicks(run)
    sitting.click("undo")
    assert len(sitting.left()) == 40 and not sitting.file.exists()
    first, second = judge(sitting, times=2)
    sitting.click("undo")
    assert sitting.next() == second and len(sitting.left()) == 39
    sitting.click("undo")
    sitting.click("undo")
    assert sitting.next() == first and len(sitting.left()) == 40


def test_the_blind_test_counts_whose_answers_were_better(run):
    sitting = Clicks(run)
    judge(sitting, lambda found: ("left", "right")[found["whose"].index("tuned")], 15)
    judge(sitting, lambda found: ("left", "right")[found["whose"].index("base")], 5)
    judge(sitting, lambda found: "tie", 3)
    said = verdict([*sitting.judged().values()])
    assert "tuned was better in 15, base in 5, the same in 3 of 23" in said
    assert "75% for tuned, 95 % interval 51% to 91%" in said and "p = 0.0414, more than chance" in said


def test_few_clicks_are_within_chance_and_none_are_no_test():
    assert "no test" in verdict([])


def test_somebody_elses_file_is_no_file_of_clicks(run):
    with open("clicks.jsonl", "w") as file:
        file.write('{"prompt": "mine"}\n')
    with pytest.raises(UserError, match="no file of clicks"):
        Clicks(run)
    with pytest.raises(UserError, match="folder that is not there"):
        Clicks(run, "none/clicks.jsonl")
    with pytest.raises(UserError, match="nothing to choose from"):
        questions("clicks.jsonl")


def test_a_run_that_is_damaged_is_a_sentence(run):
    Path(run, "held_out.json").write_text('{"before": 1, "after": 2}')
    with pytest.raises(UserError, match="cannot be read"):
        questions(run)


def test_the_widget_shows_both_answers_and_never_whose_they_are(run):
    pytest.importorskip("ipywidgets")
    panel = ClickPanel(run)
    for _ in range(40):
        texts = [side.value for side in panel.sides.values()]
        shown = panel.prompt.value + "".join(texts) + panel.status.value
        assert "base" not in shown and "tuned" not in shown
        assert {text.split(">")[1][0] for text in texts} == {"b", "t"}
        panel.buttons["left"].click()
    assert "tuned was better in" in panel.status.value and panel.buttons["left"].disabled
    panel.buttons["undo"].click()
    assert panel.status.value == "1 to go." and not panel.buttons["left"].disabled


def test_keys_do_what_the_buttons_do(run):
    pytest.importorskip("ipywidgets")
    panel = ClickPanel(run)
    for keys, left in (("1", 39), ("2", 38), ("0", 37), ("u", 38), ("x ", 38), ("12U", 37)):
        panel.keys.value = keys
        assert (len(panel.clicks.left()), panel.keys.value) == (left, "")
    assert sorted(row["winner"] for row in panel.clicks.judged().values()) == ["left", "left", "right"]


def test_what_is_shown_is_text_and_no_markup(tmp_path):
    pytest.importorskip("ipywidgets")
    row = {"prompt": "<b>q", "response_a": "<script>x", "response_b": "y & z"}
    Path("two.jsonl").write_text(json.dumps(row))
    panel = ClickPanel("two.jsonl")
    shown = panel.prompt.value + panel.sides["left"].value + panel.sides["right"].value
    assert "<script" not in shown and "&lt;b&gt;q" in shown and "y &amp; z" in shown


def test_without_ipywidgets_it_is_a_sentence(run, monkeypatch):
    monkeypatch.setattr(clicks, "ipywidgets", None)
    with pytest.raises(UserError, match="pip install ipywidgets"):
        ClickPanel(run)
