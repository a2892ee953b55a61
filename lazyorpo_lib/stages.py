"""What a run may do next: its stages in any order, once or again.

A stage that needs what is not there yet names the stage that makes it; one that is carried out again takes
away what it and those after it had made. In each a full disk is one sentence, and a signal an end. It does
not know what the stages do.
"""

import functools

from .errors import UserError, explain_disk
from .session import Stopped


class NotYet(UserError, AttributeError):
    """What is asked for is made by a stage that has not been carried out."""


class Staged:
    """Has stages, methods with `stage` around them, a `folder` and a `stop`.

    Attributes:
        MAKES: {stage: names of the attributes that it makes}, in the order in which they are carried out.
        begin_stage: a method, which comes before every stage.
    """

    MAKES: dict[str, tuple[str, ...]] = {}

    def __getattr__(self, name: str):
        for maker, made in self.MAKES.items():
            if name in made:
                raise NotYet(f"run.{maker}() comes first: run the cell that calls it, then this one again.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def stage(method):
    """Make a method a stage."""
    name = method.__name__

    @functools.wraps(method)
    def carried_out(self):
        with explain_disk(self.folder), self.stop.listening():
            self.begin_stage()
            for later in list(self.MAKES)[list(self.MAKES).index(name) :]:
                for made in self.MAKES[later]:
                    vars(self).pop(made, None)
            result = method(self)
            lost = self.stop.asked and name != "train"  # by Python, which raises nothing in a finalizer
            if lost and not self.stop.several:
                raise Stopped(self.stop.reason)
        return result

    return carried_out
