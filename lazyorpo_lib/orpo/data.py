"""Preference rows of any common shape -> clean pairs; every dropped row counted and kept.

`open_rows` reads a dataset (see rows.py), `clean` turns its rows into pairs, `split_held_out` parts them. No
tokenizer: what is too long in tokens is for the caller to `report.drop`. Nothing is repaired: a row is kept,
but for white space around its answers, or dropped with a reason. Text is never parsed as JSON.

Where the prompt may be; none of this has to be said (`Pair.shape` names what was found):
- messages: inside `chosen` and `rejected`, which are message lists; it wins over any prompt column
- transcript: inside both answers, each a `\\n\\nHuman: … \\n\\nAssistant: …` text (Anthropic HH)
- conversations: a list of the turns so far
- prompt, instruction, question, query, input: text or messages; `input`, `context` go below all but `prompt`
Messages are role/content or from/value. A `system` or `system_prompt` column is used where they have no
system turn. Answers are text, one message or a list of them, called as in ANSWERS, the better one first.

Reasons for a drop: malformed, unknown_shape, unknown_role, invalid_text (lone surrogates), prompts_differ,
empty_prompt, no_user_turn (the prompt does not end with the user), no_answer (a side does not end with the
assistant), empty_answer, identical_answers (white space apart), duplicate (the same pair was kept before),
contradiction (the same answers are also ranked the other way round: all go). The caller adds its own.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ..errors import UserError
from .rows import open_rows as open_rows

PROMPTS = ("conversations", "prompt", "instruction", "question", "query", "input")
ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_j", "response_k"))
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant")
LONGEST = 2**16  # characters of a text in dropped.jsonl
FIRST_ROWS = 100  # one of so many must be in a known shape
MAPPING = "set columns to 'prompt=…,chosen=…,rejected=…' (and ',system=…') with this dataset's column names"


class Message(TypedDict):
    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, ending with a user turn, and its two answers."""

    index: int  # the row's number in the dataset, from 0
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    shape: str = field(default="", compare=False)
    chosen_with: dict = field(default_factory=dict)  # its reasoning_content and tool_calls
    rejected_with: dict = field(default_factory=dict)
    tools: tuple = ()

    def answers(self) -> tuple[tuple[str, dict], tuple[str, dict]]:
        """Give the text of either answer with what comes beside it, the chosen one first."""
        return (self.chosen, self.chosen_with), (self.rejected, self.rejected_with)

    def as_bytes(self) -> bytes:
        """Give all that the model will read and score of it, whatever a template makes of that."""
        return json.dumps([self.prompt, self.answers(), self.tools], default=str).encode()


class BadRow(Exception):
    """A row that cannot be a pair; its text is the reason."""


def clean(
    rows: Iterable, *, columns: str = "", on_drop: Callable[[dict], None] | None = None
) -> tuple[Iterator[Pair], "Report"]:
    """Turn rows into clean pairs, one at a time; they are read twice, first to find what contradicts itself.

    Memory is flat but for a digest of each distinct pair, about 0.15 kB.

    Args:
        rows: (index, row) tuples that can be iterated again, as from `open_rows`.
        columns: explicit mapping "prompt=…,chosen=…,rejected=…[,system=…]"; "" recognises the shape.
        on_drop: is given each dropped row as {"index", "reason", "row"}, always valid as strict UTF-8 JSON.

    Returns:
        an iterator of `Pair`, and the `Report` that fills as it is consumed.

    Raises:
        UserError: the mapping is wrong, or none of the first 100 rows has a known shape. A bad row never
            raises.
    """
    if iter(rows) is rows:
        raise TypeError("rows are read twice: pass something that can be iterated again")
    mapping, report = parse_columns(columns), Report(on_drop=on_drop)
    return _keep(rows, mapping, _contradicted(rows, mapping), report), report


