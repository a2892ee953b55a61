"""benchmarks.py: lm-eval on the model in memory; what of it cannot be had is one sentence."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.folder import read_json, read_rows
from lazyorpo_lib.notebook import show
from lazyorpo_lib.results import benchmarks
from lazyorpo_lib.results.card import write_card
from lazyorpo_lib.run import execute
from lazyorpo_lib.settings import Settings
from lazyorpo_lib.trials.probe import _round
from tests.test_run import tiny

REAL = importlib.util.find_spec("lm_eval") is not None
FAKE = """
calls = []
def simple_evaluate(model=None, tasks=None, task_manager=None, apply_chat_template=False, log_samples=True):
    import random, torch
    torch.manual_seed(1), random.seed(1)
    calls.append([model.adapter, apply_chat_template])
    scores = {"alias": "x", "acc,none": len(calls) / 10, "acc_stderr,none": 0.01, "f1,strict": 0.5,
              "f1_stderr,strict": "N/A", "nan,none": float("nan"), "sample_len": 4}
    return {"results": {"grp": scores, "part": scores}, "group_subtasks": {"grp": ["part"]},
            "n-samples": {"grp": {"original": 9, "effective": 7}}}
"""
TASKS = """
class TaskManager:
    all_tasks = ["ifeval", "gsm8k"]
    def __init__(self, include_defaults): 0
    def load(self, names):
        if names == ["gsm8k"]:
            raise ImportError("No module named 'antlr4'")
        return {"tasks": dict.fromkeys(names, 1)}
"""
HFLM = """
class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size, mixed_precision_dtype):
        tokenizer.pad_token = "harm"
        off = [m._disable_adapters for m in pretrained.modules() if hasattr(m, "_disable_adapters")]
        self.adapter = bool(off) and not any(off)
