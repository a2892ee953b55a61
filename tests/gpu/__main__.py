"""Acceptance on a graphics card: is it right, does it fit, is it as fast as planned.

    python -m tests.gpu                    # every part, 0 to 17, that fits into --minutes
    python -m tests.gpu 0-9 --minutes 9    # by number, range or name
    python -m tests.gpu --short            # for a Colab T4: some 12 minutes; prints the JSON to send in
    python -m tests.gpu pack .site         # what a card without PyPI lacks, to carry there for PYTHONPATH

Each part is a process of its own. Prints one line a check, `PASS|FAIL|SKIP name: measured (expected) in s`,
as soon as it is known, then a table; writes <date>-<card>.json. A part is started only where its estimated
seconds still fit into --minutes, else skipped by name. Nothing is downloaded: weights are random in published
shapes, built on the card; lengths of pairs are real (tests/lengths.json). Without CUDA every part that can
runs in a small form on the CPU (--small), which shows that the suite works, and no more.
Exit status: 0 nothing failed, 1 something did, 2 a wrong call.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lazyorpo_lib.machine import this_machine


class Part(NamedTuple):
    """One process: a function of exact.py or speed.py, given `small` and `given`, that yields checks."""

    number: int
    name: str
    function: str
    seconds: int  # on an H100, estimated
    small: int | None = None  # of the small form on a CPU; None: there is none
    given: tuple = ()
    needs: tuple = ()  # packages
    gib: float = 0.0  # of the card
    environment: tuple = ()


BNB, TRL = ("bitsandbytes",), ("trl", "datasets")
WHOLE = tuple(
    (name, "expandable_segments:False") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
)
PARTS = (
    Part(0, "env", "speed.env", 15, 10),
    Part(1, "plan", "exact.plan", 40, 40),
    Part(2, "kernel", "exact.kernel", 50, 20),
    Part(3, "equal", "exact.equal", 70, 40),
    Part(4, "fp16", "exact.fp16", 40, 15),
    Part(5, "qlora", "exact.qlora", 60, 30, needs=BNB),
    Part(6, "resume", "exact.resume", 60, 20, environment=(("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),)),
    Part(7, "oom", "exact.oom", 50),
    Part(8, "twice", "exact.twice", 60, 40),
    Part(9, "probe", "exact.probe", 60, 100),
    Part(10, "peaks/smollm2-135m", "speed.peaks", 20, 30, ("smollm2-135m", "lora")),
    Part(10, "peaks/fragments", "speed.peaks", 20, None, ("smollm2-135m", "lora", "", False), (), 0, WHOLE),
    Part(10, "peaks/qwen2.5-1.5b", "speed.peaks", 25, None, ("qwen2.5-1.5b", "lora", "T4")),
    Part(10, "peaks/phi-2", "speed.peaks", 35, 30, ("phi-2", "full"), gib=60),
    Part(10, "peaks/llama-3-8b-qlora", "speed.peaks", 45, None, ("llama-3-8b", "qlora", "T4"), BNB),
    Part(10, "peaks/llama-3-8b", "speed.peaks", 35, None, ("llama-3-8b", "lora", "A100-40"), gib=39),
    Part(10, "peaks/gemma-7b", "speed.peaks", 35, None, ("gemma-7b", "lora", "A40"), gib=44),
    Part(11, "article/phi-2", "speed.article", 90, 30, ("phi-2", "full", 120, 20), gib=60),
    Part(11, "article/qwen2.5-1.5b", "speed.article", 60, None, ("qwen2.5-1.5b", "lora", 30, 5)),
    Part(12, "trl/llama-3-8b", "speed.trl", 80, 90, ("llama-3-8b", False), TRL, 60),
    Part(12, "trl/llama-3-8b-checkpointed", "speed.trl", 80, None, ("llama-3-8b", True), TRL, 40),
    Part(12, "trl/phi-2", "speed.trl", 60, None, ("phi-2", False), TRL, 40),
    Part(12, "trl/smollm2-135m", "speed.trl", 40, None, ("smollm2-135m", False), TRL),
    Part(13, "syncs", "speed.syncs", 30),
    Part(14, "liger", "speed.liger", 40, None, needs=("liger_kernel",)),
    Part(15, "answers", "exact.answers", 30, 15),
    Part(16, "real", "speed.real", 60),
    Part(17, "ddp", "speed.ddp", 90),
)
OF_A_T4 = ("peaks/qwen2.5-1.5b", "peaks/llama-3-8b-qlora", "article/qwen2.5-1.5b")
SHORT = [part for part in PARTS if part.number < 6 or part.name in OF_A_T4]
PACKED = ("bitsandbytes", "trl", "liger-kernel", "datasets", "dill", "multiprocess", "xxhash")
PACKED_MIB = 64


class Wrong(Exception):
    """The caller's mistake, in one sentence."""


