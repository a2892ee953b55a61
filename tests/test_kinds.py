"""kinds.py, and what model.py does of them: what people give as base_model, and what comes of it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from lazyorpo_lib import kinds, model
from lazyorpo_lib.demo.model import write_tiny
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.settings import Settings
from tests.hub import serve

MAMBA = dict(num_heads=4, head_dim=16, expand=2, n_groups=2, state_size=8)
EXPERTS = dict(num_key_value_heads=2, num_local_experts=4, pad_token_id=0)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    home = tmp_path_factory.mktemp("tiny") / "base"
    write_tiny(home)
    return home


@pytest.fixture
def base(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "base")


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What is refused, from a folder's names and its config.json.


@pytest.mark.parametrize(
    "name, said",
    [
        ("adapter_config.json", "an adapter over another model"),
        ("model/adapter_config.json", "a run's folder"),
        ("model/config.json", "a run's folder: give its model/"),
        ("modules.json", "embeds texts"),
        ("model_index.json", "diffusers"),
        ("weights-q4.gguf", "llama.cpp"),
        ("params.json", "transformers' form"),
    ],
)
def test_a_folder_that_holds_something_else_than_a_model_is_told_by_what_it_holds(name, said, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=said):
        kinds.load_config(str(tmp_path))


def test_an_adapter_beside_its_bases_config_is_an_adapter_still(base):
    (base / "model.safetensors").rename(base / "adapter_model.safetensors")
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it"):
        kinds.load_config(str(base))


def test_an_adapter_file_beside_whole_weights_hinders_nobody(base):
    (base / "adapter_config.json").write_text("{}")
    assert kinds.load_config(str(base)).model_type == "llama"


@pytest.mark.parametrize("name, said", [("a.gguf", "GGUF"), ("a.safetensors", "a file: give the folder")])
def test_a_file_is_no_model(name, said, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=said):
        kinds.load_config(str(tmp_path / name))


@pytest.mark.parametrize(
    "named, said",
    [
        ("LlamaForSequenceClassification", "whose output is a score"),
        ("LlamaForTokenClassification", "whose output is a score"),
        ("Qwen2ForRewardModel", "whose output is a score"),
        ("LlamaForQuestionAnswering", "whose output is no text"),
        ("LlamaModel", "without an output layer"),
        ("BertForMaskedLM", "an encoder"),
    ],
)
def test_a_model_of_another_task_is_refused_by_the_class_that_its_config_names(named, said, base):
    change(base / "config.json", architectures=[named], tie_word_embeddings=False)
    (base / "model.safetensors").unlink()  # nothing of it is read
    with pytest.raises(UserError, match=f"base_model is a {named}, {said}.*: give"):
        kinds.load_config(str(base))


@pytest.mark.parametrize(
    "named, changes",
    [
        ("LlamaForCausalLM", {}),
        ("GPT2LMHeadModel", {}),
        ("SomebodysOwnName", {}),
        ("LlamaModel", {"tie_word_embeddings": True}),
    ],
)
def test_a_class_that_writes_text_is_taken_whatever_it_is_called(named, changes, base):
    change(base / "config.json", architectures=[named], **changes)
    assert kinds.class_of(kinds.load_config(str(base))) is transformers.AutoModelForCausalLM


@pytest.mark.parametrize("kind", ["T5Config", "BartConfig", "MBartConfig", "WhisperConfig"])
def test_an_encoder_and_a_decoder_are_refused_as_that(kind, tmp_path):
    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="an encoder and a decoder: give a causal language model"):
        kinds.load_config(str(tmp_path))


@pytest.mark.parametrize("kind", ["ViTConfig", "CLIPConfig", "Wav2Vec2Config"])
def test_what_writes_no_text_is_refused_as_that(kind, tmp_path):
    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="none of transformers' causal language models, with pictures or without: give one"
    ):
        kinds.load_config(str(tmp_path))


@pytest.mark.parametrize(
    "kind", ["Qwen2VLConfig", "Mistral3Config", "InternVLConfig", "MllamaConfig", "Emu3Config"]
)
def test_of_pictures_and_text_the_class_is_taken_that_loads_both_and_saves_what_loads_again(kind):
    assert kinds.class_of(getattr(transformers, kind)()) is transformers.AutoModelForImageTextToText


# What is loaded.


@pytest.mark.parametrize(
    "given",
    [
        {"early_stopping": True},
        {"length_penalty": 2.0},
        {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
        {"top_h": 0.4},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 50},
        {"use_cache": False, "cache_implementation": "static"},
        {"pad_token_id": -1},
        {"num_return_sequences": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["END"], "min_new_tokens": 5, "repetition_penalty": 1.7, "forced_eos_token_id": 7},
    ],
)
def test_a_generation_config_breaks_neither_the_save_nor_the_answers(given, base, tmp_path):
    from lazyorpo_lib.results.evaluate import answers

    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], **given}))
    loaded, tokenizer = (
        model.load_base(str(base), dtype=torch.float32, device="cpu"),
        model.load_tokenizer(str(base)),
    )
    (base / "generation_config.json").write_text("{}")
    plain = model.load_base(str(base), dtype=torch.float32, device="cpu")
    asked = dict(max_tokens=6, end_ids=[2])
    before = vars(loaded.generation_config).copy()
    assert answers(loaded, tokenizer, [[5, 6, 7]], **asked) == answers(plain, tokenizer, [[5, 6, 7]], **asked)
    assert vars(loaded.generation_config) == before
    model.save_model(loaded, tokenizer, tmp_path / "saved", base_model="")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert again.eos_token_id == [2, 5]


def test_a_lost_shard_is_named(base):
    lm = model.load_base(str(base), dtype=torch.float32, device="cpu")
    shutil.rmtree(base / "shards", ignore_errors=True)
    lm.save_pretrained(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    lost = sorted(base.glob("model-0*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        model.load_base(str(base), dtype=torch.float32, device="cpu")


# Adapters.


def adapted(kind: str, **changes):
    config = transformers.AutoConfig.for_model(kind, **(SMALL | changes))
    with torch.device("meta"):
        lm = kinds.class_of(config).from_config(config)
        return model.add_adapters(lm, Settings(lora_rank=4))


@pytest.mark.parametrize(
    "kind, changes, has, lacks",
    [
        ("llama", {}, "2 q_proj", "none on"),
        ("mamba2", MAMBA, "2 in_proj; none on", "q_proj"),
        ("phimoe", EXPERTS, "none on 2 router", "2 gate"),
        ("llama4_text", EXPERTS | dict(head_dim=8, intermediate_size_mlp=48), "router", "on 2 router"),
    ],
)  # fmt: skip
def test_adapters_go_where_a_layer_is_a_plain_product_and_what_has_none_is_named(kind, changes, has, lacks):
    said = model.about_adapters(adapted(kind, **changes))
    assert has in said and lacks not in said


def test_the_towers_of_a_model_take_no_adapter_and_are_not_trained(tmp_path):
    text = dict(SMALL, num_key_value_heads=2, head_dim=8)
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | dict(patch_size=8), mm_tokens_per_image=4
    )
    with torch.device("meta"):
        tuned = model.add_adapters(kinds.class_of(config).from_config(config), Settings(lora_rank=4))
    places = [name for name, weights in tuned.named_parameters() if weights.requires_grad]
    assert places and not [name for name in places if "vision" in name or "projector" in name]
    said = model.about_adapters(tuned)
    assert "Adapters on 2 q_proj" in said and "none on" in said and "fc1" in said


def test_dropout_before_fused_experts_is_one_sentence():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    with torch.device("meta"), pytest.raises(UserError, match="set lora_dropout=0"):
        model.add_adapters(
            kinds.class_of(config).from_config(config), Settings(lora_rank=4, lora_dropout=0.1)
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_quantised_as_it_comes_takes_adapters_and_merges_into_what_was_tuned(
    bits, base, tmp_path
):
    how = dict(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=transformers.BitsAndBytesConfig(**how), device_map={"": "cpu"}
    )
    quantised.save_pretrained(base)
    for method in ("auto", "lora", "qlora"):
        kinds.check_method(kinds.load_config(str(base)), method, "base")
    with pytest.raises(UserError, match="set method=qlora or lora"):
        kinds.check_method(kinds.load_config(str(base)), "full", "base")
    settings = Settings(base_model=str(base), lora_rank=4)
    tuned = model.load_for_training(settings, method="lora", dtype=torch.float32, device="cpu")
    for name, weights in tuned.named_parameters():
        if "lora_B" in name:
            weights.data.normal_(0, 0.1)
    tokenizer = model.load_tokenizer(str(base))
    model.save_model(tuned, tokenizer, tmp_path / "model", base_model=str(base))
    merged, _ = model.load_finished(tmp_path / "model", merge=True)
    model.save_model(merged, tokenizer, tmp_path / "merged", base_model="")
    again, _ = model.load_finished(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged(ids).logits)
        if bits == 4:  # 8 bit also rounds what goes in
            assert (again(ids).logits - tuned.eval()(ids).logits).abs().max() < 1e-5


def test_a_model_in_the_hubs_cache_is_taken_from_there_where_the_hub_does_not_answer(
    base, tmp_path, monkeypatch
):
    cache = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(base, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    find = kinds.try_to_load_from_cache
    monkeypatch.setattr(kinds, "try_to_load_from_cache", lambda *x: find(*x, cache_dir=tmp_path / "hub"))
    monkeypatch.setattr(kinds, "hub_answers", lambda: False)
    place = kinds.locate("me/tiny")
    assert place == str(cache / "snapshots" / "abc") and kinds.load_config("me/tiny").model_type == "llama"
    offline = kinds.digest_of("me/tiny")
    monkeypatch.setattr(kinds, "hub_answers", lambda: True)
    assert kinds.locate("me/tiny") == "me/tiny"
    monkeypatch.setattr(kinds, "cached_file", lambda *x: str(cache / "snapshots" / "abc" / x[1]))
    assert kinds.digest_of("me/tiny") == offline
    (cache / "snapshots" / "abc" / "model.safetensors").unlink()  # a part of it is no model
    monkeypatch.setattr(kinds, "hub_answers", lambda: False)
    assert kinds.locate("me/tiny") == "me/tiny"


def plan_of(config, brief=False, **settings):
    from lazyorpo_lib.plan.lengths import preset_lengths
    from lazyorpo_lib.plan.planner import make_plan

    settings = Settings(**settings)
    return make_plan(config, settings, "A40", preset_lengths("demo", settings), brief=brief)


def test_what_hinders_adapters_hinders_no_full_tuning_and_is_told_where_adapters_are_asked_for():
    config = transformers.MixtralConfig(**SMALL | EXPERTS)
    assert plan_of(config, method="full", lora_dropout=0.1).chosen == "full"
    with pytest.raises(UserError, match="set lora_dropout=0"):
        plan_of(config, method="lora", lora_dropout=0.1)


def test_a_quantised_base_is_planned_with_adapters_and_without_full_tuning():
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = transformers.LlamaConfig(**SMALL, quantization_config=quantised)
    plan = plan_of(config)
    assert plan.chosen == "lora" and [m.method for m in plan.methods] == ["lora", "qlora"]


def test_of_qlora_it_is_said_what_fused_experts_keep_and_a_mixer_without_any_is_not_told_of():
    configs = transformers.MixtralConfig(**SMALL | EXPERTS), transformers.Mamba2Config(**SMALL, **MAMBA)
    said, also = (plan_of(config, method="qlora", brief=True).why for config in configs)
    assert "fused experts stay in 16 bit" in said and "experts" not in also


LOOK = """
import sys
from lazyorpo_lib import kinds
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.settings import Settings
from tests.hub import serve

