"""Rows with one answer, a thumb, a score, a rank or a click -> pairs, of which some lack the worse answer.

`rows/shapes.py` alone says what is the prompt of a row, what its answer, and what is no pair; a rejected
answer that is LACKING is for the base model to give. Nothing is written here, and no model is asked.
"""

import json
import re
from collections import Counter
from dataclasses import replace

from ..errors import UserError
from ..orpo.data import Pair
from ..rows.candidates import Candidates, check_mapping
from ..rows.columns import RANKS, SCORES, Layout, advise, at, fold
from ..rows.messages import BadRow, drop_if, missing
from ..rows.shapes import is_number, to_pair
from .clicks import is_click, standing

LACKING = "(an answer of the base model)"
THUMBS = "thumb thumbs thumbs_up thumb_up feedback reaction vote upvote like liked is_good label".split()
_UP = "up +1 1 1.0 true yes good like liked positive upvote upvoted chosen accepted 👍"
_DOWN = "down -1 -1.0 0 0.0 false no bad dislike disliked negative downvote downvoted rejected 👎"
_SAYS = dict.fromkeys(_UP.split(), 1) | dict.fromkeys(_DOWN.split(), 0)
_NAME = "name them with columns prompt=…,chosen=…"
_NEEDED = (
    f"give prompts with a good answer, a thumb up and one down (or set sample), or other scores; {_NAME}"
)


def thumb(cell) -> int | None:
    """Read a thumb, 1 for up and 0 for down: a word, ±1, 1 or 0, an emoji; None where it says neither."""
    return _SAYS.get(re.sub(r"thumbs?[\s_-]*|[\s:🏻-🏿\ufe0f]", "", str(cell).lower()))


def told(left: Counter) -> str:
    """Write what was left out, by why, as words."""
    return ", ".join(f"{count} {why}".replace("_", " ") for why, count in left.most_common()) or "nothing"


def read(rows: list, columns: dict[str, str], *, sample: bool = False) -> tuple[str, list, Counter]:
    """Make pairs of rows; UserError where none comes of them, or what a column says is not clear.

    Args:
        rows: (index, row) tuples of a file.
        columns: as from `parse_columns`; `winner` names the column with the thumb or the score. With `chosen`
            and without `rejected` each row is taken to have one answer.
        sample: also give what has a thumb up and nothing against it, LACKING the worse answer.

    Returns:
        what the rows are: pairs, clicks, thumbs, scores, ranks or single; (pair, indexes of its rows) tuples;
        how many rows came to nothing, by why.
    """
    dicts = [row for _, row in rows if isinstance(row, dict)]
    named, left, found = check_mapping(dicts, columns), Counter(), []
    kind, mark = _kind(dicts, columns)
    if kind in ("clicks", "pairs"):
        for index, one in standing(rows) if kind == "clicks" else rows:
            for *_, pair, reason in Candidates([(index, one)], columns).judged():
                if pair:
                    found.append((pair, [index]))
                else:
                    left[reason] += 1
    else:
        found = _of_answers(rows, columns, kind, mark, sample, left)
    if kind == "clicks":
        whole = [(pair, indexes) for pair, indexes in found if not pair.chosen.endswith("…")]  # not cut
        found = [(replace(pair, rejected=pair.rejected.removesuffix("…")), i) for pair, i in whole]
    if not found:
        raise UserError(f"No pair comes of these rows, read as {kind} ({told(left)}): {named}; {_NEEDED}.")
    return kind, found, left


