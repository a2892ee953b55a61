"""A pair -> token ids: what the model reads, what is scored, what is cut.

Scored are the tokens of each answer and the token that ends it, nothing else. The template that it is handed
writes the text; it drops no pair itself (it says why one cannot be used), and builds no batches.
"""

import itertools
import math
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property, partial

import numpy as np
import torch

from ..errors import UserError
from . import data
from .batching import EncodedPair
from .body import causal_lm, is_within, sizes_of, towers_of

# For base models without a chat template (phi-2, Llama-2, Mistral): plain words that every tokenizer knows,
# and its own end token after each assistant turn. It is saved with the trained model.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


class Unusable(Exception):
    """A pair that cannot be encoded faithfully; its text is the reason, as counted in the data report."""


def tried(write, *given) -> tuple[object, str]:
    """Call `write`; give the result and "", or None and the reason where it raises Unusable."""
    try:
        return write(*given), ""
    except Unusable as why:
        return None, str(why)
    except RecursionError:  # tools that are nested deeper than anybody reads
        return None, "template_refuses"


def prepare_tokenizer(tokenizer) -> list[str]:
    """Give a tokenizer what training and generation need; returns what was added, in words."""
    notes = []
    if not tokenizer.chat_template:
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos + DEFAULT_TEMPLATE
        notes += ["the tokenizer has no chat template: a plain one (User: … Assistant: …) is used and saved"]
        if tokenizer.eos_token is None:
            why = "neither a chat template nor an end-of-sequence token, so no answer could ever end"
            way_out = "set tokenizer.eos_token, save it, and give that folder as base_model"
            raise UserError(f"The tokenizer {tokenizer.name_or_path!r} has {why}; {way_out}.")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        # For generation alone; training has no padding to mistake for an end.
        tokenizer.pad_token = tokenizer.eos_token
        notes += [f"no pad token: {tokenizer.eos_token!r} pads while generating"]
    return notes


class Encoder:
    """Encodes pairs with one chat template, its tokenizer and one set of limits.

    Args:
        template: writes pairs as text with its `tokenizer`, after `prepare_tokenizer` (rows/template.py).
        max_prompt_tokens, max_tokens: longest prompt, and longest prompt plus answer, in tokens.
        overlong: "drop", or "truncate": the prompt loses its left, an answer its last tokens, never its end.
    """

    def __init__(self, template, *, max_prompt_tokens: int, max_tokens: int, overlong: str = "drop"):
        self.template, self.tokenizer = template, template.tokenizer
        self.overlong, self.max_tokens = overlong, max_tokens
        # Room for one answer token and its end.
        self.max_prompt_tokens = min(max_prompt_tokens, max_tokens - 2)
        self._longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        self.cut = 0  # pairs of which an answer lost more than half of its tokens

    def encode(self, pairs: Iterable) -> Iterator[tuple[object, EncodedPair | str]]:
        """Encode pairs in order; yields (pair, EncodedPair), or (pair, reason) where it cannot be used."""
        pairs = iter(pairs)
        while some := _some(pairs):
            written = self.template.write_all(some)
            written = [(pieces, reason or self._far_too_long(pieces)) for pieces, reason in written]
            texts = [[] if reason else _texts(pieces) for pieces, reason in written]
            flat = list(itertools.chain(*texts))
            ids = iter(self._ids(flat) if flat else [])  # all in one call
            for pair, (pieces, reason), own in zip(some, written, texts, strict=True):
                encoded = None
                if not reason:
                    wholes = list(itertools.islice(ids, len(own)))
                    encoded, reason = tried(self._encoded, pair.index, pieces, wholes)
                yield pair, encoded or reason

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Give the tokens from which the model answers `messages`, cut from the left."""
        return self._cut_prompt(self._of_pieces(self.template.prompt(messages)))

    def _far_too_long(self, pieces) -> str:
        """Give the reason where texts are longer than any that could be used; they are not even tokenized."""
        characters = sum(len(text) for part in pieces for text, _ in part)
        most = 3 * self.max_tokens * self._longest_token
        return "overlong" if self.overlong == "drop" and characters > most else ""

    def _of_pieces(self, pieces) -> list[int]:
        return [i for text, own in pieces if text for i in self._ids([text], as_text=own)[0]]

    def _ids(self, texts: list[str], *, as_text: bool = False) -> list[list[int]]:
        """Give token ids without anything added; `as_text` reads names of special tokens as plain text."""
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]

    def _after(self, prompt: list[int], whole: list[int]) -> list[int]:
        """Give the tokens of prompt + answer that are the answer's, given the tokens of the prompt alone."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]

        # The tokenizer merges across the border. The model will answer from `prompt` as it stands, so the
        # answer must be tokenized as its continuation; where that changes the text, the pair is refused.
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
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

    def _encoded(self, index: int, pieces, ids: list[list[int]]) -> EncodedPair:
        """Encode a pair from the ids of its `_texts`, or, where it has none, piece by piece."""
        if ids:
            prompt, *answers = ids[0], *(self._after(ids[0], whole) for whole in ids[1:])
        else:
            prompt, *answers = map(self._of_pieces, pieces)
        if not prompt:
            raise Unusable("empty_prompt")
        longest = max(map(len, answers))
        if len(prompt) > self.max_prompt_tokens or len(prompt) + longest > self.max_tokens:
            if self.overlong == "drop":
                raise Unusable("overlong")
            prompt = self._cut_prompt(prompt)
            room = self.max_tokens - len(prompt)
            self.cut += longest > 2 * room
            answers = [a if len(a) <= room else [*a[: room - 1], a[-1]] for a in answers]
        if answers[0] == answers[1]:
            raise Unusable("identical_after_encoding")
        return EncodedPair(index, prompt, *answers)


