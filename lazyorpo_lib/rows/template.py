"""A pair -> the text that the chat template makes of it: prompt, answers, ends; nothing of it lost.

The template is a stranger's program, so it runs under a limit of time and memory, and reads one clock, the
run's. A plain answer is put where it puts a mark; one with reasoning or tool calls is written by the
template itself. Every message must be found in what comes before the answer: else another form of the prompt
is tried, else the pair is refused.
"""

import datetime
import json
import re
import time
from collections.abc import Iterable

from ..errors import UserError
from ..orpo.encoding import Encoder, Unusable, tried
from ..settings import Settings
from . import limits

SECONDS = 10  # for all that is written of 64 pairs
# What templates call it that do not think by themselves.
THINKING = dict.fromkeys(("enable_thinking", "thinking"), True)
_MARK = "lazyorpo{}mark"  # stands for a message's text, to see what a template puts around it
_ANSWER = _MARK.format("answer")
_OPEN = re.compile(r"<think>\s*$")
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_SWITCHES = re.compile(r"/no_think|/think|/system_override|</?think>")  # words that templates act upon

Piece = tuple[str, bool]  # a text; whether names of special tokens in it are plain text


class Template:
    """Writes pairs with a tokenizer's chat template; `clock`: the time it is told, seconds since 1970."""

    def __init__(self, tokenizer, clock: float | None = None):
        self.tokenizer = tokenizer
        self._now = datetime.datetime.fromtimestamp(clock or time.time())
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special = (special | set(tokenizer.all_special_tokens)) - {"<think>", "</think>", "", None}
        special = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._knows = str(tokenizer.chat_template)
        self._shows: dict[tuple, bool] = {}

    def write_all(self, pairs: Iterable) -> list[tuple[tuple[list[Piece], ...] | None, str]]:
        """Write each pair as the pieces of its prompt, its chosen and rejected answer with their ends, and
        ""; or give None and the reason why it cannot be written."""
        return self._limited(lambda: [tried(self._pair, pair) for pair in pairs])

    def prompt(self, messages) -> list[Piece]:
        """Write what the model answers from. Raises Unusable(reason)."""
        return self._limited(lambda: self._pieces(*self._around(messages, ())[:2], ()))

    def _limited(self, write):
        try:
            with limits.seconds(SECONDS), limits.memory():
                return write()
        except limits.OverLimit as over:
            why = f"The chat template of {self.tokenizer.name_or_path!r} {over} for a few pairs"
            raise UserError(f"{why}: choose another base_model.") from None

    def _write(self, messages, tools, **more) -> str:
        """Write messages; "" where the template raises, as it likes, at what it does not know."""
        name, others = "reasoning_content", ("reasoning", "thinking")
        messages = [m | dict.fromkeys(others, m[name]) if name in m else m for m in messages]
        more |= {"tools": list(tools)} if tools else {}
        try:
            text = self.tokenizer.get_chat_template(None, more.get("tools"))
            text = _CLOCK.sub(lambda call: repr(self._now.strftime(call[2])), text)
            return self.tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **more)
        except MemoryError:
            raise
        except Exception:
            return ""

    def _answered(self, form, answer: str, tools) -> str:
        return self._write([*form, {"role": "assistant", "content": answer}], tools)

    def _around(self, messages, tools) -> tuple[list[dict], str, str]:
        """Give the form of the messages that the template takes whole, and what is around an answer."""
        why = "template_refuses"
        for form in (list(messages), _merged(messages)):
            before, *afters = self._answered(form, _ANSWER, tools).split(_ANSWER)
            if len(afters) != 1:
                continue
            if not (lost := _lost(before, messages, tools)) and self._shows_all(form):
                return form, before, afters[0]
            why = lost or "prompt_text_lost"
        raise Unusable(why)

    def _shows_all(self, form) -> bool:
        """Tell whether the template writes every message of such a form, whatever it says."""
        key = tuple(m["role"] for m in form)
        if "tool" in key or any(m.keys() > {"role", "content"} for m in form):
            return True  # such a template may want what a mark is not
        if key not in self._shows:
            marked = _marked(form)
            text = self._answered(marked, _ANSWER, ())
            self._shows[key] = not text or all(m["content"] in text for m in marked)
        return self._shows[key]

    def _end(self, after: str) -> str:
        if special := self.special.search(after):
            return after[: special.end()]
        if self.tokenizer.eos_token is None:
            raise Unusable("no_end_token")
        return self.tokenizer.eos_token

    def _pieces(self, form, before: str, tools) -> list[Piece]:
        """Part a prompt into what the template wrote and what others did, whose special tokens are text."""
        if not self.special.search(_all_text(form, tools)):
            return [(before, False)]
        around = self._answered(_marked(form), _ANSWER, tools).split(_ANSWER)[0]
        pieces = re.split(r"(lazyorpo\d+mark)", around)
        for clean in (str, str.strip):
            texts = {_MARK.format(i): clean(m["content"]) for i, m in enumerate(form)}
            filled = [(texts.get(piece, piece), piece in texts) for piece in pieces]
            if "".join(text for text, _ in filled) == before:
                return [(text, own) for text, own in filled if text]
        raise Unusable("special_token_text")

    def _pair(self, pair):
        sides = [_lone({"role": "assistant", "content": text} | more) for text, more in pair.answers()]
        form, before, after = self._around(pair.prompt, pair.tools)
        if found := self._rich(form, sides, pair.tools, before, after):
            return found
        texts = [self._kept(form, side["content"], pair.tools, before, after) for side in sides]
        return self._parted(self._pieces(form, before, pair.tools), texts, self._end(after))

    def _parted(self, prompt, texts, end):
        """Give a pair's pieces; spaces that end a prompt go to the answers, whose first token has them."""
        (last, own), lead = prompt[-1], ""
        if not own:
            lead = last[len(last.rstrip(" ")) :]
            prompt = [*prompt[:-1], (last.removesuffix(lead), own)]
        if len(prompt) == 1 and not any(map(self.special.search, texts)):
            return prompt, *([(lead + text + end, False)] for text in texts)
        return prompt, *([(lead + text, True), (end, False)] for text in texts)

    def _kept(self, form, text: str, tools, before: str, after: str) -> str:
        """Give an answer with as much of the white space around it as the template leaves."""
        core = text.strip()
        if core == text:
            return text
        start, stop = text.split(core, 1)
        left, _, right = self._answered(form, start + _ANSWER + stop, tools).partition(_ANSWER)
        if not (left.startswith(before) and right.endswith(after)):
            return text
        return left[len(before) :] + core + right[: len(right) - len(after)]

    def _thought(self, side) -> tuple[str | None, str]:
        """Give an answer's reasoning, or None, and what it says after it."""
        if "reasoning_content" in side:
            return side["reasoning_content"], side["content"]
        if re.search("think>|thinking|reasoning", self._knows):
            if found := _THOUGHT.fullmatch(side["content"]):
                return found[1].strip("\n"), found[2].lstrip("\n")
        return None, side["content"]

    def _rich(self, form, sides, tools, before: str, after: str):
        """Give the pieces of a pair with reasoning or calls as the template writes them, or as a model that
        thinks does; None for plain text, also with reasoning of which the template knows nothing."""
        thinks = any(self._thought(side)[0] is not None for side in sides)
        beside = {name for side in sides for name in side} - {"role", "content"}
        if not (thinks or beside):
            return None
        if self.special.search(_all_text([*form, *sides], tools)):
            raise Unusable("special_token_text")
        for more in ({}, THINKING):
            start = self._write(form, tools, add_generation_prompt=True, **more)
            if not start or thinks and start.rstrip().endswith("</think>"):
                continue
            heads = [start, before] if thinks else [before, start]
            if start == self._write(form, tools, **more):  # it knows no prompt to answer from
                heads = [before]
            for head in heads:
                bodies = [self._body(head, form, side, tools, more) for side in sides]
                if all(bodies):
                    texts = [self._ended(body, after) for body in bodies]
                    return self._parted([(head, False)], texts, "")
            if "think>" in self._knows and "tool_calls" not in beside:
                texts = [self._spoken(start, side) for side in sides]
                return self._parted([(start, False)], texts, self._end(after))
        if beside:
            raise Unusable("tool_calls" if "tool_calls" in beside else "reasoning")
        return None

    def _body(self, head: str, form, side, tools, more) -> str:
        """Give what the template writes of an answer after `head`, if all of it is there; else ""."""
        reasoning, text = self._thought(side)
        ways = [side]
        if reasoning is not None:
            ways.insert(0, side | {"content": text, "reasoning_content": reasoning})
        for way in ways:
            body = self._write([*form, way], tools, **more)
            if body.startswith(head):
                body = body[len(head) :]
                said = body.find((reasoning or "").strip())
                blocks = body.count("</think>") - (text + (reasoning or "")).count("</think>")
                opened = "</think>" not in body or "<think>" in body or _OPEN.search(head)
                whole = said >= 0 and text.strip() in body[said:] and not _lost(body, [side], ())
                if whole and opened and blocks <= 1:
                    return body
        return ""

    def _spoken(self, start: str, side) -> str:
        """Give an answer as a model emits it that thinks between tags; `start` may hold the first one."""
        reasoning, text = self._thought(side)
        opened = _OPEN.search(start)
        if "reasoning_content" in side:
            text = f"<think>\n{reasoning}\n</think>\n\n{text}"
        elif reasoning is not None:
            text = side["content"].lstrip()
            text = text if text.startswith("<think>") else f"<think>\n{text}"
        elif opened:
            text = f"<think>\n\n</think>\n\n{text}"
        if opened:
            text = text.removeprefix(opened[0] if text.startswith(opened[0]) else "<think>")
        return text

    def _ended(self, body: str, after: str) -> str:
        """Cut what the template writes after an answer's end."""
        if after and body.endswith(after):
            return body.removesuffix(after) + self._end(after)
        specials = list(self.special.finditer(body))
        return body[: specials[-1].end()] if specials else body.rstrip() + self._end("")


