"""Files and hub datasets are read as they are, twice alike; what cannot be read is one sentence."""

import gzip
import json
import os
import sys
from types import SimpleNamespace

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import clean
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.dataset import open_rows

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
TEXT = "".join(json.dumps(GOOD | {"prompt": f"Why {n}?"}) + "\n" for n in range(3))
LIST = json.dumps([json.loads(line) for line in TEXT.splitlines()], indent=1)
TABLE = "prompt,chosen,rejected\r\n" + "".join(f'Why {n}?,"Because, ""so"".\n",No.\r\n' for n in range(3))


def write(folder, name, content):
    path = folder / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", TEXT), ("a.jsonl", TEXT.replace("\n", "\r\n\r\n")), ("a.json", LIST), ("a.json", TEXT),
    ("a.JSON", "\n " + LIST),
     ("a.csv", TABLE), ("a.jsonl.gz", TEXT), ("a.json.gz", LIST), ("a.csv.gz", TABLE),
     ("v1.2.jsonl", TEXT.rstrip())],
)  # fmt: skip
def test_files_are_read_twice_alike(tmp_path, name, content, bom):
    found = open_rows(write(tmp_path, name, bom + content))
    assert [(index, row["prompt"]) for index, row in found] == [(n, f"Why {n}?") for n in range(3)]
    assert list(found) == list(found)
    assert len(list(clean(candidates(found))[0])) == 3
    assert len(list(open_rows(found.name, max_rows=2))) == 2


def _talk(asked, said):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def test_parquet_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    many = [
        {"chosen": _talk(f"Why {n}?", "Yes"), "rejected": _talk(f"Why {n}?", "No"), "score": None}
        for n in range(1000)
    ]
    pq.write_table(pa.Table.from_pylist(many), tmp_path / "a.parquet")
    pairs, report = clean(candidates(open_rows(str(tmp_path / "a.parquet"))))
    assert [pair.prompt[0]["content"] for pair in pairs] == [f"Why {n}?" for n in range(1000)]


def test_a_csv_cell_may_hold_a_megabyte(tmp_path):
    [(_, row)] = open_rows(write(tmp_path, "a.csv", "prompt,chosen,rejected\nWhy?," + "x" * 2**20 + ",No.\n"))
    assert len(row["chosen"]) == 2**20


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", "", "has no rows"), ("a.json", "[]", "has no rows"),
        ("a.csv", "prompt,chosen,rejected\n", "has no rows"),
        ("a.csv", "", "has no rows"), ("a.jsonl.gz", "", "has no rows"),
        ("a.json", "\ufeff \n", "has no rows"),
        ("a.jsonl", TEXT + '{"prompt": "Wh', "after 3 rows: line 4 is not valid JSON"),
        ("a.jsonl", TEXT + "\n{prompt: 1}\n", "line 5 is not valid JSON at column 2"),
        ("a.json", LIST[:-20], "after 0 rows: line [0-9]+ is not valid JSON"),
        ("a.json", LIST + "x", "line [0-9]+ is not valid JSON at column 2"),
        ("a.json", json.dumps(GOOD, indent=1)[:-1],
            "line 1 is not valid JSON .* must be a JSON list or one JSON object"),
        ("a.jsonl", b'{"prompt": "Why?"}\n{"prompt": "\xff"}\n', "after 1 rows: line 2 is not UTF-8 text"),
        ("a.json", b'[\n{"prompt": "\xff"}]\n', "line 2 is not UTF-8 text"),
        ("a.jsonl", TEXT.encode("utf-16"), "line 1 is not UTF-8 text"),
        ("a.jsonl", "[" * 100_000, "line 1 cannot be parsed"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1 cannot be parsed"),
        ("a.csv", TABLE + '"never closed', "after 3 rows: line 7 is not valid CSV"),
        ("a.csv", TABLE.encode("utf-16")[:-1], "truncated data"),
        ("a.csv", "prompt\nприветствие".encode("cp1251"), "nothing else that can be told: save it as UTF-8"),
        ("a.parquet", "", "cannot be read after 0 rows"),
        ("a.parquet", "PAR1 but no more", "cannot be read after 0 rows"),
    ],
)  # fmt: skip
def test_bad_file_is_one_sentence(tmp_path, name, content, sentence):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=sentence) as caught:
        clean(candidates(open_rows(path)))
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_gz_that_is_cut_or_is_none_is_one_sentence(tmp_path):
    whole = gzip.compress(os.urandom(10_000).hex().encode())
    for content in (whole[:-4000], whole[:10] + b"\xff" * 3000, TEXT.encode()):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read after 0 rows"):
            list(open_rows(str(tmp_path / "a.jsonl.gz")))


