"""Experiment 1, TruthfulQA by question: recipes trained on most questions, measured on others, fold by fold.

    python -m tests.benchmarks.truthful truthfulqa.jsonl --out runs/truthful
    python -m tests.benchmarks.truthful truthfulqa.jsonl --out runs/truthful --tables   # from its JSON alone

FILE has the hub's columns, a JSON object a line: question, best_answer, correct_answers, incorrect_answers.
What is done is kept; called again, it goes on. Every question's figures are in truthful.json, no text.

Every recipe sees the same pairs once; SFT then … spends half of them on each stage. First three rates are
tried for the last stage of each, on a few pairs and questions that no fold has. MC1, MC2 (Lin et al. 2022,
arXiv 2109.07958): whether the best answer has a higher log-probability than every incorrect one; the share of
probability that the correct answers have of that of all. Log-probabilities are sums over an answer's tokens
and its end, after the chat template. ROUGE-1: whether a greedy answer shares more with the nearest correct
answer than with the nearest incorrect one. Swapped: accuracy where each pair is asked with another question's
prompt; what is left is style. Nobody judges.
"""

import argparse
import copy
import dataclasses
import hashlib
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import read_json, read_rows
from lazyorpo_lib.orpo import loss
from lazyorpo_lib.results.card import table
from lazyorpo_lib.results.evaluate import answers
from lazyorpo_lib.trials.recipes import STAGES

from . import lab
from .lab import mean, spread

RATES = {
    "SFT": (3e-4, 1e-3, 3e-3), "SFT then DPO": (3e-5, 1e-4, 3e-4), "ORPO": (3e-4, 1e-3, 3e-3),
    "SFT then ORPO": (1e-4, 3e-4, 1e-3),
}  # fmt: skip
WEIGHTS = (0.1, 2.0)  # λ, beside the one that is taken
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


def measured(model, tokenizer, encoder, rows: list[dict], answer_tokens: int, other: int = 20) -> dict:
    """Give FIGURES of each question, those of its pairs as means, and the nll per token of other text."""
    reader, out = lab.Reader(model, encoder), []
    ids = [encoder.prompt_ids([{"role": "user", "content": row["question"]}]) for row in rows]
    ends = [tokenizer.eos_token_id]
    texts = answers(model, tokenizer, ids, max_tokens=answer_tokens, end_ids=ends) if answer_tokens else []
    swapped: list[list[float]] = [[] for _ in rows]
    for k, row in enumerate(rows):
        own = list(dict.fromkeys([row["best_answer"], *row["correct_answers"], *row["incorrect_answers"]]))
        guest = (k + 1) % len(rows)
        told = pairs_of(rows[guest])
        more = [a for a in dict.fromkeys(a for pair in told for a in pair) if a not in own]
        known = dict(zip([*own, *more], reader(row["question"], [*own, *more]), strict=True))
        swapped[guest] = [lab.compared(known[c], known[r])["accuracy"] for c, r in told]
        pairs = [lab.compared(known[c], known[r]) for c, r in pairs_of(row)]
        sums = [[known[a][0] for a in row[name]] for name in LISTS]
        figures = {name: mean(p[name] for p in pairs) for name in ("accuracy", "log_odds_ratio", "nll")}
        out.append({
            "question": row["place"], "pairs": len(pairs), **figures, "mc2": mc2(*sums),
            "mc1": mc1(known[row["best_answer"]][0], sums[1]),
            "rouge": nearer(texts[k].removesuffix("…"), row) if texts else None,
        })  # fmt: skip
    for one, right in zip(out, swapped, strict=True):
        one["swapped"] = mean(right)
    return {"questions": out, "other_nll": other_nll(reader, other) if other else None}


def other_nll(reader, most: int, file: Path = OTHER) -> float:
    """Give the nll per token of answers to other prompts, which nothing was trained on."""
    found = [reader(row["prompt"], [row["chosen"]])[0] for row in read_rows(file)[:most]]
    return -sum(total for total, _ in found) / sum(count for _, count in found)


