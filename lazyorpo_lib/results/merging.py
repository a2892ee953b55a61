"""The full model of a run on the disk: whole where memory has room for it, else shard by shard, or refused.

Room is looked at before anything is written. Shards, a file of the base model's at once, are for plain LoRA
over layers that these files name as the model does.
"""

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from ..errors import UserError
from ..folder import read_json
from ..kinds import is_quantised, load_config, locate
from ..machine import free_bytes
from ..model import import_peft, load_finished, reading_finished, save_model
from .evaluate import end_ids
from .ollama import modelfile

# What the config of a plain adapter may say otherwise than peft's default.
_OWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path"}
_OWN |= {"task_type", "inference_mode", "peft_version", "revision", "auto_mapping"}


def write_merged(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the full model of a run's `model/` to `out`, in `dtype`; Ollama's Modelfile where one can be.
    UserError where there is no room for it, on the disk or in memory."""
    with reading_finished(folder):
        model = _in_shards(folder, out, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = model or load_finished(folder, dtype=dtype, merge=True)[0]
    ends = end_ids(model, tokenizer)
    save_model(model, tokenizer, out, base_model="", modelfile=modelfile(tokenizer, ends))


def check_room(out: Path, needed: float, what: str) -> None:
    """Raise UserError where a disk has no room for so many bytes more; `what`: what they are."""
    there = next(place for place in (out, *out.parents) if os.path.isdir(place))
    disk = shutil.disk_usage(there)
    if disk.free < needed and disk.total:  # a place without a disk is told for what it is
        wants = f"{what} takes {_mib(needed)}, and {_mib(disk.free)} are free at {str(there)!r}"
        raise UserError(f"{wants}: make room there, or copy the run to a larger disk.")


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _in_shards(folder: Path, out: Path, dtype: torch.dtype):
    """Look for room; give what of a model `save_model` needs where memory has none for it, else None."""
    adapter = read_json(folder / "adapter_config.json")
    base = adapter.get("base_model_name_or_path") if adapter else str(folder)
    if not isinstance(base, str):
        return None  # nor can it be loaded, which will be said
    config, files = load_config(base), _files(base)
    packed, room = 4 if is_quantised(config) else 1, 0.9 * free_bytes("cpu")
    sizes = [sum(map(math.prod, shapes.values())) * dtype.itemsize * packed for shapes in files.values()]
    check_room(out, sum(sizes), "The merged model")
    if sum(sizes) < room:
        return None
    factors = _factors(folder, adapter, files) if adapter and packed == 1 and max(sizes) < room else None
    if factors is None:
        wants = f"Merging takes {_mib(sum(sizes))} of memory, and {_mib(room)} are free"
        way_out = "merge on a machine with more, or use model/ over its base model as they are"
        raise UserError(f"{wants}: {way_out}.")
    own, save = GenerationConfig.from_pretrained(folder), partial(_save_shards, config, files, factors, dtype)
    return SimpleNamespace(config=config, generation_config=own, save_pretrained=save)


def _files(base: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Read the headers of a model's files: {file: {name of a weight: its shape}}."""
    place = locate(base)
    try:
        index = read_json(cached_file(place, "model.safetensors.index.json"))
        names = sorted(set(index["weight_map"].values()))
    except OSError:  # all is in one file
        names = ["model.safetensors"]
    found = {}
    for file in (cached_file(place, name) for name in names):
        with safe_open(file, "pt") as opened:
            found[file] = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    return found


def _factors(folder: Path, config: dict, files: dict) -> dict[str, tuple] | None:
    """Give {weight: (A, B, scale)} of a plain adapter; None of any other."""
    usual = json.loads(json.dumps(import_peft().LoraConfig().to_dict(), default=list))
    if any(usual.get(name) != value for name, value in config.items() if name not in _OWN):
        return None
    factors, shapes = {}, {name: shape for inside in files.values() for name, shape in inside.items()}
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        saved = {name.removeprefix("base_model.model."): opened.get_tensor(name) for name in opened.keys()}
    while saved:
        layer = next(iter(saved)).partition(".lora_")[0]
        a, b = (saved.pop(f"{layer}.lora_{side}.weight", None) for side in "AB")
        if a is None or b is None or shapes.get(f"{layer}.weight") != (len(b), *a.shape[1:]):
            return None
        factors[f"{layer}.weight"] = a.float(), b.float(), config["lora_alpha"] / config["r"]
    return factors


def _save_shards(config, files, factors, dtype: torch.dtype, folder: Path, state_dict=None) -> None:
    """Save a merged model as its `save_pretrained` would, with one file of the base's in memory at once."""

    def merged(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name in factors:
            a, b, scale = factors[name]
            weight = torch.addmm(weight.float(), b, a, alpha=scale)
        if weight.is_floating_point():
            weight = weight.to(dtype)
            if not weight.sum(dtype=torch.float64).isfinite():
                raise UserError(f"The merged model would hold a value that is not finite (in {name}).")
        return weight

    config.dtype = dtype
    config.save_pretrained(folder)
    for file in files:
        with safe_open(file, "pt") as opened:
            weights = {name: merged(name, opened.get_tensor(name)) for name in opened.keys()}
        save_file(weights, folder / Path(file).name, metadata={"format": "pt"})
    names = {name: Path(file).name for file, inside in files.items() for name in inside}
    if len(files) > 1:
        index = json.dumps({"metadata": {}, "weight_map": names}, indent=1)
        (folder / "model.safetensors.index.json").write_text(index)
