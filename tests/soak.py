"""Strikes runs at random moments until they end; what they leave must equal what an uninterrupted one leaves.

    python -m tests.soak --kills 200 --seed 0 --out soak.json

Each attempt is a process of its own, forked from this one, so that nothing is imported again: the command
line on the `tiny` preset, with dropout on, a checkpoint at every step and several passes over the pairs. A
moment is drawn between the start and the time that a whole run takes, so it also falls into reading, loading,
evaluating, saving and wrapping up. After a power cut only that is left which had been flushed, or parts of
the rest (tests/powercut.py). Checked after each attempt: its exit status, no traceback, and a history
without gaps. Checked of each finished run, against the uninterrupted one: the same weights bit for bit, the
same rows of the history, the same pairs in every step, each of them once a pass.
"""

import argparse
import collections
import datetime
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from lazyorpo_lib import marker
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import append_row, read_rows
from lazyorpo_lib.results import reading
from tests import powercut

STEPS = 24
PATIENCE = 600  # seconds, also on a machine that has other work
TIMINGS = ("pairs_per_second", "tokens_per_second", "memory_gib")
FLAGS = ["--preset", "tiny", "--max-steps", str(STEPS), "--save-every-steps", "1", "--lora-dropout", "0.2"]
# A precision of auto is a timing, which may come out otherwise the next time.
FLAGS += ["--lr-schedule", "constant", "--precision", "float32"]
LOST = re.compile(r"Exception ignored in.*?(Stopped|KeyboardInterrupt)[^\n]*\n", re.DOTALL)
ALLOWED = {  # exit statuses of a struck attempt, but for that of one that ended before
    "SIGKILL": {-signal.SIGKILL},
    "SIGTERM": {-signal.SIGTERM, 130},
    "SIGHUP": {-signal.SIGHUP, 130},
    "SIGINT": {130},
    "STOP file": {130},
    "max_minutes": {0},
    "full disk": {2},
    "torn checkpoint": {-signal.SIGKILL},
    "flipped bit": {-signal.SIGKILL},
    "power cut": {-signal.SIGKILL},
    "power cut at the end": {-signal.SIGKILL},
}


