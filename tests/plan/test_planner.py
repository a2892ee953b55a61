"""The planner: its arithmetic against whole simulations, its choices, its words. Configs are published
shapes; no network."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    AttentionInterface,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
)
from transformers.integrations import moe
from transformers.models.llama import modeling_llama

from lazyorpo_lib.__main__ import main
from lazyorpo_lib.demo.model import write_tiny
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.fast import attention
from lazyorpo_lib.fast.attention import RowAttention
from lazyorpo_lib.machine import GIB, Machine
from lazyorpo_lib.notebook.panel import Panel
from lazyorpo_lib.orpo.batching import EncodedPair
from lazyorpo_lib.plan import cards, costs, simulation
from lazyorpo_lib.plan.cards import CARDS, find_card
from lazyorpo_lib.plan.costs import MARGIN
from lazyorpo_lib.plan.lengths import Lengths, measured_lengths, preset_lengths
from lazyorpo_lib.plan.planner import estimate, make_plan, plan_cards
from lazyorpo_lib.settings import COLAB_MINUTES, PRESETS, Settings

CPU = Machine("cpu", "CPU", 16.0)
LENGTHS = Lengths(pairs=400, prompt=60.0, chosen=50.0, rejected=40.0, longest=220)
GEMMA_7B = dict(
    vocab_size=256000,
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
    tie_word_embeddings=True,
)
LLAMA_3_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
QWEN_2_5 = dict(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
GEMMA_2_2B = dict(
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
)


@pytest.fixture(autouse=True, scope="module")
def own_profiles():
    """Simulate at the very lengths, and take nothing from other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "simulate", costs.simulate.__wrapped__)
        patch.setattr(costs, "_profiles", {})
        yield


def small(layers: int = 6):
    return LlamaConfig(
        vocab_size=4000,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def plan(target=CPU, lengths=LENGTHS, config=None, dtype=torch.float32, brief=False, **settings):
    """A plan; `brief`: of the method in the settings alone, with the same figures."""
    return make_plan(config or small(), Settings(**settings), target, lengths, dtype=dtype, brief=brief)


def gib(plan, method):
    return next(m for m in plan.methods if m.method == method)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("full", torch.float32), ("full", torch.bfloat16), ("lora", torch.bfloat16), ("qlora", torch.float32)],
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


SMALL = dict(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize(
    ("method", "dtype", "machine"),
    [
        ("lora", torch.bfloat16, CARDS["A40"]),
        ("full", torch.float16, CARDS["T4"]),
        ("qlora", torch.float32, CPU),
    ],
)
@pytest.mark.parametrize("make", [PhiConfig, MixtralConfig])
def test_layer_norms_and_experts_are_simulated_themselves_also_where_layers_run_again(
    make, method, dtype, machine
):
    pair = EncodedPair(0, [1] * 30, [1] * 25, [1] * 20)
    profile = simulation.simulate(make(**SMALL), Settings(), method, dtype, machine, [[pair]])
    assert profile.stood_in == ""
    ((_, phases),) = profile.points
    assert phases["backward 1"].launches > 1.2 * phases["backward 2"].launches  # the forward once more


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [LlamaConfig(**LLAMA_3_8B), Qwen2Config(**QWEN_2_5), Gemma2Config(**GEMMA_2_2B)]
)
def test_the_profile_of_a_plan_is_what_eight_pairs_take_when_they_are_simulated(config):
    card, settings = find_card("A100-80"), Settings(method="lora", pairs_per_step=16)
    lengths = Lengths(1000, 300.0, 300.0, 300.0, 900)
    foretold = costs.Costs(config, settings, card, lengths, torch.bfloat16, "lora").profile
    assert not foretold.stood_in
    row = [EncodedPair(i, [1] * 300, [1] * 300, [1] * 300) for i in range(8)]
    direct = simulation.simulate(config, settings, "lora", torch.bfloat16, card, [row])
    ((_, phases),) = direct.points
    for name, (start, peak, *_) in phases.items():
        assert foretold.at(7200)[name][:2] == pytest.approx([start, peak], rel=0.03, abs=2**20)
    for held in (False, True):
        assert foretold.peak(7200, 3, 2, held)[0] == pytest.approx(
            max(row[2 if held else 1] for row in phases.values()), rel=0.03
        )
    assert foretold.work(7200, 3, 2) == pytest.approx(direct.work(7200, 3, 2), rel=0.05)