def _texts(pieces) -> list[str]:
    """Give the prompt, and it with either answer, as texts; [] where they name special tokens."""
    if any(len(part) > 1 or part[0][1] for part in pieces):
        return []
    before, chosen, rejected = (part[0][0] for part in pieces)
    return [before, before + chosen, before + rejected]


def _some(pairs, most: int = 64, characters: int = 2**20) -> list:
    """Give the next pairs, not many and not much."""
    some, read = [], 0
    while len(some) < most and read < characters and (pair := next(pairs, None)):
        some.append(pair)
        read += len(pair.chosen) + len(pair.rejected) + sum(len(turn["content"]) for turn in pair.prompt)
    return some


class PairFile:
    """Encoded pairs in a file on disk, so that memory stays flat however many there are: an unnamed one, or
    at `path`, where another process that gets a pickle of this finds them as long as the file is there."""

    def __init__(self, path=None):
        self._file, self._places = open(path, "w+b") if path else tempfile.TemporaryFile(), array("q")
        self.lengths, self._tokens, self.highest = array("q"), None, 0  # the highest token

    def __getstate__(self):
        self._file.flush()
        return vars(self) | {"_file": str(self._file.name), "_tokens": None}

    def __setstate__(self, state):
        vars(self).update(state, _file=open(state["_file"], "rb"))

    def append(self, pair: EncodedPair) -> None:
        sides = pair.prompt, pair.chosen, pair.rejected
        self._places.extend([pair.index, self._file.tell() // 4, *map(len, sides)])
        self.lengths.append(pair.tokens())
        ids = np.concatenate(sides).astype(np.int32)
        self.highest = max(self.highest, int(ids.max()))
        self._file.write(ids.tobytes())

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


def encode_rows(candidates, encoder: Encoder, *, on_drop=None) -> tuple[Iterator, "data.Report"]:
    """Clean candidates, as `data.clean` does, and encode them.

    Returns:
        an iterator of (Pair, EncodedPair), which raises UserError where the limits cut most answers down to a
        stump; and the report, which counts the rest.
    """
    cleaned, report = data.clean(candidates, on_drop=on_drop)

    def kept():
        for pair, encoded in encoder.encode(cleaned):
            if isinstance(encoded, str):
                report.drop(pair.index, encoded, pair)
            else:
                report.digest.update(pair.as_bytes())
                yield pair, encoded
        if 2 * encoder.cut > report.kept:
            given = f"max_tokens is {encoder.max_tokens} and overlong is truncate"
            raise UserError(f"{given}: that cuts more than half of most answers away; raise max_tokens.")

    return kept(), report


def check_model(pairs: PairFile, model) -> None:
    """Refuse pairs with a token, or at a position, for which a loaded model has nothing."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if pairs.highest >= vocabulary:
        why = f"the tokenizer writes token {pairs.highest}, but the model has {vocabulary}"
        raise UserError(f"base_model does not go with its tokenizer: {why}; choose another base_model.")
    learned, most = _learned_positions(causal_lm(model)), _stretched_past(model.config)
    sides = pairs.lengths_of_sides()
    longest = int((sides["prompt"] + np.maximum(sides["chosen"], sides["rejected"])).max(initial=0))
    if learned and longest > learned:
        why = f"a pair has {longest:,} tokens, but the model knows {learned:,} positions"
        raise UserError(f"base_model cannot read every pair: {why}; set max_tokens to {learned}.")
    if longest > most:
        why = f"it stretches the positions of a batch by its longest text, past {most:,} tokens, and one has"
        raise UserError(f"base_model cannot read every pair ({why} {longest:,}): set max_tokens to {most}.")


def _stretched_past(config) -> float:
    """Tell from how many tokens on a long text changes how a model reads the others beside it."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    own = min(sizes_of(config, "max_position_embeddings"), default=math.inf)
    stretched = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    return min((kind.get("original_max_position_embeddings") or own for kind in stretched), default=math.inf)


def _learned_positions(model) -> int:
    """Count the positions that a model has learned for text; 0 where it needs none."""
    tables = [(n, m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)]
    places = [(n, table) for n, table in tables if re.match("pos|wpe|embed_pos", n.rpartition(".")[2])]
    places += [(n, table) for n, table in model.named_buffers() if n.endswith("embed_positions")]
    towers = towers_of(model) if places else []
    lengths = [len(table) for n, table in places if not is_within(n, towers)]
    return min(lengths + sizes_of(model.config, "max_position_embeddings")) if lengths else 0
