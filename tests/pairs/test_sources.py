"""sources.py: thumbs, scores and ranks are read and never guessed; each kind of rows gives its pairs."""

from itertools import product

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import Pair
from lazyorpo_lib.pairs import clicks, sources
from lazyorpo_lib.pairs.sources import LACKING, row_of
from lazyorpo_lib.rows.columns import parse_columns
from lazyorpo_lib.rows.shapes import to_pair


def read(rows, columns="", **how):
    """What the rows are, [(prompt, chosen, rejected)], what came to nothing, and the rows of each pair."""
    kind, found, left = sources.read(list(enumerate(rows)), parse_columns(columns), **how)
    sides = [(pair.prompt[-1]["content"], pair.chosen, pair.rejected) for pair, _ in found]
    return kind, sides, dict(left), [indexes for _, indexes in found]


UP = ["up", "👍", "👍🏽", "+1", 1, 1.0, True, "Thumbs up", ":+1:", "yes", "good", "thumbs_up"]
DOWN = ["down", "👎", "-1", -1, 0, False, "thumbs_down", ":-1:", "no", "bad", "Thumbs Down", ":thumbsdown:"]


@pytest.mark.parametrize("up,down", [*product(UP, DOWN[:1]), *product(UP[:1], DOWN)])
def test_thumbs_are_read(up, down):
    assert (sources.thumb(up), sources.thumb(down)) == (1, 0)
    rows = [
        {"prompt": "a", "answer": "a+", "feedback": up},
        {"prompt": "a", "answer": "a-", "feedback": down},
    ]
    assert read(rows)[:2] == ("thumbs", [("a", "a+", "a-")])


@pytest.mark.parametrize("cell", ["", None, "meh", 2, "upper", float("nan")])
def test_what_is_no_thumb_is_not_guessed(cell):
    assert sources.thumb(cell) is None


def rated(prompt, answer, **mark):
    return {"prompt": prompt, "completion": answer, **mark}


THUMBS = [
    rated("a", "a+", label=True), rated("b", "b-", label=False), rated("a", "a-", label=False),
    rated("a", "a--", label=False), rated("c", "c+", label=True), rated("d", "d?", label=None),
    rated("e", "same", label=True), rated("e", "same", label=False),
]  # fmt: skip


def test_up_stands_against_down_of_the_same_prompt_and_the_rest_is_counted():
    kind, sides, left, rows = read(THUMBS)
    assert (kind, sides, rows) == ("thumbs", [("a", "a+", "a-"), ("a", "a+", "a--")], [[0, 2], [0, 3]])
    assert left == {
        "up without a down": 1, "down without an up": 1, "no clear thumb or score": 1, "identical_answers": 1,
    }  # fmt: skip


def test_what_is_lacking_beside_a_thumb_up_is_for_the_model_if_asked():
    _, sides, left, _ = read(THUMBS, sample=True)
    assert sides == [("a", "a+", "a-"), ("a", "a+", "a--"), ("c", "c+", LACKING)]
    assert left["down without an up"] == 1


@pytest.mark.parametrize(
    "kind,name,marks",
    [
        ("scores", "score", [3, 9, 1]), ("ranks", "rank", [2, 1, 3]), ("scores", "rating", ["3", "9", "1"]),
        ("scores", "Overall Score", [-3.5, 0.5, -9]), ("scores", "votes", [0, 1, 0]),
    ],
)  # fmt: skip
def test_the_best_answer_stands_against_the_worst(kind, name, marks):
    rows = [rated("a", f"r{i}", **{name: mark}) for i, mark in enumerate(marks)]
    rows += [rated("b", f"{i}", **{name: 1}) for i in range(2)] + [rated("c", "alone", **{name: 1})]
    found, sides, left, _ = read(rows)
    assert found == kind and sides[0] == ("a", "r1", "r2" if marks[2] != marks[0] else "r0")
    assert left == {"tie": 2, "only one answer": 1}


def test_a_margin_leaves_out_what_is_too_close():
    rows = [rated(p, str(n), score=n) for p, most in (("a", 2), ("b", 5)) for n in (1, most)]
    _, sides, left, _ = read(rows, "margin=2")
    assert sides == [("b", "5", "1")] and left == {"tie": 2}


def test_what_dataset_reads_by_itself_is_read_as_it_does():
    scored = [
        {"prompt": "a", "completions": ["x", "y", "z"], "scores": [2, 3, 1]},
        {"prompt": "b", "completions": ["x", "y"], "scores": [2, 2]},
    ]
    assert read(scored)[:3] == ("pairs", [("a", "y", "z")], {"tie": 1})
    lists = [{"question": "a", "correct_answers": ["x", "y"], "incorrect_answers": ["z", "w"]}]
    assert read(lists) == ("pairs", [("a", "x", "z"), ("a", "y", "w")], {}, [[0], [0]])


