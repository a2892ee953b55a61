"""python -m lazyorpo_lib: a run, or its plan, from a terminal. Every setting of `settings.py` is a flag.

Exit status: 0 done, or stopped by max_minutes; 2 the user's mistake, one line on stderr; 130 interrupted, or stopped by gradients
that were not finite: with a checkpoint, once a step is done.
"""

import argparse
import json
import os
import sys

from .errors import UserError
from .machine import this_machine
from .results.share import USAGE, command
from .settings import FIELDS, coerce, from_environment, resolve


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]}; --help lists every flag.")


def _parser() -> argparse.ArgumentParser:
    also = "; ".join(f"{name} {words}" for name, words in USAGE.items())
    parser = _Parser(
        prog="python -m lazyorpo_lib",
        description=__doc__.split("\n")[0],
        epilog=f"With finished runs: {also}.",
        allow_abbrev=False,
    )
    for name, field in FIELDS.items():
        meta = field.metadata
        allowed = f" ({', '.join(meta['choices'])})" if meta["choices"] else ""
        parser.add_argument(
            "--" + name.replace("_", "-"), dest=name, default=argparse.SUPPRESS, metavar=field.type.__name__,
            help=f"{meta['help']}{allowed}. Default: {field.default if field.default != '' else 'empty'}".replace("%", "%%"),
        )  # fmt: skip
    parser.add_argument(
        "--plan", action="store_true", help="only say whether it will fit and how long it will take"
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="only recommend or_weight and learning_rate, after a few short runs",
    )
    parser.add_argument(
        "--device",
        default="",
        help="plan for a named card (T4, A40, …), cpu-<GiB> or apple-<GiB>, or all cards",
    )
    parser.add_argument(
        "--json", action="store_true", help="the plan as one JSON object (of all cards: a list of them)"
    )
    return parser


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in USAGE:
        return command(arguments[0], arguments[1:])
    given = vars(_parser().parse_args(arguments))
    flags = {name: coerce(name, value) for name, value in given.items() if name in FIELDS}
    layers = [("env", from_environment()), ("flag", flags)]
    resolve(layers)  # mistakes are told before anything heavy is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from . import run
    from .plan import planner

    target = planner.find_card(given["device"]) if given["device"] not in ("", "all") else this_machine()
    settings, sources, why = resolve(layers, gpu_gib=getattr(target, "machine", target).gpu_gib)
    if given["device"] == "all":
        plans = run.estimates(settings)
        print(json.dumps([plan.as_dict() for plan in plans]) if given["json"] else planner.cards_table(plans))
        return 0
    if given["plan"] or given["device"] or given["json"]:
        plan = run.estimate(settings, given["device"])
        print(
            json.dumps(plan.as_dict())
            if given["json"]
            else "\n".join([plan.line(), plan.table(), *plan.method.arithmetic])
        )
        return 0
    if given["probe"]:
        from .trials.trials import probe

        home = probe(settings)
        print(
            f"{(home / 'probe.md').read_text(encoding='utf-8')}\nThe picture it decided from is {home / 'probe.png'}"
        )
        return 0
    if int(os.environ.get("RANK", 0)) == 0:
        print(why[0].upper() + why[1:] + ".")
    done = run.execute(settings, sources)
    done.show(f"Everything is in {done.folder}")
    return 130 if done.interrupted else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"lazyorpo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lazyorpo: interrupted", file=sys.stderr)
        sys.exit(130)
