"""The model card of a run: README.md with the hub's front matter, from card.md and the files in its folder.

What the template puts in is plain text, unless it is marked as safe: what could act as Markdown, HTML or YAML
is escaped, local paths and tokens are left out. It computes no figure, loads no model, asks no network.
"""

import json
import math
import os
import re
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from markupsafe import Markup

from ..errors import printable, without_secrets
from ..folder import read_json, read_rows
from ..settings import DEFAULTS
from . import reading
from .evaluate import answers_side_by_side

# What Markdown or HTML reads: any of these; _ but inside a word; what would make an address a link.
_ACTIVE = re.compile(r"[!-$&'*<>@\[-^`{-~]|(?<![^\W_])_|_(?![^\W_])|:(?=/)|(?<=www)\.", re.I)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOCAL_PATH = re.compile(
    r"""(['"])(?:~|[A-Z]:)?[\\/].*?\1|(?<![\w/.])(?:~|[A-Z]:)?[\\/][\w.~][^\s'"),;]*""", re.I
)
# A licence in a card's front matter: its line, and those of a list under it.
_LICENCE = re.compile(r"---[ \t]*\n(?:(?!---).*\n)*?(license:.*(?:\n(?!---)[ \t-].*)*)")


def write_card(folder: Path, repo: str = "") -> str:
    """Write the text of a run's README.md, a shorter one where it was stopped, for the hub repository `repo`;
    empty: the run's `hub_repo`, if it has one."""
    folder = Path(folder)
    names = ("settings", "data_report", "summary", "held_out")
    settings, report, summary, held_out = (read_json(folder / f"{name}.json") for name in names)
    values = DEFAULTS | settings.get("settings", {}) | settings.get("chosen", {})
    rows = read_rows(folder / "history.jsonl")
    train = [row for row in rows if not reading.is_evaluation(row)]
    adapter = summary.get("method", values["method"]) != "full"
    of, told = {"model": values["base_model"], "dataset": values["dataset"]}, settings.get("licences", {})
    licences = {kind: _licence(name, kind) or told.get(kind, "") for kind, name in of.items()}
    given = dict(values=values, summary=summary, report=report, adapter=adapter, licences=licences)
    given |= dict(front=Markup(_front_matter(values, summary, adapter, licences["model"])))
    given |= dict(title=_title(values), defaults=DEFAULTS, sources=settings.get("sources", {}))
    given |= dict(answers=answers_side_by_side(held_out)[:3], reading=reading.read_curves(rows, summary))
    given |= dict(curves={name: seen for name in reading.CURVES if (seen := reading.values(train, name))})
    given |= dict(picture=(folder / "live.png").is_file(), repo=_hub_id(repo or values["hub_repo"]))
    return printable(without_secrets(_TEMPLATE.render(given, version=settings.get("version", ""))))


def inline(value) -> str:
    """Put any text on one line of plain text, also inside a table: what could be Markdown or HTML becomes an
    entity, which CommonMark never reads as structure."""
    text = " ".join("".join(c if c.isprintable() else " " for c in without_secrets(value)).split())
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", text)


def _safe(value) -> str:
    """Write what the template shows of a value that is not marked as safe."""
    if isinstance(value, Markup):
        return value
    return f"{value:,}" if type(value) is int else inline(without_paths(value))


