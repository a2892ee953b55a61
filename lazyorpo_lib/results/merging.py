"""The full model of a run on the disk: whole where memory has room for it, else shard by shard, or refused.

Room is looked at before anything is written. Shards are for plain LoRA over layers that the base model's
files call as the model does; what the weights of any other mean, its class alone knows.
"""

import json
import math
import os
import shutil
from pathlib import Path

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
from .ollama import modelfile

SHARD = 2**31  # bytes of a file, which are in memory at once
# What the config of a plain adapter may say otherwise than peft's default.
_OWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path"}
_OWN |= {"task_type", "inference_mode", "peft_version", "revision", "auto_mapping"}


def write_merged(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the full model of a run's `model/` to `out`, in `dtype`; Ollama's Modelfile where one can be.

    Raises:
        UserError: there is no room for it, on the disk or in memory.
    """
    with reading_finished(folder):
        model = _in_shards(folder, out, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = model or load_finished(folder, dtype=dtype, merge=True)[0]
    ends = model.generation_config.eos_token_id
    save_model(model, tokenizer, out, base_model="", modelfile=modelfile(tokenizer, ends))


def check_room(out: Path, needed: float, what: str) -> None:
    """Raise UserError where a disk has no room for so many bytes more; `what`: what they are."""
    there = next(place for place in (out, *out.parents) if os.path.isdir(place))
    disk = shutil.disk_usage(there)
    if disk.free < needed and disk.total:  # a place without a disk is told for what it is
        wants = f"{what} takes {_mib(needed)}, and {_mib(disk.free)} are free at {str(there)!r}"
        raise UserError(f"{wants}: make room there, or merge into a folder on another disk.")


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _in_shards(folder: Path, out: Path, dtype: torch.dtype):
    """Look for room; give the model as shards where memory has none, else None."""
    adapter = read_json(folder / "adapter_config.json")
    base = adapter.get("base_model_name_or_path") if adapter else str(folder)
    if not isinstance(base, str):
        return None  # nor can it be loaded, which will be said
    config, weights = load_config(base), _weights(base)
    packed = 4 if is_quantised(config) else 1
    needed = sum(math.prod(shape) for _, shape in weights.values()) * dtype.itemsize * packed
    check_room(out, needed, "The merged model")
    if needed < 0.9 * free_bytes("cpu"):
        return None
    factors = None if packed > 1 else _factors(folder, adapter, weights)
    if factors is None:
        raise UserError(
            f"Merging takes {_mib(needed / 0.9)} of memory, and {_mib(free_bytes('cpu'))} are free: merge on "
            "a machine with more, or use model/ over its base model as they are."
        )
    return _Shards(config, GenerationConfig.from_pretrained(folder), weights, factors, dtype)


def _weights(base: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the headers of a model's files: {name of a weight: (its file, its shape)}."""
    place, found = locate(base), {}
    try:
        index = read_json(cached_file(place, "model.safetensors.index.json"))
        names = sorted(set(index["weight_map"].values()))
    except OSError:  # all is in one file
        names = ["model.safetensors"]
    for file in (cached_file(place, name) for name in names):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                found[name] = file, tuple(opened.get_slice(name).get_shape())
    return found


def _factors(folder: Path, config: dict, weights: dict) -> dict[str, tuple] | None:
    """Give {weight: (A, B, scale)} of a plain adapter, {} of a full model; None of any other adapter."""
    factors: dict[str, tuple] = {}
    if not config:
        return factors
    usual = json.loads(json.dumps(import_peft().LoraConfig().to_dict(), default=list))
    if any(usual.get(name) != value for name, value in config.items() if name not in _OWN):
        return None
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        saved = {name.removeprefix("base_model.model."): opened.get_tensor(name) for name in opened.keys()}
    while saved:
        layer = next(iter(saved)).partition(".lora_")[0]
        a, b = (saved.pop(f"{layer}.lora_{side}.weight", None) for side in "AB")
        shape = weights.get(f"{layer}.weight", ("", ()))[1]
        if a is None or b is None or (len(b), *a.shape[1:]) != shape:
            return None
        factors[f"{layer}.weight"] = a.float(), b.float(), config["lora_alpha"] / config["r"]
    return factors


class _Shards:
    """What `save_model` saves, as a model that is never whole in memory."""

    def __init__(self, config, generation_config, weights, factors, dtype: torch.dtype):
        self.config, self.generation_config = config, generation_config
        self._weights, self._factors, self._dtype = weights, factors, dtype

    def save_pretrained(self, folder: Path, state_dict=None) -> None:
        self.config.dtype = self._dtype
        self.config.save_pretrained(folder)
        shards, room, index = [], 0, {}
        for name, (_, shape) in self._weights.items():
            size = math.prod(shape) * self._dtype.itemsize
            if size > room:
                shards.append([])
                room = SHARD
            shards[-1].append(name)
            room -= size
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({name: self._weight(name) for name in names}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        content = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(content)

    def _weight(self, name: str) -> torch.Tensor:
        with safe_open(self._weights[name][0], "pt") as file:
            weight = file.get_tensor(name)
        if name in self._factors:
            a, b, scale = self._factors[name]
            weight = torch.addmm(weight.float(), b, a, alpha=scale)
        if weight.is_floating_point():
            weight = weight.to(self._dtype)
            if not weight.sum(dtype=torch.float64).isfinite():
                raise UserError(f"The merged model would hold a value that is not finite (in {name}).")
        return weight.contiguous()
