"""The model card of a run: README.md with the hub's front matter, written from the files in the run's folder alone.

It computes no figure, loads no model and asks no network. Texts from data, from a model or from a user never act as
Markdown, HTML or YAML; local paths and tokens stay out. A stopped run gives a shorter card.
"""

import json
import math
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache

from ..folder import read_json, read_rows
from ..settings import DEFAULTS
from . import reading

OBJECTIVES = {
    "orpo": "ORPO (one stage, no reference model)",
    "sft": "supervised fine-tuning on the chosen answers",
    "dpo": "DPO against the frozen base model",
}
COSTS = {"peak_gib": "peak memory, GiB", "minutes": "minutes of training"}
ABOUT_ORPO = """\
## How ORPO works

ORPO adds an odds-ratio term to the usual loss on the chosen answer: loss = nll + or_weight · or_loss, where or_loss is
−log σ(log-odds of chosen − log-odds of rejected), and the odds are those of exp(mean log-probability per token). One
stage replaces supervised fine-tuning and preference tuning, and no reference model is kept.

```bibtex
@inproceedings{hong2024orpo,
  title     = {{ORPO}: Monolithic Preference Optimization without Reference Model},
  author    = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle = {Proceedings of EMNLP},
  year      = {2024},
  note      = {arXiv:2403.07691}
}
```"""
# Punctuation that Markdown or HTML reads: any of these; _ but inside a word; what would make a web address a link.
_ACTIVE = re.compile(r"[!-$&'*<>@\[-^`{-~]|(?<![^\W_])_|_(?![^\W_])|:(?=/)|(?<=www)\.", re.I)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOCAL_PATH = re.compile(
    r"""(['"])(?:~|[A-Za-z]:)?[\\/].*?\1|(?<![\w/.])(?:~|[A-Za-z]:)?[\\/][\w.~][^\s'"),;]*"""
)
_TOKEN = re.compile(r"\bhf_\w{8,}")


def write_card(folder: Path, repo: str = "") -> str:
    """The text of a run's README.md.

    Args:
        repo: hub repository that the card is for; empty: the run's `hub_repo`, if it has one.
    """
    folder = Path(folder)
    run = {
        name: read_json(folder / f"{name}.json")
        for name in ("settings", "data_report", "summary", "held_out")
    }
    run["values"] = DEFAULTS | run["settings"].get("settings", {})
    run["history"] = read_rows(folder / "history.jsonl")
    run["repo"] = repo or run["values"]["hub_repo"]
    run["picture"] = (folder / "live.png").is_file()
    sections = (
        _front_matter,
        _opening,
        _results,
        _loading,
        _answers,
        _data,
        _settings,
        _cost,
        _limits,
        _method,
    )
    text = "\n\n".join(filter(None, (section(run) for section in sections))) + "\n"
    return _TOKEN.sub("hf_(token left out)", text).encode("utf-8", "backslashreplace").decode()


# Text that cannot act as anything else.


