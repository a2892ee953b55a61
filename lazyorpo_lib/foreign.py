"""Settings out of a file: a run's settings.json, or an ORPO file of TRL or axolotl.

YAML or JSON. What has no counterpart here is named, never dropped in silence; nothing is trained or fetched.
"""

import contextlib
import math
import os

from .errors import UserError, expanded
from .settings import FIELDS, coerce

# Their name, and ours where it is another; nothing after the colon: `_joined` reads it.
_BOTH = (
    "learning_rate weight_decay max_grad_norm max_steps warmup_steps seed output_dir lora_alpha lora_dropout "
    "lora_r:lora_rank gradient_accumulation_steps: warmup_ratio: load_in_4bit: bf16: fp16: datasets: "
)
_NAMES = {
    "TRL": "model_name_or_path:base_model beta:or_weight max_length:max_tokens num_train_epochs:epochs "
    "max_prompt_length:max_prompt_tokens lr_scheduler_type:lr_schedule optim:optimizer run_name:tracker_run "
    "report_to per_device_train_batch_size: use_peft: dataset_name: dataset_config: dataset_train_split:",
    "axolotl": "base_model orpo_alpha:or_weight rl_beta:or_weight sequence_len:max_tokens num_epochs:epochs "
    "lr_scheduler:lr_schedule optimizer micro_batch_size: adapter: rl:",
}
_NAMES = {kind: [pair.split(":") for pair in (_BOTH + text).split()] for kind, text in _NAMES.items()}
_NAMES = {kind: {name: (*ours, name)[0] for name, *ours in pairs} for kind, pairs in _NAMES.items()}
_OPTIMIZERS = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
_OPTIMIZERS |= {"adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}


def settings_of(file: str, flags=()) -> tuple[dict, str]:
    """Read {setting: value} from a file, none from no file, and a sentence on what was not taken; UserError
    where it holds no settings, a wrong value, or another method than ORPO. `flags`: settings that are given
    beside it, whose values in a foreign file are not looked at."""
    found = _read(file) if file else {}
    if file and not (isinstance(found, dict) and found and all(isinstance(name, str) for name in found)):
        form = "give the settings.json of a run, or an ORPO file of TRL or axolotl"
        raise UserError(f"--settings is {file!r}, which holds no settings: {form}.")
    kind = max(["", *_NAMES], key=lambda kind: len(found.keys() & _NAMES.get(kind, FIELDS)))
    if not kind and "rl" not in found:
        return found, ""
    if "rl" in found or kind == "axolotl":
        kind, rl = "axolotl", _plain(found.get("rl"))
        if rl != "orpo":
            raise UserError(f"{file} is for axolotl, and its rl is {rl!r}: give a file whose rl is orpo.")
    found = {name: value for name, value in found.items() if value is not None}
    lost, out = [name for name in found if name not in _NAMES[kind]], {"nll_over": "prompt+answer"}  # TRL's
    rows = [(ours, name, found[name]) for name, ours in _NAMES[kind].items() if ours and name in found]
    for ours, name, value in rows + _joined(found, lost):
        value = _plain(value)
        value = {"optimizer": _OPTIMIZERS, "max_steps": {-1: 0}}.get(ours, {}).get(value, value)
        try:
            if ours not in flags:
                out[ours] = coerce(ours, value)
        except UserError as error:
            way = f"mend that, or give --{ours.replace('_', '-')} beside it"
            raise UserError(f"In {file}, by {name}: {str(error).rstrip('.')}; {way}.") from None
    return out, f"Not taken from {file}, having no counterpart here: {', '.join(lost)}." if lost else ""


def _read(file: str):
    import yaml  # comes with transformers, which may be missing: that is told first

    path = expanded(file)
    with contextlib.suppress(ValueError, OSError, RecursionError, yaml.YAMLError, AttributeError):
        if os.path.isfile(path) and os.path.getsize(path) < 2**20:  # no pipe, which might never end
            with open(path, encoding="utf-8") as text:
                found = yaml.safe_load(text)  # JSON is YAML
            return found.get("settings", found)


def _plain(value):
    """Give one value: the only one of a list, or "several values" (a list's own text may have no end)."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return "several values" if isinstance(value, list | dict | set) else value


def _joined(found: dict, lost: list[str]) -> list[tuple]:
    """Give (ours, theirs, value) of what several of their names, or one of another form, say together."""
    rows, get = [], found.get
    batch = next((n for n in ("per_device_train_batch_size", "micro_batch_size") if n in found), "")
    if batch or "gradient_accumulation_steps" in found:
        sizes = [get(batch, 1 if "rl" in found else 8), get("gradient_accumulation_steps", 1)]
        whole = all(type(size) is int for size in sizes)
        pairs = math.prod([*sizes, int(os.environ.get("WORLD_SIZE", 1))]) if whole else "no whole number"
        rows.append(("pairs_per_step", batch or "gradient_accumulation_steps", pairs))
    if "adapter" in found or "use_peft" in found or get("load_in_4bit"):
        four = "qlora" if get("load_in_4bit") else "lora"
        peft = get("use_peft", bool(get("load_in_4bit")))
        rows.append(("method", "adapter", get("adapter") or (four if peft else "full")))
    for name, precision in (("fp16", "float16"), ("bf16", "bfloat16")):
        rows += [("precision", name, precision)] if get(name) in (True, "full", "true") else []
    if get("bf16") is False and get("fp16") is False:
        rows.append(("precision", "bf16", "float32"))
    sets = get("datasets") or [{"path": get("dataset_name"), "name": get("dataset_config"),
                                "split": get("dataset_train_split")}]  # fmt: skip
    one = sets[0] if isinstance(sets, list) and len(sets) == 1 and isinstance(sets[0], dict) else {}
    if one.get("path") or "datasets" in found:
        name, place = one.get("name"), one.get("data_files") or one.get("path", ["several", "sets"])
        place = str(_plain(place))
        split = one.get("split") or ("train" if name else None)
        parts = [place] if os.path.exists(place) else [place, name, split]
        rows.append(("dataset", "datasets", ":".join(str(_plain(part)) for part in parts if part)))
        lost += [f"datasets.{n}" for n in one if n not in ("path", "name", "split", "data_files")]
    if ratio := get("warmup_ratio"):
        steps = get("max_steps", 0)
        known = isinstance(ratio, float) and isinstance(steps, int) and steps > 0
        rows += [("warmup_steps", "warmup_ratio", int(ratio * steps))] if known else []
        lost += [] if known else ["warmup_ratio"]
    return rows
