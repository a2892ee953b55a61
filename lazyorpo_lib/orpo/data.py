"""Candidates -> clean pairs; every dropped row counted and kept, every column that was not used named.

Nothing is repaired: a row is kept as it is, or dropped with a reason (docs/data.md lists them), here as a
duplicate of a pair that was kept before, or in contradiction to one that ranks the same answers the other way
round, when both go. No tokenizer: what is too long, or lost in a template, is for the caller to drop.
"""

import hashlib
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import NotRequired, TypedDict

import numpy as np

TEMPLATE = "choose a base_model whose chat template has a place for that"
WAYS_OUT = {  # what to do about rows that were dropped for such a reason
    "overlong": "raise max_tokens and max_prompt_tokens, or set overlong=truncate",
    **dict.fromkeys("tools tool_calls reasoning prompt_text_lost template_refuses".split(), TEMPLATE),
    "prompts_differ": "let both answers follow the same conversation",
    "messages_as_text": "export the lists of messages as .jsonl or .parquet",
}
MOST_COLUMNS = 500  # names that are told
TEMPLATED = re.compile(  # what the templates of others leave in a text
    r"<\|im_(start|end)\|>|<\|(start|end)_header_id\|>|<\|eot_id\|>|<(start|end)_of_turn>|\[/INST\]|<</SYS>>"
    r"|<\|(user|assistant|system|end|endoftext|end_of_text)\|>|<｜(User|Assistant)｜>"
)
LONGEST = 2**16  # characters of a text in dropped.jsonl


class Message(TypedDict):
    role: str  # system, user, assistant or tool
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list]


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, ending with a user turn or what a tool said, and its two answers."""

    index: int  # the row's number in the dataset, from 0
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    shape: str = field(default="", compare=False)
    chosen_with: dict = field(default_factory=dict)  # its reasoning_content and tool_calls
    rejected_with: dict = field(default_factory=dict)
    tools: tuple = ()
    used: dict = field(default_factory=dict, compare=False)  # {column: what it was taken for}
    unused: tuple = field(default=(), compare=False)  # columns, and fields of messages, that hold something

    def answers(self) -> tuple[tuple[str, dict], tuple[str, dict]]:
        """Give the text of either answer with what comes beside it, the chosen one first."""
        return (self.chosen, self.chosen_with), (self.rejected, self.rejected_with)

    def as_bytes(self) -> bytes:
        """Give all that the model will read and score of it, whatever a template makes of that."""
        return json.dumps([self.prompt, self.answers(), self.tools], default=str).encode()


def clean(candidates: Iterable, *, on_drop: Callable | None = None) -> tuple[Iterator[Pair], "Report"]:
    """Keep the pairs that are clean, one at a time; all are read twice, first to find contradictions. Memory
    is flat but for the digests of the pairs, 9 bytes each while they are compared.

    Args:
        candidates: (index, row, pair, "") or (index, row, None, reason) tuples that can be iterated again, as
            from `rows.candidates`, whose errors pass.
        on_drop: is given each dropped row as {"index", "reason", "row"}, always valid as strict UTF-8 JSON.

    Returns:
        an iterator of `Pair`, and the `Report` that fills as it is consumed.
    """
    if iter(candidates) is candidates:
        raise TypeError("candidates are read twice: pass something that can be iterated again")
    report = Report(on_drop=on_drop, said=getattr(candidates, "notes", {}))
    return _keep(candidates, *_met_again(candidates), report), report


def _met_again(candidates):
    """Give the digests of what occurs in both orders, and of what occurs more than once, as sets."""
    digests, orders = array("Q"), bytearray()
    for *_, pair, reason in candidates:
        if not reason:
            answers, order = _digest(pair)
            digests.append(answers)
            orders.append(order)
    digests, orders = np.array(digests), np.array(orders, dtype=bool)
    values, counts = np.unique(digests, return_counts=True)
    both = np.intersect1d(digests[orders], digests[~orders])
    return set(both.tolist()), set(values[counts > 1].tolist())


def _keep(candidates, contradicted, repeated, report):
    seen = set()
    for index, row, pair, reason in candidates:
        report.read += 1
        if not reason:
            answers, _ = _digest(pair)
            reason = "contradiction" if answers in contradicted else "duplicate" if answers in seen else ""
        if reason:
            report.drop(index, reason, row)
            continue
        if answers in repeated:
            seen.add(answers)
        report.add(pair)
        yield pair


def _hash(text):  # in as few bytes as a set of millions wants, and a million texts can be told apart by
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _digest(pair):
    """Give the prompt with its two answers in either order as a number; and which of the two orders it is."""
    sides = [text.strip() + repr(more or "") for text, more in pair.answers()]
    parts = [("", side) for side in sorted(sides)] + [(t["role"], t["content"]) for t in pair.prompt]
    told = [f"{who}{len(text)} {text}" for who, text in parts]  # with lengths: no text runs into the next
    whole = _hash("".join([*told, repr(pair.tools or "")]))
    return int.from_bytes(whole), sides[0] < sides[1]


@dataclass
class Report:
    """What became of the rows: kept + dropped = read at all times."""

    on_drop: Callable[[dict], None] | None = None
    read: int = 0
    dropped: Counter = field(default_factory=Counter)
    shapes: Counter = field(default_factory=Counter)
    longer: int = 0
    columns: dict = field(default_factory=dict)  # {column: what it was taken for}, of what was kept
    unused: dict = field(default_factory=dict)  # {column: None}
    templated: int = 0
    digest: object = field(default_factory=hashlib.sha256)  # of the kept texts, by whoever encodes them
    said: dict = field(default_factory=dict)  # sentences of whoever read the rows

    @property
    def kept(self) -> int:
        return self.read - self.dropped.total()

    @property
    def chosen_longer(self) -> float:
        """Give the share of kept pairs whose chosen answer has more characters."""
        return self.longer / max(self.kept, 1)

    def add(self, pair: Pair, sign: int = 1) -> None:
        """Put a pair into the figures of what is kept; -1 takes it out again."""
        self.shapes[pair.shape] += sign
        self.longer += sign * (len(pair.chosen) > len(pair.rejected))
        texts = (pair.chosen, pair.rejected, *(turn["content"] for turn in pair.prompt))
        self.templated += sign * any(map(TEMPLATED.search, texts))
        if len(self.columns) + len(self.unused) < MOST_COLUMNS:
            self.columns |= pair.used
            self.unused |= dict.fromkeys(pair.unused)

    def drop(self, index: int, reason: str, row) -> None:
        """Count a dropped row and hand it to `on_drop`. A `Pair` had been kept, and goes after all."""
        self.dropped[reason] += 1
        if isinstance(row, Pair):
            self.add(row, -1)
        if self.on_drop:
            self.on_drop({"index": index, "reason": reason, "row": json_safe(row)})

    def as_dict(self) -> dict:
        """Give what `data_report.json` holds."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "chosen_longer": self.chosen_longer,
            "shapes": {shape: rows for shape, rows in self.shapes.items() if rows},
            "columns": json_safe(self.columns),
            "not_used": self.not_used(),
            "templated": self.templated,
        }

    def way_out(self) -> str:
        """Say what to do about the commonest reason for a drop."""
        reasons = [reason for reason, _ in self.dropped.most_common(1)]
        return "".join(f"{WAYS_OUT[reason]}; " for reason in reasons if reason in WAYS_OUT)

    def not_used(self) -> list[str]:
        """List the columns, and fields of messages, of kept rows that went nowhere."""
        return [json_safe(name) for name in self.unused if name not in self.columns]

    def notes(self) -> list[str]:
        """Say what was taken for what, what was not, and what looks wrong: one sentence each."""
        parts: dict[str, list] = {"prompt": [], "chosen": [], "rejected": []}
        for column, part in self.columns.items():
            parts.setdefault(part, []).append(repr(json_safe(column)))
        taken = "; ".join(f"{part} from {' and '.join(names[:9])}" for part, names in parts.items() if names)
        said = [*self.said, *([f"Columns: {taken}."] if taken else [])]
        if names := self.not_used():
            more = f" and {len(names) - 20} more" * (len(names) > 20)
            said.append(f"Not used: {', '.join(map(repr, names[:20]))}{more}.")
        if self.templated:
            some = f"{self.templated:,} of {self.kept:,} pairs hold text that went through a chat template"
            said.append(f"{some} before, and is read as plain text: give the messages themselves.")
        return said

    def __str__(self) -> str:
        lost = [f"{rows:,} {reason.replace('_', ' ')}" for reason, rows in self.dropped.most_common()]
        return f"kept {self.kept:,} of {self.read:,} pairs" + ("; dropped " + ", ".join(lost)) * bool(lost)


