"""The model card of a run: README.md with the hub's front matter, written from the files in the run's folder alone.

It computes no figure, loads no model and asks no network. Texts that come from data, from a model or from a user never act
as Markdown, HTML or YAML; local paths and tokens stay out. A stopped run gives a shorter card.
"""

import json
import math
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache

from . import history
from .settings import DEFAULTS

FIGURES = {
    "accuracy": "accuracy (share of pairs)",
    "accuracy_chosen_shorter": "accuracy where chosen is the shorter answer",
    "accuracy_chosen_longer": "accuracy where chosen is not the shorter",
    "log_odds_chosen": "log-odds of chosen (nats)",
    "log_odds_rejected": "log-odds of rejected (nats)",
    "log_odds_ratio": "log-odds ratio (nats)",
    "nll": "nll of chosen (nats per token)",
}
OBJECTIVES = {
    "orpo": "ORPO (one stage, no reference model)",
    "sft": "supervised fine-tuning on the chosen answers",
    "dpo": "DPO against the frozen base model",
}
ABOUT_ORPO = """\
## How ORPO works

ORPO adds a weighted odds-ratio term to the usual loss on the chosen answer: loss = nll + or_weight · or_loss, with
or_loss = −log σ(log-odds of chosen − log-odds of rejected), the odds taken of each answer's mean probability per token. One
stage replaces supervised fine-tuning followed by preference tuning, and no reference model is kept.

```bibtex
@inproceedings{hong2024orpo,
  title     = {{ORPO}: Monolithic Preference Optimization without Reference Model},
  author    = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle = {Proceedings of EMNLP},
  year      = {2024},
  note      = {arXiv:2403.07691}
}
```"""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOCAL_PATH = re.compile(r"""(['"])(?:~|[A-Za-z]:)?[\\/].*?\1|(?<![\w/.])(?:~|[A-Za-z]:)?[\\/][\w.~][^\s'"),;]*""")
_TOKEN = re.compile(r"\bhf_\w{8,}")


def write_card(folder: Path, repo: str = "") -> str:
    """The text of a run's README.md.

    Args:
        repo: hub repository that the card is for; empty: the run's `hub_repo`, if it has one.
    """
    folder = Path(folder)
    run = {name: read_json(folder / f"{name}.json") for name in ("settings", "data_report", "summary", "held_out")}
    run["values"] = DEFAULTS | run["settings"].get("settings", {})
    run["history"] = history.read(folder / "history.jsonl")
    run["repo"] = repo or run["values"]["hub_repo"]
    picture = "![Log-odds, nll, or_loss and accuracy over the steps](live.png)" if (folder / "live.png").is_file() else ""
    parts = [_front_matter(run), _opening(run), _results(run), picture, _loading(run), _answers(run), _data(run),
             _settings(run), _cost(run), _limits(run), ABOUT_ORPO if run["values"]["objective"] == "orpo" else ""]  # fmt: skip
    text = "\n\n".join(part for part in parts if part) + "\n"
    return _TOKEN.sub("hf_(token left out)", text).encode("utf-8", "backslashreplace").decode()


def read_json(path: Path) -> dict:
    """The object in a file of the run; no file is no content."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# Text that cannot act as anything else.


def inline(value) -> str:
    """Any text as one line of plain text, also inside a table: what could be Markdown or HTML becomes an entity, which
    CommonMark never reads as structure."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(r"[^\w\s.,;?/%+=()-]|_", lambda found: f"&#{ord(found[0])};", text)


def fenced(text: str, language: str = "text", longest: int = 2000) -> str:
    """A text as it is, in a code block whose fence is longer than any in the text."""
    text = text if len(text) <= longest else text[:longest] + "…"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the cells must be safe already."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def spread(mean: float, interval, form: str = ".3f") -> str:
    """A mean with its interval, e.g. "0.625 (0.500 to 0.750)"."""
    low, high = interval
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _hub_id(name: str) -> str:
    """`name` (of a dataset: without split) where it is a hub id, else nothing."""
    name = name.split(":")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def _name(name: str) -> str:
    """A hub id whole; of a local path the last part."""
    return name if _hub_id(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def _value(name: str, value) -> str:
    if name in ("base_model", "dataset"):
        return inline(_name(value))
    if name == "output_dir":
        return "(a local folder)"
    return inline(_LOCAL_PATH.sub("(a local path)", str(value))) or "(empty)"


def _licence(name: str, kind: str) -> str:
    """The licence that a card already on this machine states, or nothing: the hub is not asked."""
    if kind == "dataset" and name == "demo":
        return "apache-2.0"
    found = Path(name).expanduser() / "README.md" if kind == "model" else None
    if repo := _hub_id(name):
        found = try_to_load_from_cache(repo, "README.md", repo_type=kind)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return ""
    try:
        stated = (metadata_load(found) or {}).get("license", "")
    except (ValueError, yaml.YAMLError):  # somebody else's broken front matter states no licence
        return ""
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated or "")


