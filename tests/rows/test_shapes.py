"""The shapes that people have are read without a word, never the wrong way round; advice for others works."""

import json

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import Report, clean
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.columns import fold
from lazyorpo_lib.rows.shapes import BadRow, to_pair


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


U, A, S = (lambda text, role=role: turn(role, text) for role in ("user", "assistant", "system"))
TALK_YES, TALK_NO = [U("Why?"), A("Yes")], [U("Why?"), A("No")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def cleaned(raw, columns=""):
    dropped = []
    pairs, report = clean(candidates(list(enumerate(raw)), columns), on_drop=dropped.append)
    return list(pairs), report, dropped


# ---- names: a prompt, a better and a worse answer, all of them "Why?", "Yes", "No"

NAMES = """
prompt chosen rejected; Prompt Chosen Rejected; PROMPT CHOSEN REJECTED; instruction accepted rejected
instruction output rejected; question answer wrong_answer; question good bad; prompt good_answer bad_answer
prompt preferred dispreferred; prompt preferred_output non_preferred_output; prompt preferred rejected
prompt preferredResponse dispreferredResponse; question response_chosen response_rejected
question response_j response_k; prompt chosen_response rejected_response; prompt chosen-answer rejected-answer
query best_response worst_response; input winner loser; problem correct incorrect; problem correct wrong
question best_answer incorrect_answer; prompt positive negative; prompt pos neg; prompt y_w y_l
prompt better worse; prompt win lose; user_prompt selected rejected; task liked disliked
prompt response rejected_response
prompt completion rejected_completion; user chosen_text rejected_text; request accept reject
post chosen rejected
prompt upvoted_answer downvoted_answer; conversations chosen rejected; context chosen rejected
question chosen_completion rejected_completion; prompt accepted_response rejected_response
"""
NAMES = [tuple(names.split()) for line in NAMES.strip().splitlines() for names in line.split(";")]
ASK = {"conversations": [U("Why?")]}


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_names_are_recognised_in_any_order_of_columns(names, order):
    cells = [(names[0], ASK.get(names[0], "Why?")), (names[1], "Yes"), (names[2], "No"), ("id", 7)]
    row = dict([cells[i] for i in order] + cells[3:])
    pair = to_pair(0, row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((U("Why?"),), "Yes", "No")
    assert pair.used == dict(zip(names, ("prompt", "chosen", "rejected"), strict=True))
    assert pair.unused == ("id",)


# ---- structures

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ROWS = {
    "the prompt inside both sides, whatever they are called": {
        "preferred": TALK_YES,
        "dispreferred": TALK_NO,
    },
    "OpenAI's, Together's, Fireworks'": {
        "input": {"messages": [U("Why?")], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [A("Yes")],
        "non_preferred_output": [A("No")],
    },
    "messages and one worse answer": {"messages": TALK_YES, "rejected_response": "No"},
    "conversations and one worse answer": {
        "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Yes"}],
        "rejected": "No",
    },
    "content as parts": {
        "prompt": [turn("user", [{"type": "text", "text": "Why?", "image_url": None}])],
        "chosen": [turn("assistant", [{"type": "text", "text": "Yes"}])],
        "rejected": [turn("assistant", ["No"])],
    },
    "a dict of lists": {
        "chosen": {"role": ["user", "assistant"], "content": ["Why?", "Yes"]},
        "rejected": {"role": ["user", "assistant"], "content": ["Why?", "No"]},
    },
    "maps": {
        "chosen": [[("role", "user"), ("content", "Why?")], [("role", "assistant"), ("content", "Yes")]],
        "rejected": [[("role", "user"), ("content", "Why?")], [("role", "assistant"), ("content", "No")]],
    },
    "messages as Python text": {"chosen": str(TALK_YES), "rejected": str(TALK_NO)},
    "messages as JSON text": {
        "prompt": "Why?",
        "chosen": json.dumps(TALK_YES),
        "rejected": json.dumps(TALK_NO),
    },
    "an object as JSON text": {
        "chosen": json.dumps({"messages": TALK_YES}),
        "rejected": json.dumps({"messages": TALK_NO}),
    },
    "the prompt as JSON text": {"prompt": json.dumps([U("Why?")]), "chosen": "Yes", "rejected": "No"},
    "one text in a list": {"prompt": ["Why?"], "chosen": ["Yes"], "rejected": ["No"]},
    "roles of other names": {
        "chosen": [turn("Human", "Why?"), turn("AI", "Yes")],
        "rejected": [turn("Human", "Why?"), turn("AI", "No")],
    },
    "HelpSteer3": {
        "context": [U("Why?")],
        "response1": "No",
        "response2": "Yes",
        "overall_preference": 2,
        "individual_preference": [{"score": 2}],
    },
    "HelpSteer2": {"prompt": "Why?", "response_1": "Yes", "response_2": "No", "preference_strength": -1},
    "SafeRLHF": {
        "prompt": "Why?",
        "response_0": "No",
        "response_1": "Yes",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "SHP": {
        "history": "Why?",
        "human_ref_A": "No",
        "human_ref_B": "Yes",
        "score_A": 2,
        "score_B": 9,
        "labels": 0,
    },
    "Arena": {
        "model_a": "m1",
        "model_b": "m2",
        "winner": "model_b",
        "conversation_a": TALK_NO,
        "conversation_b": TALK_YES,
    },
    "Arena with turns as text": {
        "prompt": '["Why?"]',
        "response_a": '["No"]',
        "response_b": '["Yes"]',
        "winner_model_a": 0,
        "winner_model_b": 1,
    },
    "a winner by the model's name": {
        "prompt": "Why?",
        "response_a": "No",
        "response_b": "Yes",
        "model_a": "m1",
        "model_b": "m2",
        "winner": "m2",
    },
    "flags": {
        "prompt": "Why?",
        "response_a": "No",
        "response_b": "Yes",
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    },
    "WebGPT": {
        "question": {"dataset": "own", "id": "x", "full_text": "Why?"},
        "answer_0": "No",
        "answer_1": "Yes",
        "score_0": -1.0,
        "score_1": 1.0,
        "tokens_0": {"prefix": [1]},
    },
    "a winner by its letter": {"prompt": "Why?", "response_a": "Yes", "response_b": "No", "winner": "A"},
    "a winner by its column": {"prompt": "Why?", "Answer 1": "No", "Answer 2": "Yes", "label": "answer_2"},
    "a chosen side": {"prompt": "Why?", "response_a": "No", "response_b": "Yes", "chosen": "B"},
    "left and right": {
        "prompt": "Why?",
        "left_response": "No",
        "right_response": "Yes",
        "preference": "right",
    },
    "two ratings": {
        "prompt": "Why?",
        "answer_1": "Yes",
        "answer_2": "No",
        "rating_1": "4.5",
        "rating_2": "2",
    },
    "scores at the end of the names": {
        "prompt": "Why?",
        "output_a": "No",
        "output_b": "Yes",
        "a_score": 1,
        "b_score": 3,
    },
    "Nectar": {
        "prompt": "\n\nHuman: Why?\n\nAssistant: ",
        "answers": [
            {"answer": "Hm", "rank": 2.0},
            {"answer": "No", "rank": 7.0},
            {"answer": "Yes", "rank": 1.0},
        ],
    },
    "UltraFeedback": {
        "instruction": "Why?",
        "models": ["m1", "m2"],
        "completions": [
            {"response": "No", "overall_score": 2.0, "model": "m1"},
            {"response": "Yes", "overall_score": 8.5, "model": "m2"},
        ],
    },
    "responses with scores beside": {"prompt": "Why?", "responses": ["No", "Yes", "Hm"], "scores": [1, 5, 3]},
    "generations with ranks beside": {"prompt": "Why?", "generations": ["No", "Yes"], "ranks": [2, 1]},
}


@pytest.mark.parametrize("name", ROWS)
def test_structures_are_recognised_the_right_way_round(name):
    pair = to_pair(0, ROWS[name])
    assert (pair.prompt, pair.chosen.strip(), pair.rejected.strip()) == ((U("Why?"),), "Yes", "No")
    assert not set(pair.used) & set(pair.unused)
    assert set(ROWS[name]) <= set(pair.used) | set(pair.unused)


def test_there_are_forty_shapes_and_more():
    assert len(NAMES) + len(ROWS) >= 65


def test_a_talk_before_the_prompt_is_read():
    talk = (U("Hi"), A("Hello"), U("Why?"))
    for history in ([["Hi", "Hello"]], [U("Hi"), A("Hello")], str([["Hi", "Hello"]])):
        row = {"instruction": "Why?", "input": "", "history": history, "chosen": "Yes", "rejected": "No"}
        assert to_pair(0, row).prompt == talk
        assert (
            cleaned([row], columns="prompt=instruction,chosen=chosen,rejected=rejected")[0][0].prompt == talk
        )


@pytest.mark.parametrize("history", [7, True, 1.5, [["Hi"]], [[1, 2]], {"a": 1}])
def test_what_is_no_talk_before_a_prompt_drops_the_row(history):
    row = {"prompt": "Why?", "before": history, "chosen": "Yes", "rejected": "No"}
    pairs, report, _ = cleaned([row], columns="prompt=prompt,chosen=chosen,rejected=rejected,history=before")
    assert not pairs and dict(report.dropped) == {"malformed": 1}


def test_lists_of_answers_make_pairs_of_which_none_is_lost():
    row = {
        "question": "Why?",
        "correct_answers": ["a", "b"],
        "incorrect_answers": ["x", "y", "z"],
        "best": "a",
    }
    pairs, report, _ = cleaned([row, {"prompt": "Hm?", "chosen": "Yes", "rejected": "No"}])
    assert [(p.chosen, p.rejected) for p in pairs] == [("a", "x"), ("b", "y"), ("a", "z"), ("Yes", "No")]
    assert [p.index for p in pairs] == [0, 1, 2, 3] and report.read == 4


# ---- a label is read and never guessed

TWO = {"prompt": "Why?", "response_a": "Yes", "response_b": "No"}
NUMBERED = {"prompt": "Why?", "response_1": "Yes", "response_2": "No"}
UNCLEAR = {
    "0 and 1 of what": TWO | {"label": 0}, "0 and 1 as text": TWO | {"winner": "1"},
    "a flag": TWO | {"preference": True}, "a number that may start at 0": NUMBERED | {"label": 1},
    "words of nobody": TWO | {"winner": "model_c"}, "empty": TWO | {"winner": None},
    "score against label": TWO | {"winner": "a", "score_a": 1, "score_b": 2},
    "a number that no float holds": TWO | {"winner": 10**400},
    "a score that no float holds": TWO | {"score_a": 10**400, "score_b": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_label_that_does_not_say_which_is_refused(name):
    with pytest.raises(BadRow, match="^label_unclear$"):
        to_pair(0, UNCLEAR[name])


@pytest.mark.parametrize("tie", ["tie", "Tie (bothbad)", "both", "equal"])
def test_ties_are_dropped(tie):
    for row in (
        TWO | {"winner": tie},
        TWO | {"score_a": 3, "score_b": 3.0},
        NUMBERED | {"overall_preference": 0},
    ):
        with pytest.raises(BadRow, match="^tie$"):
            to_pair(0, row)


def test_a_margin_drops_what_is_too_close():
    row = {"prompt": "Why?", "responses": ["No", "Yes"], "scores": [1, 2]}
    assert len(cleaned([row, row | {"prompt": "Hm?", "scores": [1, 4]}], columns="margin=2")[0]) == 1


SWAPS = [
    ("HelpSteer3", "response1 response2", lambda row: {"overall_preference": -2}),
    ("HelpSteer2", "response_1 response_2", lambda row: {"preference_strength": 1}),
    ("SafeRLHF", "response_0 response_1", lambda row: {"better_response_id": 0}),
    ("SHP", "human_ref_A human_ref_B", lambda row: {"score_A": 9, "score_B": 2}),
    ("Arena", "conversation_a conversation_b", lambda row: {"winner": "model_a"}),
    ("two ratings", "answer_1 answer_2", lambda row: {"rating_1": 2, "rating_2": 4.5}),
]


@pytest.mark.parametrize(("name", "columns", "label"), SWAPS)
def test_swapping_the_answers_with_their_labels_changes_nothing(name, columns, label):
    row, (a, b) = ROWS[name], columns.split()
    other = to_pair(0, row | {a: row[b], b: row[a]} | label(row))
    assert (other.chosen, other.rejected) == ("Yes", "No")


def test_turns_as_text_are_a_talk_and_an_answer_that_is_a_list_stays_text():
    talk = {
        "prompt": '["Hi", "Why?"]',
        "response_a": '["Ho", "Yes"]',
        "response_b": '["Ho", "No"]',
        "winner": "a",
    }
    pair = to_pair(0, talk)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((U("Hi"), A("Ho"), U("Why?")), "Yes", "No")
    for row, why in (
        (talk | {"response_b": '["Hm", "No"]'}, "prompts_differ"),
        (talk | {"response_b": '["Ho", null]'}, "messages_as_text"),
    ):
        with pytest.raises(BadRow, match=why):
            to_pair(0, row)
    for row in (
        talk | {"prompt": "List."},
        talk | {"prompt": '["a"]'},
        talk | {"response_a": '["a"]'},
        talk | {"response_a": "{}"},
        talk | {"response_a": '["1","2","3"]', "prompt": '["q"]'},
    ):
        assert to_pair(0, row).chosen == row["response_a"]
    listed = {"prompt": '["b", "a"]', "chosen": '["a", "b"]', "rejected": '["b", "a"]'}
    assert to_pair(0, listed).chosen == '["a", "b"]'


# ---- the user's mapping


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"q": "Why?", "x": "Yes", "z": "No"}, "prompt=q,chosen=x,rejected=z"),
        ({"x": TALK_YES, "z": TALK_NO}, "chosen=x,rejected=z"),
        ({"frage": "Why?", "chosen": "Yes", "rejected": "No"}, "prompt=frage"),
        ({"instruction": "Why?", "output": ["Yes", "No"]}, "chosen=output.0,rejected=output.1"),
        ({"in": {"text": "Why?"}, "out": {"good": [A("Yes")], "bad": "No"}},
         "prompt=in.text,chosen=out.good,rejected=out.bad"),
        ({"prompt": "Why?", "m1": "No", "m2": "Yes", "who": "m2"}, "a=m1,b=m2,winner=who"),
        ({"prompt": "Why?", "m1": "No", "m2": "Yes", "who": "b"}, "a=m1,b=m2,winner=who"),
        ({"Prompt": "Why?", "Best Of": "Yes", "rejected": "No"}, "chosen=best of,rejected=Rejected"),
    ],
)  # fmt: skip
def test_columns_may_name_any_part(row, columns):
    [pair], report, _ = cleaned([row], columns=columns)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((U("Why?"),), "Yes", "No")
    assert report.not_used() == []


