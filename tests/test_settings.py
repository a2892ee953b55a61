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