for base, data in (pair.split() for pair in sys.argv[1:]):
    try:
        print(kinds.look_up(Settings(base_model=base, dataset=data), {}, print))
    except UserError as error:
        print(error)
"""


def test_the_hub_is_asked_for_licence_and_access_before_any_download(tmp_path):
    for place, card in (
        ("models/tiny", {"license": "apache-2.0"}),
        ("datasets/pairs", {"license": ["mit", 5]}),
    ):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "card.json").write_text(json.dumps(card))
    asked = ["fine/tiny fine/pairs:train", "closed/tiny demo", "fine/tiny closed/pairs", "missing/x broken/y"]
    with serve(tmp_path) as hub:
        online = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
        done = subprocess.run(
            [sys.executable, "-c", LOOK, *asked], capture_output=True, text=True, env=os.environ | online
        )
    said, record, model, data, unknown = done.stdout.splitlines()
    assert said == "The hub says of fine/tiny: licence apache-2.0; of fine/pairs: licence mit."
    assert record == "{'licences': {'model': 'apache-2.0', 'dataset': 'mit'}}" and unknown == "{}"
    assert model.startswith("The model 'closed/tiny' needs a login: ask for access at ")
    assert "datasets/closed/pairs and set HF_TOKEN" in data and "a local file" in data
    assert not any((tmp_path / "home").rglob("snapshots"))  # where a download would lie
