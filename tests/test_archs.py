"""Every class that transformers ships is right, or refused in one sentence; the page lists them all."""

import re
import warnings
from pathlib import Path

import pytest

from tests.archs import measure, quieten
from tests.tiny import has_windows, names_of
from tests.verdicts import FAMILY, complaints

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def listed() -> list:
    """Every class with the list that it is of."""
    return [(kind, name) for kind in ("main", "images", "side") for name in names_of(kind)]


@pytest.mark.slow
@pytest.mark.parametrize("kind,name", listed())
def test_a_class_is_right_or_refused_in_one_sentence(kind, name):
    quieten()
    reports = [measure(name, kind)]
    if kind == "main" and reports[0]["verdict"] == "right" and has_windows(name):
        reports.append(measure(name, "wide"))
    if kind != "side" and name not in FAMILY:
        warnings.warn(f"transformers has a new class: {name} is {reports[0]['verdict']}", stacklevel=1)
    if found := sum(map(complaints, reports), []):
        pytest.fail("\n".join(found), pytrace=False)


def test_the_page_lists_every_class_that_is_known():
    named = re.findall(r"^\| `([\w.-]+)` \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(FAMILY)