@pytest.mark.parametrize("card", ["T4", "A40"])
def test_a_plan_for_a_gpu_calls_no_attention_of_torch(card, monkeypatch):
    def missing(*args, **kwargs):
        raise TypeError("varlen_attn() got an unexpected keyword argument")

    expected = plan(card, dtype=torch.float16)
    monkeypatch.setattr(costs, "_profiles", {})
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", missing)
    monkeypatch.setattr(RowAttention, "by_pairs", missing)
    monkeypatch.setattr(RowAttention, "_disagreement", missing)
    monkeypatch.setattr(attention, "sdpa_attention_forward", missing)
    assert plan(card, dtype=torch.float16) == expected and costs._profiles
    assert "simulated" not in expected.why


def test_where_nothing_can_be_simulated_a_plan_is_a_rough_estimate_that_says_so(monkeypatch):
    expected = plan("A40", dtype=torch.bfloat16)
    monkeypatch.setattr(costs, "_profiles", {})
    monkeypatch.setattr(simulation, "FakeTensorMode", None)  # of a torch that has no such thing
    rough = plan("A40", dtype=torch.bfloat16)
    assert "rough estimate" in rough.why and "simulated" not in expected.why
    for ours, theirs in zip(rough.methods, expected.methods, strict=True):
        assert ours.fits and 0.5 < ours.peak_gib / theirs.peak_gib < 2


def test_a_plan_after_liger_is_the_plan_before_it(monkeypatch):
    def rotary(*args, **kwargs):
        raise RuntimeError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    rotary.__module__ = "liger_kernel.transformers.rope"
    expected = plan("A40", dtype=torch.bfloat16)
    monkeypatch.setattr(costs, "_profiles", {})
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
    assert plan("A40", dtype=torch.bfloat16) == expected and costs._profiles
    assert modeling_llama.apply_rotary_pos_emb is rotary and "simulated" not in expected.why


def test_the_peak_grows_with_tokens_and_shrinks_with_checkpointing():
    split = [
        gib(plan(tokens_per_batch=t, checkpointed_layers=c), "lora").peak_gib
        for t, c in ((900, 0), (900, 6), (500, 6))
    ]
    assert split[0] > split[1] > split[2]


def test_parts_sum_to_the_peak_and_the_plan_is_json():
    result = plan(method="lora")
    data = json.loads(json.dumps(result.as_dict()))
    assert {"device", "memory_gib", "methods", "chosen", "why"} <= data.keys()
    for m in data["methods"]:
        assert sum(m["parts"].values()) == pytest.approx(m["peak_gib"])
        assert set(m["parts"]) == {
            "weights",
            "adapters",
            "gradients",
            "optimizer",
            "activations",
            "head",
            "framework",
        }


def test_frozen_weights_count_whole_on_a_cpu_for_loading_them_reads_every_one():
    config = small()  # its embeddings are untied: rows that no pair looks up are read too, by check_finite
    weights = sum(p.numel() for p in simulation.on_meta(config, torch.float32).parameters())
    parts = plan(config=config, method="lora").method.parts
    assert parts["weights"] * GIB == pytest.approx(4 * weights)


def test_the_panels_line_moves_with_the_settings(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(small().to_dict() | dict(hidden_size=512, vocab_size=32000))
    )
    cell = {"base_model": str(tmp_path), "dataset": "argilla/dpo-mix-7k", "method": "lora"}
    panel = Panel(cell, estimate=lambda settings: estimate(settings, "T4", brief=True).line())
    before = panel.table().splitlines()[-1]
    panel.edit("method", "full")
    after = panel.table().splitlines()[-1]
    assert before != after and all(
        re.match(r"\d+\.\d of 14\.7 GiB, about .* on this T4: fits", line) for line in (before, after)
    )


BRIEF = [  # settings, the card, and what is planned for a panel
    ({}, "T4", ["lora"]),
    ({"learning_rate": 5e-6}, "T4", ["full"]),
    ({"method": "full"}, "T4", ["full"]),
    ({"method": "qlora"}, "T4", ["qlora"]),
    ({}, Machine("cuda", "T4", 0.05, (7, 5)), ["lora", "qlora"]),  # nothing fits
    ({}, Machine("cuda", "T4", 0.001, (7, 5)), ["qlora"]),  # nor do the weights alone
    ({"method": "lora"}, Machine("cuda", "T4", 0.05, (7, 5)), ["lora", "qlora"]),
    ({"method": "full"}, Machine("cuda", "T4", 0.001, (7, 5)), ["full", "qlora"]),  # lora cannot
]