def inline(value) -> str:
    """Any text as one line of plain text, also inside a table: what could be Markdown or HTML becomes an entity, which
    CommonMark never reads as structure."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", text)


def fenced(text: str, language: str = "text", longest: int = 2000) -> str:
    """A text as it is, in a code block whose fence is longer than any in the text."""
    text = text if len(text) <= longest else text[:longest] + "…"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the cells must be safe already."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def spread(figure: dict, when: str, form: str = ".3f") -> str:
    """Write a figure with its interval, e.g. "0.625 (0.500 to 0.750)"; `when`: "before", "after" or "change"."""
    low, high = figure[f"{when}_interval"]
    return f"{figure[when]:{form}} ({low:{form}} to {high:{form}})"


def _hub_id(name: str) -> str:
    """`name` (of a dataset: without split) where it is a hub id, else nothing."""
    name = name.split(":")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def public_name(name: str) -> str:
    """A hub id as it is; of a local path the last part."""
    return name if _hub_id(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def without_paths(text) -> str:
    """A text with every local path in it taken out."""
    return _LOCAL_PATH.sub("(a local path)", str(text))


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


def _is_adapter(run) -> bool:
    return run["summary"].get("method", run["values"]["method"]) != "full"


def _title(run) -> str:
    base, data = (public_name(run["values"][name]).split("/")[-1] for name in ("base_model", "dataset"))
    return " ".join(f"{base} {run['values']['objective'].upper()} {data.split(':')[0]}".split())


def _front_matter(run) -> str:
    values, adapter, results = run["values"], _is_adapter(run), None
    base, dataset = _hub_id(values["base_model"]), _hub_id(values["dataset"])
    accuracy, licence = run["summary"].get("accuracy_after"), _licence(values["base_model"], "model")
    if (
        dataset and accuracy is not None and math.isfinite(accuracy)
    ):  # the hub takes results on its own datasets alone
        results = [EvalResult(
            task_type="text-generation", dataset_type=dataset, dataset_name=dataset, metric_type="accuracy",
            metric_value=round(accuracy, 4), metric_name="Preference accuracy on held-out pairs",
        )]  # fmt: skip
    front = ModelCardData(
        base_model=base or None,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=[dataset] if dataset else None,
        library_name="peft" if adapter else "transformers",
        license=licence if re.fullmatch(r"(?!other$|unknown$)[a-z0-9.-]+", licence) else None,
        pipeline_tag="text-generation",
        tags=[values["objective"], "lazyorpo", "preference"] + ["lora"] * adapter,
        model_name=_title(run) if results else None,
        eval_results=results,
    )
    return f"---\n{front.to_yaml()}\n---\n\n# {inline(_title(run))}"


def _opening(run) -> str:
    values, summary = run["values"], run["summary"]
    sources = (("base_model", "model", ""), ("dataset", "dataset", "datasets/"))
    base, data = (_linked(values[name], place) for name, _, place in sources)
    licences = [
        inline(_licence(values[name], kind)) or "not known here, see its source" for name, kind, _ in sources
    ]
    lines = [
        f"{'A LoRA adapter for' if _is_adapter(run) else 'A fine-tuned version of'} {base}, trained on the preference "
        f"pairs of {data} with {OBJECTIVES[values['objective']]}, using LazyORPO.",
        "Licence of the base model: {}. Licence of the data: {}.".format(*licences),
    ]
    if not summary.get("finished"):
        why = inline(without_paths(summary.get("why", "it wrote no summary")))
        lines.insert(
            1, f"**The run was not finished** ({why}): the figures are from what it wrote until then."
        )
    return "\n\n".join(lines)


def _linked(name: str, kind: str = "") -> str:
    repo = _hub_id(name)
    if not repo:
        return f"{inline(public_name(name))} (not on the hub)"
    return f"[{inline(name)}](https://huggingface.co/{kind}{repo})"


def _results(run) -> str:
    lines, rows, summary = ["## Results"], run["history"], run["summary"]
    if figures := summary.get("held_out"):
        cells = [
            [inline(name), f"{f['pairs']:,}", *(spread(f, when) for when in ("before", "after", "change")),
             "yes" if f["more_than_noise"] else "no"]
            for name, f in figures.items()
        ]  # fmt: skip
        lines += [
            f"**{inline(summary['verdict'])}**",
            table(["held out", "pairs", "before", "after", "change", "more than noise"], cells),
            "In parentheses: 95 % bootstrap intervals over the held-out pairs; the change is taken pair by pair. "
            "Accuracy: share of pairs whose chosen answer has the higher odds; log-odds: nats; nll: nats per token.",
        ]
    if "habit_after" in summary:
        lines.append(
            f"Answers with the demo's habit: {summary['habit_before']:.0%} before, {summary['habit_after']:.0%} after."
        )
    train = [row for row in rows if not reading.is_evaluation(row)]
    if curves := {name: seen for name in reading.CURVES if (seen := reading.values(train, name))}:
        ends = ", ".join(f"{name} {seen[0]:.3f} → {seen[-1]:.3f}" for name, seen in curves.items())
        lines.append(f"Training, first → last logged step: {inline(ends)}.")
        lines.append(f"Reading of the curves: {inline(reading.read_curves(rows))}.")
    if run["picture"]:
        lines.append("![Log-odds of chosen and rejected, nll, or_loss and accuracy over the steps](live.png)")
    return "\n\n".join(lines) if lines[1:] else "## Results\n\nThe run ended before anything was measured."


def _loading(run) -> str:
    repo, base = _hub_id(run["repo"]), run["values"]["base_model"]
    base = base if _hub_id(base) else f"path/to/{public_name(base)}"
    load = 'AutoModelForCausalLM.from_pretrained({}, dtype="auto")'
    adapter = f"""\
from peft import PeftModel

