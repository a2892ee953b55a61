"""A row of any common shape -> prompt, chosen, rejected; and which of its columns was what.

Columns are known by their names (`columns.py`), and by a few rules: the prompt may be inside both sides; two
answers may have a label, a winner or a score each, which is read and never guessed; of a list of scored
answers the best goes against the worst. What no rule covers is a `BadRow` with its reason.
"""

import json
import re

from ..orpo.data import Message, Pair
from . import columns as tables
from .columns import Layout, at, core, fold
from .messages import BadRow, as_messages, drop_if, first_filled, is_transcript, missing, read, transcript

TIE = 2  # beside 0 and 1, the better one of two answers


class _Row:
    """A row while it is read: its cells by folded names, the user's mapping, and what was used as what."""

    def __init__(self, cells: dict, columns: dict[str, str]):
        self.cells, self.columns, self.layout = cells, columns, Layout.of(tuple(cells))
        self.used: dict[str, str] = {}
        self.unknown: set[str] = set()

    def take(self, part: str):
        """Give what was mapped to a part, else the first cell that holds something of columns for it."""
        if part in self.columns:
            self.mark(self.columns[part], part)
            return at(self.cells, self.columns[part])
        for column in self.layout.parts.get(part, ()):
            if column not in self.used and not missing(self.cells.get(column)):
                self.used[column] = part
                return self.cells[column]
        return None

    def mark(self, path: str, part: str) -> None:
        column = path if path in self.cells else path.partition(".")[0]
        self.used[self.layout.names.get(fold(column), column)] = part

    def rest(self) -> tuple[str, ...]:
        names = [str(n) for n, cell in self.cells.items() if n not in self.used and not missing(cell)]
        return (*names, *sorted(self.unknown))


def to_pair(index: int, row, columns: dict[str, str] | None = None) -> Pair:
    """Turn a row of any shape into a pair; `columns` as from `parse_columns`. Raises BadRow(reason)."""
    if not isinstance(row, dict) or None in row:  # the key None: a CSV line with more cells than columns
        raise BadRow("malformed")
    row = _Row(row, columns or {})
    answers = _answers(row)
    name, cell = _prompt(row)
    if "one of two answers" in row.used.values():
        cell, answers = _arena(cell, answers)
    given = _history(row, name) + _given(row, name, cell)
    if all(map(is_transcript, answers)) and (not given or is_transcript(cell)):
        inside, sides = "transcript", [transcript(text) for text in answers]
    else:
        if is_transcript(cell):  # the space after "Assistant:" is not the answer's
            answers = [text.removeprefix(" ") if isinstance(text, str) else text for text in answers]
        inside, sides = "messages", [as_messages(answer, "assistant", row.unknown) for answer in answers]
    if "prompt and chosen" in row.used.values():
        sides[1] = sides[0][:-1] + sides[1]
    drop_if(not all(sides), "empty_answer")
    (*head, best), (*other, worst) = sides
    drop_if(not best["role"] == worst["role"] == "assistant", "no_answer")
    drop_if(head != other, "prompts_differ")
    drop_if(not (head or given or row.layout.parts["prompt"] or "prompt" in row.columns), "unknown_shape")
    has_user = "user" in [turn["role"] for turn in head]
    prompt, tools = _joined(row, head, given, has_user), _tools(row)
    more = ("reasoning_content", "tool_calls")
    beside = ({name: turn[name] for name in more if name in turn} for turn in (best, worst))
    shape = inside if has_user else "prompt" if "prompt" in row.columns else fold(name)
    both = best["content"], worst["content"], shape, *beside
    return _checked(Pair(index, prompt, *both, tools, row.used, row.rest()))


def _answers(row: _Row) -> list:
    """Give the better and the worse answer, as they stand in the row."""
    mapped, sides, both = set(row.columns), row.layout.sides, row.layout.both
    if not {"chosen", "rejected"} & mapped and (not sides or {"a", "b"} & mapped):
        return (_labelled if both or {"a", "b"} <= mapped else _ranked)(row)
    if both and sides and len(fold(str(row.cells[sides["chosen"]]))) == 1:  # "chosen": "B" names a side
        return _labelled(row)
    row.columns = sides | row.columns
    drop_if(not {"chosen", "rejected"} <= row.columns.keys(), "unknown_shape")
    found = [row.take("chosen"), row.take("rejected")]
    if "chosen" not in mapped and fold(sides["chosen"]) in ("messages", "conversations"):
        row.used[sides["chosen"]] = "prompt and chosen"
    return found


