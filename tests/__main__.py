"""python -m tests: everything CI checks, in order: style, known vulnerabilities, tests, and every notebook under nbval.

The notebooks run on the `tiny` preset, the main one once more with Colab's versions, and once as the real demo. The first
thing that fails ends it.
"""

import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]
NBVAL = [*PYTEST, "-q", "-x", "--nbval-current-env", "--nbval-cell-timeout=900"]
LAX = [*NBVAL, "--nbval-lax"]


def run(*command: str, **environment: str) -> None:
    print("\n$", *(f"{name}={value}" for name, value in environment.items()), *command, flush=True)
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | environment)
    print(f"({time.monotonic() - began:.0f} s)", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def with_colabs_versions(folder: str) -> None:
    """The main notebook, its form and its stop in an environment of Colab's own versions, of which the kit changes none.

    The environment is a whole one: with packages lent from this one, a missing or replaced package would not be noticed.
    """
    python = os.path.join(folder, "colab", "bin", "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]

    def installed() -> set[str]:
        return set(subprocess.check_output([*pip, "freeze"], text=True).splitlines())

    run(sys.executable, "-m", "venv", os.path.join(folder, "colab"))
    run(*pip, "install", "-q", f"torch=={version('torch').split('+')[0]}", "-r", "tests/colab-constraints.txt")
    before = installed()
    run(*pip, "install", "-q", "-r", "requirements.txt")
    print("added:", *sorted(installed() - before))
    if changed := before - installed():
        sys.exit(f"requirements.txt changes what Colab ships: {', '.join(sorted(changed))}")
    run(python, *LAX, "notebooks/LazyORPO.ipynb", LAZYORPO_PRESET="tiny", LAZYORPO_OUTPUT_DIR=os.path.join(folder, "on-colab"))
    run(python, *PYTEST, "tests/test_panel.py", "tests/test_notebooks.py", "-k", "test_panel or interrupt")


def main() -> None:
    os.environ |= {"MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
    here = sys.executable
    run(here, "-m", "ruff", "check", ".")
    run(here, "-m", "ruff", "format", "--check", ".")
    run(here, "-m", "lazyorpo_lib.standalone", "--check")
    run(here, "-m", "tests.audit")
    run(here, *NBVAL, "--nbval", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg", "notebooks/orpo_by_hand.ipynb")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("LazyORPO", "LazyORPO_standalone"):
            out = os.path.join(folder, name)
            run(here, *LAX, f"notebooks/{name}.ipynb", LAZYORPO_PRESET="tiny", LAZYORPO_OUTPUT_DIR=out)
        quick = dict(
            LAZYORPO_PRESET="tiny", LAZYORPO_MAX_STEPS="2", LAZYORPO_ANSWERS="0", LAZYORPO_OUTPUT_DIR=os.path.join(folder, "versus")
        )
        run(here, *LAX, "notebooks/orpo_vs_sft_dpo.ipynb", **quick)
        with_colabs_versions(folder)
        run(here, *LAX, "notebooks/LazyORPO.ipynb", LAZYORPO_OUTPUT_DIR=os.path.join(folder, "demo"))
    # Two tests at a time of one thread each: small models gain nothing from two threads.
    run(here, *PYTEST, "-n", "2", "--dist", "loadgroup", "--durations=10", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


if __name__ == "__main__":
    main()
