"""Parts 0, 10 to 14, 16 and 17 of tests.gpu: does it fit as planned, and is it as fast."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lazyorpo_lib import model as models
from lazyorpo_lib import run as runs
from lazyorpo_lib.demo.model import DEMO_MODEL, TINY_MODEL
from lazyorpo_lib.machine import pick_precision, this_machine
from lazyorpo_lib.plan import planner
from lazyorpo_lib.settings import Settings, resolve

from .bench import (
    CUDA,
    DEVICE,
    GIB,
    HALF,
    Clock,
    Skip,
    as_t4,
    build,
    build_four_bit,
    cap,
    check,
    clean,
    config,
    difference,
    largest,
    lengths,
    lora,
    milliseconds,
    pairs_of,
    same,
    synchronize,
    this_card,
    trainer_of,
)

PRODUCT = {"T4": 0.33, "L4": 0.45}  # of the data sheet's peak, where power caps a card below 0.7
ARTICLE = 1688  # steps of the article's run: one epoch of argilla/dpo-mix-7k, 4 pairs a step


# 0: the card


def env(small: bool):
    """The card against its data sheet; what later figures are to be divided by."""
    card, n = this_card(), 256 if small else 8192
    a, b = (torch.randn(n, n, device=DEVICE).to(HALF) for _ in range(2))
    rate = 2 * n**3 / milliseconds(lambda: a @ b, 20) / 1e9
    expected = PRODUCT.get(card.name, 0.7) * card.tflops_16 if card else None
    yield check(f"product of {n} x {n}", rate, expected, unit="TFLOP/s")
    source = torch.randn((1 if small else 1000) * 2**20, device=DEVICE)
    target = torch.empty_like(source)
    speed = 2 * 4 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6
    yield check("copy", speed, 0.85 * card.bandwidth if card else None, unit="GB/s")
    one = torch.zeros(1, device=DEVICE)
    yield check(
        "empty launch", 1e3 * milliseconds(lambda: one.zero_(), 2000), high=8.0 if CUDA else None, unit="us"
    )
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        yield check("free memory", (free + torch.cuda.memory_reserved()) / GIB, unit="GiB")
        yield check("of", total / GIB, unit="GiB")


# 10: peaks


def _planned(shape, settings: Settings, machine, pairs):
    """The plan's own split, its budget rounded down to whole pairs of one length, planned again."""
    known, cost = planner.measured_lengths(pairs), pairs[0].tokens()

    def plan(given):
        made = planner.make_plan(shape, given, machine, known, dtype=None if CUDA else torch.float32)
        return next(m for m in made.methods if m.method == settings.method)

    first = plan(settings)
    tokens = max(1, first.tokens_per_batch // cost) * cost
    return plan(
        dataclasses.replace(settings, tokens_per_batch=tokens, checkpointed_layers=first.checkpointed_layers)
    )


def _built(shape, method: str, dtype):
    """The model of a method, its base in `dtype` or 4 bit, or float32 for full tuning."""
    if method == "full":
        return build(shape, torch.float32)
    model = build_four_bit(shape, dtype) if method == "qlora" else build(shape, dtype)
    return lora(model)


def peaks(small: bool, name: str, method: str, limit: str = "", expandable: bool = True):
    """Two steps at the plan's own split, under the memory of the card `limit`: measured against planned."""
    card = planner.find_card(limit) if limit else None
    shape = config(name, small)
    triples = [(1024, 1024, 1024)] if method == "qlora" else [_mean()] * 16
    triples = [tuple(n // 8 for n in t) for t in triples] if small else triples
    pairs = pairs_of(triples, shape.vocab_size)
    settings = Settings(
        method=method, save_every_steps=0, eval_pairs=0, pairs_per_step=min(8, len(pairs)), max_steps=2
    )
    with as_t4() if limit == "T4" else contextlib.nullcontext(), tempfile.TemporaryDirectory() as folder:
        machine = card or this_machine()
        plan = _planned(shape, settings, machine, pairs)
        yield check("planned", plan.peak_gib, unit="GiB", ok=plan.fits or small, expected="fits")
        if card:
            cap(card.memory_gib)
        dtype = pick_precision("auto", machine)[0] if CUDA else torch.float32
        model = _built(shape, method, dtype)
        trainer = trainer_of(
            model,
            pairs,
            folder,
            dtype=dtype,
            tokens=plan.tokens_per_batch,
            layers=plan.checkpointed_layers,
            method=method,
            pairs_per_step=settings.pairs_per_step,
            max_steps=2,
            learning_rate=1e-5,
        )
        clean()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
    yield same("notes of less memory", len(trainer.oom_notes), 0)
    if CUDA:
        yield from _memory(plan, expandable, 9.0 if method == "qlora" else None)


def _mean() -> tuple[int, int, int]:
    real = lengths(300)
    return tuple(round(sum(row[k] for row in real) / len(real)) for k in range(3))


def _memory(plan, expandable: bool, most: float | None):
    allocated, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    yield check("allocated at the peak", allocated, high=most, unit="GiB")
    yield check(
        "planned without framework, of allocated",
        (plan.peak_gib - plan.parts["framework"]) / allocated,
        0.93,
        1.03,
    )
    yield check("reserved, of allocated", reserved / allocated, high=1.1 if expandable else None)
    free, total = torch.cuda.mem_get_info()
    yield check(
        "context, and what others hold", (total - free - torch.cuda.memory_reserved()) / GIB, unit="GiB"
    )


# 11: the article's run


class _Profiled:
    """Profiles the steps after `first` up to `last`: seconds, the card's busy share, launches, the largest
    kernels."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def __call__(self, step: int) -> None:
        if step == self.first:
            synchronize()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
            self.profiler, self.began = profile(activities=activities).__enter__(), time.perf_counter()
        if step == self.last:
            synchronize()
            seconds = time.perf_counter() - self.began
            self.profiler.__exit__(None, None, None)
            events = self.profiler.key_averages()
            kernels = {
                e.key: e.self_device_time_total / 1e6
                for e in events
                if e.device_type == DeviceType.CUDA and not e.is_user_annotation
            }
            self.busy, self.seconds = sum(kernels.values()) / seconds, seconds
            self.launches = sum(e.count for e in events if "LaunchKernel" in e.key)
            self.kernels = sorted(kernels.items(), key=lambda item: -item[1])[:12]

    def checks(self, least: float | None):
        yield check("card busy", self.busy, low=least)
        for name, seconds in self.kernels:
            yield check(f"kernel {name[:60]}", seconds / self.seconds)


def article(small: bool, name: str, method: str, steps: int, first: int):
    """Steps of real lengths, prompts cut at 128 tokens, 4 pairs: seconds a step, against the plan; then where
    they go."""
    steps, first = (6, 2) if small else (steps, first)
    shape = config(name, small)
    dtype = HALF if CUDA else torch.float32
    pairs = pairs_of(lengths(4 * (steps + 4), prompt=128, shrink=8 if small else 1), shape.vocab_size)
    settings = Settings(
        method=method, pairs_per_step=4, eval_pairs=0, save_every_steps=0, max_steps=ARTICLE, epochs=10**4
    )
    made = planner.make_plan(shape, settings, this_machine(), planner.measured_lengths(pairs), dtype=dtype)
    plan = next(m for m in made.methods if m.method == method)
    clock, profiled, rows = Clock(first, steps), _Profiled(steps, steps + 4), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            _built(shape, method, dtype),
            pairs,
            folder,
            dtype=dtype,
            tokens=plan.tokens_per_batch,
            rows=rows,
            layers=plan.checkpointed_layers,
            watchers=[clock, profiled],
            method=method,
            max_steps=steps + 4,
            learning_rate=5e-6,
        )
        trainer.train()
    yield check("loss of the last step", rows[-1]["loss"], 0.0, 1e3)
    minutes = clock.seconds * ARTICLE / 60
    goal = this_card() is not None and this_card().name in ("H100", "H200") and name == "phi-2"
    yield check("a step", clock.seconds, unit="s")
    yield check(f"{ARTICLE} steps", minutes, high=6.0 if goal else None, unit="minutes")
    yield check("planned, of measured", plan.minutes / minutes, *(0.7, 1.4) if CUDA else ())
    yield from profiled.checks(0.85 if CUDA else None)


# 12: TRL


def trl(small: bool, name: str, checkpointed: bool):
    """tests.benchmarks with random weights and letters in real lengths: TRL and the kit, both on the same
    tokens."""
    with tempfile.TemporaryDirectory() as home:
        # Where no hub is in reach the kit looks here for the demo's model; bytes stand for its tokens.
        shutil.copytree(models.locate(TINY_MODEL), f"{home}/lazyorpo/SmolLM2-135M-Instruct")
        model = name
        if small or name == "smollm2-135m":
            model = f"{home}/model"
            build(config("smollm2-135m", small), torch.float32).save_pretrained(model)
            models.load_tokenizer(TINY_MODEL).save_pretrained(model)
        rows = [(max(1, p - 20), c, r) for p, c, r in lengths(80, longest=700, shrink=8 if small else 1)]
        texts = [
            dict(zip(("prompt", "chosen", "rejected"), (_letters(k, n) for n in row), strict=True))
            for k, row in enumerate(rows)
        ]
        Path(home, "pairs.json").write_text(json.dumps(texts))
        steps = [
            "--steps",
            "1" if small else "12",
            "--precision",
            str(HALF).removeprefix("torch.") if CUDA else "float32",
        ]
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks",
            "--model",
            model,
            "--dataset",
            f"{home}/pairs.json",
            "--out",
            f"{home}/out",
            "--tokens-per-batch",
            "8192",
            *["--checkpointing"] * checkpointed,
            *steps,
        ]
        done = subprocess.run(command, env=os.environ | {"HF_HOME": home}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
        results = json.loads(next(Path(home, "out").glob("*.json")).read_text())["results"]
    yield from _against_trl(results, name == "llama-3-8b" and CUDA and not small)


def _letters(k: int, n: int) -> str:
    return ("abcdefghijklmnopqrstuvwxyz"[k % 26 :] + "etaoinshrdlu " * (n // 13 + 1))[: max(1, n - 1)] + "x"


def _against_trl(results: dict, held: bool):
    theirs, same_loss, ours = (
        results[name] for name in ("TRL", "LazyORPO, prompt+answer", "LazyORPO, answer")
    )
    apart = largest(abs(a / b - 1) for a, b in zip(same_loss["losses"], theirs["losses"], strict=True))
    yield check("prompt+answer, loss apart from TRL's", apart, high=0.01)
    yield check("TRL", theirs["pairs_per_second"], unit="pairs/s")
    for what, r in (("prompt+answer", same_loss), ("answer", ours)):
        held = held and what == "answer"
        yield check(
            f"{what}, pairs/s of TRL's",
            r["pairs_per_second"] / theirs["pairs_per_second"],
            low=3.0 if held else None,
        )
        ratio = r["peak_gib_above_model"] / max(theirs["peak_gib_above_model"], 1e-9)
        yield check(f"{what}, memory above the model of TRL's", ratio, high=0.4 if held else None)


# 13: waiting for the card


class _Waits:
    """Counts the times that the host waits for the card in the steps after `first` up to `last`."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.caught = first, last, warnings.catch_warnings(record=True)

    def __call__(self, step: int) -> None:
        if step == self.first:
            self.seen = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if step == self.last:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            self.places = [
                f"{Path(w.filename).name}:{w.lineno}" for w in self.seen if "synchroniz" in str(w.message)
            ]


def syncs(small: bool):
    """Steps of four micro-batches without a logged row: what waits for the card, and how often it is given
    work."""
    shape = config("qwen2.5-1.5b", small)
    with tempfile.TemporaryDirectory() as folder:
        waits, profiled = _Waits(2, 6), _Profiled(6, 10)
        trainer = trainer_of(
            lora(build(shape, HALF)),
            pairs_of([(300, 300, 300)] * 40, shape.vocab_size),
            folder,
            dtype=HALF,
            tokens=900,
            watchers=[waits, profiled],
            max_steps=10,
            log_every_steps=1000,
        )
        trainer.train()
    yield check(
        f"waits a step ({', '.join(sorted(set(waits.places))) or 'none'})", len(waits.places) / 4, high=1.0
    )
    yield check("launches a layer and micro-batch", profiled.launches / 16 / shape.num_hidden_layers)
    yield check("card idle", 1 - profiled.busy)


# 14: Liger


def liger(small: bool):
    """Ten steps with Liger's layers and without: equal, and sooner; and the planner after them."""
    known = planner.measured_lengths(pairs_of([_mean()], 500))
    for name in ("llama-3-8b", "qwen2.5-1.5b"):
        shape, seconds, losses, rungs = config(name, small, num_hidden_layers=8), [], [], []
        pairs = pairs_of(lengths(80, longest=1024), shape.vocab_size)
        for on in (False, True):  # never the other way round: Liger's functions stay in transformers' modules
            clock, rows = Clock(3, 10), []
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(
                    lora(build(shape, HALF)),
                    pairs,
                    folder,
                    dtype=HALF,
                    tokens=8192,
                    rows=rows,
                    watchers=[clock],
                    max_steps=10,
                    pairs_per_step=8,
                    liger_kernel=on,
                    learning_rate=1e-4,
                )
                trainer.train()
            seconds.append(clock.seconds)
            losses.append(torch.tensor([row["loss"] for row in rows]))
            rungs.append(trainer.scorer.rung)
            del trainer
            clean()
        yield same(f"{name}: layouts", rungs, ["shared", "shared"])
        yield check(f"{name}: loss apart", difference(losses[1], losses[0]), high=1e-2)
        yield check(f"{name}: speed of that without", seconds[0] / seconds[1], low=1.1)
        yield same(
            f"{name}: plans afterwards",
            len(planner.plan_cards(config(name), Settings(), known)),
            len(planner.CARDS),
        )


# 16: the demo


def real(small: bool):
    """The demo, from its weights to its answers, where its weights are on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HOME

    there = Path(HF_HOME, "lazyorpo", "SmolLM2-135M-Instruct").is_dir()
    if not there and not isinstance(try_to_load_from_cache(DEMO_MODEL, "config.json"), str):
        raise Skip("its weights are not on this machine")
    with tempfile.TemporaryDirectory() as folder:
        given = dict(preset="demo", output_dir=folder)
        runs.execute(*resolve([("flag", given)])[:2], show=lambda text: None)
        summary = json.loads(Path(folder, "summary.json").read_text())
    yield check("answers with the habit before", summary["habit_before"], high=0.05)
    yield check("answers with the habit after", summary["habit_after"], low=0.95)
    yield check("minutes", summary["minutes"])
    yield check("share of drawing", summary["drawing_share"], high=0.05)


# 17: two cards


NOTEBOOK = """
import sys
from accelerate import notebook_launcher
from lazyorpo_lib.__main__ import main
if __name__ == "__main__":
    notebook_launcher(main, (sys.argv[1:],), num_processes=2)
"""


def ddp(small: bool):
    """The command line on two cards, as accelerate and as a notebook start it, against one card."""
    from safetensors.torch import load_file

    if torch.cuda.device_count() < 2:
        raise Skip("needs two cards")
    with tempfile.TemporaryDirectory() as home:
        flags = ["--preset=tiny", "--precision=float32", "--tokens-per-batch=150"]
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "lazyorpo_lib",
        ]
        ways = {
            "one card": ["-m", "lazyorpo_lib"],
            "torchrun": torchrun,
            "notebook_launcher": ["-c", NOTEBOOK],
        }
        weights = {}
        for name, command in ways.items():
            cards = {"CUDA_VISIBLE_DEVICES": "0"} if name == "one card" else {}
            done = subprocess.run(
                [sys.executable, *command, *flags, f"--output-dir={home}/{name}"],
                env=os.environ | cards,
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
            weights[name] = load_file(f"{home}/{name}/model/adapter_model.safetensors")
        for name in ("torchrun", "notebook_launcher"):
            yield check(f"{name} against one card", difference(weights[name], weights["one card"]), high=1e-5)
