"""README and docs/: short, linked, and true of the commands, settings and tests that they name."""

import json
import re
from pathlib import Path

import pytest

from lazyorpo_lib.__main__ import COMMANDS, _pairs_parser, _run_parser
from lazyorpo_lib.settings import FIELDS, coerce, resolve
from tests.test_gpu_suite import unknown_figures

HOME = Path(__file__).parents[1]
PAGES = {
    path.relative_to(HOME).as_posix(): path.read_text(encoding="utf-8")
    for path in (HOME / "README.md", *sorted((HOME / "docs").glob("*.md")))
}


def test_the_readme_is_read_in_three_minutes():
    assert len(PAGES["README.md"].splitlines()) <= 130


@pytest.mark.parametrize("index", ["README.md", "docs/README.md"])
def test_an_index_names_every_page(index):
    linked = {name.removeprefix("docs/") for name in re.findall(r"\]\(([\w/]+\.md)\)", PAGES[index])}
    assert linked >= {path.name for path in (HOME / "docs").glob("*.md")} - {"README.md"}


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[page]):
        file = (HOME / page).parent / target if target else HOME / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), anchor


def commands(text: str) -> list[list[str]]:
    """The words after `lazyorpo`, or `-m lazyorpo_lib`, of each command in a page's blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = (line.split(" #")[0] for block in blocks for line in block.splitlines())
    found = (re.search(r"(?:^lazyorpo|-m lazyorpo_lib)((?: .*)?)$", line) for line in lines)
    return [match[1].split() for match in found if match]


@pytest.mark.parametrize(
    "page,words", [(page, words) for page, text in PAGES.items() for words in commands(text)], ids=" ".join
)
def test_every_command_is_one_that_the_command_line_takes(page, words):
    if words[:1] and words[0] in COMMANDS:
        wanted = COMMANDS[words[0]][0].replace("…", "").split()
        least = [word for word in wanted if not word.startswith("[")]
        assert len(least) <= len(words) - 1 <= len(wanted)
    else:
        parser = _pairs_parser() if words[:1] == ["pairs"] else _run_parser()
        given = vars(parser.parse_args(words[words[:1] == ["pairs"] :]))
        resolve([("flag", {name: coerce(name, value) for name, value in given.items() if name in FIELDS})])


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_repository_that_is_named_is_there(page):
    for name in re.findall(r"`((?:tests|docs|notebooks|configs|lazyorpo_lib)/[\w./-]+)`", PAGES[page]):
        assert name == "tests/results/" or (HOME / name).exists(), name


def test_every_promise_names_tests_that_are_there():
    page, named = PAGES["docs/reliability.md"], []
    for cell in re.findall(r"^\|.*\| (.+) \|$", page, re.M):
        for file, words in re.findall(r"`((?:\w+/)?test_\w+\.py)`(?:: ([\w, ]+))?", cell):
            text = (HOME / "tests" / file).read_text(encoding="utf-8")
            tests = re.findall(r"^def (test_\w+)", text, re.M)
            for word in filter(None, words.split(", ")) if words else ():
                assert any(word in test for test in tests), f"{file}: {word}"
            named.append(file)
    assert len(named) >= 30


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_no_figure_of_a_card_that_is_in_no_result(page):
    records = [json.loads(file.read_text()) for file in (HOME / "tests/results").glob("*.json")]
    records = [record for record in records if "parts" in record and "device" in record]
    assert unknown_figures(PAGES[page], records) == []