def test_columns_name_what_is_called_otherwise():
    rows = [{"q": "a", "said": "good", "stars": 5}, {"q": "a", "said": "poor", "stars": 2}]
    assert read(rows, "prompt=q,chosen=said,winner=stars")[:2] == ("scores", [("a", "good", "poor")])
    assert read(rows, "prompt=q,chosen=said")[:2] == ("single", [("a", x, LACKING) for x in ("good", "poor")])


def test_an_answer_that_somebody_did_not_like_is_never_taken_for_a_good_one():
    assert read(THUMBS, "prompt=prompt,chosen=completion")[0] == "thumbs"


def test_answers_are_messages_too_and_keep_what_is_beside_them():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ask = [{"role": "user", "content": "a"}]
    said = [{"role": "assistant", "content": "b", "tool_calls": [call]}]
    rows = [
        {"messages": ask + said, "tools": [call], "label": True},
        {"messages": [*ask, {"role": "assistant", "content": "c"}], "tools": [call], "label": False},
    ]
    (pair, _), *_ = sources.read(list(enumerate(rows)), {})[1]
    assert (pair.chosen_with, pair.rejected, pair.tools) == ({"tool_calls": [call]}, "c", (call,))
    with pytest.raises(UserError, match="1 tools or reasoning, which are not sampled"):
        read(rows[:1], sample=True)
    row = row_of(pair, {"rows": [0, 1]})
    assert to_pair(0, row) == pair
    assert read([{"prompt": ask, "chosen": [*ask, {"role": "assistant", "content": "b"}]}])[1] == [
        ("a", "b", LACKING)
    ]


@pytest.mark.parametrize(
    "text", ['[{"role": "assistant", "content": "x"}]', "Human: a\n\nAssistant: b", "  x\n", "a\u2028b"]
)
def test_a_text_that_reads_as_something_else_comes_back_as_it_was(text):
    pair = Pair(0, ({"role": "user", "content": text},), text + " ", text + "y")
    assert to_pair(0, row_of(pair, {"rows": [0]})) == pair


def click(prompt, winner, item, left="l", right="r"):
    asked = [{"role": "user", "content": prompt}]
    found = {"item": item, "prompt": asked, "left": left + prompt, "right": right + prompt}
    return {"by": clicks.BY, **found, "whose": ["tuned", "base"], "winner": winner}


def test_a_file_of_clicks_gives_pairs_of_what_was_not_undone():
    rows = [click("a", "left", "1"), click("b", "right", "2"), click("c", "tie", "3")]
    kind, sides, left, indexes = read([*rows, click("d", "left", "4"), click("d", "undo", "4")])
    assert (kind, sides, left) == ("clicks", [("a", "la", "ra"), ("b", "rb", "lb")], {"tie": 1})
    assert indexes == [[0], [1]]
    assert read([*rows, click("…", "left", "5")])[1] == sides  # its end was never written
    assert read([*rows, 5, ["x"]])[1:3] == (sides, {"tie": 1, "malformed": 2})


ONE = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    "rows,named",
    [
        ([ONE | {"label": n} for n in (1, 2)], "'label' says .*1, 2.*: set columns to 'winner=label'"),
        ([ONE | {"label": word} for word in ("toxic", "fine")], "'toxic', 'fine'.*write up or down into it"),
        ([ONE | {"score": "high"}], "'score' says of an answer"), ([ONE | {"score": 1}] * 2, "2 tie"),
        ([{"prompt": "a", "response_a": "b", "response_b": "c"}], "into the column winner|unknown shape"),
        ([{"prompt": "a", "response_a": "b", "response_b": "c", "label": 0}], "into the column winner"),
        ([], "read as single .nothing."),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_a_sentence(rows, named):
    with pytest.raises(UserError, match=named) as error:
        read(rows)
    assert "\n" not in str(error.value)


def test_advice_works_when_it_is_followed():
    rows = [{"prompt": "a", "answer": f"r{n}", "label": n} for n in (1, 2)]
    assert read(rows, "winner=label")[:2] == ("scores", [("a", "r2", "r1")])
    topics = [{"prompt": "a", "answer": "b", "label": "science"}]
    assert read(topics, "prompt=prompt,chosen=answer")[:2] == ("single", [("a", "b", LACKING)])
    assert read([rated("a", "b", label=True)], sample=True)[1] == [("a", "b", LACKING)]