def chosen(names: list[str]) -> list[Part]:
    """The parts that numbers, ranges (0-9) and names (peaks, peaks/phi-2) mean, in their order; all of them
    for none."""
    wanted = set()
    for name in names:
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", name)
        if numbers:
            found = [p for p in PARTS if int(numbers[1]) <= p.number <= int(numbers[2] or numbers[1])]
        else:
            found = [p for p in PARTS if name in (p.name, p.name.split("/")[0])]
        if not found:
            known = ", ".join(dict.fromkeys(f"{p.number} {p.name.split('/')[0]}" for p in PARTS))
            raise Wrong(
                f"There is no part {name!r}; give a number, a range such as 0-9, or a name of: {known}."
            )
        wanted |= {p.name for p in found}
    return [p for p in PARTS if p.name in wanted or not names]


def verdict(checks: list[dict]) -> str:
    """FAIL where a check failed or none was made; SKIP where the part said why it cannot be run here; else
    PASS."""
    if any("skip" in check for check in checks):
        return "SKIP"
    return "PASS" if checks and all(check["ok"] is not False for check in checks) else "FAIL"


def words(number) -> str:
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def line(part: str, check: dict) -> str:
    """One check as it is printed; a figure that nothing is expected of is told all the same."""
    limits = [f"{sign} {words(check[key])}" for key, sign in (("low", ">="), ("high", "<=")) if key in check]
    expected = ", ".join(limits) or check.get("expected", "told")
    verdict = "FAIL" if check["ok"] is False else "PASS"
    unit = check["unit"] and f" {check['unit']}"
    measured = f"{words(check['measured'])}{unit} ({expected})"
    return f"{verdict} {part}, {check['what']}: {measured} in {check['seconds']:.1f} s"


def measure(part: Part, small: bool, say) -> None:
    """Run a part in this process; every check, and what ended it early, goes to `say` as it is known."""
    import lazyorpo_lib  # noqa: F401  first: it sets what torch reads when it is imported

    from .bench import Skip

    module, function = part.function.split(".")
    began = time.monotonic()
    try:
        for check in getattr(importlib.import_module(f"tests.gpu.{module}"), function)(small, *part.given):
            say(check | {"seconds": round(time.monotonic() - began, 2)})
            began = time.monotonic()
    except Skip as why:
        say({"skip": str(why)})
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0][:200]}"
        say(
            {
                "what": "end",
                "measured": said,
                "ok": False,
                "unit": "",
                "seconds": round(time.monotonic() - began, 2),
            }
        )


def started(part: Part, small: bool, seconds: float):
    """Run a part in a process of its own and give its checks as they come; after `seconds` it is killed."""
    command = [sys.executable, "-m", "tests.gpu", "--child", part.name, *["--small"] * small]
    environment = (
        os.environ | dict(part.environment) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    )
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )

    def kill():  # with every process that it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    began, clock = time.monotonic(), threading.Timer(seconds, kill)
    clock.start()
    try:
        for said in process.stdout:
            yield json.loads(said)
        if process.wait():
            after = f"{time.monotonic() - began:.0f} of {seconds:.0f} s"
            measured = f"ended with status {process.returncode} after {after}"
            yield {"what": "end", "measured": measured, "ok": False, "unit": "", "seconds": 0.0}
    finally:
        clock.cancel()
        kill()
        process.wait()


def why_not(part: Part, small: bool, facts: dict, left: float) -> str:
    """Why a part is not begun; empty if it is."""
    seconds = part.small if small else part.seconds
    if small and seconds is None:
        return "needs a card"
    if missing := [name for name in part.needs if not find_spec(name)]:
        return f"{missing[0]} is not installed"
    if not small and part.gib > facts["memory_gib"]:
        return f"needs a card of {part.gib:g} GiB"
    return f"some {seconds} s do not fit into the {left:.0f} s that are left" if seconds > left else ""


def machine() -> dict:
    """What the JSON says of this machine, asked in a process of its own: this one leaves the card alone."""
    asked = [sys.executable, "-m", "tests.gpu", "--child", "facts"]
    facts = json.loads(subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout)
    facts["versions"] = {"python": sys.version.split()[0]}
    for name in (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "trl",
        "liger-kernel",
        "datasets",
    ):
        with contextlib.suppress(PackageNotFoundError):
            facts["versions"][name] = version(name)
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], stdout=subprocess.PIPE, text=True)
    return facts | {"commit": asked.stdout.strip(), "date": str(datetime.date.today())}


