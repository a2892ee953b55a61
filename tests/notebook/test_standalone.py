"""The standalone notebook: up to date, the same bytes each time, and runnable where there is nothing else."""

import json
import shutil

import pytest

from notebooks import make_standalone as standalone
from notebooks.make_standalone import HOME, STANDALONE, bundled, cell_text, digest, notebook


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the standalone notebook is made from."""
    shutil.copytree(
        HOME / "lazyorpo_lib", tmp_path / "lazyorpo_lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "notebooks").mkdir()
    for name in ("requirements.txt", "notebooks/LazyORPO.ipynb"):
        shutil.copy(HOME / name, tmp_path / name)
    return tmp_path


def test_the_committed_notebook_is_up_to_date():
    assert standalone.main(["--check"]) == 0, "run python notebooks/make_standalone.py"


def test_the_same_files_give_the_same_bytes(checkout):
    assert notebook(checkout) == notebook()


@pytest.mark.parametrize(
    "name", ["lazyorpo_lib/orpo/loss.py", "lazyorpo_lib/demo/pairs.jsonl", "requirements.txt"]
)
def test_any_changed_line_makes_it_stale(checkout, name):
    before = notebook(checkout)
    with open(checkout / name, "a") as file:
        file.write("# one more line\n")
    assert notebook(checkout) != before


def test_check_tells_a_stale_notebook(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(standalone, "STANDALONE", tmp_path / STANDALONE.name)
    assert standalone.main(["--check"]) == 1
    assert standalone.main([]) == 0
    assert standalone.main(["--check"]) == 0
    (tmp_path / STANDALONE.name).write_text("{}")
    assert standalone.main(["--check"]) == 1
    assert "is stale: run" in capsys.readouterr().out


def test_the_cell_writes_back_every_file_as_it_is(tmp_path, monkeypatch):
    odd = {"a.py": 'x = \'{}\'\n\n"""it\'s\\n {1} é\x0c\u2028 ∂"""\nlast', "b/empty.txt": ""}
    files = bundled() | odd
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr("sys.path", [])
    exec(cell_text(files), {})
    for name, text in files.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text, name


def test_the_notebook_is_the_main_one_with_a_folded_cell_more():
    main = json.loads((HOME / "notebooks" / "LazyORPO.ipynb").read_text(encoding="utf-8"))
    cells = json.loads(notebook())["cells"]
    (added,) = (cell for cell in cells if "lazyorpo-bundle" in cell["metadata"].get("tags", []))
    assert [cell for cell in cells if cell is not added] == main["cells"]
    assert cells.index(added) < [cell["id"] for cell in cells].index("setup")
    assert added["metadata"]["cellView"] == "form" and added["metadata"]["jupyter"]["source_hidden"]
    assert digest(bundled()) in "".join(added["source"])
