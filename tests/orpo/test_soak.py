"""A short soak in CI; the long one's result is in docs/reliability.md (python -m tests.soak)."""

import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="processes are forked, and a disk is filled by limiting the size of files"
)
def test_a_run_struck_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    import json
    import subprocess

    out = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--kills", "3", "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text())["runs finished and equal"] >= 1
