"""evaluate.py: intervals cover, changes are taken pair by pair, answers do not depend on the batch."""

import json

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, GPT2Config, LlamaConfig

from lazyorpo_lib import model
from lazyorpo_lib.demo.model import TINY_MODEL
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.results import evaluate, held_out
from lazyorpo_lib.settings import Settings

COLUMNS = ["nll", "nll_tokens", "log_odds_chosen", "log_odds_rejected", "accuracy"]


def kept(before, after, shorter):
    return {
        "columns": COLUMNS,
        "chosen_shorter": shorter,
        "before": {"pairs": before},
        "after": {"pairs": after},
    }


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        low <= 0.6 <= high
        for low, high in (
            evaluate.interval([(rng.random(60) < 0.6) * 1.0], [range(60)], draws=500) for _ in range(300)
        )
    ]
    assert 0.90 <= np.mean(hits) <= 0.99


def test_measures_are_per_pair_and_split_by_which_answer_is_shorter():
    found = evaluate.measures(
        kept([[6.0, 3.0, 1.0, 0.5, 1.0], [4.0, 4.0, -1.0, 2.0, 0.0]], [], [True, False]), "before"
    )
    assert found["nll"].tolist() == [2.0, 1.0] and found["log_odds_ratio"].tolist() == [0.5, -3.0]
    assert found["accuracy_chosen_shorter"][0] == 1.0 and np.isnan(found["accuracy_chosen_shorter"][1])
    assert found["accuracy_chosen_longer"][1] == 0.0 and np.isnan(found["accuracy_chosen_longer"][0])


def test_what_pairs_have_in_common_cancels_in_the_change():
    before = {"nll": np.arange(20.0)}
    figure = evaluate.changes(before, {"nll": before["nll"] - 0.5})["nll"]
    assert figure["change_interval"] == (-0.5, -0.5) and figure["more_than_noise"]
    low, high = figure["before_interval"]
    assert low < figure["before"] - 1 and high > figure["before"] + 1


def test_changes_of_a_few_prompts_may_have_one_sign_by_luck_and_pairs_of_one_are_not_many():
    before, after = {"nll": np.full(40, 2.0)}, {"nll": np.full(40, 1.0)}
    for prompts, proven in ((5, False), (6, True)):
        figure = evaluate.changes(before, after, np.arange(40) % prompts)["nll"]
        assert (figure["pairs"], figure["prompts"], figure["more_than_noise"]) == (40, prompts, proven)
    chance, ids = np.random.default_rng(2).normal(size=10), np.arange(40) % 10
    alike = {"nll": 2.0 + chance[ids]}  # four pairs of each prompt say the same
    widths = [
        np.subtract(*evaluate.changes(before, alike, names)["nll"]["change_interval"][::-1])
        for names in (ids, None)
    ]
    assert 1.6 < widths[0] / widths[1] < 2.4


def test_pairs_that_a_figure_does_not_speak_of_are_left_out():
    side = {"a": np.array([1.0, np.nan, 0.0]), "b": np.array([np.nan, np.nan, np.nan])}
    out = evaluate.changes(side, side)
    assert out.keys() == {"a"} and out["a"]["pairs"] == 2 and out["a"]["before"] == 0.5


@pytest.mark.parametrize(
    ("gained", "words"), [(14, "more than noise"), (1, "within the noise"), (0, "within the noise")]
)
def test_the_verdict_says_whether_the_change_is_more_than_noise(gained, words):
    before = np.zeros(40)
    figures = evaluate.changes({"accuracy": before}, {"accuracy": np.where(np.arange(40) < gained, 1.0, 0.0)})
    assert words in evaluate.verdict(figures) and "on 40 pairs" in evaluate.verdict(figures)


def measured(nll=2.0, answers=("Blue, since light scatters.",) * 3, pairs=40, accuracy=1.0):
    row = [3 * nll, 3.0, 1.0, 0.5, accuracy]
    return {"pairs": [row] * pairs, "answers": list(answers)}


def told(before, after):
    one = {"columns": COLUMNS, "prompts": ["Why?"] * len(after["answers"]), "chosen_shorter": [True] * 40}
    kept = one | {"before": before, "after": after}
    return evaluate.held_out_results(json.loads(json.dumps(kept, allow_nan=False)), "owner/pairs")


