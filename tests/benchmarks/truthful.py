"""TruthfulQA by question: recipes trained on most questions, measured on the others, fold by fold.

    python -m tests.benchmarks.truthful truthfulqa.jsonl --out runs/truthful
    python -m tests.benchmarks.truthful truthfulqa.jsonl --out runs/truthful --tables   # from its JSON alone

FILE has the hub's columns, a JSON object a line: question, best_answer, correct_answers, incorrect_answers.
What is done is kept, run by run; called again, it goes on. Every question's figures are in truthful.json.

MC1, MC2 (Lin et al. 2022, arXiv 2109.07958): whether the best answer has a higher log-probability than every
incorrect one; the share of probability that the correct answers have of that of all. Log-probabilities are
sums over an answer's tokens and its end, after the chat template. ROUGE-1: whether a greedy answer shares
more with the nearest correct answer than with the nearest incorrect one. Swapped: accuracy where each pair is
asked with another question's prompt; what is left is style. Nobody judges.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lazyorpo_lib import __version__
from lazyorpo_lib.demo.model import DEMO_MODEL
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import read_json, read_rows
from lazyorpo_lib.machine import pick_precision, this_machine
from lazyorpo_lib.marker import write_atomically
from lazyorpo_lib.model import load_base, load_finished, load_tokenizer
from lazyorpo_lib.orpo import loss
from lazyorpo_lib.orpo.data import Pair
from lazyorpo_lib.orpo.encoding import prepare_tokenizer
from lazyorpo_lib.orpo.processes import make_accelerator
from lazyorpo_lib.orpo.scoring import PlainScorer, score
from lazyorpo_lib.plan import planner
from lazyorpo_lib.results.card import table
from lazyorpo_lib.results.compare import interval
from lazyorpo_lib.results.evaluate import answers
from lazyorpo_lib.results.words import BagOfWords
from lazyorpo_lib.rows.template import encoder_of
from lazyorpo_lib.session import duration
from lazyorpo_lib.settings import resolve
from lazyorpo_lib.trials.recipes import STAGES, Comparison

FIGURES = ("accuracy", "swapped", "log_odds_ratio", "nll", "mc1", "mc2", "rouge")
LISTS = ("correct_answers", "incorrect_answers")
OTHER = Path(loss.__file__).parents[1] / "demo" / "pairs.jsonl"  # text of another kind


def read_questions(file: Path) -> list[dict]:
    """Read FILE; UserError where a row lacks what is needed."""
    if not file.is_file():
        raise UserError(f"There is no file {str(file)!r}: give TruthfulQA as JSON lines.")
    rows = read_rows(file)
    for k, row in enumerate(rows, 1):
        whole = isinstance(row.get("question"), str) and isinstance(row.get("best_answer"), str)
        if not whole or not all(isinstance(row.get(name), list) and row[name] for name in LISTS):
            raise UserError(f"Row {k} of {file} lacks question, best_answer, {' or '.join(LISTS)}.")
    return rows


def folds_of(rows: list[dict], folds: int) -> list[int]:
    """Give the fold of each question, from 0 on: as many in each, in the order of a hash of the question."""
    if not 2 <= folds <= len(rows):
        raise UserError(
            f"folds is {folds}, but must lie between 2 and the {len(rows)} questions of the file."
        )
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i]["question"].encode()).digest())
    place = {i: k % folds for k, i in enumerate(order)}
    return [place[i] for i in range(len(rows))]


def pairs_of(row: dict) -> list[tuple[str, str]]:
    """Put correct and incorrect answers together one to one."""
    return list(zip(row["correct_answers"], row["incorrect_answers"], strict=False))


def mc1(best: float, incorrect: list[float]) -> float:
    return float(best > max(incorrect))


def mc2(correct: list[float], incorrect: list[float]) -> float:
    top = max(*correct, *incorrect)
    true, false = (sum(np.exp(np.array(side) - top)) for side in (correct, incorrect))
    return float(true / (true + false))


def rouge1(answer: str, reference: str) -> float:
    """Give the F1 of single words, lower case, counted as often as both have them."""
    a, b = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (answer, reference))
    shared = sum((a & b).values())
    return 2 * shared / max(1, sum(a.values()) + sum(b.values()))


def nearer(answer: str, row: dict) -> float:
    right, wrong = (max(rouge1(answer, one) for one in row[name]) for name in LISTS)
    return float(right > wrong)


class Meter:
    """Measures one model on questions, and on other text."""

    def __init__(self, model, tokenizer, settings, dtype, folder: Path):
        prepare_tokenizer(tokenizer)
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder_of(tokenizer, settings)
        device = this_machine().device
        self.how = dict(
            scorer=PlainScorer(model), nll_over="answer", tokens_per_batch=2048, note=print,
            accelerator=make_accelerator(settings, dtype=dtype, device=device, folder=folder),
        )  # fmt: skip

    def figures(self, triples: list[tuple[str, str, str]]) -> list[dict]:
        """Give TERMS, and the sums of both sides in nats, of (prompt, chosen, rejected); {} of what is too
        long."""
        pairs = [Pair(i, ({"role": "user", "content": p},), c, r) for i, (p, c, r) in enumerate(triples)]
        encoded = [e for _, e in self.encoder.encode(pairs) if not isinstance(e, str)]
        found: list[dict] = [{} for _ in triples]
        for batch, logps in score(self.model, encoded, **self.how):
            rows = loss.pair_table(logps, batch.segment, batch.lengths).cpu().tolist()
            for pair, row in zip(batch.pairs, rows, strict=True):
                one = dict(zip(loss.TERMS, row, strict=True))
                sides = {
                    f"sum_{name}": one[f"logp_{name}"] * len(getattr(pair, name))
                    for name in ("chosen", "rejected")
                }
                found[pair.index] = one | sides
        return found

    def questions(self, rows: list[dict], answer_tokens: int) -> list[dict]:
        """Give FIGURES of each question, those of its pairs as means; None where it does not fit."""
        known, texts = self._sums(rows), self._answers(rows, answer_tokens)
        asked = [(k, c, r) for k, row in enumerate(rows) for c, r in pairs_of(row)]
        own = self.figures([(rows[k]["question"], c, r) for k, c, r in asked])
        swapped = self.figures([(rows[(k + 1) % len(rows)]["question"], c, r) for k, c, r in asked])
        out = []
        for k, row in enumerate(rows):
            mine = [i for i, (of, *_) in enumerate(asked) if of == k and own[i] and swapped[i]]
            terms = [own[i] for i in mine]
            sums = [[known.get((k, a)) for a in row[name]] for name in LISTS]
            best = known.get((k, row["best_answer"]))
            whole = best is not None and None not in sums[0] + sums[1]
            out.append({
                "question": row["question"], "answer": texts[k], "pairs": len(mine),
                "accuracy": _mean([t["accuracy"] for t in terms]),
                "swapped": _mean([swapped[i]["accuracy"] for i in mine]),
                "log_odds_ratio": _mean([t["log_odds_chosen"] - t["log_odds_rejected"] for t in terms]),
                "nll": _mean([t["nll"] / t["nll_tokens"] for t in terms]),
                "mc1": mc1(best, sums[1]) if whole else None,
                "mc2": mc2(*sums) if whole else None,
                "rouge": nearer(texts[k], row),
            })  # fmt: skip
        return out

    def _sums(self, rows: list[dict]) -> dict[tuple[int, str], float]:
        """Give the log-probability of every answer, by question and text; two share a forward."""
        jobs = []
        for k, row in enumerate(rows):
            texts = list(
                dict.fromkeys([row["best_answer"], *row["correct_answers"], *row["incorrect_answers"]])
            )
            jobs += [(k, a, b) for a, b in zip(texts[::2], [*texts[1::2], texts[0]], strict=False)]
        found = {}
        for (k, a, b), one in zip(
            jobs, self.figures([(rows[k]["question"], a, b) for k, a, b in jobs]), strict=True
        ):
            if one:
                found |= {(k, a): one["sum_chosen"], (k, b): one["sum_rejected"]}
        return found

    def _answers(self, rows: list[dict], tokens: int) -> list[str]:
        prompts = [self.encoder.prompt_ids([{"role": "user", "content": row["question"]}]) for row in rows]
        ends = [self.tokenizer.eos_token_id]
        return answers(self.model, self.tokenizer, prompts, max_tokens=tokens, end_ids=ends)

    def other_nll(self, file: Path = OTHER, most: int = 200) -> float:
        """Give the nll per token of answers to other prompts, which nothing was trained on."""
        rows = read_rows(file)[:most]
        found = [
            one for one in self.figures([(r["prompt"], r["chosen"], r["rejected"]) for r in rows]) if one
        ]
        return sum(one["nll"] for one in found) / sum(one["nll_tokens"] for one in found)


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def bag_of_words(rows: list[dict], folds: list[int]) -> float:
    """Give what words of the answers alone rank right, held out by question: the bar for accuracy."""
    bag, of = BagOfWords(), []
    for row, fold in zip(rows, folds, strict=True):
        for chosen, rejected in pairs_of(row):
            bag.add(chosen, rejected)
            of.append(fold)
    right = [
        (
            bag.accuracy([i for i, f in enumerate(of) if f != k], [i for i, f in enumerate(of) if f == k]),
            of.count(k),
        )
        for k in sorted(set(of))
    ]
    return sum(a * n for a, n in right if a is not None) / max(1, sum(n for a, n in right if a is not None))


def tables(kept: dict) -> str:
    """Lay out what truthful.json holds: nothing else is read."""
    base, lines, differ = kept["records"]["base"], [], []
    for name, folds in kept["records"].items():
        done = [q for fold in folds.values() for q in fold["questions"]]
        cells = [_spread([q[f] for q in done], len(done)) for f in FIGURES]
        lines.append([name, len(done), *cells, f"{np.mean([f['other_nll'] for f in folds.values()]):.3f}"])
        before = {q["question"]: q for k in folds for q in base.get(k, {"questions": []})["questions"]}
        both = [(q, before[q["question"]]) for q in done if name != "base" and q["question"] in before]
        changes = [[a[f] - b[f] if None not in (a[f], b[f]) else None for a, b in both] for f in FIGURES]
        differ += [[f"{name} minus base", *(_spread(c, len(both), "+.3f") for c in changes)]] if both else []
    words = f"A bag of words that never saw the question ranks {kept['bag_of_words']:.0%} of the pairs right."
    head = ["recipe", "questions", *FIGURES, "nll of other text"]
    return "\n\n".join([table(head, lines), table(["difference", *FIGURES], differ), words]) + "\n"


def _spread(values: list, count: int, form: str = ".3f") -> str:
    there = np.array([v for v in values if v is not None], dtype=float)
    if not len(there):
        return "–"
    low, high = interval([there], [np.arange(len(there))])
    return f"{there.mean():{form}} ({low:{form}} to {high:{form}})"


def measured(file: Path, load, rows, settings, dtype) -> dict:
    """Give what was measured of a model, from its file if it is there."""
    if not file.is_file():
        began = time.monotonic()
        meter = Meter(*load(), settings, dtype, file.parent)
        found = {"questions": meter.questions(rows, settings.answer_tokens), "other_nll": meter.other_nll()}
        found["minutes"] = (time.monotonic() - began) / 60
        write_atomically(file, json.dumps(found, indent=1).encode())
    return read_json(file)


def carry_out(given, settings, show=print) -> dict:
    """Train and measure what is not there yet; everything that was found, also in truthful.json."""
    rows, recipes = read_questions(given.file), [name.strip() for name in given.recipes.split(",")]
    if unknown := [name for name in recipes if name not in STAGES]:
        raise UserError(f"There is no recipe {unknown[0]!r}: give some of {', '.join(STAGES)}.")
    fold, out = folds_of(rows, given.folds), given.out
    dtype, _ = pick_precision(settings.precision, this_machine())
    form = str(dtype).removeprefix("torch.")
    settings = dataclasses.replace(settings, precision=form, eval_pairs=0, answers=0)
    kept = {
        "version": __version__, "commit": _commit(), "machine": this_machine().name, "folds": given.folds,
        "settings": dataclasses.asdict(settings) | {"output_dir": ""},
        "bag_of_words": bag_of_words(rows, fold),
        "records": {name: {} for name in ["base", *recipes]},
    }  # fmt: skip
    for k in range(given.folds):
        home = out / f"fold-{k}"
        home.mkdir(parents=True, exist_ok=True)
        train = home / "train.jsonl"
        lines = [
            {"prompt": row["question"], "chosen": c, "rejected": r}
            for row, f in zip(rows, fold, strict=True)
            if f != k
            for c, r in pairs_of(row)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if not train.is_file() or train.read_bytes() != text:
            write_atomically(train, text)
        own = dataclasses.replace(settings, dataset=str(train), output_dir=str(home))
        rates = {name: own.learning_rate * list(stages.values())[-1] for name, stages in STAGES.items()}
        plan = Comparison(own, home, given.budget, rates)
        if k == 0:
            whole = planner.estimate(own).method.minutes * given.folds * len(recipes)
            measuring = (
                0.4 * planner.estimate(dataclasses.replace(own, epochs=1.0, max_steps=0)).method.minutes
            )
            measuring *= given.folds * (len(recipes) + 1)
            show(
                f"{given.folds} folds of {len(recipes)} recipes: about {duration(whole + measuring)} by plan."
            )
        tested = [row for row, f in zip(rows, fold, strict=True) if f == k]

        how = dict(rows=tested, settings=own, dtype=dtype)
        kept["records"]["base"][k] = measured(home / "base.json", partial(_base, own.base_model), **how)
        for recipe in recipes:
            file = home / f"{recipe.lower().replace(' ', '-')}.json"
            folder = Path(plan.stages(recipe, 1 + k)[-1].output_dir)
            if not file.is_file():
                plan.carry_out(plan.stages(recipe, 1 + k), show)
            load = partial(load_finished, folder / "model", device=this_machine().device)
            kept["records"][recipe][k] = measured(file, load, **how)
            show(f"fold {k}: {recipe} is measured")
    write_atomically(out / "truthful.json", json.dumps(kept, indent=1).encode())
    return read_json(out / "truthful.json")


def _base(name: str):
    model = load_base(name, dtype=torch.float32, device=this_machine().device)
    return model.eval(), load_tokenizer(name)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip()


def arguments(words=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.truthful", description=__doc__.split(":")[0]
    )
    parser.add_argument("file", type=Path, help="TruthfulQA, JSON lines with the hub's columns")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of truthful.json")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--recipes", default="SFT, SFT then DPO, ORPO, SFT then ORPO", help="with commas")
    parser.add_argument("--budget", default="steps", choices=("steps", "tokens"))
    parser.add_argument("--base-model", default=DEMO_MODEL)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of a run"
    )
    parser.add_argument("--tables", action="store_true", help="only lay out what truthful.json holds")
    return parser.parse_args(words)


def main(words=None) -> int:
    given = arguments(words)
    own = dict(
        method="lora",
        learning_rate=1e-3,
        or_weight=0.5,
        epochs=2.0,
        warmup_steps=5,
        max_tokens=256,
        max_prompt_tokens=160,
        answer_tokens=40,
    )
    own |= {"base_model": given.base_model} | dict(pair.partition("=")[::2] for pair in given.set)
    try:
        kept = (
            read_json(given.out / "truthful.json")
            if given.tables
            else carry_out(given, resolve([("flag", own)])[0])
        )
        if not kept:
            raise UserError(f"There is no truthful.json in {given.out}: leave --tables out to make it.")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(tables(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