@pytest.mark.parametrize("settings,target,planned", BRIEF)
def test_a_brief_plan_says_what_the_whole_one_says_and_simulates_less(settings, target, planned):
    whole = plan(target, dtype=torch.float16, **settings)
    few = make_plan(small(), Settings(**settings), target, LENGTHS, dtype=torch.float16, brief=True)
    assert few.said() == whole.said() and few.chosen == whole.chosen
    assert [m.method for m in few.methods] == planned


def test_of_a_quantised_base_a_brief_plan_says_the_same_and_full_tuning_is_refused():
    config, card = small(), Machine("cuda", "T4", 0.05, (7, 5))
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    whole, few = (make_plan(config, Settings(), card, LENGTHS, brief=brief) for brief in (False, True))
    assert few.said() == whole.said() and few.chosen == whole.chosen == "lora"
    with pytest.raises(UserError, match="set method=qlora or lora"):
        plan(config=config, method="full")


def test_a_plan_leaves_the_config_as_it_is_and_is_not_simulated_twice(monkeypatch):
    config, lengths = small(layers=7), replace(LENGTHS, longest=221)
    config.dtype = torch.bfloat16
    before, first = config.to_json_string(), plan("T4", lengths, config)
    assert config.to_json_string() == before
    monkeypatch.setattr(costs, "simulate", None)
    monkeypatch.setattr(costs, "_Shape", None)
    again = small(layers=7)
    again.dtype = torch.bfloat16
    assert plan("T4", lengths, again) == first


SPLIT = dict(method="full", tokens_per_batch=200, checkpointed_layers=0, eval_pairs=0, epochs=1.0)


def on_cards(cards, sharded, pairs_per_step, target="A40", **changes):
    settings = Settings(**SPLIT | changes, pairs_per_step=pairs_per_step)
    how = dict(dtype=torch.bfloat16, cards=cards, sharded=sharded, brief=True)
    return make_plan(small(), settings, target, LENGTHS, **how).method


def seconds(text, method):
    return float(re.search(text + r" ([\d.e-]+)", " ".join(method.arithmetic))[1])


def test_a_card_of_four_under_ddp_holds_what_one_card_holds_for_its_pairs():
    one, four = on_cards(1, True, 2), on_cards(4, False, 8)
    assert four.parts == one.parts and "gathered" not in four.parts
    assert seconds("computing", four) == seconds("computing", one)
    weights = one.parts["weights"] * GIB / 4  # of 4 bytes
    assert seconds("a card sends", four) == pytest.approx(2 * 3 / 4 * 4 * weights / 1e9, rel=0.01)
    assert "sends" not in " ".join(one.arithmetic)


def test_a_card_of_four_under_fsdp2_holds_a_quarter_and_sends_what_it_gathers():
    one, four = on_cards(1, True, 2), on_cards(4, True, 8)
    for part in ("weights", "optimizer"):
        assert four.parts[part] == pytest.approx(one.parts[part] / 4)
    assert four.parts["gathered"] > 0
    batches = int(re.search(r"in (\d+) micro-batches", four.arithmetic[1])[1])
    assert batches > 1
    weights = one.parts["weights"] * GIB / 4
    sent = batches * 3 / 4 * (2 * 2 + 4) * weights  # gathered twice in 16 bit; gradients summed in 32
    assert seconds("a card sends", four) == pytest.approx(sent / 1e9, rel=0.01)


def test_a_step_takes_no_less_than_its_links_which_are_slower_between_machines():
    slow, quick = on_cards(4, False, 8, "T4"), on_cards(4, False, 8, "H100")
    assert seconds("GB in", slow) / seconds("GB in", quick) == pytest.approx(450 / 12, rel=0.01)
    far = on_cards(16, False, 16, "H100")
    per_byte = [seconds("GB in", m) / seconds("a card sends", m) for m in (far, quick)]
    assert per_byte[0] / per_byte[1] == pytest.approx(450 / 50, rel=0.02)
    step = seconds("micro-batches,", slow)
    assert step >= seconds("GB in", slow) * 0.99