def _kind(rows: list[dict], columns: dict[str, str]) -> tuple[str, str]:
    """Say what rows are, and the column that marks an answer, "" without one."""
    if rows and all(map(is_click, rows)):
        return "clicks", ""
    alone, given = "chosen" in columns and "rejected" not in columns, "winner" in columns
    known = [] if alone else [next(Candidates([(0, row)], columns).judged())[-1] for row in rows[:100]]
    if (known := {*known} - {"unknown_shape", "malformed"}) == {"label_unclear"}:
        raise UserError(f"These rows are no pairs: {advise([(row, 'label_unclear') for row in rows])}.")
    if known:
        return "pairs", ""
    names = Layout.of(tuple(dict.fromkeys(name for row in rows for name in row))).names
    mark = columns.get("winner") or next((names[n] for n in (*THUMBS, *SCORES, *RANKS) if n in names), "")
    cells = [cell for cell in (at(row, mark) for row in rows) if not missing(cell)] if mark else []
    thumbs, numbers, short = set(map(thumb, cells)), all(map(is_number, cells)), fold(mark)
    if cells and numbers and given >= alone and (short in SCORES + RANKS or given and None in thumbs):
        return "ranks" if short in RANKS else "scores", mark
    if thumbs - {None} and not (numbers and None in thumbs):
        return "thumbs", mark
    if not cells or alone and not given:
        return "single", ""
    some = ", ".join(dict.fromkeys(repr(cell)[:20] for cell in cells[:99]))[:99]
    way = f"set columns to 'winner={mark}' if more is better" if numbers else "write up or down into it"
    raise UserError(f"What {mark!r} says of an answer ({some}) is not clear: {way}; if nothing, {_NAME}.")


def _of_answers(rows, columns, kind: str, mark: str, sample: bool, left: Counter) -> list:
    """Set the best answers to each prompt against the worst; a lone one, or if `sample`, against LACKING."""
    groups, found = {}, []
    for index, row in rows:
        try:
            pair, cell = _alone(index, row, columns), at(row, mark) if mark else True
            value = thumb(cell) if kind in ("thumbs", "single") else float(cell) if is_number(cell) else None
            drop_if(value is None, "no clear thumb or score")
        except BadRow as bad:
            left[str(bad)] += 1
            continue
        key = index if kind == "single" else json.dumps([pair.prompt, pair.tools], default=str)
        groups.setdefault(key, []).append((-value if kind == "ranks" else value, pair))
    for group in groups.values():
        (least, most), pairs = (end(value for value, _ in group) for end in (min, max)), len(group)
        best, worst = ([pair for value, pair in group if value == end] for end in (most, least))
        if most == least and (kind == "single" or sample and kind == "thumbs" and most):
            plain = [(pair, [pair.index]) for pair in best if not (pair.tools or pair.chosen_with)]
            left += Counter({"tools or reasoning, which are not sampled": len(best) - len(plain)})
            found += plain
        elif most == least or most - least < float(columns.get("margin", 0)):
            why = ("up without a down" if most else "down without an up") if kind == "thumbs" else "tie"
            left[why if kind == "thumbs" or pairs > 1 else "only one answer"] += pairs
        else:  # the first against the first, and so on; the shorter list begins again
            for i in range(max(len(best), len(worst))):
                a, b = best[i % len(best)], worst[i % len(worst)]
                if a.answers()[0] == b.answers()[0]:
                    left["identical_answers"] += 1
                else:
                    against = replace(a, rejected=b.chosen, rejected_with=b.chosen_with)
                    found.append((against, [a.index, b.index]))
    return found


def _alone(index: int, row, columns: dict[str, str]) -> Pair:
    """Read a row with one answer; LACKING stands for the other one."""
    drop_if(not isinstance(row, dict), "malformed")
    talk = at(row, columns.get("chosen", "chosen"))
    lacking = [*talk[:-1], {"role": "assistant", "content": LACKING}] if isinstance(talk, list) else LACKING
    return to_pair(index, row | {"rejected": lacking}, columns | {"rejected": "rejected"})


def row_of(pair: Pair, origin: dict) -> dict:
    """Give a pair and its origin as a row that `dataset` reads back so: texts if they do, else messages."""
    plain = {"prompt": pair.prompt[-1]["content"], "chosen": pair.chosen, "rejected": pair.rejected}
    try:
        same = to_pair(pair.index, plain) == pair
    except BadRow:
        same = False
    sides = [[{"role": "assistant", "content": text} | more] for text, more in pair.answers()]
    whole = {"prompt": list(pair.prompt), "chosen": sides[0], "rejected": sides[1]}
    return (plain if same else whole | {"tools": list(pair.tools)}) | {"from": origin}
