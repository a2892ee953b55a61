"""Instructions whose answers a few lines of code can check: a quick look at whether a model still does as it is told.

Written for this kit. No judge, no download, no claim to be a benchmark: for one, see IFEval in the README.
"""

import json
import re
from collections.abc import Sequence


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _is_json(kind: type, check):
    def holds(text: str) -> bool:
        try:
            value = json.loads(text)
        except ValueError:
            return False
        return isinstance(value, kind) and check(value)

    return holds


INSTRUCTIONS = {
    "Answer in exactly three words: what is the sky like at night?": lambda t: len(_words(t)) == 3,
    "What is the capital of France? Answer in capital letters only.": str.isupper,
    "Write one sentence about dogs in small letters only, with no capital letter.": str.islower,
    "Write one sentence about the sea that ends with an exclamation mark.": lambda t: t.endswith("!"),
    "Write one question about horses and nothing else.": lambda t: t.endswith("?") and t.count("?") == 1 and len(_lines(t)) == 1,
    "Is ice cold? Answer with yes or no and nothing else.": lambda t: t.lower().rstrip(".!") in ("yes", "no"),
    "How many legs does a spider have? Answer with one number and no words.": lambda t: bool(re.fullmatch(r"\d+\.?", t)),
    "Write the numbers from 1 to 5, separated by commas, and nothing else.": lambda t: bool(re.fullmatch(r"1, ?2, ?3, ?4, ?5\.?", t)),
    "Write the word moon four times and nothing else.": lambda t: [w.lower() for w in _words(t)] == ["moon"] * 4,
    "Describe a cat in fewer than ten words.": lambda t: 0 < len(_words(t)) < 10,
    "Why do we sleep? Begin your answer with the word Because.": lambda t: t.startswith("Because"),
    "Write one sentence about winter with the words snow and river in it.": lambda t: {"snow", "river"} <= set(_words(t.lower())),
    "Say something kind, with your whole answer in double quotation marks.": lambda t: bool(re.fullmatch('"[^"]+"', t)),
    "List three fruits, one on each line, and begin each line with a hyphen.": lambda t: (
        len(_lines(t)) == 3 and all(line.startswith("-") for line in _lines(t))
    ),
    "Give a JSON list of three colours and nothing else.": _is_json(list, lambda v: len(v) == 3),
    "Give a JSON object with the keys name and age and nothing else.": _is_json(dict, lambda v: v.keys() == {"name", "age"}),
}


def followed(answers: Sequence[str]) -> list[bool]:
    """Whether each answer, in the order of `INSTRUCTIONS`, does as it was told; one that was cut short ("…") never does."""
    return [not text.endswith("…") and check(text.strip()) for check, text in zip(INSTRUCTIONS.values(), answers, strict=True)]
