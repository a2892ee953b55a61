"""Every setting of a run: default, unit, limits, where its value came from; and the presets.

Standard library only. It looks at no machine, model or data: `pick_preset` and `settle`, which say what
`auto` stands for, are told of them.
"""

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass, field

from .errors import UserError, without_secrets


def _setting(default, help, low=None, high=None, choices=()):
    about = {"help": help, "choices": choices, "low": low, "high": high, "auto": default == "auto"}
    return field(default=default, metadata=about)


def _choice(choices: str, help: str):
    """Declare one of several words, of which the first is the default."""
    return _setting(choices.split()[0], help, choices=tuple(choices.split()))


@dataclass(frozen=True)
class Settings:
    """The settings of one run. The same names serve the notebook's parameter cell, the panel, the environment
    (`LAZYORPO_<NAME>`) and the command line (`--name-with-dashes`)."""

    # fmt: off
    base_model: str = _setting("auto",
        "hub id or local folder of the model to fine-tune; auto: a small one, by the machine")
    dataset: str = _setting("demo",
        "pairs: demo, a hub id (id:split, id:config:split), a file (.jsonl, .csv, .parquet, .xlsx …), its "
        "https address, or in a notebook a list of dicts or a DataFrame")
    epochs: float = _setting("auto", "passes over the training pairs; auto: by their number", 0.001, 1000)
    learning_rate: float = _setting("auto",
        "peak learning rate; about 5e-5 to 5e-4 for LoRA, 5e-6 to 2e-5 for full tuning", 0, 1)
    preset: str = _choice("auto demo tiny colab-t4 phi2-article llama2 mistral-orpo-beta",
        "named set of values that lies under everything set explicitly")
    objective: str = _choice("orpo sft dpo",
        "loss to train: orpo; sft (chosen answers alone); dpo (needs reference log-probs)")
    or_weight: float = _setting("auto",
        "weight of the odds-ratio term (lambda, TRL: beta); 0.1 for 7B, 0.25 to 1 for small ones", 0, 100)
    dpo_beta: float = _setting(0.1, "DPO's beta; read only when objective is dpo", 0, 100)
    nll_over: str = _choice("answer prompt+answer",
        "tokens of the NLL term: answer (paper) or prompt+answer (authors' code, TRL)")
    or_beta: float = _setting(1.0,
        "factor of the log odds ratio inside the sigmoid (arXiv 2502.01237); 1: ORPO's paper", 1e-3, 1000)
    method: str = _choice("auto full lora qlora",
        "full: every weight; lora: adapters; qlora: adapters over 4-bit weights")
    lora_rank: int = _setting(16, "adapter rank; higher learns more and uses more memory", 1, 1024)
    lora_alpha: int = _setting(32, "adapter scale; usually twice the rank", 1, 4096)
    lora_dropout: float = _setting(0.0, "share of adapter inputs dropped while training", 0, 0.9)
    max_prompt_tokens: int = _setting(1024, "longest prompt, tokens", 1, 10**6)
    max_tokens: int = _setting("auto",
        "longest prompt plus answer, tokens; auto: 2048, or what the model can read", 2, 2 * 10**6)
    overlong: str = _choice("drop truncate",
        "pairs over limits: drop, or truncate (prompt from the left, answer keeps its end)")
    columns: str = _setting("",
        "which column is what, as prompt=question,chosen=best,rejected=worst; empty: recognise the shape")
    pairs_per_step: int = _setting(8, "pairs in one optimizer step, over all GPUs", 1, 65536)
    tokens_per_batch: int = _setting("auto",
        "tokens computed at once (a step is split so, with the same result), or auto", 16, 10**8)
    checkpointed_layers: int = _setting("auto",
        "layers whose activations are computed again: less memory, more time; or auto", 0, 10**5)
    warmup_steps: int = _setting("auto",
        "optimizer steps over which the learning rate rises from 0; auto: a twentieth, at most 100", 0, 10**6)
    lr_schedule: str = _choice("cosine linear inverse_sqrt constant constant_with_warmup",
        "learning rate after warmup")
    optimizer: str = _choice("adamw adamw_8bit paged_adamw_8bit paged_adamw_32bit adafactor",
        "8-bit states need bitsandbytes")
    weight_decay: float = _setting(0.0, "AdamW's weight decay", 0, 10)
    max_grad_norm: float = _setting(1.0, "gradients are scaled down to this norm", 1e-6, 1e6)
    precision: str = _choice("auto bfloat16 float16 float32",
        "number format of the computation; auto: by capability, and says why")
    max_steps: int = _setting(0, "stop after this many optimizer steps; 0: the epochs decide", 0, 10**8)
    max_minutes: float = _setting(0.0,
        "stop and save after this many minutes of training; 0: no limit", 0, 10**6)
    price_per_hour: float = _setting(0.0,
        "what an hour of this machine costs, so that plans and results tell the cost; 0: not said", 0, 10**6)
    max_cost: float = _setting(0.0,
        "stop and save once training has cost so much, by price_per_hour; 0: no limit", 0, 10**9)
    on_finish: str = _choice("nothing stop-pod",
        "stop-pod: stop this pod of RunPod's when the run is finished, or ended by a limit")
    max_pairs: int = _setting(0, "read at most this many rows of the dataset; 0: all", 0, 10**9)
    eval_pairs: int = _setting("auto",
        "pairs held out for evaluation, at most a fifth; 0: none; auto: for about ±5 points", 0, 10**6)
    eval_every_steps: int = _setting(0,
        "evaluate on the held-out pairs every so many steps; 0: before and after training only", 0, 10**8)
    keep: str = _choice("last best",
        "step whose weights are kept; best: the one with the lowest loss on the held-out pairs, evaluated by "
        "eval_every_steps, or if that is 0 ten times on at most 100 of them")
    patience: int = _setting(0,
        "with keep=best: evaluations without a better one after which training ends; 0: never", 0, 10**6)
    answers: int = _setting(3,
        "held-out prompts answered by base and tuned model, side by side; 0: none", 0, 1000)
    answer_tokens: int = _setting(128, "longest generated answer, tokens", 1, 8192)
    evaluate: str = _setting("",
        "benchmarks by lm-eval before and after training, as ifeval,gsm8k or a .yaml; empty: none")
    watch_every_steps: int = _setting(0,
        "answer the first held-out prompts every so many steps while training; 0: never", 0, 10**8)
    log_every_steps: int = _setting(1, "steps between rows of the history", 1, 10**6)
    save_every_minutes: float = _setting(10.0,
        "minutes between checkpoints, so that a shorter run writes none; 0: not by the clock", 0, 10**6)
    save_every_steps: int = _setting(0, "steps between checkpoints; 0: not by steps", 0, 10**8)
    keep_checkpoints: int = _setting(2, "newest checkpoints kept", 1, 1000)
    seed: int = _setting(42, "seed of the data order, adapters and dropout", 0, 2**32 - 1)
    output_dir: str = _setting("auto",
        "folder of the run; auto: in /workspace, /content or here, named for model and dataset")
    resume: str = _choice("auto never",
        "auto: go on from the newest complete checkpoint; never: start in an empty folder")
    save_to: str = _choice("local drive",
        "drive: also copy finished checkpoints and the model to Google Drive (Colab)")
    report_to: str = _choice("none wandb tensorboard trackio",
        "experiment tracker beside the run's own files")
    hub_repo: str = _setting("",
        "hub repository to push the finished model to (private); empty: nothing is uploaded")
    liger_kernel: bool = _setting(False, "use Liger's fused layers where Liger is installed")
    tracker_project: str = _setting("", "project in the tracker; empty: WANDB_PROJECT, or lazyorpo")
    tracker_run: str = _setting("", "name of the run in wandb or trackio; empty: one that they make up")
    trackio_space: str = _setting("",
        "Space on the hub that shows trackio's runs to others, as owner/name; empty: nothing is uploaded")
    # fmt: on

    def __post_init__(self):
        for name in (f.name for f in dataclasses.fields(self) if f.type is str):
            value = str(getattr(self, name))
            if without_secrets(value) != value and not os.path.exists(value):  # a folder may be called so
                why = "holds a token, a password or a signed address, and settings are written down"
                way_out = "the hub's token belongs in HF_TOKEN, and a file is given by its path"
                raise UserError(f"{name} {why}: leave it out; {way_out}.")
        if self.max_cost and not self.price_per_hour:
            way_out = "set it to what an hour of this machine costs, or give max_minutes instead"
            raise UserError(f"max_cost is {self.max_cost:g}, but price_per_hour is not said: {way_out}.")
        if self.keep == "best" and self.eval_pairs == 0:
            raise UserError("keep is best, and eval_pairs is 0: give some to decide by, or set keep=last.")
        if self.patience and self.keep == "last":
            raise UserError(f"patience is {self.patience}, but keep is last: set keep=best, or patience=0.")
        if self.max_tokens != "auto" and self.max_prompt_tokens >= self.max_tokens:
            given = f"max_prompt_tokens is {self.max_prompt_tokens} and max_tokens is {self.max_tokens}"
            why = "prompt plus answer must be longer than the prompt alone"
            raise UserError(f"{given}: {why}; raise max_tokens or lower max_prompt_tokens.")


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
DEFAULTS = {name: f.default for name, f in FIELDS.items()}