"""


def fake(monkeypatch, folder, main=FAKE, tasks=TASKS, hflm=HFLM):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in {"": main, "tasks": tasks, "models": "", "models/huggingface": hflm}.items():
        file = folder / "lm_eval" / name / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(benchmarks, "version", lambda name: "fake")


@pytest.mark.parametrize(
    "asked,changed,said",
    [
        ("ifevl", {}, "names 'ifevl', which is no task of lm-eval's.*did you mean ifeval.*lm_eval ls tasks"),
        ("ifeval, zzz", {}, "names 'zzz', which is no task of lm-eval's and no file, see"),
        ("gone/task.yaml", {}, "names 'gone/task.yaml', which is no task"),
        ("ifeval,gsm8k", {}, "names 'gsm8k', which lm-eval cannot load .*antlr4.*choose another task"),
        (
            "ifeval",
            {"main": "def simple_evaluate(model): 0"},
            "version that lacks apply_chat_template, log_s",
        ),
        ("ifeval", {"tasks": "class TaskManager: all_tasks = []"}, "version that lacks TaskManager.load"),
        ("ifeval", {"tasks": "x = 1"}, "version that cannot be used .*TaskManager.*pip install -U lm-eval"),
        ("ifeval", {"hflm": "import not_here"}, "version that cannot be used .*not_here"),
        ("ifeval", {"main": "import torch; torch.gone"}, "version that cannot be used"),
    ],
)
def test_what_of_a_benchmark_cannot_be_had_is_one_sentence_before_anything_is_written(
    tmp_path, monkeypatch, asked, changed, said
):
    fake(monkeypatch, tmp_path / "fake", **changed)
    with pytest.raises(UserError, match=said) as error:
        execute(*tiny(tmp_path / "run", evaluate=asked))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_without_lm_eval_or_with_several_processes_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        UserError, match="lm-eval is not installed: pip install -U lm-eval, or leave evaluate"
    ):
        benchmarks.check(Settings(evaluate="ifeval"))
    for nothing in ("", " , "):
        benchmarks.check(Settings(evaluate=nothing))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes train: leave evaluate empty"):
        benchmarks.check(Settings(evaluate="ifeval"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_benchmarks_are_taken_off_and_on_once_each_and_change_nothing_that_is_trained(
    tmp_path, monkeypatch, method
):
    fake(monkeypatch, tmp_path / "fake")
    changes, said = dict(method=method, max_steps=2, answers=1, lora_dropout=0.5), []
    plain = execute(*tiny(tmp_path / "plain", **changes), show=said.append)
    done = execute(*tiny(tmp_path / "run", evaluate="ifeval", **changes), show=said.append)
    import lm_eval

    assert lm_eval.calls == [[False, True], [method == "lora", True]]
    losses = [[row.get("loss") for row in read_rows(r.folder / "history.jsonl")] for r in (plain, done)]
    assert losses[0] == losses[1] and done.tokenizer.pad_token != "harm"
    acc, f1 = read_json(done.folder / "summary.json")["benchmarks"]
    assert (acc["task"], acc["metric"], acc["questions"], acc["before"], acc["after"]) == (
        "grp",
        "acc",
        7,
        0.1,
        0.2,
    )
    assert acc["more_than_noise"] and acc["change_stderr"] == pytest.approx(0.01 * 2**0.5)
    assert f1["metric"] == "f1 (strict)" and f1["before_stderr"] is None and not f1["more_than_noise"]
    assert "| grp | acc | 7 | 0.100 ± 0.010 | 0.200 ± 0.010 | 0.100 ± 0.014 | yes |" in write_card(
        done.folder
    )
    assert "0.100 ± 0.010 | 0.200 ± 0.010" in str(show.held_out(done))
    assert "grp acc before training: 0.100 ± 0.010" in said and "benchmarks" not in plain.held_out_results()


def test_a_run_without_held_out_pairs_has_its_benchmarks_all_the_same(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path / "fake")
    changes = dict(evaluate="ifeval", max_steps=1, eval_pairs=0, answers=0)
    done = execute(*tiny(tmp_path / "run", **changes), show=lambda text: None)
    assert read_json(done.folder / "summary.json")["benchmarks"] and "| grp | acc" in write_card(done.folder)
    assert "0.100 ± 0.010 | 0.200" in str(show.held_out(done))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_after_a_kill_the_base_is_not_measured_twice_and_a_failure_can_be_gone_around(
    tmp_path, monkeypatch, method
):
    failing = FAKE.replace("calls.append", "if len(calls) == 1: raise OSError('no net')\n    calls.append")
    fake(monkeypatch, tmp_path / "fake", main=failing)
    changes = dict(method=method, max_steps=2, save_every_steps=1)
    with pytest.raises(
        UserError, match="'ifeval' failed after training .no net.: run again with evaluate empty"
    ):
        execute(*tiny(tmp_path / "run", evaluate="ifeval", **changes), show=lambda text: None)
    import lm_eval

    kept = read_json(tmp_path / "run" / "held_out.json")
    assert "benchmarks_before" in kept and "benchmarks_after" not in kept
    fresh = SimpleNamespace(folder=tmp_path / "run", main=True)
    benchmarks_before = kept["benchmarks_before"]
    lm_eval.calls *= 2  # it fails no more
    done = execute(*tiny(tmp_path / "run", evaluate="ifeval", **changes), show=lambda text: None)
    assert len(lm_eval.calls) == 3 and done.finished
    from lazyorpo_lib.results import held_out

    held_out.forget(fresh, all_of_it=True)
    assert read_json(tmp_path / "run" / "held_out.json") == {"benchmarks_before": benchmarks_before}


def test_all_weights_changed_before_evaluate_was_set_is_said(tmp_path):
    trainer, said = SimpleNamespace(model=None, step=1, steps=2), []
    run = SimpleNamespace(
        settings=Settings(evaluate="x"), trainer=trainer, folder=tmp_path, record={}, method="full",
        show=said.append, stop=SimpleNamespace(hurried=False),
    )  # fmt: skip
    benchmarks.measure(run, "before")
    benchmarks.measure(run, "after")  # not yet ended
    assert len(said) == 1 and "all weights changed" in said[0]


def test_short_runs_of_trials_take_no_benchmarks(tmp_path, monkeypatch):
    seen = []

    def stop(settings, show):
        seen.append(settings.evaluate)
        raise InterruptedError

    monkeypatch.setattr("lazyorpo_lib.trials.probe.run_apart", stop)
    with pytest.raises(InterruptedError):
        settings = tiny(tmp_path, evaluate="ifeval", warmup_steps=0)[0]
        _round(settings, tmp_path, print, steps=2, held_out=2)
    assert seen == [""]


@pytest.mark.skipif(not REAL, reason="lm-eval is not installed")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_lm_eval_itself_takes_a_local_task_before_and_after(tmp_path, monkeypatch, method):
    questions = [{"q": f"What is {n}?", "options": ["yes", "no", "maybe"], "gold": n % 3} for n in range(6)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = f"""\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "q.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: options
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    write = "\n".join(
        [
            *task.replace("mine", "says").splitlines()[:4],
            "output_type: generate_until",
            'doc_to_text: "{{q}}"',
            "doc_to_target: q",
            "generation_kwargs: {max_gen_toks: 4, until: ['\\n']}",
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
        ]
    )
    (tmp_path / "mine.yaml").write_text(task)
    (tmp_path / "says.yml").write_text(write)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = f"{tmp_path / 'mine.yaml'}, {tmp_path / 'says.yml'}"
    done = execute(*tiny(tmp_path / "run", evaluate=asked, method=method, answers=0), show=print)
    rows = {row["task"]: row for row in read_json(done.folder / "summary.json")["benchmarks"]}
    assert rows.keys() == {"mine", "says"} and rows["mine"]["questions"] == 6
    assert 0 <= rows["mine"]["before"] <= 1 and rows["mine"]["after_stderr"] > 0
    assert str(tmp_path) not in write_card(done.folder)
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(UserError, match="cannot load|no task"):
        benchmarks.check(Settings(evaluate=str(tmp_path / "bad.yaml")))
