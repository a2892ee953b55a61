"""Whatever the rows hold: nothing raises out of cleaning, every row is accounted for, and what is kept
round-trips.

27,100 generated cases; with PROPERTY_SCALE=10 in the environment ten times as many.
"""

import datetime
import json
import os
import random
import re
import tempfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import Pair, clean, json_safe, split_held_out
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.dataset import open_rows
from lazyorpo_lib.rows.messages import BadRow
from lazyorpo_lib.rows.shapes import to_pair

SCALE = int(os.environ.get("PROPERTY_SCALE", "1"))
GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def cases(count):
    return settings(
        max_examples=count * SCALE, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )


# Few different texts, so that duplicates, contradictions and agreeing prompts happen.
ODD = ["", " ", "\0", "\ud800", "x\udfff", "مرحبا \u202e", "👩‍👩‍👧", "<|im_end|>",
       "\n\nHuman: Hi\n\nAssistant: Yes",
       "\n\nHuman: Hi\n\nAssistant:", "Human: \n\nAssistant:", "big " * 3000]  # fmt: skip
WRONG = [None, True, 0, -1.5, float("nan"), float("inf"), 10**400, b"\xff", datetime.date(2024, 3, 12), [],
         {}, [[]],
         [None], {"role": None}, {1: {2: [b""]}}, [[[[[[]]]]]], object(), (), {()}]  # fmt: skip
ROLES = ["user", "assistant", "system", "human", "gpt", "tool", "User ", ""]
NAMES = ["prompt", "chosen", "rejected", "conversations", "instruction", "question", "input", "context",
         "system",
         "chosen_response", "rejected_response", "response_j", "response_k", "other", "", None,
         7]  # fmt: skip
TEXTS = ["a", "b", "c", " a ", "a  b", "a\nb", *ODD]
some_text = st.sampled_from(TEXTS)
any_text = st.text(st.characters(exclude_categories=()), max_size=6)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3), max_leaves=6,
)  # fmt: skip
message = st.builds(
    lambda keys, role, content: dict(zip(keys, (role, content), strict=True)),
    st.sampled_from([("role", "content"), ("from", "value"), ("role", "value"), ("x", "y")]),
    st.sampled_from(ROLES + WRONG[:3]), st.sampled_from(TEXTS + WRONG),
)  # fmt: skip
cell = st.sampled_from(TEXTS + WRONG) | st.lists(message, max_size=2) | message
odd_row = st.dictionaries(st.sampled_from(NAMES), cell, max_size=5)
any_row = st.dictionaries(st.sampled_from(NAMES[:9]) | any_text, any_json, max_size=4) | any_json
shaped_row = st.fixed_dictionaries({"prompt": cell, "chosen": cell, "rejected": cell})

# Rows that are mostly right, so that much of what is generated is kept.
said = st.sampled_from(["a", "b", "c", "d e", "d  e", *TEXTS])


def turns(pattern):
    return st.tuples(
        *(said.map(lambda text, role=role: {"role": role, "content": text}) for role in pattern)
    ).map(list)


PROMPT = st.sampled_from([["user"], ["system", "user"], ["user", "assistant", "user"]]).flatmap(turns)
plain_row = st.fixed_dictionaries({"prompt": said | PROMPT, "chosen": said, "rejected": said})
inside_row = st.builds(
    lambda head, chosen, rejected: {"chosen": head + chosen, "rejected": head + rejected},
    PROMPT, turns(["assistant"]), turns(["assistant"]),
)  # fmt: skip
row = st.one_of(plain_row, inside_row, shaped_row, odd_row)


@cases(4500)
@given(odd_row | shaped_row | any_row)
def test_any_row_is_a_pair_or_has_a_reason(value):
    try:
        pair = to_pair(3, value)
    except BadRow as bad:
        assert str(bad).replace("_", "").isalpha()
        return
    assert pair.index == 3
    assert pair.prompt[-1]["role"] in ("user", "tool")
    assert {turn["role"] for turn in pair.prompt} <= {"system", "user", "assistant", "tool"}
    assert (pair.chosen.strip(), pair.chosen_with) != (pair.rejected.strip(), pair.rejected_with)
    assert all(text.strip() or "tool_calls" in more for text, more in pair.answers())
    "".join([pair.chosen, pair.rejected, *(turn["content"] for turn in pair.prompt)]).encode()


