"""Rows of every shape become the right pairs, every other row is accounted for, and bad files get one
sentence."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo import data
from lazyorpo_lib.orpo.data import Pair, Report, clean, json_safe, split_held_out
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.dataset import open_rows
from lazyorpo_lib.rows.messages import BadRow
from lazyorpo_lib.rows.shapes import to_pair


def turn(role, content):
    return {"role": role, "content": content}


U, A, S = (lambda text, role=role: turn(role, text) for role in ("user", "assistant", "system"))
GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def cleaned(raw, columns=""):
    dropped = []
    pairs, report = clean(candidates(list(enumerate(raw)), columns), on_drop=dropped.append)
    return list(pairs), report, dropped


# ---- shapes: (row, shape, prompt, chosen, rejected)

SHAPES = {
    "prompt inside both message lists": (
        {"chosen": [U("Hi"), A("Hello"), U("Why?"), A("Yes")],
         "rejected": [U("Hi"), A("Hello"), U("Why?"), A("No")]},
        "messages", [U("Hi"), A("Hello"), U("Why?")],
    ),
    "a prompt column beside it does not double it": (
        {"prompt": "Why?", "chosen": [U("Why?"), A("Yes")], "rejected": [U("Why?"), A("No")]},
        "messages", [U("Why?")],
    ),
    "a prompt column with the turns before it is not lost": (
        {"prompt": [S("Be kind."), U("Why?")], "chosen": [U("Why?"), A("Yes")],
            "rejected": [U("Why?"), A("No")]},
        "messages", [S("Be kind."), U("Why?")],
    ),
    "prompt and text": ({"prompt": "Why?", "chosen": "Yes", "rejected": "No"}, "prompt", [U("Why?")]),
    "prompt text and assistant messages": (
        {"prompt": "Why?", "chosen": [A("Yes")], "rejected": [A("No")]}, "prompt", [U("Why?")],
    ),
    "prompt messages and assistant messages": (
        {"prompt": [S("Be kind."), U("Why?")], "chosen": [A("Yes")], "rejected": [A("No")]},
        "prompt", [S("Be kind."), U("Why?")],
    ),
    "prompt messages and text": (
        {"prompt": [U("Hi"), A("Hello"), U("Why?")], "chosen": "Yes", "rejected": "No"},
        "prompt", [U("Hi"), A("Hello"), U("Why?")],
    ),
    "a system turn inside the answers joins the prompt column": (
        {"prompt": "Why?", "chosen": [S("Be kind."), A("Yes")], "rejected": [S("Be kind."), A("No")]},
        "prompt", [S("Be kind."), U("Why?")],
    ),
    "instruction and input": (
        {"instruction": "Translate.", "input": "Pourquoi ?", "chosen": "Yes", "rejected": "No"},
        "instruction", [U("Translate.\n\nPourquoi ?")],
    ),
    "question and system": (
        {"system": "Be kind.", "question": "Why?", "chosen": "Yes", "rejected": "No"},
        "question", [S("Be kind."), U("Why?")],
    ),
    "an empty system column adds no turn": (
        {"system": " ", "input": "Why?", "chosen": "Yes", "rejected": "No"}, "input", [U("Why?")],
    ),
    "a system column beside messages that have a system turn": (
        {"system": "Other.", "chosen": [S("Be kind."), U("Why?"), A("Yes")],
         "rejected": [S("Be kind."), U("Why?"), A("No")]},
        "messages", [S("Be kind."), U("Why?")],
    ),
    "question, context and chosen_response": (
        {"question": "Why?", "context": "It rained.", "chosen_response": "Yes", "rejected_response": "No"},
        "question", [U("Why?\n\nIt rained.")],
    ),
    "response_j and response_k": (
        {"question": "Why?", "response_j": "Yes", "response_k": "No"}, "question", [U("Why?")],
    ),
    "messages with both styles of names": (
        {"prompt": [{"role": None, "content": None, "from": "human", "value": "Why?"}],
         "chosen": "Yes", "rejected": "No"},
        "prompt", [U("Why?")],
    ),
    "transcripts": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Yes",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No"},
        "transcript", [U("Hi"), A("Hello"), U("Why?")],
    ),
    "transcripts with the prompt in a column too": (
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "\n\nHuman: Why?\n\nAssistant: Yes",
         "rejected": "\n\nHuman: Why?\n\nAssistant: No"},
        "transcript", [U("Why?")],
    ),
    "a transcript as the prompt alone": (
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Yes", "rejected": " No"}, "prompt",
        [U("Why?")],
    ),
    "conversations with one message a side": (
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Why?"}],
         "chosen": {"from": "gpt", "value": "Yes"}, "rejected": {"from": "gpt", "value": "No"}},
        "conversations", [S("Be kind."), U("Why?")],
    ),
    "conversations with text a side": (
        {"conversations": [turn("Human", "Why?")], "chosen": "Yes", "rejected": "No"}, "conversations",
        [U("Why?")],
    ),
}  # fmt: skip


def test_answer_that_is_itself_a_dialogue_is_left_whole():
    chosen, rejected = "Human: Hi\n\nAssistant: Hello", "Human: Hi\n\nAssistant: Go"
    [pair], _, _ = cleaned([{"prompt": "Write a dialogue.", "chosen": chosen, "rejected": rejected}])
    assert (pair.prompt, pair.chosen, pair.rejected) == ((U("Write a dialogue."),), chosen, rejected)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_recognised(name):
    row, shape, prompt = SHAPES[name]
    assert to_pair(7, row) == Pair(7, tuple(prompt), "Yes", "No")
    assert to_pair(7, row).shape == shape
    assert cleaned([row])[1].as_dict()["shapes"] == {shape: 1}


def test_columns_map_anything():
    row = {
        "q": "Why?",
        "best of two": "Yes",
        "worst": [A("No")],
        "sys": "Be kind.",
        "chosen": "something else",
    }
    pairs, _, _ = cleaned([row], columns=" prompt = q, chosen=best of two ,rejected=worst,system=sys")
    assert pairs == [Pair(0, (S("Be kind."), U("Why?")), "Yes", "No")]


@pytest.mark.parametrize(
    "columns", ["prompt", "prompt=", "margin=wide", "prompt=q,chosen=,rejected=w",
        "prompt=q,chosen=b,rejected=w,x=y",
        "a=b=c",
                "prompt=q,chosen=b,rejected=w,", "prompt=q,prompt=q,chosen=b,rejected=w", ";"],
)  # fmt: skip
def test_bad_mapping_is_the_users_mistake(columns):
    with pytest.raises(UserError, match="prompt=…,chosen=…,rejected=…"):
        cleaned([GOOD], columns=columns)


def test_mapped_column_that_does_not_exist_names_those_that_do():
    with pytest.raises(
        UserError, match="chosen=best, but the columns found are 'prompt', 'chosen', 'rejected'"
    ):
        cleaned([GOOD], columns="prompt=prompt,chosen=best,rejected=rejected")


def test_unknown_shape_names_the_columns_and_the_way_out():
    with pytest.raises(UserError, match="'text', 'label'; a row needs a prompt, a better answer"):
        cleaned([{"text": "Why?", "label": 1}] * 300)
    with pytest.raises(UserError, match="rows are not objects"):
        cleaned([1, None, "text"])


def test_unknown_rows_among_known_ones_are_dropped():
    pairs, report, _ = cleaned([{"text": "Why?"}] * 99 + [GOOD])
    assert (len(pairs), report.dropped) == (1, {"unknown_shape": 99})


# ---- reasons

REASONS = [
    (None, "malformed"), ([], "malformed"), ("text", "malformed"),
    (GOOD | {None: ["a cell too many"]}, "malformed"),
    (GOOD | {"chosen": 5}, "malformed"), (GOOD | {"chosen": b"Yes"}, "malformed"),
    (GOOD | {"prompt": 1.5}, "malformed"),
    (GOOD | {"chosen": [5]}, "malformed"), (GOOD | {"chosen": [{"role": "assistant"}]}, "malformed"),
    (GOOD | {"chosen": [turn("assistant", [{"type": "image"}])]}, "image_part"),
    (GOOD | {"prompt": [turn("user", ["Why?", {"type": "input_audio"}])]}, "audio_part"),
    (GOOD | {"prompt": [turn("user", [{"type": "hologram"}])]}, "unknown_part"),
    (GOOD | {"chosen": "[{'role': 'user', 'content': "}, "messages_as_text"),
    ({}, "unknown_shape"), ({"chosen": "Yes", "rejected": "No"}, "unknown_shape"),
    ({"prompt": "Why?"}, "unknown_shape"),
    (GOOD | {"chosen": [turn("narrator", "Yes")]}, "unknown_role"),
    (GOOD | {"prompt": [turn("tool", "x")]}, "no_user_turn"),
    (GOOD | {"chosen": "\ud800"}, "invalid_text"), (GOOD | {"prompt": "Why \udfff?"}, "invalid_text"),
    ({"chosen": [U("Why?"), A("Yes")], "rejected": [U("Why so?"), A("No")]}, "prompts_differ"),
    ({"chosen": [U("Why?"), A("Yes")], "rejected": "No", "prompt": "Why?"}, "prompts_differ"),
    (GOOD | {"prompt": ""}, "empty_prompt"), (GOOD | {"prompt": None}, "empty_prompt"),
    (GOOD | {"prompt": []}, "empty_prompt"),
    (GOOD | {"prompt": float("nan")}, "empty_prompt"),
    (GOOD | {"prompt": [S("Be kind."), U(" \n")]}, "empty_prompt"),
    (GOOD | {"prompt": [U("Why?"), A("Because.")]}, "no_user_turn"),
    (GOOD | {"prompt": [S("Be kind.")]}, "no_user_turn"),
    (GOOD | {"chosen": [U("Why?")]}, "no_answer"),
    (GOOD | {"rejected": {"from": "human", "value": "Why?"}}, "no_answer"),
    (GOOD | {"chosen": ""}, "empty_answer"), (GOOD | {"chosen": None}, "empty_answer"),
    (GOOD | {"chosen": []}, "empty_answer"),
    (GOOD | {"rejected": float("nan")}, "empty_answer"), (GOOD | {"rejected": [A(" ")]}, "empty_answer"),
    (GOOD | {"chosen": "Yes,\n I do", "rejected": " Yes,\n I do\n"}, "identical_answers"),
    (GOOD | {"rejected": "[{'role': 'user', 'content': 'Hm"}, "messages_as_text"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REASONS)
def test_bad_row_is_dropped_with_its_reason(row, reason):
    with pytest.raises(BadRow, match=f"^{reason}$"):
        to_pair(0, row)
    pairs, report, dropped = cleaned([GOOD, row])
    assert ([pair.index for pair in pairs], report.read, report.kept, report.dropped) == (
        [0],
        2,
        1,
        {reason: 1},
    )
    assert [(drop["index"], drop["reason"]) for drop in dropped] == [(1, reason)]
    json.dumps(dropped, allow_nan=False, ensure_ascii=False).encode()


def test_every_reason_is_documented():
    documented = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for reason in {reason for _, reason in REASONS} | {"duplicate", "contradiction"}:
        assert f"`{reason}`" in documented


def test_duplicates_keep_the_first_and_contradictions_keep_none():
    swapped = {"prompt": "Why?", "chosen": "No.", "rejected": "Because. "}
    other = {"prompt": "How?", "chosen": "So.", "rejected": "Thus."}
    pairs, report, dropped = cleaned([GOOD, other, swapped, dict(other), GOOD])
    assert [pair.index for pair in pairs] == [1]
    assert report.dropped == {"contradiction": 3, "duplicate": 1}
    assert [drop["index"] for drop in dropped] == [0, 2, 3, 4]


def test_same_answers_under_another_prompt_do_not_contradict():
    assert len(cleaned([GOOD, {"prompt": "How?", "chosen": "No.", "rejected": "Because."}])[0]) == 2


def test_control_characters_and_odd_scripts_stay_as_they_are():
    answers = "a\0b\x1b[0m", "مرحبا ‏👩‍👩‍👧 <|im_end|> </s>"
    [pair], _, _ = cleaned([{"prompt": " Why? ", "chosen": answers[0], "rejected": answers[1]}])
    assert (pair.prompt, pair.chosen, pair.rejected) == ((U(" Why? "),), *answers)


def test_rows_that_can_be_read_only_once_are_refused():
    for once in (iter([(0, GOOD)]), (row for row in [(0, GOOD)])):
        with pytest.raises(TypeError, match="read twice"):
            clean(candidates(once))
        with pytest.raises(TypeError, match="read twice"):
            clean(once)


# ---- the report


def test_report_figures_and_a_pair_dropped_by_the_caller():
    raw = [{"prompt": "p" * 10, "chosen": "c" * n, "rejected": "r" * 50} for n in range(1, 101)]
    dropped = []
    pairs, report = clean(candidates(list(enumerate(raw))), on_drop=dropped.append)
    for pair in pairs:
        if len(pair.chosen) > 90:
            report.drop(pair.index, "overlong", pair)
    figures = report.as_dict()
    assert (figures["read"], figures["kept"], figures["dropped"]) == (100, 90, {"overlong": 10})
    assert figures["chosen_longer"] == pytest.approx(40 / 90)
    assert figures["shapes"] == {"prompt": 90}
    assert dropped[0]["row"] == {
        "index": 90,
        "prompt": [U("p" * 10)],
        "chosen": "c" * 91,
        "rejected": "r" * 50,
        "shape": "prompt",
    }
    json.dumps(figures, allow_nan=False)


def test_report_in_one_line():
    report = Report(read=10_000)
    report.dropped.update(identical_answers=300, overlong=288)
    assert str(report) == "kept 9,412 of 10,000 pairs; dropped 300 identical answers, 288 overlong"
    assert Report().as_dict()["kept"] == 0 == Report().as_dict()["chosen_longer"]


def test_json_safe_takes_any_object():
    class Hostile:
        def __str__(self):
            raise RuntimeError

    cycle = []
    cycle.append(cycle)
    odd = {"nan": float("nan"), None: b"\xff", 3: "\ud800", "when": datetime.date(2024, 3, 12), "set": {1},
           "big": 10**5000, (1,): Hostile(), "cycle": cycle}  # fmt: skip
    text = json.dumps(json_safe(odd), allow_nan=False, ensure_ascii=False).encode().decode()
    assert json.loads(text)["when"] == "2024-03-12"
    assert json.loads(text)["None"] == "\\xff"
    assert json.loads(text)["nan"] == "nan"


# ---- held out


def numbered(count, prompts):
    return [Pair(n, (U(f"prompt {n % prompts}"),), f"yes {n}", f"no {n}") for n in range(count)]


def test_no_prompt_crosses_and_row_order_does_not_matter():
    pairs = numbered(300, 100)
    train, held_out = split_held_out(pairs, 40, 7)
    assert sorted(train + held_out) == list(range(300))
    assert 38 <= len(held_out) <= 40
    asked = {pairs[i].prompt[0]["content"] for i in held_out}
    assert asked.isdisjoint(pairs[i].prompt[0]["content"] for i in train)
    shuffled = pairs[::-1]
    assert {shuffled[i].index for i in split_held_out(shuffled, 40, 7)[1]} == {
        pairs[i].index for i in held_out
    }
    assert split_held_out(pairs, 40, 8)[1] != held_out


def test_white_space_does_not_let_a_prompt_cross():
    pairs = [Pair(n, (U("same" + " " * n),), "yes", "no") for n in range(10)] + numbered(40, 40)
    train, held_out = split_held_out(pairs, 10, 1)
    assert set(range(10)) <= set(train) or set(range(10)) <= set(held_out)


@pytest.mark.parametrize(
    ("count", "asked", "held"), [(320, 64, 64), (100, 64, 20), (9, 64, 1), (4, 64, 0), (50, 0, 0), (0, 5, 0)]
)
def test_at_most_a_fifth_is_held_out(count, asked, held):
    assert len(split_held_out(numbered(count, 10**6), asked, 42)[1]) == held


@pytest.mark.parametrize(
    ("total", "held"),
    [(4, 0), (40, 8), (800, 160), (1925, 385), (7000, 385), (50_000, 500), (200_000, 2000), (10**7, 2000)],
)
def test_auto_holds_out_in_proportion(total, held):
    assert data.held_out_of(total, "auto") == held
    assert data.held_out_of(total, 64) == min(64, total // 5) and data.held_out_of(total, 0) == 0


def test_how_well_an_accuracy_is_known_is_said():
    assert data.about_split(range(640), range(160)) == (
        "640 to train on, 160 held out; an accuracy on them is known to about ±8 points."
    )
    assert data.about_split(range(4), []) == "4 to train on, 0 held out."


def test_one_prompt_for_all_leaves_nothing_to_hold_out():
    assert split_held_out(numbered(50, 1), 10, 42) == (list(range(50)), [])


# ---- real data, and much of it


def test_demo_pairs_are_clean_and_enough():
    pairs, report = clean(candidates(open_rows("demo")))
    pairs = list(pairs)
    assert report.dropped == {}
    assert len(pairs) >= 240
    assert len({pair.prompt[-1]["content"] for pair in pairs}) == len(pairs)
    assert len(split_held_out(pairs, 40, 42)[1]) == 40


def test_real_multi_turn_sample():
    sample = Path(__file__).parents[3] / "shared" / "data" / "preference-sample-en.json"  # 300 pairs
    if not sample.is_file():
        pytest.skip("the shared sample of real pairs is not here")
    pairs, report = clean(candidates(open_rows(str(sample))))
    pairs = list(pairs)
    assert (report.read, report.kept, report.dropped) == (300, 295, {"duplicate": 5})
    assert report.shapes == {"conversations": 295}
    assert any(len(pair.prompt) > 4 for pair in pairs)
    assert {pair.prompt[0]["role"] for pair in pairs} == {"system", "user"}


def test_importing_it_loads_nothing_heavy():
    code = "import sys, lazyorpo_lib.orpo.data, lazyorpo_lib.rows.dataset, lazyorpo_lib.rows.candidates; "
    code += "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


MILLION = """
import os, resource, time
from lazyorpo_lib.orpo.data import clean
from lazyorpo_lib.rows.candidates import candidates
class Rows:
    def __iter__(self):
        for n in range(1_000_000):
            words = f"{n % 950_000} "
            yield n, {"prompt": words + "p" * 300, "chosen": words + "c" * 500, "rejected": "r" * 500}
start, dropped = time.time(), 0
def on_drop(row):
    global dropped
    dropped += 1
pairs, report = clean(candidates(Rows()), on_drop=on_drop)
kept = sum(1 for _ in pairs)
assert kept == report.kept == report.read - dropped, str(report)
if os.path.exists("/proc/self/status"):  # elsewhere a child's peak begins at its parent's
    with open("/proc/self/status") as file:
        gib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
else:
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{gib:.3f} {time.time() - start:.1f} {report}")
"""


@pytest.mark.slow
def test_a_million_pairs_stream_under_one_and_a_half_gib():
    out = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=True).stdout
    print(out)
    assert float(out.split()[0]) < 1.5
