"""One system training in a process of its own, a step at a time when told to over stdin.

`python -m tests.benchmarks.worker '{"system": "lazyorpo", …}'`; started by `python -m tests.benchmarks`.
Figures go out as JSON lines.
"""

import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from lazyorpo_lib import model
from lazyorpo_lib.demo.model import DEMO_MODEL
from lazyorpo_lib.fast.attention import RowAttention
from lazyorpo_lib.fast.layouts import PairScorer
from lazyorpo_lib.orpo.batching import EncodedPair, StepOrder, collate
from lazyorpo_lib.orpo.data import clean
from lazyorpo_lib.orpo.encoding import Encoder, prepare_tokenizer
from lazyorpo_lib.orpo.processes import make_accelerator
from lazyorpo_lib.orpo.trainer import OrpoTrainer
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.dataset import open_rows
from lazyorpo_lib.rows.template import Template
from lazyorpo_lib.settings import Settings

# Published shapes, filled with random weights: speed and memory do not depend on their values.
SHAPES = {
    "phi-2": dict(
        model_type="phi",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=51200,
        max_position_embeddings=4096,
        partial_rotary_factor=0.4,
    ),
    "llama-3-8b": dict(
        model_type="llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "gemma-7b": dict(
        model_type="gemma",
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        vocab_size=256000,
        max_position_embeddings=8192,
    ),
}


