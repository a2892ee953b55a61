"""Benchmarks on the very model in memory, by lm-eval: the tasks of `evaluate`, before and after training.

No second model is loaded: before training the base answers, its adapter off. What came out is kept in
held_out.json. lm-eval, which computes the scores, is imported only where somebody asks for it.
"""

import contextlib
import copy
import difflib
import functools
import inspect
import json
import math
import os
import random
from importlib.metadata import version
from itertools import chain

import torch

from .. import folder as folders
from .. import marker
from ..errors import UserError, dissect
from ..model import adapters_off
from ..orpo.body import causal_lm
from . import card

_manager = functools.cache(lambda kind, whole: kind(include_defaults=whole))  # for it is slow
_USED = {"tasks", "task_manager", "apply_chat_template", "log_samples"}  # of simple_evaluate


def _tasks(settings) -> list[str]:
    return [name for part in settings.evaluate.split(",") if (name := part.strip())]


def _harness(wanted: list[str]) -> tuple:
    """Give lm-eval's simple_evaluate, HFLM and tasks; UserError where it is absent, or too old."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        lacking = sorted(_USED - inspect.signature(simple_evaluate).parameters.keys())
        lacking += [] if hasattr(TaskManager, "load") else ["TaskManager.load"]
        why = f"is of a version that lacks {', '.join(lacking)}" if lacking else ""
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "lm_eval"
        why = "is not installed" if absent else f"is of a version that cannot be used ({dissect(error)[-1]})"
    if why:
        todo = "pip install -U lm-eval, or leave evaluate empty"
        raise UserError(f"evaluate asks for benchmarks, but lm-eval {why}: {todo}.")
    return simple_evaluate, HFLM, _manager(TaskManager, not all(map(os.path.isfile, wanted)))


def check(settings) -> None:
    """Load the tasks that the settings ask for; UserError of what cannot be had here."""
    wanted = _tasks(settings)
    otherwise = "leave evaluate empty, and run lm_eval on the merged model afterwards"
    if wanted and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"evaluate is {settings.evaluate!r}, but several processes train: {otherwise}.")
    manager = wanted and _harness(wanted)[-1]
    for name in wanted:
        try:
            if name in manager.all_tasks or os.path.isfile(name):
                manager.load([name])
                continue
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            why = f"is no task of lm-eval's and no file{f'; did you mean {near[0]}?' if near else ','}"
            why += " see `lm_eval ls tasks`"
        except Exception as error:
            why = f"lm-eval cannot load ({dissect(error)[-1]}): mend that, or choose another task"
        raise UserError(f"evaluate names {name!r}, which {why}.")


def measure(run, when: str) -> None:
    """Take the benchmarks "before" or "after" training, unless they are kept already; shown and kept. A stop
    ends it with nothing written; the next run begins here. UserError of whatever else fails."""
    s, model, path, name = run.settings, run.trainer.model, run.folder / "held_out.json", f"benchmarks_{when}"
    kept, of = folders.read_json(path), [s.evaluate, run.record.get("base")]
    ended = 0 < run.trainer.steps <= run.trainer.step and not run.stop.hurried
    if not _tasks(s) or kept.get(name, {}).get("of") == of or when == "after" and not ended:
        return
    if when == "before" and run.method == "full" and run.trainer.step:
        run.show("No benchmarks before training: evaluate was set after it began, and all weights changed.")
        return
    training, drawn = model.training, random.getstate()
    base = adapters_off(model) if when == "before" else contextlib.nullcontext()
    try:
        with base, torch.random.fork_rng(), run.spent.on("evaluation"):
            found = _evaluate(run, causal_lm(model))
    except Exception as error:
        why = f"failed {when} training ({dissect(error)[-1]})"
        todo = "run again with evaluate empty to go on without them, or with other tasks"
        raise UserError(f"The benchmarks {s.evaluate!r} {why}: {todo}.") from None
    finally:
        model.train(training)
        random.setstate(drawn)
    kept[name] = {"of": of, "lm_eval": version("lm_eval"), "scores": _scores(found)}
    marker.write_atomically(path, json.dumps(kept, indent=1).encode())
    for row in results(kept, when)["benchmarks"]:
        run.show(f"{row['task']} {row['metric']} {when} training: {card.spread(row, when)}")


def _evaluate(run, lm) -> dict:
    how = dict(tasks=_tasks(run.settings), apply_chat_template=bool(run.tokenizer.chat_template))
    simple_evaluate, HFLM, how["task_manager"] = _harness(how["tasks"])
    mixed = run.dtype if run.method == "full" and run.dtype != torch.float32 else None
    own = dict(tokenizer=copy.deepcopy(run.tokenizer), mixed_precision_dtype=mixed)  # it sets a pad token
    wrapped = HFLM(pretrained=lm, batch_size="auto" if lm.device.type == "cuda" else 8, **own)
    return simple_evaluate(wrapped, log_samples=False, **how)


def _scores(found: dict) -> list[list]:
    """List task, metric, questions, score and standard error, of groups without their parts."""
    rows, parts = [], set(chain(*found.get("group_subtasks", {}).values()))
    for task, scores in found["results"].items():
        numbers = {n: v for n, v in scores.items() if isinstance(v, int | float) and math.isfinite(v)}
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in numbers.items() if task not in parts else ():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr"):
                label = metric if kind == "none" else f"{metric} ({kind})"
                rows.append([task, label, count, value, numbers.get(f"{metric}_stderr,{kind}")])
    return rows


def results(kept: dict, *when: str) -> dict[str, list[dict]]:
    """Say what the benchmarks came to, for summary.json; {} where the last of them was not taken: of each
    metric {task, metric, questions, before, after, change, each with …_stderr, and more_than_noise}, which is
    beyond 1.96 standard errors, as if the two sets of questions were not the same."""
    rows, when = {}, when or ("before", "after")
    for time in when:
        for task, metric, count, *score in kept.get(f"benchmarks_{time}", {}).get("scores", ()):
            row = rows.setdefault((task, metric), {"task": task, "metric": metric, "questions": count})
            row |= zip((time, f"{time}_stderr"), score, strict=True)
    for row in rows.values():
        if {"before", "after"} <= row.keys():
            errors = row["before_stderr"], row["after_stderr"]
            error = None if None in errors else math.hypot(*errors)
            row |= {"change": row["after"] - row["before"], "change_stderr": error}
            row["more_than_noise"] = error is not None and abs(row["change"]) > 1.96 * error
    found = [row for row in rows.values() if when[-1] in row]
    return {"benchmarks": found} if found else {}