@pytest.mark.parametrize(
    "after,said",
    [
        (measured(nll=100.0), "its nll went from 2 to 100 nats"),
        (measured(nll=5.1), "its nll went from 2 to 5.1 nats"),
        (measured(answers=["", " ", "Blue."]), "2 of its 3 answers are empty or"),
        (measured(answers=["…", "", ""]), "3 of its 3 answers"),
        (measured(answers=["cccccccc…", "the the the the the the…", "!!!!!!!!"]), "3 of its 3 answers"),
        (
            measured(answers=["Sure: " + "no no " * 20, "I don't know.\n" * 9, "漢" * 30]),
            "3 of its 3 answers",
        ),
    ],
)
def test_a_verdict_never_tells_a_gain_of_a_model_that_fell_to_pieces(after, said):
    verdict = told(measured(accuracy=0.0), after)["verdict"]
    assert "more than noise" not in verdict and said in verdict and "lower learning_rate" in verdict


@pytest.mark.parametrize(
    "after",
    [
        measured(nll=4.9),  # worse, and yet a model
        measured(answers=["Blue.", "", "Why: light scatters in air."]),
        measured(answers=["42", "Yes.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"]),
        measured(answers=["- one\n- two\n- three\n- four", "def f():\n    return 1", "10000"]),
        measured(answers=[]),
    ],
)
def test_a_sound_model_keeps_its_verdict(after):
    assert "more than noise" in told(measured(accuracy=0.0), after)["verdict"]


@pytest.mark.parametrize("before,after", [(3.9, 8.3), (3.9, 7.0), (0.5, 2.1), (9.0, 12.1)])
def test_a_loss_of_three_nats_or_of_all_that_was_there_is_no_gain_whatever_it_began_from(before, after):
    said = told(measured(nll=before, accuracy=0.0), measured(nll=after))["verdict"]
    assert "more than noise" not in said and f"from {before:.3g} to {after:.3g} nats" in said


def test_figures_that_are_not_numbers_are_kept_as_none_and_told(tmp_path):
    nan, inf, rows = float("nan"), float("inf"), {"columns": COLUMNS, "chosen_shorter": [True, False]}
    for when, bad in (("before", 1.0), ("after", nan)):
        table = [[bad, 3.0, inf if bad != bad else 1.0, 0.5, 1.0], [3.0, 3.0, 1.0, 0.5, 0.0]]
        rows[when] = {"pairs": held_out.finite(table), "answers": []}
    kept = json.loads(json.dumps(rows, allow_nan=False))
    assert kept["after"]["pairs"][0] == [None, 3.0, None, 0.5, 1.0]
    results = json.loads(json.dumps(evaluate.held_out_results(kept, "demo"), allow_nan=False))
    assert "no longer a number" in results["verdict"] and results["held_out"]["nll"]["pairs"] == 1
    kept["after"]["pairs"] = [[None, None, None, None, 0.0]] * 2
    results = evaluate.held_out_results(kept, "demo")
    assert "no longer a number" in results["verdict"] and "nll" not in results["held_out"]


def test_the_habit_is_one_line_and_then_one_reason():
    texts = ["Blue.\nWhy: Light scatters.", "Blue.", "Blue.\nWhy: a\nWhy: b", "Why: x", "Blue.\n\nWhy: x"]
    assert evaluate.habit_share(texts) == 1 / 5 and evaluate.habit_share([]) == 0


def test_held_out_results_are_told_only_where_both_sides_were_measured():
    table = [[6.0, 3.0, 1.0, 0.5, 1.0]] * 2
    before = {"columns": COLUMNS, "prompts": ["Why?"], "chosen_shorter": [True, False]}
    before |= {"before": {"pairs": table, "answers": ["Blue."]}}
    assert evaluate.held_out_results(before, "demo") == {} and evaluate.answers_side_by_side(before) == []
    both = before | {"after": {"pairs": table, "answers": ["Blue.\nWhy: Light scatters."]}}
    found = evaluate.held_out_results(both, "demo")
    assert (found["accuracy_before"], found["accuracy_after"]) == (1.0, 1.0) and "on 2 pairs" in found[
        "verdict"
    ]
    assert (found["habit_before"], found["habit_after"]) == (0.0, 1.0) and found["held_out"]["nll"][
        "after"
    ] == 2.0
    assert not {"habit_before", "habit_after"} & evaluate.held_out_results(both, "owner/pairs").keys()
    assert evaluate.answers_side_by_side(both) == [
        {"prompt": "Why?", "base": "Blue.", "tuned": "Blue.\nWhy: Light scatters."}
    ]


@pytest.fixture(scope="module")
def tuned():
    """A tiny model with an adapter that changes its answers."""
    base = model.load_base(TINY_MODEL, dtype=torch.float32, device="cpu")
    adapted = model.add_adapters(base, Settings(base_model=TINY_MODEL))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted, model.load_tokenizer(TINY_MODEL)


PROMPTS = [[10, 20, 30], [40] * 17, [50, 60], [70] * 9]


