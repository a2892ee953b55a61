"""Load a base model: precision, 4-bit, LoRA; save, merge, reload.

Weights come from safetensors only and no code from the hub is run. The only module that imports peft. It
trains nothing and knows nothing of pairs.
"""

import contextlib
import json
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer
from transformers.integrations.liger import apply_liger_kernel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, is_liger_kernel_available, logging

from . import folder as folders
from . import marker
from .errors import UserError, expanded, explain_model
from .fast.attention import takes_sdpa
from .fast.lora import replace_forwards
from .kinds import check_files, class_of, is_quantised, load_config, locate
from .machine import Machine, forget_peak_memory
from .orpo.body import causal_lm, fused_experts, is_within, towers_of
from .settings import Settings


def check_liger(settings: Settings, machine: Machine) -> None:
    """Raise UserError where the settings ask for Liger's layers, without a package or a GPU for them."""
    why = ""
    if not is_liger_kernel_available():
        why = "it is not installed: pip install liger-kernel, or"
    elif machine.device != "cuda" or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        why = "Liger's layers need a whole model on a CUDA GPU, without FSDP:"
    if settings.liger_kernel and why:
        raise UserError(f"liger_kernel is true, but {why} set liger_kernel=false.")


def apply_liger(model) -> None:
    """Put Liger's fused norms, rotary embeddings and MLPs into a model; its losses are not for pairs."""
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})


def forget_earlier_run() -> None:
    """Let go of what an earlier run of this process left alive, and of its peak of memory: bitsandbytes'
    registries hold its weights and paged state, the last traceback the frames of a cell that failed."""
    error = getattr(sys, "last_value", None)
    while error is not None:  # other references to it may live on, so its frames are emptied
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    sys.last_type = sys.last_value = sys.last_traceback = sys.last_exc = None
    if bitsandbytes := sys.modules.get("bitsandbytes"):
        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
        bitsandbytes.functional.GlobalPageManager.get_instance().initialize()
    forget_peak_memory()  # which collects the cycles that hold the model


def check_finite(model, name: str) -> None:
    """Raise UserError where a weight is not finite; of those in 4 bit nothing can be told."""
    for place, weights in model.named_parameters():
        if weights.is_floating_point() and weights.element_size() > 1 and weights.numel():
            if not torch.stack(torch.aminmax(weights.detach())).isfinite().all():
                large = ", or too large for float16" * (weights.dtype == torch.float16)
                why = f"holds a value that is not finite (in {place}): its weights are damaged{large}"
                raise UserError(f"The model {name!r} {why}; fetch them again, or choose another model.")


def load_tokenizer(base_model: str):
    """Load a model's tokenizer; code from the hub is not run."""
    with explain_model(base_model):
        return AutoTokenizer.from_pretrained(locate(base_model), trust_remote_code=False)


def load_base(base_model: str, *, dtype: torch.dtype, device: str, four_bit: bool = False):
    """Load a causal LM on `device`, for training or for answering.

    Args:
        dtype: of the weights; with `four_bit`, of the computation and of what stays in 16 bit.
        four_bit: NF4 with double quantisation; embeddings, head and norms keep `dtype`.
    """
    options = dict(dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=False)
    loader = class_of(config := load_config(base_model))
    if four_bit and not is_quantised(config):  # else its weights stay as they come
        nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, **nf4)
    with explain_model(base_model):
        place = locate(base_model)
        options |= dict(generation_config=_generation_config(place), output_loading_info=True)
        model, info = loader.from_pretrained(place, **options)
        if lacking := sorted(info["missing_keys"]):  # transformers would take random numbers for them
            lack = f"{len(lacking)} of the weights of its config.json, as {lacking[0]}"
            raise ValueError(f"its files lack {lack}")
    if device == "cpu" and (four_bit or fused_experts(model)):
        # A copy, else what stays as it was keeps the whole file mapped, with the pages read while quantising
        # or fusing. Nothing is cast (as peft.prepare_model_for_kbit_training would: 2 GiB on Llama-3-8B).
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    # With AVX512-BF16 an evaluation would repack 4-bit weights, for good, for a CPU kernel without gradients.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not takes_sdpa(model):
        model.set_attn_implementation("eager")
    model.config.use_cache = False
    check_finite(model, base_model)
    return model


