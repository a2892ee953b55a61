"""Every class that transformers ships, small and random, held against plain separate forwards of itself.

    python -m tests.archs --only llama bert              one JSON line each, totals last
    python -m tests.archs --list side --part 1/4         a quarter of another list: main, images, side, wide
    python -m tests.archs --write docs/models.md         the page: main and images, by family

All goes through the kit's own doors: config, plan, load, scorer, a step in full, a step of adapters,
answers, save, reload, merge. `right`: all numbers equal; `refused`: a UserError, with its stage; `wrong`:
numbers differ and nothing is said; `crash`: any other exception; `not made`: no small model, or no forward
of text.

Lists: main, every class of AutoModelForCausalLM; images, those of AutoModelForImageTextToText besides, on
text alone; side, what checkpoints have and main leaves out; wide, main with windows longer than a probe
looks. In all lists windows and the greatest position are shorter than the batch's rows. What is expected of
each: tests/verdicts.py.
"""

import argparse
import contextlib
import copy
import functools
import gc
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.fast.layouts import PairScorer
from lazyorpo_lib.machine import GIB
from lazyorpo_lib.model import causal_lm, load_config, load_finished, load_for_training, save_model
from lazyorpo_lib.orpo.batching import EncodedPair, collate
from lazyorpo_lib.orpo.encoding import PairFile, check_model
from lazyorpo_lib.orpo.processes import make_accelerator
from lazyorpo_lib.orpo.trainer import OrpoTrainer, checkpoint_layers
from lazyorpo_lib.plan import costs, planner
from lazyorpo_lib.results.evaluate import answers
from lazyorpo_lib.settings import Settings
from tests.plain import apart, gradients, now, plain_gradients, plain_loss
from tests.tiny import POSITION, POSITIONS, SIZES, WINDOWS, names_of, tiny_checkpoint
from tests.verdicts import FAMILY, complaints, page

EXACT = 1e-5  # relative
NOISE = 10  # times what float32 costs the plain model, where that is more
NATS = 1e-4  # a log-probability after saving, reloading, merging
LIMIT = 120  # seconds for one model, on a busy machine; most take two
WIDE = 300  # tokens: a window longer than the probe looks, on a CPU
OR_WEIGHT = 0.5


def random_pairs(lengths) -> list[EncodedPair]:
    draw = random.Random(7)

    def tokens(n):
        return [draw.randrange(5, 127) for _ in range(n)]

    return [
        EncodedPair(i, tokens(p), [*tokens(c), 2], [*tokens(r), 2]) for i, (p, c, r) in enumerate(lengths)
    ]


PAIRS = random_pairs([(30, 5, 16), (19, 1, 8)])  # longer than every window; one answer of one token
WIDE_PAIRS = random_pairs([(WIDE + 10, 20, 10), (30, 5, 12)])


def is_sound(model) -> bool:
    values = now(model, PAIRS[1:])
    return bool(torch.isfinite(values).all() and values.min() > -60)


# What is found of one model.


class TooLong(BaseException):
    """Past the limit of a model; no Exception, so that nothing in between takes it for a model's own."""