def test_answers_do_not_depend_on_the_batch_and_come_in_the_order_of_the_prompts(tuned):
    options = dict(max_tokens=6, end_ids=[2])
    alone = [evaluate.answers(*tuned, [prompt], **options)[0] for prompt in PROMPTS]
    assert (
        evaluate.answers(*tuned, PROMPTS, **options)
        == alone
        == evaluate.answers(*tuned, PROMPTS, batch_size=3, **options)
    )


def test_out_of_memory_halves_the_batch_of_answers_and_changes_none(tuned, monkeypatch):
    options, generate, sizes = dict(max_tokens=6, end_ids=[2]), evaluate._generate, []
    expected = evaluate.answers(*tuned, PROMPTS, **options)

    def limited(model, tokenizer, prompts, given):
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("injected")
        return generate(model, tokenizer, prompts, given)

    most, done = 1, []
    monkeypatch.setattr(evaluate, "_generate", limited)
    assert evaluate.answers(*tuned, PROMPTS, on_batch=done.append, **options) == expected
    assert sizes == [4, 2, 1, 1, 2, 1, 1] and done == [1, 1, 1, 1]
    most = 0
    with pytest.raises(UserError, match="answering a single prompt .*lower max_prompt_tokens"):
        evaluate.answers(*tuned, PROMPTS, **options)


def test_what_cannot_be_answered_is_left_out_with_a_note(tuned, monkeypatch):
    generate, notes, done = evaluate._generate, [], []
    expected = evaluate.answers(*tuned, PROMPTS, max_tokens=6, end_ids=[2])

    def limited(model, tokenizer, prompts, given):
        if max(map(len, prompts)) > 10:
            raise torch.OutOfMemoryError("injected")
        return generate(model, tokenizer, prompts, given)

    monkeypatch.setattr(evaluate, "_generate", limited)
    options = dict(max_tokens=6, end_ids=[2], note=notes.append, on_batch=done.append)
    found = evaluate.answers(*tuned, PROMPTS, **options)
    assert found == [expected[0], None, *expected[2:]] and notes == ["injected"] and sum(done) == 4
    kept = {"prompts": list("abcd"), "before": {"answers": expected}, "after": {"answers": found}}
    assert [row["prompt"] for row in evaluate.answers_side_by_side(kept)] == ["a", "c", "d"]
    assert evaluate.habit_share([None, "Blue.\nWhy: x"]) == 1


def test_answers_are_batched_by_the_bytes_of_their_cache(tuned, monkeypatch):
    """The tiny model's is 2 x 2 layers x 2 heads x 12 numbers of 4 bytes a token."""
    assert evaluate.cache_bytes(tuned[0].config, 4) == 384
    generate, sizes = evaluate._generate, []
    monkeypatch.setattr(
        evaluate,
        "_generate",
        lambda m, t, prompts, given: sizes.append(len(prompts)) or generate(m, t, prompts, given),
    )
    for tokens in (
        1000,
        30,
        8,
    ):  # that a quarter of the memory holds: prompts of 2, 3, 9 and 17, and 6 more of each answer
        monkeypatch.setattr(evaluate, "free_bytes", lambda device, tokens=tokens: 4 * 384 * tokens)
        evaluate.answers(*tuned, PROMPTS, max_tokens=6, end_ids=[2])
    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1]


def test_the_cache_of_a_token_in_well_known_models():
    llama2 = LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32)
    gemma = GemmaConfig(
        num_hidden_layers=28, hidden_size=3072, num_attention_heads=16, num_key_value_heads=16, head_dim=256
    )
    llama3 = LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8
    )
    assert [evaluate.cache_bytes(config, 2) // 1024 for config in (llama2, gemma, llama3, GPT2Config())] == [
        512,
        448,
        128,
        36,
    ]


def test_an_answer_ends_at_any_of_the_end_tokens_or_is_marked_as_cut(tuned):
    (cut,) = evaluate.answers(*tuned, PROMPTS[:1], max_tokens=3, end_ids=[2])
    assert cut.endswith("…")
    with torch.no_grad():
        first = tuned[0](torch.tensor(PROMPTS[:1])).logits[0, -1].argmax().item()
    assert evaluate.answers(*tuned, PROMPTS[:1], max_tokens=3, end_ids=[2, first]) == [""]


def test_the_base_answers_with_the_adapter_off_and_nothing_is_left_changed(tuned):
    options = dict(max_tokens=6, end_ids=[2])
    base = model.load_base(TINY_MODEL, dtype=torch.float32, device="cpu")
    tuned[0].train()
    with model.adapters_off(tuned[0]):
        off = evaluate.answers(*tuned, PROMPTS, **options)
    assert tuned[0].training
    assert (
        off
        == evaluate.answers(base, tuned[1], PROMPTS, **options)
        != evaluate.answers(*tuned, PROMPTS, **options)
    )
