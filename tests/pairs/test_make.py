"""make.py: the base model's own answers, seeded, in a file that a kill leaves whole; nothing written over."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lazyorpo_lib import folder as folders
from lazyorpo_lib.__main__ import main
from lazyorpo_lib.demo.model import TINY_MODEL
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import clean
from lazyorpo_lib.pairs import make
from lazyorpo_lib.pairs.make import make_pairs
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.dataset import open_rows, written
from lazyorpo_lib.settings import DEFAULTS, Settings

SINGLE = [
    {"instruction": "What is 2+2?", "input": "", "output": "4"},
    {"instruction": "Say hi", "input": "to Bob", "output": "Hi Bob!"},
    {"question": "Colour of the sky?", "answer": "Blue."},
    {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
    ]},
    {"prompt": "Fill in", "chosen": "a"},
    {"text": "no prompt"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make, "AT_ONCE", 2)


def write(rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def made(rows=SINGLE, out="pairs.jsonl", sample=False, **how):
    said, given = [], DEFAULTS | {"base_model": TINY_MODEL, "answer_tokens": 8, "dataset": write(rows)} | how
    make_pairs(Settings(**given), out, sample=sample, show=said.append)
    return [json.loads(line) for line in Path(out).read_text().splitlines()], " ".join(said)


def test_single_answers_get_the_base_models_own_and_are_what_dataset_takes():
    rows, said = made()
    assert [row["from"]["rows"] for row in rows] == [[0], [1], [2], [3], [4]]
    origin = {"by": make.BY, "kind": "single", "base_model": TINY_MODEL, "seed": 42, "answer_tokens": 8}
    assert origin.items() <= rows[0]["from"].items()
    pairs, report = clean(candidates(open_rows("pairs.jsonl")))
    pairs = list(pairs)
    assert report.kept == 5 and not report.dropped
    assert [pair.chosen for pair in pairs] == ["4", "Hi Bob!", "Blue.", "Me.", "a"]
    assert [turn["role"] for turn in pairs[3].prompt] == ["system", "user"]
    assert pairs[1].prompt[0]["content"] == "Say hi\n\nto Bob"
    assert "5 pairs" in said and "1 unknown shape" in said and "2401.01335" in said and TINY_MODEL in said


def test_the_same_command_gives_the_same_file_and_another_seed_another():
    first, _ = made(out="a.jsonl")
    assert made(out="b.jsonl")[0] == first
    others = made(out="c.jsonl", seed=1)[0]
    assert not {row["rejected"] for row in first[:3]} & {row["rejected"] for row in others[:3]}


def test_each_row_draws_an_answer_of_its_own():
    rows, _ = made([{"prompt": "a", "answer": str(i)} for i in range(3)])
    assert len({row["rejected"] for row in rows}) == 3


def test_a_seed_counts_in_all_its_digits():  # of some generators only 32 bits do
    first, _ = made(out="a.jsonl", seed=1)
    assert made(out="b.jsonl", seed=3)[0][0]["rejected"] != first[0]["rejected"]


def test_with_chosen_alone_in_columns_what_is_there_is_not_taken():
    rows = [{"q": f"Why {n}?", "best": "So.", "rejected": "No."} for n in range(3)]
    found, _ = made(rows, columns="prompt=q,chosen=best")
    assert [row["chosen"] for row in found] == ["So."] * 3 and "No." not in [row["rejected"] for row in found]


class Killed(KeyboardInterrupt):
    pass


def killed_at(monkeypatch, answers: int, torn: bytes = b""):
    """Break off once so many answers are kept, as a kill would."""
    append, kept = folders.append_row, []

    def append_row(path, row):
        if len(kept) == answers:
            if torn:
                Path(path).open("ab").write(torn)
            raise Killed
        kept.append(row)
        append(path, row)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(folders, "append_row", append_row)
        made()


@pytest.mark.parametrize("answers,torn", [(0, b""), (1, b'{"step": 1, "an'), (2, b""), (3, b"{"), (4, b"")])
def test_after_a_kill_at_any_answer_the_file_is_the_same_bit_for_bit(answers, torn, monkeypatch):
    made(out="whole.jsonl")
    killed_at(monkeypatch, answers, torn)
    assert not Path("pairs.jsonl").exists()  # nothing half-written
    begun, drawn = make.answers, []
    monkeypatch.setattr(make, "answers", lambda m, t, ids, **o: drawn.extend(ids) or begun(m, t, ids, **o))
    made()
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert len(drawn) == 5 - answers // 2 * 2  # whole pieces are not drawn again
    assert sorted(p.name for p in Path().iterdir()) == ["pairs.jsonl", "rows.jsonl", "whole.jsonl"]


def test_what_is_half_drawn_is_not_gone_on_with_by_other_settings(monkeypatch):
    killed_at(monkeypatch, 3)
    kept = Path("pairs.jsonl.partial/answers.jsonl").read_bytes()
    with pytest.raises(UserError, match="of other rows or settings: delete it, or give another out"):
        made(seed=1)
    assert Path("pairs.jsonl.partial/answers.jsonl").read_bytes() == kept and not Path("pairs.jsonl").exists()
    made(out="other.jsonl", seed=1)
    made()


def test_a_model_that_was_mistyped_leaves_nothing_that_hinders_the_next_one():
    with pytest.raises(UserError, match="not/here"):
        made(base_model="not/here")
    assert len(made()[0]) == 5


def test_two_processes_cannot_draw_for_one_file(monkeypatch):
    killed_at(monkeypatch, 1)
    code = "import sys; from filelock import FileLock; f = FileLock(sys.argv[1]); f.acquire()"
    code += "; print(1, flush=True); input()"
    command = [sys.executable, "-c", code, "pairs.jsonl.partial/.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="at work in .*choose another out"):
            made()
        other.communicate("\n")
    made()


def test_a_finished_file_is_neither_made_again_nor_touched(monkeypatch):
    made()
    before = Path("pairs.jsonl").stat()
    monkeypatch.setattr(make, "load_base", None)
    assert "there already" in made()[1]
    assert Path("pairs.jsonl").stat() == before


@pytest.mark.parametrize("change", [dict(seed=1), dict(answer_tokens=9), dict(rows=SINGLE[:2])], ids=str)
def test_a_file_of_other_rows_or_settings_is_kept_as_it_is(change):
    made()
    before = Path("pairs.jsonl").read_bytes()
    with pytest.raises(UserError, match="not of these rows and settings.*another out"):
        made(**change)
    assert Path("pairs.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["", "mine", "mine\n", '{"prompt": "a"', '{"from": "me"}\n', "[1]\n", "\n"])
def test_nobodys_file_is_written_over(text):
    Path("pairs.jsonl").write_text(text)
    with pytest.raises(UserError, match="nothing was written"):
        made()
    assert Path("pairs.jsonl").read_text() == text
    assert sorted(p.name for p in Path().iterdir()) == ["pairs.jsonl", "rows.jsonl"]


def test_nobodys_folder_or_link_is_written_into(tmp_path):
    Path("pairs.jsonl.partial").mkdir()
    Path("pairs.jsonl.partial/mine").touch()
    with pytest.raises(UserError, match="which this kit did not write"):
        made()
    os.symlink(tmp_path / "elsewhere.jsonl", "link.jsonl")
    with pytest.raises(UserError, match="nothing was written"):
        made(out="link.jsonl")
    assert not Path("elsewhere.jsonl").exists()


def test_answers_that_are_no_pair_are_left_out_and_counted(monkeypatch):
    said = {"2+2": " 4 ", "Bob": "", "sky": None, "Who": "It is me.…", "Fill": "other"}

    def answers(_, tokenizer, prompts, **options):
        return [next(said[word] for word in said if word in tokenizer.decode(ids)) for ids in prompts]

    monkeypatch.setattr(make, "answers", answers)
    rows, words = made()
    assert [row["from"]["rows"] for row in rows] == [[3], [4]]
    assert rows[0]["from"]["cut"] and rows[0]["rejected"][-1]["content"] == "It is me."
    assert "1 the model said the same" in words and "2 the model gave no answer" in words


def test_where_the_model_says_nothing_else_there_is_no_file(monkeypatch):
    monkeypatch.setattr(make, "answers", lambda m, t, ids, **_: [""] * len(ids))
    with pytest.raises(UserError, match="5 the model gave no answer.*another base_model or seed"):
        made()
    assert not Path("pairs.jsonl").exists()


@pytest.mark.parametrize(
    "chosen,rejected,expected",
    [
        ("So it is 12.", "12", True), ("So it is 12.", "it is 13", False), ("no 1,000", "or 1.000", False),
        ("The sky is blue today", "today the SKY is so blue", True), ("The sky is blue", "The sea", False),
        ("", "", False),
    ],
)  # fmt: skip
def test_the_cheap_rule_is_what_it_says(chosen, rejected, expected):
    assert make.is_no_worse(chosen, rejected) is expected


def test_how_many_may_be_no_worse_is_said(monkeypatch):
    monkeypatch.setattr(make, "answers", lambda m, t, ids, **_: ["It is 4"] * len(ids))
    assert ", 1 may be no worse" in made()[1]


def test_a_drawn_token_follows_the_softmax_of_the_scores():
    scores = torch.tensor([[0.0, 1.0, 2.0]] * 4000)
    drawn = make.Drawn(list(range(4000)), "cpu")(None, scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.softmax(scores[0] / make.TEMPERATURE, -1), atol=0.03)


def test_a_model_that_cannot_write_is_a_sentence(monkeypatch):
    def fails(*given, **options):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(make, "answers", fails)
    with pytest.raises(UserError, match="cannot answer .shapes do not fit.: choose another base_model"):
        made()
    assert not Path("pairs.jsonl").exists()


@pytest.mark.parametrize(
    "how,named",
    [
        (dict(out="none/pairs.jsonl"), "a folder that is there"), (dict(out="pairs.csv"), "a .jsonl"),
        (dict(base_model="not/here"), "not/here"), (dict(columns="nonsense"), "columns is 'nonsense'"),
        (dict(columns="prompt=nope"), "columns says prompt=nope, but the columns found are"),
        (dict(out="rows.jsonl"), "nothing was written"), (dict(rows=[["a", "b"]]), "malformed"),
        (dict(rows=[{"title": "a"}]), "'title'; give prompts with a good answer.*prompt=…,chosen=…"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_leaves_no_pair(how, named):
    with pytest.raises(UserError, match=named):
        made(**how)
    left = [p.name for p in Path().iterdir() if p.name != "pairs.jsonl.partial"]
    assert left == ["rows.jsonl"] and not list(Path().glob("*.partial/answers.jsonl"))


def test_a_frame_without_the_columns_is_a_sentence():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": ["x"], "b": ["y"]})
    with pytest.raises(UserError, match="the columns found are 'a', 'b'"):
        make_pairs(Settings(**DEFAULTS | {"dataset": written(frame)}))


def test_the_command_makes_pairs_its_help_is_help_and_a_mistake_is_a_sentence(capsys):
    thumbs = [{"prompt": "a", "completion": c, "label": c == "yes"} for c in ("yes", "no", "never")]
    assert main(["pairs", write(thumbs), "--out", "new.jsonl"]) == 0
    assert "2 pairs of thumbs are in new.jsonl" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["pairs", "--help"])
    assert end.value.code == 0 and "--base-model" in capsys.readouterr().out
    mistakes = [["pairs"], ["pairs", "x", "--nonsense"], ["pairs", "not-there.jsonl"]]
    for words in [*mistakes, ["pairs", "rows.jsonl", "--answer-tokens", "0"]]:
        with pytest.raises(UserError):
            main(words)


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_and_ends_with_the_same_file():
    rows = write([{"prompt": f"Say {n}", "answer": f"{n}"} for n in range(300)])
    command = [
        sys.executable,
        "-m",
        "lazyorpo_lib",
        "pairs",
        rows,
        "--base-model",
        TINY_MODEL,
        "--answer-tokens",
    ]
    command, env = [*command, "64"], os.environ | {"PYTHONPATH": str(Path(make.__file__).parents[2])}
    subprocess.run([*command, "--out", "whole.jsonl"], check=True, env=env)
    kept = Path("pairs.jsonl.partial/answers.jsonl")
    for least in (1, 65, 129):
        with subprocess.Popen(command, env=env) as started:
            while started.poll() is None and not (kept.exists() and kept.read_bytes().count(b"\n") >= least):
                time.sleep(0.01)
            started.kill()
    subprocess.run(command, check=True, env=env)
    assert Path("pairs.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
