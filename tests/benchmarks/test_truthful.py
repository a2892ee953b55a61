"""The experiments: published definitions on cases worked by hand, and the whole way on toy files."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lazyorpo_lib.errors import UserError
from tests.benchmarks import lab, nocue, own_samples, page, truthful

TOY = ["--base-model", "tiny-random", "--set", "max_tokens=900", "--set", "max_prompt_tokens=500"]
ROWS = [
    {
        "question": f"What colour is thing {k}?", "best_answer": f"It is blue {k}",
        "correct_answers": [f"It is blue {k}", "Blue"],
        "incorrect_answers": [f"Red {k}", "Green", "It is black"],
    }
    for k in range(12)
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "truthful.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_mc1_and_mc2_are_the_published_ones():
    assert (truthful.mc1(-1.0, [-2.0, -1.5]), truthful.mc1(-1.5, [-2.0, -1.5])) == (1.0, 0.0)
    p = [math.log(x) for x in (0.2, 0.1, 0.3, 0.4)]
    assert truthful.mc2(p[:2], p[2:]) == pytest.approx(0.3)
    assert truthful.mc2([-900.0], [-900.0, -900.0]) == pytest.approx(1 / 3)  # no underflow


def test_rouge_counts_single_words_and_the_nearer_side_wins():
    assert truthful.rouge1("The cat sat.", "the CAT ran") == pytest.approx(2 / 3)
    assert truthful.rouge1("a a a", "a") == pytest.approx(0.5) and truthful.rouge1("", "a") == 0
    row = {"correct_answers": ["You will not die"], "incorrect_answers": ["You will die"]}
    assert truthful.nearer("You will not", row) == 1.0 and truthful.nearer("You will die", row) == 0.0
    assert truthful.nearer("perhaps", row) == 0.0  # a tie is no truth


def test_folds_hold_every_question_once_and_do_not_depend_on_the_order():
    folds = truthful.folds_of(ROWS, 5)
    assert sorted(np.bincount(folds)) == [2, 2, 2, 3, 3]
    assert truthful.folds_of(ROWS[::-1], 5) == folds[::-1]
    for bad in (1, 13):
        with pytest.raises(UserError, match=f"folds is {bad}, but must lie between 2 and the 12 questions"):
            truthful.folds_of(ROWS, bad)


def test_a_file_that_is_none_or_lacks_a_column_is_one_sentence(tmp_path, file, capsys):
    assert truthful.main([str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    file.write_text(json.dumps(ROWS[0] | {"incorrect_answers": []}) + "\n")
    assert truthful.main([str(file), "--out", str(tmp_path / "x")]) == 2
    assert truthful.main([str(file), "--out", str(tmp_path / "x"), "--tables"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "There is no file" in first and second.startswith("Row 1 of") and "no truthful.json" in third


@pytest.mark.parametrize(
    "more,said",
    [
        (["--recipes", "ORPO, KTO"], "There is no recipe 'KTO': give some of SFT, SFT then DPO, ORPO"),
        (["--folds", "13"], "folds is 13, but must lie between 2 and the 10 questions"),
        (["--pairs", "99", "--folds", "2"], "pairs is 99, but must lie between 8 and 10, all of a fold"),
        (["--search-pairs", "12"], "search-pairs and search-questions take 7 questions, but of the 12"),
        (["--set", "lora_rank=no"], "lora_rank is 'no', but must be a whole number"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, file, capsys, more, said):
    few = ["--search-pairs", "2", "--search-questions", "1"]
    assert truthful.main([str(file), "--out", str(tmp_path / "x"), *TOY, *few, *more]) == 2
    assert capsys.readouterr().err.startswith(said) and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "main,words,said",
    [
        (nocue.main, ["--pairs", "6"], "pairs is 6 and held-out 64, but both must lie between 8 and 600"),
        (nocue.main, ["--seeds", "0"], "seeds is 0, but must be a whole number from 1 on"),
        (nocue.main, ["--tables"], "There is no nocue.json"),
        (own_samples.main, ["FILE", "--seeds", "4"], "seeds is 4, but must lie between 1 and the 3 folds"),
        (own_samples.main, ["FILE", "--pairs", "9"], "pairs is 9, but must lie between 4 and 8"),
        (own_samples.main, ["gone.jsonl"], "There is no file 'gone.jsonl'"),
    ],
)
def test_the_other_experiments_too_say_it_in_one_sentence(tmp_path, file, capsys, main, words, said):
    words = [str(file) if word == "FILE" else word for word in words]
    assert main([*words, "--out", str(tmp_path / "x"), *TOY]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def tools():
    settings = lab.settings_of(SimpleNamespace(base_model="tiny-random", set=[*TOY[3::2]]))
    return settings, *lab.base_of(settings)


def plain(model, pair, name: str) -> float:
    """The log-probability of an answer by a forward of its own."""
    answer = list(getattr(pair, name))
    ids = torch.tensor([[*pair.prompt, *answer]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    at = range(len(pair.prompt) - 1, ids.shape[1] - 1)
    return sum(logps[i, t].item() for i, t in zip(at, answer, strict=True))


def test_answers_read_together_have_the_log_probabilities_of_plain_forwards(tools):
    settings, model, _, encoder = tools
    texts = ["It is you", "Nobody", "?", "Me"]
    found = lab.Reader(model, encoder)("Who?", texts)
    for text, (total, count) in zip(texts, found, strict=True):
        (pair,) = lab.encoded(encoder, [("Who?", text, "!")])
        assert total == pytest.approx(plain(model, pair, "chosen"), rel=1e-5) and count == len(pair.chosen)


def test_training_is_the_kits_and_folds_its_adapters_in(tools, tmp_path):
    settings, model, _, encoder = tools
    pairs = lab.encoded(encoder, [("Who?", "aaaa", "bbbb")] * 16)
    other = truthful.copy.deepcopy(model)
    tuned, rows = lab.trained(other, pairs, settings, tmp_path, seen=pairs[:2], every=2)
    assert [row["step"] for row in rows if "eval_logp_chosen" in row] == [0, 2, 4]
    before, after = (lab.Reader(m, encoder).pairs([("Who?", "aaaa", "bbbb")])[0] for m in (model, tuned))
    assert after["log_odds_ratio"] > before["log_odds_ratio"] and after["nll"] < before["nll"]
    assert not hasattr(tuned, "peft_config") and after["logp_chosen"] == pytest.approx(
        plain(tuned, pairs[0], "chosen") / len(pairs[0].chosen), rel=1e-4
    )


def test_a_question_has_its_own_figures_and_its_pairs_are_asked_with_anothers_prompt_too(tools):
    settings, model, tokenizer, encoder = tools
    rows = [row | {"place": k} for k, row in enumerate(ROWS[:3])]
    found = truthful.measured(model, tokenizer, encoder, rows, 4, other=2)
    first, reader = found["questions"][0], lab.Reader(model, encoder)
    assert [one["pairs"] for one in found["questions"]] == [2, 2, 2] and first.keys() >= {*truthful.FIGURES}
    sums = [[reader(ROWS[0]["question"], [a])[0][0] for a in ROWS[0][name]] for name in truthful.LISTS]
    assert first["mc2"] == pytest.approx(truthful.mc2(*sums), rel=1e-4)
    assert first["mc1"] == truthful.mc1(sums[0][0], sums[1])
    before = rows[-1]["question"]
    swapped = reader.pairs([(before, c, r) for c, r in truthful.pairs_of(ROWS[0])])
    assert first["swapped"] == np.mean([one["accuracy"] for one in swapped])
    assert 4 < found["other_nll"] < 16  # of a random model: the logarithm of its vocabulary


def test_no_question_is_trained_on_and_tested_and_rates_are_chosen_without_the_tested_ones():
    rows = [row | {"question": f"{row['question']} {n}"} for row in ROWS for n in range(10)]
    given = SimpleNamespace(folds=3, questions=30, pairs=100, search_pairs=16, search_questions=6)
    design = truthful.Design(rows, given, 14)
    pairs, asked = design.search()
    tried, chosen = {p for p, *_ in pairs}, {row["question"] for row in asked}
    assert (len(pairs), len(tried), len(chosen)) == (16, 8, 6) and not chosen & tried
    for k in range(3):
        tested, train = {row["question"] for row in design.tested(k)}, design.train(k)
        assert len(tested) == 30 and len(set(train)) == 100 and not tested & {p for p, *_ in train}
        assert not (chosen | tried) & (tested | {p for p, *_ in train})
        count = Counter(p for p, *_ in train)
        assert max(count.values()) - min(count.values()) <= 1  # as many of each question as of others


def test_a_pair_of_two_equal_answers_is_not_trained_on():
    row = {"question": "Why?", "correct_answers": ["a ", "b"], "incorrect_answers": ["a", "c"]}
    assert truthful.dealt([row], 9, seed=1) == [("Why?", "b", "c")]


def test_a_rate_is_the_most_accurate_ones_and_of_equal_ones_that_with_the_larger_ratio():
    tried = [(0.60, 0.1, 1), (0.60, 0.2, 2), (0.58, 0.9, 3)]
    assert truthful.best_of([dict(accuracy=a, log_odds_ratio=x, rate=r) for a, x, r in tried]) == 2


def test_parts_that_other_flags_made_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab, "carry_out", here)
    words = ["--out", str(tmp_path / "n"), "--seeds", "1", "--held-out", "8", *TOY]
    assert nocue.main([*words, "--pairs", "8"]) == 0
    assert nocue.main([*words, "--pairs", "10"]) == 2
    said = "seed-1.json was made with other flags: give these again, or another --out"
    assert said in capsys.readouterr().err


def test_held_out_pairs_have_numbers_of_their_own(tools):
    _, _, _, encoder = tools
    some = [("Who?", "Me", "You")] * 3
    pairs, seen = lab.encoded(encoder, some), lab.encoded(encoder, some, start=3)
    assert [pair.index for pair in pairs + seen] == [0, 1, 2, 3, 4, 5]


def test_a_sum_has_no_cue_of_length_or_words_and_its_twin_stays_on_its_side():
    given = SimpleNamespace(pairs=64, held_out=32, seeds=2)
    train, tested = nocue.split(given, 1)
    for side in (train, tested):
        chosen, rejected = (sorted(pair[k] for pair in side) for k in (1, 2))
        assert chosen == rejected and all(len(c) == len(r) for _, c, r in side)
    assert not {frozenset(p[1:]) for p in train} & {frozenset(p[1:]) for p in tested}
    for question, chosen, rejected in train:
        first, second = map(int, question.removeprefix("What is ").rstrip("?").split(" + "))
        assert chosen == f"The answer is {first + second}."
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1
    assert lab.bag_of_words([[[pair[1:] for pair in side] for side in (train, tested)]]) <= 0.5


def test_power_is_the_usual_formula():
    values = [-1.0, 0.0, 1.0, 0.0]
    assert lab.needed(values, 0.5) == math.ceil((2.8 * np.std(values, ddof=1) / 0.5) ** 2)
    assert lab.needed([0.0] * 9, 0.05, 0.5) == lab.needed([0.0], 0.05, 0.5) == 71  # what does not vary yet


def here(module: str, words: list[str], units: dict, out, jobs: int) -> None:
    """In the place of processes: the units one after the other."""
    main = {m.__name__: m.main for m in (truthful, nocue, own_samples)}[module]
    for name, first in units.items():
        assert all((out / f"{one}.json").is_file() for one in first)
        assert main([*words, "--unit", name]) == 0


def test_the_whole_way_is_told_goes_on_and_gives_its_tables_from_one_file(
    tmp_path, file, monkeypatch, capsys
):
    monkeypatch.setattr(lab, "carry_out", here)
    ran, real = [], lab.trained
    monkeypatch.setattr(lab, "trained", lambda *a, **b: ran.append(a[2].objective) or real(*a, **b))
    out = tmp_path / "out"
    words = [str(file), "--out", str(out), "--folds", "2", "--recipes", "ORPO, SFT then ORPO", "--pairs", "4"]
    words += ["--search-pairs", "4", "--search-questions", "2", "--questions", "3", *TOY]
    words += ["--set", "answer_tokens=4", "--set", "pairs_per_step=2", "--set", "or_weight=0.5"]
    assert truthful.main(words) == 0
    told = capsys.readouterr().out
    assert (
        told.startswith("9 parts, 0 of them there; the others take about") and "| ORPO minus base |" in told
    )
    kept = json.loads((out / "truthful.json").read_text())
    assert [len(kept["search"]["tried"][name]) for name in ("SFT", "ORPO", "SFT then ORPO")] == [3, 5, 3]
    assert truthful.tables(kept).strip() in told and kept["commits"] and kept["machine"]
    assert len(truthful.by_question(kept, "ORPO")) == 6 and "What colour" not in json.dumps(kept)
    assert str(tmp_path) not in json.dumps(kept)
    (out / "fold-1-ORPO.json").unlink()
    assert truthful.main([*words, "--so-far"]) == 0
    part = json.loads((out / "truthful.json").read_text())
    assert len(truthful.by_question(part, "ORPO")) == 3 and "fold-1-ORPO" not in part["parts"]
    done = len(ran)
    assert truthful.main(words) == 0 and ran[done:] == ["orpo"]
    assert truthful.main([*words[:3], "--tables"]) == 0
    again = json.loads((out / "truthful.json").read_text())
    assert capsys.readouterr().out.strip().endswith(truthful.tables(again).strip())


def test_the_other_experiments_go_the_whole_way_too(tmp_path, file, monkeypatch, capsys):
    monkeypatch.setattr(lab, "carry_out", here)
    small = [*TOY, "--set", "answer_tokens=4", "--set", "pairs_per_step=2"]
    words = ["--out", str(tmp_path / "n"), "--seeds", "1", "--pairs", "8", "--held-out", "8", *small]
    assert nocue.main(words) == 0
    kept = json.loads((tmp_path / "n" / "nocue.json").read_text())
    assert nocue.tables(kept).strip() in capsys.readouterr().out
    assert kept["history"]["1"].keys() == {"SFT", "DPO", "ORPO"} and kept["history"]["1"]["DPO"][0][0] == 0
    words = [str(file), "--out", str(tmp_path / "o"), "--folds", "2", "--seeds", "1", "--pairs", "4"]
    assert own_samples.main([*words, "--questions", "3", *small, "--unit", "fold-0"]) == 2
    assert "Of 4 answers 0 came to an end: raise answer_tokens" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "o" / "own-0.jsonl").read_text().splitlines()]
    whole = [row | {"from": row["from"] | {"cut": False}} for row in rows]
    (tmp_path / "o" / "own-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    assert own_samples.main([*words, "--questions", "3", *small]) == 0
    kept = json.loads((tmp_path / "o" / "own_samples.json").read_text())
    assert own_samples.tables(kept).strip() in capsys.readouterr().out and kept["tokens"][0]["pairs"] >= 2


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A module `made` that makes a unit, or fails at one that is called so."""
    code = """
import sys, pathlib, os
name = sys.argv[-1]
if name == "bad":
    sys.exit("bad luck")
folder, needs = pathlib.Path(sys.argv[1]), {"b": ["a"], "c": ["a", "b"]}
assert all((folder / f"{one}.json").is_file() for one in needs.get(name, [])), os.environ["OMP_NUM_THREADS"]
(folder / f"{name}.json").write_text(os.environ["OMP_NUM_THREADS"])
"""
    (tmp_path / "made.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_units_run_in_processes_of_one_thread_each_after_those_that_it_needs(elsewhere):
    units = {"a": (), "b": ("a",), "c": ("a", "b"), "d": ()}
    lab.carry_out("made", [str(elsewhere)], units, elsewhere, 2, show=lambda *a, **b: None)
    assert [(elsewhere / f"{name}.json").read_text() for name in units] == ["1"] * 4


def test_a_unit_that_fails_is_a_sentence_and_what_needs_it_is_not_tried(elsewhere):
    with pytest.raises(UserError, match=r"bad was not made \(bad luck\): mend that"):
        lab.carry_out("made", [str(elsewhere)], {"bad": (), "a": ("bad",)}, elsewhere, 2)
    assert not (elsewhere / "a.json").exists()


@pytest.mark.parametrize("file", page.PAGES, ids=lambda file: file.name)
def test_a_page_says_what_the_json_of_the_experiments_says(file):
    text = file.read_text(encoding="utf-8")
    assert page.filled(text) == text, "python -m tests.benchmarks.page writes it anew"


def test_every_block_stands_on_a_page_and_a_figure_that_is_changed_is_seen(monkeypatch):
    texts = {file.name: file.read_text(encoding="utf-8") for file in page.PAGES}
    assert all(sum(f"<!-- {name} -->" in text for text in texts.values()) == 1 for name in page.BLOCKS)
    for name in ("truthful", "nocue"):
        if page.kept(name):
            text = texts["is_it_better.md"]
            start = text.index(f"<!-- {name} -->")
            at = next(k for k in range(start + 60, len(text)) if text[k] in "12345678")
            assert page.filled(text[:at] + "9" + text[at + 1 :]) == text


def test_the_jsons_in_docs_are_small_and_hold_no_text_of_the_data():
    for name in page.MODULES:
        text = json.dumps(page.kept(name))
        assert len(text) < 150_000 and "What " not in text and "/root" not in text and "/tmp" not in text


def test_a_verdict_goes_by_whether_the_interval_leaves_zero_out():
    assert page.verdict([1.0, 1.1, 0.9, 1.0]).endswith("beyond the noise")
    assert page.verdict([1.0, -1.1, 0.9, -1.0]).endswith("within the noise")


def test_the_picture_and_the_tables_come_from_the_json_alone(tmp_path, monkeypatch):
    record = {name: [[k % 2, 0.1 * k, 2.0, -2.0, -2.1] for k in range(8)] for name in ("base", *nocue.RATES)}
    history = {name: [[0, -2.0, -2.1], [4, -1.0, -2.0]] for name in nocue.RATES}
    one = {"columns": list(nocue.FIGURES), "records": {"1": record}, "history": {"1": history}}
    one |= {"bag_of_words": 0.5, "rates": nocue.RATES}
    page.draw(one, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    monkeypatch.setattr(page, "kept", lambda name: one)
    assert "falls" not in page.displacement() and "rises from -2.000 to -1.000" in page.displacement()
    assert "within the noise" in page.said_nocue() and "| ORPO | 8 |" in page.of_nocue()
