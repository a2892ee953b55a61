"""Take a finished run home: merge it, talk to it, push it to the hub; and the commands that do so from a terminal.

Each works from the folder of a run alone, also of one from another machine. torch is imported only where it is needed.
Nothing is trained here, and nothing leaves the machine but by `push`.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from .. import folder as folders
from ..errors import UserError, dissect
from ..folder import read_json
from ..machine import pick_precision, this_machine
from . import card


def folder_of_run(folder, needed: str = "settings.json") -> Path:
    """The folder of a run; UserError where it is none, or has no `needed` yet."""
    folder = Path(folder).expanduser()
    if not (folder / "settings.json").is_file():
        raise UserError(
            f"{str(folder)!r} is not the folder of a run (it has no settings.json): give one that a run wrote."
        )
    if not (folder / needed).exists():
        raise UserError(
            f"The run in {str(folder)!r} has no {needed} yet: let it end, or run it again to go on."
        )
    return folder


def merge(run_folder, out=None, *, dtype=None) -> Path:
    """Write the full model of a run, the adapter folded in, to `out` (default: `merged/` in the run's folder).

    The weights have the precision that the run computed in (16 bit on GPUs), also where the base was held in 4 bit, or `dtype`.

    Returns:
        the folder: safetensors, tokenizer, chat template, generation settings.
    """
    import torch

    from .. import model

    folder = folder_of_run(run_folder, "model")
    out = Path(out or folder / "merged").expanduser().resolve()
    base = Path(read_json(folder / "model" / "adapter_config.json").get("base_model_name_or_path", ""))
    if base.is_dir() and base.resolve().is_relative_to(out):
        raise UserError(
            f"The merged model would be written over {str(base)!r}, from which it is made: give another folder."
        )
    folders.check(out, "merged model")
    dtype = dtype or getattr(torch, read_json(folder / "summary.json").get("precision", "float32"))
    merged, tokenizer = model.load_finished(folder / "model", dtype=dtype, merge=True)
    merged.config.use_cache = True  # training had it off
    model.save_model(merged, tokenizer, out, base_model="")
    return out


def export_gguf(run_folder) -> str:
    """Write a run's merged model as a GGUF file, for llama.cpp, Ollama and LM Studio, where llama.cpp's converter is on the
    PATH (or in a clone of it here); returns what was written, or the commands that do it. They leave out the converter's
    own requirements, which would replace this kit's torch and transformers by older ones."""
    folder = folder_of_run(run_folder, "model")
    merged = folder / "merged" if (folder / "merged").is_dir() else merge(folder)
    script = shutil.which("convert_hf_to_gguf.py") or "llama.cpp/convert_hf_to_gguf.py"
    command = [sys.executable, script, str(merged), "--outtype", "q8_0", "--outfile", f"{merged}.gguf"]
    if not Path(script).is_file():
        return f"""\
llama.cpp's converter is not here; these commands fetch it and write {merged}.gguf:
git clone --depth 1 https://github.com/ggml-org/llama.cpp
{sys.executable} -m pip install gguf sentencepiece
{shlex.join(command)}"""
    if folders.marked(folder):
        folders.take(folder, "run", f"{merged.name}.gguf")
    elif os.path.lexists(f"{merged}.gguf"):
        raise UserError(f"{merged}.gguf is there already, and not by this kit: move it away first.")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{script} failed ({' '.join(done.stderr.split()[-30:])}): see what it needs, or take a newer llama.cpp."
        )
    return f"{merged}.gguf is written."


# Talk.