def _judged(rows, mapping):  # (index, row, pair, ""), or (index, row, None, reason)
    for index, row in rows:
        try:
            pair, reason = to_pair(index, row, mapping), ""
        except BadRow as bad:
            pair, reason = None, str(bad)
        yield index, row, pair, reason


def _contradicted(rows, mapping):
    rest, ranked, contradicted = _judged(rows, mapping), {}, set()
    if first := list(itertools.islice(rest, FIRST_ROWS)):
        _check_shape(first, mapping)
    for *_, pair, reason in itertools.chain(first, rest):
        if not reason:
            answers, order = _digest(pair)
            if ranked.setdefault(answers, order) != order:
                contradicted.add(answers)
    return contradicted


def _keep(rows, mapping, contradicted, report):
    seen = set()
    for index, row, pair, reason in _judged(rows, mapping):
        report.read += 1
        if not reason:
            answers, _ = _digest(pair)
            reason = "contradiction" if answers in contradicted else "duplicate" if answers in seen else ""
        if reason:
            report.drop(index, reason, row)
            continue
        seen.add(answers)
        report.add(pair)
        yield pair


def _check_shape(first, mapping):
    rows = [(row, reason) for _, row, _, reason in first if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row, _ in rows for name in row))
    named = ", ".join(repr(json_safe(name)) for name in names[:40])
    found = f"the columns found are {named or 'none, for its rows are not objects'}"
    for name, column in mapping.items():
        if column not in names:
            raise UserError(f"columns says {name}={column}, but {found}; {MAPPING}.")
    if all(reason == "unknown_shape" for _, reason in rows):
        start = f"None of the first {len(first)} rows is a pair of a known shape"
        raise UserError(f"{start}: {found}; {MAPPING}.")


def _hash(text):
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _digest(pair):
    """Give the prompt with its two answers in either order as 16 bytes; and which of the two orders it is."""
    chosen, rejected = _hash(pair.chosen).hex(), _hash(pair.rejected).hex()
    turns = (f"{turn['role']}{len(turn['content'])} {turn['content']}" for turn in pair.prompt)
    return _hash("".join([*sorted((chosen, rejected)), *turns])), chosen < rejected


def pairs_at(rows: Iterable, indexes: Sequence[int], columns: str = "") -> list[Pair]:
    """Give the rows with these indexes as pairs, in that order; reads the rows up to the last of them."""
    wanted, mapping = set(indexes), parse_columns(columns)
    found = ((index, to_pair(index, row, mapping)) for index, row in rows if index in wanted)
    pairs = dict(itertools.islice(found, len(wanted)))
    return [pairs[index] for index in indexes]


def parse_columns(columns: str) -> dict[str, str]:
    """Read "prompt=a,chosen=b,rejected=c[,system=d]"; "" is {}, all else a UserError."""
    mapping = dict(re.findall(r"\s*(\w+)\s*=\s*([^,]*[^,\s])\s*(?:,|$)", columns))
    known = mapping.keys() <= {"prompt", "chosen", "rejected", "system"} <= mapping.keys() | {"system"}
    if columns.strip() and not (known and len(mapping) == columns.count("=") == columns.count(",") + 1):
        why = "which is no mapping of prompt, chosen and rejected"
        raise UserError(f"columns is {columns!r}, {why}: {MAPPING}.")
    return mapping


# ---- one row -> one pair


