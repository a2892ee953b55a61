"""Everything CI checks, in order: style, known vulnerabilities, tests, and every notebook under nbval.

    python -m tests

The main notebook runs as the real demo, the others on the `tiny` preset, and beside them the main ones once
more with Colab's versions. The oldest versions that requirements.txt allows plan and train too. The first
thing that fails ends it, once what runs beside it has ended.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]
NBVAL = [*PYTEST, "-q", "-x", "--nbval-current-env", "--nbval-cell-timeout=900"]
LAX = [*NBVAL, "--nbval-lax"]
PLAN = ["-m", "lazyorpo_lib", "--plan", "--preset", "tiny", "--device", "all"]
NOTEBOOKS = ("LazyORPO", "LazyORPO_standalone")
# Two processes of one thread each: small models gain nothing from two threads.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
failed = threading.Event()


def fail(why: int | str) -> None:
    failed.set()
    sys.exit(why)


def run(*command: str, beside: bool = False, **environment: str) -> None:
    """Run a command; one that fails ends all. `beside` another: what it says comes whole, at its end."""
    if failed.is_set():
        sys.exit(1)
    what = " ".join(["\n$", *(f"{name}={value}" for name, value in environment.items()), *command])
    began, kept = time.monotonic(), {}
    if beside:
        kept = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    else:
        print(what, flush=True)
    done = subprocess.run(command, env=os.environ | environment, **kept)
    said = [what, done.stdout] if beside else []
    print("\n".join([*said, f"({time.monotonic() - began:.0f} s)"]), flush=True)
    if done.returncode:
        fail(done.returncode)


def pip(python: str, *arguments: str) -> list[str]:
    """Run pip in another environment; the lines that it prints. What it says is shown only where it fails."""
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        fail(f"pip {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout.splitlines()


def environment(folder: str, *wanted: str) -> str:
    """A new environment in `folder` with what pip is asked for; its python.

    It is a whole one: with packages lent from this one, a missing or replaced package would not be noticed.
    """
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = os.path.join(folder, "bin", "python")
    pip(python, "install", "-q", "--no-compile", *wanted)  # little of it is ever imported
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
        fail(f"requirements.txt changes what Colab ships: {', '.join(sorted(changed))}")
    run(python, *PLAN, beside=True)
    for name in NOTEBOOKS:
        out = dict(LAZYORPO_PRESET="tiny", LAZYORPO_OUTPUT_DIR=os.path.join(folder, f"{name}-on-colab"))
        run(python, *LAX, f"notebooks/{name}.ipynb", beside=True, **out)
    tests = ("tests/notebook/test_panel.py", "tests/notebook/test_notebooks.py")
    run(python, *PYTEST, *tests, "-k", "test_panel or interrupt", beside=True)


def on_the_floor(python: str, folder: str) -> None:
    """A plan, a run and the tests of what a step computes with the oldest versions that are allowed."""
    run(python, *PLAN, beside=True)
    out = os.path.join(folder, "on-the-floor")
    run(python, "-m", "lazyorpo_lib", "--preset", "tiny", "--output-dir", out, beside=True)
    tests = ("orpo/test_trainer", "fast/test_attention", "fast/test_head", "test_versions")
    run(python, *PYTEST, "-m", "not slow", *(f"tests/{name}.py" for name in tests), beside=True)


def elsewhere(folder: str, colab: Future, floor: Future) -> None:
    """What runs with other versions."""
    with_colabs_versions(colab.result(), folder)
    on_the_floor(floor.result(), folder)


def notebooks(folder: str) -> None:
    """Every notebook here, LazyORPO as the real demo."""
    quick = dict(LAZYORPO_PRESET="tiny", LAZYORPO_MAX_STEPS="2", LAZYORPO_ANSWERS="0")
    for name, settings in (
        ("LazyORPO_standalone", {"LAZYORPO_PRESET": "tiny"}),
        ("orpo_vs_sft_dpo", quick),
        ("LazyORPO", {}),
    ):
        out = os.path.join(folder, name)
        run(sys.executable, *LAX, f"notebooks/{name}.ipynb", beside=True, LAZYORPO_OUTPUT_DIR=out, **settings)
    for name, settings in (
        ("make_pairs", {"LAZYORPO_BASE_MODEL": "tiny-random"}),
        ("orpo_in_class", quick | {"LAZYORPO_MAX_STEPS": "20"}),
    ):
        copied = shutil.copy(f"notebooks/{name}.ipynb", folder)  # for it writes where it is
        run(sys.executable, *LAX, copied, beside=True, PYTHONPATH=os.getcwd(), **settings)


def main() -> None:
    os.environ |= {"MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
    here = sys.executable
    run(here, "-m", "ruff", "check", ".")
    run(here, "-m", "ruff", "format", "--check", ".")
    run(here, "notebooks/make_standalone.py", "--check")
    run(here, "-m", "tests.audit")
    by_hand = ("--nbval", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg", "notebooks/orpo_by_hand.ipynb")
    run(here, *NBVAL, *by_hand)
    os.environ |= THREADS
    aside = ThreadPoolExecutor(1)  # gigabytes of torch are installed one after the other meanwhile
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as both:
        try:
            colabs = ("-r", "tests/colab-constraints.txt")
            colab = aside.submit(environment, os.path.join(folder, "colab"), *colabs)
            floor = aside.submit(environment, os.path.join(folder, "floor"), *floors())
            run(here, *PYTEST, "-n", "2", "--durations=40")
            work = both.submit(notebooks, folder), both.submit(elsewhere, folder, colab, floor)
            for done in as_completed(work):
                done.result()
        finally:
            aside.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
