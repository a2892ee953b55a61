"""Take a finished run home: merge it, talk to it, lay runs side by side, push it to the hub.

Each works from the folder of a run alone, also of one from another machine. torch is imported only where it is needed.
Nothing is trained here, and nothing leaves the machine but by `push`.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from . import card, history
from .settings import UserError

WHERE = ("output_dir", "resume", "hub_repo", "preset")  # settings that say nothing of how two runs differ


def _run_folder(folder, needed: str = "settings.json") -> Path:
    """The folder of a run; UserError where it is none, or has no `needed` yet."""
    folder = Path(folder).expanduser()
    if not (folder / "settings.json").is_file():
        raise UserError(f"{str(folder)!r} is not the folder of a run (it has no settings.json): give one that a run wrote.")
    if not (folder / needed).exists():
        raise UserError(f"The run in {str(folder)!r} has no {needed} yet: let it end, or run it again to go on.")
    return folder


def _load(folder: Path, **options):
    """Model and tokenizer of a run, with the generation settings that were saved with it."""
    from transformers import GenerationConfig

    from . import model

    loaded, tokenizer = model.load_finished(folder / "model", **options)
    loaded.generation_config = GenerationConfig.from_pretrained(folder / "model")
    return loaded, tokenizer


def merge(run_folder, out=None) -> Path:
    """Write the full model of a run, the adapter folded in, to `out` (default: `merged/` in the run's folder).

    The weights have the precision that the run computed in (16 bit on GPUs), also where the base was held in 4 bit.

    Returns:
        the folder: safetensors, tokenizer, chat template, generation settings.
    """
    import torch

    from . import model

    folder = _run_folder(run_folder, "model")
    out = Path(out).expanduser() if out else folder / "merged"
    dtype = getattr(torch, card.read_json(folder / "summary.json").get("precision", "float32"))
    merged, tokenizer = _load(folder, dtype=dtype, merge=True)
    merged.config.use_cache = True  # training had it off
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save_model(merged, tokenizer, out, base_model="")
    return out


def gguf_commands(merged: Path) -> str:
    """The commands that turn a merged model into a GGUF file for llama.cpp, Ollama and LM Studio."""
    return f"""\
git clone --depth 1 https://github.com/ggml-org/llama.cpp
pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt
python llama.cpp/convert_hf_to_gguf.py "{merged}" --outtype q8_0 --outfile "{merged}.gguf\""""


# Talk.


def reply(model, tokenizer, messages: list[dict], on_text: Callable[[str], None] = lambda piece: None, *, max_tokens: int = 512) -> str:
    """The model's greedy answer, prompted as in training; `on_text` is given each piece as soon as it is written.

    Args:
        messages: {"role", "content"} turns, the last one the user's; what the model cannot hold is cut from the left.
        max_tokens: longest answer, tokens.

    Raises:
        UserError: the chat template takes no such turns.
    """
    import torch
    from transformers import TextStreamer

    from .attention import start_batch
    from .encoding import Encoder, Unusable
    from .model import causal_lm

    config = causal_lm(model).config.get_text_config()
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 4096)
    max_tokens = min(max_tokens, limit // 2)
    encoder = Encoder(tokenizer, max_prompt_tokens=limit - max_tokens, max_tokens=limit)
    try:
        prompt = encoder.prompt_ids(messages)
    except Unusable as why:
        raise UserError(f"The model's chat template does not take this ({why}): say it in other words.") from None
    start_batch(None)  # after training in this process: ordinary attention again
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
            temperature=None, top_p=None, top_k=None, use_cache=True, streamer=streamer,
        )  # fmt: skip
    model.train(training)
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()


def chat(run_folder, *, max_tokens: int = 512) -> list[dict]:
    """Talk to a finished run in a terminal; returns the talk. /new begins another, /exit or end of input ends it."""
    from . import model

    folder = _run_folder(run_folder, "model")
    machine = model.this_machine()
    dtype, _ = model.pick_precision("auto", machine)
    loaded, tokenizer = _load(folder, dtype=dtype, device=machine.device)
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
                answer = reply(loaded, tokenizer, [*messages, turn], lambda piece: print(piece, end="", flush=True), max_tokens=max_tokens)
            except UserError as error:
                print(error, end="")
            else:
                messages += [turn, {"role": "assistant", "content": answer}]
            print()


# Side by side.


def compare(folders, picture=None) -> dict:
    """Runs side by side.

    Args:
        folders: two or more folders of runs, finished or not.
        picture: file of the picture; None: none is written.

    Returns:
        settings: {name: [value of each run]} where they differ; results: [{figure: text} of each run];
        markdown: both as tables; png: the curves over each other.
    """
    from . import live

    folders = [_run_folder(folder) for folder in folders]
    if len(folders) < 2:
        raise UserError(f"{len(folders)} run was given to compare: give two folders or more.")
    names = _names(folders)
    values = [card.read_json(folder / "settings.json")["settings"] for folder in folders]
    differ = {
        name: [v.get(name) for v in values]
        for name in dict.fromkeys(name for v in values for name in v)
        if name not in WHERE and any(v.get(name) != values[0].get(name) for v in values)
    }
    results = [{"run": name} | _results(folder) for name, folder in zip(names, folders, strict=True)]
    first, *others = folders
    for row, folder in zip(results[1:], others, strict=True):
        row["accuracy minus the first run's"] = _against(first, folder)
    figures = list(dict.fromkeys(name for row in results for name in row))
    markdown = "\n\n".join([
        "Settings that differ",
        card.table(["setting", *map(card.inline, names)], [
            [card.inline(text) for text in (name, *of_runs)] for name, of_runs in differ.items()
        ]),
        "Results on held-out pairs after training, with 95 % intervals",
        card.table(figures, [[card.inline(row.get(name, "–")) for name in figures] for row in results]),
    ])  # fmt: skip
    png = live.draw_runs({n: history.read(f / "history.jsonl") for n, f in zip(names, folders, strict=True)}, picture)
    return {"settings": differ, "results": results, "markdown": markdown, "png": png}


