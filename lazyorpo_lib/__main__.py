"""The command line: every setting is a flag of `run`, the default; a table of the other commands.

Exit status: 0 done, or stopped by max_minutes or max_cost; 2 the user's mistake, one line on stderr; 3 no
gain beyond the noise, where --fail-within-noise asks; 130 interrupted, or stopped by gradients that were not
finite: with a checkpoint, once a step is done.
"""

import argparse
import contextlib
import difflib
import errno
import json
import os
import sys
import traceback
from itertools import count

from . import __version__
from .errors import UserError, without_secrets
from .foreign import settings_of
from .notebook.setup import check_requirements
from .session import Stop
from .settings import FIELDS, coerce, from_environment, resolve


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]}; --help lists every flag.")

    def read(self, arguments: list[str]) -> tuple[dict, dict]:
        """Give what the flags say, and of it what they say of settings, with its types."""
        given = vars(self.parse_args(arguments))
        return given, {name: coerce(name, value) for name, value in given.items() if name in FIELDS}


def train(arguments: list[str]) -> int:
    """Train, plan or probe, as the flags say; the exit status."""
    given, flags = _run_parser().read(arguments)
    check_requirements()
    from_file, note = settings_of(given["settings"], flags)
    first = os.environ.get("RANK", "0") == "0"  # of several processes
    if note and first:
        print(note, file=sys.stderr)  # stdout may be for JSON
    layers = [("env", from_environment()), ("file", from_file), ("flag", flags)]
    early, *_ = resolve(layers)  # mistakes are told before anything heavy is imported
    if given["fail_within_noise"] and not early.eval_pairs:
        raise UserError("--fail-within-noise needs held-out pairs, and eval_pairs is 0: give some, or auto.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from .machine import this_machine
    from .plan import planner

    machine = planner.find_card(given["device"]) if given["device"] not in ("", "all") else this_machine()
    cards = _cards_of(given["cards"], machine, given["device"])
    settings, sources, why = resolve(layers, gpu_gib=machine.gpu_gib)
    if given["plan"] or given["device"] or given["json"] or cards > 1:
        _tell_plans(settings, given, cards)
    elif given["probe"]:
        from .trials.probe import probe

        home = probe(settings)
        print((home / "probe.md").read_text(encoding="utf-8"))
        print(f"The picture it decided from is {home / 'probe.png'}")
    else:
        if first:
            print(why[0].upper() + why[1:] + ".")
        from .run import execute

        done = execute(settings, sources)
        done.show(f"Everything is in {done.folder}")
        if done.interrupted or not given["fail_within_noise"]:
            return 130 if done.interrupted else 0
        found = done.held_out_results()
        more = found.get("accuracy_after", 0) > found.get("accuracy_before", 0)
        return 0 if more and found["verdict"].endswith(": more than noise.") else 3
    return 0


def _tell_plans(settings, given: dict, cards: int) -> None:
    from .plan import planner

    if given["device"] == "all":
        plans = planner.estimates(settings)
        print(json.dumps([plan.as_dict() for plan in plans]) if given["json"] else planner.cards_table(plans))
        return
    ways = (False, True) if cards > 1 else (True,)
    plans = [planner.estimate(settings, given["device"], cards=cards, sharded=way) for way in ways]
    told = [plan.as_dict() for plan in plans]
    lines = ["\n".join([plan.line(), plan.table(), *plan.method.arithmetic]) for plan in plans]
    print(json.dumps(told if cards > 1 else told[0]) if given["json"] else "\n\n".join(lines))


def _cards_of(text: str, machine, device: str) -> int:
    """Read how many cards are to be planned for."""
    cards = int(text) if text.isdecimal() and len(text) < 6 else 0
    why = "" if cards else "must be a whole number from 1 to 99999"
    if cards > 1 and (machine.device != "cuda" or device == "all"):
        why = "needs one kind of GPU to plan for: name it, as in --device H100"
    if why:
        raise UserError(f"--cards is {text!r}, which {why}.")
    return cards


def _run_parser() -> _Parser:
    also = "; ".join(f"{name} {usage} ({what})" for name, (usage, what, _) in COMMANDS.items())
    about, after = __doc__.split("\n")[0], f"With finished runs: {also}. Before one: pairs FILE ({PAIRS})."
    parser = _Parser(prog="lazyorpo", description=about, epilog=after, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lazyorpo {__version__}")
    _add_settings(parser, FIELDS)
    for flag, words in {
        "--plan": "only say whether it will fit and how long it will take",
        "--probe": "only recommend or_weight and learning_rate, after a few short runs",
        "--json": "the plan as one JSON object (of all cards, or several: a list of them)",
        "--fail-within-noise": "end with status 3 where held-out accuracy has not risen beyond its noise",
    }.items():
        parser.add_argument(flag, action="store_true", help=words)
    cards = "plan for a named card (T4, A40, …), cpu-<GiB> or apple-<GiB>, or all cards"
    parser.add_argument("--device", default="", help=cards)
    many = "plan for so many of that card, with DDP and with FSDP2"
    parser.add_argument("--cards", default="1", metavar="N", help=many)
    file = "take settings from a run's settings.json, or an ORPO file of TRL or axolotl; flags beside it win"
    parser.add_argument("--settings", default="", metavar="FILE", help=file)
    return parser


def _add_settings(parser: _Parser, names) -> None:
    for name, field in ((name, FIELDS[name]) for name in names):
        meta, default = field.metadata, field.default if field.default != "" else "empty"
        allowed = f" ({', '.join(meta['choices'])})" if meta["choices"] else ""
        words = f"{meta['help']}{allowed}. Default: {default}".replace("%", "%%")
        flag, kind = "--" + name.replace("_", "-"), field.type.__name__
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, metavar=kind, help=words)


PAIRS = "pairs of what people have: one answer a prompt, thumbs, scores, or clicks"


def _pairs_parser() -> _Parser:
    parser = _Parser(prog="lazyorpo pairs", description=PAIRS[0].upper() + PAIRS[1:], allow_abbrev=False)
    parser.add_argument("dataset", metavar="FILE", help="anything that --dataset takes, or a file of clicks")
    parser.add_argument("--out", default="pairs.jsonl", help="the .jsonl to write. Default: %(default)s")
    sample = "let the base model answer where a thumb up has no thumb down too"
    parser.add_argument("--sample", action="store_true", help=sample)
    _add_settings(parser, ("columns", "max_pairs", "base_model", "answer_tokens", "seed", "precision"))
    return parser


def pairs(arguments: list[str]) -> int:
    """Make pairs, as the flags say; the exit status."""
    given, flags = _pairs_parser().read(arguments)
    settings, _, _ = resolve([("env", from_environment()), ("flag", flags)])
    check_requirements()
    from .pairs.make import make_pairs

    make_pairs(settings, given["out"], sample=given["sample"])
    return 0


def _compare(*runs: str) -> str:
    from .results.compare import compare

    names = (f"compare{f'-{k}' if k > 1 else ''}.png" for k in count(1))
    picture = next(name for name in names if not os.path.lexists(name))
    return f"{compare(runs, picture)['markdown']}\n\nThe curves over each other are in {picture}."


COMMANDS = {  # of results/share.py and one above: words after it, what it does, how to tell what it gives
    "chat": ("RUN", "talk to a finished run", ""),
    "merge": (
        "RUN [FOLDER]", "the full model, the adapter folded in, in FOLDER or in the run's merged/",
        "The full model is in {}",
    ),
    "export-gguf": ("RUN [KIND]", "for llama.cpp, LM Studio; KIND: q8_0, f16 or bf16", "{}"),
    "ollama": ("RUN [NAME]", "the full model with its Modelfile, and Ollama's commands", "{}"),
    "lines": ("RUN", "for vLLM, transformers, LM Studio, llama.cpp", "{}"),
    "archive": ("RUN", "model and records in one .zip", "{}"),
    "compare": ("RUN RUN …", "a table, and compare.png in this folder", "{}"),
    "push": ("RUN OWNER/NAME", "upload it to the hub, private", "Pushed to {}"),
}  # fmt: skip


def command(name: str, given: list[str]) -> int:
    """Call one of COMMANDS with the words after its name; the exit status."""
    usage, what, told = COMMANDS[name]
    if given in (["-h"], ["--help"]):
        print(f"usage: lazyorpo {name} {usage}\n\n{what}")
        return 0
    words = usage.split()
    least, most = sum(word[0] not in "[…" for word in words), 99 if "…" in words else len(words)
    if not least <= len(given) <= most or any(word.startswith("-") for word in given):
        use = f"python -m lazyorpo_lib {name} {usage}"
        raise UserError(f"{' '.join(given) or 'nothing'!r} was given; use it as: {use}.")
    check_requirements()
    from .results import share

    done = _compare(*given) if name == "compare" else getattr(share, name.replace("-", "_"))(*given)
    if told:
        print(told.format(done))
    return 0


def main(arguments: list[str]) -> int:
    """Do what a terminal asks for; the exit status."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if name in COMMANDS:
        return command(name, arguments[1:])
    if name in ("", "run", "pairs"):
        return (pairs if name == "pairs" else train)(arguments[name != "" :])
    names = ["run", *COMMANDS, "pairs"]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
    raise UserError(f"There is no command {name!r}; did you mean {near}? All: {', '.join(names)}.")


class _Patient:
    """A stream of the console that never fails: what it cannot show is replaced; once nobody reads it any
    more (a closed pipe, a terminal that has gone, a full disk) the rest goes nowhere, and the run goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # none where a shell closed it
        self.stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._tried(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, act, *given):
        try:
            return act(*given)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) != errno.EAGAIN:
                with contextlib.suppress(OSError, ValueError):  # also for what is buffered, and for children
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def console() -> None:
    """Be the command `lazyorpo`: a mistake is one line, and its exit status 2."""
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdin.reconfigure(errors="replace")
    sys.stdout, sys.stderr = _Patient(sys.stdout), _Patient(sys.stderr)
    stop = Stop()
    try:
        with stop.listening():
            sys.exit(main(sys.argv[1:]))
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or stop.asked:  # an import that is broken off raises anything
            status, said = 130, f"lazyorpo: {stop.reason or str(error) or 'interrupted'}"
        elif isinstance(error, UserError):
            status, said = 2, f"lazyorpo: {error}"
        else:
            status, said = 1, without_secrets(traceback.format_exc())
        print(said, file=sys.stderr)
        sys.exit(status)
    finally:
        sys.stdout.flush()  # not after the end, where nobody could catch it


if __name__ == "__main__":
    console()
