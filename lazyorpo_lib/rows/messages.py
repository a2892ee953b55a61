"""A cell of a row -> messages: text, lists of messages in every style, parts, transcripts, tool calls.

A message has a role and a content that is text; beside them the reasoning and the tool calls of an assistant,
whatever they were called. What else it had is named, not kept. A cell that is none of it is a `BadRow`.
"""

import ast
import contextlib
import json
import math
import re

from ..orpo.data import Message

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "model", "ai", "chatgpt"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "ipython", "observation"), "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
_LIKE_MESSAGES = re.compile(r"""\s*(\[\s*)?\{\s*['"](role|from|content|value|messages)['"]\s*:""")


class BadRow(Exception):
    """A row that cannot be a pair; its text is the reason."""


def drop_if(wrong, reason: str) -> None:
    """Refuse the row for that reason, if something is wrong."""
    if wrong:
        raise BadRow(reason)


def missing(value) -> bool:
    """Tell whether a cell holds nothing."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or value == [] or value == {} or isinstance(value, float) and math.isnan(value)


def first_filled(cells: dict, names):
    """Give the first of the cells with these names that holds something, or None."""
    return next((cells[name] for name in names if not missing(cells.get(name))), None)


def read(cell):
    """Give what a text holds that is a list or an object as JSON or as Python writes it; else the cell."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        for parse in [json.loads] + [ast.literal_eval] * (len(cell) <= 2**20):  # takes 100 bytes for one
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = parse(cell.strip())
                return found if isinstance(found, list | dict) else cell
    return cell


def as_messages(cell, role: str, unknown: set) -> list:
    """Give a cell as messages: text is one turn of `role`, unless it is the prompt of a transcript."""
    if missing(cell):
        return []
    if isinstance(cell, str) and _LIKE_MESSAGES.match(cell):
        found = read(cell)
        found = found.get("messages", found) if isinstance(found, dict) else found
        if isinstance(found, list | dict) and _are_messages(found):
            cell = found
        elif isinstance(found, str) and cell.lstrip().startswith("["):
            raise BadRow("messages_as_text")
    if isinstance(cell, str):
        if role == "user" and is_transcript(cell) and cell.rstrip().endswith("\n\nAssistant:"):
            return transcript(cell)[:-1]
        return [Message(role=role, content=cell)]
    if isinstance(cell, dict) and all(isinstance(part, list) for part in cell.values()):
        if len({*map(len, cell.values())}) == 1:  # a dict of lists, as Arrow makes of a list of dicts
            cell = [dict(zip(cell, parts, strict=True)) for parts in zip(*cell.values(), strict=True)]
    drop_if(not isinstance(cell, dict | list | tuple), "malformed")
    cell = _unmapped(cell)
    items = [cell] if isinstance(cell, dict) else list(cell)
    if len(items) == 1 and isinstance(items[0], str):
        return [Message(role=role, content=items[0])]
    return [_message(item, unknown) for item in items]


def _unmapped(cell):
    """Give maps as objects, where Arrow gives them as lists of (name, value)."""
    if isinstance(cell, list) and cell and all(isinstance(p, tuple) and len(p) == 2 for p in cell):
        return {str(name): value for name, value in cell}
    return [_unmapped(item) for item in cell] if isinstance(cell, list) else cell


def _are_messages(found) -> bool:
    if isinstance(found, dict) and str(found.get("role", found.get("from"))).lower() in ("user", "human"):
        return False  # an answer, or a question, about a message
    items = [found] if isinstance(found, dict) else found
    names = [{"role", "content"}, {"from", "value"}]
    return all(isinstance(item, dict) and any(pair <= item.keys() for pair in names) for item in items)


def _message(item, unknown: set) -> Message:
    drop_if(not isinstance(item, dict), "malformed")
    # a table that mixes both styles holds all four names in each message, two of them null
    item = {name: cell for name, cell in item.items() if cell is not None}
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    calls = _calls(item.get("tool_calls"))
    content, reasoning = _joined_parts(content, first_filled(item, REASONING))
    content = "" if content is None and calls else content
    drop_if(not isinstance(role, str) or not isinstance(content, str), "malformed")
    if not (role := ROLES.get(role.strip().lower())):
        raise BadRow("unknown_role")
    own = ("name", "tool_call_id") if role == "tool" else ()
    message = Message(role=role, content=content)
    message |= {name: item[name] for name in own if not missing(item.get(name))}
    message |= {"reasoning_content": reasoning} if isinstance(reasoning, str) else {}
    message |= {"tool_calls": calls} if calls else {}
    known = {"role", "from", "content", "value", "tool_calls", *REASONING, *own}
    unknown |= {f"{name} of a message" for name, c in item.items() if name not in known and not missing(c)}
    return message


def _calls(cell) -> list:
    """Give tool calls with their arguments as objects, which is how templates want them."""
    if missing(calls := read(cell)):
        return []
    drop_if(not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls), "malformed")
    found = []
    for call in calls:
        inner = call.get("function", call)
        drop_if(not isinstance(inner, dict) or not isinstance(inner.get("name"), str), "malformed")
        inner = inner | ({"arguments": read(inner["arguments"])} if "arguments" in inner else {})
        around = call if "function" in call else {"type": "function"}
        found.append(around | {"function": inner})
    return found


def _joined_parts(content, reasoning):
    """Join content that is a list of parts; one that is no text is refused by name."""
    if not isinstance(content, list | tuple):
        return content, reasoning
    texts, thoughts = [], [reasoning] if isinstance(reasoning, str) else []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else ""
        text = part.get(kind) if kind in ("text", *REASONING) else None
        if not isinstance(text, str):
            known = [name for name in ("image", "audio", "video", "file", "document") if name in str(kind)]
            raise BadRow(f"{known[0]}_part" if known else "unknown_part" if kind else "malformed")
        (texts if kind == "text" else thoughts).append(text)
    return "\n".join(texts), "\n".join(thoughts) or reasoning


def is_transcript(cell) -> bool:
    return isinstance(cell, str) and cell.lstrip().startswith("Human:") and "\n\nAssistant:" in cell


def transcript(text: str) -> list:
    _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    who = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [Message(role=who[name], content=said.removeprefix(" ")) for name, said in turns]
