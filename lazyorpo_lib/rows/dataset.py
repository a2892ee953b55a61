"""A dataset's name -> its rows, one at a time; `candidates.py` judges them.

A file (see files.py), a folder of files, an https address of one, what a notebook holds in a variable, or a
hub dataset, which comes through `datasets` with its cache; no code of a dataset is ever run.
"""

import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import UserError, around, dissect, explain_hub
from ..marker import write_atomically
from . import files, limits

DEMO = Path(__file__).parents[1] / "demo" / "pairs.jsonl"
PLACES = ("", "/", "/content", "/content/drive", "/content/drive/MyDrive", "/kaggle/input", "/workspace")
DOWNLOAD = 2048 * limits.MIB
ENDINGS = ".jsonl, .json, .csv, .tsv (or one of these with .gz, .zst, .zip), .parquet or .xlsx"


@dataclass(frozen=True)
class Rows:
    """(index, row) tuples, read anew at each iteration. Raises UserError where the dataset cannot be read."""

    name: str
    read: Callable[[Callable], Iterable]  # is given what it calls with each sentence that it has to say
    max_rows: int = 0
    notes: dict = field(default_factory=dict)  # {what was said while reading: None}

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        index = -1
        try:
            rows = self.read(self.notes.setdefault)
            for index, row in enumerate(itertools.islice(rows, self.max_rows or None)):
                yield index, row
        except UserError:
            raise
        except MemoryError:
            way_out = "set max_pairs, or give it as .jsonl"
            raise UserError(f"Dataset {self.name} takes more memory than there is: {way_out}.") from None
        except (Exception, limits.OverLimit) as error:  # each library that reads has its own
            fault = f"cannot be read after {index + 1} rows: {dissect(error)[-1]}"
            raise UserError(f"Dataset {self.name} {fault}; mend it or fetch it again.") from error
        if index < 0:
            raise UserError(f"Dataset {self.name} has no rows: give one that holds preference pairs.")


def open_rows(dataset: str, *, max_rows: int = 0) -> Rows:
    """Give the rows, at most `max_rows` unless it is 0, of "demo", of a local file (ENDINGS) or a folder of
    such, of an https address of one, or of a hub dataset: "owner/name", "owner/name:split" or
    "owner/name:config:split"; without a split: train, else the one most like it."""
    if re.match("https?://", dataset):
        return _file_rows(*_fetched(dataset), max_rows)
    path = DEMO if dataset == "demo" else _found(dataset)
    if path is not None:
        return (_folder_rows if path.is_dir() else _file_rows)(dataset, path, max_rows)
    is_file = files.reader_of(Path(dataset)) and len(dataset) < 4096
    if is_file or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", dataset):
        ways = f"give demo, a hub id (owner/name) or a file, {ENDINGS}"
        raise UserError(f"Dataset {dataset!r} does not exist: {ways}{_near(dataset)}.")
    table, name = _hub_table(dataset)
    return Rows(name, lambda say: iter(table), max_rows)


def _found(dataset: str) -> Path | None:
    """Give the file or folder of that name: here, or where Colab, Drive, Kaggle and RunPod have theirs."""
    paths = (Path(place, os.path.expanduser(dataset)) for place in PLACES)
    return next((path for path in paths if os.path.exists(path) and dataset.strip()), None)


def _near(dataset: str) -> str:
    """Say which files are near by, those with the most similar names first."""
    found = {}
    for place in (Path(place) for place in PLACES if place != "/"):
        with contextlib.suppress(OSError):
            listed = itertools.islice(itertools.chain(place.glob("*.*"), place.glob("*/*.*")), 1000)
            found |= {str(path): path.name for path in listed if files.reader_of(path)}
    wanted = Path(dataset).name.lower()
    near = sorted(found, key=lambda path: -difflib.SequenceMatcher(None, wanted, found[path].lower()).ratio())
    return f"; near by are {', '.join(map(repr, near[:5]))}" if near else ""


def _file_rows(name, path, max_rows) -> Rows:
    if not os.path.isfile(path):  # reading a pipe or a device would wait for ever, or never end
        raise UserError(f"Dataset {name!r} is a pipe, a device or a socket: give a file, {ENDINGS}.")
    if not (reader := files.reader_of(path)):
        raise UserError(f"Dataset {name!r} has an unknown ending: give a file that is {ENDINGS}.")
    return Rows(name, lambda say: reader(path, say), max_rows)


