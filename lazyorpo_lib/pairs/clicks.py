"""Which of two answers is better, by somebody who does not know whose they are; and what the clicks say.

A file of clicks is only added to, by an undo too. Whose the answers are is in it, shown once all is judged.
"""

import contextlib
import hashlib
import json
import math
from html import escape

from ..errors import UserError, expanded
from ..folder import append_row, read_json, read_rows
from ..orpo.data import Message
from ..results.evaluate import answers_side_by_side
from ..results.share import explain_run, folder_of_run
from ..rows.columns import Layout
from ..rows.dataset import open_rows
from ..rows.messages import BadRow, drop_if
from ..rows.shapes import to_pair

try:
    import ipywidgets
except Exception:  # absent, or broken by a version that does not go with the rest
    ipywidgets = None

BY = "lazyorpo clicks"
KEYS = {"1": "left", "2": "right", "0": "tie", "u": "undo"}
_WORDS = {"left": "Left is better", "right": "Right is better", "tie": "The same", "undo": "Undo"}
_TEXT = '<div style="white-space:pre-wrap;line-height:1.4;padding:8px;border:1px solid #999">{}</div>'


def is_click(row) -> bool:
    """Tell whether a row is of a file of clicks."""
    parts = {"item", "prompt", "left", "right", "whose", "winner"}
    return isinstance(row, dict) and row.get("by") == BY and parts <= row.keys()


def standing(rows) -> list[tuple[int, dict]]:
    """Give the clicks of (index, row) tuples that were not undone, of one item the last; what is no click
    stays as it is."""
    kept: dict = {}
    for index, row in rows:
        item, undone = (row["item"], row["winner"] == "undo") if is_click(row) else ((index,), False)
        kept.pop(item, None)
        kept |= {} if undone else {item: (index, row)}
    return list(kept.values())


def questions(source: str) -> list[dict]:
    """Give what there is to judge, [{"prompt": messages, "answers": {whose: text}}], where the two differ.
    `source`: the folder of a run that answered held-out prompts before and after training (base, tuned), or
    what `dataset` takes, with a prompt and two answers a row."""
    if (expanded(source) / "settings.json").is_file():
        folder = folder_of_run(source, "held_out.json")
        with explain_run(folder):
            rows = answers_side_by_side(read_json(folder / "held_out.json"))
            asked = [([Message(role="user", content=row.pop("prompt"))], row) for row in rows]
    else:
        asked = [found for index, row in open_rows(source) if (found := _two_answers(index, row))]
    asked = [{"prompt": p, "answers": a} for p, a in asked if len({text.strip() for text in a.values()}) == 2]
    if not asked:
        needed = "a finished run with answers=1 or more, or rows with a prompt and two answers that differ"
        raise UserError(f"{source!r} has nothing to choose from: give {needed}.")
    return asked


def _two_answers(index: int, row) -> tuple[list, dict] | None:
    layout = Layout.of(tuple(row) if isinstance(row, dict) else ())
    names = (layout.sides or next(iter(layout.both), {})).values()
    with contextlib.suppress(BadRow):
        drop_if(not names, "unknown_shape")
        pair = to_pair(index, row, dict(zip(("chosen", "rejected"), names, strict=True)))
        return list(pair.prompt), dict(zip(names, (pair.chosen, pair.rejected), strict=True))
    return None


class Clicks:
    """A sitting: what comes next, a click, an undo. Any number of sittings share a file.

    Args:
        source: as of `questions`.
        file: of the clicks; made with the first one.
        seed: of the order of the questions, and of the sides on which the answers stand.
    """

    def __init__(self, source: str, file: str = "clicks.jsonl", seed: int = 42):
        self.file = expanded(file)
        whole = False
        with contextlib.suppress(UserError, OSError):
            whole = self.file.parent.is_dir() and all(map(is_click, read_rows(self.file)))
        if not whole:
            why = "is no file of clicks, or in a folder that is not there: nothing was written"
            raise UserError(f"{str(file)!r} {why}; name another file.")
        keys = {hashlib.sha256(json.dumps([seed, q]).encode()).hexdigest()[:16]: q for q in questions(source)}
        self.asked = dict(sorted(keys.items()))

    def judged(self) -> dict[str, dict]:
        """Give the clicks that stand, by their items."""
        return {row["item"]: row for _, row in standing(enumerate(read_rows(self.file)))}

    def left(self) -> list[str]:
        """List the items that nobody has judged."""
        done = self.judged()
        return [item for item in self.asked if item not in done]

    def next(self) -> dict | None:
        """Give the first question that nobody has judged, {"item", "prompt", "left", "right", "whose"}; None
        once all are. `whose` names left and right, and is not to be shown."""
        if not (left := self.left()):
            return None
        found, turned = self.asked[left[0]], int(left[0], 16) % 2
        whose = sorted(found["answers"], reverse=turned)
        sides = dict(zip(("left", "right"), (found["answers"][who] for who in whose), strict=True))
        return {"item": left[0], "prompt": found["prompt"], **sides, "whose": whose}

    def click(self, choice: str) -> None:
        """Keep what was clicked of the question that is next: left, right, tie; undo takes the last back."""
        if choice not in _WORDS:
            raise UserError(f"The click is {choice!r}, but must be one of {', '.join(_WORDS)}.")
        if found := next(reversed(self.judged().values()), None) if choice == "undo" else self.next():
            append_row(self.file, {"by": BY} | found | {"winner": choice})


