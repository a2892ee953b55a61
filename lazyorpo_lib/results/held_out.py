"""The held-out pairs of a run, before, during and after training: figures and answers, kept in its folder.

It is handed the run, whose stages call it at their time. What the figures say is evaluate.py's.
"""

import contextlib
import json
import math
import zlib
from functools import partial
from itertools import islice

from .. import folder as folders
from .. import marker
from ..model import adapters_off
from ..orpo.loss import TERMS
from ..session import Stopped, progress_bar
from . import card, evaluate, reading

OUTPUTS = {"model_outputs.json": "tuned", "reference_outputs.json": "base"}  # of alpaca-eval


def measure(run, when: str) -> None:
    """Take figures and answers on the held-out pairs, "before" or "after" training; kept in held_out.json. A
    signal ends it with nothing written, and the next run begins here."""
    pairs, trainer = list(run.eval_pairs), run.trainer
    if not pairs:
        return
    prompts = [pair.prompt for pair in pairs[: run.settings.answers]]

    def advance(bar, done):
        bar.update(done)
        if when == "before" and trainer.world == 1 and run.stop.was_asked():  # by the file STOP
            raise Stopped

    with adapters_off(trainer.model) if when == "before" else contextlib.nullcontext():
        bar = progress_bar(len(pairs), "held-out pairs", desc=f"evaluation {when}")
        with bar, run.spent.on("evaluation"):
            table = trainer.pair_tables(pairs, partial(advance, bar))
        with progress_bar(len(prompts), "answers", desc=f"answers {when}") as bar:
            texts = _answer(run, prompts, partial(advance, bar))
    rows = filter(reading.is_evaluation, folders.read_rows(run.folder / "history.jsonl"))
    if (trainer.best.step or trainer.step) not in [row["step"] for row in rows]:
        trainer.evaluate(table)  # else training did, or a kill came in between
    if run.main:
        path = run.folder / "held_out.json"
        kept = folders.read_json(path) | {
            "columns": TERMS,
            "prompts": [pair.prompt[-1]["content"] for pair in run.texts[: len(prompts)]],
            "prompt_ids": [zlib.crc32(json.dumps(pair.prompt).encode()) for pair in run.texts[: len(pairs)]],
            "chosen_shorter": [len(pair.chosen) < len(pair.rejected) for pair in pairs],
            when: {"pairs": finite(table.tolist()), "answers": texts},
        }
        marker.write_atomically(path, json.dumps(kept, indent=1).encode())
        write_outputs(run)


def forget(run, *, all_of_it: bool) -> None:
    """Take away what was measured after training; `all_of_it`: before, too, but for the base's benchmarks."""
    path = run.folder / "held_out.json"
    if run.main and (kept := folders.read_json(path)):
        for name in OUTPUTS:
            marker.remove(run.folder / name)
        stay = {"benchmarks_before"} if all_of_it else kept.keys() - {"after", "benchmarks_after"}
        kept = {name: part for name, part in kept.items() if name in stay}
        marker.write_atomically(path, json.dumps(kept, indent=1).encode())


def write_outputs(run) -> None:
    """Write the answers as alpaca-eval reads them: the tuned model's, and the base's as their reference."""
    rows, base = run.answers(), card.public_name(run.settings.base_model)
    names = {"tuned": f"{base} {run.settings.objective}", "base": base}
    for file, who in OUTPUTS.items() if rows else ():
        said = [{"instruction": r["prompt"], "output": r[who], "generator": names[who]} for r in rows]
        marker.write_atomically(run.folder / file, json.dumps(said, indent=1).encode())


def finite(table: list[list[float]]) -> list[list[float | None]]:
    """Give a table as JSON takes it: None for what is not a finite number."""
    return [[value if math.isfinite(value) else None for value in row] for row in table]


def watch(run, step: int) -> None:
    """Answer the first held-out prompts every `watch_every_steps`; kept in watched.jsonl, and told."""
    if not run.settings.watch_every_steps or step % run.settings.watch_every_steps:
        return
    prompts = [pair.prompt for pair in islice(run.eval_pairs, 3)]
    for pair, text in zip(run.texts, _answer(run, prompts), strict=False):
        if run.main and text is not None:
            row = {"step": step, "prompt": pair.prompt[-1]["content"], "answer": text}
            folders.append_row(run.folder / "watched.jsonl", row)
            run.show(f"step {step} · {row['prompt'][:60]!r} -> {text[:160]!r}")


def end_ids(run) -> list[int]:
    """List the tokens that end an answer."""
    return evaluate.end_ids(run.trainer.model, run.tokenizer, run.train_pairs[0].chosen[-1])


def _answer(run, prompts, on_batch=lambda done: None) -> list[str | None]:
    lacking, how = [], dict(max_tokens=run.settings.answer_tokens, end_ids=end_ids(run), on_batch=on_batch)
    # Weights in float32 would give a cache in float32.
    with run.trainer.accelerator.autocast() if run.method == "full" else contextlib.nullcontext():
        texts = evaluate.answers(run.trainer.model, run.tokenizer, prompts, note=lacking.append, **how)
    if lacking:
        note = f"out of memory: {len(lacking)} of {len(prompts)} answers are left out ({lacking[0]})"
        run.trainer.oom_notes.append(note)
        run.show(f"{note.capitalize()}; a lower answer_tokens needs less.")
    return texts