def json_safe(value, depth: int = 50):
    """Give anything as strict UTF-8 JSON holds it: lone surrogates and bytes escaped, the deeper named, what
    is longer than LONGEST cut."""
    if isinstance(value, bytes | bytearray):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        cut = f"… ({len(value):,} characters)" * (len(value) > LONGEST)
        return value[:LONGEST].encode("utf-8", "backslashreplace").decode() + cut
    is_int = isinstance(value, int) and abs(value) < 2**63
    if value is None or is_int or isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Pair):
        names = [part.name for part in fields(value) if part.name not in ("used", "unused")]
        value = {name: part for name in names if (part := getattr(value, name)) not in ((), {})}
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


def held_out_of(total: int, eval_pairs: int | str) -> int:
    """Count the pairs of `total` that are held out: at most a fifth; "auto" stops where an accuracy is known
    to about 5 points (385 pairs), then goes on with a hundredth, to 2,000."""
    wanted = max(385, min(total // 100, 2000)) if eval_pairs == "auto" else eval_pairs
    return min(wanted, total // 5)


def about_split(train: Sequence, held_out: Sequence) -> str:
    """Say how many pairs train and are held out, and how well an accuracy on these is known."""
    said = f"{len(train):,} to train on, {len(held_out):,} held out"
    if held_out:
        points = min(50, 98 / math.sqrt(len(held_out)))
        said += f"; an accuracy on them is known to about ±{points:.0f} points"
    return f"{said}."


def split_held_out(pairs: Iterable[Pair], eval_pairs: int | str, seed: int) -> tuple[list[int], list[int]]:
    """Give the positions in `pairs` of training and held-out pairs, both ascending; no prompt is in both.

    Prompts (white space apart) are held out whole, in the order of a hash of (seed, prompt), so the same ones
    are taken whatever the order of the rows, as many as `held_out_of` says. A prompt with more pairs than
    there is room for is passed over.
    """
    hashes = array("Q")
    for pair in pairs:
        turns = [(turn["role"], turn["content"].split()) for turn in pair.prompt]
        hashes.append(int.from_bytes(_hash(json.dumps([seed, turns]))))
    room, held_out = held_out_of(len(hashes), eval_pairs), np.zeros(len(hashes), dtype=bool)
    for _, positions in groupby(np.argsort(hashes, kind="stable"), key=hashes.__getitem__):
        if len(positions := list(positions)) <= room:
            room -= len(positions)
            held_out[positions] = True
        if not room:
            break
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()