def _generation_config(place: str):
    """Read a model's generation settings without those that loading or saving them would refuse."""
    try:
        given = folders.read_json(Path(cached_file(place, "generation_config.json")))
    except OSError:
        return None  # it has none of its own
    while True:
        try:
            config = transformers.GenerationConfig(**given)
            config.validate(strict=True)
            return config
        except Exception as error:
            named = given.keys() & re.findall(r"`(\w+)`", str(error))
            for name in named or sorted(given, key=lambda name: name.endswith("_id"))[:1]:
                del given[name]


def load_for_training(settings: Settings, *, method: str, dtype: torch.dtype, device: str):
    """Load a model to train: weights in float32 (full), or adapters in float32 over frozen ones in `dtype`.

    Full tuning keeps float32 weights, computed on in `dtype`: a step of 5e-6 is lost in bfloat16's rounding.
    """
    weights = torch.float32 if method == "full" else dtype
    model = load_base(settings.base_model, dtype=weights, device=device, four_bit=method == "qlora")
    if settings.liger_kernel:  # before a scorer proves what the model computes with
        apply_liger(model)
    if method == "full":
        beside = towers_of(model)
        for name, weights in model.named_parameters():
            weights.requires_grad_(weights.requires_grad and not is_within(name, beside))
        return model
    torch.manual_seed(settings.seed)  # the adapters' start
    return add_adapters(model, settings)


def add_adapters(model, settings: Settings):
    """Wrap a model in LoRA adapters on every linear layer that its text goes through, but the head."""
    peft, s = import_peft(), settings
    shape = dict(r=s.lora_rank, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout)
    shape |= dict(exclude_modules=_without_adapter(model) or None, task_type="CAUSAL_LM")
    config = peft.LoraConfig(target_modules="all-linear", **shape)
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as error:
        if "lora_dropout" in str(error):
            why = "base_model has fused experts, which take none: set lora_dropout=0"
            raise UserError(f"lora_dropout is {s.lora_dropout}, but {why}.") from None
        why = f"takes no adapters ({' '.join(str(error).split())[:160]})"
        raise UserError(f"base_model {why}: set method=full, or choose another.") from None
    replace_forwards(model)
    return model


def _without_adapter(model) -> str:
    """Write a pattern of the linear layers that take no adapter: those of towers; what is no plain product
    (routers, grouped layers); what several layers share, where a merge would add up; what Mamba's fused
    kernel reads past its forward."""
    shares = Counter(id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, own = name.rpartition(".")
            mixer = model.get_submodule(parent)
            fused = own == "out_proj" and hasattr(mixer, "conv1d") and hasattr(mixer, "D")
            if fused or shares[id(module.weight)] > 1 or not _is_product(module):
                names.append(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)))
    # A tower's layer that is called by a number would have every layer of that number match.
    beside = [re.escape(name) + r"\..*" for name in towers_of(model)]
    return "|".join([*dict.fromkeys(names), *beside, *[r".*\.\d+"] * bool(beside)])


def _is_product(layer: nn.Linear) -> bool:
    """Tell whether a layer is as its kind says: some models' subclasses give tuples, or take groups."""
    kind = type(layer)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith("transformers.models"):
        return True
    try:
        with torch.no_grad():
            return layer(layer.weight[:2]).shape == (2, layer.out_features)
    except Exception:  # whatever such a layer raises at a plain input
        return False


def about_adapters(model) -> str:
    """Say which layers of a model have adapters and which linear ones and experts none; "" in full tuning."""
    lm, adapted, bare = causal_lm(model), Counter(), Counter()
    inside = {id(lm.get_output_embeddings())}
    for name, module in lm.named_modules():
        own = name.replace(".base_layer", "").rpartition(".")[2]
        if hasattr(module, "lora_A"):
            adapted[f"{own}.{getattr(module, 'parameter_name', '')}".strip(".")] += 1
            inside |= {id(part) for part in module.modules()}
        elif id(module) not in inside:
            fused = not isinstance(module, nn.Conv1d) and any(p.dim() == 3 for p in module.parameters(False))
            bare[own] += fused or isinstance(module, nn.Linear | Conv1D)
    if not adapted:
        return ""
    adapted, bare = (", ".join(f"{n} {name}" for name, n in names.items() if n) for names in (adapted, bare))
    return f"Adapters on {adapted}; " + (f"none on {bare}." if bare else "on every linear layer.")


def import_peft():
    """Import peft, past its refusal of an old torchao that happens to be installed (Colab has 0.10)."""
    import peft

    with contextlib.suppress(PackageNotFoundError):
        if tuple(int(x) for x in version("torchao").split(".")[:2]) < (0, 16):
            for name, module in list(sys.modules.items()):
                if name.startswith("peft") and hasattr(module, "is_torchao_available"):
                    module.is_torchao_available = lambda: False
    # Transformers warns users of a name that peft still asks for.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    return peft


