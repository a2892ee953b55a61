"""Writes notebooks/LazyORPO_standalone.ipynb: the main notebook, with the library in one folded cell of plain text.

    python notebooks/make_standalone.py           write it
    python notebooks/make_standalone.py --check   exit status 1 if it is not what would be written

The same files give the same bytes. It runs no cell.
"""

import hashlib
import json
import sys
from pathlib import Path

HOME = Path(__file__).parents[1]
MAIN, STANDALONE = HOME / "notebooks" / "LazyORPO.ipynb", HOME / "notebooks" / "LazyORPO_standalone.ipynb"
CELL = """\
#@title Helper code, built in {{ display-mode: "form" }}
# The package lazyorpo_lib as plain text, so that this notebook needs no other file. Generated; its digest is {digest}.
import importlib
import sys
import tempfile
from pathlib import Path

FILES = {{
{files}}}
bundle = Path(tempfile.mkdtemp(prefix="lazyorpo-{digest}-"))
for name, text in FILES.items():
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text(text, encoding="utf-8")
sys.path.append(str(bundle))
importlib.invalidate_caches()
print(len(FILES), "files of lazyorpo_lib, digest {digest}")"""


def bundled(home: Path = HOME) -> dict[str, str]:
    """Path -> text of everything that a run needs: the package, the demo's pairs, the requirements."""
    paths = [
        *home.glob("lazyorpo_lib/**/*.py"),
        home / "lazyorpo_lib/demo/pairs.jsonl",
        home / "requirements.txt",
    ]
    return {path.relative_to(home).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def cell_text(files: dict[str, str]) -> str:
    """The cell: each line of each file as a Python literal of its own, to be read and edited in place."""
    entries = []
    for name, text in files.items():
        lines = "".join(f"        {line!r}\n" for line in text.splitlines(keepends=True)) or "        ''\n"
        entries.append(f"    {name!r}: (\n{lines}    ),\n")
    return CELL.format(files="".join(entries), digest=digest(files))


def notebook(home: Path = HOME) -> str:
    """The text of the standalone notebook."""
    content = json.loads((home / "notebooks" / MAIN.name).read_text(encoding="utf-8"))
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "bundle",
        "metadata": {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["lazyorpo-bundle"]},
        "outputs": [],
        "source": cell_text(bundled(home)).splitlines(keepends=True),
    }
    first_code = next(i for i, c in enumerate(content["cells"]) if c["cell_type"] == "code")
    content["cells"].insert(first_code, cell)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    text = notebook()
    if arguments == ["--check"]:
        fresh = STANDALONE.is_file() and STANDALONE.read_text(encoding="utf-8") == text
        print(
            "up to date" if fresh else f"{STANDALONE.name} is stale: run python notebooks/make_standalone.py"
        )
        return 0 if fresh else 1
    STANDALONE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
