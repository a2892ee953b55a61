"""truthful.py: published definitions on cases worked by hand, and the whole way on a toy file."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.settings import resolve
from tests.benchmarks import truthful

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


@pytest.fixture(scope="module")
def meter(tmp_path_factory):
    settings = resolve([("test", {"preset": "tiny", "answer_tokens": 4})])[0]
    model, tokenizer = truthful._base(settings.base_model)
    return truthful.Meter(model, tokenizer, settings, torch.float32, tmp_path_factory.mktemp("meter"))


def test_log_probabilities_are_those_of_a_plain_forward(meter):
    (one,) = meter.figures([("Who?", "It is you", "Nobody")])
    prompt = [{"role": "user", "content": "Who?"}]
    pair = truthful.Pair(0, tuple(prompt), "It is you", "Nobody")
    ((_, encoded),) = meter.encoder.encode([pair])
    for name in ("chosen", "rejected"):
        answer = list(getattr(encoded, name))
        ids = torch.tensor([[*encoded.prompt, *answer]])
        with torch.no_grad():
            logps = meter.model(input_ids=ids).logits[0].log_softmax(-1)
        at = range(len(encoded.prompt) - 1, ids.shape[1] - 1)
        plain = sum(logps[i, t].item() for i, t in zip(at, answer, strict=True))
        assert one[f"sum_{name}"] == pytest.approx(plain, rel=1e-4)


def test_a_question_has_its_own_figures_and_its_pairs_are_asked_with_anothers_prompt_too(meter):
    found = meter.questions(ROWS[:3], 4)
    assert [one["pairs"] for one in found] == [2, 2, 2] and found[0].keys() >= set(truthful.FIGURES)
    sums = meter._sums(ROWS[:1])
    assert len(sums) == 5
    correct, incorrect = ([sums[0, a] for a in ROWS[0][name]] for name in truthful.LISTS)
    assert found[0]["mc2"] == pytest.approx(truthful.mc2(correct, incorrect), rel=1e-4)
    assert found[0]["mc1"] == truthful.mc1(sums[0, ROWS[0]["best_answer"]], incorrect)
    other = meter.figures([(ROWS[1]["question"], c, r) for c, r in truthful.pairs_of(ROWS[0])])
    assert found[0]["swapped"] == np.mean([one["accuracy"] for one in other])
    assert 5 < meter.other_nll(most=4) < 15  # of a random model: the logarithm of its vocabulary


def test_the_whole_way_is_told_goes_on_and_gives_its_tables_from_one_file(
    tmp_path, file, monkeypatch, capsys
):
    def carried_out(self, stages, show):
        """In the place of training: the untrained model."""
        ran.append([stage.output_dir.split("/")[-1] for stage in stages])
        model, tokenizer = truthful._base("tiny-random")
        truthful.Path(stages[-1].output_dir, "model").mkdir(parents=True)
        model.save_pretrained(truthful.Path(stages[-1].output_dir, "model"))
        tokenizer.save_pretrained(truthful.Path(stages[-1].output_dir, "model"))

    ran = []
    monkeypatch.setattr(truthful.Comparison, "carry_out", carried_out)
    whole = truthful.argparse.Namespace(method=truthful.argparse.Namespace(minutes=6.0))
    monkeypatch.setattr(truthful.planner, "estimate", lambda settings: whole)
    out = tmp_path / "out"
    words = [str(file), "--out", str(out), "--folds", "2", "--recipes", "ORPO, SFT then ORPO"]
    words += ["--base-model", "tiny-random", "--set", "answer_tokens=4"]
    assert truthful.main(words) == 0
    assert ran == [
        ["orpo-1"],
        ["half-sft-1", "sft-then-orpo-1"],
        ["orpo-2"],
        ["half-sft-2", "sft-then-orpo-2"],
    ]
    told = capsys.readouterr().out
    assert "2 folds of 2 recipes: about" in told.splitlines()[0] and "| ORPO minus base | +0.000" in told
    train = [json.loads(line) for line in (out / "fold-0" / "train.jsonl").read_text().splitlines()]
    tested = {
        q["question"]
        for q in json.loads((out / "truthful.json").read_text())["records"]["base"]["0"]["questions"]
    }
    assert len(tested) == 6 and not tested & {row["prompt"] for row in train} and len(train) == 12
    (out / "fold-1" / "orpo.json").unlink()
    shutil.rmtree(out / "fold-1" / "orpo-2")
    assert truthful.main(words) == 0 and ran[4:] == [["orpo-2"]]
    again = capsys.readouterr().out
    kept = json.loads((out / "truthful.json").read_text())
    assert truthful.tables(kept).strip() in again and truthful.main([*words, "--tables"]) == 0
    assert capsys.readouterr().out.strip() == truthful.tables(kept).strip()
    assert str(tmp_path) not in (out / "truthful.json").read_text()
    assert truthful.main([*words[:5], "--recipes", "KTO"]) == 2