def encoder_of(tokenizer, settings: Settings, *, clock: float | None = None) -> Encoder:
    """Give the encoder of a run: its tokenizer's template, and the limits of its settings."""
    limits = {name: getattr(settings, name) for name in ("max_prompt_tokens", "max_tokens", "overlong")}
    return Encoder(Template(tokenizer, clock), **limits)


def _marked(form) -> list[dict]:
    """Put a mark into each message in place of its text."""
    return [m | {"content": _MARK.format(i)} for i, m in enumerate(form)]


def _lone(side) -> dict:
    """Give an answer whose reasoning stands in its text and in a field with the text alone."""
    found = _THOUGHT.fullmatch(side["content"]) if "reasoning_content" in side else None
    if found and found[1].strip() != side["reasoning_content"].strip():
        raise Unusable("reasoning")  # which of the two?
    return {name: part for name, part in side.items() if not (found and name == "reasoning_content")}


def _merged(messages) -> list[dict]:
    """Join turns for templates that know no system turn, or no two turns of one role."""
    joined: list[dict] = []
    for message in messages:
        turn = message | {"role": "user"} if message["role"] == "system" else dict(message)
        plain = turn.keys() == {"role", "content"} and turn["role"] != "tool"
        if plain and joined and joined[-1].keys() == turn.keys() and joined[-1]["role"] == turn["role"]:
            joined[-1]["content"] += "\n\n" + turn["content"]
        else:
            joined.append(turn)
    return joined