def test_the_command_line_plans_for_several_cards_both_ways(tmp_path, capsys):
    write_tiny(tmp_path / "base")
    flags = ["--base-model", str(tmp_path / "base"), "--method", "lora", "--device", "T4", "--cards", "2"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "on this 2 x T4 (DDP)" in said and "on this 2 x T4 (FSDP2)" in said
    assert said.count("meanwhile a card sends") == 2
    assert main([*flags, "--json"]) == 0
    assert [plan["device"] for plan in json.loads(capsys.readouterr().out)] == [
        "2 x T4 (DDP)",
        "2 x T4 (FSDP2)",
    ]


@pytest.mark.parametrize(
    "cards, device, said",
    [
        ("0", "T4", "whole number from 1"),
        ("-2", "T4", "whole number from 1"),
        ("two", "T4", "whole number from 1"),
        ("2.5", "T4", "whole number from 1"),
        ("9" * 30, "T4", "whole number from 1"),
        ("", "T4", "whole number from 1"),
        ("2", "cpu-16", "name it, as in --device H100"),
        ("2", "apple-16", "name it, as in --device H100"),
        ("2", "all", "name it, as in --device H100"),
    ],
)
def test_a_number_of_cards_that_is_none_is_a_sentence(cards, device, said):
    with pytest.raises(UserError, match=f"--cards is '{re.escape(cards)}', which .*{said}"):
        main(["--plan", "--device", device, f"--cards={cards}"])


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


def test_a_plan_says_what_auto_takes_for_the_chosen_method_and_what_is_far_from_usual():
    taken = plan()
    assert taken.chosen == "lora" and "method=full" in taken.why  # all weights only for whoever asks
    values = {name: value for name, (value, _) in taken.auto.items()}
    assert values["method"] == "lora" and (values["learning_rate"], values["or_weight"]) == (5e-4, 0.5)
    told = taken.said().splitlines()
    assert told[0] == taken.line() and "learning_rate 0.0005 (adapters on" in told[1] and len(told) == 2
    assert told[1] in taken.table()
    whole = plan(method="full", epochs=2.0)
    assert whole.auto["learning_rate"][0] == 1e-5 and not {"epochs", "method"} & whole.auto.keys()


def test_what_an_hour_costs_stands_beside_the_minutes():
    free, paid = plan(), plan(price_per_hour=0.5)
    cost = f" = {paid.method.minutes / 120:.2f}"
    assert cost in paid.line() and cost in paid.table() and " = " not in free.line() + free.table()


def test_paged_state_leaves_the_card_but_not_the_cpu():
    paged = Settings(optimizer="paged_adamw_32bit")
    on_card = gib(make_plan(small(), paged, "A40", LENGTHS, dtype=torch.bfloat16, begun=True), "full")
    on_cpu = gib(plan(optimizer="paged_adamw_32bit"), "full")
    assert on_card.parts["optimizer"] == 0 < on_cpu.parts["optimizer"]


def test_adamw_takes_the_place_of_its_paged_kind_where_its_state_fits_and_the_run_has_not_begun():
    split = dict(method="full", checkpointed_layers=6, tokens_per_batch=LENGTHS.longest)
    paged = Settings(optimizer="paged_adamw_32bit", **split)

    def taken(gib: float, settings: Settings = paged, **options):
        card = replace(CARDS["A40"], memory_gib=gib / (1 - MARGIN))
        return make_plan(small(), settings, card, LENGTHS, dtype=torch.float32, **options)

    begun, resident = taken(40.0, begun=True), taken(40.0, Settings(optimizer="adamw", **split))
    assert (begun.method.optimizer, taken(40.0).method.optimizer) == ("paged_adamw_32bit", "adamw")
    assert taken(40.0) == resident and begun.method.peak_gib < resident.method.peak_gib
    between = taken((begun.method.peak_gib + resident.method.peak_gib) / 2)
    assert between.method.optimizer == "paged_adamw_32bit" and between.method.fits


def test_every_card_of_the_table_is_planned_as_a_run_on_it_would_be():
    paged = Settings(optimizer="paged_adamw_32bit", precision="float16")
    for planned, card in zip(plan_cards(small(), paged, LENGTHS), CARDS.values(), strict=True):
        assert planned == make_plan(small(), paged, card, LENGTHS) and planned.method.optimizer == "adamw"


def test_8_bit_optimizers_keep_the_state_of_embeddings_in_32_bit():
    table = 4000 * 64
    full = gib(plan(optimizer="adamw_8bit"), "full")
    total = full.parts["weights"] * 2**30 / 4
    assert full.parts["optimizer"] * 2**30 == pytest.approx(8 * table + 2.03 * (total - table))


def test_a_plan_says_what_a_checkpoint_is():
    m = gib(plan(optimizer="paged_adamw_32bit"), "full")
    assert m.checkpoint_gib == pytest.approx(3 * m.parts["weights"]) and m.checkpoint_seconds > 0
    assert f"a checkpoint: {m.checkpoint_gib:.3g} GiB" in m.arithmetic[-1]
    assert gib(plan(), "lora").checkpoint_gib < 0.2 * m.checkpoint_gib


def test_a_card_that_another_process_fills_is_planned_by_what_is_free():
    whole, shared = (
        plan(Machine("cuda", "NVIDIA A40", 44.4, (8, 6), free), dtype=torch.bfloat16) for free in (None, 0.05)
    )
    assert whole.method.fits and "another process" not in whole.why
    assert (
        "only 0.1 GiB of NVIDIA A40 are free" in shared.why and shared.method.peak_gib < whole.method.peak_gib
    )


@pytest.mark.parametrize("name", ["t4", "NVIDIA A40", "a100 80GB", "H200"])
def test_cards_are_found_in_any_case(name):
    assert find_card(name) in CARDS.values()


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("rtx4090", "RTX-4090"),
        ("4090", "RTX-4090"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA L40S", "L40S"),
        ("nvidia b200", "B200"),
    ],
)
def test_cards_are_found_by_the_names_that_people_and_drivers_write(name, card):
    assert find_card(name).name == card


