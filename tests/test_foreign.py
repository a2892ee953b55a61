"""foreign.py: ORPO files of TRL and axolotl as settings; what they hold besides is named."""

import json

import pytest

from lazyorpo_lib.__main__ import main
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.foreign import settings_of
from lazyorpo_lib.settings import resolve

TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: argilla/dpo-mix-7k
dataset_train_split: train
learning_rate: 5e-6
beta: 0.2
max_length: 1024
max_prompt_length: 512
num_train_epochs: 3
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
lora_r: 32
lora_alpha: 64
use_peft: true
load_in_4bit: true
bf16: true
warmup_ratio: 0.1
max_steps: -1
optim: paged_adamw_8bit
lr_scheduler_type: linear
report_to: [wandb]
seed: 7
logging_steps: 10
hub_model_id: null
"""
AXOLOTL = """
base_model: mistralai/Mistral-7B-v0.1
rl: orpo
orpo_alpha: 0.1
datasets:
  - {path: argilla/dpo-mix-7k, split: train, type: chat_template.argilla}
adapter: qlora
lora_r: 16
lora_dropout: 0.05
sequence_len: 4096
micro_batch_size: 1
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.000008
bf16: auto
warmup_steps: 10
flash_attention: true
wandb_project:
"""


def write(folder, text, name="trl.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_of_trls_gives_the_same_run(tmp_path):
    found, note = settings_of(write(tmp_path, TRL))
    assert found == {
        "base_model": "Qwen/Qwen2.5-0.5B", "dataset": "argilla/dpo-mix-7k:train", "learning_rate": 5e-6,
        "or_weight": 0.2, "max_tokens": 1024, "max_prompt_tokens": 512, "epochs": 3.0, "pairs_per_step": 8,
        "lora_rank": 32, "lora_alpha": 64, "method": "qlora", "precision": "bfloat16", "max_steps": 0,
        "optimizer": "paged_adamw_8bit", "lr_schedule": "linear", "report_to": "wandb", "seed": 7,
        "nll_over": "prompt+answer",
    }  # fmt: skip
    assert note.endswith("having no counterpart here: logging_steps, warmup_ratio.")
    as_json = write(tmp_path, json.dumps({"model_name_or_path": "m", "beta": 0.1, "max_steps": 50}
                                         | {"warmup_ratio": 0.1, "use_peft": False}), "trl.json")  # fmt: skip
    assert settings_of(as_json) == ({"base_model": "m", "or_weight": 0.1, "max_steps": 50, "method": "full"}
                                    | {"warmup_steps": 5, "nll_over": "prompt+answer"}, "")  # fmt: skip


def test_a_file_of_axolotls_gives_the_same_run(tmp_path):
    found, note = settings_of(write(tmp_path, AXOLOTL))
    assert found == {
        "base_model": "mistralai/Mistral-7B-v0.1", "or_weight": 0.1, "dataset": "argilla/dpo-mix-7k:train",
        "method": "qlora", "lora_rank": 16, "lora_dropout": 0.05, "max_tokens": 4096, "pairs_per_step": 4,
        "epochs": 1.0, "optimizer": "adamw_8bit", "lr_schedule": "cosine", "learning_rate": 8e-6,
        "warmup_steps": 10, "nll_over": "prompt+answer",
    }  # fmt: skip
    assert note.endswith("here: flash_attention, datasets.type.")


@pytest.mark.parametrize(
    "text,said",
    [
        (AXOLOTL.replace("rl: orpo", "rl: dpo"), "its rl is 'dpo': give a file whose rl is orpo"),
        (AXOLOTL.replace("rl: orpo", ""), "its rl is None"),
        ("rl: [dpo, orpo]\n", "its rl is 'several values'"),
        (TRL.replace("beta: 0.2", "beta: much"), "by beta: or_weight is 'much', but must be a number"),
        (TRL.replace("1024", "-3"), "by max_length: max_tokens is -3, but must lie between"),
        (TRL.replace("beta: 0.2", "beta: [1, 2]"), "or_weight is 'several values'"),
        (TRL.replace("size: 2", "size: two"), "by per_device_train_batch_size: pairs_per_step is"),
        (TRL.replace("paged_adamw_8bit", "lion"), "by optim: optimizer is 'lion'.*--optimizer beside it"),
        (AXOLOTL.replace("adapter: qlora", "adapter: ia3"), "by adapter: method is 'ia3', but must"),
        ("- a\n- b\n", "holds no settings"), ("{", "holds no settings"), ("", "holds no settings"),
        ("1: 2\n", "holds no settings"), ("!!python/object:os.system x", "holds no settings"),
        ("a: &a [1]\nbeta: *b\n", "holds no settings"), ("\0", "holds no settings"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_sentence(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as error:
        settings_of(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_list_that_unfolds_without_end_is_not_written_out(tmp_path):
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]\n" for n in range(20))
    with pytest.raises(UserError, match="several values"):
        settings_of(write(tmp_path, TRL.replace("beta: 0.2\n", "") + bomb + "beta: *a19\n"))


def test_a_flag_beside_a_file_wins_and_its_value_there_is_not_looked_at(tmp_path, monkeypatch, capsys):
    seen = []

    def stop(layers, **known):
        seen.append(resolve(layers, **known)[0])
        raise UserError("enough")

    monkeypatch.setattr("lazyorpo_lib.__main__.resolve", stop)
    with pytest.raises(UserError, match="enough"):
        main(
            [
                "--settings",
                write(tmp_path, TRL.replace("paged_adamw_8bit", "lion")),
                "--optimizer",
                "adafactor",
            ]
        )
    assert (seen[0].optimizer, seen[0].seed) == ("adafactor", 7)
    told = capsys.readouterr()
    assert "logging_steps" in told.err and not told.out


def test_settings_of_our_own_may_be_yaml_too_and_a_wrong_name_is_told(tmp_path):
    file = write(tmp_path, "base_model: m\nepochs: 2\nlerning_rate: 1e-4\n")
    assert settings_of(file)[0].keys() == {"base_model", "epochs", "lerning_rate"}
    with pytest.raises(UserError, match="did you mean learning_rate"):
        resolve([("file", settings_of(file)[0])])
    assert settings_of("") == ({}, "")
