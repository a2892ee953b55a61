"""What the parts of tests.gpu share: random weights, pairs of real lengths, trainers, clocks, caps, verdicts.

A part is a generator of checks. Figures are GiB, milliseconds or shares; a relative difference is the norm of
the difference over the norm of the truth.
"""

import contextlib
import copy
import gc
import json
import random
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from lazyorpo_lib import model as models
from lazyorpo_lib.fast import attention
from lazyorpo_lib.fast.layouts import PairScorer
from lazyorpo_lib.machine import this_machine
from lazyorpo_lib.orpo.batching import EncodedPair
from lazyorpo_lib.orpo.processes import make_accelerator
from lazyorpo_lib.orpo.trainer import OrpoTrainer
from lazyorpo_lib.plan import cards
from lazyorpo_lib.settings import Settings
from tests.benchmarks.worker import SHAPES as BENCHMARKED

CUDA = torch.cuda.is_available()
DEVICE = "cuda:0" if CUDA else "cpu"
HALF = torch.float16 if CUDA and torch.cuda.get_device_capability()[0] < 8 else torch.bfloat16
GIB = 2**30
SHAPES = BENCHMARKED | {
    "smollm2-135m": dict(
        model_type="llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "qwen2.5-1.5b": dict(
        model_type="qwen2",
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    ),
    "gemma-2-2b": dict(
        model_type="gemma2",
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256000,
        max_position_embeddings=8192,
    ),
    "mixtral-8x7b": dict(
        model_type="mixtral",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        num_local_experts=8,
        max_position_embeddings=32768,
    ),
}
TINY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


class Skip(Exception):
    """Why a part cannot be run on this machine."""


def check(
    what: str, measured, low=None, high=None, *, unit: str = "", ok: bool | None = None, expected: str = ""
) -> dict:
    """One figure and what is expected of it; NaN is never within limits. Without limits and `ok` it is only
    told.

    Args:
        ok, expected: the verdict and its reason, where limits do not say them.
    """
    limits = {name: value for name, value in (("low", low), ("high", high)) if value is not None}
    if limits:
        ok = bool((low is None or measured >= low) and (high is None or measured <= high))
    if isinstance(measured, float) and measured - measured != 0:
        measured = str(measured)  # JSON has no NaN
    told = {"expected": expected} if expected else {}
    return {"what": what, "measured": measured, "ok": ok, "unit": unit} | limits | told


def same(what: str, measured, expected) -> dict:
    """That something is exactly as expected."""
    plain = isinstance(measured, int | float | str)
    return check(what, measured if plain else str(measured), ok=measured == expected, expected=str(expected))


# Models and pairs.