# Of colab-t4 on a T4, near enough, by the planner's arithmetic; its max_pairs is chosen for it.
COLAB_MINUTES = 15
# Sources: the article, as its author describes the run; arXiv 2403.07691 App. C; xfactlab/orpo at 208d2d6.
_PAPER = dict(
    dataset="argilla/ultrafeedback-binarized-preferences-cleaned", method="full", pairs_per_step=32,
    warmup_steps=200, max_tokens=2048, optimizer="paged_adamw_32bit",
)  # fmt: skip
PRESETS = {
    "demo": dict(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct", epochs=1.0, method="lora", learning_rate=2e-3,
        or_weight=0.5, pairs_per_step=2, max_steps=40, max_tokens=256, max_prompt_tokens=128, warmup_steps=2,
        eval_pairs=40, answers=40, answer_tokens=44,
    ),
    "tiny": dict(
        base_model="tiny-random", epochs=1.0, method="lora", or_weight=0.5, learning_rate=1e-2,
        warmup_steps=0, pairs_per_step=4, max_steps=6, max_pairs=48, eval_pairs=8, answers=2, answer_tokens=8,
        max_tokens=512, max_prompt_tokens=256, save_every_steps=3,
    ),
    "colab-t4": dict(
        base_model="Qwen/Qwen2.5-1.5B-Instruct", dataset="argilla/dpo-mix-7k", method="lora", epochs=1.0,
        learning_rate=5e-5, or_weight=0.25, max_pairs=6000, max_tokens=1024, max_prompt_tokens=512,
        warmup_steps=10, save_every_steps=50,
    ),
    "phi2-article": dict(
        base_model="microsoft/phi-2", dataset="argilla/dpo-mix-7k", method="full", epochs=1.0,
        learning_rate=5e-6, or_weight=0.25, warmup_steps=100, max_prompt_tokens=128, max_tokens=2048,
        pairs_per_step=4, optimizer="paged_adamw_32bit",
    ),
    "llama2": _PAPER | dict(
        base_model="meta-llama/Llama-2-7b-hf", epochs=10.0, learning_rate=8e-6, or_weight=0.2,
        max_prompt_tokens=1024,
    ),
    "mistral-orpo-beta": _PAPER | dict(
        base_model="mistralai/Mistral-7B-v0.1", epochs=5.0, learning_rate=5e-6, or_weight=0.1,
        lr_schedule="inverse_sqrt", max_prompt_tokens=1792,
    ),
}  # fmt: skip

