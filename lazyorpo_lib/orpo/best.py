"""Which step is kept: the last one, or the one with the lowest loss on the held-out pairs.

It says when these are evaluated, and when training ends for want of a better step. The trainer computes the
losses and writes the checkpoints, in which all that is known of the best stands.
"""

import math
import warnings

from accelerate.utils import broadcast_object_list

from .. import marker
from ..errors import UserError
from ..settings import Settings
from . import checkpoints

LOOKS, ENOUGH = 10, 100  # evaluations of a run and pairs in each, where eval_every_steps leaves it open


class Best:
    """The best of `planned` steps so far, by `held_out` pairs; UserError where it needs some and has none.

    Attributes:
        every: steps between evaluations, 0: none. stride: of so many held-out pairs one is evaluated.
        found: `seen`, the last step evaluated; with keep=best `step` and `loss` of the best, and `waited`,
            evaluations since. step: the best; None while there is none. steps: that are taken in all.
    """

    def __init__(self, settings: Settings, planned: int, held_out: int):
        self.wanted, self.patience, self.planned = settings.keep == "best", settings.patience, planned
        if self.wanted and not held_out:
            raise UserError("keep is best, but so few pairs leave none to decide by: add some, or keep=last.")
        self.every, self.stride, self.found = settings.eval_every_steps * bool(held_out), 1, {}
        if self.wanted and not self.every:
            self.every, self.stride = math.ceil(planned / LOOKS), math.ceil(held_out / ENOUGH)

    step = property(lambda self: self.found.get("step"))
    steps = property(lambda self: self.found["seen"] if self.early() else self.planned)

    def is_due(self, step: int) -> bool:
        """Tell whether an evaluation belongs to this step, and was not made or was broken off."""
        ends = self.wanted and step == self.steps
        return 0 < step != self.found.get("seen") and self.every > 0 and (step % self.every == 0 or ends)

    def take_in(self, step: int, loss: float) -> None:
        """Take in the held-out loss of a step at which one was due."""
        new = {"waited": self.found.get("waited", 0) + 1}
        if loss < self.found.get("loss", math.inf):
            new = {"step": step, "loss": loss, "waited": 0}
        self.found = self.found | {"seen": step} | (new if self.wanted else {})

    def early(self) -> str:
        """Say why training ends before what was planned; empty where it does not."""
        over = 0 < self.patience <= self.found.get("waited", 0)
        return f"patience was over: {self.patience} evaluations without a better step" if over else ""

    def told(self) -> dict:
        """Say which step is kept and why, for summary.json; nothing where it is the last one anyway."""
        if self.step is None:
            return {}
        why = f"its held-out loss, {self.found['loss']:.4g}, is the lowest of those evaluated"
        return {"kept_step": self.step, "kept": f"step {self.step:,} of {self.steps:,}: {why}"}


def take_best(trainer) -> None:
    """Put the weights of the best step in the place of the last one's, when training has ended; where their
    checkpoint is lost, that is told, and the last ones stay."""
    best, ended = trainer.best, trainer.step >= trainer.steps and not trainer.stop.hurried
    if best.wanted and ended and best.is_due(trainer.step):
        trainer.evaluate()  # which an interrupt broke off
    place = trainer.folder / f"checkpoint-{best.step}"
    if best.step in (None, trainer.step):
        return
    # Of several processes all do what the first one finds right.
    if broadcast_object_list([marker.is_whole(place, "checkpoint") and not marker.damaged(place)])[0]:
        checkpoints.load(place, trainer, optimizer=None)
    else:
        warnings.warn(f"{place}, the best, is damaged or gone: the last step is kept", stacklevel=2)
        best.found = {"seen": best.found["seen"]}