def _folder_rows(name, path, max_rows) -> Rows:
    """Give the rows of all files of a folder, in the order of their names."""
    if any((path / state).exists() for state in ("state.json", "dataset_dict.json")):

        def saved(say):
            import datasets

            table = datasets.load_from_disk(str(path))
            return table.get("train", next(iter(table.values()))) if isinstance(table, dict) else table

        return Rows(name, saved, max_rows)
    parts = sorted(part for part in path.iterdir() if part.is_file() and files.reader_of(part))
    endings = {files.ending(part) for part in parts}
    if len(endings) != 1:
        held = f"files of {len(endings)} kinds ({', '.join(sorted(endings))})" if endings else "no such file"
        raise UserError(f"Dataset {name!r} is a folder with {held}: name one file in it, {ENDINGS}.")

    def read(say):
        say(f"Read {len(parts)} files of the folder, from {parts[0].name} to {parts[-1].name}.")
        for part in parts:
            yield from files.reader_of(part)(part, say)

    return Rows(name, read, max_rows)


@functools.lru_cache(8)
def _fetched(address: str) -> tuple[str, Path]:
    """Fetch a file once for this process; gives its address without what may be secret, and the file."""
    parts = urlsplit(address)
    name = f"{parts.scheme}://{parts.hostname}{parts.path}"
    if parts.scheme != "https" or not files.reader_of(Path(parts.path)):
        raise UserError(f"Dataset {name!r} must be the https address of a file that is {ENDINGS}.")
    path = Path(tempfile.mkdtemp(prefix="lazyorpo-")) / Path(parts.path).name
    with _not_fetched(name), urllib.request.urlopen(address, timeout=30) as answer, open(path, "wb") as file:
        if "html" in answer.headers.get("Content-Type", ""):
            why = "answers with a web page: give the address of the file itself (raw, download)"
            raise UserError(f"Dataset {name!r} {why}, or download it and give the file.")
        while block := answer.read(2**20):
            if file.tell() > DOWNLOAD:
                raise OSError(0, f"it has more than {DOWNLOAD // limits.MIB:,} MiB")
            file.write(block)
    return name, path


@around
def _not_fetched(error: Exception, name: str) -> str:
    why = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return f"Dataset {name!r} cannot be fetched ({why}): download it, and give the file."


def written(value) -> str:
    """Write rows that a notebook holds (a list of dicts, a DataFrame, a `datasets.Dataset`) to a file here,
    named after what is in it, if it is not there yet; gives its name."""
    kind = type(value).__name__
    if hasattr(value, "keys") and hasattr(value, "num_rows"):  # a DatasetDict
        value = value["train"] if "train" in value else next(iter(value.values()))
    if hasattr(value, "columns"):  # a DataFrame, of pandas or of polars
        value = value.to_dicts() if hasattr(value, "to_dicts") else value.to_dict("records")
    try:
        rows = list(files.rows_inside(value) if isinstance(value, dict) else value)
    except TypeError:
        rows = []
    if not rows or not all(isinstance(row, dict) and row for row in rows):
        ways = "a list of dicts, a DataFrame, a Dataset or a name"
        raise UserError(f"dataset is a {kind} without rows: give {ways}.")
    how = dict(default=lambda cell: cell.tolist() if hasattr(cell, "tolist") else str(cell))  # NumPy, a date
    text = "".join(json.dumps(row, **how) + "\n" for row in rows).encode()
    name = f"rows-{hashlib.sha256(text).hexdigest()[:12]}.jsonl"
    if not os.path.exists(name):
        write_atomically(name, text)
    return name


def _hub_table(dataset):
    import datasets  # a second of importing that files do without

    repo, *rest = dataset.split(":")
    try:
        splits = datasets.load_dataset(repo, rest[0] if len(rest) == 2 else None)
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own
        why = explain_hub(error, f"datasets/{repo}", f"a local file ({ENDINGS}), or choose demo")
        text = dissect(error)[-1]
        if "scripts are no longer supported" in text:
            why = "is made by a script, and no code of a dataset is ever run: give its export to .parquet"
        why = why or f"cannot be loaded: {text}; write owner/name:config:split, or give a local file"
        raise UserError(f"Dataset {dataset!r} {why}.") from None  # their texts may hold a token
    likely = [name for name in splits if name.startswith("train")] or ["train"]
    split = rest[-1] if rest else min(likely, key=lambda name: (name != "train", "pref" not in name))
    if split not in splits:
        known = f"write {repo}:SPLIT with one of {', '.join(splits)}"
        raise UserError(f"Dataset {repo!r} has no split {split!r}: {known}.")
    return splits[split], ":".join([repo, *rest[:-1], split])
