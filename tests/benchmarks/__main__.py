"""Side by side with TRL's ORPOTrainer: same pairs, model, pairs a step, precision and adapter, in one run, step by step in turn.

    python -m tests.benchmarks                                    # the demo's model and pairs, LoRA
    python -m tests.benchmarks --dataset pairs.json --max-tokens 760 --method full --checkpointing
    python -m tests.benchmarks --model llama-3-8b --method qlora --precision bfloat16      # random weights, on a GPU

Prints a table, writes a JSON and a picture. Each system is a process of its own, warmed up on one step of short pairs that does
not count; while one computes the others wait. Memory is the peak above the loaded model.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from lazyorpo_lib.model import DEMO_MODEL, this_machine

SYSTEMS = {
    "TRL": dict(system="trl", nll_over="prompt+answer"),
    "LazyORPO, prompt+answer": dict(system="lazyorpo", nll_over="prompt+answer"),
    "LazyORPO, answer": dict(system="lazyorpo", nll_over="answer"),
}


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=DEMO_MODEL, help="a folder, a hub id, or phi-2, llama-3-8b, gemma-7b (random weights)")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--max-tokens", type=int, default=760, help="longest prompt plus answer; longer pairs are left out")
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps")
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--checkpointing", action="store_true", help="recompute every layer, in all systems")
    parser.add_argument("--only", choices=SYSTEMS, help="one system alone")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, help="folder of the JSON and the picture", default=Path("tests/benchmarks/results"))
    return parser.parse_args()


class Worker:
    def __init__(self, name: str, job: dict):
        command = [sys.executable, "-m", "tests.benchmarks.worker", json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.name, self.steps = name, []
        self.model = self.read()
        self.loaded_gib = self.read()["memory_gib"]

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n{self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def step(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self.read())
        return self.steps[-1]

    def figures(self, pairs: int) -> dict:
        counted = self.steps[1:]
        seconds = sum(s["seconds"] for s in counted)
        tokens = sum(s["tokens"] for s in counted)
        return {
            "pairs_per_second": pairs * len(counted) / seconds, "tokens": tokens, "tokens_per_second": tokens / seconds,
            "peak_gib_above_model": counted[-1]["memory_gib"] - self.loaded_gib, "losses": [s["loss"] for s in self.steps],
            "seconds": [s["seconds"] for s in counted],
        }  # fmt: skip


def matmul_rate(dtype: torch.dtype, device: str, width: int) -> float:
    """The machine's own rate of a large matrix product, in TFLOP/s."""
    a = torch.randn(1024, width, device=device).to(dtype)
    b = torch.randn(4 * width, width, device=device).to(dtype)
    best, sync = 0.0, torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(5):
        sync()
        start = time.perf_counter()
        for _ in range(4):
            a @ b.T
        sync()
        best = max(best, 4 * 2 * 1024 * 4 * width * width / (time.perf_counter() - start) / 1e12)
    return best


def main() -> None:
    options = arguments()
    job = {k: v for k, v in vars(options).items() if k not in ("out", "only")}
    job["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    systems = {options.only: SYSTEMS[options.only]} if options.only else SYSTEMS
    in_turn = job["device"] == "cpu"  # two models of 8B do not fit one card, so there they follow one another
    workers = []
    for name, system in systems.items():
        workers.append(Worker(name, job | system))
        if not in_turn:
            for _ in range(options.steps + 1):
                workers[-1].step()
            workers[-1].process.kill()
    for _ in range(options.steps + 1) if in_turn else ():
        for worker in workers:
            print(f"{worker.name}: {worker.step()}", file=sys.stderr, flush=True)
    report(options, job, workers)


def report(options, job: dict, workers: list[Worker]) -> None:
    machine = this_machine()
    rate = matmul_rate(getattr(torch, options.precision), job["device"], 1024)
    results = {w.name: w.figures(options.pairs) for w in workers}
    per_weight = (6 if options.method == "full" else 4) + 2 * options.checkpointing
    for worker in workers:
        r = results[worker.name]
        r["matmul_share"] = per_weight * worker.model["parameters"] * r["tokens_per_second"] / (rate * 1e12)
    first = next(iter(results.values()))
    print(f"\n{machine.name}, matmul {rate:.3g} TFLOP/s ({options.precision}); {options.method}, checkpointing "
          f"{'on' if options.checkpointing else 'off'}; {options.pairs} pairs a step, {options.steps} steps, "
          f"{workers[0].model['mean_tokens']:.0f} tokens a pair\n")  # fmt: skip
    print("| system | pairs/s | against first | tokens | peak above model, GiB | against first | matmul share | loss, step 2 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, r in results.items():
        print(
            f"| {name} | {r['pairs_per_second']:.4f} | {r['pairs_per_second'] / first['pairs_per_second']:.2f} x | {r['tokens']} | "
            f"{r['peak_gib_above_model']:.2f} | {r['peak_gib_above_model'] / first['peak_gib_above_model']:.2f} | "
            f"{r['matmul_share']:.0%} | {r['losses'][1]:.5f} |"
        )
    stamp = f"{datetime.date.today()}-{machine.device}-{Path(options.model).name}-{options.method}"
    stamp += "-checkpointed" * options.checkpointing
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "date": str(datetime.date.today()), "device": machine.name, "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__, "command": " ".join(["python -m tests.benchmarks", *(Path(a).name for a in sys.argv[1:])]),
        "job": job | {"dataset": Path(options.dataset).name, "model": Path(options.model).name},
        "matmul_tflops": rate, "results": results,
    }  # fmt: skip
    (options.out / f"{stamp}.json").write_text(json.dumps(record, indent=1))
    draw(results, options.out / f"{stamp}.png", f"{Path(options.model).name}, {options.method}, {machine.name}")


def draw(results: dict, path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 2, sharey=True),
        [("pairs_per_second", "pairs per second"), ("peak_gib_above_model", "peak memory above the model, GiB")],
        strict=True,
    ):
        bars = axes.barh(list(results)[::-1], [r[key] for r in list(results.values())[::-1]], color="#0072B2")
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
