"""A file -> its rows, one at a time: JSON, tables in any encoding, parquet, sheets, and archives of these.

Read with the standard library (parquet and .zst with pyarrow, .xlsx with openpyxl), never whole, but for JSON
that is one value, and never more than `limits.py` allows. What had to be guessed is said.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from . import limits

MOST = f"{limits.ROW // limits.MIB} MiB, the most for a row"
LISTS = "data rows examples train records items instances pairs samples dataset".split()  # in one object
_CHINESE = re.compile(rb"[\xa1-\xa3\xb0-\xd7][\xa1-\xfe]")  # punctuation and common characters in GBK


def ending(path: Path) -> str:
    """Give the ending that says what a file is: ".csv" of a.csv.gz."""
    is_packed = path.suffix.lower() in (".gz", ".zst")
    return (Path(path.stem) if is_packed else path).suffix.lower()


def _open(path):
    """Open a file for reading bytes; an archive of it gives no more than it may unpack to."""
    kind = path.suffix.lower()
    if kind == ".gz":
        file = gzip.open(path)
    elif kind == ".zst":
        import pyarrow

        file = pyarrow.input_stream(str(path), compression="zstd")
    elif kind == ".zip":
        archive = zipfile.ZipFile(path)
        file = archive.open(_member(archive))
    else:
        return open(path, "rb")
    return io.BufferedReader(_Unpacked(file, path))


def _member(archive):
    names = [n for n in archive.namelist() if Path(n).suffix.lower() in READERS and n[:8] != "__MACOSX"]
    if len(names) != 1 or Path(names[0]).suffix.lower() not in OF_TEXT:
        found = ", ".join(map(repr, names[:5])) or "none"
        raise ValueError(f"an archive must hold one .jsonl, .json, .csv or .tsv file, not {found}: unpack it")
    return names[0]


def _most_unpacked(path):
    return max(limits.WHOLE, 100 * path.stat().st_size)  # text packs to a tenth or so


def _check_unpacked(size, most):
    if size > most:
        raise ValueError(f"it unpacks to more than {most // limits.MIB:,} MiB, too much for its size")


class _Unpacked(io.RawIOBase):
    """What an archive unpacks to, up to a limit."""

    def __init__(self, file, path):
        self.file, self.size, self.most = file, 0, _most_unpacked(path)

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.size += len(data)
        _check_unpacked(self.size, self.most)
        return len(data)

    def close(self):
        self.file.close()
        super().close()


def _short(number, line):
    if len(line) > limits.ROW:
        raise ValueError(f"line {number} is longer than {MOST}")
    return line


def json_rows(path, say) -> Iterator:
    """Read a JSON list, one JSON value a line, or one object with the rows inside."""
    with _open(path) as file:
        begin = file.readline(limits.ROW + 1).removeprefix(codecs.BOM_UTF8)
        lines = enumerate(itertools.chain([begin], iter(lambda: file.readline(limits.ROW + 1), b"")), 1)
        lines = ((number, line) for number, line in lines if line.strip())
        values, second = _first_values(*next(lines, (1, b"[]")), file), list(itertools.islice(lines, 1))
        yield from rows_inside(values[0]) if len(values) == 1 and not second else values
        for number, line in itertools.chain(second, lines):
            yield _json(_short(number, line).rstrip(), number)


def _first_values(number, line, file) -> list:
    """Give the first line's value, or that of the whole file if it is one; of a list all that is in it."""
    if line.lstrip().startswith(b"["):
        return _json(line + file.read(limits.WHOLE), number)
    try:
        return [_json(_short(number, line).rstrip(), number)]
    except ValueError:
        with contextlib.suppress(ValueError):  # one object over many lines, or over one long one
            value = _json(line + file.read(limits.WHOLE), number)
            if len(line) <= limits.ROW or next(rows_inside(value), None) is not value:
                return [value]
        raise


def rows_inside(value) -> Iterator:
    """Give the rows of a list, of an object with a list of them, of columns; or the value itself."""
    if isinstance(value, list):
        wrapped = {"row", "row_idx"}
        return (row["row"] if isinstance(row, dict) and wrapped <= row.keys() else row for row in value)
    cells = value if isinstance(value, dict) else {}
    named = [value[name] for name in cells if str(name).lower() in LISTS and isinstance(value[name], list)]
    names = cells.get("columns")
    if named and isinstance(names, list) and all(isinstance(row, list) for row in named[0]):
        return (dict(zip(names, row, strict=False)) for row in named[0])  # pandas' "split"
    if named and all(isinstance(row, dict) for row in named[0]):
        return rows_inside(named[0])
    if columns := _columns(cells):
        return (dict(zip(cells, parts, strict=True)) for parts in zip(*columns, strict=True))
    return iter([value])


