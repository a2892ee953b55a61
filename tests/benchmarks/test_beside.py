"""The benchmark against TRL, on a toy: it runs to its table, and both systems begin at the same loss."""

import json
import subprocess
import sys

import pytest

from lazyorpo_lib.demo.model import home_of


@pytest.mark.slow
def test_the_side_by_side_runs_to_its_table_and_both_systems_begin_at_the_same_loss(tmp_path):
    systems = ["TRL", "LazyORPO, prompt+answer"]
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks",
        "--model",
        home_of("tiny-random"),
        "--out",
        str(tmp_path),
    ]
    command += ["--max-tokens", "600", "--pairs", "2", "--steps", "2", "--profile", "--systems", *systems]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert all(f"| {name} |" in ran.stdout for name in systems)
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    theirs, ours = (record["results"][name] for name in systems)
    # Of the first step alone: the schedules of the two are their own, and so are the weights that follow.
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-5)
    assert all(r["pairs_per_second"] > 0 and r["peak_gib_above_model"] > 0 for r in (theirs, ours))
