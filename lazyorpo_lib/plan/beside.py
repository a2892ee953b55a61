"""A plan made by a process beside the notebook's, which goes on meanwhile.

No thread could: torch and transformers make a model of shapes by changing what belongs to the whole process
(the default dtype, how weights begin), and a model loaded meanwhile would be wrong. The process keeps what it
has simulated; it ends with the notebook, or after IDLE seconds without a question.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from ..machine import Machine, this_machine
from ..settings import Settings

IDLE = 120.0
# Whatever a library prints, from its first line and from C too, is no answer: it goes where errors go.
_BEGIN = """
import os, sys
sys.path.insert(0, sys.argv[1])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from lazyorpo_lib.plan import beside
beside.serve(answers)
"""


class Beside:
    """A planner to call with settings, from any thread: gives what `Plan.said` tells of them on this machine.

    Raises UserError with what the planner has to say instead.
    """

    def __init__(self):
        self.process, self._lock = None, threading.Lock()

    def __call__(self, settings: Settings) -> str:
        hub = {name: value for name, value in os.environ.items() if name.startswith("HF_")}  # a token's too
        asked = dict(settings=asdict(settings), machine=asdict(this_machine()), folder=os.getcwd(), hub=hub)
        with self._lock:
            answer = self._answer(json.dumps(asked)) or self._answer(json.dumps(asked))
        said, refused = json.loads(answer or '["", "the process that plans has ended: use --plan."]')
        if refused:
            raise UserError(refused)
        return said

    def _answer(self, asked: str) -> str:
        """Ask the process, one that is begun where there is none; nothing if it ended instead."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN, str(Path(__file__).parents[2])], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt of the notebook is not meant for it
            )  # fmt: skip
        with contextlib.suppress(OSError):
            print(asked, file=self.process.stdin, flush=True)
            if (answer := self.process.stdout.readline()).endswith("\n"):
                return answer
        self.process.kill()
        self.process.wait()
        return ""


beside = Beside()


def serve(answers) -> None:
    """Answer the questions on stdin, one a line, with [what the plan says, or why there is none]."""
    from . import planner

    while True:
        bored = threading.Timer(IDLE, os._exit, (0,))
        bored.daemon = True
        bored.start()
        line = sys.stdin.readline()
        bored.cancel()
        if not line:
            os._exit(0)  # what libraries do at an end takes long, or fails
        asked = json.loads(line)
        machine = Machine(**asked["machine"] | {"capability": tuple(asked["machine"]["capability"])})
        try:
            for name in [name for name in os.environ if name.startswith("HF_")]:
                del os.environ[name]
            os.environ |= asked["hub"]
            os.chdir(asked["folder"])
            said = planner.estimate(Settings(**asked["settings"]), machine, brief=True).said(), ""
        except Exception as error:  # the panel shows it in the place of a plan
            said = "", str(error) or type(error).__name__
        print(json.dumps(said), file=answers, flush=True)
