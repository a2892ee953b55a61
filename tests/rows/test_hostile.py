"""Files that were made to hurt take a bounded time and memory, and end in one sentence."""

import gzip
import json
import os
import socket
import subprocess
import sys

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import json_safe
from lazyorpo_lib.rows import limits
from lazyorpo_lib.rows.dataset import open_rows

ROW = b'{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}\n'
MUCH = 300 * 2**20
READ = """
import resource, sys
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.rows.dataset import open_rows
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    rows = sum(1 for _ in open_rows(sys.argv[1]))
except UserError as error:
    rows = error
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, rows)
"""


def read_alone(path):
    """MiB that reading added to a process of its own, and what was said."""
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=60)
    mib, said = done.stdout.split(maxsplit=1)
    return int(mib), said


BOMBS = {
    "one line.jsonl.gz": (b'{"prompt": "' + b"a" * MUCH, "line 1 is longer than 4 MiB"),
    "one cell.csv.gz": (b'prompt,chosen\n"' + b"a\n" * (MUCH // 2), "unpacks to more than 256 MiB"),
    "one header.csv.gz": (b"a," * (MUCH // 2), "unpacks to more than 256 MiB"),
    "a list.json.gz": (b"[" + b"[]," * (MUCH // 3), "a JSON list may have 256 MiB|unpacks to more than"),
    "small lists.json.gz": (b"[" + b"[]," * (50 * 2**20) + b"[]]", "1,024 MiB of memory at once"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_unpacks_to_much_is_one_sentence_and_bounded_memory(tmp_path, name):
    content, sentence = BOMBS[name]
    (tmp_path / name).write_bytes(gzip.compress(content, 1))
    mib, said = read_alone(str(tmp_path / name))
    assert mib < 1500
    assert any(words in said for words in sentence.split("|")), said


def test_an_archive_may_unpack_to_a_hundred_times_its_size_and_no_more(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(packed := gzip.compress(ROW * 20_000))
    assert len(list(open_rows(str(tmp_path / "a.jsonl.gz")))) == 20_000
    assert len(ROW) * 20_000 > 100 * len(packed)
    monkeypatch.setattr(limits, "WHOLE", 2**19)
    with pytest.raises(UserError, match="unpacks to more than 0 MiB"):
        list(open_rows(str(tmp_path / "a.jsonl.gz")))


def test_a_cell_or_a_line_of_a_table_that_is_longer_than_a_row_may_be_is_one_sentence(tmp_path):
    path = tmp_path / "a.csv"
    head = b"prompt,chosen\n"
    for content in (head + b'"' + b"a\n" * 2**22 + b'",b', head + b"a" * 2**23, b"a," * 2**22):
        path.write_bytes(content)
        with pytest.raises(UserError, match="longer than 4 MiB|field larger than field limit"):
            list(open_rows(str(path)))


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("texts", [["a" * 2**30], ["a" * 8 * 2**20] * 128, ["b"] * 100 + ["a" * 5 * 2**20]])
def test_a_parquet_of_a_kilobyte_cannot_take_a_gigabyte(tmp_path, texts, dictionary):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = str(tmp_path / "a.parquet")
    how = dict(compression="zstd", use_dictionary=dictionary, write_statistics=False)
    pq.write_table(pa.table({"prompt": texts}), path, **how)
    assert os.path.getsize(path) < 2**17
    mib, said = read_alone(path)
    assert mib < 1500
    assert "MiB, the most for a row" in said or "1,024 MiB of memory at once" in said


def test_a_time_that_python_cannot_hold_is_read_as_nothing_there(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    row = json.loads(ROW)
    table = {name: [text] for name, text in row.items()} | {
        "us": pa.array([2**62], pa.timestamp("us")),
        "zone": pa.array([2**62], pa.timestamp("us", "UTC")),
        "inside": pa.array([{"at": 2**62}], pa.struct([("at", pa.timestamp("us"))])),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    [(_, found)] = open_rows(str(tmp_path / "a.parquet"))
    assert {name: found[name] for name in row} == row and found["us"] is None


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink(tmp_path / "pipe.jsonl", tmp_path / "link.csv")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.parquet"))
        for name in ("pipe.jsonl", "link.csv", "socket.parquet", "/dev/zero", "/dev/stdin"):
            with pytest.raises(UserError, match="is a pipe, a device or a socket: give a file"):
                open_rows(str(tmp_path / name))


def test_a_text_in_the_list_of_dropped_rows_is_cut():
    assert json_safe("a" * 65536) == "a" * 65536
    assert json_safe({"x": ["a" * 10**6]}) == {"x": ["a" * 65536 + "… (1,000,000 characters)"]}


# ---- the limits themselves


def test_a_block_is_ended_after_its_seconds_and_what_follows_is_not():
    with pytest.raises(limits.OverLimit, match=r"takes longer than 0\.1 seconds"), limits.seconds(0.1):
        try:
            while True:
                pass
        except Exception:
            pytest.fail("nobody on the way may take it for their own fault")
    with limits.seconds(60):
        sum(range(1000))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system keeps no such limit")
def test_a_block_adds_no_more_than_its_memory_and_the_limit_ends_with_it():
    with pytest.raises(limits.OverLimit, match="needs more than 64 MiB"), limits.memory(64 * 2**20):
        b"a" * 2**28
    assert len(b"a" * 2**28) == 2**28