def to_pair(index: int, row, columns: dict[str, str] | None = None) -> Pair:
    """Turn a row of any shape into a pair; `columns` as from `parse_columns`. Raises BadRow(reason)."""
    if not isinstance(row, dict) or None in row:  # the key None: a CSV line with more cells than columns
        raise BadRow("malformed")
    if columns:
        row = {name: row[column] for name, column in columns.items() if column in row}
    names = next((names for names in ANSWERS if names[0] in row and names[1] in row), None)
    if names is None:
        raise BadRow("unknown_shape")
    answers = [row[name] for name in names]
    shape, given = _given(row)
    if all(map(_is_transcript, answers)) and (not given or _is_transcript(row[shape])):
        inside, sides = "transcript", [_transcript(text) for text in answers]
    else:
        inside, sides = "messages", [_turns(answer, "assistant") for answer in answers]
    if not all(sides):
        raise BadRow("empty_answer")
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise BadRow("no_answer")
    head, other = sides[0][:-1], sides[1][:-1]
    if head != other:
        raise BadRow("prompts_differ")
    if not head and not any(name in row for name in PROMPTS):
        raise BadRow("unknown_shape")
    shape = inside if any(turn["role"] == "user" for turn in head) else shape
    chosen, rejected = (side[-1]["content"].strip() for side in sides)
    return _checked(Pair(index, _joined(row, head, given), chosen, rejected, shape))


def _given(row):
    """Give the name of the prompt column and its turns, whatever the answers may hold themselves."""
    name = next((name for name in PROMPTS if not _missing(row.get(name))), "")
    turns = _turns(row.get(name), "user")
    if name in PROMPTS[2:] and turns:
        below = [row.get(extra) for extra in ("input", "context") if extra != name]
        below = [text for text in below if isinstance(text, str) and text.strip()]
        turns[-1]["content"] = "\n\n".join([turns[-1]["content"], *below])
    return name, turns


def _joined(row, head, given):
    """Join the turns inside the answers, the prompt column and the system column; nothing twice."""
    system = next((row[name] for name in ("system", "system_prompt") if not _missing(row.get(name))), None)
    system = _turns(system, "system") or [turn for turn in given[:1] if turn["role"] == "system"]
    turns = head + given
    if any(turn["role"] == "user" for turn in head):
        turns = given if given[-len(head) :] == head else head
    if not any(turn["role"] == "system" for turn in turns):
        turns = system + turns
    return tuple(turn for turn in turns if turn["role"] != "system" or turn["content"].strip())


def _checked(pair):
    try:
        "".join([pair.chosen, pair.rejected, *(turn["content"] for turn in pair.prompt)]).encode()
    except UnicodeEncodeError:
        raise BadRow("invalid_text") from None
    if not pair.prompt or not pair.prompt[-1]["content"].strip():
        raise BadRow("empty_prompt")
    if pair.prompt[-1]["role"] != "user":
        raise BadRow("no_user_turn")
    if not pair.chosen or not pair.rejected:
        raise BadRow("empty_answer")
    if pair.chosen.split() == pair.rejected.split():
        raise BadRow("identical_answers")
    return pair


def _missing(value):
    if isinstance(value, str):
        return not value.strip()
    return value is None or isinstance(value, float) and math.isnan(value)


def _turns(cell, role):
    """Give a cell as messages: text is one turn of `role`, unless it is the prompt of a transcript."""
    if _missing(cell):
        return []
    if isinstance(cell, str):
        if role == "user" and _is_transcript(cell) and cell.rstrip().endswith("\n\nAssistant:"):
            return _transcript(cell)[:-1]
        return [Message(role=role, content=cell)]
    if not isinstance(cell, dict | list | tuple):
        raise BadRow("malformed")
    return [_message(item) for item in ([cell] if isinstance(cell, dict) else cell)]


def _message(item):
    if not isinstance(item, dict):
        raise BadRow("malformed")
    # a table that mixes both styles holds all four names in each message, two of them null
    role = item["role"] if item.get("role") is not None else item.get("from")
    content = item["content"] if item.get("content") is not None else item.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow("malformed")
    if role.strip().lower() not in ROLES:
        raise BadRow("unknown_role")
    return Message(role=ROLES[role.strip().lower()], content=content)


def _is_transcript(cell):
    return isinstance(cell, str) and cell.lstrip().startswith("Human:") and "\n\nAssistant:" in cell


def _transcript(text):
    _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    who = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [Message(role=who[name], content=said.strip()) for name, said in turns]


