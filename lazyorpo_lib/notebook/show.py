"""What cells show of a run: a pair as it is scored, loss, answers, figures, files, what a box asks for.

Each function returns a `Shown`: HTML in a notebook, the same as plain text elsewhere. Texts of models and
datasets are escaped. It computes nothing that `run` does not know, and writes no file.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from IPython.display import display

from ..errors import printable, say
from ..folder import read_json
from ..kinds import load_config
from ..plan import planner
from ..results.card import spread

BLUE, ORANGE = "0,114,178", "213,94,0"  # as in the live picture; lines tell them apart in print
CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:32em"
LONGEST = 400  # tokens of one text that are shown
TERMS = {
    "nll": "per token of the chosen answers, nats; what plain fine-tuning would lower alone",
    "or_loss": "ln 2 = 0.6931 where chosen and rejected have equal odds; below it, chosen is ahead",
    "log_odds_chosen": "the blue curve of the picture",
    "log_odds_rejected": "the orange curve",
    "loss": "what is minimised",
}


class Shown:
    """Hold something to look at: `_repr_html_` for notebooks, `str` for everything else."""

    def __init__(self, text: str, html: str = ""):
        self.text, self.html = printable(text), printable(html or escape(text))

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def table(header: Sequence[str], rows: Iterable[Sequence]) -> Shown:
    """Show a table; every cell is taken as text, and escaped."""
    rows = [[str(cell) for cell in row] for row in rows]
    lines = ["".join(f'<td style="{CELL}">{escape(cell)}</td>' for cell in row) for row in rows]
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in header)
    html = f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    return Shown("\n".join(" | ".join(row) for row in [list(header), *rows]), html)


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """Give the text of each token. One that is only part of a character is joined to the next ones."""
    out, start = [], 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[max(0, start - 8) : start], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[max(0, start - 8) : end], clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or end == len(ids):
            out.append(text[len(before) :])
            start = end
    return out


def pair(run) -> Shown:
    """Show one held-out pair, token by token: what is only read, what counts for nll, what for the odds."""
    one = (run.eval_pairs if len(run.eval_pairs) else run.train_pairs)[0]
    prompt_use = "nll" if run.settings.nll_over == "prompt+answer" else "read, not scored"
    mark = "background:rgba({0},.16);border-bottom:2px {1} rgb({0})"
    text, html = [], []
    for name, ids, use, style in (
        ("prompt", one.prompt, prompt_use, ""),
        ("chosen", one.chosen, "nll and odds", mark.format(BLUE, "solid")),
        ("rejected", one.rejected, "odds", mark.format(ORANGE, "dashed")),
    ):
        shown = [t.replace("\n", "↵\n") if style else t for t in pieces(run.tokenizer, ids[-LONGEST:])]
        lead = "… " if len(ids) > LONGEST else ""
        title = f"{name}: {len(ids)} tokens, {use}"
        marks = '<span style="border-right:1px dotted">{}</span>' if style else "{}"
        inside = "".join(marks.format(escape(piece)) for piece in shown)
        html.append(f'<div style="margin:.8em 0 .2em"><b>{title}</b></div>')
        html.append(f'<div style="white-space:pre-wrap">{lead}<span style="{style}">{inside}</span></div>')
        text.append(f"{title}\n{lead}{'·'.join(shown)}")
    return Shown("\n\n".join(text), "".join(html))


def cards(run) -> Shown:
    """Show what the pairs would take on each card that the planner knows, by each method."""
    config, lengths = load_config(run.settings.base_model), planner.measured_lengths(run.train_pairs)
    return Shown(planner.cards_table(planner.plan_cards(config, run.settings, lengths)))


def loss(run) -> Shown:
    """Show the terms of the loss on a few held-out pairs before training, beside what they mean."""
    if run.finished:
        return Shown("This run is finished; the figures before training are in the table further down.")
    some = [run.eval_pairs[i] for i in range(min(4, len(run.eval_pairs)))] or [run.train_pairs[0]]
    terms = run.trainer.metrics(run.trainer.pair_tables(some).sum(0).tolist())
    return table(("term", "now", ""), [(name, f"{terms[name]:.4f}", note) for name, note in TERMS.items()])


def answers(run, most: int = 5) -> Shown:
    """Show held-out prompts with the answers of the base and of the tuned model."""
    if not (rows := [(row["prompt"], row["base"], row["tuned"]) for row in run.answers()[:most]]):
        return Shown("No answers were asked for, or the run was stopped before they were given.")
    return table(("prompt", "base", "tuned"), rows)


def held_out(run) -> Shown:
    """Show the figures of the held-out pairs before and after, with 95 % intervals over the pairs."""
    if not (results := run.held_out_results()):
        return Shown("No figures: eval_pairs is 0, or the run was stopped before they were taken.")
    rows, times = [], ("before", "after", "change")
    for name, figure in results.get("held_out", {}).items():
        rows.append((name.replace("_", " "), figure["pairs"], *(spread(figure, time) for time in times)))
    for row in results.get("benchmarks", ()):
        scores = (spread(row, time) for time in times)
        rows.append((f"{row['task']} {row['metric']}, ± standard error", row["questions"], *scores))
    if "habit_before" in results:
        habit = (f"{results[f'habit_{when}']:.0%}" for when in ("before", "after"))
        rows.append(("answers with the demo's habit", "", *habit, ""))
    if (bar := read_json(run.folder / "data_report.json").get("bag_of_words")) is not None:
        rows += [("a bag of words, without the prompt: up to here it may be style", "", "", f"{bar:.3f}", "")]
    shown = table(("figure", "pairs", "before", "after", "change"), rows)
    verdict = results.get("verdict", "Nothing was held out; the benchmarks:")
    return Shown(f"{verdict}\n{shown.text}", f"<p><b>{escape(verdict)}</b></p>{shown.html}")


def size(count: int) -> str:
    """Write a number of bytes as people read it."""
    units = ((30, "GiB"), (20, "MiB"), (10, "KiB"))
    return next((f"{count / 2**n:.1f} {unit}" for n, unit in units if count >= 2**n), f"{count} bytes")


def files(run) -> Shown:
    """Show what the run left in its folder, and the lines that load the model again."""
    rows = []
    for item in sorted(run.folder.iterdir()):
        if not item.name.startswith("."):
            inside = [f for f in item.rglob("*") if f.is_file()] if item.is_dir() else [item]
            rows.append((item.name + "/" * item.is_dir(), size(sum(f.stat().st_size for f in inside))))
    shown = table((str(run.folder), "size"), rows)
    home = str(run.folder / "model")
    code = f"from lazyorpo_lib.model import load_finished\nmodel, tokenizer = load_finished({home!r})"
    return Shown(f"{shown.text}\n\n{code}", f"{shown.html}<pre>{escape(code)}</pre>")


def when(asked: bool, act, *given, **more) -> None:
    """Do what a box asks for, if it is ticked, and show what comes of it: text, a table, a page of runs."""
    if not asked:
        return
    done = act(*given, **more)
    if isinstance(done, Path) and (page := done / f"{done.name}.md").is_file():
        done = {"markdown": page.read_text(encoding="utf-8"), "png": page.with_suffix(".png").read_bytes()}
    if isinstance(done, dict):
        picture = f'<img src="data:image/png;base64,{base64.b64encode(done["png"]).decode()}">'
        display(Shown(done["markdown"], f"<pre>{escape(done['markdown'])}</pre>{picture}"))
    elif isinstance(done, list):
        display(table(done[0], (row.values() for row in done)))
    else:
        say(done)