def _names(folders: list[Path]) -> list[str]:
    """A short name for each folder: its own, with as many of its parents' as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("The same run was given twice: give two different folders.")


def _results(folder: Path) -> dict[str, str]:
    summary = card.read_json(folder / "summary.json")
    if not summary:
        return {"steps": f"{history.summarise(history.read(folder / 'history.jsonl'))['steps']:,}, not finished"}
    row = {"steps": f"{summary['steps']:,}" + ("" if summary["finished"] else ", not finished")}
    figures = summary.get("held_out", {})
    for name in ("accuracy", "log_odds_ratio", "nll"):
        if name in figures:
            row[name] = card.spread(figures[name]["after"], figures[name]["after_interval"])
    return row | {"training minutes": f"{summary['training_minutes']:.1f}", "peak GiB": f"{summary['peak_memory_gib']:.2f}"}


def _against(first: Path, other: Path) -> str:
    """How much more accurate `other` is than `first`, taken pair by pair, where both were tested on the same pairs."""
    if _held_out_pairs(first) != _held_out_pairs(other):
        return "other held-out pairs"
    tested = [card.read_json(folder / "held_out.json") for folder in (first, other)]
    if not all("after" in kept for kept in tested):
        return "–"
    import numpy as np

    from .evaluate import interval

    a, b = (np.array(kept["after"]["pairs"])[:, kept["columns"].index("accuracy")] for kept in tested)
    return card.spread((b - a).mean(), interval(b - a))


def _held_out_pairs(folder: Path) -> tuple:
    """What decides which pairs a run held out."""
    values = card.read_json(folder / "settings.json")["settings"]
    return card.read_json(folder / "data_report.json").get("digest"), values["eval_pairs"], values["seed"]


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

    folder, api = _run_folder(run_folder, "model"), HfApi()
    with _told(repo):
        made = api.create_repo(repo, private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in _files_to_push(folder, made.repo_id).items()]
    with _told(repo):
        api.create_commit(made.repo_id, operations, commit_message="A run of LazyORPO")
    return str(made)


@contextlib.contextmanager
def _told(repo: str):
    """Turn what the hub's client raises, whichever HTTP library it is built on, into one sentence."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        way_out = "check the connection and push again"
        if type(error).__name__ == "HFValidationError":
            way_out = "give a name that the hub allows, as owner/name"
        elif status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
            way_out = "set HF_TOKEN to a token that may write there"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"Nothing was pushed to {repo!r} ({reason}): {way_out}.") from error


def _files_to_push(folder: Path, repo: str) -> dict[str, bytes | str]:
    """{name in the repository: file or content}; peft's own README and the name of a local base folder stay here."""
    files = {f.name: str(f) for f in sorted((folder / "model").iterdir()) if f.is_file()}
    if (folder / "live.png").is_file():
        files["live.png"] = str(folder / "live.png")
    if summary := card.read_json(folder / "summary.json"):
        files["summary.json"] = json.dumps(summary | {"why": card.without_paths(summary["why"])}, indent=1).encode()
    files["README.md"] = card.write_card(folder, repo).encode()
    if "adapter_config.json" in files:
        config = card.read_json(folder / "model" / "adapter_config.json")
        config["base_model_name_or_path"] = card.public_name(config["base_model_name_or_path"])
        files["adapter_config.json"] = json.dumps(config, indent=2).encode()
    return files


# From a terminal.


def _arguments(given: list[str], usage: str, low: int, high: int) -> list[str]:
    if not low <= len(given) <= high or any(word.startswith("-") for word in given):
        raise UserError(f"{' '.join(given) or 'nothing'!r} was given; use it as: python -m lazyorpo_lib {usage}.")
    return given


def _chat(given: list[str]) -> int:
    chat(*_arguments(given, "chat RUN", 1, 1))
    return 0


def _merge(given: list[str]) -> int:
    out = merge(*_arguments(given, "merge RUN [FOLDER]", 1, 2))
    print(f"The full model is in {out}. For llama.cpp, Ollama or LM Studio:\n\n{gguf_commands(out)}")
    return 0


def _compare(given: list[str]) -> int:
    print(compare(_arguments(given, "compare RUN RUN …", 2, 99), "compare.png")["markdown"])
    print("\nThe curves over each other are in compare.png.")
    return 0


def _push(given: list[str]) -> int:
    print(f"Pushed to {push(*_arguments(given, 'push RUN OWNER/NAME', 2, 2))}")
    return 0


COMMANDS = {"chat": _chat, "merge": _merge, "compare": _compare, "push": _push}