# The parts of the card.


def _front_matter(run) -> str:
    values, adapter = run["values"], _is_adapter(run)
    base, dataset, licence = _hub_id(values["base_model"]), _hub_id(values["dataset"]), _licence(values["base_model"], "model")
    accuracy = run["summary"].get("accuracy_after")
    results = None
    if dataset and isinstance(accuracy, float) and math.isfinite(accuracy):  # the hub wants the dataset of a result by id
        results = [EvalResult(
            task_type="text-generation", dataset_type=dataset, dataset_name=dataset, metric_type="accuracy",
            metric_value=round(accuracy, 4), metric_name="Preference accuracy on held-out pairs",
        )]  # fmt: skip
    known = re.fullmatch(r"[a-z0-9.-]+", licence) and licence not in ("other", "unknown")
    front = ModelCardData(
        base_model=base or None, base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=[dataset] if dataset else None, library_name="peft" if adapter else "transformers", license=licence if known else None,
        pipeline_tag="text-generation", tags=[values["objective"], "lazyorpo", "preference", *(["lora"] if adapter else [])],
        model_name=_title(run) if results else None, eval_results=results,
    )  # fmt: skip
    return f"---\n{front.to_yaml()}\n---"


def _is_adapter(run) -> bool:
    return run["summary"].get("method", run["values"]["method"]) != "full"


def _title(run) -> str:
    values = run["values"]
    return f"{_name(values['base_model']).split('/')[-1]} {values['objective'].upper()} {_name(values['dataset']).split('/')[-1]}"


def _opening(run) -> str:
    values, summary = run["values"], run["summary"]
    kind = "A LoRA adapter for" if _is_adapter(run) else "A fine-tuned version of"
    lines = [
        f"# {inline(_title(run))}",
        f"{kind} {_linked(values['base_model'])}, trained on the preference pairs of {_linked(values['dataset'], 'datasets/')} with "
        f"{OBJECTIVES.get(values['objective'], inline(values['objective']))}, using LazyORPO.",
    ]
    if not summary.get("finished"):
        why = _LOCAL_PATH.sub("(a local path)", str(summary.get("why", "it has no summary yet")))
        lines.append(f"**The run was not finished** ({inline(why)}): figures below are from what it wrote until then.")
    base, data = _licence(values["base_model"], "model"), _licence(values["dataset"], "dataset")
    lines.append(
        f"Licence of the base model: {inline(base) or 'not known here; see its own card'}. "
        f"Licence of the data: {inline(data) or 'not known here; see its source'}."
    )
    return "\n\n".join(lines)


def _linked(name: str, kind: str = "") -> str:
    repo = _hub_id(name)
    return f"[{inline(name)}](https://huggingface.co/{kind}{repo})" if repo else f"{inline(_name(name))} (not on the hub)"


def _results(run) -> str:
    summary, rows = run["summary"], run["history"]
    lines = ["## Results"]
    if figures := summary.get("held_out"):
        lines += [
            f"**{inline(summary['verdict'])}**",
            table(["held-out pairs", "pairs", "before", "after", "change", "more than noise"], [
                [FIGURES.get(name, inline(name)), f"{f['pairs']:,}", spread(f["before"], f["before_interval"]),
                 spread(f["after"], f["after_interval"]), spread(f["change"], f["change_interval"], "+.3f"),
                 "yes" if f["more_than_noise"] else "no"]
                for name, f in figures.items()
            ]),
            "In parentheses: 95 % bootstrap intervals over the held-out pairs; the change is taken pair by pair. "
            "Accuracy is the share of pairs in which the model gives chosen higher odds than rejected.",
        ]  # fmt: skip
    if curves := history.summarise(rows)["train"]:
        ends = [f"{name} {c['first']:.3f} → {c['last']:.3f}" for name, c in curves.items()]
        lines.append("Training, first → last logged step: " + inline(", ".join(ends)) + ".")
        lines.append(f"Reading of the curves: {inline(history.reading(rows))}.")
    return "\n\n".join(lines) if lines[1:] else "## Results\n\nNothing was measured before the run ended."


