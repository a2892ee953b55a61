"""Memory and time of reading, cleaning, encoding and splitting many pairs: the whole of `Run.load_pairs`.

    python -m tests.million --pairs 1000000

Each pair has a prompt of about 80 and answers of about 150 characters; one in twenty is a duplicate. Prints
one JSON object; memory is the process's peak, before (everything imported) and after.
"""

import argparse
import datetime
import json
import os
import resource
import tempfile
import time
from pathlib import Path


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    count = parser.parse_args().pairs
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lazyorpo_lib.run import Run
    from lazyorpo_lib.settings import resolve

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "pairs.jsonl"
        with open(file, "w") as lines:
            for n in range(count):
                number = n % (count * 19 // 20)
                row = {
                    "prompt": f"{number} " + "ask " * 18,
                    "chosen": f"{number} " + "good " * 28,
                    "rejected": "bad " * 36,
                }
                lines.write(json.dumps(row) + "\n")
        values = {
            "preset": "tiny",
            "dataset": str(file),
            "output_dir": f"{scratch}/run",
            "max_pairs": 0,
            "eval_pairs": 64,
        }
        run = Run(*resolve([("million", values)])[:2], show=lambda text: None)
        before, began = peak_gib(), time.monotonic()
        report = run.load_pairs()
        print(
            json.dumps(
                {
                    "date": datetime.date.today().isoformat(),
                    "pairs": count,
                    "report": str(report),
                    "train": len(run.train_pairs),
                    "peak_gib_before": before,
                    "peak_gib_after": peak_gib(),
                    "minutes": round((time.monotonic() - began) / 60, 2),
                }
            )
        )


if __name__ == "__main__":
    main()
