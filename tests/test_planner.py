"""The planner: its arithmetic against whole simulations, its choices, its words. Configs are published shapes; no network."""

import json
import re

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, MixtralConfig

from lazyorpo_lib import attention, simulation
from lazyorpo_lib.__main__ import main
from lazyorpo_lib.batching import EncodedPair
from lazyorpo_lib.model import Machine
from lazyorpo_lib.panel import Panel
from lazyorpo_lib.planner import CARDS, MARGIN, Lengths, find_card, make_plan, measured_lengths, preset_lengths
from lazyorpo_lib.run import estimate
from lazyorpo_lib.settings import Settings, UserError

CPU = Machine("cpu", "CPU", 16.0)
LENGTHS = Lengths(pairs=400, prompt=60.0, chosen=50.0, rejected=40.0, longest=220)
GEMMA_7B = dict(
    vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=16, head_dim=256, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_3_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip


def small(layers: int = 6):
    return LlamaConfig(
        vocab_size=4000, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip


def plan(target=CPU, lengths=LENGTHS, config=None, dtype=torch.float32, **settings):
    return make_plan(config or small(), Settings(**settings), target, lengths, dtype=dtype)


def gib(plan, method):
    return next(m for m in plan.methods if m.method == method)


@pytest.mark.parametrize(
    ("method", "dtype"), [("full", torch.float32), ("full", torch.bfloat16), ("lora", torch.bfloat16), ("qlora", torch.float32)]
)
def test_three_layers_foretell_the_peak_of_five(method, dtype, monkeypatch):
    pair = [EncodedPair(0, [1] * 300, [1] * 250, [1] * 200)]
    half = [EncodedPair(0, [1] * 150, [1] * 125, [1] * 100)]
    given = (small(), Settings(), method, dtype, CPU)
    foretold = simulation.simulate(*given, [half, pair])
    monkeypatch.setattr(simulation, "LAYERS", 5)  # four checkpointed, the last one not
    ((_, phases),) = simulation.simulate(*given, [pair]).points
    for held in (False, True):
        direct = max(row[2 if held else 1] for row in phases.values())
        assert 0.995 <= foretold.peak(750, 5, 4, held)[0] / direct <= 1.03


def test_the_peak_grows_with_tokens_and_shrinks_with_checkpointing():
    split = [gib(plan(tokens_per_batch=t, checkpointed_layers=c), "lora").peak_gib for t, c in ((900, 0), (900, 6), (500, 6))]
    assert split[0] > split[1] > split[2]


def test_parts_sum_to_the_peak_and_the_plan_is_json():
    result = plan(method="lora")
    data = json.loads(json.dumps(result.as_dict()))
    assert {"device", "memory_gib", "methods", "chosen", "why"} <= data.keys()
    for m in data["methods"]:
        assert sum(m["parts"].values()) == pytest.approx(m["peak_gib"])
        assert set(m["parts"]) == {"weights", "adapters", "gradients", "optimizer", "activations", "head", "framework"}


def test_the_panels_line_moves_with_the_settings(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small().to_dict() | dict(hidden_size=512, vocab_size=32000)))
    cell = {"base_model": str(tmp_path), "dataset": "argilla/dpo-mix-7k", "method": "lora"}
    panel = Panel(cell, estimate=lambda settings: estimate(settings, "T4").line())
    before = panel.table().splitlines()[-1]
    panel.edit("method", "full")
    after = panel.table().splitlines()[-1]
    assert before != after and all(re.match(r"\d+\.\d of 14\.7 GiB, about .* on this T4: fits", line) for line in (before, after))


def test_settings_given_as_numbers_are_kept():
    m = plan(tokens_per_batch=333, checkpointed_layers=2).methods[0]
    assert (m.tokens_per_batch, m.checkpointed_layers) == (333, 2)


def test_the_best_split_leaves_the_margin_and_holds_the_longest_pair():
    for m in plan("T4", dtype=torch.float16).methods:
        assert m.fits and m.peak_gib <= 14.7 * (1 - MARGIN) and m.tokens_per_batch >= LENGTHS.longest


def test_auto_takes_full_tuning_only_at_its_learning_rates():
    assert plan(learning_rate=8e-6).chosen == "full"
    gentle = plan(learning_rate=5e-4)
    assert gentle.chosen == "lora" and "learning_rate" in gentle.why


def test_paged_state_leaves_the_card_but_not_the_cpu():
    on_card = gib(plan("A40", optimizer="paged_adamw_32bit", dtype=torch.bfloat16), "full")
    on_cpu = gib(plan(optimizer="paged_adamw_32bit"), "full")
    assert on_card.parts["optimizer"] == 0 < on_cpu.parts["optimizer"]


@pytest.mark.parametrize("name", ["t4", "NVIDIA A40", "a100 80GB", "H200"])
def test_cards_are_found_in_any_case(name):
    assert find_card(name) in CARDS.values()


def test_an_unknown_card_is_one_sentence_that_names_all():
    with pytest.raises(UserError) as error:
        find_card("A41")
    assert all(name in str(error.value) for name in CARDS)


def test_ram_stands_for_cpu_and_apple():
    assert find_card("cpu-32").memory_gib == 32 and find_card("Apple-24").device == "mps"


def test_known_lengths_follow_the_limits():
    cut = Settings(max_prompt_tokens=128, max_tokens=512)
    assert preset_lengths("argilla/dpo-mix-7k", cut).pairs < preset_lengths("argilla/dpo-mix-7k", Settings()).pairs
    assert preset_lengths("argilla/dpo-mix-7k", cut).longest <= 1024
    assert "guess" in preset_lengths("someone/something", cut).source


def test_measured_lengths_count_the_prompt_once():
    found = measured_lengths([EncodedPair(0, [1] * 5, [1] * 4, [1] * 3), EncodedPair(1, [1] * 7, [1] * 2, [1] * 1)])
    assert (found.mean, found.longest, found.pairs) == (11.0, 12, 2)


def test_planning_leaves_nothing_behind():
    layer_norm, mask = torch.nn.functional.layer_norm, attention._mask
    plan(lengths=Lengths(400, 61.0, 50.0, 40.0, 220))
    assert attention._row is None and attention._mask is mask and torch.nn.functional.layer_norm is layer_norm


def test_gemma_7b_on_an_a40_takes_adapters_but_not_full_tuning():
    lengths = preset_lengths("argilla/dpo-mix-7k", Settings())
    result = plan("A40", lengths, GemmaConfig(**GEMMA_7B), torch.bfloat16)
    assert gib(result, "lora").fits and not gib(result, "full").fits and result.chosen == "lora"
    assert re.match(r"\d+\.\d of 44\.4 GiB, about \d+ min on this A40: fits", result.line())
    full = plan("A40", lengths, GemmaConfig(**GEMMA_7B), torch.bfloat16, method="full")
    assert full.changes and "does not fit" in full.line() and "method=lora" in " ".join(full.changes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a valid JSON file"),
        ('{"model_type": "nonesuch"}', "does not know: choose another base_model"),
        ('{"model_type": "vit"}', "does not know: choose another base_model"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}', "check base_model"),
        (None, "holds no config.json"),
    ],
)
def test_a_config_that_cannot_be_planned_is_one_sentence(tmp_path, content, said):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        main(["--plan", "--base-model", str(tmp_path), "--device", "T4"])
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_table_names_every_card_and_what_fits(capsys):
    assert main(["--plan", "--preset", "tiny", "--device", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(CARDS) and "min" in lines[1] or " s" in lines[1]
    assert main(["--preset", "tiny", "--device", "all", "--json"]) == 0
    assert [plan["device"] for plan in json.loads(capsys.readouterr().out)] == list(CARDS)


@pytest.mark.slow
def test_llama_3_8b_with_4_bit_weights_takes_a_long_pair_on_a_t4():
    lengths = Lengths(1000, 1024.0, 1024.0, 1024.0, 3072)
    m = plan("T4", lengths, LlamaConfig(**LLAMA_3_8B), torch.float16, method="qlora", checkpointed_layers=32, pairs_per_step=1).method
    assert m.fits and m.peak_gib - m.parts["framework"] <= 9.0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_cards_share_the_weights_gradients_and_optimizer_and_nothing_else(method):
    # Deep and one pair at a time, so that on one card the gradients would outweigh what the backward still holds.
    settings = dict(method=method, optimizer="adafactor", checkpointed_layers=20, tokens_per_batch=16)
    one, four, eight = (
        next(m for m in plan.methods if m.method == method).parts
        for cards in (1, 4, 8)
        for plan in [
            make_plan(small(24), Settings(pairs_per_step=2 * cards, **settings), "A100-80", LENGTHS, dtype=torch.float32, cards=cards)
        ]
    )
    for name in ("weights", "adapters", "gradients", "optimizer"):
        assert four[name] == pytest.approx(one[name] / 4) and eight[name] == pytest.approx(one[name] / 8)
    for name in ("activations", "head"):
        assert four[name] == pytest.approx(one[name])
    assert eight["gathered"] == pytest.approx(four["gathered"]) and four["gathered"] > 0


def test_a_step_of_one_batch_on_many_cards_holds_no_whole_gradients():
    parts = []
    for pairs, batch in ((4, 10**6), (40, 16)):  # all of a card's pairs at once; one after the other
        settings = Settings(method="full", checkpointed_layers=20, pairs_per_step=pairs, tokens_per_batch=batch)
        parts.append(make_plan(small(24), settings, "A100-80", LENGTHS, cards=4).methods[0].parts)
    assert parts[0]["activations"] == pytest.approx(parts[1]["activations"], rel=0.05)
    assert parts[0]["gradients"] == parts[1]["gradients"]


def test_of_experts_too_only_two_layers_are_gathered():
    config = MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1
    )
    settings = Settings(method="lora", pairs_per_step=4)
    parts = make_plan(config, settings, "A100-80", LENGTHS, dtype=torch.float32, cards=4).methods[1].parts
    assert parts["gathered"] < 3 / 8 * 4 * parts["weights"]