def _loading(run) -> str:
    values = run["values"]
    name = json.dumps(_hub_id(run["repo"]) or "model", ensure_ascii=False)
    where = "" if _hub_id(run["repo"]) else "  # the folder of that name in the run's folder, or its hub id"
    code = [
        "import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer", "", f"name = {name}{where}",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
    ]  # fmt: skip
    if _is_adapter(run):
        base = values["base_model"]
        base = base if _hub_id(base) else f"path/to/{_name(base)}"
        code[1:1] = ["from peft import PeftModel"]
        code += [
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base, ensure_ascii=False)}, dtype=torch.bfloat16)",
            "model = PeftModel.from_pretrained(base, name)",
            "model = model.merge_and_unload()  # optional: fold the adapter into the weights",
        ]
    else:
        code += ["model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)"]
    code += [
        'messages = [{"role": "user", "content": "Hello!"}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "answer = model.generate(**inputs, max_new_tokens=128)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    more = "`python -m lazyorpo_lib chat RUN` talks to it in a terminal; `python -m lazyorpo_lib merge RUN` writes the full model."
    return f"## How to load it\n\n{fenced(chr(10).join(code), 'python')}\n\nWith the run's folder RUN at hand, {more}"


def _answers(run) -> str:
    kept = run["held_out"]
    if not {"before", "after"} <= kept.keys() or not kept["prompts"]:
        return ""
    parts = ["## Answers to held-out prompts, greedy"]
    for prompt, base, tuned in list(zip(kept["prompts"], kept["before"]["answers"], kept["after"]["answers"], strict=True))[:3]:
        parts += ["Prompt", fenced(prompt), "Base", fenced(base), "Tuned", fenced(tuned)]
    return "\n\n".join(parts)


def _data(run) -> str:
    report = run["data_report"]
    if not report:
        return ""
    lines = [
        f"## Data\n\nRows read: {report['read']:,}; kept: {report['kept']:,} ({report['train']:,} to train on, {report['held_out']:,} "
        f"held out); dropped: {sum(report['dropped'].values()):,}. In {report['chosen_longer']:.0%} of the kept pairs chosen is the longer "
        "answer, in characters."
    ]
    if report["dropped"]:
        rows = [[inline(reason.replace("_", " ")), f"{count:,}"] for reason, count in report["dropped"].items()]
        lines.append(table(["dropped because", "rows"], rows))
    rows = [[side, *(f"{n[figure]:,.0f}" for figure in ("mean", "p50", "p95", "max"))] for side, n in report["tokens"].items()]
    return "\n\n".join([*lines, table(["tokens", "mean", "median", "95 % below", "longest"], rows)])


def _settings(run) -> str:
    values, sources = run["values"], run["settings"].get("sources", {})
    changed = [
        [inline(name), _value(name, value), _value(name, DEFAULTS.get(name, "")), inline(sources.get(name, ""))]
        for name, value in values.items()
        if value != DEFAULTS.get(name) and name != "output_dir"
    ]
    every = table(["setting", "value"], [[inline(name), _value(name, value)] for name, value in values.items()])
    differ = table(["setting", "value", "default", "set by"], changed) if changed else "Every setting has its default."
    return f"## Settings\n\n{differ}\n\n<details>\n<summary>Every setting</summary>\n\n{every}\n\n</details>"


def _cost(run) -> str:
    summary = run["summary"]
    if not summary:
        return ""
    rows = [["steps", "", f"{summary['steps']:,} ({summary['epochs']:g} epochs)"]]
    plan = summary.get("plan") or {}
    planned = next((m for m in plan.get("methods", []) if m["method"] == summary["method"]), None)
    both = [("peak memory, GiB", "peak_gib", f"{summary['peak_memory_gib']:.2f}"),
            ("minutes", "minutes", f"{summary['minutes']:.1f} ({summary['training_minutes']:.1f} of them training)")]  # fmt: skip
    rows += [[label, f"{planned[name]:.2f}" if planned else "", measured] for label, name, measured in both]
    facts = f"{summary['device']}; {summary['precision']}; {summary['method']}; batch layout {summary['layout']}"
    versions = {"lazyorpo": run["settings"].get("version", "")} | summary.get("versions", {})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    trouble = [f"Steps without a finite gradient, left out: {len(summary['bad_steps'])}."] if summary.get("bad_steps") else []
    trouble += [_LOCAL_PATH.sub("(a local path)", note) + "." for note in summary.get("out_of_memory", [])]
    return "\n\n".join([
        "## Memory, time, versions", table(["", "planned", "measured"], rows), f"{inline(facts)}. {inline(listed)}.",
        *map(inline, trouble),
    ])  # fmt: skip


def _limits(run) -> str:
    held_out = run["data_report"].get("held_out", 0)
    lines = [
        f"The figures come from {held_out:,} pairs held out of the same dataset: they say nothing of other tasks or languages."
        if held_out else "No pair was held out, so nothing here shows that the model is better than its base.",
        "What counts as better is what the dataset's annotators, or the model that judged for them, preferred; length is often part "
        "of it, so read the two accuracies by length.",
        "It was not evaluated for safety or truth, and it keeps the faults of its base model and its data.",
    ]  # fmt: skip
    if run["values"]["dataset"] == "demo":
        lines.append("The demo set teaches a visible habit of style and no knowledge.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