def _labelled(row: _Row) -> list:
    """Give two answers in the order that a label, a winner or scores tell."""
    filled = (two for two in row.layout.both if not any(missing(row.cells[name]) for name in two.values()))
    if {"a", "b"} <= row.columns.keys():
        sides = {side: row.columns[side] for side in "ab"}
    elif not (sides := next(filled, {})):
        raise BadRow("empty_answer")
    best, found = _winner(row, sides), [at(row.cells, name) for name in sides.values()]
    for name in sides.values():
        row.mark(name, "one of two answers")
    return [found[best], found[1 - best]]


def _winner(row: _Row, sides: dict) -> int:
    """Tell which of two answers is better, 0 or 1."""
    names, tokens, votes = row.layout.names, list(sides), []
    scored = [(core(s, tables.SCORES), n) for s, n in names.items() if {*s.split("_")} & {*tables.SCORES}]
    scores = [[name for side, name in scored if side == token] for token in tokens]
    for a, b in zip(*scores, strict=False):
        if is_number(row.cells[a]) and is_number(row.cells[b]):
            row.used |= {a: "score", b: "score"}
            votes.append(_ordered(float(row.cells[a]) - float(row.cells[b]), row))
            break
    labels = [row.columns["winner"]] if "winner" in row.columns else []
    any_of = (*tables.SIGNED, *tables.LABELS)
    labels += [name for s, name in names.items() if s in any_of or core(s, {"id"}) in tables.WINNERS]
    for name in labels:
        if (vote := _vote(row, name, sides)) is not None:
            row.mark(name, "label")
            votes.append(vote)
            break
    flags = {core(s, {"winner", "model"}): name for s, name in names.items() if s.startswith("winner_")}
    for vote, side in enumerate((*tokens, "tie") if flags.keys() >= sides.keys() else ()):
        if side in flags:  # winner_model_a: 1, …_b: 0
            votes += [vote] * (str(row.cells[flags[side]]).lower() in ("1", "1.0", "true"))
            row.used[flags[side]] = "label"
    drop_if(TIE in votes, "tie")
    drop_if(len(set(votes)) != 1, "label_unclear" if votes or labels or any(scores) else "unknown_shape")
    return votes[0]


def _ordered(difference: float, row: _Row) -> int:
    least = float(row.columns.get("margin", 0))
    return TIE if difference == 0 or abs(difference) < least else int(not difference > 0)


def _vote(row: _Row, name: str, sides: dict) -> int | None:
    """Give what a label says: 0, 1, TIE; None where its value names neither side."""
    value, short, tokens = at(row.cells, name), fold(name), list(sides)
    if is_number(value):
        if short in tables.SIGNED:
            return _ordered(-float(value), row)
        is_own = core(short, {"id"}) in tables.WINNERS and (tokens == ["0", "1"] or short.endswith("_id"))
        number = f"{float(value):g}"
        return tokens.index(number) if is_own and number in tokens else None
    if not isinstance(value, str):
        return None
    said = fold(value)
    if said in tables.TIES:
        return TIE
    models = [row.cells.get(row.layout.names.get(f"model_{side}")) for side in tokens]
    ways = [[fold(column) for column in sides.values()], tokens, models * (models[0] != models[1])]
    words = (value, said, core(said, {"model"}))
    return next((way.index(word) for way in ways for word in words if word in way), None)


def is_number(value) -> bool:
    """Tell whether a cell is a number, also as text."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value))
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _ranked(row: _Row) -> list:
    """Give the best and the worst of a list of answers that have scores or ranks."""
    names = row.layout.names
    lists = (names[n] for n in tables.LISTS if isinstance(row.cells.get(names.get(n)), list | tuple))
    if (listed := next(lists, None)) is None:
        raise BadRow("unknown_shape")
    items, marks = row.cells[listed], []
    if all(isinstance(item, dict) for item in items):
        short = [{fold(str(name)): cell for name, cell in item.items()} for item in items]
        texts = [first_filled(s, tables.TEXTS) for s in short]
        for sign, kinds in ((1, tables.SCORES), (-1, tables.RANKS)):
            found = [next((sign * float(s[n]) for n in kinds if is_number(s.get(n))), None) for s in short]
            marks = marks or found * (None not in found)
    else:
        texts = items
        for sign, kinds, part in ((1, tables.SCORES, "scores"), (-1, tables.RANKS, "ranks")):
            beside = next((names[n] for n in kinds if n in names), None)
            found = row.cells.get(beside)
            if isinstance(found, list | tuple) and len(found) == len(items) and all(map(is_number, found)):
                marks = [sign * float(mark) for mark in found]
                row.used[beside] = part
    drop_if(len(marks) < 2 or None in texts, "unknown_shape")
    best, worst = marks.index(max(marks)), len(marks) - 1 - marks[::-1].index(min(marks))
    drop_if(_ordered(marks[best] - marks[worst], row) != 0, "tie")
    row.used[listed] = "the best and the worst answer"
    return [texts[best], texts[worst]]


def _arena(cell, answers: list) -> tuple:
    """Give talks where prompt and answers are each a list of as many turns as text: '["Why?"]', '["Yes"]'."""
    texts = [text for text in (cell, *answers) if isinstance(text, str)]
    asked, *said = turns = [*map(read, texts)] or [""]
    if len(texts) < 3 or not all(isinstance(t, list) and len(t) == len(asked) for t in turns):
        return cell, answers
    return "", [_turns(zip(asked, one, strict=True), "messages_as_text") for one in said]


def _turns(talk, otherwise: str) -> list:
    """Give [(asked, said), …] as messages; what is no text drops the row, with the reason `otherwise`."""
    said = [(role, text) for pair in talk for role, text in zip(("user", "assistant"), pair, strict=True)]
    drop_if(not all(isinstance(text, str) for _, text in said), otherwise)
    return [Message(role=role, content=text) for role, text in said]


def _prompt(row: _Row) -> tuple[str, object]:
    """Give the prompt's column and what it holds, out of an object with `messages` too."""
    before = set(row.used)
    cell = row.take("prompt")
    name = next((n for n, part in row.used.items() if part == "prompt" and n not in before), "")
    is_object = isinstance(cell, dict) and not {"role", "from"} & cell.keys()
    inside = ("messages", "prompt", "full_text", "text", "content") if is_object else ()
    if inner := next((n for n in inside if n in cell), None):
        others = [n for n, c in cell.items() if n not in (inner, "tools") and not missing(c)]
        row.unknown |= {f"{name}.{n}" for n in others}
        if not missing(cell.get("tools")):
            row.cells = row.cells | {"tools": cell["tools"]}
        cell = cell[inner]
    return name, cell