def reply(
    model,
    tokenizer,
    messages: list[dict],
    on_text: Callable[[str], None] = lambda piece: None,
    *,
    max_tokens: int = 512,
) -> str:
    """The model's greedy answer, prompted as in training; `on_text` is given each piece as soon as it is written.

    Args:
        messages: {"role", "content"} turns, the last one the user's; what the model cannot hold is cut from the left.
        max_tokens: longest answer, tokens.

    Raises:
        UserError: the chat template takes no such turns.
    """
    from transformers import TextStreamer

    from ..model import causal_lm
    from ..orpo.encoding import Encoder, Unusable
    from .evaluate import answers

    config, ends = causal_lm(model).config.get_text_config(), model.generation_config.eos_token_id
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 4096)
    max_tokens = min(max_tokens, limit // 2)
    encoder = Encoder(tokenizer, max_prompt_tokens=limit - max_tokens, max_tokens=limit)
    try:
        prompt = encoder.prompt_ids(messages)
    except Unusable as why:
        raise UserError(
            f"The model's chat template does not take this ({why}): say it in other words."
        ) from None
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
    return answers(model, tokenizer, [prompt], max_tokens=max_tokens, end_ids=ends, streamer=streamer)[
        0
    ].removesuffix("…")


def ask(run, question: str) -> None:
    """Print the tuned model's answer to a question as it is written: a notebook's way to talk to its `run.Run`."""
    from ..model import load_finished

    if not hasattr(run, "model"):  # it was finished before this kernel began
        run.model, run.tokenizer = load_finished(
            run.folder / "model", dtype=run.dtype, device=run.machine.device
        )
    reply(run.model, run.tokenizer, [{"role": "user", "content": question}], _print)
    print()


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


def chat(run_folder, *, max_tokens: int = 512) -> list[dict]:
    """Talk to a finished run in a terminal; returns the talk. /new begins another, /exit or end of input ends it."""
    folder = folder_of_run(run_folder, "model")
    from .. import model

    machine = this_machine()
    dtype, _ = pick_precision("auto", machine)
    loaded, tokenizer = model.load_finished(folder / "model", dtype=dtype, device=machine.device)
    messages = []
    print(f"{folder.name} on {machine.name}. /new begins a new talk, /exit ends.")
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
            turn = {"role": "user", "content": text}
            print("Model: ", end="", flush=True)
            try:
                messages += [
                    turn,
                    {
                        "role": "assistant",
                        "content": reply(loaded, tokenizer, [*messages, turn], _print, max_tokens=max_tokens),
                    },
                ]
            except UserError as error:
                print(error, end="")
            print()


# To the hub.


def push(run_folder, repo: str, *, private: bool = True) -> str:
    """Push a finished run to the hub in one commit: the model's files, the card, the picture, the summary.

    The token comes from HF_TOKEN or `hf auth login`. A repository that exists keeps its visibility.

    Returns:
        address of the repository.

    Raises:
        UserError: no token, no right to write there, no connection, or no such name is allowed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder, api = folder_of_run(run_folder, "model"), HfApi()
    with _told(repo):
        made = api.create_repo(repo, private=private, exist_ok=True)
    operations = [
        CommitOperationAdd(name, content) for name, content in _files_to_push(folder, made.repo_id).items()
    ]
    with _told(repo):
        api.create_commit(made.repo_id, operations, commit_message="A run of LazyORPO")
    return str(made)


@contextlib.contextmanager
def _told(repo: str):
    """Turn what the hub's client raises into one sentence."""
    try:
        yield
    except Exception as error:
        kinds, status, reason = dissect(error)
        way_out = "check the connection and push again"
        if "HFValidationError" in kinds:
            way_out = "give a name that the hub allows, as owner/name"
        elif status & {401, 403} or "LocalTokenNotFoundError" in kinds:
            way_out = "set HF_TOKEN to a token that may write there"
        raise UserError(
            f"Nothing was pushed to {repo!r} ({reason[:200]}): {way_out}."
        ) from None  # their texts may hold a token


def _files_to_push(folder: Path, repo: str) -> dict[str, bytes | str]:
    """{name in the repository: file or content}; peft's own README and the name of a local base folder stay here."""
    files = {
        f.name: str(f)
        for f in sorted((folder / "model").iterdir())
        if f.is_file() and f.name != folders.MARKER
    }
    if (folder / "live.png").is_file():
        files["live.png"] = str(folder / "live.png")
    if summary := read_json(folder / "summary.json"):
        files["summary.json"] = json.dumps(
            summary | {"why": card.without_paths(summary["why"])}, indent=1
        ).encode()
    files["README.md"] = card.write_card(folder, repo).encode()
    if "adapter_config.json" in files:
        config = read_json(folder / "model" / "adapter_config.json")
        config["base_model_name_or_path"] = card.public_name(config["base_model_name_or_path"])
        files["adapter_config.json"] = json.dumps(config, indent=2).encode()
    return files


# From a terminal.

USAGE = {
    "chat": "RUN", "merge": "RUN [FOLDER]", "export-gguf": "RUN", "compare": "RUN RUN …", "push": "RUN OWNER/NAME",
}  # fmt: skip


def command(name: str, given: list[str]) -> int:
    """One of `python -m lazyorpo_lib chat|merge|export-gguf|compare|push`; the exit status."""
    words = USAGE[name].split()
    least = sum(word[0] not in "[…" for word in words)
    if not least <= len(given) <= (99 if "…" in words else len(words)) or any(
        word.startswith("-") for word in given
    ):
        raise UserError(
            f"{' '.join(given) or 'nothing'!r} was given; use it as: python -m lazyorpo_lib {name} {USAGE[name]}."
        )
    if name == "chat":
        chat(*given)
    elif name == "merge":
        print(f"The full model is in {merge(*given)}")
    elif name == "export-gguf":
        print(export_gguf(*given))
    elif name == "compare":
        from .compare import compare

        picture = next(
            name for k in count(1) if not os.path.lexists(name := f"compare{f'-{k}' if k > 1 else ''}.png")
        )
        print(f"{compare(given, picture)['markdown']}\n\nThe curves over each other are in {picture}.")
    else:
        print(f"Pushed to {push(*given)}")
    return 0