base = {load.format(json.dumps(base, ensure_ascii=False))}
model = PeftModel.from_pretrained(base, name)  # .merge_and_unload() folds the adapter into the weights"""
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {json.dumps(repo or "model")}{"" if repo else "  # the folder model/ of the run"}
{adapter if _is_adapter(run) else "model = " + load.format("name")}
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=128)[0, inputs.input_ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
    return "\n\n".join([
        "## How to load it", fenced(code, "python"),
        "With LazyORPO and the run's folder RUN: `python -m lazyorpo_lib chat RUN` talks to it, "
        "`python -m lazyorpo_lib merge RUN` writes the full model.",
    ])  # fmt: skip


def _answers(run) -> str:
    kept = run["held_out"]
    if not {"before", "after"} <= kept.keys() or not kept["prompts"]:
        return ""
    parts = ["## Answers to held-out prompts, greedy"]
    columns = kept["prompts"], kept["before"]["answers"], kept["after"]["answers"]
    for texts in list(zip(*columns, strict=True))[:3]:
        parts += [
            f"{head}\n\n{fenced(text)}" for head, text in zip(("Prompt", "Base", "Tuned"), texts, strict=True)
        ]
    return "\n\n".join(parts)


def _data(run) -> str:
    report = run["data_report"]
    if not report:
        return ""
    dropped = [[inline(reason.replace("_", " ")), f"{rows:,}"] for reason, rows in report["dropped"].items()]
    tokens = [
        [side, *(f"{n[figure]:,.0f}" for figure in ("mean", "p50", "p95", "max"))]
        for side, n in report["tokens"].items()
    ]
    return "\n\n".join([
        "## Data",
        f"Rows read: {report['read']:,}; kept: {report['kept']:,} ({report['train']:,} to train on, "
        f"{report['held_out']:,} held out); dropped: {report['read'] - report['kept']:,}. In characters, chosen is the "
        f"longer answer in {report['chosen_longer']:.0%} of the kept pairs.",
        *([table(["dropped because", "rows"], dropped)] if dropped else []),
        table(["tokens", "mean", "median", "95 % below", "longest"], tokens),
    ])  # fmt: skip


def _settings(run) -> str:
    def cell(name, value):
        return (
            inline(public_name(value) if name in ("base_model", "dataset") else without_paths(value))
            or "(empty)"
        )

    sources = run["settings"].get("sources", {})
    rows = [
        [inline(name), cell(name, value), cell(name, DEFAULTS.get(name, "")), inline(sources.get(name, ""))]
        for name, value in run["values"].items()
        if value != DEFAULTS.get(name) and name != "output_dir"
    ]
    return (
        "## Settings\n\n"
        + table(["setting", "value", "default", "set by"], rows)
        + "\n\nEvery other setting has its default."
    )


def _cost(run) -> str:
    summary = run["summary"]
    if not summary:
        return ""
    both = summary.get("planned_against_measured", {})
    rows = [[words, *(f"{x:.2f}" for x in both[name])] for name, words in COSTS.items() if name in both]
    versions = {"lazyorpo": run["settings"].get("version", "")} | summary.get("versions", {})
    notes = [f"Steps without a finite gradient, left out: {len(summary['bad_steps'])}."] * bool(
        summary["bad_steps"]
    )
    return "\n\n".join([
        "## Memory, time, versions",
        *([table(["", "planned", "measured"], rows)] if rows else []),
        inline(f"{summary['steps']:,} steps ({summary['epochs']:g} epochs) in {summary['minutes']:.1f} minutes, evaluation included, "
               f"on {summary['device']}; {summary['method']} in {summary['precision']}, batch layout {summary['layout']}."),
        inline("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."),
        *(inline(without_paths(note)) for note in notes + summary["out_of_memory"]),
    ])  # fmt: skip


def _limits(run) -> str:
    held_out = run["data_report"].get("held_out", 0)
    lines = [
        f"The figures come from {held_out:,} pairs held out of the same dataset; they say nothing of other tasks."
        if held_out
        else "No pair was held out, so nothing here shows that the model is better than its base.",
        "Better means: as the makers of the dataset preferred. Length is often part of it; see the accuracies by it.",
        "It was not evaluated for truth or safety, and it keeps the faults of its base model and its data.",
    ] + ["The demo set teaches a visible habit of style and no knowledge."] * (
        run["values"]["dataset"] == "demo"
    )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _method(run) -> str:
    return ABOUT_ORPO if run["values"]["objective"] == "orpo" else ""
