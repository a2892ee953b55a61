"""Rows -> candidates, which orpo/data.py cleans: each row with the pair that it is, or why it is none."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..orpo.data import Pair, json_safe
from .columns import Layout, advise, are_texts, at, parse_columns
from .messages import BadRow
from .shapes import to_pair

FIRST_ROWS = 100  # one of so many must be in a known shape


@dataclass(frozen=True)
class Candidates:
    """(index, row, pair, "") or (index, row, None, reason), made anew at each iteration. A bad row never
    raises; UserError where the mapping is wrong, or none of the first 100 rows has a known shape."""

    rows: Iterable  # (index, row)
    mapping: dict[str, str]

    @property
    def notes(self) -> dict:
        """Give what whoever reads the rows has said, as {sentence: None}."""
        return getattr(self.rows, "notes", {})

    def __iter__(self) -> Iterator[tuple[int, object, Pair | None, str]]:
        judged = self.judged()
        first = list(itertools.islice(judged, FIRST_ROWS))
        rows = [(row, reason) for _, row, _, reason in first if isinstance(row, dict)]
        found = check_mapping([row for row, _ in rows], self.mapping)
        if first and all(reason in ("unknown_shape", "label_unclear") for _, reason in rows):
            start = f"None of the first {len(first)} rows is a pair of a known shape"
            raise UserError(f"{start}: {found}; {advise(rows)}.")
        yield from itertools.chain(first, judged)

    def judged(self):
        for index, row in spread(self.rows, self.mapping):
            try:
                judged = to_pair(index, row, self.mapping), ""
            except BadRow as bad:
                judged = None, str(bad)
            yield index, row, *judged

    def at(self, indexes: Sequence[int]) -> list[Pair]:
        """Give the pairs of the rows with these indexes, in that order; reads up to the last of them."""
        wanted = set(indexes)
        found = ((i, row) for i, row in spread(self.rows, self.mapping) if i in wanted)
        pairs = {i: to_pair(i, row, self.mapping) for i, row in itertools.islice(found, len(wanted))}
        return [pairs[index] for index in indexes]


def candidates(rows: Iterable, columns: str = "") -> Candidates:
    """Take rows for candidates.

    Args:
        rows: (index, row) tuples that can be iterated again, as from `open_rows`.
        columns: explicit mapping "prompt=…,chosen=…,rejected=…[,system=…]"; "" recognises the shape.
    """
    if iter(rows) is rows:
        raise TypeError("rows are read twice: pass something that can be iterated again")
    return Candidates(rows, parse_columns(columns))


def check_mapping(rows: list[dict], mapping: dict[str, str]) -> str:
    """Name the columns that rows have; UserError where the mapping names one that none has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    named = ", ".join(repr(json_safe(name)) for name in names[:40])
    found = f"the columns found are {named or 'none, for its rows are not objects'}"
    for name, path in mapping.items():
        if name != "margin" and rows and all(at(row, path) is None for row in rows):
            raise UserError(f"columns says {name}={path}, but {found}: write one of these.")
    return found


def spread(rows: Iterable, columns: dict[str, str]) -> Iterator[tuple[int, object]]:
    """Make one row of each pair where a side is a list of texts: the first better answer against the first
    worse one, and so on; the shorter list begins again. What is made is numbered, in place of the rows."""
    extra = 0
    for index, row in rows:
        sides = Layout.of(tuple(row)).sides if isinstance(row, dict) else {}
        places = [columns.get(part, column) for part, column in sides.items()]
        if not any(are_texts(row.get(place)) for place in places):
            yield index + extra, row
            continue
        lists = [row[p] if are_texts(row.get(p)) else [row.get(p)] for p in places]
        most = max(map(len, lists))
        for i in range(most):
            cells = {p: cell[i % len(cell)] for p, cell in zip(places, lists, strict=True)}
            yield index + extra + i, row | cells
        extra += most - 1
