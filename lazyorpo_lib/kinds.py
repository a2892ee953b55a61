"""What a base_model is: its place, its config, the class that trains its text.

What is none to train is refused here, from its files' names and its config.json alone, before any weight is
fetched or read. It loads no weights.
"""

import contextlib
import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from .demo.model import DEMO_MODEL, TINY_MODEL, home_of, hub_answers
from .errors import UserError, dissect, expanded, explain_hub, explain_model
from .folder import read_json
from .orpo.body import sizes_of

# The largest of what any model has, ten times: what is beyond comes of a damaged file.
_SIZES = {"num_hidden_layers": 2000, "hidden_size": 10**6, "vocab_size": 10**7, "num_attention_heads": 10**4}
_MERGE = "merge it (lazyorpo merge RUN FOLDER) and give that folder"
_OTHERS = {  # what a folder holds in place of a model, by the first file that tells
    "adapter_config.json": f"holds an adapter over another model: {_MERGE}",
    "model/adapter_config.json": f"is a run's folder, whose model/ is an adapter: {_MERGE}",
    "model/config.json": "is a run's folder: give its model/",
    "modules.json": "holds a model of sentence-transformers, which embeds texts: give a language model",
    "model_index.json": "holds a pipeline of diffusers, which makes pictures: give a language model",
    "*.gguf": "holds GGUF files, which llama.cpp runs and nobody trains: give the model they were made from",
    "params.json": "holds weights as their maker's own library has them: give it in transformers' form",
}
_REPOSITORIES = {  # of each kind: a file that is fetched in any case, its page, what can be given instead
    "model": ("config.json", "", "a local folder"), "dataset": ("README.md", "datasets/", "a local file"),
}  # fmt: skip
_FROM = "give the language model that it was made from"
_EMBEDS = f"without an output layer, as models have that embed texts: {_FROM}"
_ENCODER = "an encoder, which sees the tokens it is to predict: give a causal one"
# Ends of the class that a config.json names: what such a model puts out, unless this setting is true.
_HEADS = {
    r"For\w*Classification|RewardModel|ForMultipleChoice": (f"whose output is a score: {_FROM}", ""),
    "ForQuestionAnswering|ForNextSentencePrediction": (f"whose output is no text: {_FROM}", ""),
    "(?<!Head)Model": (_EMBEDS, "tie_word_embeddings"),
    "ForMaskedLM|ForPreTraining": (_ENCODER, "is_decoder"),
}


def locate(base_model: str) -> str:
    """Give the folder or hub id to load `base_model` from; UserError for a folder that holds no model."""
    path, given = expanded(base_model), f"base_model is {base_model!r}"
    if os.path.isfile(path):
        kind = "a GGUF file, which llama.cpp runs and nobody trains" if path.suffix == ".gguf" else "a file"
        raise UserError(f"{given}, {kind}: give the folder or hub id of the model that it was made from.")
    if base_model in (DEMO_MODEL, TINY_MODEL):
        return home_of(base_model) or base_model
    if os.path.exists(path):
        has = [name for name in _OTHERS if any(path.glob(name))]
        if has and (has[0] == "modules.json" or not any(path.glob("model*.safetensors"))):
            raise UserError(f"{given}, which {_OTHERS[has[0]]}.")
        if not os.path.isfile(path / "config.json"):
            raise UserError(f"{given}, which holds no config.json; give the folder of a saved model.")
        check_files(path)
        for file in _weights_of(path):
            if not (path / file).is_file():
                raise UserError(f"{given}, whose {file} is missing: bring it back, or fetch the model again.")
            if (path / file).stat().st_size < 1000 and b"git-lfs" in (path / file).read_bytes():
                raise UserError(f"{given}, whose {file} is a pointer of Git LFS: run git lfs pull there.")
        return str(path)
    if base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
        raise UserError(f"{given}, but there is no such folder; give a folder or a hub id (owner/name).")
    here = _snapshot(base_model)  # the hub's client would ask for minutes where nobody answers
    return str(here) if here and not hub_answers() else base_model


def _snapshot(base_model: str) -> Path | None:
    """Give the folder in the hub's cache that holds the whole of a model, if there is one."""
    with contextlib.suppress(HFValidationError):
        config = try_to_load_from_cache(base_model, "config.json")
        folder = Path(config).parent if isinstance(config, str) else None
        if folder and (weights := _weights_of(folder)) and all((folder / file).is_file() for file in weights):
            return folder
    return None


def _weights_of(folder: Path) -> list[str]:
    """List the files that a saved model's weights are in, with those that its index names and are gone."""
    named = read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
    return sorted({*named, *(file.name for file in folder.glob("*.safetensors"))})


