"""Experiments 2 and 4, pairs without a cue of style, nearly equal: does anything learn what is right of them?

    python -m tests.benchmarks.nocue --out runs/nocue
    python -m tests.benchmarks.nocue --out runs/nocue --tables   # from its JSON alone

Sums: "What is 23 + 48?", "The answer is 71." against "The answer is 81.", one digit changed. Each answer
stands in one pair as chosen and in its twin as rejected, so neither its length nor any word of it tells which
is right: a bag of words ranks half of them, and who gets more than half has read the question. A twin is
either trained on or held out. SFT, DPO and ORPO all start from the base model and see every pair once; while
they train, the log-probability of some held-out answers is kept: likelihood displacement, or not.
"""

import copy
import dataclasses
import random
from pathlib import Path

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.results.card import table

from . import lab
from .lab import spread

RATES = {"SFT": 1e-3, "DPO": 3e-4, "ORPO": 1e-3}
FIGURES = ("accuracy", "log_odds_ratio", "nll", "logp_chosen", "logp_rejected")
SEEN = 12  # held-out pairs whose log-probabilities are kept while training


def twins(count: int, seed: int) -> list[list[tuple[str, str, str]]]:
    """Draw `count` twins, two (prompt, chosen, rejected) each; no two of the same two sums."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        right = draw.randint(20, 99)
        digit, tens = draw.randint(0, 9), draw.random() < 0.5
        wrong = 10 * digit + right % 10 if tens else right - right % 10 + digit
        if 20 <= wrong != right:
            found.setdefault((min(right, wrong), max(right, wrong)), draw.random())
    pairs = []
    for both in list(found):
        own = []
        for one, other in (both, both[::-1]):
            first = draw.randint(5, one - 5)
            question = f"What is {first} + {one - first}?"
            own.append((question, f"The answer is {one}.", f"The answer is {other}."))
        pairs.append(own)
    return pairs


def split(given, seed: int) -> tuple[list, list]:
    """Give the pairs to train on, shuffled, and those held out."""
    most = 300  # of 80 sums with one digit changed there are about 640
    if not 8 <= given.pairs <= 2 * most or not 8 <= given.held_out <= 2 * most:
        raise UserError(
            f"pairs is {given.pairs} and held-out {given.held_out}, but both must lie between 8 and "
            f"{2 * most}."
        )
    count = -(-given.pairs // 2), -(-given.held_out // 2)
    all_of = twins(sum(count), seed)
    train = [pair for twin in all_of[: count[0]] for pair in twin]
    random.Random(seed).shuffle(train)
    return train, [pair for twin in all_of[count[0] :] for pair in twin]


def seed_unit(given, seed: int, settings, folder: Path) -> dict:
    """Train each recipe with a seed and measure it on the held-out pairs."""
    settings = dataclasses.replace(settings, seed=seed)
    base, _, encoder = lab.base_of(settings)
    texts, tested = split(given, seed)
    pairs, seen = lab.encoded(encoder, texts), lab.encoded(encoder, tested[:SEEN], start=len(texts))
    out, history = {"base": lab.Reader(base, encoder).pairs(tested)}, {}
    for recipe, rate in RATES.items():
        own = dataclasses.replace(settings, objective=recipe.lower(), learning_rate=rate)
        every = max(1, len(pairs) // settings.pairs_per_step // 8)
        model, rows = lab.trained(copy.deepcopy(base), pairs, own, folder, seen=seen, every=every)
        names = ("eval_logp_chosen", "eval_logp_rejected")
        history[recipe] = [[row["step"], *(row[n] for n in names)] for row in rows if names[0] in row]
        out[recipe] = lab.Reader(model, encoder).pairs(tested)
    return {"records": {name: [[p[f] for f in FIGURES] for p in rows] for name, rows in out.items()}} | {
        "history": history
    }


def gather(given, settings, words: list[str]) -> dict:
    units = lab.there(given.out, units_of(given))
    found = {"pairs": given.pairs, "held_out": given.held_out, "dpo_beta": settings.dpo_beta, "rates": RATES}
    sides = [[[pair[1:] for pair in side] for side in split(given, 1 + k)] for k in range(given.seeds)]
    found |= {"bag_of_words": lab.bag_of_words(sides), "columns": FIGURES}
    for part in ("records", "history"):
        found[part] = {name.removeprefix("seed-"): unit[part] for name, unit in units.items()}
    return lab.put(given.out, "nocue", words, settings, units, found)


def units_of(given) -> dict[str, tuple]:
    return {f"seed-{seed}": () for seed in range(1, given.seeds + 1)}


def by_twin(kept: dict, recipe: str, figure: str) -> list[float]:
    """Give a figure of each twin, over the seeds: what two pairs have in common counts once."""
    at, found = kept["columns"].index(figure), []
    for records in kept["records"].values():
        values = [row[at] for row in records[recipe]]
        found += [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]
    return found


def tables(kept: dict) -> str:
    """Lay out what nocue.json holds: nothing else is read."""
    names = list(next(iter(kept["records"].values())))
    lines = [
        [name, 2 * len(by_twin(kept, name, "nll")), *(spread(by_twin(kept, name, f)) for f in FIGURES)]
        for name in names
    ]
    differ = []
    pairs = [(n, "base") for n in names[1:]] + [("ORPO", "SFT"), ("ORPO", "DPO")]
    for one, other in pairs:
        change = {
            f: [a - b for a, b in zip(by_twin(kept, one, f), by_twin(kept, other, f), strict=True)]
            for f in FIGURES
        }
        need = 2 * lab.needed(change["accuracy"], 0.05, 0.5)
        differ.append([f"{one} minus {other}", *(spread(c, "+.3f") for c in change.values()), f"{need:,}"])
    words = f"Words of the answers alone rank right: {lab.said_of_words(kept['bag_of_words'])}."
    head = ["difference", *FIGURES, "pairs needed for 5 points"]
    return "\n\n".join([table(["recipe", "pairs", *FIGURES], lines), table(head, differ), words]) + "\n"


def begin(words: list[str]) -> None:
    parser = lab.parser_of("nocue", __doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=96, help="to train on")
    parser.add_argument("--held-out", type=int, default=64)
    given = parser.parse_args(words)
    if given.tables:
        return print(tables(lab.kept(given.out, "nocue")))
    settings = lab.settings_of(given)
    if given.seeds < 1:
        raise UserError(f"seeds is {given.seeds}, but must be a whole number from 1 on.")
    split(given, 1)
    read, learnt = 50 * (4 * given.held_out + 3 * 9 * SEEN), 50 * 3.5 * given.pairs
    return lab.work(
        "nocue", words, given, units_of(given),
        lambda unit: seed_unit(given, int(unit.removeprefix("seed-")), settings, given.out),
        lambda: tables(gather(given, settings, words)),
        read=read * given.seeds, learnt=learnt * given.seeds,
    )  # fmt: skip


def main(words=None) -> int:
    return lab.run(begin, words)


if __name__ == "__main__":
    raise SystemExit(main())
