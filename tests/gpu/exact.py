"""Parts 1 to 9 and 15 of tests.gpu: is it right, and does it hold."""

import contextlib
import copy
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lazyorpo_lib import model as models
from lazyorpo_lib import run as runs
from lazyorpo_lib.demo.model import TINY_MODEL
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.fast import layouts
from lazyorpo_lib.fast.attention import RowAttention
from lazyorpo_lib.fast.lora import replace_forwards
from lazyorpo_lib.machine import this_machine
from lazyorpo_lib.orpo.batching import EncodedPair, collate
from lazyorpo_lib.orpo.body import checkpoint_layers
from lazyorpo_lib.orpo.loss import metrics
from lazyorpo_lib.orpo.processes import make_accelerator
from lazyorpo_lib.orpo.trainer import OrpoTrainer
from lazyorpo_lib.plan import planner
from lazyorpo_lib.results import evaluate
from lazyorpo_lib.settings import Settings, resolve

from .bench import (
    CUDA,
    DEVICE,
    GIB,
    HALF,
    TINY,
    as_t4,
    build,
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
    this_card,
    trained,
    trainer_of,
)

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
if not CUDA:
    del HALVES["float16"]  # accelerate scales its loss on a card alone
elif HALF == torch.float16:
    del HALVES["bfloat16"]  # only emulated


# 1: the plan


def plan(small: bool):
    """Every shape on every card, on this torch."""
    names = ("llama-3-8b", "qwen2.5-1.5b", "phi-2", "gemma-7b", "gemma-2-2b", "mixtral-8x7b")
    known = planner.measured_lengths(pairs_of(lengths(300, longest=1024), 500))
    for name in names[1:2] if small else names:
        shape, cards = config(name), ["T4", "H100"] if small else []
        plans = [planner.make_plan(shape, Settings(), where, known) for where in (*cards, this_machine())]
        plans += [] if small else planner.plan_cards(shape, Settings(), known)
        yield check(f"{name}: plans", len(plans))
        yield same(f"{name}: stood in for", sum("cannot be simulated" in p.why for p in plans), 0)
    if CUDA:
        card = this_card()
        yield check(
            "this card in the planner's table",
            card.name if card else "none",
            ok=card is not None,
            expected="a card",
        )


# 2: attention


class _Operations(TorchDispatchMode):
    """The attention operations of torch that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "attention" in name or "attn" in name:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def _row(triples):
    """A batch whose tokens say what they are: 3 i prompt of pair i, 3 i + 1 chosen, 3 i + 2 rejected."""
    return collate(
        [EncodedPair(i, *([3 * i + side] * n for side, n in enumerate(t))) for i, t in enumerate(triples)]
    )


def _allowed(batch, window: int | None):
    """Who may see whom, (N, N), from the tokens and positions alone: whatever the order of the row."""
    pair, side, position = batch.input_ids[0] // 3, batch.input_ids[0] % 3, batch.position_ids[0]
    sees = (pair[:, None] == pair) & ((side == 0) | (side[:, None] == side)) & (position <= position[:, None])
    return sees & (position[:, None] - position < window) if window else sees


def _dense(q, k, v, allowed):
    """Plain attention under a mask; (1, N, heads, head_dim)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _with_gradients(function, inputs, grad):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return dict(
        zip("oqkv", [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))], strict=True)
    )


def _inputs(heads: int, few: int, size: int, n: int, dtype):
    torch.manual_seed(0)
    return [torch.randn(1, h, n, size, device=DEVICE).to(dtype) for h in (heads, few, few)] + [
        torch.randn(1, n, heads, size, device=DEVICE).to(dtype)
    ]


