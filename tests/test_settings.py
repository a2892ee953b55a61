import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.settings import (
    COLAB_MINUTES,
    DEFAULTS,
    FIELDS,
    PRESETS,
    Settings,
    coerce,
    from_environment,
    resolve,
    settle,
    unusual,
)


@pytest.mark.parametrize(
    "name,given,value",
    [
        ("learning_rate", "5e-6", 5e-6), ("epochs", 2, 2.0), ("max_steps", 2.0, 2), ("max_steps", "7", 7),
        ("seed", "0", 0),
        ("liger_kernel", "False", False), ("liger_kernel", 1, True), ("tokens_per_batch", "auto", "auto"),
        ("tokens_per_batch", "4096", 4096), ("base_model", " a/b ", "a/b"), ("method", "qlora", "qlora"),
    ],
)  # fmt: skip
def test_every_door_gives_the_same_typed_value(name, given, value):
    assert coerce(name, given) == value and type(coerce(name, given)) is type(value)


@pytest.mark.parametrize(
    "name,given,said",
    [
        ("learning_rate", "fast", "a number"), ("learning_rate", "nan", "a number"),
        ("learning_rate", -1, "between"),
        ("max_steps", 2.5, "a whole number"), ("max_steps", True, "a whole number"),
        ("liger_kernel", "maybe", "true or false"),
        ("base_model", 3, "text"), ("method", "loraa", "one of auto, full, lora, qlora"),
        ("epochs", None, "a number"),
        ("tokens_per_batch", "many", "or 'auto'"), ("lerning_rate", 1, "did you mean learning_rate"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_sentence_that_says_what_is_allowed(name, given, said):
    with pytest.raises(UserError, match=said) as error:
        coerce(name, given)
    assert "\n" not in str(error.value)


def test_later_layers_win_and_every_value_knows_its_source():
    settings, sources, _ = resolve(
        [("env", {"epochs": "3", "seed": 1}), ("cell", {"epochs": 2}), ("panel", {"seed": 9})]
    )
    assert (settings.epochs, settings.seed) == (2.0, 9)
    assert (sources["epochs"], sources["seed"], sources["lora_rank"]) == ("cell", "panel", "default")
    assert sources["pairs_per_step"] == "preset demo"


def test_explicit_values_win_over_the_preset():
    settings, sources, _ = resolve([("flag", {"preset": "phi2-article", "epochs": 0.5})])
    assert (
        settings.epochs == 0.5
        and settings.learning_rate == 5e-6
        and sources["learning_rate"] == "preset phi2-article"
    )


def test_phi2_article_has_every_value_of_the_article():
    s = resolve([("flag", {"preset": "phi2-article"})])[0]
    assert (s.base_model, s.dataset, s.epochs, s.method) == (
        "microsoft/phi-2",
        "argilla/dpo-mix-7k",
        1.0,
        "full",
    )
    assert (s.learning_rate, s.warmup_steps, s.max_prompt_tokens, s.max_tokens, s.pairs_per_step) == (
        5e-6,
        100,
        128,
        2048,
        4,
    )


@pytest.mark.parametrize(
    "explicit,gpu,preset",
    [({}, 0, "demo"), ({}, 14.7, "colab-t4"), ({"dataset": "x.jsonl"}, 0, "auto"),
        ({"base_model": "m"}, 48, "auto"),
     ({"epochs": 2}, 0, "demo")],
)  # fmt: skip
def test_auto_preset_goes_by_hardware_and_by_what_was_chosen(explicit, gpu, preset):
    settings, _, why = resolve([("flag", explicit)], gpu_gib=gpu)
    assert settings.preset == preset and len(why) > 20


T4_MODEL, DEMO_MODEL = "Qwen/Qwen2.5-1.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
SEVEN = "Qwen/Qwen2.5-7B-Instruct"
# GPU's GiB, what was touched, weights of the model in billions, method, pairs -> base model, preset, and
# learning_rate, or_weight, epochs, warmup_steps, max_tokens, max_pairs
RUNS = [
    (14.7, {"dataset": "my.csv"}, 1.54, "lora", 640, T4_MODEL, "auto", (5e-5, 0.25, 3, 12, 2048, 0)),
    (14.7, {"dataset": "my.csv"}, 1.54, "lora", 20_000, T4_MODEL, "auto", (5e-5, 0.25, 1, 100, 2048, 0)),
    (44.4, {"dataset": "my.csv"}, 1.54, "qlora", 3000, T4_MODEL, "auto", (5e-5, 0.25, 2, 37, 2048, 0)),
    (0, {"dataset": "my.csv"}, 0.135, "lora", 640, DEMO_MODEL, "auto", (5e-4, 0.5, 3, 12, 2048, 0)),
    (14.7, {"base_model": SEVEN}, 7.6, "qlora", 5936, SEVEN, "auto", (5e-5, 0.1, 1, 37, 2048, 6000)),
    (0, {"base_model": SEVEN}, 7.6, "lora", 200, SEVEN, "auto", (5e-5, 0.1, 3, 3, 2048, 0)),
    (0, {"dataset": "my.csv"}, 0.135, "full", 640, DEMO_MODEL, "auto", (1e-5, 0.5, 3, 12, 2048, 0)),
    (14.7, {"base_model": SEVEN, "dataset": "x"}, 7.6, "qlora", 640, SEVEN, "auto",
     (5e-5, 0.1, 3, 12, 2048, 0)),
    (79.1, {"base_model": SEVEN, "dataset": "x"}, 7.6, "full", 6000, SEVEN, "auto",
     (5e-6, 0.1, 1, 37, 2048, 0)),
    (14.7, {"dataset": "x", "learning_rate": 1e-4}, 1.54, "lora", 640, T4_MODEL, "auto",
     (1e-4, 0.25, 3, 12, 2048, 0)),
    (14.7, {"dataset": "x", "epochs": 1}, 1.54, "lora", 640, T4_MODEL, "auto", (5e-5, 0.25, 1, 4, 2048, 0)),
    (14.7, {"dataset": "x", "max_steps": 20}, 1.54, "lora", 640, T4_MODEL, "auto",
     (5e-5, 0.25, 3, 1, 2048, 0)),
    (14.7, {"dataset": "demo"}, 0.135, "lora", 200, DEMO_MODEL, "auto", (5e-4, 0.5, 3, 3, 2048, 0)),
    (14.7, {}, 1.54, "lora", 5936, T4_MODEL, "colab-t4", (5e-5, 0.25, 1, 10, 1024, 6000)),
    (14.7, {"or_weight": 0.5}, 1.54, "lora", 5936, T4_MODEL, "colab-t4", (5e-5, 0.5, 1, 10, 1024, 6000)),
    (14.7, {"base_model": "auto"}, 1.54, "lora", 5936, T4_MODEL, "colab-t4",
     (5e-5, 0.25, 1, 10, 1024, 6000)),
    (0, {}, 0.135, "lora", 224, DEMO_MODEL, "demo", (2e-3, 0.5, 1, 2, 256, 0)),
    (0, {"learning_rate": 1e-3}, 0.135, "lora", 224, DEMO_MODEL, "demo", (1e-3, 0.5, 1, 2, 256, 0)),
    (0, {"preset": "tiny"}, 1e-4, "lora", 40, "tiny-random", "tiny", (1e-2, 0.5, 1, 0, 512, 48)),
]  # fmt: skip


@pytest.mark.parametrize("gib,touched,billions,method,pairs,base,preset,values", RUNS)
def test_what_was_touched_and_the_machine_decide_what_is_run(
    gib, touched, billions, method, pairs, base, preset, values
):
    settings, sources, _ = resolve([("flag", touched)], gpu_gib=gib)
    assert (settings.base_model, settings.preset) == (base, preset)
    found, why = settle(settings, positions=[32768], weights=billions * 1e9, method=method, pairs=pairs)
    names = ("learning_rate", "or_weight", "epochs", "warmup_steps", "max_tokens", "max_pairs")
    assert tuple(getattr(found, name) for name in names) == values
    for name in names[:-1]:  # each value says where it came from
        assert (sources | why)[name].startswith(("auto: ", "preset ", "flag")), name
    assert "auto" not in (getattr(found, name) for name in names)
    assert settle(found, positions=[16], weights=1, method="full", pairs=9) == (found, {})


@pytest.mark.parametrize(
    "base,dataset,preset",
    [("microsoft/phi-2", "argilla/dpo-mix-7k", "phi2-article"), (T4_MODEL, "argilla/dpo-mix-7k", "colab-t4"),
     ("microsoft/phi-2", "argilla/dpo-mix-7k:train", "phi2-article"), ("microsoft/phi-2", "my.csv", ""),
     (DEMO_MODEL, "demo", "demo")],
)  # fmt: skip
def test_model_and_pairs_of_a_preset_name_it_and_change_nothing(base, dataset, preset):
    settings, _, why = resolve([("cell", {"base_model": base, "dataset": dataset})], gpu_gib=44)
    assert (f"set preset={preset} to take all its values" in why) == bool(preset)
    assert settings.preset == "auto" and settings.learning_rate == "auto"
    assert "set preset=" not in resolve([("cell", {"preset": "phi2-article"})])[2]


@pytest.mark.parametrize(
    "billions,method,values,said",
    [
        (2.8, "full", {"learning_rate": 5e-4}, "learning_rate 0.0005 is far above .* full tuning of 2.8 b"),
        (1.5, "lora", {"learning_rate": 5e-6}, "learning_rate 5e-06 is far below .* adapters on 1.5 billion"),
        (7.6, "qlora", {"or_weight": 5.0}, "or_weight 5 is far above .* 7.6 billion weights .0.05 to 0.5."),
        (0.1, "lora", {"epochs": 100.0}, "epochs 100 is far above what is usual for 800 pairs"),
        (0.1, "lora", {"warmup_steps": 400}, "warmup_steps 400 is far above what is usual for 300 steps"),
        (0.1, "lora", {"learning_rate": 2e-3, "or_weight": 1.0, "epochs": 5.0, "warmup_steps": 50}, ""),
        (0.1, "lora", {"epochs": 100.0, "max_steps": 40}, ""),
        (7.6, "lora", {"objective": "sft", "or_weight": 9.0}, ""),
        (7.6, "lora", {"objective": "dpo", "learning_rate": 5e-4}, "far above .* .1.7e-06 to 1.7e-05."),
        (1e-3, "lora", {"learning_rate": 0.01}, ""),  # a toy, for tests
        (7.6, "full", {}, ""),
    ],
)  # fmt: skip
def test_a_value_far_from_usual_is_told_in_a_sentence(billions, method, values, said):
    given = Settings(**values)
    told = unusual(given, weights=billions * 1e9, method=method, pairs=800)
    assert len(told) == bool(said) and re.search(said, " ".join(told))
    known = settle(given, weights=billions * 1e9, method=method, pairs=800)[0]
    assert {name: getattr(known, name) for name in values} == values


def test_another_model_keeps_the_pairs_of_the_machine_and_another_dataset_its_model():
    settings, sources, _ = resolve([("panel", {"base_model": SEVEN})], gpu_gib=14.7)
    assert (settings.dataset, sources["dataset"]) == ("argilla/dpo-mix-7k", "preset colab-t4")
    assert resolve([("panel", {"base_model": SEVEN})])[0].dataset == "demo"
    settings, sources, _ = resolve([("panel", {"dataset": "my.csv"})], gpu_gib=14.7)
    assert (settings.base_model, sources["base_model"]) == (T4_MODEL, "auto: a GPU with 15 GiB")
    assert (settings.max_pairs, sources["max_pairs"]) == (0, "default")


def test_a_model_of_few_positions_shortens_what_is_read_of_its_own_accord():
    small = settle(Settings(), positions=[512])[0]
    assert (small.max_tokens, small.max_prompt_tokens) == (512, 510)
    assert settle(Settings(max_prompt_tokens=3000), positions=[32768])[0].max_tokens == 4024
    assert settle(Settings(max_tokens=4096), positions=[512])[0].max_tokens == 4096


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_leave_nothing_to_auto_that_goes_by_the_model(preset):
    settings = resolve([("flag", {"preset": preset})], gpu_gib=15)[0]
    assert settle(settings, gpu_gib=0, positions=[64], weights=1, method="full", pairs=1) == (settings, {})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_known_settings_within_their_limits(preset):
    assert {name: coerce(name, value) for name, value in PRESETS[preset].items()} == PRESETS[preset]
    resolve([("flag", {"preset": preset})])


def test_defaults_pass_their_own_door_and_every_setting_is_explained():
    assert {name: coerce(name, value) for name, value in DEFAULTS.items()} == DEFAULTS
    assert list(FIELDS)[:4] == ["base_model", "dataset", "epochs", "learning_rate"]
    assert all(len(f.metadata["help"]) > 10 for f in dataclasses.fields(Settings))


def test_limits_that_clash_are_named():
    with pytest.raises(UserError, match="max_prompt_tokens is 50 and max_tokens is 40"):
        Settings(max_prompt_tokens=50, max_tokens=40)


@pytest.mark.parametrize(
    "given,said",
    [({"price_per_hour": "cheap"}, "price_per_hour is 'cheap', but must be a number"),
     ({"price_per_hour": -1}, "must lie between 0 and"), ({"max_cost": -2, "price_per_hour": 1}, "between"),
     ({"max_cost": 2}, "price_per_hour is not said.*max_minutes"),
     ({"on_finish": "halt"}, "one of nothing, ")],
)  # fmt: skip
def test_money_that_makes_no_sense_is_one_sentence(given, said):
    with pytest.raises(UserError, match=said) as error:
        resolve([("flag", given)])
    assert "\n" not in str(error.value)


def test_a_misspelt_environment_variable_is_not_silent():
    assert from_environment({"LAZYORPO_EPOCHS": "2", "PATH": "x"}) == {"epochs": 2.0}
    with pytest.raises(UserError, match="did you mean epochs"):
        from_environment({"LAZYORPO_EPOCH": "2"})


@pytest.mark.parametrize("module,heavy", [("lazyorpo_lib", "torch"), ("lazyorpo_lib.settings", "numpy"),
                                          ("lazyorpo_lib.orpo.data", "torch"),
                                          ("lazyorpo_lib.rows.candidates", "torch"),
                                          ("lazyorpo_lib.results.reading", "torch")])  # fmt: skip
def test_light_modules_do_not_import_heavy_ones(module, heavy):
    code = f"import sys, {module}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("page", ["README.md", "notebooks/LazyORPO.ipynb"])
def test_what_colab_is_told_is_what_the_preset_does(page):
    text = " ".join((Path(__file__).parents[1] / page).read_text(encoding="utf-8").split())
    told = re.findall(r"up to ([\d,]+) rows of (?:real )?pairs, in about (\d+) minutes", text)
    assert told == [(f"{PRESETS['colab-t4']['max_pairs']:,}", str(COLAB_MINUTES))]
