"""A file or a hub dataset -> its rows, one at a time; `data.py` judges them.

Files are read with the standard library (parquet with pyarrow), never whole, but for a .json that is one
list. A hub dataset comes through `datasets`, with its cache; no code of a dataset is ever run.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, dissect, explain_hub
from . import limits

DEMO = Path(__file__).parents[1] / "demo" / "pairs.jsonl"
_UNREADABLE = OSError, EOFError, ValueError, OverflowError, csv.Error, zlib.error, limits.OverLimit
_MOST = f"{limits.ROW // limits.MIB} MiB, the most for a row"
ENDINGS = ".jsonl, .json, .csv (or one of these with .gz) or .parquet"


@dataclass(frozen=True)
class Rows:
    """(index, row) tuples, read anew at each iteration. Raises UserError where the dataset cannot be read."""

    name: str
    read: Callable[[], Iterable]
    max_rows: int = 0

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        index = -1
        try:
            for index, row in enumerate(itertools.islice(self.read(), self.max_rows or None)):
                yield index, row
        except _UNREADABLE as error:
            fault = f"cannot be read after {index + 1} rows: {dissect(error)[-1]}"
            raise UserError(f"Dataset {self.name} {fault}; mend it or fetch it again.") from error
        if index < 0:
            raise UserError(f"Dataset {self.name} has no rows: give one that holds preference pairs.")


def open_rows(dataset: str, *, max_rows: int = 0) -> Rows:
    """Give the rows of "demo", of a local file (ENDINGS), or of a hub dataset: "owner/name",
    "owner/name:split" or "owner/name:config:split". Without a split: train, else the one most like it.

    Args:
        max_rows: read at most so many; 0 reads all.

    Raises:
        UserError: no such dataset, or it cannot be read; a file is first opened when it is iterated.
    """
    path = DEMO if dataset == "demo" else Path(os.path.expanduser(dataset))
    is_packed = path.suffix.lower() == ".gz"
    reader = READERS.get("".join(path.suffixes[-2 if is_packed else -1 :]).lower())
    if os.path.isdir(path):
        raise UserError(f"Dataset {dataset!r} is a folder: name one file in it, {ENDINGS}.")
    if os.path.exists(path):
        if not os.path.isfile(path):  # reading a pipe or a device would wait for ever, or never end
            raise UserError(f"Dataset {dataset!r} is a pipe, a device or a socket: give a file, {ENDINGS}.")
        if not reader:
            raise UserError(f"Dataset {dataset!r} has an unknown ending: give a file that is {ENDINGS}.")
        return Rows(dataset, lambda: reader(path), max_rows)
    if reader or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", dataset):
        ways = f"give demo, a hub id (owner/name) or a file, {ENDINGS}"
        raise UserError(f"Dataset {dataset!r} does not exist: {ways}.")
    table, name = _hub_table(dataset)
    return Rows(name, lambda: iter(table), max_rows)


def _open(path):
    """Open a file for reading bytes; an archive of it gives no more than it may unpack to."""
    if path.suffix.lower() != ".gz":
        return open(path, "rb")
    return io.BufferedReader(_Unpacked(gzip.open(path), limits.unpacked(path.stat().st_size)))


class _Unpacked(io.RawIOBase):
    """What an archive unpacks to, up to a limit."""

    def __init__(self, file, most):
        self.file, self.left, self.most = file, most, most

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.file.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise ValueError(
                f"it unpacks to more than {self.most // limits.MIB:,} MiB, too much for its size"
            )
        return count

    def close(self):
        self.file.close()
        super().close()


def _lines(readline):
    """Give what `readline(size)` gives, numbered from 1, up to a line that is too long for a row."""
    for number in itertools.count(1):
        if not (line := readline(limits.ROW + 1)):
            return
        yield number, line
        if len(line) > limits.ROW:
            raise ValueError(f"line {number} is longer than {_MOST}")


def _json_rows(path):
    """Read a JSON list, or one JSON value a line: its first character tells."""
    with _open(path) as file:
        first = True
        for number, line in _lines(file.readline):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if first and line.lstrip().startswith(b"["):
                yield from _json(line + file.read(limits.WHOLE), number)
            elif line.strip() and len(line) <= limits.ROW:
                yield _json(line.rstrip(), number)
                first = False


def _json(data, number):
    """Read the value in `data`, which starts on line `number`."""
    if len(data) > limits.WHOLE:
        most = f"{limits.WHOLE // limits.MIB} MiB"
        raise ValueError(f"a JSON list may have {most}: write one object on each line")
    try:
        with limits.memory() if len(data) > limits.ROW else contextlib.nullcontext():
            return json.loads(data.decode())
    except UnicodeDecodeError as error:
        line, fault = number + data.count(b"\n", 0, error.start), "is not UTF-8 text"
    except json.JSONDecodeError as error:
        line, fault = number + error.lineno - 1, f"is not valid JSON at column {error.colno} ({error.msg})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; too deep brackets
        line, fault = number, f"cannot be parsed ({error})"
    raise ValueError(f"line {line} {fault}, where a file must be a JSON list or one JSON object on each line")


def _csv_rows(path):
    csv.field_size_limit(limits.ROW)  # 128 KiB are allowed by default
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader((line for _, line in _lines(file.readline)), strict=True)
        try:
            if len(names := table.fieldnames or []) == 1 and re.search(r"[;\t|]", names[0]):
                why = "and columns must be separated by commas"
                raise ValueError(f"its one column is called {names[0]!r}, {why}")
            yield from table
        except csv.Error as error:
            raise ValueError(f"line {table.line_num} is not valid CSV ({error})") from None


def _parquet_rows(path):
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            batches = file.iter_batches(batch_size=64, use_threads=False)
            while True:
                with limits.memory():  # a kilobyte of it may hold a gigabyte
                    batch = next(batches, None)
                    columns = [] if batch is None else list(map(_cells, batch.columns))
                if batch is None:
                    return
                sizes = map(batch.slice, range(len(batch)), itertools.repeat(1))
                if batch.nbytes > limits.ROW and max(one.nbytes for one in sizes) > limits.ROW:
                    raise ValueError(f"a row is longer than {_MOST}")
                names = batch.schema.names
                yield from (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _cells(column):
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # times that Python has no number for, as after the year 9999
        return [None] * len(column)


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
READERS |= {f"{ending}.gz": READERS[ending] for ending in (".jsonl", ".json", ".csv")}


def _hub_table(dataset):
    import datasets  # a second of importing that files do without

    repo, *rest = dataset.split(":")
    try:
        splits = datasets.load_dataset(repo, rest[0] if len(rest) == 2 else None)
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own
        why = explain_hub(error, f"datasets/{repo}", f"a local file ({ENDINGS}), or choose demo")
        text = dissect(error)[-1]
        if "scripts are no longer supported" in text:
            why = "is made by a script, and no code of a dataset is ever run"
            why += ": export it to .parquet and give that"
        why = why or f"cannot be loaded: {text}; write owner/name:config:split, or give a local file"
        raise UserError(f"Dataset {dataset!r} {why}.") from None  # their texts may hold a token
    likely = [name for name in splits if name.startswith("train")] or ["train"]
    split = rest[-1] if rest else min(likely, key=lambda name: (name != "train", "pref" not in name))
    if split not in splits:
        known = f"write {repo}:SPLIT with one of {', '.join(splits)}"
        raise UserError(f"Dataset {repo!r} has no split {split!r}: {known}.")
    return splits[split], ":".join([repo, *rest[:-1], split])
