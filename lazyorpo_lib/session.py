"""What happens around an optimizer step: stopping, progress, the check that gradients are finite.

Callbacks of transformers' Trainer; they compute no loss and write no files but the removal of STOP.
"""

import contextlib
import math
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .folder import remove
from .machine import memory_gib

BAD_STEPS_ALLOWED = 3


class StepWindow:
    """Sums since the last logged row, over all processes; the work is this process's."""

    def __init__(self):
        self.totals, self.work, self.start = [], Counter(), time.monotonic()

    def add(self, totals: list[float]) -> None:
        self.totals = [a + b for a, b in zip(self.totals, totals, strict=True)] if self.totals else totals

    def take(self) -> tuple[list[float], Counter, float]:
        """The sums, the tokens and forward passes of the model behind them (DPO's reference included), the seconds."""
        now = time.monotonic()
        out = self.totals, self.work, max(now - self.start, 1e-9)
        self.totals, self.work, self.start = [], Counter(), now
        return out


class StepGuard(TrainerCallback):
    """Before each optimizer step: are the loss and the gradient, which the trainer has read, finite?"""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trainer._window = StepWindow()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer = self.trainer
        finite = math.isfinite(trainer.step_loss)
        if finite and math.isfinite(trainer.grad_norm):
            trainer._bad_in_a_row = 0
            return
        scaler = trainer.accelerator.scaler
        if finite and scaler is not None and scaler.get_scale() > 1:
            return  # fp16: the scaler skips the step and tries a smaller scale; that is its ordinary work
        step, rows = state.global_step + 1, gather_object(trainer._rows_of_step)
        state.log_history.append({"step": step, "bad_rows": rows})  # it goes into the checkpoints
        what = "gradient" if finite else "loss"
        warnings.warn(f"step {step}: the {what} is not finite; skipped. Dataset rows: {rows}", stacklevel=2)
        model.zero_grad(set_to_none=True)  # an optimizer step without gradients changes nothing
        trainer._bad_in_a_row += 1
        if trainer._bad_in_a_row >= BAD_STEPS_ALLOWED:
            trainer.stop_reason = (
                f"{BAD_STEPS_ALLOWED} steps in a row had a loss or gradient that is not finite (last: step {step}, "
                f"dataset rows {rows}); try a lower learning_rate or precision=float32"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.stop_reason:
            control.should_training_stop = control.should_save = True


class SaveByTheClock(TrainerCallback):
    """Asks for a checkpoint at the end of a step when `minutes` have passed since the last one was written, or since
    the beginning: a run that is shorter writes none. 0: never. Of several processes the first one's clock counts."""

    def __init__(self, minutes: float):
        self.minutes = minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic()

    on_save = on_train_begin

    def on_step_end(self, args, state, control, **kwargs):
        if not self.minutes or state.global_step >= state.max_steps:  # at the end the model itself is saved
            return
        due = time.monotonic() - self.last >= 60 * self.minutes
        if args.world_size > 1:
            told = torch.tensor([due], dtype=torch.int32, device=args.device)
            torch.distributed.broadcast(told, src=0)
            due = bool(told.item())
        control.should_save |= due


class Stopped(Exception):
    """Somebody asked to stop while there was no step to finish."""


class Stop(TrainerCallback):
    """Ends training at the end of a step, with a checkpoint, when asked to: by an interrupt (the first one; a second one
    acts at once), SIGTERM, a file named STOP in the run's folder, or `max_minutes`. Of several processes all end at one step.

    Attributes:
        reason: why training was stopped; empty while it was not. asked: whether somebody asked, and not the clock.
        hurried: whether the machine is being taken away (SIGTERM), and a kill follows soon.
    """

    def __init__(self, file: Path, max_minutes: float = 0.0):
        self.file, self.max_minutes = file, max_minutes
        self.reason, self.asked, self.hurried, self._signalled = "", False, False, False

    @contextlib.contextmanager
    def listening(self):
        """Take the signals over for the time of training; only a main thread can."""
        self.reason, self.asked, self.hurried, self._signalled = "", False, False, False
        self._began = time.monotonic()
        remove(self.file)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, self._signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _signal(self, number, frame):
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        self.reason, self.asked = f"interrupted ({signal.Signals(number).name})", True
        self.hurried = self.hurried or number == signal.SIGTERM

    def look(self) -> bool:
        """Whether somebody has asked to stop."""
        if self.file.exists():
            self.reason, self.asked = f"the file {self.file.name} was found", True
            remove(self.file)
        return self.asked

    def on_step_end(self, args, state, control, **kwargs):
        looked = state.is_world_process_zero and self.look()
        if not looked and self.max_minutes and time.monotonic() - self._began > 60 * self.max_minutes:
            self.reason = self.reason or f"max_minutes={self.max_minutes:g} are over"
        stop = bool(self.reason)
        if (
            args.world_size > 1
        ):  # only what all know counts: a signal that comes while they agree waits for the next step
            told = torch.tensor([stop, self.asked, self.hurried], dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            stop, asked, hurried = map(bool, told.tolist())
            self.asked, self.hurried = self.asked or asked, self.hurried or hurried
            self.reason = self.reason or "another process was asked to stop" * stop
        if stop and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True


def in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


def progress_bar(total: int | None, unit: str, **options) -> tqdm:
    """A bar in a notebook or on a terminal; none where the output goes to a file."""
    return tqdm(
        total=total,
        unit=" " + unit,
        disable=False if in_notebook() else None,
        mininterval=0.5,
        leave=False,
        **options,
    )


class On(TrainerCallback):
    """Calls `act(step)` at the Trainer's events by name: step_end=…; save=…, when a checkpoint is complete; train_begin=…,
    when the model is in its place on every process."""

    def __init__(self, **acts: Callable[[int], None]):
        for event, act in acts.items():
            setattr(
                self, f"on_{event}", lambda args, state, control, act=act, **kwargs: act(state.global_step)
            )


class Progress(TrainerCallback):
    """One bar for training: steps, pairs, time left, memory."""

    def __init__(self, pairs_per_step: int):
        self.pairs_per_step, self.bar = pairs_per_step, None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = progress_bar(state.max_steps, "steps", initial=state.global_step, desc="training")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            if state.global_step % 10 == 1 or state.global_step == state.max_steps:
                pairs = state.global_step * self.pairs_per_step
                self.bar.set_postfix_str(f"{pairs:,} pairs, {memory_gib(args.device):.1f} GiB", refresh=False)
            self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def duration(minutes: float) -> str:
    """In words, e.g. 40 s, 14 min, 2.5 h."""
    if minutes < 1:
        return f"{max(1, round(60 * minutes))} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