def told(raw, **options):
    with pytest.raises(UserError) as caught:
        cleaned(raw, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_advice_works_when_it_is_followed():
    frage = [{"id": n, "frage": f"Why {n}?", "chosen": "Yes", "rejected": "No"} for n in range(3)]
    said = told([{k: v for k, v in row.items()} for row in frage])
    assert "set columns to 'prompt=frage'" in said
    assert len(cleaned(frage, columns="prompt=frage")[0]) == 3

    lists = [{"instruction": f"Why {n}?", "output": ["Yes", "No"]} for n in range(3)]
    advice = told(lists).split("set columns to '")[1].split("'")[0]
    assert len(cleaned(lists, columns=advice)[0]) == 3

    bare = [{"chosen": "Yes", "rejected": "No"}] * 3
    assert "add a column prompt" in told(bare)
    assert len(cleaned([row | {"prompt": f"Why {n}?"} for n, row in enumerate(bare)])[0]) == 3

    unclear = [TWO | {"prompt": f"Why {n}?", "label": 0} for n in range(3)]
    assert "write 'response_a', 'response_b' or tie into the column winner" in told(unclear)
    assert len(cleaned([row | {"winner": "response_a"} for row in unclear])[0]) == 3

    other = [{"a1": f"Why {n}?", "a2": "Yes", "a3": "No"} for n in range(3)]
    assert "set columns to 'prompt=…,chosen=…,rejected=…'" in told(other)
    assert len(cleaned(other, columns="prompt=a1,chosen=a2,rejected=a3")[0]) == 3

    kto = [{"prompt": f"Why {n}?", "completion": "Yes", "label": True} for n in range(3)]
    assert "each row has one answer" in told(kto) and "set columns" not in told(kto)
    assert len(cleaned([row | {"rejected": "No"} for row in kto])[0]) == 3


def test_a_mapped_column_that_leads_nowhere_names_those_that_are_there():
    row = {"input": {"messages": [U("Why?")]}, "chosen": "Yes", "rejected": "No"}
    assert "prompt=input.text, but the columns found are 'input', 'chosen'" in told(
        [row], columns="prompt=input.text"
    )


# ---- what stands beside an answer


def test_reasoning_and_tool_calls_are_kept_under_one_name():
    for name in ("reasoning_content", "reasoning", "thinking"):
        row = {"prompt": "Why?", "chosen": [turn("assistant", "Yes", **{name: "Hm."})], "rejected": "No"}
        assert to_pair(0, row).chosen_with == {"reasoning_content": "Hm."}
    thought = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes"}]
    row = {"prompt": "Why?", "chosen": [turn("assistant", thought)], "rejected": "No"}
    assert (to_pair(0, row).chosen, to_pair(0, row).chosen_with) == ("Yes", {"reasoning_content": "Hm."})
    calls = [
        [CALL], json.dumps([CALL]), [{"name": "weather", "arguments": {"city": "Oslo"}}],
        [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
    ]  # fmt: skip
    for call in calls:
        row = {"prompt": "Rain?", "chosen": [turn("assistant", None, tool_calls=call)], "rejected": "No",
               "tools": json.dumps(TOOLS)}  # fmt: skip
        pair = to_pair(0, row)
        assert (pair.chosen, pair.chosen_with) == ("", {"tool_calls": [CALL]}) and pair.tools == tuple(TOOLS)


def test_answers_that_differ_in_a_call_or_in_indentation_are_two():
    other = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    sides = [[turn("assistant", "Let me look.", tool_calls=[call])] for call in (CALL, other)]
    assert len(cleaned([{"prompt": "Rain?", "chosen": sides[0], "rejected": sides[1]}])[0]) == 1
    good, bad = "for i in x:\n    print(i)", "for i in x:\nprint(i)"
    assert len(cleaned([{"prompt": "Print.", "chosen": good, "rejected": bad}])[0]) == 1


def test_fields_and_columns_that_nobody_asked_for_are_named():
    row = {
        "prompt": [turn("user", "Why?", name="Ann")], "chosen": [turn("assistant", "Yes", weight=1)],
        "rejected": "No", "source": "own", "empty": None, "Notes": "a text",
    }  # fmt: skip
    _, report, _ = cleaned([row])
    assert report.not_used() == ["source", "Notes", "name of a message", "weight of a message"]
    assert report.as_dict()["columns"] == {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    assert "Not used: 'source', 'Notes'" in report.notes()[1]


def test_text_that_went_through_a_template_before_is_told():
    marked = {"prompt": "<|im_start|>user\nWhy?<|im_end|>", "chosen": "Yes<|im_end|>", "rejected": "No"}
    pairs, report, _ = cleaned([marked, {"prompt": "Hm?", "chosen": "Yes", "rejected": "No"}])
    assert len(pairs) == 2 and pairs[0].chosen == "Yes<|im_end|>"
    assert "1 of 2 pairs hold text that went through a chat template before" in report.notes()[-1]


def test_names_are_folded_alike_however_they_are_written():
    assert {
        fold(name) for name in ("chosen response", "Chosen-Response", "chosenResponse", " CHOSEN_RESPONSE ")
    } == {"chosen_response"}
    assert fold("Response1") == fold("response_1") == "response_1"


def test_an_answer_that_is_about_messages_stays_text():
    about = '{"role": "user", "content": "Hi"}'
    pair = to_pair(
        0, {"prompt": "Write a message as JSON.", "chosen": about, "rejected": '{"role": "admin"}'}
    )
    assert (pair.chosen, pair.rejected) == (about, '{"role": "admin"}')


DEEP = ["[" * 10**5, '{"role":' * 10**5, "[" + "-" * 10**5 + "1]", '[{"role": ' + "[" * 10**6]


@pytest.mark.parametrize("text", DEEP, ids=range(4))
def test_text_that_is_nested_deep_is_text_or_refused(text):
    for row in (
        {"prompt": "Why?", "chosen": text, "rejected": "No"},
        GOOD_AND | {"tools": text, "history": text},
    ):
        try:
            to_pair(0, row)
        except BadRow as bad:
            assert str(bad) in ("messages_as_text", "malformed")


DEEP_CALL = json.loads('{"a":' * 900 + "1" + "}" * 900)


@pytest.mark.parametrize("arguments", [{(1, 2): 3}, {b"a": 1}, DEEP_CALL], ids=range(3))
def test_a_call_that_is_no_json_is_a_reason(arguments):
    call = [{"function": {"name": "f", "arguments": arguments}}]
    row = GOOD_AND | {"chosen": [turn("assistant", "Yes", tool_calls=call)]}
    for said in (row, row | {"chosen": [turn("assistant", "Yes", tool_calls=str(call))]}):
        _, report, dropped = cleaned([GOOD_AND | {"prompt": "Hm?"}, said])
        assert report.read == 2 and report.kept + len(dropped) == 2


GOOD_AND = {"prompt": "Why?", "chosen": "Yes", "rejected": "No"}


def test_the_commonest_reason_for_a_drop_has_its_way_out():
    report = Report(read=9)
    report.dropped.update(duplicate=1, reasoning=5, overlong=3)
    assert report.way_out() == "choose a base_model whose chat template has a place for that; "
    assert Report().way_out() == ""
