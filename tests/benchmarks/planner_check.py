"""Predicted against measured peaks on the CPU: six small shapes x three methods, each in its own process.

    python -m tests.benchmarks.planner_check            # prints a table, writes results/planner_cpu.json
    python -m tests.benchmarks.planner_check llama lora # one case

A case plans, then builds random weights of the shape, runs two optimizer steps of OrpoTrainer and reads the
process's highest resident memory (VmHWM, reset after the weights are there). glibc is told to give freed
memory back (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), else what is measured is its heap's history as
much as the step. Linux only.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lazyorpo_lib.machine import Machine

_EXPERTS = dict(vocab_size=32000, hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
_EXPERTS |= dict(num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts_per_tok=2)
# name: (model type, config, pairs in a micro-batch, tokens of prompt, chosen, rejected, checkpointed layers)
SHAPES = {
    "llama": (
        "llama",
        dict(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=12,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
        1,
        400,
        300,
        300,
        0,
    ),
    "qwen2": (
        "qwen2",
        dict(
            vocab_size=96000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        2,
        200,
        200,
        150,
        6,
    ),
    "phi": (
        "phi",
        dict(
            vocab_size=51200,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=8,
            num_attention_heads=12,
        ),
        1,
        300,
        300,
        300,
        8,
    ),
    "gemma": (
        "gemma",
        dict(
            vocab_size=64000,
            hidden_size=640,
            intermediate_size=2560,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=1,
            head_dim=128,
            tie_word_embeddings=True,
        ),
        3,
        150,
        150,
        150,
        2,
    ),
    "mixtral": ("mixtral", _EXPERTS | dict(num_local_experts=8), 1, 300, 200, 200, 2),
    "qwen3_moe": (
        "qwen3_moe",
        _EXPERTS | dict(num_experts=16, moe_intermediate_size=384),
        2,
        200,
        150,
        150,
        0,
    ),
}
METHODS = ("full", "lora", "qlora")
RESULTS = Path(__file__).parent / "results" / "planner_cpu.json"


def case(shape: str, method: str) -> dict:
    """Plan and run one case in this process."""
    import psutil
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lazyorpo_lib import model as models
    from lazyorpo_lib.fast.layouts import PairScorer
    from lazyorpo_lib.orpo.batching import EncodedPair
    from lazyorpo_lib.orpo.processes import make_accelerator
    from lazyorpo_lib.orpo.trainer import OrpoTrainer
    from lazyorpo_lib.plan.lengths import measured_lengths
    from lazyorpo_lib.plan.planner import make_plan
    from lazyorpo_lib.settings import Settings

    kind, options, count, p, c, r, checkpointed = SHAPES[shape]
    config = AutoConfig.for_model(kind, **options)
    pairs = [EncodedPair(i, [7 + i] * p, [9] * c, [11] * r) for i in range(4 * count)]
    tokens = count * (p + c + r)
    settings = Settings(
        base_model=shape,
        method=method,
        tokens_per_batch=tokens,
        checkpointed_layers=checkpointed,
        pairs_per_step=2 * count,
        max_steps=2,
        save_every_steps=0,
        eval_pairs=0,
        precision="float32",
    )
    machine = Machine("cpu", "CPU", psutil.virtual_memory().total / 2**30)
    start = time.monotonic()
    plan = make_plan(config, settings, machine, measured_lengths(pairs), dtype=torch.float32).method
    planned_in = time.monotonic() - start
    with tempfile.TemporaryDirectory() as home:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(home)
        settings = Settings(**{**vars(settings), "base_model": home})
        model = models.load_for_training(settings, method=method, dtype=torch.float32, device="cpu")
        run = OrpoTrainer(
            model,
            settings,
            pairs,
            accelerator=make_accelerator(settings, dtype=torch.float32, device="cpu", folder=Path(home)),
            folder=Path(home),
            tokens_per_batch=tokens,
            checkpointed_layers=checkpointed,
            make_scorer=lambda whole: PairScorer(models.causal_lm(whole)),
        )
        run.prepare()
        resident = psutil.Process().memory_info().rss / 2**30
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is resident now
        start = time.monotonic()
        run.train()
        seconds = time.monotonic() - start
    status = Path("/proc/self/status").read_text()
    measured = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return dict(
        shape=shape,
        method=method,
        parameters=sum(p.numel() for p in model.parameters()),
        predicted_gib=round(plan.peak_gib, 3),
        measured_gib=round(measured, 3),
        ratio=round(plan.peak_gib / measured, 4),
        parts={k: round(v, 3) for k, v in plan.parts.items()},
        loaded_gib=round(resident, 3),
        predicted_minutes=round(plan.minutes, 3),
        measured_minutes=round(seconds / 60, 3),
        planned_in_seconds=round(planned_in, 1),
    )


def main(shapes=tuple(SHAPES), methods=METHODS) -> list[dict]:
    rows = []
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    print(f"{'shape':8}{'method':8}{'predicted':>10}{'measured':>10}{'ratio':>8}{'min pred':>10}{'min':>8}")
    for shape in shapes:
        for method in methods:
            command = [sys.executable, "-m", "tests.benchmarks.planner_check", shape, method, "--here"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{shape} {method}: {done.stderr[-2000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(
                f"{shape:8}{method:8}{row['predicted_gib']:10.3f}{row['measured_gib']:10.3f}{row['ratio']:8.3f}"
                f"{row['predicted_minutes']:10.3f}{row['measured_minutes']:8.3f}",
                flush=True,
            )
    return rows


def report(rows: list[dict]) -> dict:
    """The cases with what they were measured on."""
    cpu = next(
        line.split(": ")[1]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    hardware = f"{cpu}, {len(os.sched_getaffinity(0))} core(s), no GPU"
    return dict(
        command="python -m tests.benchmarks.planner_check",
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware,
        cases=rows,
    )


if __name__ == "__main__":
    if sys.argv[3:] == ["--here"]:
        print(json.dumps(case(*sys.argv[1:3])))
    elif len(sys.argv) == 3:
        print(json.dumps(main([sys.argv[1]], [sys.argv[2]])[0], indent=2))
    else:
        RESULTS.write_text(json.dumps(report(main()), indent=1) + "\n")
