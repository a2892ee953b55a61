"""Devices, precision and processes, as accelerate has them; what is refused of its config.

It starts no process: `accelerate launch` does, with one of the files in configs/.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin, gather_object
from huggingface_hub import get_token

from .. import marker
from ..errors import UserError
from ..folder import read_json
from ..settings import Settings


def check_tracker(tracker: str) -> None:
    """Raise UserError where the tracker of `report_to` is not installed."""
    if tracker != "none" and not getattr(find_spec(tracker), "loader", None):  # a mere folder has none
        way_out = f"pip install {tracker}, or set report_to=none"
        raise UserError(f"report_to is {tracker}, which is not installed: {way_out}.")


def tracked(settings: Settings, folder: Path) -> dict:
    """Give what the tracker of `report_to` begins with: project, the run's name and Space; the settings, with
    the name and the digest of the pairs of the run in `folder`. UserError: no project can be called so; the
    Space is of another tracker, or there is no token for it."""
    s = settings
    project = s.tracker_project or os.environ.get("WANDB_PROJECT") or "lazyorpo"
    if not re.fullmatch(r"[\w.-][\w. -]{0,99}", project) or not project.strip("."):
        raise UserError(f"tracker_project is {project!r}: give up to 100 letters, digits, spaces, . _ or -.")
    named = {"name": s.tracker_run} if s.tracker_run and s.report_to in ("wandb", "trackio") else {}
    if s.trackio_space:
        why = "" if get_token() else "needs a token that may write there: set HF_TOKEN"
        if s.report_to != "trackio":
            why = f"is for trackio alone, and report_to is {s.report_to}: set report_to=trackio"
        elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", s.trackio_space, re.ASCII):
            why = "is no name of a Space: give it as owner/name"
        if why:
            raise UserError(f"trackio_space is {s.trackio_space!r}, which {why}, or leave it empty.")
        named["space_id"] = s.trackio_space
    digest = read_json(folder / "data_report.json").get("digest", "")
    own = dict(run=s.tracker_run or folder.name, data_digest=digest)
    return dict(project_name=project, config=vars(s) | own, init_kwargs={s.report_to: named})


def make_accelerator(settings: Settings, *, dtype: torch.dtype, device: str, folder: Path) -> Accelerator:
    """Make the Accelerator of a run, whatever an earlier one of this process was told.

    Args:
        dtype: of the computation. device: cuda, mps or cpu. folder: of the run, for the trackers' files.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        way_out = "take configs/fsdp2.yaml, which spreads the same over the GPUs"
        raise UserError(f"The kit does not train with DeepSpeed, as the accelerate config asks: {way_out}.")
    check_tracker(tracker := settings.report_to)
    tracked(settings, Path(folder))  # what is wrong with it is told before anything is loaded
    AcceleratorState._reset_state(True)
    GradientState._reset_state()  # another library's trainer may have left it waiting for more gradients
    # Rotary tables are the same everywhere, and ranks score unequal numbers of batches for DPO's reference;
    # towers for pixels, and experts that no token took, have no gradient.
    replicas = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    return Accelerator(
        mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no"),
        cpu=device == "cpu",
        log_with=None if tracker == "none" else tracker,
        project_dir=str(Path(folder) / "tensorboard"),
        # Else accelerate launch's own number would divide every gradient.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[replicas],
    )


def check_sharding(accelerator: Accelerator, model, settings: Settings) -> bool:
    """Tell whether FSDP shares out the weights, and have it keep log-probabilities and gradient sums in 32
    bit; UserError for what it would train wrongly."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return False
    why = ""
    if plugin.fsdp_version != 2:
        why = "its first version is not supported: set fsdp_version: 2, as in configs/fsdp2.yaml"
    elif plugin.cpu_ram_efficient_loading:
        why = "every process must see the weights: set fsdp_cpu_ram_efficient_loading: false"
    elif settings.objective == "dpo" or getattr(model, "is_loaded_in_4bit", False):
        why = (
            "it trains no 4-bit weights and no objective=dpo: choose method=lora or full, or configs/ddp.yaml"
        )
    if why:
        raise UserError(f"The accelerate config asks for FSDP, and {why}.")
    if policy := plugin.mixed_precision_policy:  # accelerate's would round both to 16 bit
        own = dict(reduce_dtype=torch.float32, output_dtype=None)
        plugin.mixed_precision_policy = dataclasses.replace(policy, **own)
    return True


def by_first(make: Callable[[], object], shared: Path, *, several: bool):
    """Give what the first of several processes makes, to all of them; its UserError too, which all raise.

    Args:
        shared: a file in the run's folder through which they may share it; gone once all have what was made.
    """
    PartialState().wait_for_everyone()  # until the first one has written the file that all must see
    if not all(gather_object([(shared.parent / "settings.json").is_file()])):
        here = f"{shared.parent} is not on every machine the folder that the first process writes"
        raise UserError(f"{here}: give an output_dir that all of them see.")
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        made = [_tried(make) if first or not several else None]
        if several:  # what takes longer than a group waits for by itself, and does not belong on a GPU
            group = torch.distributed.new_group(timeout=timedelta(days=1), backend="gloo")
            torch.distributed.broadcast_object_list(made, group=group)
            torch.distributed.barrier(group)  # the file goes when all have opened it
    finally:
        if first:
            marker.remove(shared)  # or what a kill left behind
    if isinstance(made[0], UserError):
        raise made[0]
    return made[0]


def _tried(make: Callable[[], object]):
    try:
        return make()
    except UserError as error:
        return error


def over_ranks(accelerator: Accelerator, count: int, how=sum) -> int:
    """Give the sum, or `how=max`, of a number over all processes."""
    if accelerator.num_processes == 1:
        return count
    return how(accelerator.gather(torch.tensor([count], device=accelerator.device)).tolist())
