"""What several runs share: a process and a folder for each, a table and a picture of what they left.

In a process of its own a run has its own peak of memory. A finished one is not run again. Who starts
them waits.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import run
from ..errors import UserError, explain_disk, without_secrets
from ..folder import folder_of, is_begun, is_finished, read_json
from ..marker import take, write_atomically
from ..results import card, live, share
from ..session import Stopped
from ..settings import Settings


def prepare_home(settings: Settings, name: str) -> Path:
    """Make the folder `name` in the run's that the settings name, for several runs and what comes of them."""
    home = take(folder_of(settings), "run", f"{name}/") / name
    return take(home, "set of runs", *(f"{name}.{ending}" for ending in ("json", "md", "png")))


def _pinned(settings: Settings) -> Settings:
    """Take the number format in which the first of the runs beside this one was carried out, where `auto` may
    choose another one on another machine; a run that has begun keeps its own."""
    folder = Path(settings.output_dir)
    if begun := read_json(folder / "settings.json").get("settings"):
        return dataclasses.replace(settings, precision=begun["precision"])
    chosen = (read_json(file).get("chosen", {}) for file in sorted(folder.parent.glob("*/settings.json")))
    first = (found["precision"] for found in chosen if "precision" in found)
    return dataclasses.replace(settings, precision=next(first, "auto"))


def run_apart(settings: Settings, show: Callable[[str], None], merge: str | None = None) -> None:
    """Carry out a run in a process of its own; what it says goes to log.txt in its folder. `merge`: folder of
    a finished run whose merged model is this one's base."""
    folder, settings = Path(settings.output_dir), dataclasses.replace(settings, on_finish="nothing")
    settings = _pinned(settings) if settings.precision == "auto" else settings
    if is_finished(folder) and is_begun(folder, settings):  # UserError: another run
        return
    show(f"{folder.name}: at work; see live.png and log.txt in {folder}")
    take(folder, "run", "log.txt", "STOP")
    # A fork server imports torch and transformers once for all runs. Windows has none; no fork survives CUDA,
    # which peft's bitsandbytes initialises.
    forks = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload([run.__name__, "peft", "datasets"])
    process = context.Process(target=_in_process, args=(settings, merge), daemon=True)
    process.start()  # a daemon is asked to end where an interrupt comes in here
    kind = UserError
    try:
        process.join()
    except KeyboardInterrupt:
        kind = Stopped
        if os.name == "nt":  # which kills what it is asked to end
            (folder / "STOP").touch()
        else:
            process.terminate()  # it ends its step and saves
        process.join()
    if not is_finished(folder):
        log = folder / "log.txt"
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] if log.is_file() else []
        told = f"The run in {folder} is not finished ({' '.join(last)})"
        raise kind(f"{told}: mend that and run this again, it goes on from there.")


def _in_process(settings: Settings, merge: str | None) -> None:
    path = Path(settings.output_dir) / "log.txt"
    with open(path, "a", buffering=1, encoding="utf-8", errors="replace") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                if merge and not Path(settings.base_model).is_dir():
                    share.merge(merge, settings.base_model)
                run.execute(settings, dict.fromkeys(dataclasses.asdict(settings), "trial"))
            except (UserError, KeyboardInterrupt) as why:
                print(why)
            except Exception:
                print(without_secrets(traceback.format_exc()))


def write_up(home: Path, key: str, runs: list[dict], words: dict[str, str], rest: dict) -> Path:
    """Write what came out into `home`, as JSON, Markdown and a picture of its name; returns `home`.

    Args:
        key: name of what tells the kinds of run apart; runs of one kind share a line of the table.
        runs: {key: kind, figure: value} of each run.
        words: {figure: its heading}, of the figures to show.
        rest: what the JSON holds beside the runs, among it "said": sentences under the table.
    """
    figures, values = {name: heading for name, heading in words.items() if name in runs[0]}, {}
    for one in runs:
        seen = values.setdefault(one[key], {heading: [] for heading in figures.values()})
        for name, heading in figures.items():
            seen[heading].append(one[name])
    rows = [[kind, *map(_range, seen.values())] for kind, seen in values.items()]
    text = "\n\n".join([card.table([key, *figures.values()], rows), *rest["said"]]) + "\n"
    with explain_disk(home, "run this again"):
        write_atomically(home / f"{home.name}.json", json.dumps({"runs": runs} | rest, indent=1).encode())
        write_atomically(home / f"{home.name}.md", text.encode())
        live.draw_trials(values, home / f"{home.name}.png")
    return home


def _range(values: Sequence[float]) -> str:
    """Write the mean, and from lowest to highest."""
    form = ",.0f" if isinstance(values[0], int) else ".3f"
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"