def _attention_error(shape, triples, window, dtype, seen) -> float:
    """The largest of output's and gradients' relative differences from float64; `seen` gets the operations it
    took."""
    batch = _row(triples).to(DEVICE)
    *inputs, grad = _inputs(*shape, batch.input_ids.shape[1], dtype)

    attention = RowAttention()

    def ours(q, k, v):
        return attention(None, q, k, v, None, sliding_window=window)[0]

    with attention.over(batch):
        some = _with_gradients(ours, inputs, grad)
        with _Operations() as operations:  # the second time, when no kernel is tried against another any more
            ours(*inputs)
    seen |= operations.names
    allowed = _allowed(batch, window)
    truth = _with_gradients(lambda q, k, v: _dense(q, k, v, allowed), [x.double() for x in inputs], grad)
    return largest(difference(some[name], truth[name]) for name in truth)


def kernel(small: bool):
    """The kit's attention on shared rows against plain attention in float64; then how fast it is."""
    shapes = [(4, 4, 16), (4, 2, 16)] if small else [(32, 32, 80), (32, 8, 128), (12, 2, 128), (8, 1, 256)]
    rows = [[(5, 1, 1)], [(600, 700, 300)], [(40, 1, 90), (1, 200, 1), *lengths(7, longest=400)]]
    if small:
        rows = [rows[0], [(9, 7, 30)], [(8, 1, 9), (1, 20, 1), *lengths(7, longest=400, shrink=8)]]
    cases = list(itertools.product(shapes, rows, (None, 10 if small else 100)))
    half = {torch.bfloat16: 1e-2, torch.float16: 2e-3} if HALF == torch.bfloat16 else {torch.float16: 2e-3}
    ways = [("natively", half | {torch.float32: 2e-6})]
    ways += [("as a T4", {torch.float16: 2e-3, torch.float32: 2e-6})] * (CUDA and HALF == torch.bfloat16)
    for way, limits in ways:
        for dtype, most in limits.items():
            seen, name = set(), f"{str(dtype).removeprefix('torch.')} {way}"
            with as_t4() if way == "as a T4" else contextlib.nullcontext():
                errors = [_attention_error(*case, dtype, seen) for case in cases]
            yield check(f"{name}, relative difference", largest(errors), high=most)
            paths = ", ".join(sorted(seen)) or "plain operations"
            flash = way == "natively" and HALF == torch.bfloat16 and dtype != torch.float32
            wanted = "_flash_attention_forward" if flash else "_efficient_attention_forward"
            yield check(
                f"{name}, path", paths, ok=seen == {wanted} if CUDA else None, expected=wanted if CUDA else ""
            )
    if CUDA and HALF == torch.bfloat16:
        yield from _speed()


def _speed():
    """Eight pairs of 900 tokens, forward and backward: the row's kernel, a call for every answer, a dense
    mask."""
    triples = [(300, 300, 300)] * 8
    batch = _row(triples).to(DEVICE)
    *inputs, grad = _inputs(32, 8, 128, batch.input_ids.shape[1], HALF)
    mask, options, attention = _allowed(batch, None), dict(enable_gqa=True), RowAttention()

    ways = {
        "the row's kernel": lambda q, k, v: attention(None, q, k, v, None)[0],
        "a call for every answer": lambda q, k, v: attention.by_pairs(attention.row, q, k, v),
        "dense mask": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, **options
        ).transpose(1, 2),
    }
    with attention.over(batch):
        times = {
            name: milliseconds(lambda way=way: _with_gradients(way, inputs, grad))
            for name, way in ways.items()
        }
    for name, ms in times.items():
        yield check(f"8 x 900 tokens: {name}", ms, unit="ms")
    first, second, _ = times.values()
    yield check("the row's kernel against a call for every answer", first / second, high=0.6)


# 3: the step


ARCHITECTURES = ("llama", "qwen2", "phi", "gemma", "gemma3_text", "mixtral")