def _leaves(value) -> list[str]:
    """Give every name and every text of a tool or of the call of one."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None and k not in ("id", "type", "index")}
        inner = [leaf for item in kept.values() for leaf in _leaves(item)]
        return [k for k in value.get("properties") or value.get("arguments") or () if k in value] + inner
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, str) and value.strip() else []


def _lost(before: str, messages, tools) -> str:
    """Give the reason if a text is not in what comes before the answer: its white space may be trimmed, and
    of earlier turns of the assistant the reasoning goes; "" if all is there."""
    texts = []
    for m in messages:
        kept = m["content"].rpartition("</think>")[2] if m["role"] == "assistant" else m["content"]
        texts += filter(None, map(str.strip, _SWITCHES.split(kept)))
    calls = [leaf for message in messages for leaf in _leaves(message.get("tool_calls"))]
    named = {"prompt_text_lost": texts, "tool_calls": calls, "tools": _leaves(tools)}
    for reason, wanted in named.items():
        rest = before
        for text in sorted(wanted, key=len, reverse=True):
            spelled = text if text in rest else json.dumps(text, ensure_ascii=False)[1:-1]
            if spelled not in rest:
                return reason
            if reason == "prompt_text_lost":
                rest = rest.replace(spelled, "\0", 1)
    return ""


def _all_text(messages, tools) -> str:
    return "\0".join(str(part) for message in messages for part in message.values()) + str(tools or "")
