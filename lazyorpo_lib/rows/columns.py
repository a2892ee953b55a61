"""Names of columns -> what each may be: tables, any letter case, paths, the user's mapping; judges no row."""

import functools
import re
from dataclasses import dataclass

from ..errors import UserError

PARTS = "prompt chosen rejected system history tools a b winner margin".split()
PROMPTS = (
    "conversations conversation prompt messages instruction question query input problem user user_prompt "
    "user_message user_input human dialog dialogue task request post context history"
).split()
BELOW = ("input", "context")  # go below every prompt but those of the first four names
SYSTEMS = "system system_prompt system_message system_instruction".split()
# The better and the worse one, as what is left of a name without the words in FILLER.
SIDES = [pair.split("/") for pair in (
    "chosen/rejected accepted/rejected preferred/dispreferred preferred/non_preferred preferred/rejected "
    "selected/rejected chosen/reject accept/reject winner/loser winning/losing win/lose better/worse "
    "best/worst good/bad positive/negative pos/neg correct/incorrect correct/wrong right/wrong "
    "best/incorrect liked/disliked upvoted/downvoted like/dislike j/k y_w/y_l yw/yl w/l safe/unsafe"
).split()]  # fmt: skip
FILLER = set(
    "response responses answer answers output outputs completion completions text texts message messages "
    "reply replies conversation conversations sample samples summary summaries human ref generation content "
    "option candidate assistant bot".split()
)
ALONE = "output response answer completion target solution messages conversations".split()
BOTH = [tuple(pair.split("/")) for pair in "a/b 1/2 0/1 left/right first/second x/y".split()]
WINNERS = "winner better best preferred chosen".split()  # whose values name a side, a number the side's own
LABELS = [*WINNERS, *"choice preference label labels selected verdict vote judgement".split()]  # in words
SIGNED = ("overall_preference", "preference_strength")  # below zero the first one is better, above the second
TIES = set("tie ties tied both neither equal draw same none tie_bothbad both_bad bothbad".split())
LISTS = "answers responses completions outputs candidates generations choices samples summaries".split()
TEXTS = "answer response text content output completion generated_text message".split()
SCORES = "overall_score score scores rating ratings reward rewards grade quality votes upvotes".split()
RANKS = "rank ranks ranking rankings".split()


@functools.lru_cache(4096)
def fold(name: str) -> str:
    """Give a name in small letters, its words parted by underscores: preferredOutput, Response1, human-A."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Za-z])(?=\d)", "_", name)
    return re.sub(r"\W+|_+", "_", name.lower()).strip("_")


def core(name: str, without=frozenset()) -> str:
    """Give what is left of a folded name without words that say only that it is an answer."""
    return "_".join(word for word in name.split("_") if word not in FILLER and word not in without)


@dataclass(frozen=True)
class Layout:
    """What the names of a row's columns say, worked out once for all rows that have the same."""

    names: dict[str, str]  # {folded: as written}
    sides: dict[str, str]  # {"chosen": the better column, "rejected": the worse one}, or {}
    both: list[dict]  # {side: column} of two answers with a label elsewhere
    parts: dict[str, list]  # {part: the columns that may hold it, the likeliest first}

    @classmethod
    @functools.lru_cache(256)
    def of(cls, names: tuple) -> "Layout":
        folded = {fold(name): name for name in reversed(names) if isinstance(name, str)}
        folded |= {name: name for name in names if isinstance(name, str) and name == fold(name)}
        cores: dict[str, list] = {}
        for short, name in reversed(folded.items()):
            cores.setdefault(core(short), []).append(name)
        pairs = [(cores[good][0], cores[bad][0]) for good, bad in SIDES if {good, bad} <= cores.keys()]
        bad = [cores[bad][0] for _, bad in SIDES if bad in cores][:1]
        pairs += [(folded[n], worse) for worse in bad for n in ALONE if folded.get(n, worse) != worse]
        sides = dict(zip(("chosen", "rejected"), pairs[0], strict=True)) if pairs else {}
        both = [
            {a: left, b: right}
            for a, b in BOTH for left in cores.get(a, ()) for right in cores.get(b, ())
            if fold(left).removesuffix(a) == fold(right).removesuffix(b) or fold(left).startswith(a)
        ]  # fmt: skip
        known = {"prompt": PROMPTS, "system": SYSTEMS, "history": ["history"]}
        parts = {part: [folded[n] for n in known[part] if n in folded] for part in known}
        return cls(folded, sides, both, parts)


def at(cell, path: str):
    """Give what a path like "input.messages" or "output.0" leads to; None where it leads nowhere."""
    (head, _, tail), key = path.partition("."), None
    if isinstance(cell, dict):
        if path in cell:
            return cell[path]
        near = {fold(name): name for name in cell if isinstance(name, str)}
        key = head if head in cell else near.get(fold(head))
    elif isinstance(cell, list | tuple) and head.isdigit() and int(head) < len(cell):
        key = int(head)
    return None if key is None else at(cell[key], tail) if tail else cell[key]


def parse_columns(columns: str) -> dict[str, str]:
    """Read "prompt=a,chosen=b,rejected=c", of which each may be left out; "" is {}, all else a UserError."""
    mapping = dict(re.findall(r"\s*(\w+)\s*=\s*([^,]*[^,\s])\s*(?:,|$)", columns))
    known = mapping.keys() <= set(PARTS) and re.fullmatch(r"\d+(\.\d+)?", mapping.get("margin", "0"))
    whole = len(mapping) == columns.count("=") == columns.count(",") + 1
    if columns.strip() and not (known and whole):
        allowed = f"write prompt=…,chosen=…,rejected=… with names of columns, or some of {', '.join(PARTS)}"
        raise UserError(f"columns is {columns!r}, which is no mapping: {allowed}.")
    return mapping


def advise(rows: list[tuple[dict, str]]) -> str:
    """Say what to do where no row is a pair; following it works."""
    names = list(dict.fromkeys(name for row, _ in rows for name in row if isinstance(name, str)))
    layout = Layout.of(tuple(names))
    free = [n for n in names if any(isinstance(row.get(n), str | list | dict) and row[n] for row, _ in rows)]
    if any(reason == "label_unclear" for _, reason in rows):
        a, b = layout.both[0].values() if layout.both else "ab"
        unclear = "which of two answers is better is not clear"
        return f"{unclear}: write {a!r}, {b!r} or tie into the column winner"
    if layout.sides:
        free = [name for name in free if name not in layout.sides.values()]
        which = f"set columns to 'prompt={free[0]}' or whichever holds it" if free else "add a column prompt"
        return f"no prompt was found, in no column of that name and not inside the answers: {which}"
    if lists := [n for n in free if any(are_texts(row.get(n)) for row, _ in rows)]:
        paths = f"chosen={lists[0]}.0,rejected={lists[0]}.1"
        return f"which answer is better is not said: set columns to '{paths}' if the first one always is"
    if len(free) > 2:
        return "set columns to 'prompt=…,chosen=…,rejected=…' with this dataset's column names"
    one = "each row has one answer, and " * any(fold(name) in ALONE for name in free)
    needed = "a prompt, a better answer (chosen) and a worse one (rejected)"
    return f"{one}a row needs {needed}: add what is missing"


def are_texts(cell) -> bool:
    """Tell whether a cell is a list of several texts."""
    return isinstance(cell, list | tuple) and len(cell) > 1 and all(isinstance(text, str) for text in cell)