def _small_model(kind: str, layers: int = 4):
    from transformers import AutoConfig

    shape = TINY | dict(
        hidden_size=256,
        head_dim=64,
        intermediate_size=384,
        num_hidden_layers=layers,
        pad_token_id=0,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    if kind == "gemma3_text":
        shape |= dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * (layers // 2))
    model = build(AutoConfig.for_model(kind, **shape), torch.float32, "cpu")
    with torch.no_grad():  # larger than the usual start, so that a wrong mask shows
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.05)
    return model


def _copied(model, method: str, dtype, **settings):
    """A copy; frozen weights in `dtype`, trained ones in float32."""
    model = copy.deepcopy(model)
    if method == "lora":
        model = lora(model, **settings)
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    return model


def _scale(trainer) -> float:
    """Sets float16's scale to where no model of this size overflows by itself."""
    if trainer.accelerator.scaler is None:
        return 1.0
    trainer.accelerator.scaler.scale(torch.zeros(1, device=DEVICE))  # it has none before its first use
    trainer.accelerator.scaler.update(1024.0)
    return 1024.0


def _step(trainer, pairs) -> tuple[torch.Tensor, dict]:
    """Loss and gradients of one step, on the host; float16's scale taken off again."""
    trainer.model.zero_grad()
    scale, settings = _scale(trainer), trainer.settings
    sums = trainer._gradient(pairs).tolist()
    loss = torch.tensor(metrics(sums[:-2], settings.or_weight, settings.objective)["loss"])
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss, {name: gradient.float().cpu() / scale for name, gradient in gradients.items()}


def _worst(some: dict, truth: dict) -> float:
    """Of any tensor's gradient; the small ones are held against a hundredth of the whole."""
    floor = 1e-2 * torch.cat([x.flatten() for x in truth.values()]).norm()
    return largest((some[n] - x).norm() / max(x.norm(), floor) for n, x in truth.items())


def equal(small: bool):
    """Loss and gradients of a step on the card against float32 on the CPU, however it is computed."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    kinds = ("llama", "gemma3_text") if small else ARCHITECTURES
    ways = list(itertools.product(("lora", "full"), ("answer", "prompt+answer")))[:: 3 if small else 1]
    pairs = pairs_of(lengths(8, longest=400, shrink=4), TINY["vocab_size"])
    most = sum(p.tokens() for p in pairs)
    for kind in kinds:
        base, errors, rungs = _small_model(kind, 2 if small else 4), {}, set()
        for method, nll_over in ways:
            for text, error in _against_cpu(base, kind, method, nll_over, pairs, most, rungs):
                errors.setdefault(text, []).append(error)
        for text, several in errors.items():
            limits = {
                "1 - cosine": 1e-3,
                "split to split": 1e-5,
                "float32": 1e-4,
                "bfloat16": 5e-2,
                "float16": 1e-2,
            }
            yield check(
                f"{kind}, {text}",
                largest(several),
                high=next(x for name, x in limits.items() if name in text),
            )
        yield same(f"{kind}, layouts", ", ".join(sorted(rungs)), "shared")


def _against_cpu(base, kind, method, nll_over, pairs, most, rungs):
    """(what, relative difference) of every dtype, number of micro-batches and of checkpointed layers."""
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(method=method, nll_over=nll_over, pairs_per_step=8)
        truth = _cpu_step(base, method, pairs, folder, settings)
        # Two of four experts are other ones after rounding, which no bound on the rounding tells from an
        # error.
        halves = {} if kind == "mixtral" else HALVES
        for name, dtype in ({"float32": torch.float32} | halves).items():
            trainer = trainer_of(_copied(base, method, dtype), pairs, folder, dtype=dtype, **settings)
            if (
                CUDA or name == "float32"
            ):  # on a CPU short pairs are computed better in bfloat16 than the truth they are held against
                rungs.add(
                    " ".join(
                        [
                            trainer.scorer.rung,
                            *(f"({name}: {why})" for why in trainer.scorer.refused.values()),
                        ]
                    )
                )
            loss, grads = _step(trainer, pairs)
            yield f"loss, {name}", difference(loss, truth[0])
            yield f"gradients, {name}", difference(grads, truth[1])
            if name == "bfloat16":
                flat = [torch.cat([x.flatten() for x in g.values()]) for g in (grads, truth[1])]
                yield "bfloat16, 1 - cosine", 1 - F.cosine_similarity(*flat, dim=0).item()
            if name == "float32":
                yield "any tensor's gradient, float32", _worst(grads, truth[1])
                for tokens, layers in itertools.product((most, most // 3), (0, 99)):
                    trainer.tokens_per_batch = tokens
                    checkpoint_layers(trainer.model, layers)
                    yield "split to split", difference(_step(trainer, pairs)[1], grads)


def _cpu_step(base, method, pairs, folder, settings):
    """The truth, without the kit's row: two padded rows a pair, on the CPU."""
    given = Settings(save_every_steps=0, eval_pairs=0, **settings)
    accelerator = make_accelerator(given, dtype=torch.float32, device="cpu", folder=Path(folder))
    with patch.object(layouts, "LADDER", layouts.LADDER[-1:]):
        trainer = OrpoTrainer(
            _copied(base, method, torch.float32),
            given,
            pairs,
            accelerator=accelerator,
            folder=Path(folder),
            tokens_per_batch=10**6,
            make_scorer=lambda whole: layouts.PairScorer(models.causal_lm(whole)),
        )
    return _step(trainer, pairs)


# 4: float16


class _Struck:
    """Stands before `accelerator.backward`: of step `step` each loss is 1e8 times as large."""

    def __init__(self, trainer, step: int):
        self.trainer, self.step, self.backward = trainer, step, trainer.accelerator.backward

    def __call__(self, loss, **kwargs):
        self.backward(loss * (1e8 if self.trainer.step + 1 == self.step else 1.0), **kwargs)


def _watched(trainer):
    """Trains; for every step, whether the weights changed, and the scaler's scale after it."""
    changed, scales, before = [], [], [trained(trainer.model)]

    def watch(step: int) -> None:
        now = trained(trainer.model)
        changed.append(any(not torch.equal(now[n], before[0][n]) for n in now))
        before[0] = now
        scaler = trainer.accelerator.scaler
        scales.append(scaler.get_scale() if scaler else 1.0)

    trainer.on_step = watch
    trainer.train()
    return changed, scales


def fp16(small: bool):
    """Thirty steps in 16 bit as a T4 takes them; overflow, a pair that is NaN and a model that is."""
    half, steps = (torch.float16 if CUDA else torch.bfloat16), 6 if small else 30
    base = build(
        config(
            "smollm2-135m",
            small,
            num_hidden_layers=2 if small else 8,
            vocab_size=TINY["vocab_size"],
            tie_word_embeddings=False,
        ),
        torch.float32,
    )
    pairs = pairs_of(lengths(steps * 4, longest=600, shrink=8 if small else 1), TINY["vocab_size"] - 1)
    with tempfile.TemporaryDirectory() as folder, as_t4(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = []
        for dtype in (torch.float32, half):
            rows = []
            model = _copied(base, "lora", dtype)
            trainer_of(
                model, pairs, folder, dtype=dtype, rows=rows, max_steps=steps, learning_rate=2e-4
            ).train()
            losses.append(torch.tensor([row["loss"] for row in rows]))
        apart = largest((losses[1] - losses[0]).abs() / losses[0])
        yield check(
            f"loss of {steps} steps in {str(half).removeprefix('torch.')} against float32", apart, high=0.02
        )
        yield from _strikes(base, pairs, folder, half)
        with torch.no_grad():
            broken = _copied(base, "lora", half)
            broken.get_input_embeddings().weight.fill_(torch.nan)
        yield _said("a model that is NaN", lambda: trainer_of(broken, pairs, folder, dtype=half))


def _strikes(base, pairs, folder, half):
    """Twelve steps, the fourth with an overflow (float16 alone has one), one with a pair that is NaN."""
    bad = len(pairs) - 1
    pairs = [
        *pairs[:47],
        pairs[bad]._replace(index=bad, prompt=[TINY["vocab_size"] - 1, *pairs[bad].prompt]),
    ][:48]
    model = _copied(base, "lora", half)
    trainer = trainer_of(model, pairs, folder, dtype=half, epochs=1.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = torch.nan  # of the token that this pair alone has
    _scale(trainer)
    if CUDA:
        trainer.accelerator.backward = _Struck(trainer, 4)
    changed, scales = _watched(trainer)
    order = [[pairs[i].index for i in step] for step in trainer.order.steps(0)]
    expected = sorted({next(k for k, rows in enumerate(order, 1) if bad in rows)} | ({4} if CUDA else set()))
    yield same("steps skipped", [k for k, moved in enumerate(changed, 1) if not moved], expected)
    yield same("dataset rows named", [bad in step["rows"] for step in trainer.bad_steps], [True])
    if CUDA:
        yield same("scale after the overflow, of the one before", scales[3] / scales[2], 0.5)


def _said(what: str, act) -> dict:
    """That something ends in one sentence for its user."""
    try:
        act()
    except UserError as error:
        text = str(error)
        return check(what, text, ok=text.endswith(".") and "\n" not in text, expected="one sentence")
    except Exception as error:
        return check(what, f"{type(error).__name__}: {str(error)[:150]}", ok=False, expected="one sentence")
    return check(what, "nothing was said", ok=False, expected="one sentence")


# 5: four bits


def qlora(small: bool):
    """From a file in 16 bit to 4 bit on the card: memory, fused layers against PEFT's, training, merging."""
    shape = config(
        "llama-3-8b", small, num_hidden_layers=2 if small else 8, **(dict(hidden_size=256) if small else {})
    )
    with tempfile.TemporaryDirectory() as folder:
        stored = build(shape, torch.bfloat16)
        stored.save_pretrained(f"{folder}/base", max_shard_size="2GB")
        models.load_tokenizer(TINY_MODEL).save_pretrained(f"{folder}/base")
        del stored
        clean()
        settings = Settings(base_model=f"{folder}/base", method="qlora")
        yield from _loading(settings, shape, Path(folder, "base"))
        for name, dtype in HALVES.items():
            model = models.load_for_training(settings, method="qlora", dtype=dtype, device=DEVICE)
            most = {"bfloat16": 1e-2, "float16": 3e-3}[name]
            yield check(f"fused layers against PEFT's, {name}", _fused_against_peft(model, dtype), high=most)
        rows, pairs = [], pairs_of(lengths(4, longest=512, shrink=8 if small else 1), shape.vocab_size)
        trainer = trainer_of(model, pairs, folder, dtype=dtype, rows=rows, method="qlora", max_steps=20)
        trainer.train()
        yield check("loss after 20 steps, of the first", rows[-1]["loss"] / rows[0]["loss"], high=0.99)
        yield check(
            "merged against with its adapter", _merged(model, settings, Path(folder, "model")), high=1e-2
        )


def _loading(settings, shape, folder):
    """What the host and the card hold while and after loading."""
    if not CUDA:
        return
    torch.zeros(1, device=DEVICE)
    process, resident = psutil.Process(), []
    before, done = process.memory_info().rss, threading.Event()

    def watch():
        while not done.wait(0.01):
            resident.append(process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    model = models.load_for_training(settings, method="qlora", dtype=HALF, device=DEVICE)
    done.set()
    watching.join()
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    yield check("host memory while loading, of the largest file", (max(resident) - before) / shard, high=1.2)
    known = planner.measured_lengths(pairs_of([(300, 300, 300)], 500))
    plan = next(
        m for m in planner.make_plan(shape, settings, this_machine(), known).methods if m.method == "qlora"
    )
    adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    planned = plan.parts["weights"] * GIB + adapters
    yield check("weights as planned", planned / torch.cuda.memory_allocated(), 0.97, 1.03)
    yield check(
        "card while loading, of the planned weights", torch.cuda.max_memory_allocated() / planned, high=1.15
    )
    del model
    clean()


def _fused_against_peft(model, dtype) -> float:
    """Relative difference of the adapters' gradients and of the logits, the larger."""
    ids = torch.randint(5, 250, (1, 200), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.01)
    results = []
    for own in (False, True):
        if own:  # PEFT's forward again, under the one that `replace_forwards` set on the instance
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    vars(module).pop("forward", None)
        with torch.autocast(DEVICE.split(":")[0], dtype):
            logits = model(ids, use_cache=False).logits
        (torch.log_softmax(logits.float(), -1)[0, :-1].gather(1, ids[0, 1:, None]).sum()).backward()
        results.append(
            (logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
        model.zero_grad(set_to_none=True)
    replace_forwards(model)
    return largest(difference(*(r[k] for r in results)) for k in (0, 1))


def _merged(model, settings, folder) -> float:
    """Relative difference of the logits of the saved model, merged and not; both in 16 bit."""
    tokenizer = models.load_tokenizer(settings.base_model)
    models.save_model(model, tokenizer, folder, base_model=settings.base_model)
    ids = torch.arange(5, 105, device=DEVICE)[None]
    logits = []
    for merge in (True, False):
        finished, _ = models.load_finished(folder, dtype=torch.bfloat16, device=DEVICE, merge=merge)
        with torch.no_grad():
            logits.append(finished(ids, use_cache=False).logits.float())
        del finished
        clean()
    return difference(*logits)


# 6: going on


def _run(base, pairs, folder, dtype, resume=None, **settings):
    """Twelve steps with dropout and checkpointed layers, saved at the fifth and tenth; the weights and the
    trainer."""
    model = _copied(base, "lora", dtype, lora_dropout=0.1)
    trainer = trainer_of(
        model,
        pairs,
        folder,
        dtype=dtype,
        layers=1,
        max_steps=12,
        save_every_steps=5,
        keep_checkpoints=3,
        resume=resume,
        **settings,
    )
    trainer.train()
    return trained(model), trainer


def resume(small: bool):
    """A run that goes on from step 5 against one that was never interrupted."""
    dtype = HALF if CUDA else torch.float32
    shape = config("smollm2-135m", small, num_hidden_layers=2 if small else 6, vocab_size=TINY["vocab_size"])
    base, pairs = (
        build(shape, torch.float32),
        pairs_of(lengths(48, longest=400, shrink=8 if small else 1), TINY["vocab_size"]),
    )
    optimizers = ("adamw", "adamw_8bit", "paged_adamw_32bit") if CUDA and _has("bitsandbytes") else ("adamw",)
    for exact, optimizer in [(True, name) for name in optimizers] + [(False, "adamw")]:
        torch.use_deterministic_algorithms(exact, warn_only=True)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole, _ = _run(base, pairs, f"{folder}/a", dtype, optimizer=optimizer)
            again, trainer = _run(
                base, pairs, f"{folder}/b", dtype, Path(folder, "a", "checkpoint-5"), optimizer=optimizer
            )
            apart = largest((whole[n] - again[n]).abs().max() for n in whole)
            if exact:
                yield same(f"{optimizer}, deterministic: largest difference of a weight", apart, 0.0)
            else:
                other, _ = _run(base, pairs, f"{folder}/c", dtype, optimizer=optimizer)
                noise = largest((whole[n] - other[n]).abs().max() for n in whole)
                yield check(f"{optimizer}: largest difference of a weight", apart, high=3 * noise)
            if optimizer.startswith("paged"):  # some 2 MB of managed memory: no card is harmed by so little
                states = [s["state1"] for s in trainer.optimizer.state.values() if s["state1"].numel() >= 1e5]
                yield same(
                    "paged state after going on", {getattr(s, "is_paged", False) for s in states}, {True}
                )
    torch.use_deterministic_algorithms(False)


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


# 7: out of memory


def oom(small: bool):
    """Ten times too large a budget under a cap of 4 GiB; a pair that cannot fit; answers and evaluation."""
    shape = config("smollm2-135m", small)
    pairs = pairs_of(lengths(256, longest=1024), shape.vocab_size)
    settings = dict(max_steps=8, pairs_per_step=32, learning_rate=1e-4)

    def run(folder, tokens):
        model = lora(build(shape, HALF))
        trainer = trainer_of(model, pairs, folder, dtype=HALF, tokens=tokens, layers=0, **settings)
        return trainer, model

    with tempfile.TemporaryDirectory() as folder:
        trainer, model = run(folder, 3000)
        trainer.train()
        truth = trained(model)
        del trainer, model
        clean()
        cap(4.0)
        trainer, model = run(folder, 30_000)
        left = _left_by_failures(trainer)
        yield check(
            "weights after 8 steps against those without a cap", difference(trained(model), truth), high=1e-3
        )
        yield check("notes of less memory", len(trainer.oom_notes), low=1)
        yield check("left allocated by a failed try", max(left, default=0.0), high=1.0, unit="MiB")
        yield from _capped_looks(trainer, model)
        long = pairs_of([(20_000, 20_000, 20_000)], shape.vocab_size)[0]
        yield _said("a pair that cannot fit", lambda: trainer._gradient([long]))


def _left_by_failures(trainer) -> list[float]:
    """Trains; MiB that each failed try left allocated above what its step began with. The trainer warns after
    each."""
    begun, left, gradient = [0], [], trainer._gradient

    def begin(pairs):
        begun[0] = torch.cuda.memory_allocated()
        return gradient(pairs)

    def warned(message, *args, **kwargs):
        if "out of memory" in str(message):
            left.append(abs(torch.cuda.memory_allocated() - begun[0]) / 2**20)

    trainer._gradient = begin
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = warned
        trainer.train()
    return left


def _capped_looks(trainer, model):
    """An evaluation in one batch and the answers to long prompts, neither of which fits under the cap."""
    trainer.tokens_per_batch = 10**6
    some = pairs_of(lengths(200, longest=1024), model.config.vocab_size, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield same("pairs evaluated under the cap", trainer.pair_tables(some).isfinite().all().item(), True)
        tokenizer = models.load_tokenizer(TINY_MODEL)
        prompts = [[7 + i % 200] * 4000 for i in range(64)]
        texts = evaluate.answers(model, tokenizer, prompts, max_tokens=4, end_ids=[2])
        yield same("answers under the cap", len(texts), 64)


# 8: two runs


def twice(small: bool):
    """Whole runs in one process, a cell that failed between them: what is alive when the next model is
    loaded."""
    ways = (
        [dict(method="lora")]
        if small
        else [
            dict(method="lora"),
            dict(method="full", optimizer="adamw"),
            dict(method="full", optimizer="adamw_8bit"),
        ]
    )
    alive, seen, load = [], [], models.load_for_training

    def loading(*args, **kwargs):
        alive.append(
            (
                sum(model() is not None for model in seen),
                torch.cuda.memory_allocated() / 2**20 if CUDA else 0.0,
            )
        )
        return load(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder, patch.object(models, "load_for_training", loading):
        base = TINY_MODEL if small else f"{folder}/base"
        if not small:
            build(config("smollm2-135m", vocab_size=512), torch.float32).save_pretrained(base)
            models.load_tokenizer(TINY_MODEL).save_pretrained(base)
        for k, way in enumerate(way for way in ways for _ in range(2)):
            given = (
                dict(
                    preset="tiny",
                    base_model=base,
                    output_dir=f"{folder}/{k}",
                    max_steps=2,
                    eval_pairs=2,
                    answers=0,
                )
                | way
            )
            run = runs.execute(*resolve([("flag", given)])[:2], show=lambda text: None)
            seen.append(weakref.ref(run.model))
            _failed_cell(run)
            del run
        peaks = [
            json.loads(Path(folder, str(k), "summary.json").read_text())["planned_against_measured"][
                "peak_gib"
            ][1]
            for k in range(2 * len(ways))
        ]
    yield same("models of earlier runs that are alive at the next load", max(n for n, _ in alive), 0)
    if CUDA:
        yield check("memory at the next load", max(mib for _, mib in alive), high=10.0, unit="MiB")
    for way, first, second in zip(ways, peaks[::2], peaks[1::2], strict=True):
        limits = (0.98, 1.02) if CUDA else (None, None)  # the host's memory has a history
        yield check(
            f"{'+'.join(way.values())}: second peak, of the first", second / max(first, 1e-9), *limits
        )


def _failed_cell(run) -> None:
    """As IPython leaves it: the frames of the failed cell, and what these hold, stay within reach."""

    def cell(run):
        return run.there_is_no_such_stage

    try:
        cell(run)
    except AttributeError as error:
        sys.last_exc = sys.last_value = error
        sys.last_type, sys.last_traceback = type(error), error.__traceback__


# 9: several runs


PROBE = """
import sys
from lazyorpo_lib.settings import resolve
from lazyorpo_lib.trials.probe import probe
from lazyorpo_lib.trials.recipes import compare_recipes
if __name__ == "__main__":
    settings = resolve([("flag", dict(preset="tiny", output_dir=sys.argv[1], max_steps=2, eval_pairs=8))])[0]
    probe(settings, steps=2) if sys.argv[2] == "probe" else compare_recipes(settings, seeds=1)
"""


def probe(small: bool):
    """`--probe` and the comparison of recipes: runs that are started from a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        ways = (
            {"probe": ["-c", PROBE, f"{folder}/a", "probe"]}
            if small
            else {
                "--probe": [
                    "-m",
                    "lazyorpo_lib",
                    "--preset",
                    "tiny",
                    "--probe",
                    "--output-dir",
                    f"{folder}/a",
                ],
                "compare_recipes": ["-c", PROBE, f"{folder}/b", "compare"],
            }
        )
        for name, command in ways.items():
            done = subprocess.run([sys.executable, *command], stderr=subprocess.PIPE, text=True)
            said = f": {(done.stderr.strip().splitlines() or [''])[-1]}" if done.returncode else ""
            yield same(f"{name}: exit status", f"{done.returncode}{said}", "0")


# 15: answers


def answers(small: bool):
    """Prompts answered together and one by one: the same texts."""
    tokenizer = models.load_tokenizer(TINY_MODEL)
    base = build(
        config("smollm2-135m", small, num_hidden_layers=2 if small else 8, vocab_size=len(tokenizer)),
        torch.float32,
    )
    with torch.no_grad():  # larger than the usual start: fewer near ties between the next tokens
        for weight in base.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    count, tokens = (8, 8) if small else (56, 32)
    prompts = [p.prompt for p in pairs_of(lengths(count, longest=600, shrink=4), len(tokenizer))]
    for dtype, least in ((torch.float32, 1.0), (torch.bfloat16, 0.9)):
        model = copy.deepcopy(base).to(dtype)
        began = time.perf_counter()
        together = evaluate.answers(model, tokenizer, prompts, max_tokens=tokens, end_ids=[2])
        seconds = time.perf_counter() - began
        alone = [evaluate.answers(model, tokenizer, [p], max_tokens=tokens, end_ids=[2])[0] for p in prompts]
        name = str(dtype).removeprefix("torch.")
        yield check(
            f"{name}: texts equal",
            sum(a == b for a, b in zip(together, alone, strict=True)) / count,
            low=least,
        )
        yield check(f"{name}: different texts among them", len(set(together)) / count, low=0.2)
        yield check(f"{name}: tokens a second", count * tokens / seconds)