def _given(row: _Row, name: str, cell) -> list:
    turns = as_messages(cell, "user", row.unknown)
    if fold(name) not in tables.PROMPTS[:4] and turns and turns[-1]["role"] == "user":
        below = [n for n in map(row.layout.names.get, tables.BELOW) if n and n not in row.used]
        below = [n for n in below if isinstance(row.cells[n], str) and not missing(row.cells[n])]
        turns[-1]["content"] = "\n\n".join([turns[-1]["content"], *(row.cells[n] for n in below)])
        row.used |= dict.fromkeys(below, "prompt")
    return turns


def _history(row: _Row, prompt: str) -> list:
    """Give the turns before the prompt: messages, or a list of [said, answered]."""
    column = row.layout.names.get("history")
    is_talk = "history" in row.columns or isinstance(read(row.cells.get(column)), list | tuple)
    if column == prompt or not is_talk:
        return []
    talk = read(row.take("history")) or []
    lists = isinstance(talk, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in talk)
    return _turns(talk, "malformed") if lists else as_messages(talk, "user", row.unknown)


def _joined(row: _Row, head, given, has_user) -> tuple:
    """Join the turns inside the answers, the prompt column and the system column; nothing twice."""
    turns = head + given
    if has_user:
        turns = given if given[-len(head) :] == head else head
        spoken = [turn for turn in head if turn["role"] != "system"]
        if turns is head and given and given != spoken[-len(given) :]:
            row.used = {name: part for name, part in row.used.items() if part not in ("prompt", "history")}
    if "system" not in [turn["role"] for turn in turns]:
        system = [turn for turn in given[:1] if turn["role"] == "system"]
        turns = (as_messages(row.take("system"), "system", row.unknown) or system) + turns
    return tuple([turn for turn in turns if turn["role"] != "system" or turn["content"].strip()])


def _tools(row: _Row) -> tuple:
    column = row.columns.get("tools") or row.layout.names.get("tools", "tools")
    tools = read(at(row.cells, column))
    tools = [tools] if isinstance(tools, dict) else tools
    if missing(tools) or not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return ()
    row.used[column] = "tools"
    return tuple(tools)


def _checked(pair: Pair) -> Pair:
    roles = [turn["role"] for turn in pair.prompt]
    try:
        "".join([pair.chosen, pair.rejected, *[turn["content"] for turn in pair.prompt]]).encode()
        if pair.tools or pair.chosen_with or pair.rejected_with or max(map(len, pair.prompt), default=0) > 2:
            json.dumps([pair.prompt, pair.answers(), pair.tools], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("invalid_text") from None
    except (TypeError, ValueError, RecursionError):  # tools or calls that are no JSON
        raise BadRow("malformed") from None
    drop_if(not roles or missing(pair.prompt[-1]["content"]) and roles[-1] != "tool", "empty_prompt")
    drop_if(roles[-1] not in ("user", "tool") or "user" not in roles, "no_user_turn")
    said = [(text.strip(), more) for text, more in pair.answers()]
    drop_if(any(not text and "tool_calls" not in more for text, more in said), "empty_answer")
    drop_if(said[0] == said[1], "identical_answers")
    return pair