def look_up(settings, record: dict, show) -> dict:
    """Ask the hub for the licences of base model and data, before a download, and show what it says;
    UserError where one of them is gated, not here yet, and the token at hand does not open it.

    Returns:
        the `record` of the run, into which they are put as {"licences": {"model" or "dataset": licence}}.
    """
    given, said = (("model", settings.base_model), ("dataset", settings.dataset.split(":")[0])), []
    wanted = [(k, n) for k, n in given if re.fullmatch(r"[\w.-]+/[\w.-]+", n) and not os.path.exists(n)]
    for kind, name in wanted if wanted and hub_answers() else ():
        try:
            info = HfApi().repo_info(name, repo_type=kind, timeout=5)
        except Exception:  # the download says why, or what is cached will do
            continue
        stated = getattr(info.card_data, "license", None)
        names = stated if isinstance(stated, list) else [stated]
        if licence := ", ".join(text for text in names if isinstance(text, str))[:200]:
            record.setdefault("licences", {})[kind] = licence
        words = ", ".join([f"licence {licence}"] * bool(licence) + ["gated"] * bool(info.gated))
        said += [f"{name}: {words}"] * bool(words)
        file, page, instead = _REPOSITORIES[kind]
        if info.gated and not isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
            try:
                HfApi().auth_check(name, repo_type=kind)
            except Exception as error:  # of an old client or a hub that is busy nothing is made here
                if dissect(error)[1] & {401, 403}:
                    why = explain_hub(error, page + name, instead)
                    raise UserError(f"The {kind} {name!r} {why}.") from None
    if said:
        show(f"The hub says of {'; of '.join(said)}.")
    return record


def digest_of(base_model: str) -> str:
    """Give a text that another model, or another version of it, would not have: the hub's, or a digest of
    the folder's config and of 64 places of each file of weights."""
    place = Path(locate(base_model))
    if not place.is_dir() or place == _snapshot(base_model):
        # The hub's cache, whose files are links to blobs that are named by their content.
        place = place if place.is_dir() else Path(cached_file(base_model, "config.json")).parent
        names = [(f.name, f.resolve().name, f.stat().st_size) for f in sorted(place.glob("*.safetensors"))]
        return hashlib.sha256(repr(names).encode()).hexdigest()
    digest = hashlib.sha256((place / "config.json").read_bytes())
    for file in sorted(place.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for start in range(0, size, max(2**20, size // 64)):
                opened.seek(start)
                digest.update(opened.read(2**20))
    return digest.hexdigest()


def check_files(folder) -> None:
    """Raise UserError for a pipe or a device in a folder: reading it might never end."""
    for file in map(str, Path(folder).rglob("*")):
        if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
            raise UserError(f"{file!r} is a pipe or a device, not a file: give a folder with files alone.")


def load_config(base_model: str):
    """Load a model's configuration, and nothing else of it; UserError where there is no text to train."""
    with explain_model(base_model):
        config = AutoConfig.from_pretrained(locate(base_model), trust_remote_code=False)
        for name, most in _SIZES.items():
            if bad := [size for size in sizes_of(config, name, least=-(10**9)) if not 1 <= size <= most]:
                raise ValueError(f"its config.json says {name} is {bad[0]}")
        class_of(config)
    return config


def positions_of(config) -> list[int]:
    """List how many tokens a model says that it can read; empty where it says nothing."""
    return sizes_of(config, "max_position_embeddings")


def is_quantised(config) -> bool:
    """Tell whether a model's weights are saved in few bits, so that adapters alone can be trained on them."""
    return getattr(config, "quantization_config", None) is not None


def check_method(config, method: str, name: str) -> None:
    """Raise UserError where the weights of a base model cannot be trained by a method."""
    if method == "full" and is_quantised(config):
        why = f"the weights of base_model {name!r} are quantised, and cannot be trained themselves"
        way_out = "set method=qlora or lora, or give the model that it was made from"
        raise UserError(f"method is full, but {why}: {way_out}.")


def class_of(config) -> type:
    """Choose the Auto class of transformers that loads the whole model of a config, its text for training;
    UserError where it is not causal."""
    kind, named = type(config), (config.architectures or [""])[0]
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    pictures = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    heads = (head for ends, head in _HEADS.items() if re.search(f"({ends})$", named))
    why = next((why for why, unless in heads if not getattr(config, unless, False)), "")
    if getattr(config, "is_encoder_decoder", False):
        why = "an encoder and a decoder: give a causal language model"
    elif kind not in causal and kind not in pictures:
        why = "none of transformers' causal language models, with pictures or without: give one"
    elif not issubclass((causal if kind in causal else pictures)[kind], GenerationMixin):
        why = "which does not write a text token by token: give a causal language model"
    if why:
        raise UserError(f"base_model is a {named or kind.model_type}, {why}.")
    # A class of the text alone must be able to load what it saves.
    text = type(config.get_text_config(decoder=True))
    whole = kind in causal and (causal[kind].config_class is kind or text in causal)
    return AutoModelForCausalLM if whole or kind not in pictures else AutoModelForImageTextToText
