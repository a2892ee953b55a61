"""Experiment 3, own samples as rejected: ORPO on TruthfulQA's best answers against two kinds of worse ones.

    python -m tests.benchmarks.own_samples truthfulqa.jsonl --out runs/own
    python -m tests.benchmarks.own_samples truthfulqa.jsonl --out runs/own --tables   # from its JSON alone

The same questions and chosen answers, the same steps; rejected is what a person wrote as wrong, or what the
base model itself answers (`lazyorpo pairs`). Both are tested on the written pairs of other questions.
"""

import dataclasses
import json
from pathlib import Path

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import read_rows
from lazyorpo_lib.marker import write_atomically
from lazyorpo_lib.pairs.make import make_pairs
from lazyorpo_lib.results.card import table

from . import lab, truthful
from .lab import mean, spread

KINDS = ("base", "written", "own samples")
FIGURES = ("accuracy", "swapped", "log_odds_ratio", "nll", "mc1", "mc2")


def texts(design, k: int, kind: str, settings, out: Path) -> list[tuple[str, str, str]]:
    """Give the pairs of a fold with rejected of a kind; of questions for which the model came to an end, and
    gave another text than the best answer."""
    rows = design.side(k, False)[: design.given.pairs]
    asked, file = out / f"asked-{k}.jsonl", out / f"own-{k}.jsonl"
    lines = [{"prompt": row["question"], "chosen": row["best_answer"]} for row in rows]
    if not asked.is_file():
        write_atomically(asked, "".join(json.dumps(line) + "\n" for line in lines).encode())
    if not file.is_file():
        make_pairs(dataclasses.replace(settings, dataset=str(asked), seed=1 + k), file)
    own = {row["prompt"]: row["rejected"] for row in read_rows(file) if not row["from"]["cut"]}
    rows = [row for row in rows if row["question"] in own]
    if len(rows) < settings.pairs_per_step:
        raise UserError(f"Of {len(lines)} answers {len(rows)} came to an end: raise answer_tokens or pairs.")
    return [
        (
            row["question"], row["best_answer"],
            own[row["question"]] if kind == "own samples" else row["incorrect_answers"][0],
        )
        for row in rows
    ]  # fmt: skip


def fold_unit(design, k: int, settings, folder: Path) -> dict:
    """Train on both kinds with a fold's seed, and measure them and the base model."""
    own, records, words = dataclasses.replace(settings, seed=1 + k), {}, {}
    for kind in KINDS:
        model, tokenizer, encoder = lab.base_of(settings)
        if kind != "base":
            triples = texts(design, k, kind, settings, folder)
            pairs = lab.encoded(encoder, triples)
            words[kind] = mean(len(pair.rejected) for pair in pairs)
            words["chosen"], words["pairs"] = mean(len(pair.chosen) for pair in pairs), len(pairs)
            model, _ = lab.trained(model, pairs, own, folder)
        got = truthful.measured(model, tokenizer, encoder, design.tested(k), 0, 0)["questions"]
        records[kind] = [[q[c] for c in ("question", *FIGURES)] for q in got]
    return {"records": records, "tokens": words}


def gather(given, settings, words: list[str]) -> dict:
    units = lab.there(given.out, units_of(given))
    found = {name: getattr(given, name) for name in ("pairs", "folds", "seeds", "questions")}
    found |= {name: getattr(settings, name) for name in ("answer_tokens", "learning_rate")}
    found |= {"columns": ["question", *FIGURES], "tokens": [unit["tokens"] for unit in units.values()]}
    found["records"] = {name: [row for u in units.values() for row in u["records"][name]] for name in KINDS}
    return lab.put(given.out, "own_samples", words, settings, units, found)


def units_of(given) -> dict[str, tuple]:
    return {f"fold-{k}": () for k in range(given.seeds)}


def tables(kept: dict) -> str:
    """Lay out what own_samples.json holds: nothing else is read."""
    of = {
        name: {f: [row[k] for row in rows] for k, f in enumerate(kept["columns"])}
        for name, rows in kept["records"].items()
    }
    lines = [[name, len(of[name]["nll"]), *(spread(of[name][f]) for f in FIGURES)] for name in KINDS]
    differ = []
    for one, other in (("written", "base"), ("own samples", "base"), ("own samples", "written")):
        changes = [[a - b for a, b in zip(of[one][f], of[other][f], strict=True)] for f in FIGURES]
        differ.append([f"{one} minus {other}", *(spread(c, "+.3f") for c in changes)])
    head = ["rejected", "questions", *FIGURES]
    return "\n\n".join([table(head, lines), table(["difference", *FIGURES], differ)]) + "\n"


def begin(words: list[str]) -> None:
    parser = lab.parser_of("own_samples", __doc__)
    parser.add_argument("file", type=Path, help="TruthfulQA, JSON lines with the hub's columns")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2, help="of the folds so many are gone through")
    parser.add_argument("--pairs", type=int, default=96, help="questions to train on")
    parser.add_argument("--questions", type=int, default=40, help="tested of each fold")
    given = parser.parse_args(words)
    if given.tables:
        return print(tables(lab.kept(given.out, "own_samples")))
    design = truthful.Design(truthful.read_questions(given.file), given)
    settings = lab.settings_of(given, answer_tokens=96)
    if not 1 <= given.seeds <= given.folds:
        raise UserError(f"seeds is {given.seeds}, but must lie between 1 and the {given.folds} folds.")
    most = min(len(design.side(k, False)) for k in range(given.folds))
    if not settings.pairs_per_step <= given.pairs <= most:
        low = settings.pairs_per_step
        raise UserError(f"pairs is {given.pairs}, but must lie between {low} and {most}, one a question.")
    read, learnt = 3 * 200 * given.questions + 70 * given.pairs, 150 * given.pairs
    return lab.work(
        "own_samples", words, given, units_of(given),
        lambda unit: fold_unit(design, int(unit.removeprefix("fold-")), settings, given.out),
        lambda: tables(gather(given, settings, words)),
        read=read * given.seeds, learnt=learnt * given.seeds,
    )  # fmt: skip


def main(words=None) -> int:
    return lab.run(begin, words)


if __name__ == "__main__":
    raise SystemExit(main())
