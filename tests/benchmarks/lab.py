"""What the experiments share: training by the kit's own trainer, log-probabilities of many answers, units.

A unit is a part of an experiment with a JSON file of its own, made in a process of its own with one thread:
two of them keep two cores busy. What is there is not made again, so a command that was broken off goes on.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

from lazyorpo_lib import __version__
from lazyorpo_lib.demo.model import DEMO_MODEL
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.fast.layouts import PairScorer
from lazyorpo_lib.folder import read_json
from lazyorpo_lib.machine import product_rate
from lazyorpo_lib.marker import write_atomically
from lazyorpo_lib.model import add_adapters, causal_lm, load_base, load_tokenizer
from lazyorpo_lib.orpo import loss
from lazyorpo_lib.orpo.body import body_of
from lazyorpo_lib.orpo.data import Pair
from lazyorpo_lib.orpo.encoding import prepare_tokenizer
from lazyorpo_lib.orpo.processes import make_accelerator
from lazyorpo_lib.orpo.trainer import OrpoTrainer
from lazyorpo_lib.results.evaluate import interval
from lazyorpo_lib.results.words import BagOfWords
from lazyorpo_lib.rows.template import encoder_of
from lazyorpo_lib.session import duration
from lazyorpo_lib.settings import Settings, resolve

OWN = dict(
    method="lora", or_weight=0.5, learning_rate=1e-3, pairs_per_step=4, warmup_steps=2, max_tokens=256,
    max_prompt_tokens=160, eval_pairs=0, answers=0, answer_tokens=24, precision="float32", epochs=1.0,
    save_every_minutes=0.0,
)  # fmt: skip
WEIGHTS = 135e6  # of the model that everything here is about, for the estimate


def settings_of(given, **own) -> Settings:
    """Give the settings of an experiment: OWN, its own, the base model, and what `--set` changes."""
    own = OWN | own | {"base_model": given.base_model} | dict(pair.partition("=")[::2] for pair in given.set)
    return resolve([("flag", own)])[0]


def base_of(settings: Settings):
    """Load the base model in float32, its tokenizer, and the encoder of its prompts."""
    tokenizer = load_tokenizer(settings.base_model)
    prepare_tokenizer(tokenizer)
    model = load_base(settings.base_model, dtype=torch.float32, device="cpu")
    return model.eval(), tokenizer, encoder_of(tokenizer, settings, clock=0.0)


def encoded(encoder, triples: list[tuple[str, str, str]], start: int = 0) -> list:
    """Encode (prompt, chosen, rejected); UserError where one does not fit.

    Args:
        start: the first one's number. DPO's reference knows pairs by theirs: those of a run all differ.
    """
    pairs = [Pair(i, ({"role": "user", "content": p},), c, r) for i, (p, c, r) in enumerate(triples, start)]
    found = [one for _, one in encoder.encode(pairs)]
    if bad := [one for one in found if isinstance(one, str)]:
        raise UserError(f"{len(bad)} of {len(found)} pairs cannot be used ({bad[0]}): see docs/data.md.")
    return found


def trained(model, pairs: list, settings: Settings, folder: Path, *, seen=(), every: int = 0):
    """Train adapters on encoded pairs with the kit's trainer and fold them in.

    Args:
        seen: held-out pairs, evaluated before training and after every so many steps.

    Returns:
        the model; the rows of its history.
    """
    torch.manual_seed(settings.seed)
    whole, rows = add_adapters(model, settings), []
    accelerator = make_accelerator(settings, dtype=torch.float32, device="cpu", folder=folder)
    trainer = OrpoTrainer(
        whole, settings, pairs, seen, accelerator=accelerator, folder=folder, tokens_per_batch=1024,
        make_scorer=lambda model: PairScorer(causal_lm(model)), on_row=rows.append,
        on_step=lambda step: trainer.evaluate() if every and step % every == 0 else None,
    )  # fmt: skip
    trainer.prepare()
    if every:
        trainer.evaluate()
    trainer.train()
    trainer.close()
    if trainer.bad_steps:
        raise UserError(f"The loss is not a number in {len(trainer.bad_steps)} steps: lower the rate.")
    return whole.merge_and_unload().eval(), rows


class Reader:
    """Gives log-probabilities of many answers to a prompt, which is read once."""

    def __init__(self, model, encoder):
        model.set_attn_implementation("sdpa")  # training may have put its own in
        self.model, self.encoder = model, encoder

    @torch.no_grad()
    def __call__(self, prompt: str, answers: list[str]) -> list[tuple[float, int]]:
        """Give (sum of log-probabilities of its tokens and its end, nats; their number) of each answer."""
        triples = [(prompt, answer, "?" if answer != "?" else "!") for answer in answers]
        pairs = encoded(self.encoder, triples)
        start, ids = len(pairs[0].prompt), list(pairs[0].prompt)
        owner, place, before = [0] * start, list(range(start)), []
        for k, pair in enumerate(pairs, 1):
            before += [start - 1, *range(len(ids), len(ids) + len(pair.chosen) - 1)]
            ids += pair.chosen
            owner += [k] * len(pair.chosen)
            place += range(start, start + len(pair.chosen))
        of, at = torch.tensor(owner), torch.arange(len(ids))
        sees = (at[:, None] >= at) & ((of == 0) | (of[:, None] == of))
        mask = torch.zeros(len(ids), len(ids)).masked_fill(~sees, torch.finfo(torch.float32).min)
        given = dict(input_ids=torch.tensor([ids]), position_ids=torch.tensor([place]), use_cache=False)
        hidden = body_of(self.model)(attention_mask=mask[None, None], **given)[0][0]
        targets = torch.tensor(ids[start:])
        logits = self.model.get_output_embeddings()(hidden[torch.tensor(before)]).float()
        logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        sums = torch.zeros(len(pairs)).index_add(0, of[start:] - 1, logps).tolist()
        return [(total, len(pair.chosen)) for total, pair in zip(sums, pairs, strict=True)]

    def pairs(self, triples: list[tuple[str, str, str]]) -> list[dict]:
        """Give accuracy, log_odds_ratio, nll, logp_chosen and logp_rejected of each pair."""
        return [compared(*self(p, [c, r])) for p, c, r in triples]


def compared(chosen: tuple[float, int], rejected: tuple[float, int]) -> dict:
    """Give the figures of a pair from the sums and lengths of both answers."""
    c, r = chosen[0] / chosen[1], rejected[0] / rejected[1]
    ratio = loss.log_odds(torch.tensor(c)) - loss.log_odds(torch.tensor(r))
    return {
        "accuracy": float(c > r), "log_odds_ratio": ratio.item(), "nll": -c, "logp_chosen": c,
        "logp_rejected": r,
    }  # fmt: skip


def bag_of_words(sides) -> float | None:
    """Give the share of tested pairs that words of the answers alone rank right: the bar for an accuracy.

    Args:
        sides: (pairs to learn from, pairs tested) of each fold or seed, (chosen, rejected) each.
    """
    right = []
    for train, tested in sides:
        bag = BagOfWords()
        for chosen, rejected in [*train, *tested]:
            bag.add(chosen, rejected)
        right += [bag.accuracy(range(len(train)), range(len(train), len(train) + len(tested)))] * len(tested)
    return mean(right)


def said_of_words(accuracy: float | None) -> str:
    return "too few pairs to tell" if accuracy is None else f"{accuracy:.0%} of the pairs"


def mean(values) -> float | None:
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def spread(values: list, form: str = ".3f") -> str:
    """Write the mean over questions and its 95 % interval, questions drawn with replacement."""
    if (middle := mean(values)) is None:
        return "–"
    low, high = bounds(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def bounds(values: list) -> tuple[float, float]:
    """Give the 95 % interval of the mean over questions."""
    there = np.array([value for value in values if value is not None], dtype=float)
    return interval([there], [np.arange(len(there))])


def needed(values: list[float], change: float, step: float = 1.0) -> int:
    """Count the pairs with which a change would be seen in four of five trials, at 95 %: from the variance of
    the differences pair by pair, or the least that such a change in steps of `step` has."""
    variance = max(np.var(values, ddof=1) if len(values) > 1 else 0.0, change * (step - change))
    return int(np.ceil(2.8**2 * variance / change**2))


def rounded(value, digits: int = 5):
    """Round every number of a JSON to so many digits that count."""
    if isinstance(value, dict):
        return {name: rounded(one, digits) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def about(command: list[str]) -> dict:
    """Say by what, on what and when an experiment was made."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    words = [word for word in command if word != "--so-far"]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return {
        "version": __version__,
        "machine": f"{os.cpu_count()} cores of {(names or [platform.machine()])[0]}, no GPU",
        "torch": torch.__version__, "date": datetime.date.today().isoformat(), "command": " ".join(words),
    }  # fmt: skip


