"""held_out.py: memory that runs out in the answers costs answers and no run."""

import json
from types import SimpleNamespace

import pytest
import torch

from lazyorpo_lib.folder import read_json
from lazyorpo_lib.results import evaluate, held_out
from lazyorpo_lib.run import execute
from lazyorpo_lib.settings import resolve


@pytest.mark.parametrize("most", [4, 0])
def test_memory_that_runs_out_in_the_answers_ends_no_run(tmp_path, monkeypatch, most):
    generate, said = evaluate._generate, []

    def limited(model, tokenizer, prompts, given):
        if len(prompts) > most:
            raise torch.OutOfMemoryError("injected")
        return generate(model, tokenizer, prompts, given)

    monkeypatch.setattr(evaluate, "_generate", limited)
    values = {"preset": "tiny", "max_steps": 1, "answers": 6, "output_dir": str(tmp_path / "run")}
    values |= {"watch_every_steps": 1}
    done = execute(*resolve([("test", values)])[:2], show=said.append)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["finished"] and len(done.answers()) == (6 if most else 0)
    left_out = [line for line in said if "6 of 6 answers are left out" in line]
    assert len(left_out) == (0 if most else 2)
    assert len(summary["out_of_memory"]) == (0 if most else 3)


def test_an_answer_that_is_left_out_is_not_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "_answer", lambda run, prompts: [None, "yes"])
    texts = [SimpleNamespace(prompt=[{"content": name}]) for name in "ab"]
    said, pairs = [], [SimpleNamespace(prompt=[1])] * 2
    run = SimpleNamespace(
        settings=SimpleNamespace(watch_every_steps=1), eval_pairs=pairs, texts=texts, main=True,
        folder=tmp_path, show=said.append,
    )  # fmt: skip
    held_out.watch(run, 1)
    assert said == ["step 1 · 'b' -> 'yes'"]


def test_answers_lie_as_alpaca_eval_reads_them_and_go_when_training_goes_on(tmp_path):
    values = {"preset": "tiny", "max_steps": 1, "output_dir": str(tmp_path / "run")}
    done = execute(*resolve([("test", values)])[:2], show=lambda text: None)
    tuned, base = (json.loads((done.folder / name).read_text()) for name in held_out.OUTPUTS)
    for rows, side, generator in ((tuned, "tuned", "tiny-random orpo"), (base, "base", "tiny-random")):
        assert rows == [
            {"instruction": row["prompt"], "output": row[side], "generator": generator}
            for row in done.answers()
        ]
    assert len(tuned) == 2
    held_out.forget(done, all_of_it=False)
    assert not any((done.folder / name).exists() for name in held_out.OUTPUTS)
    kept = read_json(done.folder / "held_out.json")
    assert "before" in kept and "after" not in kept