# What auto takes, and from where to where others went, of models with fewer weights: or_weight, learning_rate
# of full tuning, of adapters. Sources: the paper's App. C (or_weight 0.25 for Phi-2, 0.2 and 0.1 for 7B;
# 5e-6 to 8e-6, full); its authors in xfactlab/orpo#5 and #28 (0.05 to 0.1 for 7B, 0.5 to 1 for small ones;
# full 5e-6 to 2e-5; LoRA 5e-5 or 5e-4). Epochs, below so many pairs: the paper has 1 to 10, and few pairs
# are soon gone through.
_BY_WEIGHTS = {
    1e9: ((0.5, 0.1, 1.0), (1e-5, 5e-6, 2e-5), (5e-4, 5e-5, 5e-4)),
    4e9: ((0.25, 0.1, 1.0), (5e-6, 5e-6, 2e-5), (5e-5, 5e-5, 5e-4)),
    math.inf: ((0.1, 0.05, 0.5), (5e-6, 5e-6, 2e-5), (5e-5, 5e-5, 5e-4)),
}
_EPOCHS = {1000: 3.0, 5000: 2.0, math.inf: 1.0}
_FAR, _TOY = 4, 1e7  # times what is usual; weights of a model for which nothing is


def _usual(settings: Settings, known: dict) -> dict[str, tuple]:
    """Give {setting: (value for auto, for what, and of numbers lowest, highest)} as far as what is known
    tells it."""
    found, pairs = {}, known.get("pairs")
    if "gpu_gib" in known:
        gib = known["gpu_gib"] if settings.dataset != "demo" else 0
        what = "the demo's pairs" if settings.dataset == "demo" else "a machine without a CUDA GPU"
        base = PRESETS["colab-t4" if gib else "demo"]["base_model"]
        found["base_model"] = base, f"a GPU with {gib:.0f} GiB" if gib else what
    if "positions" in known:
        most = min([max(2048, settings.max_prompt_tokens + 1024), *known["positions"]])
        found["max_tokens"] = most, "no more than the model can read"
    if "weights" in known:
        row = next(row for limit, row in _BY_WEIGHTS.items() if known["weights"] < limit)
        full, millions = known["method"] == "full", known["weights"] / 1e6
        size = f"{millions / 1000:.2g} billion" if millions >= 1000 else f"{millions:.3g} million"
        part = 30 if settings.objective == "dpo" else 1  # whose rates are about so much lower
        what = f"{'full tuning of' if full else 'adapters on'} {size} weights"
        weight, *ends = row[0]
        rate, *rates = (float(f"{r / part:.2g}") for r in row[1 if full else 2])
        found |= {"or_weight": (weight, f"{size} weights", *ends), "learning_rate": (rate, what, *rates)}
    if pairs is not None:
        passes = next(passes for limit, passes in _EPOCHS.items() if pairs < limit)
        epochs = passes if settings.epochs == "auto" else settings.epochs
        steps = settings.max_steps or math.ceil(epochs * pairs / settings.pairs_per_step)
        found["epochs"] = passes, f"{pairs:,} pairs", 1, 10
        found["warmup_steps"] = min(100, steps // 20), f"{steps:,} steps", 0, steps / _FAR
    return found


def settle(settings: Settings, **known) -> tuple[Settings, dict[str, str]]:
    """Decide what `auto` stands for, of the settings for which enough is known.

    Args:
        known: gpu_gib, of the GPU at hand, 0 without one; positions, [how many tokens the model can read];
            weights, of the whole model, and method; pairs, to train on.

    Returns:
        the settings; for each that was decided for what, as its source.
    """
    usual = _usual(settings, known)
    taken = {name: row for name, row in usual.items() if getattr(settings, name) == "auto"}
    values = {name: row[0] for name, row in taken.items()}
    if values.get("max_tokens", math.inf) <= settings.max_prompt_tokens:
        values["max_prompt_tokens"] = values["max_tokens"] - 2  # no longer one can be read
    return dataclasses.replace(settings, **values), {name: f"auto: {row[1]}" for name, row in taken.items()}


def unusual(settings: Settings, **known) -> list[str]:
    """Say of each value that lies far from what is usual; `known`: weights, method and pairs."""
    said, usual = [], _usual(settings, known)
    idle = {"epochs": settings.max_steps, "or_weight": settings.objective != "orpo"}
    for name in ("learning_rate", "or_weight", "epochs", "warmup_steps") if known["weights"] > _TOY else ():
        value, (_, what, low, high) = getattr(settings, name), usual[name]
        if value != "auto" and not idle.get(name) and not low / _FAR <= value <= high * _FAR:
            far = f"is far {'above' if value > high else 'below'} what is usual for"
            said.append(f"{name} {value:g} {far} {what} ({low:g} to {high:g}); it is kept.")
    return said


def coerce(name: str, value):
    """Take a setting's value in, whatever it came as ("5e-6", 2.0 for an int, "False"), with its type."""
    if name not in FIELDS:
        near = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"There is no setting {name!r}{hint} All settings: {', '.join(FIELDS)}.")
    meta, kind = FIELDS[name].metadata, FIELDS[name].type
    text = str(value).strip()
    if kind is str and not text and FIELDS[name].default:  # a shell's variable that was never set
        raise UserError(f"{name} is empty, but must be text: {meta['help']}.")
    if meta["auto"] and text.lower() == "auto":
        return "auto"
    try:
        out = _to_type(kind, value)
    except (ValueError, TypeError, OverflowError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        extra = " or 'auto'" if meta["auto"] else ""
        raise UserError(f"{name} is {value!r}, but must be {wanted}{extra}: {meta['help']}.") from None
    if meta["choices"] and out not in meta["choices"]:
        raise UserError(f"{name} is {value!r}, but must be one of {', '.join(meta['choices'])}.")
    low, high = meta["low"], meta["high"]
    if low is not None and not low <= out <= high:
        raise UserError(f"{name} is {value!r}, but must lie between {low:g} and {high:g}: {meta['help']}.")
    return out


_TRUTH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def _to_type(kind, value):
    if kind is str:
        if not isinstance(value, str | os.PathLike):
            raise TypeError
        return os.fspath(value).strip()
    if kind is bool:
        return _TRUTH[str(value).strip().lower()]
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number) or number != kind(number):
        raise ValueError
    return kind(number)