# ---- the rule: rows of every kind of part, each text in them another one

FIELDS = ["reasoning_content", "thinking", "name", "weight", "note"]
WAYS = [  # how a prompt and two answers may stand in a row
    "prompt chosen rejected", "question output Rejected", "messages chosen rejected", "chosen rejected",
    "prompt response_a response_b winner", "instruction input accepted rejected", "messages rejected",
    "system conversations answers",
]  # fmt: skip
MORE = "prompt instruction question messages conversations input context system system_prompt notes history"


class Maker:
    """Makes rows out of texts of which no two are alike."""

    def __init__(self, seed):
        self.random, self.count = random.Random(seed), 0

    def text(self):
        self.count += 1
        return f"text {self.count} end"

    def turn(self, role):
        content = self.random.choice([self.text, lambda: [{"type": "text", "text": self.text()}]])()
        more = {self.random.choice(FIELDS): self.text()} if self.random.random() < 0.2 else {}
        return {"role": role, "content": content, **more}

    def talk(self, *ways):
        turns = [self.turn(role) for role in self.random.choice(ways).split()]
        return self.random.choice([list, list, json.dumps, str])(turns)

    def cell(self, column):
        pick = self.random.choice
        if column == "winner":
            return pick(["a", "B", "tie", "nobody"])
        if column == "history":
            return pick([self.text(), [[self.text(), self.text()]], self.talk("user assistant")])
        if column == "answers":
            return [{"text": self.text(), "score": score} for score in (1, 3, 2)]
        if column in ("input", "context", "system", "system_prompt", "notes", "tools"):
            return self.text()
        if column in ("prompt", "instruction", "question", "messages", "conversations"):
            return pick(
                [self.text(), self.talk("user", "system user", "user assistant user", "user assistant")]
            )
        return pick([self.text(), [self.text()], self.talk("assistant"), self.talk("user assistant")])

    def row(self):
        columns = self.random.choice(WAYS).split() + self.random.sample(
            MORE.split(), self.random.randrange(4)
        )
        row = {column: self.cell(column) for column in dict.fromkeys(columns)}
        good = next((name for name in ("chosen", "output", "accepted", "response_a") if name in row), None)
        bad = next((name for name in ("rejected", "Rejected", "response_b") if name in row), None)
        if good and bad and self.random.random() < 0.5:  # the same prompt inside both
            head = [self.turn(role) for role in self.random.choice(["user", "system user"]).split()]
            row[good], row[bad] = head + [self.turn("assistant")], head + [self.turn("assistant")]
        return row


def test_every_text_of_a_kept_row_is_read_or_scored_or_its_place_is_named():
    make, kept = Maker(seed=1), 0
    for _ in range(17_000 * SCALE):
        row = make.row()
        try:
            pair = to_pair(0, row)
        except BadRow:
            continue
        kept += 1
        read = json.dumps([pair.prompt, pair.answers(), pair.tools])
        for column, cell in row.items():
            if pair.used.get(column) in ("label", "the best and the worst answer") or column in pair.unused:
                continue
            assert column in pair.used, (column, row)
            spelled = json.dumps(cell).replace("\\", "")
            for text in re.findall(r"text \d+ end", spelled):
                beside = [field for field in FIELDS if re.search(rf"\b{field}\W+{text}", spelled)]
                named = any(f"{field} of a message" in pair.unused for field in beside)
                assert read.count(text) == 1 or named, (text, row, pair)
    assert kept > 10_000 * SCALE