def there(out: Path, names) -> dict[str, dict]:
    """Give the units that are there; UserError where none is."""
    found = {name: read_json(out / f"{name}.json") for name in names if (out / f"{name}.json").is_file()}
    if not found:
        raise UserError(f"There is no part of the experiment in {out}: leave --so-far out to make some.")
    return found


def shaping(given) -> dict:
    """Give the flags that shape what a unit finds."""
    free = ("out", "jobs", "unit", "so_far", "tables", "recipes", "seeds", "file")
    return {name: value for name, value in sorted(vars(given).items()) if name not in free}


def carry_out(module: str, words: list[str], units: dict[str, tuple], out: Path, jobs: int, show=print):
    """Make the units that are not there yet, each in a process of its own, and wait.

    Args:
        units: {name: names of those that come first}, in an order in which each comes after these.
    """
    began, waiting, running = time.monotonic(), dict(units), {}

    def make(name: str) -> None:
        if (out / f"{name}.json").is_file():
            return
        command = [sys.executable, "-m", module, *words, "--unit", name]
        threads = dict(OMP_NUM_THREADS="1") if jobs > 1 else {}
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no more is said"])[-1]
            raise UserError(f"{name} was not made ({last}): mend that and run this again, it goes on.")
        show(f"{name} is there, {duration((time.monotonic() - began) / 60)} after the beginning", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            blocked = set(waiting) | set(running.values())
            for name in [name for name, first in waiting.items() if not blocked & set(first)]:
                running[pool.submit(make, name)] = name
                del waiting[name]
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                del running[job]
                if job.exception():
                    waiting = {}  # what is under way comes to its end
                    raise job.exception()


def told(read: float, learnt: float, jobs: int, left: float = 1.0) -> str:
    """Say how long tokens that are read and such that are learnt from will take on this machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    product_rate.cache_clear()
    rate = product_rate("cpu", torch.float32)
    torch.set_num_threads(threads)
    work = left * WEIGHTS * (2 * read + 4 * learnt)
    return f"about {duration(work / (0.7 * rate * jobs) / 60)} on {jobs} cores as quick as this one now"


def parser_of(name: str, text: str) -> argparse.ArgumentParser:
    """Give a parser of what every experiment takes; `text`: its module's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}", description=text.split(":")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the units and of the JSON")
    parser.add_argument("--base-model", default=DEMO_MODEL)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--unit", default="", help="make this part alone")
    parser.add_argument("--so-far", action="store_true", help="put together what is there, train nothing")
    parser.add_argument("--tables", action="store_true", help=f"only lay out what {name}.json holds")
    return parser


def kept(out: Path, name: str) -> dict:
    """Read the JSON of an experiment; UserError where there is none."""
    if not (found := read_json(out / f"{name}.json")):
        raise UserError(f"There is no {name}.json in {out}: leave --tables out to make it.")
    return found


def put(out: Path, name: str, words: list[str], settings: Settings, units: dict, found: dict) -> dict:
    """Write the JSON of an experiment: what made it, and what was found."""
    taken = ("base_model", "pairs_per_step", "or_weight", "precision")
    whole = about(["python", "-m", f"tests.benchmarks.{name}", *words])
    whole |= {field: getattr(settings, field) for field in taken}
    whole |= {"process_minutes": sum(unit["minutes"] for unit in units.values()), "parts": sorted(units)}
    whole["commits"] = sorted({unit["commit"] for unit in units.values()})
    text = json.dumps(rounded(whole | found), separators=(",", ":")).replace('"columns"', '\n"columns"')
    write_atomically(out / f"{name}.json", f"{text}\n".encode())
    return kept(out, name)


def work(name: str, words: list[str], given, units: dict[str, tuple], make, gather, *, read, learnt) -> None:
    """Do what the command line asks: make the one unit, or all that are not there and put them together.

    Args:
        make: makes a unit by its name. gather: gives the tables of what is there.
        read, learnt: tokens that all units read, and learn from.
    """
    given.out.mkdir(parents=True, exist_ok=True)
    if given.unit:
        file, began = given.out / f"{given.unit}.json", time.monotonic()
        if file.is_file():
            return
        found = make(given.unit)
        found |= {"minutes": (time.monotonic() - began) / 60, "flags": shaping(given), "commit": commit()}
        write_atomically(file, json.dumps(rounded(found), indent=1).encode())
        return
    for file in (given.out / f"{unit}.json" for unit in units):
        if file.is_file() and read_json(file).get("flags") != json.loads(json.dumps(shaping(given))):
            raise UserError(f"{file} was made with other flags: give these again, or another --out.")
    left = [unit for unit in units if not (given.out / f"{unit}.json").is_file()]
    if not given.so_far:
        takes = told(read, learnt, min(given.jobs, len(units)), len(left) / len(units))
        print(
            f"{len(units)} parts, {len(units) - len(left)} of them there; the others take {takes}.",
            flush=True,
        )
        carry_out(f"tests.benchmarks.{name}", words, units, given.out, given.jobs)
    print(gather())


def run(main, words=None) -> int:
    """Carry `main` out; a UserError is a sentence and 2."""
    try:
        main(sys.argv[1:] if words is None else words)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