def from_environment(environ=os.environ) -> dict:
    """Read the `LAZYORPO_<NAME>` variables as {setting: value}; an unknown one is an error: a typo."""
    found = {key.removeprefix("LAZYORPO_").lower(): key for key in environ if key.startswith("LAZYORPO_")}
    return {name: coerce(name, environ[key]) for name, key in found.items()}


def pick_preset(explicit: dict, gpu_gib: float) -> tuple[str, str]:
    """Say what `preset="auto"` stands for beside what was set, and why; `gpu_gib`: 0 without a GPU."""
    if explicit.get("base_model", "auto") != "auto" or "dataset" in explicit:
        return "", "a model or dataset was chosen; auto goes by the machine, the model and the pairs"
    if not gpu_gib:
        return "demo", "no GPU and no model or dataset chosen: the demo, a few minutes on a CPU"
    why = f"about {COLAB_MINUTES} minutes of training on a T4"
    return "colab-t4", f"a GPU with {gpu_gib:.0f} GiB and no model or dataset chosen: {why}"


def resolve(layers: list[tuple[str, dict]], *, gpu_gib: float = 0.0) -> tuple[Settings, dict, str]:
    """Put the layers of settings together; later layers win.

    Args:
        layers: (source, {name: value}) from weakest to strongest, e.g. [("env", …), ("cell", …), ("panel",
            …)]. The defaults and the preset lie under all of them.
        gpu_gib: memory of the GPU at hand, GiB, for `preset="auto"`.

    Returns:
        the settings; where each value came from, {name: source}; one sentence on the preset.
    """
    explicit, sources = {}, {}
    for source, values in layers:
        explicit |= {name: coerce(name, value) for name, value in values.items()}
        sources |= dict.fromkeys(values, source)
    preset, why = explicit.get("preset", "auto"), "chosen"
    if preset == "auto":
        preset, why = pick_preset(explicit, gpu_gib)
    from_preset = dict(PRESETS.get(preset, {}))
    if not preset and gpu_gib and "dataset" not in explicit:  # another model is no reason for other pairs
        from_preset = {name: PRESETS["colab-t4"][name] for name in ("dataset", "max_pairs")}
    if "epochs" in explicit:
        from_preset.pop("max_steps", None)  # whoever asks for epochs does not mean a preset's short cut
    settings = Settings(**DEFAULTS | from_preset | explicit | {"preset": preset or "auto"})
    settings, decided = settle(settings, gpu_gib=gpu_gib)
    both = settings.base_model, settings.dataset.split(":")[0]
    same = {(of["base_model"], of.get("dataset", "demo")): name for name, of in PRESETS.items()}.get(both)
    if same and not preset:
        why += f"; model and pairs are those of preset {same}: set preset={same} to take all its values"
    sources = {name: f"preset {preset or 'colab-t4'}" for name in from_preset} | sources
    sources = {name: (sources | decided).get(name, "default") for name in FIELDS}
    return settings, sources, f"preset {preset or 'none'}: {why}"
