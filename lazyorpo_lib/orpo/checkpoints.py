"""The checkpoints in the folder of a run: complete or absent; where to go on.

One that a kill, a full or a failing disk has torn is never gone on from, and nothing that is loaded may hold
code. The state of training is in the trainer's hands.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import marker
from ..errors import UserError, explain_disk
from ..folder import read_rows, truncate_after

PROGRESS = "progress.json"
_load = partial(torch.load, map_location="cpu", weights_only=True)


def numbered(folder: Path) -> list[Path]:
    """List the checkpoints of a run by their names, oldest first, torn ones too."""
    found = [c for c in Path(folder).glob("checkpoint-*") if c.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Give the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def complete(folder: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    return [c for c in numbered(folder) if marker.is_whole(c, "checkpoint")]


def newest(folder: Path, *, sharded: bool, show: Callable[[str], None]) -> Path | None:
    """Give the checkpoint to go on from; one that a failing disk has changed is told, and passed over."""
    for checkpoint in reversed(complete(folder)):
        if bad := marker.damaged(checkpoint):
            show(f"{checkpoint} is damaged ({', '.join(bad)}): passed over.")
        elif any(checkpoint.glob("pytorch_model_fsdp*")) != sharded:
            way_out = "go on with the accelerate config that the run began with, or choose another output_dir"
            raise UserError(f"{checkpoint} was written {'without' if sharded else 'with'} FSDP: {way_out}.")
        else:
            return checkpoint
    return None


def go_on(folder: Path, *, sharded: bool, main: bool, show: Callable[[str], None]) -> Path | None:
    """Give the checkpoint to go on from; what an earlier process left behind it is taken away, and told."""
    last = -1
    if found := newest(folder, sharded=sharded, show=show):
        last = step_of(found)
        show(f"Going on from step {last}.")
    elif read_rows(folder / "history.jsonl"):
        show("No checkpoint is there to go on from: the run begins anew.")
    if main:
        for checkpoint in numbered(folder):
            if step_of(checkpoint) > last:  # it is damaged, and newer than what may be kept
                marker.remove(checkpoint)
        for name in ("history.jsonl", "watched.jsonl"):
            truncate_after(folder / name, last)
        marker.remove(folder / ".saving")
    return found


def save(trainer, progress: dict, optimizer) -> None:
    """Write `checkpoint-<step>` with a trainer's trained weights, complete or not at all; old ones go.

    Args:
        progress: plain numbers and texts that training goes on with. optimizer: None: it is of no more use.
    """
    home, accelerator, model = trainer.folder, trainer.accelerator, trainer.wrapped
    scratch, target = home / ".saving", home / f"checkpoint-{trainer.step}"
    main, rank = accelerator.is_main_process, accelerator.process_index
    try:
        with explain_disk(home):
            if main:
                marker.take(home, "run", f"{scratch.name}/", f"{target.name}/")
                scratch.mkdir(exist_ok=True)
            accelerator.wait_for_everyone()
            torch.save(_draws(accelerator.device), scratch / f"random_{rank}.pt")
            if plugin := getattr(accelerator.state, "fsdp_plugin", None):
                save_fsdp_model(plugin, accelerator, model, scratch, adapter_only=True)
                if optimizer:
                    save_fsdp_optimizer(plugin, accelerator, optimizer, model, scratch)
            elif main:
                weights = {name: p.detach().contiguous() for name, p in _trained(accelerator, model)}
                save_file(weights, scratch / "weights.safetensors")
                if optimizer:
                    torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
            if main:
                scaler = accelerator.scaler and accelerator.scaler.state_dict()
                text = json.dumps(progress | {"scaler": scaler}, indent=1)
                (scratch / PROGRESS).write_text(text, encoding="utf-8")
            accelerator.wait_for_everyone()
            if main:
                marker.settle(home)  # the history reaches as far as the checkpoint does
                marker.remove(target)
                marker.put(scratch, target, "checkpoint")
                remove(home, keep=trainer.settings.keep_checkpoints, best=trainer.best.step)
    finally:
        if main:
            marker.remove(scratch)
    accelerator.wait_for_everyone()


def load(checkpoint: Path, trainer, optimizer) -> dict:
    """Read a checkpoint back into a trainer: weights, `optimizer` (or None), random numbers, scale; gives its
    `progress`. Raises UserError where it is damaged, or of an earlier version."""
    accelerator, model = trainer.accelerator, trainer.wrapped
    if not (checkpoint / PROGRESS).is_file():
        why = "was written by an earlier version of the kit, from which this one cannot go on"
        way_out = "choose another output_dir, or finish the run with that version"
        raise UserError(f"{checkpoint} {why}: {way_out}.")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    draws, kept = checkpoint / f"random_{accelerator.process_index}.pt", checkpoint / "optimizer.pt"
    try:  # all is read before anything is changed
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        states = _load(draws) if draws.is_file() else None  # a run may go on with more processes
        if not plugin:
            weights = load_file(checkpoint / "weights.safetensors")
            state = _load(kept) if optimizer and kept.is_file() else None
            pairs = [(parameter, weights[name]) for name, parameter in _trained(accelerator, model)]
    except (UnpicklingError, SafetensorError, EOFError, KeyError, ValueError, RuntimeError, OSError):
        way_out = "delete that folder, and the run goes on from the checkpoint before it"
        raise UserError(f"{checkpoint} is damaged, or holds code, which is never run: {way_out}.") from None
    if plugin:
        load_fsdp_model(plugin, accelerator, model, checkpoint, adapter_only=True)
        if optimizer and any(checkpoint.glob("optimizer*")):
            load_fsdp_optimizer(plugin, accelerator, optimizer, model, checkpoint, adapter_only=True)
    else:
        for parameter, saved in pairs:
            parameter.data.copy_(saved)
        if state:
            optimizer.load_state_dict(state)
    if accelerator.scaler and progress["scaler"]:
        accelerator.scaler.load_state_dict(progress["scaler"])
    if states:
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        if accelerator.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], accelerator.device)
    return progress


def _trained(accelerator, model):
    found = accelerator.unwrap_model(model, keep_fp32_wrapper=True).named_parameters()
    return ((name, parameter) for name, parameter in found if parameter.requires_grad)


def _draws(device: torch.device) -> dict:
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def remove(folder: Path, *, keep: int = 0, best: int | None = None) -> None:
    """Remove all but the last `keep` complete checkpoints and that of the step `best`, torn ones too."""
    kept = complete(folder)[-keep:] if keep else []
    for checkpoint in numbered(folder):
        if checkpoint not in kept and step_of(checkpoint) != best:
            marker.remove(checkpoint)
