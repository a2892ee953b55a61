"""A pair -> token ids: what the model reads, what is scored, what is cut.

Scored are the tokens of each answer and the token that ends it, nothing else. The chat template is the
tokenizer's own; a base model without one gets `DEFAULT_TEMPLATE`. It drops no pair itself (it says why one
cannot be used), and builds no batches.
"""

import contextlib
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby, islice

import numpy as np
import torch

from ..errors import UserError
from . import data
from .batching import EncodedPair

# For base models without a chat template (phi-2, Llama-2, Mistral): plain words that every tokenizer knows,
# and its own end token after each assistant turn. It is saved with the trained model.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
_MARK = "lazyorpo{}mark"  # stands for a message's text, to see what a template puts around it


class Unusable(Exception):
    """A pair that cannot be encoded faithfully; its text is the reason, as counted in the data report."""


def prepare_tokenizer(tokenizer) -> list[str]:
    """Give a tokenizer what training and generation need; returns what was added, in words.

    Raises:
        UserError: nothing in its vocabulary can end an answer.
    """
    notes, bos = [], tokenizer.bos_token_id
    if not tokenizer.chat_template:
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos + DEFAULT_TEMPLATE
        notes += ["the tokenizer has no chat template: a plain one (User: … Assistant: …) is used and saved"]
        if tokenizer.eos_token is None:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path!r} has neither a chat template nor an "
                "end-of-sequence token, so no answer could ever end; set tokenizer.eos_token, save it, "
                "and give that folder as base_model."
            )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        # For generation alone; training has no padding to mistake for an end.
        tokenizer.pad_token = tokenizer.eos_token
        notes += [f"no pad token: {tokenizer.eos_token!r} pads while generating"]
    return notes