def fenced(text: str, language: str = "text", longest: int = 2000) -> Markup:
    """Put a text as it is into a code block whose fence is longer than any in the text."""
    text = text if len(text) <= longest else text[:longest] + "…"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def table(head: list[str], rows: list[list]) -> str:
    """Write a Markdown table; every cell of the rows is taken as plain text, the head as it is."""
    lines = [head, ["---"] * len(head), *([inline(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(figure: dict, when: str, form: str = ".3f") -> str:
    """Write a figure with its interval, as 0.625 (0.500 to 0.750), or its standard error, if it has one, as
    0.412 ± 0.021; `when`: before, after or change."""
    if when not in figure:
        return "not taken"
    value, error = f"{figure[when]:{form}}", figure.get(f"{when}_stderr")
    if ends := figure.get(f"{when}_interval"):
        return f"{value} ({ends[0]:{form}} to {ends[1]:{form}})"
    return value if error is None else f"{value} ± {error:{form}}"


def _hub_id(name: str) -> str:
    """Give `name` (of a dataset: without split) where it is a hub id, else nothing."""
    name = name.split(":")[0]
    return name if _HUB_ID.fullmatch(name) and not os.path.exists(name) else ""


def public_name(name: str) -> str:
    """Give a hub id as it is; of a local path the last part."""
    return name if _hub_id(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def without_paths(text) -> str:
    """Take every local path out of a text."""
    return _LOCAL_PATH.sub("(a local path)", str(text))


def _link(name: str, kind: str = "") -> Markup:
    if repo := _hub_id(name):
        return Markup(f"[{inline(name)}](https://huggingface.co/{kind}{repo})")
    return Markup(f"{inline(public_name(name))} (not on the hub)")


def _licence(name: str, kind: str) -> str:
    """Give the licence that a card already on this machine states, or nothing: the hub is not asked."""
    if kind == "dataset" and name == "demo":
        return "apache-2.0"
    found = os.path.join(os.path.expanduser(name), "README.md") if kind == "model" else None
    if repo := _hub_id(name):
        found = try_to_load_from_cache(repo, "README.md", repo_type=kind)
    if not isinstance(found, str) or not os.path.isfile(found):
        return ""
    with open(found, "rb") as file:  # somebody else's text: a bomb or a thousand brackets are not unpacked
        front = _LICENCE.match(file.read(2**16).decode("utf-8", "replace").replace("\r", ""))
    try:
        stated = yaml.safe_load(front[1][:200])["license"] if front else ""
    except (ValueError, yaml.YAMLError, RecursionError):  # broken, it states no licence
        return ""
    names = stated if isinstance(stated, list) else [stated]
    return ", ".join(name for name in names if isinstance(name, str))


def _title(values: dict) -> str:
    base, data = (public_name(values[name]).split("/")[-1] for name in ("base_model", "dataset"))
    return " ".join(f"{base} {values['objective'].upper()} {data.split(':')[0]}".split())


def _front_matter(values: dict, summary: dict, adapter: bool, licence: str) -> str:
    base, dataset = _hub_id(values["base_model"]), _hub_id(values["dataset"])
    result, accuracy = None, summary.get("accuracy_after", math.nan)
    if dataset and math.isfinite(accuracy):  # the hub takes results on its own datasets alone
        result = EvalResult(
            task_type="text-generation", dataset_type=dataset, dataset_name=dataset, metric_type="accuracy",
            metric_value=round(accuracy, 4), metric_name="Preference accuracy on held-out pairs",
        )  # fmt: skip
    return ModelCardData(
        base_model=base or None,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=[dataset] if dataset else None,
        library_name="peft" if adapter else "transformers",
        license=licence if re.fullmatch(r"(?!other$|unknown$)[a-z0-9.-]+", licence) else None,
        pipeline_tag="text-generation",
        tags=[values["objective"], "lazyorpo", "preference"] + ["lora"] * adapter,
        model_name=_title(values) if result else None,
        eval_results=result,
    ).to_yaml()


def _setting(value, name: str) -> str:
    return str(public_name(value) if name in ("base_model", "dataset") else value) or "(empty)"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), finalize=_safe,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
_ENVIRONMENT.filters |= {"link": _link, "fenced": fenced, "spread": spread, "setting": _setting}
_ENVIRONMENT.filters["where"] = lambda name: name if _hub_id(name) else f"path/to/{public_name(name)}"
_ENVIRONMENT.filters["python"] = lambda text: Markup(json.dumps(text, ensure_ascii=False))
_TEMPLATE = _ENVIRONMENT.get_template("card.md")
