"""Every file that people have is read as it is, what was guessed is said, and others get one sentence."""

import codecs
import gzip
import io
import json
import sys
import types
import urllib.request
import zipfile

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import clean
from lazyorpo_lib.rows import dataset
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.dataset import open_rows, written

PAIRS = [{"prompt": f"Why {n}?", "chosen": "Because, so.", "rejected": "No."} for n in range(3)]
COLUMNS = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def found(path):
    rows = open_rows(path)
    return [row for _, row in rows], list(rows.notes)


def table(separator=",", rows=PAIRS):
    quoted = ('"{prompt}"', '"{chosen}"', '"{rejected}"')
    lines = [separator.join(rows[0]), *(separator.join(quoted).format(**row) for row in rows)]
    return "\r\n".join(lines) + "\r\n"


# ---- tables


@pytest.mark.parametrize(("separator", "said"), [(";", "';'"), ("\t", "tabs"), ("|", "'|'")])
def test_tables_with_other_separators_are_read_and_it_is_said(tmp_path, separator, said):
    for name in ("a.csv", "a.tsv"):
        read, notes = found(write(tmp_path, name, table(separator)))
        assert read == PAIRS and notes == [f"Read as utf-8, columns separated by {said}."]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Größe? « Où ça » naïve €"), ("gb18030", "北京在哪里？在中国北方。"),
        ("utf-16", "Größe 北京 👍"), ("utf-8-sig", "Größe 北京 👍"), ("utf-8", "Größe 北京 👍"),
        ("gbk", "你好，请问 Python 是什么？"), ("cp1252", "l'été à la plage"),
    ],
)  # fmt: skip
def test_tables_in_other_encodings_are_read_and_it_is_said_which(tmp_path, encoding, text):
    rows = [{"prompt": text, "chosen": "Yes " + text, "rejected": "No"}] * 2
    read, notes = found(write(tmp_path, "a.csv", table(rows=rows).encode(encoding)))
    assert read == rows
    wanted = {"utf-8-sig": "", "utf-8": "", "gbk": "gb18030"}.get(encoding, encoding)
    assert notes == ([f"Read as {wanted}, columns separated by commas."] if wanted else [])


@pytest.mark.parametrize("encoding", ["cp1251", "shift_jis", "koi8-r"])
def test_an_encoding_that_cannot_be_told_is_one_sentence(tmp_path, encoding):
    text = "日本の首都はどこですか" if encoding == "shift_jis" else "Привет, как дела сегодня"
    path = write(tmp_path, "a.csv", table(rows=[dict.fromkeys(PAIRS[0], text)] * 3).encode(encoding))
    with pytest.raises(UserError, match="save it as UTF-8"):
        found(path)


def test_spaces_after_the_separators_of_a_header_are_not_part_of_the_cells(tmp_path):
    read, _ = found(write(tmp_path, "a.csv", "prompt, chosen, rejected\nWhy?, Yes, No\n"))
    assert read == [{"prompt": "Why?", "chosen": "Yes", "rejected": "No"}]


# ---- JSON in other layouts