def encoded_pairs(job: dict) -> list:
    """The first pairs of the dataset that fit, then the order in which the kit would take them; or random
    ones of given lengths."""
    if job["growth"]:
        rng = random.Random(0)
        return [
            EncodedPair(
                i, *([rng.randrange(5, 5000) for _ in range(n // 3 + k * (n % 3))] for k in (1, 0, 0))
            )
            for i, n in enumerate([*sorted(2 * job["growth"]), *job["growth"][-1:] * job["profile"]])
        ]
    tokenizer = model.load_tokenizer(DEMO_MODEL if job["model"] in SHAPES else job["model"])
    prepare_tokenizer(tokenizer)
    encoder = Encoder(
        Template(tokenizer), max_prompt_tokens=job["max_tokens"] - 2, max_tokens=job["max_tokens"]
    )
    cleaned, _ = clean(candidates(open_rows(job["dataset"])))
    pairs = [ids for _, ids in encoder.encode(cleaned) if not isinstance(ids, str)]
    order = [
        i for step in StepOrder([p.tokens() for p in pairs], job["pairs"], seed=0).steps(0) for i in step
    ]
    return [pairs[i] for i in order][
        : job["pairs"] * (1 + job["steps"] + job["profile"])
    ]  # the first step is the warm-up


def base_model(job: dict, device: str):
    dtype = torch.float32 if job["method"] == "full" else getattr(torch, job["precision"])
    if job["model"] not in SHAPES:
        return model.load_base(job["model"], dtype=dtype, device=device, four_bit=job["method"] == "qlora")
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        shape = dict(SHAPES[job["model"]])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        built = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if job["method"] != "qlora":
            return built
        built.save_pretrained(folder)  # 4-bit weights are made while loading
        return model.load_base(folder, dtype=dtype, device=device, four_bit=True)


class Stepwise:
    """Waits for a line before each step and reports after it; after the counted ones comes the profiled one,
    if asked for."""

    def __init__(self, job: dict, model, tokens):
        self.job, self.model, self.tokens, self.profiler = job, model, tokens, None
        self.device = torch.device(job["device"])

    def ready(self) -> None:
        say(ready=True, memory_gib=peak(self.device))

    def begin(self, step: int) -> None:
        sys.stdin.readline()
        if step > self.job["steps"]:
            activities = [
                getattr(ProfilerActivity, name) for name in ("CPU", "CUDA")[: 1 + torch.cuda.is_available()]
            ]
            self.profiler = profile(activities=activities).__enter__()
        self.began = time.perf_counter()

    def end(self, step: int, loss: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        figures = dict(
            loss=loss,
            seconds=time.perf_counter() - self.began,
            memory_gib=peak(self.device),
            tokens=self.tokens(step),
            attention_seconds=0.0,
        )
        if self.profiler:
            self.profiler.__exit__(None, None, None)
            figures["profile"] = shares(self.profiler.key_averages())
        if self.job["growth"]:
            figures["attention_seconds"] = attention_seconds(self.job, self.model, step)
        say(**figures)


class OfTheTrainer(TrainerCallback):
    """A Stepwise in the words of transformers' Trainer."""

    def __init__(self, stepwise: Stepwise):
        self.stepwise = stepwise

    def on_train_begin(self, args, state, control, **kwargs):
        self.stepwise.ready()

    def on_step_begin(self, args, state, control, **kwargs):
        self.stepwise.begin(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.stepwise.end(state.global_step - 1, logs["loss"])


def shares(events, most: int = 12) -> list:
    """[(operation, its share of the time)], the largest first."""
    times = {e.key: e.self_device_time_total or e.self_cpu_time_total for e in events}
    total = sum(times.values())
    return [(name, times[name] / total) for name in sorted(times, key=times.get, reverse=True)[:most]]


def attention_seconds(job: dict, trained, step: int) -> float:
    """What the kit's attention alone takes for this step's row, forward and backward, over all layers."""
    config = trained.config.get_text_config()
    heads, few = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    pair = encoded_pairs(job)[step]
    dtype, times = getattr(torch, job["precision"]), []
    q, k, v = (
        torch.randn(1, h, pair.tokens(), size, dtype=dtype, device=job["device"], requires_grad=True)
        for h in (heads, few, few)
    )
    attention = RowAttention()
    with attention.over(collate([pair]).to(job["device"])):
        for _ in range(4):
            began = time.perf_counter()
            attention(trained, q, k, v, None)[0].sum().backward()
            if job["device"] == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return min(times) * config.num_hidden_layers


def say(**figures) -> None:
    print(json.dumps(figures), file=OUT, flush=True)


def peak(device) -> float:
    """Peak memory so far, GiB: the GPU's as allocated, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def lazyorpo(job: dict, pairs: list, built, folder: str):
    class InOrder(OrpoTrainer):
        """The kit's trainer, its pairs in the order given and its steps when told."""

        def _gradient(self, pairs):
            stepwise.begin(self.step)
            return super()._gradient(pairs)

        def train(self):
            self.prepare()
            some, count = job["pairs"], len(pairs)
            self.order.steps = lambda epoch, first=0: (
                list(range(start, min(start + some, count))) for start in range(first * some, count, some)
            )
            stepwise.ready()
            super().train()

    def tokens(step):
        return sum(p.tokens() for p in pairs[step * job["pairs"] : (step + 1) * job["pairs"]])

    settings, dtype = settings_of(job), getattr(torch, job["precision"])
    stepwise = Stepwise(job, model.causal_lm(built), tokens)
    return InOrder(
        built,
        settings,
        pairs,
        accelerator=make_accelerator(settings, dtype=dtype, device=job["device"], folder=Path(folder)),
        folder=Path(folder),
        tokens_per_batch=job["tokens_per_batch"],
        checkpointed_layers=10**6 if job["checkpointing"] else 0,
        make_scorer=lambda whole: PairScorer(model.causal_lm(whole)),
        on_row=lambda row: stepwise.end(row["step"] - 1, row["loss"]),
    )


def trl(job: dict, pairs: list, built, folder: str):
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class SameTokens(ORPOTrainer):
        """TRL's trainer, given token ids in place of texts."""

        def tokenize_row(self, feature, model=None):
            p = pairs[int(feature["prompt"])]
            row = {"prompt_input_ids": list(p.prompt), "prompt_attention_mask": [1] * len(p.prompt)}
            for side in ("chosen", "rejected"):
                answer = list(getattr(p, side))
                row[f"{side}_input_ids"] = [*p.prompt, *answer]
                row[f"{side}_attention_mask"] = [1] * (len(p.prompt) + len(answer))
                row[f"{side}_labels"] = [-100] * len(p.prompt) + answer
            return row

        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    tokenizer = model.load_tokenizer(DEMO_MODEL if job["model"] in SHAPES else job["model"])
    prepare_tokenizer(tokenizer)
    texts = Dataset.from_list([{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(len(pairs))])
    settings = settings_of(job)
    config = ORPOConfig(
        folder,
        per_device_train_batch_size=job["pairs"],
        max_length=job["max_tokens"] + 1,
        beta=settings.or_weight,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        use_cpu=job["device"] == "cpu",
        disable_tqdm=True,
        bf16=job["precision"] == "bfloat16",
        fp16=job["precision"] == "float16",
        seed=settings.seed,
        gradient_checkpointing=job["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )

    def tokens(step):
        some = pairs[step * job["pairs"] : (step + 1) * job["pairs"]]
        return 2 * len(some) * max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in some)

    told = OfTheTrainer(Stepwise(job, built, tokens))
    return SameTokens(built, config, train_dataset=texts, processing_class=tokenizer, callbacks=[told])


def settings_of(job: dict) -> Settings:
    return Settings(
        method=job["method"],
        pairs_per_step=job["pairs"],
        or_weight=0.25,
        nll_over=job["nll_over"],
        learning_rate=job["learning_rate"],
        max_prompt_tokens=job["max_tokens"] - 2,
        max_tokens=job["max_tokens"],
        save_every_steps=0,
        eval_pairs=0,
    )


def main(job: dict) -> None:
    warnings.filterwarnings("ignore")
    pairs = encoded_pairs(job)
    built = base_model(job, job["device"])
    if job["method"] != "full":
        torch.manual_seed(0)
        built = model.add_adapters(built, settings_of(job))
    say(
        parameters=sum(p.numel() for p in built.parameters()),
        pairs=len(pairs),
        mean_tokens=sum(p.tokens() for p in pairs) / len(pairs),
    )
    with tempfile.TemporaryDirectory() as folder:
        {"lazyorpo": lazyorpo, "trl": trl}[job["system"]](job, pairs, built, folder).train()


if __name__ == "__main__":
    OUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the figures
    main(json.loads(sys.argv[1]))
