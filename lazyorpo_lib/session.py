"""The person at the other end: a stop that is asked for, progress, times in words.

It ends no process but a pod that is to be stopped, computes nothing, and writes no file; it removes STOP.
Standard library alone at import.
"""

import contextlib
import os
import shutil
import signal
import subprocess
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
    acts at once), SIGTERM, a terminal that closes, a file named STOP in the run's folder, `max_minutes`, or
    `max_cost` at the `price` of an hour.

    Attributes:
        reason: why; empty while there is none. asked: whether somebody asked, and not the clock.
        hurried: whether the machine is being taken away (SIGTERM, SIGHUP), and a kill follows soon.
        patient: whether a signal waits for somebody who asks `is_due`; else it ends what is under way.
        several: whether other processes go on with this one, so that none may end alone.
    """

    def __init__(self, file: Path | None = None, max_minutes=0.0, several=False, *, max_cost=0.0, price=0.0):
        self.file, self.several, self.patient = file, several, several
        self.limits = {f"max_minutes={max_minutes:g} are over": max_minutes}
        self.limits[f"max_cost={max_cost:g} is spent"] = 60 * max_cost / (price or 1)
        self._forget()

    def _forget(self) -> None:
        self.reason, self.asked, self.hurried, self._signalled = "", False, False, False
        self._began = time.monotonic()

    @contextlib.contextmanager
    def listening(self):
        """Take the signals over, which only a main thread can; what was asked before is forgotten. Raises
        Stopped where a signal comes while nobody is patient."""
        self._forget()
        is_main = threading.current_thread() is threading.main_thread()
        with contextlib.ExitStack() as stack:
            for name in ("SIGINT", "SIGTERM", "SIGHUP") if is_main else ():
                number = getattr(signal, name, None)
                nohup = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
                if number and not nohup:
                    stack.callback(signal.signal, number, signal.signal(number, self._signal))
            yield

    @contextlib.contextmanager
    def waiting(self, patient: bool = True):
        """Have a signal wait for `is_due`, which is asked after every step; not `patient`: act at once."""
        before, self.patient = self.patient, patient
        try:
            yield
        finally:
            self.patient = before

    def try_to(self, work: Callable[[], object]) -> None:
        """Do something beside the steps that a signal may break off; not at all after one."""
        if self.several or not self.asked:
            with contextlib.suppress(Stopped), self.waiting(self.several):  # training sees it after this step
                work()

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
        minutes = (time.monotonic() - self._began) / 60
        over = [why for why, limit in self.limits.items() if limit and minutes > limit]
        if not (look and self.was_asked()) and over:
            self.reason = self.reason or over[0]
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


def duration(minutes: float, price: float = 0.0) -> str:
    """Say a time in words: 40 s, 14 min, 2.5 h; with the `price` of an hour what it costs: 14 min = 0.10."""
    cost = f" = {minutes / 60 * price:.2f}" if price else ""
    if minutes < 1:
        return f"{max(1, round(60 * minutes))} s{cost}"
    return (f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h") + cost


def pod_stopper() -> tuple[list[str], str]:
    """Give the command that stops this pod of RunPod's, or none and why."""
    pod, tool = os.environ.get("RUNPOD_POD_ID"), shutil.which("runpodctl")
    if pod and tool:
        return [tool, "stop", "pod", pod], ""
    why = "runpodctl is not here" if pod else "this is no pod of RunPod's (RUNPOD_POD_ID is not set)"
    return [], f"on_finish is stop-pod, but {why}: nothing will be stopped, so stop the machine yourself."


def stop_pod(show: Callable[[str], None]) -> None:
    """Stop this pod, where it is one, or say what hinders it; what is on its volume stays."""
    command, why = pod_stopper()
    if command:
        show("The pod is being stopped, as on_finish says.")
        done = subprocess.run(command, capture_output=True, text=True)
        said = (done.stderr or done.stdout).strip()[:200]
        why = f"runpodctl did not stop the pod ({said}): do it yourself." if done.returncode else ""
    if why:
        show(why)
