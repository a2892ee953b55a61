"""The person at the other end: a stop that is asked for, progress, times in words.

It ends no process, computes nothing, and writes no file; it removes STOP. Standard library alone at import.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


class Stopped(KeyboardInterrupt):
    """Somebody asked to stop while there was no step to finish."""

    def _render_traceback_(self):  # what a notebook shows in place of a traceback
        return [f"LazyORPO: {self}. Run the cell again to go on."]


class Stop:
    """Whether training is to end after the present step: because of an interrupt (the first one; a second one
    acts at once), SIGTERM, a terminal that closes, a file named STOP in the run's folder, or `max_minutes`.

    Attributes:
        reason: why; empty while there is none. asked: whether somebody asked, and not the clock.
        hurried: whether the machine is being taken away (SIGTERM, SIGHUP), and a kill follows soon.
        patient: whether a signal waits for somebody who asks `is_due`; else it ends what is under way.
        several: whether other processes go on with this one, so that none may end alone.
    """

    def __init__(self, file: Path | None = None, max_minutes: float = 0.0, several: bool = False):
        self.file, self.max_minutes, self.several, self.patient = file, max_minutes, several, several
        self._forget()

    def _forget(self) -> None:
        self.reason, self.asked, self.hurried, self._signalled = "", False, False, False
        self._began = time.monotonic()

    @contextlib.contextmanager
    def listening(self):
        """Take the signals over, which only a main thread can; what was asked before is forgotten.

        Raises:
            Stopped: a signal came while nobody was patient.
        """
        self._forget()
        old = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                nohup = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
                if number and not nohup:
                    old[number] = signal.signal(number, self._signal)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self):
        """Have a signal wait for `is_due`, which is asked after every step."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before

    def try_to(self, work: Callable[[], object]) -> None:
        """Do something beside the steps that a signal may break off; not at all after one."""
        if self.several or not self.asked:
            before, self.patient = self.patient, self.several
            try:
                work()
            except Stopped:  # which training sees after this step
                pass
            finally:
                self.patient = before

    def _signal(self, number, frame):
        again, self._signalled = self._signalled and number == signal.SIGINT, True
        self.reason, self.asked = f"interrupted ({signal.Signals(number).name})", True
        self.hurried = self.hurried or number != signal.SIGINT
        if again:
            raise KeyboardInterrupt
        if not self.patient:
            raise Stopped(self.reason)

    def was_asked(self) -> bool:
        """Tell whether somebody has asked to stop; a file that asks is taken away."""
        if self.file and self.file.exists():
            from .marker import remove

            self.reason, self.asked = f"the file {self.file.name} was found", True
            remove(self.file)
        return self.asked

    def is_due(self, *, look: bool) -> bool:
        """Tell whether to end now. `look`: for the file too, which one process of several does."""
        over = self.max_minutes and time.monotonic() - self._began > 60 * self.max_minutes
        if not (look and self.was_asked()) and over:
            self.reason = self.reason or f"max_minutes={self.max_minutes:g} are over"
        return bool(self.reason)

    def agree(self, due: bool, asked: bool, hurried: bool) -> None:
        """Take over what any of several processes has seen."""
        self.asked, self.hurried = self.asked or asked, self.hurried or hurried
        self.reason = self.reason or "another process was asked to stop" * due


def in_notebook() -> bool:
    """Tell whether a notebook's kernel runs this."""
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


def progress_bar(total: int | None, unit: str, **options):
    """Make a bar in a notebook or on a terminal; none where the output goes to a file."""
    from tqdm.auto import tqdm

    # Of several processes the first one shows; tqdm asks for a terminal where it is told None.
    hidden = os.environ.get("RANK", "0") != "0" or (False if in_notebook() else None)
    return tqdm(total=total, unit=" " + unit, disable=hidden, mininterval=0.5, leave=False, **options)


def duration(minutes: float) -> str:
    """Say a time in words: 40 s, 14 min, 2.5 h."""
    if minutes < 1:
        return f"{max(1, round(60 * minutes))} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