class Design:
    """What is trained on and tested, of each fold: questions by their places in the file.

    Args:
        aside: questions that no fold has: on them rates are tried.
    """

    def __init__(self, rows: list[dict], given: argparse.Namespace, aside: int = 0):
        if 2 * aside > len(rows):
            raise UserError(
                f"search-pairs and search-questions take {aside} questions, but of the {len(rows)} of the "
                "file at most half may be set aside."
            )
        rows = _shuffled([row | {"place": k} for k, row in enumerate(rows)], "aside")
        self.aside, rest = rows[:aside], rows[aside:]
        self.given, self.rows = given, sorted(rest, key=lambda row: row["place"])
        self.fold = folds_of(self.rows, given.folds)

    def side(self, k: int, tested: bool) -> list[dict]:
        rows = [row for row, fold in zip(self.rows, self.fold, strict=True) if (fold == k) == tested]
        return _shuffled(rows, str(k))

    def tested(self, k: int) -> list[dict]:
        return self.side(k, True)[: self.given.questions]

    def train(self, k: int) -> list[tuple[str, str, str]]:
        """Give the pairs to train on, drawn by the fold's seed."""
        return dealt(self.side(k, False), self.given.pairs, seed=1 + k)

    def search(self) -> tuple[list[tuple[str, str, str]], list[dict]]:
        """Give the pairs and the questions on which rates are tried, which no fold has."""
        few = self.given.search_questions
        return dealt(self.aside[few:], self.given.search_pairs, seed=1), self.aside[:few]

    def bag_of_words(self) -> dict[str, float]:
        """Give what words of the answers alone rank right, taught by the pairs that the recipes see, and by
        every pair of the other folds."""
        found = {}
        for name in ("same", "all"):
            sides = []
            for k in range(self.given.folds):
                tested = [pair for row in self.tested(k) for pair in pairs_of(row)]
                every = [pair for row in self.side(k, False) for pair in pairs_of(row)]
                sides.append(([pair[1:] for pair in self.train(k)] if name == "same" else every, tested))
            found[name] = lab.bag_of_words(sides)
        return found


def _shuffled(rows: list[dict], salt: str) -> list[dict]:
    return sorted(rows, key=lambda row: hashlib.sha256(f"{salt} {row['question']}".encode()).digest())


def dealt(rows: list[dict], count: int, seed: int) -> list[tuple[str, str, str]]:
    """Draw `count` pairs: one of each question, then a second one of each that has it, and so on."""
    draw, rounds = random.Random(seed), []
    for row in rows:
        own = pairs_of(row)
        rounds += [(n, row["question"], *pair) for n, pair in enumerate(draw.sample(own, len(own)))]
    rounds = [pair for pair in rounds if pair[2].strip() != pair[3].strip()]  # TruthfulQA has two such
    return [tuple(pair) for _, *pair in sorted(rounds, key=lambda pair: pair[0])][:count]


def stages(recipe: str, model, pairs: list, rates: dict, settings, folder: Path, done: int = 0):
    """Train a recipe: the stages after the first `done`, each on its equal part of the pairs; the model."""
    names = list(STAGES[recipe])
    part = len(pairs) // len(names)
    for n, objective in list(enumerate(names))[done:]:
        rate = rates[recipe if n == len(names) - 1 else "SFT"]
        own = dataclasses.replace(settings, objective=objective, learning_rate=rate)
        model, _ = lab.trained(model, pairs[n * part : (n + 1) * part], own, folder)
    return model


def best_of(tried: list[dict]) -> float:
    """Choose a rate: the highest accuracy, and of equal ones the largest log-odds ratio."""
    return max(tried, key=lambda one: (one["accuracy"], one["log_odds_ratio"]))["rate"]