def facts() -> dict:
    import torch

    here = this_machine()
    return {
        "device": here.device,
        "card": here.name,
        "memory_gib": here.memory_gib,
        "capability": here.capability,
        "cards": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def results_file(folder: Path, about: dict) -> Path:
    """<date>-<card>.json"""
    card = "cpu" if about["device"] == "cpu" else re.sub(r"^(nvidia|tesla)[ -]", "", about["card"].lower())
    return folder / f"{about['date']}-{re.sub(r'[^a-z0-9.]+', '-', card).strip('-')}.json"


def run(parts: list[Part], small: bool, about: dict, minutes: float, file: Path) -> list[dict]:
    """Every part in turn; the file is whole after each, and keeps what an earlier call of the day measured in
    other parts."""
    deadline = time.monotonic() + 60 * minutes
    rows = {row["part"]: row for row in json.loads(file.read_text())["parts"]} if file.is_file() else {}
    done = []
    for part in parts:
        began, checks = time.monotonic(), []
        if why := why_not(part, small, about, deadline - began):
            checks = [{"skip": why}]
        for check in () if why else started(part, small, deadline - began):
            checks.append(check)
            if "skip" not in check:
                print(line(part.name, check), flush=True)
        told = verdict(checks)
        row = {
            "number": part.number,
            "part": part.name,
            "verdict": told,
            "seconds": round(time.monotonic() - began, 1),
        }
        if told == "SKIP":
            row["why"] = next(check["skip"] for check in checks if "skip" in check)
            print(f"SKIP {part.name}: {row['why']} in {row['seconds']:.1f} s", flush=True)
        done.append(
            row
            | {"small": small, "commit": about["commit"], "checks": [c for c in checks if "skip" not in c]}
        )
        if told != "SKIP" or part.name not in rows:
            rows[part.name] = done[-1]
        file.parent.mkdir(parents=True, exist_ok=True)
        inorder = [rows[part.name] for part in PARTS if part.name in rows]
        file.write_text(json.dumps(about | {"parts": inorder}, indent=1) + "\n")
    return done


def table(done: list[dict]) -> str:
    rows = [f"{'part':30}{'':6}{'s':>7}  checks"]
    for row in done:
        good = sum(check["ok"] is not False for check in row["checks"])
        failed = [check["what"] for check in row["checks"] if check["ok"] is False]
        said = row.get("why") or f"{good} of {len(row['checks'])}" + (
            f"; failed: {', '.join(failed)}" if failed else ""
        )
        rows.append(f"{row['number']:>2} {row['part']:27}{row['verdict']:6}{row['seconds']:7.1f}  {said}")
    return "\n".join(rows)


def pack(folder: Path, cuda: str = "130") -> int:
    """What a card without PyPI lacks, unpacked into `folder` for its PYTHONPATH (Python 3.12, Linux); returns
    its MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--python-version",
            "3.12",
            "--implementation",
            "cp",
            "-d",
            wheels,
        ]
        for glibc in ("2_28", "2_27", "2_24", "2_17"):
            command += ["--platform", f"manylinux_{glibc}_x86_64"]
        if subprocess.run([*command, "--platform", "manylinux2014_x86_64", *PACKED]).returncode:
            raise Wrong("pip could not fetch the wheels (above); pack where PyPI is in reach.")
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    for library in (folder / "bitsandbytes").glob("libbitsandbytes_*"):  # one for every CUDA there is
        if library.stem not in ("libbitsandbytes_cpu", f"libbitsandbytes_cuda{cuda}"):
            library.unlink()
    for tests in [*folder.glob("*/tests"), *folder.glob("*/test")]:
        shutil.rmtree(tests)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    if size > PACKED_MIB:
        raise Wrong(f"{folder} holds {size:.0f} MiB, more than {PACKED_MIB}: begin with an empty folder.")
    return round(size)


def child(name: str, small: bool) -> int:
    """In a process of a part's own: checks go out as JSON lines, and whatever else is printed to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(said: dict) -> None:
        print(json.dumps(said), file=out, flush=True)

    if name == "facts":
        say(facts())
    else:
        measure(next(part for part in PARTS if part.name == name), small, say)
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", help="numbers, ranges, names; or pack FOLDER")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "tests/results")), help="folder of the JSON"
    )
    parser.add_argument(
        "--minutes", type=float, help="what does not fit is skipped (default: 9; with --short 15)"
    )
    parser.add_argument(
        "--small", action="store_true", help="the small form of every part; without CUDA it is taken anyway"
    )
    parser.add_argument(
        "--short", action="store_true", help="what a Colab T4 is asked for; prints the JSON at the end"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return child(options.child, options.small)
    try:
        if options.part[:1] == ["pack"]:
            if len(options.part) != 2:
                raise Wrong("pack takes one folder to unpack into, as in: python -m tests.gpu pack .site")
            folder = options.part[1]
            print(f"{folder}: {pack(Path(folder))} MiB; start with PYTHONPATH={folder}")
            return 0
        parts = SHORT if options.short and not options.part else chosen(options.part)
        about = machine()
        small = options.small or about["device"] != "cuda"
        file = results_file(options.out, about)
        print(
            f"{about['card']}, {about['memory_gib']:.1f} GiB, {about['versions']}, {about['commit']}",
            flush=True,
        )
        done = run(parts, small, about, options.minutes or (15 if options.short else 9), file)
    except Wrong as mistake:
        print(f"tests.gpu: {mistake}", file=sys.stderr)
        return 2
    print(f"\n{table(done)}\n{file}")
    if options.short:
        print(file.read_text())
    return int(any(row["verdict"] == "FAIL" for row in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