@pytest.mark.parametrize("name", list(CARDS))
def test_every_card_is_found_by_its_own_name_and_memory(name):
    assert cards.listed(name, CARDS[name].memory_gib) is CARDS[name]


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.6),
        ("NVIDIA A100-SXM4-40GB", 19.6),
        ("NVIDIA A100-SXM-64GB", 63.4),
        ("NVIDIA A10G", 22.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7),
        ("NVIDIA GeForce RTX 3090 Ti", 23.7),
        ("NVIDIA GH200 480GB", 95.0),
    ],
)
def test_a_slice_or_a_namesake_of_another_make_is_no_listed_card(name, gib):
    assert cards.listed(name, gib) is None


def test_cards_without_bfloat16_are_planned_in_float16():
    plans = plan_cards(small(), Settings(precision="bfloat16"), LENGTHS)
    assert [p.dtype == "bfloat16" for p in plans] == [card.capability[0] >= 8 for card in CARDS.values()]
    assert {p.dtype for p in plans if p.device in ("V100-16", "P100", "T4")} == {"float16"}


def test_a_small_model_on_a_fast_card_waits_for_its_launches():
    how = dict(dtype=torch.bfloat16, checkpointed_layers=0, method="lora", brief=True)
    seconds = [plan("H100", config=small(n), **how).method.minutes * 60 for n in (12, 24)]
    assert (
        1.7 < seconds[1] / seconds[0] < 2.1 and seconds[0] > 48 * 12 * 100 * costs.LAUNCH
    )  # steps, layers, launches


@pytest.mark.slow
# Ceilings by arithmetic: products at the card's share, all other bytes at its bandwidth. A token of the 8B
# moves 2.15 MB a layer and 1.0 in the head, of the 1.5B 0.89 and 1.1 (12 bytes a logit).
@pytest.mark.parametrize(
    ("card", "large", "middle"), [("T4", 0.30, 0.26), ("A100-80", 0.59, 0.48), ("H100", 0.42, 0.32)]
)
def test_a_step_reaches_the_share_of_a_cards_peak_that_its_products_and_bytes_allow(card, large, middle):
    for config, ceiling in ((LlamaConfig(**LLAMA_3_8B), large), (Qwen2Config(**QWEN_2_5), middle)):
        settings = Settings(method="lora", pairs_per_step=4, checkpointed_layers=0, tokens_per_batch=3600)
        pair, step, *_ = make_plan(
            config, settings, card, Lengths(1000, 300.0, 300.0, 295.0, 900), brief=True
        ).method.arithmetic
        reached = (
            4
            * float(re.search(r"([\d.]+) TFLOP ", pair)[1])
            / float(re.search(r"([\d.]+) s ", step)[1])
            / CARDS[card].tflops_16
        )
        assert reached == pytest.approx(ceiling, rel=0.15)


