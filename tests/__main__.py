"""python -m tests: everything CI checks, in order: style, tests, and every notebook under nbval.

The notebooks run on the `tiny` preset, and the main one once more as the real demo. The first thing that fails ends it.
"""

import os
import subprocess
import sys
import tempfile
import time

NBVAL = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--nbval-current-env", "--nbval-cell-timeout=900"]


def run(*command: str, **environment: str) -> None:
    print("\n$", " ".join(environment and [f"{k}={v}" for k, v in environment.items()] or []), *command, flush=True)
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | environment)
    print(f"({time.monotonic() - began:.0f} s)", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    os.environ |= {"MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")
    run(sys.executable, "-m", "lazyorpo_lib.standalone", "--check")
    run(*NBVAL, "--nbval", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg", "notebooks/orpo_by_hand.ipynb")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("LazyORPO", "LazyORPO_standalone"):
            out = os.path.join(folder, name)
            run(*NBVAL, "--nbval-lax", f"notebooks/{name}.ipynb", LAZYORPO_PRESET="tiny", LAZYORPO_OUTPUT_DIR=out)
        quick = dict(
            LAZYORPO_PRESET="tiny", LAZYORPO_MAX_STEPS="2", LAZYORPO_ANSWERS="0", LAZYORPO_OUTPUT_DIR=os.path.join(folder, "versus")
        )
        run(*NBVAL, "--nbval-lax", "notebooks/orpo_vs_sft_dpo.ipynb", **quick)
        run(*NBVAL, "--nbval-lax", "notebooks/LazyORPO.ipynb", LAZYORPO_OUTPUT_DIR=os.path.join(folder, "demo"))
    run(sys.executable, "-m", "pytest", "--durations=10")


if __name__ == "__main__":
    main()