class Encoder:
    """Encodes pairs with one tokenizer and one set of limits.

    Args:
        tokenizer: a transformers tokenizer, after `prepare_tokenizer`.
        max_prompt_tokens, max_tokens: longest prompt, and longest prompt plus answer, in tokens.
        overlong: "drop", or "truncate": the prompt loses its left, an answer its last tokens, never its end.
    """

    def __init__(self, tokenizer, *, max_prompt_tokens: int, max_tokens: int, overlong: str = "drop"):
        self.tokenizer, self.overlong, self.max_tokens = tokenizer, overlong, max_tokens
        # Room for one answer token and its end.
        self.max_prompt_tokens = min(max_prompt_tokens, max_tokens - 2)
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special = sorted(filter(None, special | set(tokenizer.all_special_tokens)), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def encode(self, pairs: Iterable, chunk: int = 64) -> Iterator[tuple[object, EncodedPair | str]]:
        """Encode pairs in order; yields (pair, EncodedPair), or (pair, reason) where it cannot be used."""
        pairs = iter(pairs)
        while some := list(islice(pairs, chunk)):
            begun = [_tried(self._texts, pair) for pair in some]
            texts = [text for found in begun if isinstance(found, list) for text in found]
            ids = iter(self._ids(texts) if texts else [])  # of all of them in one call
            for pair, found in zip(some, begun, strict=True):
                if isinstance(found, list):
                    found = _tried(self._part, pair.index, *islice(ids, len(found)))
                yield pair, found

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Give the tokens from which the model answers `messages`, cut from the left."""
        before, _ = self._around_answer(messages)
        ids = self._join(messages, before) if self._mentions_special(messages) else self._ids([before])[0]
        return self._cut_prompt(ids)

    def _texts(self, pair) -> list[str] | EncodedPair:
        """Give the prompt, and it with either answer, as texts; or the pair, if it names special tokens."""
        before, end = self._around_answer(pair.prompt)
        lead = before[len(before.rstrip(" ")) :]  # "[/INST] " + "Hi": the token of "Hi" has the space
        before = before.removesuffix(lead)
        answers = [lead + pair.chosen, lead + pair.rejected]
        if not self._mentions_special(pair.prompt) and not any(map(self._special.search, answers)):
            return [before, *(before + answer + end for answer in answers)]
        ends = self._ids([end])[0]
        chosen, rejected = (ids + ends for ids in self._ids(answers, as_text=True))
        return self._finish(pair.index, self._join(pair.prompt, before), chosen, rejected)

    def _part(self, index: int, prompt: list[int], *wholes: list[int]) -> EncodedPair:
        return self._finish(index, prompt, *(self._after(prompt, whole) for whole in wholes))

    def _ids(self, texts: list[str], *, as_text: bool = False) -> list[list[int]]:
        """Give token ids without anything added; `as_text` reads names of special tokens as plain text."""
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]

    def _mentions_special(self, messages) -> bool:
        return any(self._special.search(m["content"]) for m in messages)

    def _render(self, messages) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def _around_answer(self, messages) -> tuple[str, str]:
        """Give what the template puts before the answer to `messages`, and what ends it."""
        mark, text = _MARK.format("answer"), ""
        for form in (messages, _merged(messages)):
            # Templates raise what they like at turns they do not know; the merged form is tried next.
            with contextlib.suppress(Exception):
                text = text or self._render([*form, {"role": "assistant", "content": mark}])
        if text.count(mark) != 1:
            raise Unusable("template_refuses")
        before, after = text.split(mark)
        if special := self._special.search(after):
            return before, after[: special.end()]
        if self.tokenizer.eos_token is None:
            raise Unusable("no_end_token")
        return before, self.tokenizer.eos_token

    def _join(self, messages, before: str) -> list[int]:
        """Give the ids of a prompt whose texts name special tokens: only the template's own count."""
        answer = {"role": "assistant", "content": _MARK.format("answer")}
        for form in (messages, _merged(messages)):
            marks = [_MARK.format(i) for i in range(len(form))]
            marked = [m | {"content": mark} for m, mark in zip(form, marks, strict=True)]
            try:
                around = self._render([*marked, answer])
            except Exception:
                continue
            pieces = re.split(r"(lazyorpo\d+mark)", around.split(answer["content"])[0].rstrip(" "))
            for clean in (str, str.strip):
                texts = dict(zip(marks, (clean(m["content"]) for m in form), strict=True))
                filled = [(texts.get(piece, piece), piece in texts) for piece in pieces]
                if "".join(text for text, _ in filled) == before:
                    return [i for text, own in filled if text for i in self._ids([text], as_text=own)[0]]
        raise Unusable("special_token_text")

    def _after(self, prompt: list[int], whole: list[int]) -> list[int]:
        """Give the tokens of prompt + answer that are the answer's, given the tokens of the prompt alone."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]

        # The tokenizer merges across the border. The model will answer from `prompt` as it stands, so the
        # answer must be tokenized as its continuation; where that changes the text, the pair is refused.
        def decode(ids):
            return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

        text, start = decode(whole), decode(prompt)
        if text.startswith(start):
            rest = self._ids([text[len(start) :]])[0]
            if decode(prompt + rest) == text:
                return rest
        raise Unusable("tokens_cross_the_border")

    def _cut_prompt(self, prompt: list[int]) -> list[int]:
        if len(prompt) <= self.max_prompt_tokens:
            return prompt
        start = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
        return start + prompt[len(prompt) - self.max_prompt_tokens + len(start) :]

    def _finish(self, index: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair:
        if not prompt:
            raise Unusable("empty_prompt")
        longest = len(prompt) + max(len(chosen), len(rejected))
        if len(prompt) > self.max_prompt_tokens or longest > self.max_tokens:
            if self.overlong == "drop":
                raise Unusable("overlong")
            prompt = self._cut_prompt(prompt)
            room = self.max_tokens - len(prompt)
            chosen, rejected = (a if len(a) <= room else [*a[: room - 1], a[-1]] for a in (chosen, rejected))
        if chosen == rejected:
            raise Unusable("identical_after_encoding")
        return EncodedPair(index, prompt, chosen, rejected)


def _tried(encode, *given):
    try:
        return encode(*given)
    except Unusable as why:
        return str(why)


def _merged(messages) -> list[dict]:
    """Join turns for templates that know no system turn, or no two turns of one role."""
    runs = groupby(messages, lambda message: "user" if message["role"] == "system" else message["role"])
    return [{"role": role, "content": "\n\n".join(m["content"] for m in turns)} for role, turns in runs]


class PairFile:
    """Encoded pairs in an unnamed file on disk, so that memory stays flat however many there are."""

    def __init__(self):
        self._file, self._places, self.lengths = tempfile.TemporaryFile(), array("q"), array("q")
        self._tokens = None

    def append(self, pair: EncodedPair) -> None:
        sides = pair.prompt, pair.chosen, pair.rejected
        self._places.extend([pair.index, self._file.tell() // 4, *map(len, sides)])
        self.lengths.append(pair.tokens())
        self._file.write(np.concatenate(sides).astype(np.int32).tobytes())

    def lengths_of_sides(self) -> dict[str, np.ndarray]:
        """Count the tokens of each pair's prompt, chosen and rejected."""
        places = np.array(self._places).reshape(-1, 5)
        return dict(zip(("prompt", "chosen", "rejected"), places[:, 2:].T, strict=True))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> EncodedPair:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self._tokens is None:
            self._file.flush()
            self._tokens = np.memmap(self._file, dtype=np.int32, mode="r")
        index, start, p, c, r = self._places[5 * i : 5 * i + 5]
        ids = self._tokens[start : start + p + c + r].tolist()
        return EncodedPair(index, ids[:p], ids[p : p + c], ids[p + c :])


class Subset(torch.utils.data.Subset):
    """Some pairs of a PairFile, by position."""

    @cached_property
    def lengths(self) -> array:
        return array("q", (self.dataset.lengths[i] for i in self.indices))


def encode_rows(rows, encoder: Encoder, *, columns: str = "", on_drop=None) -> tuple[Iterator, "data.Report"]:
    """Clean rows, as `data.clean` does, and encode them.

    Returns:
        an iterator of what is kept, (Pair, EncodedPair), and the report, which counts the rest.
    """
    cleaned, report = data.clean(rows, columns=columns, on_drop=on_drop)

    def kept():
        for pair, encoded in encoder.encode(cleaned):
            if isinstance(encoded, str):
                report.drop(pair.index, encoded, pair)
            else:
                yield pair, encoded

    return kept(), report
