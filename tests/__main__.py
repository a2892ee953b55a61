"""Everything CI checks, in order: style, known vulnerabilities, tests, and every notebook under nbval.

    python -m tests

The main notebook runs as the real demo, the others on the `tiny` preset, and the main ones once more with
Colab's versions. The oldest versions that requirements.txt allows plan and train too. The first thing that
fails ends it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]
NBVAL = [*PYTEST, "-q", "-x", "--nbval-current-env", "--nbval-cell-timeout=900"]
LAX = [*NBVAL, "--nbval-lax"]
PLAN = ["-m", "lazyorpo_lib", "--plan", "--preset", "tiny", "--device", "all"]
NOTEBOOKS = ("LazyORPO", "LazyORPO_standalone")


def run(*command: str, **environment: str) -> None:
    print("\n$", *(f"{name}={value}" for name, value in environment.items()), *command, flush=True)
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | environment)
    print(f"({time.monotonic() - began:.0f} s)", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def pip(python: str, *arguments: str) -> list[str]:
    """Run pip in another environment; the lines that it prints. What it says is shown only where it fails."""
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"pip {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout.splitlines()


def environment(folder: str, *wanted: str) -> str:
    """A new environment in `folder` with what pip is asked for; its python.

    It is a whole one: with packages lent from this one, a missing or replaced package would not be noticed.
    """
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = os.path.join(folder, "bin", "python")
    pip(python, "install", "-q", *wanted)
    print(f"\n({folder}: {time.monotonic() - began:.0f} s, beside the rest)", flush=True)
    return python


def floors() -> list[str]:
    """The oldest versions that requirements.txt allows, as pip wants them."""
    lines = (
        line.split("#")[0].strip()
        for line in Path("requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    return [line.replace(">=", "==") for line in lines if line]


def with_colabs_versions(python: str, folder: str) -> None:
    """The main notebooks, a plan, the form and the stop with Colab's own versions, of which the kit changes
    none."""
    before = set(pip(python, "freeze"))
    pip(python, "install", "-q", "-r", "requirements.txt")
    after = set(pip(python, "freeze"))
    print("added:", *sorted(after - before))
    if changed := before - after:
        sys.exit(f"requirements.txt changes what Colab ships: {', '.join(sorted(changed))}")
    run(python, *PLAN)
    for name in NOTEBOOKS:
        out = os.path.join(folder, f"{name}-on-colab")
        run(python, *LAX, f"notebooks/{name}.ipynb", LAZYORPO_PRESET="tiny", LAZYORPO_OUTPUT_DIR=out)
    run(
        python,
        *PYTEST,
        "tests/notebook/test_panel.py",
        "tests/notebook/test_notebooks.py",
        "-k",
        "test_panel or interrupt",
    )


def on_the_floor(python: str, folder: str) -> None:
    """A plan, a run and the tests of what a step computes with the oldest versions that are allowed."""
    run(python, *PLAN)
    run(
        python, "-m", "lazyorpo_lib", "--preset", "tiny", "--output-dir", os.path.join(folder, "on-the-floor")
    )
    run(
        python,
        *PYTEST,
        "-m",
        "not slow",
        "tests/orpo/test_trainer.py",
        "tests/fast/test_attention.py",
        "tests/fast/test_head.py",
        "tests/test_versions.py",
    )


def notebooks(folder: str, colab: Future, floor: Future) -> None:
    """Every notebook here (LazyORPO as the real demo), and what runs with other versions."""
    quick = dict(LAZYORPO_PRESET="tiny", LAZYORPO_MAX_STEPS="2", LAZYORPO_ANSWERS="0")
    for name, settings in (
        ("LazyORPO_standalone", {"LAZYORPO_PRESET": "tiny"}),
        ("orpo_vs_sft_dpo", quick),
        ("LazyORPO", {}),
    ):
        out = os.path.join(folder, name)
        run(sys.executable, *LAX, f"notebooks/{name}.ipynb", LAZYORPO_OUTPUT_DIR=out, **settings)
    for name, settings in (
        ("make_pairs", {"LAZYORPO_BASE_MODEL": "tiny-random"}),
        ("orpo_in_class", quick | {"LAZYORPO_MAX_STEPS": "20"}),
    ):
        copied = shutil.copy(f"notebooks/{name}.ipynb", folder)  # for it writes where it is
        run(sys.executable, *LAX, copied, PYTHONPATH=os.getcwd(), **settings)
    with_colabs_versions(colab.result(), folder)
    on_the_floor(floor.result(), folder)


def main() -> None:
    os.environ |= {"MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
    here = sys.executable
    run(here, "-m", "ruff", "check", ".")
    run(here, "-m", "ruff", "format", "--check", ".")
    run(here, "notebooks/make_standalone.py", "--check")
    run(here, "-m", "tests.audit")
    run(
        here,
        *NBVAL,
        "--nbval",
        "--nbval-sanitize-with",
        "tests/nbval_sanitize.cfg",
        "notebooks/orpo_by_hand.ipynb",
    )
    aside = ThreadPoolExecutor(1)  # gigabytes of torch are installed one after the other meanwhile
    with tempfile.TemporaryDirectory() as folder:
        try:
            colabs = ("-r", "tests/colab-constraints.txt")
            colab = aside.submit(environment, os.path.join(folder, "colab"), *colabs)
            floor = aside.submit(environment, os.path.join(folder, "floor"), *floors())
            # Two tests at a time of one thread each: small models gain nothing from two threads.
            threads = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
            run(here, *PYTEST, "-n", "2", "--durations=40", **threads)
            notebooks(folder, colab, floor)
        finally:
            aside.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