# ---- the account of what was read


@dataclass
class Report:
    """What became of the rows: kept + dropped = read at all times."""

    on_drop: Callable[[dict], None] | None = None
    read: int = 0
    dropped: Counter = field(default_factory=Counter)
    shapes: Counter = field(default_factory=Counter)
    longer: int = 0

    @property
    def kept(self) -> int:
        return self.read - self.dropped.total()

    @property
    def chosen_longer(self) -> float:
        """Share of the kept pairs whose chosen answer is the longer one, in characters; 0 without pairs."""
        return self.longer / max(self.kept, 1)

    def add(self, pair: Pair, sign: int = 1) -> None:
        """Put a pair into the figures of what is kept; -1 takes it out again."""
        self.shapes[pair.shape] += sign
        self.longer += sign * (len(pair.chosen) > len(pair.rejected))

    def drop(self, index: int, reason: str, row) -> None:
        """Count a dropped row and hand it to `on_drop`. A `Pair` had been kept, and goes after all."""
        self.dropped[reason] += 1
        if isinstance(row, Pair):
            self.add(row, -1)
        if self.on_drop:
            self.on_drop({"index": index, "reason": reason, "row": json_safe(row)})

    def as_dict(self) -> dict:
        """What `data_report.json` holds."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "chosen_longer": self.chosen_longer,
            "shapes": {shape: rows for shape, rows in self.shapes.items() if rows},
        }

    def __str__(self) -> str:
        lost = [f"{rows:,} {reason.replace('_', ' ')}" for reason, rows in self.dropped.most_common()]
        return f"kept {self.kept:,} of {self.read:,} pairs" + ("; dropped " + ", ".join(lost)) * bool(lost)


def json_safe(value, depth: int = 50):
    """Give anything as strict UTF-8 JSON holds it: lone surrogates and bytes escaped, the deeper named, what
    is longer than LONGEST cut."""
    if isinstance(value, str):
        cut = f"… ({len(value):,} characters)" * (len(value) > LONGEST)
        return value[:LONGEST].encode("utf-8", "backslashreplace").decode() + cut
    if isinstance(value, bytes | bytearray):
        return json_safe(value.decode("utf-8", "backslashreplace"))
    is_int = isinstance(value, int) and abs(value) < 2**63
    if value is None or is_int or isinstance(value, float) and math.isfinite(value):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    if isinstance(value, dict | list | tuple | set | frozenset):
        if not depth:
            return f"<{type(value).__name__}>"
        if isinstance(value, dict):
            return {str(json_safe(key, 0)): json_safe(item, depth - 1) for key, item in value.items()}
        return [json_safe(item, depth - 1) for item in value]
    try:
        return json_safe(str(value))  # dates, decimals, NaN
    except Exception:  # somebody else's __str__; and Python prints no integer of more than 4,300 digits
        return f"<{type(value).__name__}>"


def split_held_out(pairs: Iterable[Pair], eval_pairs: int, seed: int) -> tuple[list[int], list[int]]:
    """Give the positions in `pairs` of training and held-out pairs, both ascending; no prompt is in both.

    Prompts (white space apart) are held out whole, in the order of a hash of (seed, prompt), so the same ones
    are taken whatever the order of the rows: at most `eval_pairs` pairs, and at most a fifth of all. A prompt
    with more pairs than there is room for is passed over.
    """
    groups: dict[bytes, list[int]] = {}
    for position, pair in enumerate(pairs):
        turns = [(turn["role"], turn["content"].split()) for turn in pair.prompt]
        groups.setdefault(_hash(json.dumps([seed, turns])), []).append(position)
    total = sum(map(len, groups.values()))
    room, held_out = min(eval_pairs, total // 5), set()
    for _, positions in sorted(groups.items()):
        if len(positions) <= room - len(held_out):
            held_out.update(positions)
    return [position for position in range(total) if position not in held_out], sorted(held_out)