def test_broken_parquet_is_one_sentence(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [os.urandom(50).hex() for _ in range(2000)]}), path)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:1000] + bytes(1000) + whole[2000:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="cannot be read after"):
            list(open_rows(str(path)))


def test_names_that_are_no_dataset_are_refused_without_the_network(tmp_path):
    for name, sentence in [
        ("prefs.jsonl", "does not exist"), ("fast", "does not exist"), ("", "does not exist"),
        ("a b/c", "does not exist"),
        ("a/b:c:d:e", "does not exist"), (str(tmp_path), "is a folder"), ("x" * 5000, "does not exist"),
        ("\0", "does not exist"),
        (write(tmp_path, "a.txt", TEXT), "unknown ending"), (write(tmp_path, "a.gz", TEXT), "unknown ending"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            open_rows(name)


# ---- the hub


def hub(monkeypatch, answer):
    asked = []

    def load_dataset(*given, **named):
        asked.append(given)
        assert "trust_remote_code" not in named
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub_dataset_split_and_config(monkeypatch):
    asked = hub(monkeypatch, {"test": [{"n": 0}], "train": [{"n": 1}, {"n": 2}]})
    assert list(open_rows("own.er/na-me")) == [(0, {"n": 1}), (1, {"n": 2})]
    assert list(open_rows("own.er/na-me:test", max_rows=5)) == [(0, {"n": 0})]
    assert list(open_rows("own.er/na-me:en:test")) == [(0, {"n": 0})]
    assert asked == [("own.er/na-me", None), ("own.er/na-me", None), ("own.er/na-me", "en")]
    with pytest.raises(UserError, match="no split 'dev': write own.er/na-me:SPLIT with one of test, train"):
        open_rows("own.er/na-me:dev")


def test_hub_split_like_train_is_taken_and_named(monkeypatch):
    hub(monkeypatch, {"train_sft": [{"n": 0}], "train_prefs": [{"n": 1}], "test_prefs": [{"n": 2}]})
    found = open_rows("owner/name")
    assert (found.name, list(found)) == ("owner/name:train_prefs", [(0, {"n": 1})])
    hub(monkeypatch, {"test": [], "validation": []})
    with pytest.raises(UserError, match="no split 'train'.*test, validation"):
        open_rows("owner/name")


def http_error(kind, status):
    import huggingface_hub.errors as errors

    error = getattr(errors, kind).__new__(getattr(errors, kind))
    error.args, error.response = ("token hf_PLANTEDsecret refused",), SimpleNamespace(status_code=status)
    return error


def hub_errors():
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    gated = DatasetNotFoundError(
        "Dataset 'o/n' is a gated dataset on the Hub. You must be authenticated to access it."
    )
    missing = DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed.")
    missing.__cause__ = http_error("RepositoryNotFoundError", 401)
    slow = RuntimeError("hf_PLANTEDsecret")
    slow.__context__ = TimeoutError()
    return [
        (gated, "ask for access at https://huggingface.co/datasets/o/n and set HF_TOKEN"),
        (http_error("GatedRepoError", 403), "ask for access"),
        (http_error("HfHubHTTPError", 401), "set HF_TOKEN"),
        (missing, "not on the hub: check the name"),
        (http_error("HfHubHTTPError", 404), "not on the hub: check the name"),
        (http_error("HfHubHTTPError", 429), "too many requests"),
        (http_error("HfHubHTTPError", 503), "cannot be reached"),
        (ConnectionError("Couldn't reach 'o/n' on the Hub"), "cannot be reached: check the network"),
        (OfflineModeIsEnabled("offline"), "choose demo"),
        (LocalEntryNotFoundError("not cached"), "cannot be reached"),
        (slow, "cannot be reached"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found n.py"),
            "no code of a dataset is ever run",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['a', 'b'] hf_PLANTEDsecret"),
            "among: .'a', 'b'.",
        ),
        (OSError(28, "No space left on device"), "No space left on device"),
    ]


def test_hub_failure_is_one_sentence_with_the_way_out_and_no_token(monkeypatch):
    for error, sentence in hub_errors():
        hub(monkeypatch, error)
        with pytest.raises(UserError, match=sentence) as caught:
            open_rows("o/n")
        assert "'o/n'" in str(caught.value)
        assert "PLANTED" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