def adapters_off(model):
    """Give the base model again, in a `with`, without a second copy; full tuning has none to go back to."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()


def save_model(model, tokenizer, folder: Path, *, base_model: str, weights=None, modelfile="") -> None:
    """Save adapter or full model (safetensors), tokenizer, template, generation settings: all or nothing.

    Args:
        base_model: what an adapter names as its base, not a folder of this machine; empty for a merged model.
        weights: {name: tensor}, where the model holds only a part of them.
        modelfile: the text of Ollama's file, to lie beside them.
    """
    with marker.replacing(folder, "model" if base_model else "merged model") as scratch:
        causal_lm(model).config.use_cache = True  # training had it off
        if hasattr(model, "peft_config"):
            model.save_pretrained(scratch, state_dict=weights, save_embedding_layers=False)
            config = scratch / "adapter_config.json"
            named = folders.read_json(config) | {"base_model_name_or_path": base_model}
            config.write_text(json.dumps(named, indent=2))
            marker.remove(scratch / "README.md")  # peft's empty card names a folder of this machine
        else:
            model.save_pretrained(scratch, state_dict=weights)
        model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _name_as_transformers_4(scratch / "tokenizer_config.json")
        if modelfile:
            (scratch / "Modelfile").write_text(modelfile, encoding="utf-8")


def _name_as_transformers_4(config: Path) -> None:
    """Give a tokenizer's class and further special tokens their older names, which llama.cpp knows too."""
    saved = folders.read_json(config)
    if saved.get("tokenizer_class") == "TokenizersBackend":
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(saved.get("extra_special_tokens"), list):
        saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
    config.write_text(json.dumps(saved, indent=2, ensure_ascii=False), encoding="utf-8")


@contextlib.contextmanager
def reading_finished(folder: Path):
    """Read a finished run's `model/` in a block; UserError where it is none, or damaged, or not readable."""
    if not os.path.isdir(folder):
        given = f"There is no finished model at {str(folder)!r}"
        raise UserError(f"{given}; give the model/ folder of a finished run.")
    check_files(folder)
    if bad := [name for name in marker.damaged(folder) if name.endswith(".safetensors")]:
        raise UserError(f"{folder} is damaged ({', '.join(bad)}): bring it back from a copy, or train anew.")
    with explain_model(str(folder), "bring the run's model/ back whole, with the base model that it names"):
        yield


def load_finished(folder: Path, *, dtype: torch.dtype = torch.float32, device="cpu", merge: bool = False):
    """Load a finished run's model, its weights in `dtype`, and tokenizer from its `model/`, ready to answer.

    Args:
        merge: fold the adapter into the base weights, also where training had them in 4 bit.
    """
    folder = expanded(folder)
    with reading_finished(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not (folder / "adapter_config.json").is_file():
            return load_base(str(folder), dtype=dtype, device=device).eval(), tokenizer
        model = _load_adapter(folder, dtype, device, merge)
        model = (model.merge_and_unload() if merge else model).eval()
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        check_finite(model, str(folder))
    return model, tokenizer


def _load_adapter(folder: Path, dtype: torch.dtype, device: str, merge: bool):
    """Load an adapter over its base, which is in `dtype` where it is to be merged; ValueError where they do
    not fit, which peft would pass over."""
    saved = load_file(folder / "adapter_model.safetensors")  # never a pickle beside it
    peft, config = import_peft(), folders.read_json(folder / "adapter_config.json")
    kind, named = (config.get(name) for name in ("peft_type", "base_model_name_or_path"))
    if kind != "LORA" or not isinstance(named, str):
        raise ValueError(f"its config names {kind!r} over {named!r}, not LORA over a model")
    base = load_base(named, dtype=dtype, device=device)
    if merge and getattr(base, "quantization_method", None):  # into 4 or 8 bit nothing can be folded
        base = base.dequantize(dtype=dtype)
        base._weight_conversions = None  # else a save would want to pack them again
    model = peft.PeftModel.from_pretrained(base, folder)
    found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if other := saved.keys() ^ found.keys():
        raise ValueError(f"{len(other)} weights are its own or the model's alone, as {min(other)}")
    for name, weights in found.items():  # peft has renamed some on their way in, and lost those
        weights.copy_(saved[name])
    return model


@contextlib.contextmanager
def without_bars():
    """Work without transformers' own bars: one more appears at every checkpoint."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