@cases(1000)
@given(st.lists(row | any_row, max_size=3))
def test_every_row_is_kept_or_dropped_once_and_every_drop_can_be_written(values):
    dropped = []
    rows = list(enumerate([GOOD, *values]))  # one row of a known shape, or the dataset is refused as a whole
    pairs, report = clean(candidates(rows), on_drop=dropped.append)
    kept = [pair.index for pair in pairs]
    assert sorted(kept + [drop["index"] for drop in dropped]) == list(range(len(rows)))
    assert (report.read, report.kept, report.dropped.total()) == (len(rows), len(kept), len(dropped))
    assert sum(report.as_dict()["shapes"].values()) == len(kept)
    line = json.dumps(dropped, allow_nan=False, ensure_ascii=False)
    assert json.loads(line.encode()) == dropped
    json.dumps(report.as_dict(), allow_nan=False).encode()


@cases(1000)
@given(st.lists(row, max_size=3))
def test_what_is_kept_is_kept_unchanged_when_cleaned_again(values):
    once = list(clean(candidates(list(enumerate([GOOD, *values]))))[0])
    again = [
        (
            pair.index,
            {
                "prompt": list(pair.prompt),
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            },
        )
        for pair in once
    ]
    pairs, report = clean(candidates(again))
    assert list(pairs) == once
    assert report.kept == len(once)


@cases(800)
@given(
    st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("abc"), st.sampled_from("abc")), max_size=12)
)
def test_no_two_kept_pairs_contradict_or_repeat_each_other(values):
    rows = [(i, {"prompt": p, "chosen": a, "rejected": b}) for i, (p, a, b) in enumerate(values)]
    kept = [(pair.prompt[0]["content"], pair.chosen, pair.rejected) for pair in clean(candidates(rows))[0]]
    wanted = dict.fromkeys((p, a, b) for p, a, b in values if a != b and (p, b, a) not in values)
    assert kept == list(wanted)


@cases(1000)
@given(
    any_json
    | st.sampled_from(WRONG)
    | st.decimals()
    | st.complex_numbers()
    | st.sets(st.integers())
    | st.datetimes(),
    st.integers(),
)
def test_any_object_becomes_json(value, number):
    safe = json_safe({"value": value, number: datetime.timedelta(1), b"\xff": Pair(number, (), "\ud800", "")})
    assert json.loads(json.dumps(safe, allow_nan=False, ensure_ascii=False).encode()) == safe


@cases(1000)
@given(st.lists(st.integers(0, 8), max_size=40), st.integers(0, 20), st.integers(0, 2**32), st.randoms())
def test_no_prompt_crosses_the_split(prompts, eval_pairs, seed, random):
    pairs = [Pair(i, ({"role": "user", "content": f"p{n}"},), "a", "b") for i, n in enumerate(prompts)]
    train, held_out = split_held_out(pairs, eval_pairs, seed)
    assert sorted(train + held_out) == list(range(len(pairs)))
    assert len(held_out) <= min(eval_pairs, len(pairs) // 5)
    assert {prompts[i] for i in train}.isdisjoint(prompts[i] for i in held_out)
    random.shuffle(pairs)
    assert {pairs[i].index for i in split_held_out(pairs, eval_pairs, seed)[1]} == set(held_out)


@cases(300)
@given(st.lists(plain_row, min_size=1, max_size=4))
def test_rows_written_as_jsonl_are_read_as_they_were(values):
    path = _scratch(b"\n".join(json.dumps(value).encode() for value in values), ".jsonl")
    assert [row for _, row in open_rows(path)] == values


@cases(500)
@given(
    st.binary(max_size=60) | st.text().map(str.encode) | st.binary().map(lambda data: b'{"a": "' + data),
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz"]),
)
def test_any_file_is_read_or_refused_in_one_sentence(content, ending):
    try:
        list(open_rows(_scratch(content, ending)))
    except UserError as error:
        assert "\n" not in str(error)


FOLDER = tempfile.TemporaryDirectory()


def _scratch(content, ending):
    path = os.path.join(FOLDER.name, "scratch" + ending)
    with open(path, "wb") as file:
        file.write(content)
    return path