class Report(dict):
    """What was found; a stage that fails is noted, and the next one that can goes on."""

    def __init__(self, name, kind):
        super().__init__(
            name=name, list=kind, verdict="", faults=[], refused=[], crashed=[], seconds={}, figures={}
        )

    @contextlib.contextmanager
    def stage(self, name: str):
        began = time.process_time()
        try:
            yield
        except UserError as error:
            self["refused"].append(f"{name}: {error}")
        except Exception as error:
            self["crashed"].append(f"{name}: {one_line(error)} at {where(error)}")
        self["seconds"][name] = round(time.process_time() - began, 2)

    def figure(self, name: str, value: float, most: float) -> None:
        self["figures"][name] = float(f"{value:.2g}")
        if not value <= most:  # NaN too
            self["faults"].append(f"{name} is {value:.2g}, at most {most:.0e}")

    def finish(self, verdict="", why="") -> dict:
        if self["refused"] and not self["crashed"]:  # nobody meets the numbers of what is refused
            self["faults"] = []
        said = self["faults"] + self["crashed"] + self["refused"]
        kinds = [
            kind
            for kind, key in (("wrong", "faults"), ("crash", "crashed"), ("refused", "refused"))
            if self[key]
        ]
        self["verdict"], self["why"] = verdict or next(iter(kinds), "right"), why or "; ".join(said)
        return {k: v for k, v in self.items() if k not in ("faults", "crashed", "refused")}


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def where(error: BaseException) -> str:
    """The kit's innermost line and the innermost line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    kit = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "lazyorpo_lib" in f.filename]
    last = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}"
    return f"{kit[-1] if kit else '-'} <- {last}"


def tokenizer():
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 128)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **ends)


def settings_of(base, method: str, pairs, rate: float = 1e-2) -> Settings:
    shape = dict(lora_rank=4, lora_alpha=8, or_weight=OR_WEIGHT, max_steps=1, pairs_per_step=len(pairs))
    return Settings(base_model=str(base), method=method, learning_rate=rate, eval_pairs=0, **shape)


def trainer_of(model, settings: Settings, folder: Path, pairs) -> OrpoTrainer:
    place = dict(dtype=torch.float32, device="cpu", folder=folder)
    how = dict(make_scorer=lambda m: PairScorer(causal_lm(m)), folder=folder, tokens_per_batch=10**6)
    return OrpoTrainer(model, settings, pairs, accelerator=make_accelerator(settings, **place), **how)


def step_gradients(trainer, pairs, tokens_per_batch: int = 10**6) -> dict:
    """What a step of the kit leaves in the weights, of the ORPO loss alone."""
    forward, trainer.tokens_per_batch = trainer.scorer.forward, tokens_per_batch
    trainer.model.zero_grad()
    router, forward.router_loss = forward.router_loss, 0.0
    trainer._gradient(pairs)
    forward.router_loss, trainer.tokens_per_batch = router, 10**6
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    return found


def one_step(trainer) -> None:
    trainer.prepare()
    trainer.train()
    trainer.close()


def measure(name: str, kind: str, limit: float = LIMIT) -> dict:
    """Everything about one model, within a time limit."""

    def give_up(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, limit)
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    report, threads = Report(name, kind), torch.get_num_threads()
    began = time.process_time()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=shm) as folder, warnings.catch_warnings(action="ignore"):
            out = _measure(report, *names_of(kind)[name], Path(folder))
    except TooLong:
        report["crashed"].append(f"after {', '.join(report['seconds']) or 'nothing'}: more than {limit} s")
        out = report.finish()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_num_threads(threads)
    return out | {"took": round(time.process_time() - began, 1)}


def _measure(report: Report, model_type: str, changes: dict, folder: Path) -> dict:
    wide, pairs, base, sizes = report["list"] == "wide", PAIRS, folder / "base", {}
    if wide:
        pairs, sizes = WIDE_PAIRS, dict.fromkeys(WINDOWS, WIDE) | dict.fromkeys(POSITIONS, 8 * POSITION)
        changes = {n: WIDE if n in WINDOWS else value for n, value in changes.items()}
    mute: list[str] = []

    def sound(model) -> bool:
        try:
            return is_sound(model)
        except Exception as error:  # it takes no text alone: to be refused by the kit
            mute.append(one_line(error))
        return True

    try:
        model = tiny_checkpoint(model_type, changes, sound, sizes)
        model.save_pretrained(base)
        tokenizer().save_pretrained(base)
    except Exception as error:
        return report.finish("not made", f"{one_line(error)} at {where(error)}")
    report["class"] = type(model).__name__
    drawn, plan = None if mute else now(model, pairs), None
    with report.stage("config"):
        config = load_config(str(base))
    if not wide and not report["refused"]:
        with report.stage("plan"):
            plan = plan_of(config, base, pairs)
            report["stood_in"] = "cannot be simulated" in plan.why
    if not report["refused"]:
        full(report, drawn, base, folder, pairs, wide)
    if mute and not (report["refused"] or report["crashed"]):
        report["faults"].append(f"its plain forward fails, which is not said: {mute[0]}")
    if not (mute or wide or report["refused"]):
        with report.stage("lora"):
            lora(report, drawn, base, folder, pairs, plan)
    return report.finish()


def plan_of(config, base: Path, pairs):
    """The plan of a run with adapters, which no run starts without; of one row, for the sake of time."""

    def one_row(config, settings, method, dtype, machine, rows, *rest):
        return simulate(config, settings, method, dtype, machine, rows[:1], *rest)

    with pytest.MonkeyPatch.context() as patch:
        simulate = costs.simulate
        patch.setattr(costs, "simulate", one_row)
        patch.setattr(planner, "METHODS", ("lora",))
        lengths = planner.measured_lengths(pairs)
        return planner.make_plan(config, settings_of(base, "lora", pairs), "A100-40GB", lengths)


def full(report: Report, drawn, base: Path, folder: Path, pairs, wide: bool) -> None:
    """Log-probabilities and gradients of all weights against plain ones; a step, saved and reloaded."""
    settings, whole, start, trainer = settings_of(base, "full", pairs, 1e-3), None, None, None
    with report.stage("load"):
        whole = load_for_training(settings, method="full", dtype=torch.float32, device="cpu")
        plain = copy.deepcopy(whole).eval()
        if drawn is not None:
            start = now(plain, pairs)  # of what was loaded, whatever was saved
            report.figure("base reloaded, nats", (start - drawn).abs().max().item(), NATS)
    if whole is None:
        return
    with report.stage("scorer"):
        file = PairFile()
        for pair in pairs:
            file.append(pair)
        check_model(file, whole)
        trainer = trainer_of(whole, settings, folder / "run", pairs)
        scorer = trainer.scorer
        report |= {"rung": scorer.rung, "head": "plain" if scorer.forward.plain else "own logits"}
    if trainer is None or start is None:
        return
    sees = not is_causal(plain, pairs, start)
    report["faults"] += ["it sees what it predicts, which is not said"] * sees
    same = torch.equal(now(plain, pairs), start)
    report["faults"] += ["its own forward is random, which is not said"] * (not same)
    true = None
    with report.stage("plain gradient"):
        true = plain_gradients(plain, pairs, OR_WEIGHT)
    with report.stage("log-probabilities"):
        whole.eval()
        with torch.no_grad():
            ours = scorer.logps(collate(pairs, layout=scorer.layout))
        report.figure("log-probabilities", apart(ours, start), EXACT)
    for name, tokens, layers in (("gradient", 10**6, 0), ("split", 1, 0), ("checkpointed", 10**6, 99)):
        if name == "checkpointed" and wide:
            continue
        with report.stage(name):
            checkpoint_layers(whole, layers)
            report.figure(name, apart(step_gradients(trainer, pairs, tokens), true), EXACT)
    checkpoint_layers(whole, 0)
    forgive_noise(report, plain, start, true, pairs)
    if not wide:
        with report.stage("full"):
            one_step(trainer)
            tuned = now(whole, pairs)
            save_model(whole, tokenizer(), folder / "full", base_model=str(base))
            again = load_finished(folder / "full")[0]
            report.figure("full reloaded, nats", (now(again, pairs) - tuned).abs().max().item(), NATS)


def is_causal(plain, pairs, start) -> bool:
    """Whether an answer's last token leaves the log-probabilities before it alone."""
    moved = [p._replace(chosen=[*p.chosen[:-1], 9], rejected=[*p.rejected[:-1], 9]) for p in pairs]
    early = [torch.arange(len(answer)) < len(answer) - 1 for pair in pairs for answer in pair[2:]]
    return bool((now(plain, moved) - start)[torch.cat(early)].abs().max() < 1e-4)


