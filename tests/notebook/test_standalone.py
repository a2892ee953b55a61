"""The standalone notebook: up to date, the same bytes each time, and runnable where there is nothing else."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from notebooks import make_standalone as standalone
from notebooks.make_standalone import HOME, STANDALONE, bundled, cell_texts, digest, notebook, quoted


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


def run_cells(files, folder, monkeypatch):
    """Runs the two cells as a kernel would, in `folder`; gives what they have defined."""
    known = {}
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(folder))
    monkeypatch.setattr("sys.path", [])
    for text in cell_texts(files).values():
        exec(text, known)
    return known


def test_the_cells_write_back_every_file_as_it_is(tmp_path, monkeypatch):
    odd = {"a.py": 'x = \'{}\'\n\n"""it\'s\\n {1} é\x0c\u2028 ∂"""\nlast', "b/empty.txt": ""}
    files = bundled() | odd
    run_cells(files, tmp_path, monkeypatch)
    for name, text in files.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize("text", ["x = '''y'''", "a\r\n", "it's'", "\\"])
def test_what_a_raw_string_cannot_hold_is_refused_and_not_changed(text):
    with pytest.raises(ValueError, match=r"odd\.py holds"):
        quoted({"odd.py": text})


def test_the_method_is_a_cell_of_its_own_to_be_read_as_it_stands_in_its_files():
    files = bundled()
    method, rest = cell_texts(files).values()
    ours = {name for name in files if name.startswith("lazyorpo_lib/orpo/")}
    assert "lazyorpo_lib/orpo/loss.py" in ours
    for name, text in files.items():
        assert (text in method, text in rest) == (name in ours, name not in ours) or not text, name
    assert "LazyORPO's repository" in method.splitlines()[1]


def test_other_processes_of_the_notebook_find_the_package_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    run_cells(bundled(), tmp_path / "bundle", monkeypatch)
    assert os.environ["PYTHONPATH"] == f"before{os.pathsep}{tmp_path / 'bundle'}"
    (tmp_path / "elsewhere").mkdir()
    where = "import lazyorpo_lib.__main__ as m; print(m.__file__); m.console()"
    for words, said in {("chat", "--help"): "usage: lazyorpo chat RUN", ("--help",): "--probe"}.items():
        command = [sys.executable, "-c", where, *words]
        done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
        assert done.stdout.startswith(str(tmp_path / "bundle")) and said in done.stdout + done.stderr


def test_only_what_a_cell_can_use_is_carried():
    names = bundled()
    assert not [name for name in names if "recipes" in name or name.endswith("README.md")]
    for name in ("results/compare.py", "results/ollama.py", "trials/probe.py", "demo/pairs.jsonl"):
        assert f"lazyorpo_lib/{name}" in names
    assert "requirements.txt" in names


# The repository's public address.


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A copy of every file that names the address, and of what is needed to write the standalone notebook."""
    for name in (*standalone.PLACES, "notebooks/make_standalone.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(HOME / name, tmp_path / name)
    return tmp_path


def texts(home):
    return {name: (home / name).read_text(encoding="utf-8") for name in standalone.PLACES}


def test_all_places_agree_on_the_address():
    for name, text in texts(HOME).items():
        assert standalone.placed(text, standalone.REPOSITORY) == text, name


def test_an_address_is_set_everywhere_and_changed_and_taken_away_again(places):
    before, own = texts(places), (places / "notebooks/make_standalone.py").read_text()
    standalone.set_repository("some-one/lazy.orpo", places)
    first = texts(places)
    colab = "https://colab.research.google.com/github/some-one/lazy.orpo/blob/main/notebooks/LazyORPO_standalone.ipynb"
    for name in ("README.md", "notebooks/LazyORPO.ipynb"):
        assert (
            colab in first[name]
            and "kaggle.com/kernels/welcome?src=https://github.com/some-one" in first[name]
        )
    assert "git clone https://github.com/some-one/lazy.orpo" in first["docs/running.md"]
    assert not [name for name, text in first.items() if "<address of this repository>" in text]
    assert 'REPOSITORY = "some-one/lazy.orpo"' in (places / "notebooks/make_standalone.py").read_text()
    cells = json.loads(first["notebooks/LazyORPO.ipynb"])["cells"]
    assert (
        colab in "".join(cells[0]["source"])
        and cells[1:] == json.loads(before["notebooks/LazyORPO.ipynb"])["cells"][1:]
    )
    standalone.set_repository("other/name", places)
    assert not [name for name, text in texts(places).items() if "some-one" in text]
    standalone.set_repository("", places)
    assert texts(places) == before and (places / "notebooks/make_standalone.py").read_text() == own


def test_without_an_address_the_readme_says_how_to_open_the_notebook():
    if standalone.REPOSITORY:
        pytest.skip("it has an address")
    text = (HOME / "README.md").read_text(encoding="utf-8")
    assert "badge" not in text and "Upload notebook" in text and "fork" in text and "clone" in text


@pytest.mark.parametrize(
    "given", [[], ["name"], ["a/b/c"], ["https://github.com/a/b"], ["a b/c"], ["a/b", "c"]]
)
def test_what_is_no_address_is_one_sentence_and_changes_nothing(given, monkeypatch, capsys):
    monkeypatch.setattr(standalone, "set_repository", None)
    monkeypatch.setattr(standalone, "STANDALONE", None)
    assert standalone.main(["--repo", *given]) == 2
    assert "owner/name" in capsys.readouterr().out


def test_the_notebook_is_the_main_one_with_two_folded_cells_more():
    main = json.loads((HOME / "notebooks" / "LazyORPO.ipynb").read_text(encoding="utf-8"))
    cells = json.loads(notebook())["cells"]
    added = [cell for cell in cells if "lazyorpo-bundle" in cell["metadata"].get("tags", [])]
    assert [cell for cell in cells if cell not in added] == main["cells"]
    ids = [cell["id"] for cell in cells]
    assert ids[ids.index("method") :][:3] == ["method", "bundle", "setup"]
    assert all(
        c["metadata"]["cellView"] == "form" and c["metadata"]["jupyter"]["source_hidden"] for c in added
    )
    assert [c["source"][0][:7] for c in added] == ["#@title"] * 2
    assert digest(bundled()) in "".join(added[1]["source"])