class ClickPanel:
    """Show what `Clicks` gives next, with buttons and keys, until all is judged; then what the clicks say."""

    def __init__(self, source: str, file: str = "clicks.jsonl", seed: int = 42):
        if ipywidgets is None:
            raise UserError("Clicks need ipywidgets, which is not here or broken: pip install ipywidgets.")
        self.clicks, w = Clicks(source, file, seed), ipywidgets
        self.prompt, self.status = w.HTML(), w.HTML()
        self.sides = {side: w.HTML(layout=w.Layout(width="50%")) for side in ("left", "right")}
        self.buttons = {c: w.Button(description=f"{_WORDS[c]} ({key})") for key, c in KEYS.items()}
        for choice, button in self.buttons.items():
            button.on_click(lambda _, choice=choice: self.press(choice))
        self.keys = w.Text(placeholder="keys, typed here: 1 2 0 u")
        self.keys.observe(lambda change: self.type(change["new"]), names="value")
        below = w.HBox([*self.buttons.values(), self.keys])
        self.box = w.VBox([self.prompt, w.HBox([*self.sides.values()]), below, self.status])
        self.press()

    def type(self, text: str) -> None:
        """Do what the keys in a text say, and empty their field."""
        for key in text.lower():
            self.press(KEYS.get(key, ""))
        self.keys.value = ""

    def press(self, choice: str = "") -> None:
        """Do what a button does, and show what is next."""
        if choice:
            self.clicks.click(choice)
        found, rows = self.clicks.next(), [*self.clicks.judged().values()]
        asked = "\n\n".join(turn["content"] for turn in found["prompt"]) if found else ""
        self.prompt.value = f"<b>{_TEXT.format(escape(asked))}</b>" * bool(found)
        for side, shown in self.sides.items():
            shown.value = _TEXT.format(escape(found[side])) if found else ""
            self.buttons[side].disabled = self.buttons["tie"].disabled = found is None
        self.status.value = escape(f"{len(self.clicks.left())} to go." if found else verdict(rows))


def verdict(rows: list[dict]) -> str:
    """Put clicks that stand into a sentence: wins, losses, ties, the share of wins with its interval, the
    sign test; a blind test where the two answers are the base's and the tuned model's."""
    if len(names := {tuple(sorted(row["whose"])) for row in rows}) != 1:
        return f"{len(rows)} clicks, on answers of {len(names)} pairs of names: no test is made."
    other, one = names.pop()  # base and tuned, in their order
    votes = [row["whose"][row["winner"] == "right"] for row in rows if row["winner"] in ("left", "right")]
    wins, n = votes.count(one), len(votes)
    said = f"{one} was better in {wins}, {other} in {n - wins}, the same in {len(rows) - n} of {len(rows)}"
    if not n:
        return f"{said}."
    (low, high), p = interval(wins, n), sign_test(wins, n)
    noise = "more than chance" if p < 0.05 else "within chance: click on, or call it open"
    share = f"{wins / n:.0%} for {one}, 95 % interval {low:.0%} to {high:.0%}"
    return f"{said}: {share}, two-sided sign test p = {p:.3g}, {noise}."


def _at_least(wins: int, n: int, share: float) -> float:
    """Give the probability of so many wins or more of `n`, each with the probability `share`."""
    odds, rest, all_ways = math.log(share), math.log1p(-share), math.lgamma(n + 1)
    ways = (all_ways - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(wins, n + 1))
    return math.fsum(math.exp(w + k * odds + (n - k) * rest) for k, w in enumerate(ways, wins))


def sign_test(wins: int, n: int) -> float:
    """Give the two-sided exact p of so uneven a count where either is as likely; ties are not in it."""
    return min(1.0, 2 * _at_least(max(wins, n - wins), n, 0.5))


def interval(wins: int, n: int) -> tuple[float, float]:
    """Give the exact (Clopper-Pearson) 95 % interval of a share."""

    def least(k: int) -> float:
        low, high = 0.0, float(k > 0)
        for _ in range(50 * (k > 0)):
            middle = (low + high) / 2
            low, high = (middle, high) if _at_least(k, n, middle) < 0.025 else (low, middle)
        return low

    return least(wins), 1 - least(n - wins)
