"""Take a finished run home: merge it, talk to it, export it, push it to the hub.

Each function works from the folder of a run alone, also of one from another machine. Nothing is trained here,
and nothing leaves the machine but by `push`.
"""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import TextStreamer

from .. import marker
from ..errors import UserError, around, dissect, expanded, explain_disk, say, without_secrets
from ..folder import read_json
from ..kinds import check_files
from ..machine import pick_precision, this_machine
from ..model import load_finished, save_model
from ..orpo.body import causal_lm
from ..orpo.encoding import Encoder, Unusable
from ..rows.template import Template
from . import card
from .evaluate import answers

_TORN = set("LookupError TypeError AttributeError ValueError ArithmeticError TemplateError".split())


def folder_of_run(folder, needed: str = "settings.json") -> Path:
    """Give the folder of a run as a path; UserError where it is none, or has no `needed` yet."""
    folder = expanded(folder)
    name = repr(str(folder))
    if not os.path.isfile(folder / "settings.json"):
        raise UserError(
            f"{name} is not the folder of a run (it has no settings.json): give one that a run wrote."
        )
    if not os.path.exists(folder / needed):
        raise UserError(f"The run in {name} has no {needed} yet: let it end, or run it again to go on.")
    check_files(folder)
    return folder


@around
def explain_run(error: Exception, folder) -> str:
    """Say that what a run left is not what a run leaves: something else has changed or torn it."""
    kinds, _, text = dissect(error)
    if not kinds & _TORN:
        return ""
    why = f"its files are damaged, or of another version of the kit ({text})"
    return f"The run in {str(folder)!r} cannot be read: {why}; bring them back, or run it anew."


def merge(run_folder, out=None, *, dtype: torch.dtype | None = None) -> Path:
    """Write the full model of a run, the adapter folded in.

    Args:
        out: where to; None: `merged/` in the run's folder.
        dtype: of the weights; None: what the run computed in (16 bit on GPUs), also over a base in 4 bit.

    Returns:
        the folder: safetensors, tokenizer, chat template, generation settings.
    """
    folder = folder_of_run(run_folder, "model")
    out = expanded(out or folder / "merged").resolve()
    with explain_run(folder), explain_disk(out, "merge again"):
        base = read_json(folder / "model" / "adapter_config.json").get("base_model_name_or_path", "")
        if os.path.isdir(base) and Path(base).resolve().is_relative_to(out):
            over = f"over {base!r}, from which it is made"
            raise UserError(f"The merged model would be written {over}: give another folder.")
        marker.check(out, "merged model")
        dtype = dtype or getattr(torch, read_json(folder / "summary.json").get("precision", "float32"))
        merged, tokenizer = load_finished(folder / "model", dtype=dtype, merge=True)
        save_model(merged, tokenizer, out, base_model="")
    return out


def export_gguf(run_folder) -> str:
    """Write a run's merged model as a GGUF file, for llama.cpp, Ollama and LM Studio.

    Returns:
        what was written; where llama.cpp's converter is neither on the PATH nor in a clone here, the commands
        that do it, without its own requirements: they would replace torch and transformers by older ones.
    """
    merged = merge(run_folder)  # anew: an older one may be of a run that went on since
    out = merged.with_name(f"{merged.name}.gguf")
    script = shutil.which("convert_hf_to_gguf.py") or "llama.cpp/convert_hf_to_gguf.py"
    command = [sys.executable, script, str(merged), "--outtype", "q8_0", "--outfile"]
    if not Path(script).is_file():
        return f"""\
llama.cpp's converter is not here; these commands fetch it and write {out}:
git clone --depth 1 https://github.com/ggml-org/llama.cpp
{sys.executable} -m pip install gguf sentencepiece
{shlex.join([*command, str(out)])}"""
    if marker.marked(out.parent):
        marker.take(out.parent, "run", out.name)
    elif os.path.lexists(out):
        raise UserError(f"{out} is there already, and not by this kit: move it away first.")
    with explain_disk(out.parent, "again"), tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        draft = os.path.join(scratch, out.name)
        done = subprocess.run([*command, draft], capture_output=True, text=True, errors="replace")
        if done.returncode:
            words = " ".join(done.stderr.split()[-30:])
            raise UserError(f"{script} failed ({words}): see what it needs, or take a newer llama.cpp.")
        marker.flush(Path(draft))
        os.replace(draft, out)
    return f"{out} is written."


# Talk.