class Child:
    """One attempt at the run in `folder`, in a forked process. `said` is its output, once it has ended."""

    def __init__(self, folder: Path, *flags: str, shadow: Path | None = None):
        self.folder, self.began, self.shadow = folder, time.monotonic(), shadow
        self._output, output = os.pipe()  # not a file: its size would be limited with the others'
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process:
            os.dup2(output, 1)
            os.dup2(output, 2)
            self._work(*flags)
        os.close(output)

    def _work(self, *flags):
        status = 1
        try:
            from lazyorpo_lib.__main__ import main

            note_pairs(pairs_of(self.folder))
            if self.shadow:
                powercut.Recorder(self.folder.parent, self.shadow).install()
            status = main([*FLAGS, "--output-dir", str(self.folder), *flags])
        except UserError as error:
            print(f"lazyorpo: {error}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, seconds: float) -> int | None:
        """The exit status (minus the signal that killed it), or None if it still runs after these seconds."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.process, os.WNOHANG)
            if pid:
                with open(self._output) as output:
                    self.said = output.read()
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                return None
            time.sleep(0.005)


def pairs_of(folder: Path) -> Path:
    """The file for the rows of every step, outside of what a power cut takes."""
    return folder.parent.with_suffix(".pairs")


def note_pairs(file: Path) -> None:
    """Write down the dataset rows of every step that begins."""
    from lazyorpo_lib.orpo.trainer import OrpoTrainer

    inner = OrpoTrainer._gradient

    def noted(trainer, pairs):
        append_row(file, {"step": trainer.step, "rows": str([p.index for p in pairs])})
        return inner(trainer, pairs)

    OrpoTrainer._gradient = noted


def attempt(folder: Path, kind: str, seconds: float, chance: random.Random) -> int:
    """Start the run and strike once; returns its exit status."""
    flags = ["--max-minutes", str(chance.uniform(0, seconds / 2) / 60)] if kind == "max_minutes" else []
    shadow = folder.parent.with_suffix(".shadow") if kind.startswith("power cut") else None
    folder.parent.mkdir(exist_ok=True)
    child = Child(folder, *flags, shadow=shadow)
    status = child.wait(PATIENCE if kind == "power cut at the end" else chance.uniform(0, seconds))
    if status is None:
        if kind.startswith("SIG"):
            os.kill(child.process, signal.Signals[kind])
        elif kind == "STOP file" and folder.is_dir():
            (folder / "STOP").touch()
        elif kind == "full disk":  # from now on no file may grow past this size
            resource.prlimit(
                child.process,
                resource.RLIMIT_FSIZE,
                (int(10 ** chance.uniform(1, 5.3)), resource.RLIM_INFINITY),
            )
        elif kind in ("torn checkpoint", "flipped bit", "power cut"):
            os.kill(child.process, signal.SIGKILL)
        status = child.wait(PATIENCE)
    assert status is not None, f"{kind}: the run has not ended {PATIENCE} s after it"
    if shadow:
        mode = "strict" if status == 0 else chance.choice(powercut.MODES)
        left = powercut.cut(folder.parent, shadow, folder.parent.with_suffix(".left"), mode, chance)
        shutil.rmtree(folder.parent)
        shutil.rmtree(shadow)
        left.rename(folder.parent)
        # What was said to be saved is there, whole.
        assert status or not marker.damaged(folder / "model"), child.said[-3000:]
        assert status or json.loads((folder / "summary.json").read_text())["finished"], child.said[-3000:]
    if kind in ("torn checkpoint", "flipped bit"):
        damage(folder, kind, chance)
    assert status in ALLOWED[kind] | {0}, (kind, status, child.said[-3000:])
    # Python tells of an interrupt that it lost to a finalizer; the run ends by it all the same.
    assert "Traceback" not in LOST.sub("", child.said), (kind, child.said[-3000:])
    return status


def damage(folder: Path, kind: str, chance: random.Random) -> None:
    """Cut a file of the newest checkpoint short, or turn one bit in it over."""
    from lazyorpo_lib.orpo.checkpoints import complete

    for checkpoint in complete(folder)[-1:]:
        file = chance.choice([f for f in sorted(checkpoint.iterdir()) if f.stat().st_size])
        where = chance.randrange(file.stat().st_size)
        if kind == "torn checkpoint":
            os.truncate(file, where)
        elif file.name != marker.MARKER:  # which tells of the others
            data = bytearray(file.read_bytes())
            data[where] ^= 1 << chance.randrange(8)
            file.write_bytes(data)


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "history.jsonl") if "loss" in row]


def left_behind(folder: Path) -> dict:
    """What must be the same, however often a run was struck."""
    from safetensors.torch import load_file

    # A stop adds an evaluation.
    rows = read_rows(folder / "history.jsonl")
    rows = [row for row in rows if not reading.is_evaluation(row) or row["step"] in (0, STEPS)]
    # Of the notes of a step the last one counts.
    pairs = {row["step"]: json.loads(row["rows"]) for row in read_rows(pairs_of(folder))}
    weights = load_file(folder / "model" / "adapter_model.safetensors")
    held_out = json.loads((folder / "held_out.json").read_text())
    return {
        "weights": {name: weight.numpy().tobytes() for name, weight in weights.items()},
        "history": [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows],
        "pairs": [pairs[step] for step in range(STEPS)],
        "held_out": {when: held_out[when] for when in ("before", "after")},
    }


def soak(kills: int, seed: int, home: Path) -> dict:
    """Strike `kills` times; returns the figures. Raises AssertionError at the first thing that is not as it
    must be."""
    import datasets  # noqa: F401  all that a run imports, once
    import peft  # noqa: F401

    from lazyorpo_lib import run  # noqa: F401

    chance, began = random.Random(seed), time.monotonic()
    (home / "reference").mkdir()
    child = Child(home / "reference" / "run")
    assert child.wait(PATIENCE) == 0, child.said[-3000:]
    seconds, wanted = time.monotonic() - child.began, left_behind(child.folder)
    assert steps_of(child.folder) == list(range(1, STEPS + 1))
    a_pass = -(-len({i for rows in wanted["pairs"] for i in rows}) // len(wanted["pairs"][0]))
    for start in range(0, STEPS - a_pass + 1, a_pass):
        seen = [i for rows in wanted["pairs"][start : start + a_pass] for i in rows]
        assert len(seen) == len(set(seen)) and set(seen) == {i for rows in wanted["pairs"] for i in rows}
    struck, finished, where, strikes = collections.Counter(), 0, collections.Counter(), []
    while struck.total() < kills or where["open"]:
        folder = home / f"run-{finished}" / "run"
        kind = chance.choice(list(ALLOWED)) if struck.total() < kills else "none"
        if kind == "none":
            child = Child(folder)
            assert child.wait(PATIENCE) == 0, child.said[-3000:]
        else:
            status = attempt(folder, kind, seconds, chance)
            struck[kind] += 1
            strikes.append((kind, status, len(steps_of(folder))))
            print(f"{struck.total()} of {kills}, run {finished}: {strikes[-1]}", file=sys.stderr, flush=True)
        steps = steps_of(folder)
        assert steps == list(range(1, len(steps) + 1)), (kind, steps)
        summary = folder / "summary.json"
        done = summary.is_file() and json.loads(summary.read_text())["finished"]
        where["open"] = not done
        between = "after the last step" if len(steps) == STEPS else "between"
        where[between if steps else "before the first step"] += kind != "none"
        if done:
            child = Child(folder)  # once more: a finished run is wrapped up, and stays as it is
            assert child.wait(PATIENCE) == 0, child.said[-3000:]
            found = left_behind(folder)
            for name, value in wanted.items():
                unlike = [(a, b) for a, b in zip(value, found[name], strict=False) if a != b]
                told = "" if name == "weights" else f": {len(found[name])} {unlike}"
                assert found[name] == value, f"{name} of run {finished} differ after {strikes}{told}"
            assert not list(folder.glob("checkpoint-*")) and (folder / "README.md").is_file()
            finished, strikes = finished + 1, []
            shutil.rmtree(folder.parent)
            pairs_of(folder).unlink()
    del where["open"]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m tests.soak", *sys.argv[1:]]),
        "strikes": dict(struck),
        "steps logged when struck": dict(where),
        "runs finished and equal": finished,
        "seconds of an uninterrupted run": round(seconds, 1),
        "seconds in all": round(time.monotonic() - began),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="file for the figures, as JSON")
    given = parser.parse_args()
    os.environ |= {"MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        result = json.dumps(soak(given.kills, given.seed, Path(scratch)), indent=1)
    print(result)
    if given.out:
        Path(given.out).write_text(result + "\n")