def _columns(cells):
    """Give the columns of a table that is an object of lists, or of {number: cell}; [] if it is a row."""
    numbered = [isinstance(cell, dict) and all(str(key).isdigit() for key in cell) for cell in cells.values()]
    inner = [list(c.values()) if table else c for c, table in zip(cells.values(), numbered, strict=True)]
    is_table = all(isinstance(cell, list) for cell in inner) and len({*map(len, inner)}) == 1 < len(inner)
    firsts = [cell[0] for cell in inner if is_table and cell]
    is_talk = any(isinstance(first, dict) and {"role", "from"} & first.keys() for first in firsts)
    return inner if is_table and not is_talk else []


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


def table_rows(path, say) -> Iterator:
    """Read a table whose first line names its columns; encoding and separator are found, and said."""
    csv.field_size_limit(limits.ROW)  # 128 KiB are allowed by default
    with _open(path) as file:
        encoding = _encoding(file)
    with io.TextIOWrapper(_open(path), encoding=encoding, newline="") as file:
        lines = enumerate(iter(lambda: file.readline(limits.ROW + 1), ""), 1)
        lines = itertools.starmap(_short, lines)
        head = next(lines, "")
        separator = max("\t,;|" if ending(path) == ".tsv" else ",;\t|", key=head.count)
        if encoding != "utf-8-sig" or separator != ",":
            name = {"\t": "tabs", ",": "commas"}.get(separator, repr(separator))
            say(f"Read as {encoding.removesuffix('-sig')}, columns separated by {name}.")
        how = dict(strict=True, delimiter=separator, skipinitialspace=f"{separator} " in head)
        table = csv.DictReader(itertools.chain([head], lines), **how)
        try:
            yield from table
        except csv.Error as error:
            raise ValueError(f"line {table.line_num} is not valid CSV ({error})") from None


def _encoding(file) -> str:
    """Find out what a text is written in: UTF-8, else UTF-16, GBK or cp1252 by what its bytes look like."""
    decoder, high, begin = codecs.getincrementaldecoder("utf-8")(), [], b""
    while block := file.read(2**20):
        begin = begin or block[:4]
        if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        try:
            if decoder:
                decoder.decode(block)
        except UnicodeDecodeError:
            decoder = None
        high += re.findall(rb"[\x80-\xff]+", block) if not decoder and len(high) < 10**5 else []
    if decoder:
        return "utf-8-sig"
    runs = b"".join(high)
    cyrillic = max(sum(low <= byte < low + 32 for byte in runs) for low in (0xC0, 0xE0)) > 0.75 * len(runs)
    if len(runs) > 2.5 * len(high) and 2 * len(_CHINESE.findall(runs)) > 0.8 * len(runs) and not cyrillic:
        return "gb18030"
    if len(runs) <= 2.5 * len(high) and not re.search(rb"[\x81\x8d\x8f\x90\x9d]", runs):
        return "cp1252"
    raise ValueError("its text is not UTF-8, and nothing else that can be told: save it as UTF-8")


def sheet_rows(path, say) -> Iterator:
    """Read the first sheet of a workbook; its first row names the columns."""
    try:
        import openpyxl
    except ImportError:
        raise ValueError("a .xlsx needs openpyxl: pip install openpyxl, or save it as .csv") from None
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    _check_unpacked(size, _most_unpacked(path))
    with contextlib.closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
        rows = book.worksheets[0].iter_rows(values_only=True)
        names = [str(name) if name is not None else "" for name in next(rows, ())]
        if len(book.sheetnames) > 1:
            say(f"Read the first sheet, {book.sheetnames[0]!r}, of {len(book.sheetnames)}.")
        filled = (row for row in rows if any(cell is not None for cell in row))
        yield from (dict(zip(names, row, strict=False)) for row in filled)


def parquet_rows(path, say) -> Iterator:
    """Read a parquet file by 64 rows; a kilobyte of it may hold a gigabyte."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            batches = file.iter_batches(batch_size=64, use_threads=False)
            while True:
                with limits.memory():
                    batch = next(batches, None)
                    columns = [] if batch is None else list(map(_cells, batch.columns))
                if batch is None:
                    return
                sizes = map(batch.slice, range(len(batch)), itertools.repeat(1))
                if batch.nbytes > limits.ROW and max(one.nbytes for one in sizes) > limits.ROW:
                    raise ValueError(f"a row is longer than {MOST}")
                names = batch.schema.names
                yield from (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _cells(column):
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # times that Python has no number for, as after the year 9999
        return [None] * len(column)


OF_TEXT = dict.fromkeys((".jsonl", ".ndjson", ".json"), json_rows) | dict.fromkeys(
    (".csv", ".tsv"), table_rows
)
READERS = OF_TEXT | {".parquet": parquet_rows, ".xlsx": sheet_rows}


def reader_of(path: Path):
    """Give what reads a file with this name, `read(path, say)`; None where nothing does."""
    if path.suffix.lower() == ".zip":
        return lambda path, say: OF_TEXT[Path(_member(zipfile.ZipFile(path))).suffix.lower()](path, say)
    return (READERS if ending(path) == path.suffix.lower() else OF_TEXT).get(ending(path))