def test_the_colab_preset_takes_on_a_t4_what_its_sentence_says():
    settings = Settings(**PRESETS["colab-t4"])
    lengths = preset_lengths(settings.dataset, settings)
    m = make_plan(Qwen2Config(**QWEN_2_5), settings, "T4", lengths, brief=True).method
    assert m.fits and abs(m.minutes - COLAB_MINUTES) <= 2


def test_an_unknown_card_is_one_sentence_that_names_all():
    with pytest.raises(UserError) as error:
        find_card("A41")
    assert all(name in str(error.value) for name in CARDS)


def test_ram_stands_for_cpu_and_apple():
    assert find_card("cpu-32").memory_gib == 32 and find_card("Apple-24").device == "mps"


def test_known_lengths_follow_the_limits():
    cut = Settings(max_prompt_tokens=128, max_tokens=512)
    assert (
        preset_lengths("argilla/dpo-mix-7k", cut).pairs
        < preset_lengths("argilla/dpo-mix-7k", Settings()).pairs
    )
    assert preset_lengths("argilla/dpo-mix-7k", cut).longest <= 1024
    assert "guess" in preset_lengths("someone/something", cut).source


def test_measured_lengths_count_the_prompt_once():
    found = measured_lengths(
        [EncodedPair(0, [1] * 5, [1] * 4, [1] * 3), EncodedPair(1, [1] * 7, [1] * 2, [1] * 1)]
    )
    assert (found.mean, found.longest, found.pairs) == (11.0, 12, 2)


def test_planning_leaves_nothing_behind(monkeypatch):
    ours, layer_norm, grouped = RowAttention(), torch.nn.functional.layer_norm, moe._can_use_grouped_mm
    monkeypatch.setattr(costs, "_profiles", {})
    plan()
    assert costs._profiles
    assert AttentionInterface()["lazyorpo"] is ours and ours.row is None
    assert torch.nn.functional.layer_norm is layer_norm and moe._can_use_grouped_mm is grouped


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
        ('{"model_type": "vit"}', "none of transformers' causal language models"),
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
    m = plan(
        "T4",
        lengths,
        LlamaConfig(**LLAMA_3_8B),
        torch.float16,
        method="qlora",
        checkpointed_layers=32,
        pairs_per_step=1,
        brief=True,
    ).method
    assert m.fits and m.peak_gib - m.parts["framework"] <= 9.0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_cards_share_the_weights_gradients_and_optimizer_and_nothing_else(method):
    # Deep and one pair at a time, so that on one card the gradients would outweigh what the backward still
    # holds.
    settings = dict(method=method, optimizer="adafactor", checkpointed_layers=20, tokens_per_batch=16)
    one, four, eight = (
        next(m for m in plan.methods if m.method == method).parts
        for count in (1, 4, 8)
        for plan in [
            make_plan(
                small(24),
                Settings(pairs_per_step=2 * count, **settings),
                "A100-80",
                LENGTHS,
                dtype=torch.float32,
                cards=count,
                brief=True,
            )
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
        settings = Settings(
            method="full", checkpointed_layers=20, pairs_per_step=pairs, tokens_per_batch=batch
        )
        parts.append(make_plan(small(24), settings, "A100-80", LENGTHS, cards=4, brief=True).method.parts)
    assert parts[0]["activations"] == pytest.approx(parts[1]["activations"], rel=0.05)
    assert parts[0]["gradients"] == parts[1]["gradients"]


def test_of_experts_too_only_two_layers_are_gathered():
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    settings = Settings(method="lora", pairs_per_step=4)
    parts = make_plan(config, settings, "A100-80", LENGTHS, dtype=torch.float32, cards=4).methods[1].parts
    assert parts["gathered"] < 3 / 8 * 4 * parts["weights"]
