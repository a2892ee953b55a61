"""Answers, thumbs, scores or clicks -> a .jsonl of pairs that `dataset` takes.

What lacks a worse answer gets the base model's own, drawn from a seed of its row: the same command gives the
same file, also after a kill. What is drawn is kept in a folder beside the file, which appears once all is
there; nothing that is there is written over.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
from transformers import LogitsProcessor

from .. import folder as folders
from .. import marker
from ..errors import UserError, around, dissect, expanded, explain_disk, say
from ..machine import pick_precision, this_machine
from ..model import load_base, load_tokenizer, without_bars
from ..orpo.body import sizes_of
from ..orpo.data import Message, Pair
from ..orpo.encoding import Encoder, prepare_tokenizer, tried
from ..results.evaluate import answers, end_ids
from ..rows.columns import parse_columns
from ..rows.dataset import open_rows
from ..rows.template import Template
from ..session import progress_bar
from ..settings import Settings
from .clicks import standing, verdict
from .sources import LACKING, read, row_of, told

BY, TEMPERATURE = "lazyorpo pairs", 0.8
AT_ONCE = 64  # answers drawn together: each has the same neighbours after a kill
HOW = ("base_model", "seed", "answer_tokens", "precision")


def make_pairs(settings: Settings, out="pairs.jsonl", *, sample: bool = False, show=say) -> Path:
    """Write pairs of the rows of a dataset, or of a file of clicks, and say what was done; UserError where no
    pair comes of it, `out` is there of other rows or settings, or another process is at work on it.

    Args:
        settings: dataset, columns and max_pairs say which rows; HOW, how the base model answers.
        out: the .jsonl, one pair a line: prompt, chosen, rejected, and where they are from.
        sample: let the base model answer also where a thumb up has no thumb down beside it.
    """
    out = expanded(out)
    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise UserError(f"out is {str(out)!r}, but must be the name of a .jsonl in a folder that is there.")
    given = list(open_rows(settings.dataset, max_rows=settings.max_pairs))
    kind, found, left = read(given, parse_columns(settings.columns), sample=sample)
    how = {name: getattr(settings, name) for name in HOW} | {"temperature": TEMPERATURE}
    texts = json.dumps([[pair.as_bytes().decode(), indexes] for pair, indexes in found] + [how])
    made = {"by": BY, "kind": kind, "digest": hashlib.sha256(texts.encode()).hexdigest()[:10]}
    if _is_there(out, made):
        show(f"{out} is there already, of these rows and settings.")
        return out
    draft, lacking = out.with_name(f"{out.name}.partial"), [p for p, _ in found if p.rejected == LACKING]
    try:
        with explain_disk(out.parent, "run again: it goes on behind the last answers"):
            texts = iter(_drawn(lacking, settings, made, draft) if lacking else [])
            lines = (_line(pair, made | {"rows": rows}, how, texts, left) for pair, rows in found)
            if not (lines := [line for line in lines if line]):
                raise UserError(f"No pair came of it ({told(left)}): choose another base_model or seed.")
            if not _is_there(out, made):
                marker.write_atomically(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    finally:
        folders.release(draft)
    marker.remove(draft)
    show(_said(lines, kind, out, left))
    if kind == "clicks":
        show(verdict([row for _, row in standing(given)]))
    return out


def _is_there(out: Path, made: dict) -> bool:
    """Tell whether the file is there; UserError where it is not of these rows and settings."""
    if not os.path.lexists(out):
        return False
    with contextlib.suppress(UserError, OSError, LookupError, TypeError):
        if out.is_file() and folders.read_rows(out)[0]["from"]["digest"] == made["digest"]:
            return True
    why = "is there, and not of these rows and settings: nothing was written"
    raise UserError(f"{str(out)!r} {why}; give another out, or move it away.")


def _line(pair: Pair, origin: dict, how: dict, texts, left: Counter) -> dict | None:
    """Give a pair's line, the next of the sampled texts in it where it lacks one; None if it is no pair."""
    if pair.rejected == LACKING:
        text = next(texts) or ""
        cut, text = text.endswith("…"), text.removesuffix("…").strip()
        if text in ("", pair.chosen.strip()):
            left["the model said the same" if text else "the model gave no answer"] += 1
            return None
        origin |= how | {"cut": cut, "no_worse": is_no_worse(pair.chosen, text)}
        pair = dataclasses.replace(pair, rejected=text)
    return row_of(pair, origin)


def is_no_worse(chosen: str, rejected: str) -> bool:
    """Judge cheaply whether an answer may be as good as the chosen one: the last number in both is the same,
    or of the words of chosen four fifths are in it."""
    last = [re.findall(r"\d+(?:[.,]\d+)*", text)[-1:] for text in (chosen, rejected)]
    words, others = (Counter(re.findall(r"\w+", text.lower())) for text in (chosen, rejected))
    return bool(last[0]) and last[0] == last[1] or 5 * (words & others).total() >= 4 * words.total() > 0