LAYOUTS = {
    "data": {"version": 1, "data": PAIRS}, "rows": {"rows": PAIRS}, "examples": {"Examples": PAIRS},
    "columns": COLUMNS, "pandas": {name: dict(enumerate(cells)) for name, cells in COLUMNS.items()},
    "split": {"columns": list(COLUMNS), "index": [0, 1, 2], "data": [list(row.values()) for row in PAIRS]},
    "viewer": {"features": [], "rows": [{"row_idx": n, "row": row} for n, row in enumerate(PAIRS)]},
    "list": PAIRS,
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_inside_one_value_are_found(tmp_path, name, indent):
    for ending in ("json", "jsonl"):
        assert found(write(tmp_path, f"a.{ending}", json.dumps(LAYOUTS[name], indent=indent)))[0] == PAIRS


def test_a_lone_row_is_a_row(tmp_path):
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes"}]
    lone = [PAIRS[0], {"chosen": talk, "rejected": talk}, {"messages": talk, "rejected_response": "No"}]
    lone += [{"question": "Why?", "correct_answers": ["a", "b"], "incorrect_answers": ["c", "d"]}]
    for row in lone:
        assert found(write(tmp_path, "a.jsonl", json.dumps(row)))[0] == [row]


# ---- archives, sheets, folders


def test_an_object_of_rows_on_one_line_may_be_longer_than_a_row_may_be(tmp_path):
    long = {"prompt": "a" * 2**20}
    assert found(write(tmp_path, "a.json", json.dumps({"data": [long] * 5})))[0] == [long] * 5
    with pytest.raises(UserError, match="line 1 is longer than 4 MiB"):
        found(write(tmp_path, "a.json", json.dumps({"prompt": "a" * 5 * 2**20})))


def test_archives_are_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    text = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as file:
        file.write(text)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("readme.txt", "hello")
        file.writestr("train.jsonl", text)
    write(tmp_path, "a.tsv.gz", gzip.compress(table("\t").encode()))
    for name in ("a.jsonl.zst", "a.zip", "a.tsv.gz"):
        assert found(str(tmp_path / name))[0] == PAIRS


def test_a_zip_that_unpacks_to_much_or_holds_more_is_one_sentence(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.csv", b"prompt\n" + b"\n" * (260 * 2**20))
    with pytest.raises(UserError, match="unpacks to more than 256 MiB|has no rows"):
        found(str(tmp_path / "a.zip"))
    for names, said in ((["a.csv", "b.csv"], "not 'a.csv', 'b.csv': unpack it"), (["x.txt"], "not none")):
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
            for name in names:
                file.writestr(name, "prompt\nWhy?\n")
        with pytest.raises(UserError, match=said):
            found(str(tmp_path / "b.zip"))
    with pytest.raises(UserError, match="cannot be read"):
        found(write(tmp_path, "c.zip", "no zip"))


class Book:
    """As much of openpyxl's workbook as is asked."""

    sheetnames = ("Pairs", "Notes")

    def __init__(self):
        lines = [tuple(COLUMNS), *(tuple(row.values()) for row in PAIRS), (None, None, None)]
        self.worksheets = [types.SimpleNamespace(iter_rows=lambda values_only: iter(lines))]

    def close(self):
        pass


def test_the_first_sheet_of_a_workbook_is_read_where_openpyxl_is_there(tmp_path, monkeypatch):
    path = tmp_path / "a.xlsx"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("xl/workbook.xml", "<x/>")
    stub = types.SimpleNamespace(load_workbook=lambda path, **options: Book())
    monkeypatch.setitem(sys.modules, "openpyxl", stub)
    assert found(str(path)) == (PAIRS, ["Read the first sheet, 'Pairs', of 2."])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match="pip install openpyxl, or save it as .csv"):
        found(str(path))


def test_a_folder_of_parts_is_read_in_order(tmp_path):
    for n, row in enumerate(PAIRS):
        write(tmp_path, f"parts/train-0000{n}.jsonl", json.dumps(row))
    write(tmp_path, "parts/README.md", "about")
    read, notes = found(str(tmp_path / "parts"))
    assert read == PAIRS and notes == [
        "Read 3 files of the folder, from train-00000.jsonl to train-00002.jsonl."
    ]
    write(tmp_path, "parts/other.csv", table())
    with pytest.raises(UserError, match=r"files of 2 kinds \(.csv, .jsonl\): name one file"):
        found(str(tmp_path / "parts"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="a folder with no such file"):
        found(str(tmp_path / "empty"))


# ---- where it is


def test_a_missing_file_names_those_near_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "PLACES", ("", str(tmp_path / "drive")))
    write(tmp_path, "my_pairs.jsonl", "{}")
    write(tmp_path, "drive/MyDrive/others.csv", table())
    write(tmp_path, "script.py", "")
    with pytest.raises(UserError, match="does not exist: .*; near by are 'my_pairs.jsonl', .*others.csv"):
        open_rows("my_pair.json")
    assert len(found("MyDrive/others.csv")[0]) == 3


def answer(monkeypatch, content, kind="text/plain"):
    class Answer(io.BytesIO):
        headers = {"Content-Type": kind}

    def urlopen(address, timeout):
        if isinstance(content, Exception):
            raise content
        return Answer(content)

    dataset._fetched.cache_clear()
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_an_https_address_is_fetched_once_and_read(monkeypatch):
    answer(monkeypatch, table().encode())
    address = "https://user:hf_PLANTEDsecret@example.org/data/pairs.csv?token=PLANTED"
    rows = open_rows(address)
    assert rows.name == "https://example.org/data/pairs.csv"
    answered = [row for _, row in rows]
    assert answered == [row for _, row in rows] == PAIRS


@pytest.mark.parametrize(
    ("address", "content", "said"),
    [
        ("https://example.org/pairs.csv", b"<html>", "answers with a web page: give the address of the file"),
        ("https://example.org/pairs.csv", OSError(-2, "Name or service not known"), "cannot be fetched"),
        ("https://example.org/pairs.csv", TimeoutError(), "cannot be fetched"),
        ("https://example.org/blob/main", b"", "must be the https address of a file"),
        ("http://example.org/pairs.csv", b"", "must be the https address of a file"),
    ],
)
def test_an_address_that_gives_no_file_is_one_sentence(monkeypatch, address, content, said):
    answer(monkeypatch, content, "text/html; charset=utf-8")
    with pytest.raises(UserError, match=said) as caught:
        open_rows(address + "?sig=PLANTED")
    assert "PLANTED" not in str(caught.value) and "\n" not in str(caught.value)


# ---- what a notebook holds


class Frame:
    """As much of a DataFrame as is asked."""

    columns = tuple(COLUMNS)

    def to_dict(self, way):
        assert way == "records"
        return [dict(row) for row in PAIRS]


@pytest.mark.parametrize(
    "value", [PAIRS, tuple(PAIRS), Frame(), COLUMNS, iter(PAIRS)], ids=lambda value: type(value).__name__
)
def test_rows_in_a_variable_are_written_beside_the_notebook_once(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    path = written(value)
    assert found(path)[0] == PAIRS and path == written(PAIRS)
    assert [file.name for file in tmp_path.iterdir()] == [path]
    assert len(list(clean(candidates(open_rows(path)))[0])) == 3


def test_a_dataset_of_the_hubs_library_is_taken(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    table = datasets.Dataset.from_list(PAIRS)
    assert written(table) == written(datasets.DatasetDict({"train": table})) == written(PAIRS)
    table.save_to_disk(tmp_path / "saved")
    assert found(str(tmp_path / "saved"))[0] == PAIRS
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read after 0 rows: .*; mend it or fetch it again"):
        found(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    "value", [5, [], [1, 2], ["a"], object(), {}], ids=lambda value: type(value).__name__
)
def test_what_is_no_rows_is_one_sentence(value):
    with pytest.raises(UserError, match="give a list of dicts, a DataFrame, a Dataset or a name"):
        written(value)


def test_byte_order_marks_do_not_become_part_of_a_name(tmp_path):
    read, _ = found(write(tmp_path, "a.csv", codecs.BOM_UTF8 + table().encode()))
    assert read == PAIRS