def search_unit(design: Design, recipe: str, rates: dict, settings, folder: Path) -> dict:
    """Try RATES for the last stage of a recipe, and λ for ORPO."""
    texts, asked = design.search()
    base, tokenizer, encoder = lab.base_of(settings)
    pairs, found, start, two = lab.encoded(encoder, texts), [], base, len(STAGES[recipe]) == 2
    if two:
        own = dataclasses.replace(settings, objective="sft", learning_rate=rates["SFT"])
        start, _ = lab.trained(copy.deepcopy(base), pairs[: len(pairs) // 2], own, folder)

    def figures(model) -> dict:
        got = measured(model, tokenizer, encoder, asked, 0, 0)["questions"]
        return {name: mean(q[name] for q in got) for name in ("accuracy", "log_odds_ratio", "nll")}

    tries = [(rate, settings.or_weight) for rate in RATES[recipe]]
    tries += [(RATES[recipe][1], weight) for weight in WEIGHTS] if recipe == "ORPO" else []
    for rate, weight in tries:
        own = dataclasses.replace(settings, or_weight=weight)
        model = stages(recipe, copy.deepcopy(start), pairs, {recipe: rate}, own, folder, done=int(two))
        found.append({"rate": rate, "or_weight": weight} | figures(model))
    best = best_of([one for one in found if one["or_weight"] == settings.or_weight])
    more = {"base": figures(base)} if recipe == "ORPO" else {}
    return {"tried": {recipe: found}, "rates": {recipe: best}} | more


def fold_unit(design: Design, k: int, recipe: str, rates: dict, settings, folder: Path) -> dict:
    """Train a recipe on a fold's pairs, with the fold's own seed, and measure it."""
    settings = dataclasses.replace(settings, seed=1 + k)
    model, tokenizer, encoder = lab.base_of(settings)
    if recipe != "base":
        pairs = lab.encoded(encoder, design.train(k))
        model = stages(recipe, model, pairs, rates, settings, folder)
    return {
        "records": {recipe: measured(model, tokenizer, encoder, design.tested(k), settings.answer_tokens)}
    }


def units_of(recipes: list[str], folds: int) -> dict[str, tuple]:
    """Give the units and what each waits for: its recipe's rate, and SFT's where that comes first."""
    slug = {name: name.replace(" ", "-") for name in recipes}
    needs = {name: ["SFT"] * (len(STAGES[name]) == 2 and name != "SFT") for name in recipes}
    names = list(dict.fromkeys([*sum(needs.values(), []), *recipes]))
    units = {
        f"search-{name.replace(' ', '-')}": tuple(f"search-{n}" for n in needs.get(name, ()))
        for name in names
    }
    for k in range(folds):
        units |= {f"fold-{k}-base": ()}
        units |= {f"fold-{k}-{slug[name]}": (f"search-{slug[name]}",) for name in recipes}
    return units


def make(name: str, design: Design, settings, out: Path) -> dict:
    """Make a unit."""
    kind, _, rest = name.partition("-")
    k, _, slug = rest.partition("-") if kind == "fold" else ("0", "", rest)
    recipe, rates = slug.replace("-", " "), {}
    for file in sorted(out.glob("search-*.json")):
        rates |= read_json(file)["rates"]
    how = dict(rates=rates, settings=settings, folder=out)
    return (
        search_unit(design, recipe, **how) if kind == "search" else fold_unit(design, int(k), recipe, **how)
    )


def gather(design: Design, recipes: list[str], settings, words: list[str]) -> dict:
    """Put what the units found together, in truthful.json."""
    given = design.given
    units = lab.there(given.out, units_of(recipes, given.folds))
    records, found, rates = {name: {} for name in ["base", *recipes]}, {}, {}
    for name, one in units.items():
        found |= one.get("tried", {})
        rates |= {recipe: rate for recipe, rate in one.get("rates", {}).items() if recipe in recipes}
        for recipe, measures in one.get("records", {}).items():
            columns = ["question", "pairs", *FIGURES]
            table = [[q[c] for c in columns] for q in measures["questions"]]
            records[recipe][name.split("-")[1]] = {
                "columns": columns, "questions": table, "other_nll": measures["other_nll"],
            }  # fmt: skip
    kept = {
        "folds": given.folds, "pairs": given.pairs, "questions": given.questions,
        "search": {"pairs": given.search_pairs, "questions": given.search_questions, "tried": found},
        "search_base": next((one["base"] for one in units.values() if "base" in one), {}),
        "rates": rates, "bag_of_words": design.bag_of_words(), "records": records,
    }  # fmt: skip
    return lab.put(given.out, "truthful", words, settings, units, kept)


def by_question(kept: dict, recipe: str) -> dict[int, dict]:
    """Give the figures of each question, over the folds."""
    found = {}
    for fold in kept["records"][recipe].values():
        rows = [dict(zip(fold["columns"], row, strict=True)) for row in fold["questions"]]
        found |= {row["question"]: row for row in rows}
    return found


def differences(kept: dict, one: str, other: str) -> dict[str, list]:
    """Give, of each figure, one recipe minus another question by question; nothing of what is not there."""
    a, b = (by_question(kept, name) if name in kept["records"] else {} for name in (one, other))
    both = [(a[q], b[q]) for q in a if q in b]
    return {f: [x[f] - y[f] if None not in (x[f], y[f]) else None for x, y in both] for f in FIGURES}


def tables(kept: dict) -> str:
    """Lay out what truthful.json holds: nothing else is read."""
    lines, differ, names = [], [], list(kept["records"])
    for name, folds in kept["records"].items():
        if not folds:
            continue
        done = by_question(kept, name).values()
        cells = [spread([q[f] for q in done]) for f in FIGURES]
        nll = mean(fold["other_nll"] for fold in folds.values())
        lines.append([name, len(done), *cells, f"{nll:.3f}" if nll else "–"])
    pairs = [(name, "base") for name in names[1:]] + [(name, "SFT") for name in names if name != "SFT"][1:]
    pairs += [("ORPO", "SFT then DPO")]
    for one, other in pairs:
        if {one, other} <= {name for name in names if kept["records"][name]}:
            changes = [spread(c, "+.3f") for c in differences(kept, one, other).values()]
            differ.append([f"{one} minus {other}", *changes])
    same, every = (lab.said_of_words(kept["bag_of_words"][name]) for name in ("same", "all"))
    words = "Words of the answers alone, no question seen, rank right: taught by the pairs that the recipes "
    words += f"see, {same}; by all pairs of the other folds, {every}."
    head = ["recipe", "questions", *FIGURES, "nll of other text"]
    parts = [table(head, lines), *([table(["difference", *FIGURES], differ)] if differ else []), words]
    return "\n\n".join(parts) + "\n"


def begin(words: list[str]) -> None:
    parser = lab.parser_of("truthful", __doc__)
    parser.add_argument("file", type=Path, help="TruthfulQA, JSON lines with the hub's columns")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--recipes", default="SFT, SFT then DPO, ORPO, SFT then ORPO", help="with commas")
    parser.add_argument("--pairs", type=int, default=256, help="to train on in each fold")
    parser.add_argument("--questions", type=int, default=48, help="tested of each fold")
    parser.add_argument("--search-pairs", type=int, default=64, help="on which rates are tried")
    parser.add_argument("--search-questions", type=int, default=24, help="by which rates are chosen")
    given = parser.parse_args(words)
    if given.tables:
        return print(tables(lab.kept(given.out, "truthful")))
    recipes = list(dict.fromkeys(name.strip() for name in given.recipes.split(",")))
    if unknown := [name for name in recipes if name not in RATES]:
        raise UserError(f"There is no recipe {unknown[0]!r}: give some of {', '.join(RATES)}.")
    aside = given.search_questions + -(-given.search_pairs // 2)
    design, settings = Design(read_questions(given.file), given, aside), lab.settings_of(given)
    least = min(sum(len(pairs_of(row)) for row in design.side(k, False)) for k in range(given.folds))
    if not 2 * settings.pairs_per_step <= given.pairs <= least:
        low = 2 * settings.pairs_per_step
        raise UserError(f"pairs is {given.pairs}, but must lie between {low} and {least}, all of a fold.")
    learnt = 66 * len(recipes) * (given.pairs * given.folds + 3 * given.search_pairs)  # tokens of a pair
    read = given.questions * given.folds * 270 * (1 + len(recipes)) + given.search_questions * 200 * 15
    return lab.work(
        "truthful", words, given, units_of(recipes, given.folds),
        lambda unit: make(unit, design, settings, given.out),
        lambda: tables(gather(design, recipes, settings, words)), read=read, learnt=learnt,
    )  # fmt: skip


def main(words=None) -> int:
    return lab.run(begin, words)


if __name__ == "__main__":
    raise SystemExit(main())