def _said(lines: list[dict], kind: str, out: Path, left: Counter) -> str:
    """Say in a few sentences what was made of what, and what the evidence says of it."""
    said = [f"{len(lines)} pairs of {kind} are in {out}; left out: {told(left)}."]
    if drawn := [line["from"] for line in lines if "no_worse" in line["from"]]:
        cut, good = (sum(origin[name] for origin in drawn) for name in ("cut", "no_worse"))
        said.append(
            f"In {len(drawn)} rejected is the own answer of {drawn[0]['base_model']}, as in SPIN (arXiv "
            f"2401.01335); {cut} were cut at {drawn[0]['answer_tokens']} tokens, {good} may be no worse than "
            "chosen (no_worse in the file: the same last number, or four fifths of its words)."
        )
    return " ".join([*said, "What counts most is how good the chosen answers are (arXiv 2508.18312)."])


@around
def _explain_answers(error: Exception, name: str) -> str:
    """Say what a model raises that cannot write."""
    why = dissect(error)[-1][:200]
    return "" if isinstance(error, OSError) else f"{name!r} cannot answer ({why}): choose another base_model."


class Drawn(LogitsProcessor):
    """Leaves of each row's scores one token, drawn from the softmax of scores / TEMPERATURE, so that greedy
    search takes it. Each row has its own seed of 32 bits and numbers: one a token, and the token is where the
    running sum of probabilities passes it."""

    def __init__(self, seeds: list[int], device):
        self.drawers = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        sums = (scores.float() / TEMPERATURE).softmax(-1).double().cumsum(-1)
        drawn = [torch.rand(1, generator=g, dtype=sums.dtype, device=sums.device) for g in self.drawers]
        token = torch.searchsorted(sums, torch.stack(drawn) * sums[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.clamp(max=sums.shape[1] - 1), 0.0)


def _drawn(lacking: list[Pair], settings: Settings, made: dict, draft: Path) -> list[str | None]:
    """Have the base model answer, and keep each answer in `draft`, which this process holds from here on."""
    marker.take(draft, "draft of pairs", ".lock", "made.json", "answers.jsonl")
    folders.claim(draft, "out")
    then = folders.read_json(draft / "made.json") or made | {"clock": time.time()}
    if then.get("digest") != made["digest"]:
        raise UserError(f"{str(draft)!r} is of other rows or settings: delete it, or give another out.")
    file, most = draft / "answers.jsonl", len(lacking)
    if (done := len(folders.read_rows(file))) < most:
        model, encoder, options = _loaded(settings, then["clock"])
        marker.write_atomically(draft / "made.json", json.dumps(then).encode())
        folders.truncate_after(file, (done := done - done % AT_ONCE) - 1)
        prompts = [tried(encoder.prompt_ids, pair.prompt)[0] for pair in lacking]
        order = sorted(range(most), key=lambda i: len(prompts[i] or ()))  # like lengths: little padding
        bar = progress_bar(most, "answers", initial=done, desc="the base model answers")
        options["on_batch"] = bar.update
        with bar, _explain_answers(settings.base_model):
            for start in range(done, most, AT_ONCE):
                some = order[start : start + AT_ONCE]
                asked = [i for i in some if prompts[i]]
                seeds = [zlib.crc32(f"{settings.seed} {lacking[i].index}".encode()) for i in asked]
                options["draw"] = lambda batch, own=seeds: Drawn([own[k] for k in batch], model.device)
                ids = [prompts[i] for i in asked]
                said = dict(zip(asked, answers(model, encoder.tokenizer, ids, **options), strict=True))
                for step, i in enumerate(some, start):
                    folders.append_row(file, {"step": step, "pair": i, "answer": said.get(i)})
    kept = {row["pair"]: row["answer"] for row in folders.read_rows(file)}
    return [kept[i] for i in range(most)]


def _loaded(settings: Settings, clock: float) -> tuple:
    """Load the base model; gives it, the encoder of its prompts, and what `answers` wants beside them."""
    machine, tokenizer = this_machine(), load_tokenizer(settings.base_model)
    prepare_tokenizer(tokenizer)
    with without_bars():
        dtype, _ = pick_precision(settings.precision, machine)
        model = load_base(settings.base_model, dtype=dtype, device=machine.device)
    most = min([4096, tokenizer.model_max_length, *sizes_of(model.config, "max_position_embeddings")])
    room = max(1, most - settings.answer_tokens)
    encoder = Encoder(Template(tokenizer, clock), max_prompt_tokens=room, max_tokens=most)
    short = Pair(0, (Message(role="user", content="a"),), "b", "c")
    ends = [pair.chosen[-1] for _, pair in encoder.encode([short]) if not isinstance(pair, str)]
    ends = end_ids(model, tokenizer, *ends)
    return model, encoder, dict(max_tokens=settings.answer_tokens, end_ids=ends, note=lambda why: None)