def forgive_noise(report: Report, plain, start, true, pairs) -> None:
    """Take back faults that are no more than what float32 alone costs the plain model."""
    if not report["faults"] or not true:
        return
    with contextlib.suppress(Exception):
        training, double = plain.training, copy.deepcopy(plain).double()
        noise = {"log-probabilities": apart(start, now(double, pairs))}
        double.train(training).zero_grad()
        plain_loss(double, pairs, OR_WEIGHT).backward()
        rounding = apart(true, gradients(double))
        noise |= dict.fromkeys(["gradient", "split", "checkpointed"], rounding)
        for name, least in noise.items():
            if report["figures"].get(name, 1) <= NOISE * least:
                report["faults"] = [fault for fault in report["faults"] if not fault.startswith(f"{name} ")]


def lora(report: Report, before, base: Path, folder: Path, pairs, plan) -> None:
    """A step of adapters by the kit, answers, and what is saved: reloaded, merged, its gradient."""
    words, settings = tokenizer(), settings_of(base, "lora", pairs)
    adapted = load_for_training(settings, method="lora", dtype=torch.float32, device="cpu")
    layers = {n: m for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    report["adapters"] = dict(Counter(n.rsplit(".", 1)[-1] for n in layers))
    report["without"] = without_adapter(adapted, layers)
    trainer = trainer_of(adapted, settings, folder / "run", pairs)
    one_step(trainer)
    if plan:
        real = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        report.figure(
            "adapters planned, ratio off", abs(plan.method.parts["adapters"] * GIB / 4 / real - 1), 0.1
        )
    with report.stage("answers"):
        said = answers(adapted, words, [p.prompt for p in pairs], max_tokens=3, end_ids=[2])
        assert len(said) == len(pairs)
    tuned, place = now(adapted, pairs), folder / "lora"
    if not (moved := (tuned - before).abs().max().item()) > 1e-3:
        report["faults"].append(f"a step of the adapters moves nothing ({moved:.1g} nats)")
    save_model(adapted, words, place, base_model=str(base))
    again = None
    with report.stage("reload"):
        again = load_finished(place)[0]
        report.figure("adapter reloaded, nats", (now(again, pairs) - tuned).abs().max().item(), NATS)
    with report.stage("merge"):
        merged = load_finished(place, merge=True)[0]
        report.figure("adapter merged, nats", (now(merged, pairs) - tuned).abs().max().item(), NATS)
    if again is not None:
        with report.stage("adapters' gradient"):
            weights = dict(adapted.named_parameters())
            for n, p in again.named_parameters():
                p.requires_grad_(weights[n].requires_grad)
                p.data.copy_(weights[n].data)
            true = plain_gradients(again, pairs, OR_WEIGHT)  # by PEFT's own layers
            report.figure("adapters' gradient", apart(step_gradients(trainer, pairs), true), EXACT)


def without_adapter(adapted, layers: dict) -> list[str]:
    """Names of the matrices that got no adapter, and are neither embedding nor head."""
    head = causal_lm(adapted).get_output_embeddings()
    covered = {
        id(getattr(m.get_base_layer(), getattr(m, "parameter_name", "weight"))) for m in layers.values()
    }
    covered |= {id(m.weight) for m in adapted.modules() if isinstance(m, torch.nn.Embedding)}
    covered.add(id(getattr(head, "weight", None)))
    bare = [
        n for n, p in adapted.named_parameters() if "lora_" not in n and p.dim() > 1 and id(p) not in covered
    ]
    return sorted({re.sub(r"^base_model\.model\.|\.\d+(?=\.)|\.weight$", "", n) for n in bare})


# The command line.


@functools.cache
def quieten() -> None:
    """No bars; and what is imported so far is no garbage, which accelerate looks for four times a model."""
    gc.freeze()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_all(jobs: list[tuple], workers: int):
    """`measure` of each job, several at a time; yields reports in the order of the jobs."""
    if workers < 2:
        yield from (measure(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(measure, *zip(*jobs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="names from the list")
    parser.add_argument("--list", default="main", choices=("main", "images", "side", "wide"))
    parser.add_argument("--part", default="1/1", help="k/n: the k-th of n parts")
    parser.add_argument("--workers", type=int, default=1, help="models at a time")
    parser.add_argument("--write", type=Path, help="the page to write")
    given = parser.parse_args()
    quieten()
    k, n = map(int, given.part.split("/"))
    lists = ["main", "images"] if given.write else [given.list]
    jobs = [(name, kind) for kind in lists for name in (given.only or list(names_of(kind)))[k - 1 :: n]]
    reports, began = [], time.perf_counter()
    for report in run_all(jobs, given.workers):
        reports.append(report | {"complaints": complaints(report)})
        print(json.dumps(reports[-1]), flush=True)
    counted = Counter(report["verdict"] for report in reports)
    wrong = [report["name"] for report in reports if report["complaints"]]
    new = [f"{r['name']}: {r['verdict']}" for r in reports if r["name"] not in FAMILY and r["list"] != "side"]
    minutes = round((time.perf_counter() - began) / 60, 1)
    print(json.dumps({"totals": counted, "not as expected": wrong, "new": new, "minutes": minutes}))
    if given.write:
        given.write.write_text(page(reports, SIZES["sliding_window"]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
