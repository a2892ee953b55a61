"""Side by side with TRL's ORPOTrainer, step by step in turn: same pairs, model, precision and adapter.

    python -m tests.benchmarks                      # the demo's model and pairs, LoRA
    python -m tests.benchmarks --dataset pairs.json --max-tokens 760 --method full --checkpointing
    # random weights, on a GPU
    python -m tests.benchmarks --model llama-3-8b --method qlora --precision bfloat16
    # one system against itself; one pair of so many tokens, each twice
    python -m tests.benchmarks --systems "LazyORPO, answer" --precision float32 bfloat16
    python -m tests.benchmarks --systems "LazyORPO, answer" --growth 256 1024 4096

Prints a table, writes a JSON and a picture. Each system is a process of its own, warmed up by a first step
that does not count; while one computes the others wait. The machine's own matmul rate is taken before each
round of steps, for machines drift. Memory is the peak above the loaded model.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lazyorpo_lib.demo.model import DEMO_MODEL
from lazyorpo_lib.machine import this_machine

SYSTEMS = {
    "TRL": dict(system="trl", nll_over="prompt+answer"),
    "LazyORPO, prompt+answer": dict(system="lazyorpo", nll_over="prompt+answer"),
    "LazyORPO, answer": dict(system="lazyorpo", nll_over="answer"),
}


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        default=DEMO_MODEL,
        help="a folder, a hub id, or phi-2, llama-3-8b, gemma-7b (random weights)",
    )
    parser.add_argument("--dataset", default="demo")
    parser.add_argument(
        "--max-tokens", type=int, default=760, help="longest prompt plus answer; longer pairs are left out"
    )
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps")
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument(
        "--precision", default=["float32"], nargs="+", choices=("float32", "bfloat16", "float16")
    )
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--checkpointing", action="store_true", help="recompute every layer, in all systems")
    parser.add_argument(
        "--systems",
        default=list(SYSTEMS),
        nargs="+",
        choices=SYSTEMS,
        help="the first is the one compared with",
    )
    parser.add_argument(
        "--growth",
        type=int,
        nargs="+",
        help="in place of a dataset: one random pair of so many tokens a step",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="after the steps, one more under torch's profiler: where the time goes",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON and the picture",
        default=Path("tests/benchmarks/results"),
    )
    return parser.parse_args()


class Worker:
    def __init__(self, name: str, job: dict):
        command = [sys.executable, "-m", "tests.benchmarks.worker", json.dumps(job)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.name, self.job, self.steps, self.rates, self.profile = name, job, [], [], None
        self.model = self.read()
        self.loaded_gib = self.read()["memory_gib"]

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n{self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def step(self, rate: float) -> None:
        """One step, and the machine's matmul rate (TFLOP/s) taken just before it."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self.read())
        self.rates.append(rate)
        print(f"{self.name}: {self.steps[-1]}, matmul {rate:.3f} TFLOP/s", file=sys.stderr, flush=True)

    def finish(self) -> None:
        if self.job["profile"]:
            self.step(0.0)
            self.profile = self.steps.pop()["profile"]
            self.rates.pop()
        self.process.kill()

    def figures(self) -> dict:
        # The first step of all, or of each length, pages memory in and makes kernels: it does not count.
        after_the_first = slice(1, None, 2 if self.job["growth"] else 1)
        counted, rates = self.steps[after_the_first], self.rates[after_the_first]
        seconds, tokens = sum(s["seconds"] for s in counted), sum(s["tokens"] for s in counted)
        per_weight = (6 if self.job["method"] == "full" else 4) + 2 * self.job["checkpointing"]
        possible = sum(s["seconds"] * rate for s, rate in zip(counted, rates, strict=True)) * 1e12
        return {
            "pairs_per_second": self.job["pairs"] * len(counted) / seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "peak_gib_above_model": counted[-1]["memory_gib"] - self.loaded_gib,
            "matmul_share": per_weight * self.model["parameters"] * tokens / possible,
            "losses": [s["loss"] for s in self.steps],
            "seconds": [s["seconds"] for s in counted],
            "step_tokens": [s["tokens"] for s in counted],
            "attention_seconds": [s["attention_seconds"] for s in counted],
            "matmul_tflops": rates,
            "profile": self.profile,
        }


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
    shared = {k: v for k, v in vars(options).items() if k not in ("out", "systems", "precision")}
    shared["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if options.growth:
        shared |= {"pairs": 1, "steps": 2 * len(options.growth) - 1, "max_tokens": max(options.growth)}
    jobs = {}
    for precision in options.precision:
        for name in options.systems:
            full_name = name if len(options.precision) == 1 else f"{name}, {precision}"
            jobs[full_name] = shared | SYSTEMS[name] | {"precision": precision}
    in_turn = (
        shared["device"] == "cpu"
    )  # two models of 8B do not fit one card, so there they follow one another
    workers = []
    for name, job in jobs.items():
        workers.append(Worker(name, job))
        if not in_turn:
            for _ in range(job["steps"] + 1):
                workers[-1].step(rate_for(job))
            workers[-1].finish()
    for _ in range(shared["steps"] + 1) if in_turn else ():
        for worker in workers:
            worker.step(rate_for(worker.job))
    for worker in workers if in_turn else ():
        worker.finish()
    report(options, shared, workers)


def rate_for(job: dict) -> float:
    time.sleep(2)  # the process that has just computed may still be freeing its memory
    return matmul_rate(getattr(torch, job["precision"]), job["device"], 1024)


def report(options, job: dict, workers: list[Worker]) -> None:
    machine = this_machine()
    results = {w.name: w.figures() for w in workers}
    first = next(iter(results.values()))
    rate = statistics.median(first["matmul_tflops"])
    print(
        f"\n{machine.name}, matmul {rate:.3g} TFLOP/s ({workers[0].job['precision']}); {options.method}, "
        f"checkpointing {'on' if options.checkpointing else 'off'}; {job['pairs']} pairs a step, "
        f"{job['steps']} steps, {workers[0].model['mean_tokens']:.0f} tokens a pair\n"
    )
    print(
        "| system | pairs/s | against first | tokens | peak above model, GiB | against first "
        "| matmul share | loss, step 2 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, r in results.items():
        speed, memory = r["pairs_per_second"], r["peak_gib_above_model"]
        print(
            f"| {name} | {speed:.4f} | {speed / first['pairs_per_second']:.2f} x | {r['tokens']} | "
            f"{memory:.2f} | {memory / first['peak_gib_above_model']:.2f} | "
            f"{r['matmul_share']:.0%} | {r['losses'][1]:.5f} |"
        )
    if options.growth:
        print("\n| tokens a pair | tokens/s | of a token's time: attention, ms | the rest, ms |")
        print("|---|---|---|---|")
        for tokens, seconds, attention in zip(
            *(first[k] for k in ("step_tokens", "seconds", "attention_seconds")), strict=True
        ):
            ms = [1e3 * part / tokens for part in (attention, seconds - attention)]
            print(f"| {tokens} | {tokens / seconds:.0f} | {ms[0]:.2f} | {ms[1]:.2f} |")
    for worker in workers:
        for name, share in worker.profile or ():
            print(f"{worker.name}: {name} {share:.1%}")
    stamp = f"{datetime.date.today()}-{machine.device}-{Path(options.model).name}-{options.method}"
    stamp += "".join(f"-{name.split(', ')[-1].lower()}" for name in options.systems)
    stamp += (
        "-checkpointed" * options.checkpointing
        + "-growth" * bool(options.growth)
        + "-precision" * (len(options.precision) > 1)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "date": str(datetime.date.today()),
        "device": machine.name,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "command": " ".join(["python -m tests.benchmarks", *(Path(a).name for a in sys.argv[1:])]),
        "job": job | {"dataset": Path(options.dataset).name, "model": Path(options.model).name},
        "matmul_tflops": rate,
        "results": results,
    }
    (options.out / f"{stamp}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(
        results, options.out / f"{stamp}.png", f"{Path(options.model).name}, {options.method}, {machine.name}"
    )


def draw(results: dict, path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 2, sharey=True),
        [
            ("pairs_per_second", "pairs per second"),
            ("peak_gib_above_model", "peak memory above the model, GiB"),
        ],
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