def config(name: str, small: bool = False, **changes):
    shape = dict(SHAPES[name])
    shape |= {key: value for key, value in TINY.items() if small and key in shape} | changes
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def build(config, dtype, device: str = DEVICE, seed: int = 0):
    """Random weights of a shape, made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype
        )  # a scorer writes its layout there


def build_four_bit(config, dtype):
    """The same in NF4, layer by layer, so that the whole in 16 bit is never there."""
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device(DEVICE), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is torch.nn.Linear and layer is not head:
                made = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    dtype,
                    True,
                    "nf4",
                    device="meta",
                )
                weight = torch.empty(layer.weight.shape, dtype=dtype, device=DEVICE).normal_(0, 0.02)
                made.weight = Params4bit(
                    weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
                ).to(DEVICE)
                setattr(module, name, made)
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.is_meta:
                made = torch.empty(weight.shape, dtype=dtype, device=DEVICE)
                made = made.normal_(0, 0.02) if weight.dim() > 1 else made.fill_(1.0)
                setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    model.is_loaded_in_4bit = True
    return model


def lora(model, **settings):
    """With adapters whose second factor is not zero, so that every gradient is there from the first step."""
    torch.manual_seed(0)
    model = models.add_adapters(model, Settings(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.01)
    return model


def lengths(
    count: int, *, longest: int = 2048, prompt: int = 10**6, shrink: int = 1
) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) of real pairs, prompts cut, pairs of more than `longest` tokens left out,
    again and again."""
    rows = json.loads(Path(__file__).parents[1].joinpath("lengths.json").read_text())
    rows = [(min(p, prompt), c, r) for p, c, r in rows if min(p, prompt) + max(c, r) <= longest]
    rows = [tuple(max(1, n // shrink) for n in row) for row in rows]
    return [rows[i % len(rows)] for i in range(count)]


def pairs_of(triples, vocabulary: int, seed: int = 0) -> list[EncodedPair]:
    """Random tokens in the lengths of `triples`."""
    rng = random.Random(seed)
    return [
        EncodedPair(i, *([rng.randrange(5, vocabulary) for _ in range(n)] for n in triple))
        for i, triple in enumerate(triples)
    ]


# Training.


def trainer_of(
    model, pairs, folder, *, dtype, tokens=10**6, layers=0, rows=None, watchers=(), resume=None, **settings
) -> OrpoTrainer:
    """A trainer on this machine's device, ready to take its steps.

    Args:
        rows: gets those of the history. watchers: called with the number of each step that was taken.
        resume: a checkpoint to go on from.
    """
    quiet = dict(
        method="lora",
        save_every_steps=0,
        eval_pairs=0,
        pairs_per_step=4,
        learning_rate=1e-3,
        lr_schedule="constant",
    )
    settings = Settings(**(quiet | settings))
    if settings.liger_kernel:
        models.apply_liger(model)
    if not getattr(model, "is_loaded_in_4bit", False):  # which is there already
        model.to(DEVICE)
    device, folder = DEVICE.split(":")[0], Path(folder)

    def on_step(step: int) -> None:
        for watcher in watchers:
            watcher(step)

    trainer = OrpoTrainer(
        model,
        settings,
        pairs,
        accelerator=make_accelerator(settings, dtype=dtype, device=device, folder=folder),
        folder=folder,
        tokens_per_batch=tokens,
        checkpointed_layers=layers,
        make_scorer=lambda whole: PairScorer(models.causal_lm(whole)),
        on_row=(rows if rows is not None else []).append,
        on_step=on_step,
    )
    trainer.prepare(resume)
    return trainer


def trained(model) -> dict[str, torch.Tensor]:
    """The weights that training changes, copied to the host."""
    return {n: p.detach().float().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def difference(some, truth) -> float:
    """Relative, of tensors or of dicts of them; NaN where anything is."""
    if isinstance(truth, dict):
        assert some.keys() == truth.keys()
        some, truth = (torch.cat([x[k].flatten().double().cpu() for k in truth]) for x in (some, truth))
    some, truth = some.double().cpu(), truth.double().cpu()
    return ((some - truth).norm() / truth.norm()).item()


def largest(values) -> float:
    """Of some numbers; NaN where one is."""
    return torch.tensor([float(x) for x in values], dtype=torch.float64).max().item()


class Clock:
    """Seconds a step, from the end of step `first` to the end of step `last`."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.times = first, last, []

    def __call__(self, step: int) -> None:
        if step in (self.first, self.last):
            synchronize()
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return (self.times[1] - self.times[0]) / (self.last - self.first)


# The card.


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(function, repeats: int = 10) -> float:
    """Of one call, by CUDA's events where there is a card."""
    for _ in range(2):
        function()
    synchronize()
    if not CUDA:
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        return 1e3 * (time.perf_counter() - began) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def clean() -> None:
    """Nothing left of what was dropped, and peaks from here on."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def cap(gib: float) -> None:
    """No more of the card's memory than this for the rest of the process."""
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, gib * GIB / torch.cuda.get_device_properties(0).total_memory)
        )


@contextlib.contextmanager
def as_t4():
    """This card as a T4 has it: no bfloat16, no flash attention. For what is right and what fits, never for
    speed."""
    if not CUDA:
        yield
        return
    kernels = {name: kernel for name, kernel in attention.KERNELS.items() if name != "flash"}
    with (
        patch.object(torch.cuda, "get_device_capability", lambda device=None: (7, 5)),
        patch.multiple(attention, KERNELS=kernels, _verdicts={}),
        sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    ):
        yield


def this_card() -> cards.Card | None:
    """The machine's card in CARDS, as the planner finds it."""
    here = this_machine()
    return cards.listed(here.name, here.memory_gib) if CUDA else None