def reply(
    model, tokenizer, messages: list[dict], on_text=lambda piece: None, *, max_tokens: int = 512
) -> str:
    """Give the model's greedy answer, prompted as in training.

    Args:
        messages: {"role", "content"} turns, the last one the user's; what is too long is cut from the left.
        on_text: called with each piece of the answer, a str, as soon as it is written.
        max_tokens: longest answer, tokens.
    """
    config, ends = causal_lm(model).config.get_text_config(), model.generation_config.eos_token_id
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 4096)
    max_tokens = min(max_tokens, limit // 2)
    encoder = Encoder(Template(tokenizer), max_prompt_tokens=limit - max_tokens, max_tokens=limit)
    try:
        prompt = encoder.prompt_ids(messages)
    except Unusable as why:
        raise UserError(
            f"The model's chat template does not take this ({why}): say it in other words."
        ) from None
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
    (text,) = answers(model, tokenizer, [prompt], max_tokens=max_tokens, end_ids=ends, streamer=streamer)
    return text.removesuffix("…")


_say = functools.partial(say, end="")


def ask(run, question: str) -> None:
    """Print the tuned model's answer as it is written: a notebook's way to talk to its `run.Run`."""
    if not hasattr(run, "model"):  # it was finished before this kernel began
        kind = dict(dtype=run.dtype, device=run.machine.device)
        run.model, run.tokenizer = load_finished(run.folder / "model", **kind)
    reply(run.model, run.tokenizer, [{"role": "user", "content": question}], _say)
    say()


def chat(run_folder) -> list[dict]:
    """Talk to a finished run in a terminal, until /exit or the end of input; returns the talk."""
    folder, machine = folder_of_run(run_folder, "model"), this_machine()
    dtype, _ = pick_precision("auto", machine)
    model, tokenizer = load_finished(folder / "model", dtype=dtype, device=machine.device)
    messages = []
    say(f"{folder.name} on {machine.name}. /new begins a new talk, /exit ends.")
    while True:
        try:
            text = input("\nYou: ").strip()
        except EOFError:
            return messages
        if text == "/exit":
            return messages
        if text == "/new":
            messages = []
        elif text:
            talk = [*messages, {"role": "user", "content": text}]
            _say("Model: ")
            try:
                answer = reply(model, tokenizer, talk, _say)
                messages = [*talk, {"role": "assistant", "content": answer}]
            except UserError as error:
                _say(error)
            say()


# To the hub.


def push(run_folder, repo: str, *, private: bool = True) -> str:
    """Push a finished run to the hub in one commit: the model's files, the card, the picture, the summary.

    The token comes from HF_TOKEN or `hf auth login`. A repository that exists keeps its visibility.

    Returns:
        address of the repository.
    """
    folder, api = folder_of_run(run_folder, "model"), HfApi()
    with _explain_push(repo):
        made = api.create_repo(repo, private=private, exist_ok=True)
    with explain_run(folder):
        files = _files_to_push(folder, made.repo_id)
    with _explain_push(repo):
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(made.repo_id, operations, commit_message="A run of LazyORPO")
    return str(made)


@around
def _explain_push(error: Exception, repo: str) -> str:
    kinds, status, reason = dissect(error)
    way_out = "check the connection and push again"
    if "HFValidationError" in kinds:
        way_out = "give a name that the hub allows, as owner/name"
    elif status & {401, 403} or "LocalTokenNotFoundError" in kinds:
        way_out = "set HF_TOKEN to a token that may write there"
    return f"Nothing was pushed to {repo!r} ({reason[:200]}): {way_out}."


def _files_to_push(folder: Path, repo: str) -> dict[str, bytes | str]:
    """List {name in the repository: file or content}; peft's README and a local base's name stay here."""
    files = {
        f.name: str(f)
        for f in (*sorted((folder / "model").iterdir()), folder / "live.png")
        if f.is_file() and f.name != marker.MARKER
    }
    if summary := read_json(folder / "summary.json"):
        summary["why"] = card.without_paths(summary["why"])
        files["summary.json"] = without_secrets(json.dumps(summary, indent=1)).encode()
    files["README.md"] = card.write_card(folder, repo).encode()
    if config := read_json(folder / "model" / "adapter_config.json"):
        config["base_model_name_or_path"] = card.public_name(config["base_model_name_or_path"])
        files["adapter_config.json"] = json.dumps(config, indent=2).encode()
    return files
