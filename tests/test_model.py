"""model.py: what is loaded is finite, fits together and is files alone; what does not is one sentence."""

import importlib.util
import json
import os
import shutil
import socket

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from lazyorpo_lib import marker, model
from lazyorpo_lib.demo import model as demo
from lazyorpo_lib.demo.model import write_tiny
from lazyorpo_lib.errors import UserError, explain_disk
from lazyorpo_lib.orpo.encoding import prepare_tokenizer
from lazyorpo_lib.settings import Settings


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny base model, and an adapter over it that does something; a test copies what it changes."""
    home = tmp_path_factory.mktemp("models")
    write_tiny(home / "base")
    base = model.load_base(str(home / "base"), dtype=torch.float32, device="cpu")
    tuned = model.add_adapters(base, Settings(base_model=str(home / "base")))
    tokenizer = model.load_tokenizer(str(home / "base"))
    prepare_tokenizer(tokenizer)
    model.save_model(tuned, tokenizer, home / "model", base_model=str(home / "base"))
    return home


@pytest.fixture
def home(original, tmp_path):
    shutil.copytree(original, tmp_path / "home")
    change(
        tmp_path / "home" / "model" / "adapter_config.json",
        base_model_name_or_path=str(tmp_path / "home" / "base"),
    )
    return tmp_path / "home"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def weights_changed(file, name, value):
    weights = load_file(file)
    (name,) = [n for n in weights if n.endswith(name)][:1]
    weights[name].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})


def base(folder, dtype=torch.float32):
    return model.load_base(str(folder), dtype=dtype, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["embed_tokens.weight", "norm.weight", "q_proj.weight"])
def test_a_base_model_with_a_value_that_is_not_finite_is_refused_before_training(home, place, value):
    weights_changed(home / "base" / "model.safetensors", place, value)
    with pytest.raises(UserError, match=rf"not finite \(in .*{place}\): its weights are damaged; fetch"):
        base(home / "base")
    with pytest.raises(UserError, match="not finite"):
        settings = Settings(base_model=str(home / "base"))
        model.load_for_training(settings, method="lora", dtype=torch.float32, device="cpu")
    with pytest.raises(UserError, match="not finite"):
        model.load_finished(home / "model", merge=True)


def test_a_value_that_float16_cannot_hold_is_told_as_such(home):
    weights_changed(home / "base" / "model.safetensors", "q_proj.weight", 1e6)
    assert base(home / "base") and base(home / "base", torch.bfloat16)
    with pytest.raises(UserError, match="or too large for float16"):
        base(home / "base", torch.float16)


WRONG_CONFIG = [
    {"num_hidden_layers": 3}, {"num_hidden_layers": "two"}, {"hidden_size": 64}, {"hidden_size": -1},
    {"num_attention_heads": 0}, {"vocab_size": 300}, {"vocab_size": None}, {"model_type": 7},
    {"rope_parameters": "x"}, {"quantization_config": []}, {"hidden_act": "none"},
]  # fmt: skip


@pytest.mark.parametrize("values", WRONG_CONFIG, ids=str)
def test_a_config_that_its_weights_do_not_fit_is_one_sentence(home, values):
    change(home / "base" / "config.json", **values)
    with pytest.raises(UserError) as error:
        base(home / "base")
    assert "\n" not in str(error.value) and str(home / "base") in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 9999, "\0"])
def test_a_config_that_is_no_object_is_one_sentence(home, content):
    (home / "base" / "config.json").write_text(content)
    for load in (base, model.load_config, model.load_tokenizer):
        with pytest.raises(UserError) as error:
            load(str(home / "base"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_with_a_value_that_is_not_finite_is_refused(home, merge):
    weights_changed(home / "model" / "adapter_model.safetensors", "lora_B.weight", float("nan"))
    marker.seal(home / "model", "model")  # as if it had been saved so
    with pytest.raises(UserError, match="not finite"):
        model.load_finished(home / "model", merge=merge)


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def half_the_layers(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "layers.0" in name}, file)


def another_base(folder):
    from transformers import LlamaForCausalLM

    other = LlamaForCausalLM.from_pretrained(folder.parent / "base").config
    other.num_hidden_layers = 1
    LlamaForCausalLM(other).save_pretrained(folder.parent / "base")


CONFIG = "adapter_config.json"
WRONG = {
    "an unknown kind": lambda f: change(f / CONFIG, peft_type="NO_SUCH_KIND"),
    "another kind": lambda f: change(f / CONFIG, peft_type="IA3"),
    "no kind": lambda f: change(f / CONFIG, peft_type=None),
    "another rank": lambda f: change(f / CONFIG, r=4),
    "a rank that is none": lambda f: change(f / CONFIG, r="many"),
    "a rank below one": lambda f: change(f / CONFIG, r=-1),
    "other layers": lambda f: change(f / CONFIG, target_modules=["q_proj"]),
    "no such layers": lambda f: change(f / CONFIG, target_modules=["none_of_them"]),
    "no base": lambda f: change(f / CONFIG, base_model_name_or_path=None),
    "a base that is no name": lambda f: change(f / CONFIG, base_model_name_or_path=["a"]),
    "half a config": lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:60]),
    "an empty config": lambda f: (f / CONFIG).write_text(""),
    "a config that is a list": lambda f: (f / CONFIG).write_text("[1]"),
    "a config of another coding": lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{"),
    "cut weights": cut,
    "no weights in the file": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "half the weights": half_the_layers,
    "another base model": another_base,
    "half generation settings": lambda f: (f / "generation_config.json").write_text('{"eos'),
    "half a tokenizer": lambda f: (f / "tokenizer.json").write_text('{"version'),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_adapter_of_the_wrong_shape_is_one_sentence_and_never_passed_over(home, what):
    WRONG[what](home / "model")
    with pytest.raises(UserError) as error:
        model.load_finished(home / "model", merge=True)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert str(home) in str(error.value)


def test_a_whole_adapter_loads(home):
    tuned, tokenizer = model.load_finished(home / "model")
    assert "lora" in str(tuned) and tokenizer.chat_template


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "deep/extra.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_pipes_and_devices_in_a_models_folder_are_refused_and_links_to_files_are_not(home, name, kind):
    moved = home / "moved.safetensors"
    (home / "base" / "model.safetensors").rename(moved)
    (home / "base" / "model.safetensors").symlink_to(moved)
    assert base(home / "base")
    file = home / "base" / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "/dev/null")
    for load in (base, model.load_config, model.load_tokenizer, model.load_finished):
        with pytest.raises(UserError, match="is a pipe or a device"):
            load(str(home / "base"))


@pytest.mark.parametrize(
    "name",
    ["~nobody-of-this-name/model", "~nobody-of-this-name", "/dev/null", "x" * 300 + "/y", "/tmp/" + "x" * 300,
     "a\0b"],
)  # fmt: skip
def test_a_path_that_cannot_be_is_one_sentence(name):
    with pytest.raises(UserError) as error:
        model.load_config(name)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no finished model|a home that is not there"):
        model.load_finished(name)


def test_saving_an_adapter_asks_the_hub_nothing(home, monkeypatch, recwarn):
    tuned, tokenizer = model.load_finished(home / "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: pytest.fail("asked"))
    for name in ("one", "two"):
        model.save_model(tuned, tokenizer, home / name, base_model="owner/not-here")
    assert not [warning for warning in recwarn if "config" in str(warning.message)]


@pytest.mark.parametrize("value", ["~/models", "$HOME/models"])
def test_a_home_in_hf_home_is_the_users(tmp_path, monkeypatch, value):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    anew = importlib.util.module_from_spec(constants.__spec__)  # as a process that begins now reads it
    constants.__spec__.loader.exec_module(anew)
    monkeypatch.setattr(constants, "HF_HOME", anew.HF_HOME)
    assert demo.home_of("tiny-random") == str(tmp_path / "me" / "models" / "lazyorpo" / "tiny-random")
    assert not list((tmp_path / "here").iterdir())


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path):
    def fails(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "a"))
    monkeypatch.setattr(demo, "write_tiny", fails)
    with pytest.raises(UserError, match="Nothing more can be written to .*HF_HOME names"):
        demo.home_of("tiny-random")
    assert not list((tmp_path / "a" / "lazyorpo").iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file" / "b"))
    with pytest.raises(UserError, match="cannot be used .*HF_HOME names"):
        demo.home_of("tiny-random")


def test_of_a_disk_only_what_is_its_own_is_told(tmp_path):
    with pytest.raises(PermissionError), explain_disk(tmp_path / "run"):
        raise PermissionError(13, "Permission denied", "/elsewhere/pairs.jsonl")
    for name in (str(tmp_path / "run" / "a"), str(tmp_path)):
        with pytest.raises(UserError, match="cannot be used"), explain_disk(tmp_path / "run"):
            raise PermissionError(13, "Permission denied", name)
