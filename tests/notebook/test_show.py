"""What the notebook shows: escaped, whole characters, and no failure where there is nothing to show."""

from types import SimpleNamespace

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.notebook import show
from lazyorpo_lib.orpo.batching import EncodedPair


class Bytes:
    """A tokenizer of UTF-8 bytes: most characters outside ASCII are several tokens."""

    def decode(self, ids, clean_up_tokenization_spaces=False):
        return bytes(ids).decode("utf-8", errors="replace")


def a_run(prompt="Hi", chosen="<b>Yes</b>\n🙂", rejected="No", nll_over="answer", **more):
    pair = EncodedPair(0, *(list(text.encode()) for text in (prompt, chosen, rejected)))
    settings = SimpleNamespace(nll_over=nll_over)
    return SimpleNamespace(tokenizer=Bytes(), eval_pairs=[pair], train_pairs=[], settings=settings, **more)


def test_a_table_escapes_every_cell_and_reads_as_text():
    shown = show.table(("name", "<i>"), [("a<script>", 1)])
    assert (
        "<script>" not in shown._repr_html_()
        and "a&lt;script&gt;" in shown.html
        and "&lt;i&gt;" in shown.html
    )
    assert repr(shown) == "name | <i>\na<script> | 1"


def test_pieces_are_whole_characters_and_lose_none():
    text = "a🙂é\n漢"
    assert show.pieces(Bytes(), list(text.encode())) == ["a", "🙂", "é", "\n", "漢"]
    long = "漢字🙂 and so on " * 20
    assert "".join(show.pieces(Bytes(), list(long.encode()))) == long


def test_a_pair_says_what_counts_for_what():
    shown = show.pair(a_run())
    assert "prompt: 2 tokens, read, not scored" in shown.text
    assert "chosen: 15 tokens, nll and odds" in shown.text and "rejected: 2 tokens, odds" in shown.text
    assert ">&lt;<" in shown.html and ">🙂<" in shown.html
    assert "prompt: 2 tokens, nll" in show.pair(a_run(nll_over="prompt+answer")).text


def test_a_long_prompt_is_shown_from_its_end():
    shown = show.pair(a_run(prompt="x" * 5000 + "end"))
    assert "prompt: 5003 tokens" in shown.text and "e·n·d" in shown.text
    assert shown.text.count("x") < 500


def test_with_nothing_held_out_a_training_pair_is_shown():
    run = a_run()
    run.train_pairs, run.eval_pairs = run.eval_pairs, []
    assert "chosen: 15 tokens" in show.pair(run).text


def test_a_finished_or_unanswered_run_is_a_sentence():
    run = SimpleNamespace(finished=True, answers=lambda: [], held_out_results=lambda: {})
    for shown in (show.loss(run), show.answers(run), show.held_out(run)):
        assert shown.text == shown.html and shown.text.endswith(".")


@pytest.mark.parametrize(
    "count,text", [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes_read_well(count, text):
    assert show.size(count) == text


def test_the_files_of_a_run_are_listed_with_the_way_to_load(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 2**20)
    (tmp_path / ".lock").touch()
    shown = show.files(SimpleNamespace(folder=tmp_path))
    assert "model/ | 1.0 MiB" in shown.text and ".lock" not in shown.text
    assert f"load_finished({str(tmp_path / 'model')!r})" in shown.text


def test_control_sequences_of_answers_are_shown_in_letters():
    rows = [{"prompt": "p", "base": "\x1b[2Jb", "tuned": "t\u202e\x9b31m"}]
    shown = show.answers(SimpleNamespace(answers=lambda: rows))
    for text in (shown.text, shown.html):
        assert r"\x1b[2Jb" in text and not set(text) & set("\x1b\u202e\x9b")
    assert "\x1b" not in show.pair(a_run(chosen="\x1b[2J")).text


# What is done only when its box is ticked.


def test_a_box_that_is_off_does_nothing_and_shows_nothing(capsys):
    show.when(False, pytest.fail)
    assert capsys.readouterr().out == ""


def test_a_ticked_box_shows_text_a_table_or_a_page_of_runs(capsys, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(show, "display", shown.append)
    show.when(True, lambda a, b: f"{a} and {b}", 1, b="\x1b[2J")
    assert capsys.readouterr().out == "1 and \\x1b[2J\n"
    show.when(True, lambda: tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}\n"
    show.when(True, lambda: [{"prompt": "<b>", "tuned": "yes"}])
    show.when(True, lambda: {"markdown": "| <i> |", "png": b"png"})
    home = tmp_path / "probe"
    home.mkdir()
    (home / "probe.md").write_text("Recommended: é", encoding="utf-8")
    (home / "probe.png").write_bytes(b"png")
    show.when(True, lambda: home)
    assert [repr(one) for one in shown] == ["prompt | tuned\n<b> | yes", "| <i> |", "Recommended: é"]
    assert not [one for one in shown if "<b>" in one.html[1:] and "<i>" in one.html]
    assert "&lt;i&gt;" in shown[1].html and "base64,cG5n" in shown[1].html and "base64,cG5n" in shown[2].html


def test_a_mistake_behind_a_box_is_the_users_to_read():
    def fails():
        raise UserError("one sentence")

    with pytest.raises(UserError, match="one sentence"):
        show.when(True, fails)
