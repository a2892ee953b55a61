"""The notebooks: clean on disk, in step with the settings, and run from top to bottom on the tiny model."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from lazyorpo_lib.folder import read_rows
from lazyorpo_lib.notebook.panel import SUGGESTIONS
from lazyorpo_lib.settings import DEFAULTS, FIELDS
from tests.conftest import PLANTED, files_holding

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ("LazyORPO", "LazyORPO_standalone", "orpo_by_hand", "orpo_vs_sft_dpo", "make_pairs", "orpo_in_class")
MAIN, STANDALONE, BY_HAND, VERSUS, PAIRS, CLASS = ALL = [NOTEBOOKS / f"{n}.ipynb" for n in NAMES]
CELL_LINES, PARAMETER_LINES = 12, 15
every_notebook = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_of(path):
    return {c["id"]: "".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "code"}


# On disk.


def test_these_are_all_the_notebooks():
    assert sorted(NOTEBOOKS.glob("*.ipynb")) == sorted(ALL)


@every_notebook
def test_it_is_valid_with_readable_ids_and_the_plain_kernel(path):
    nb = read(path)
    nbformat.validate(nbformat.from_dict(nb))
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in nb["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(
        re.fullmatch(r"[a-z][a-z0-9-]{2,20}", i) and not re.fullmatch(r"[0-9a-f-]+", i) for i in ids
    ), ids
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert nb["metadata"]["language_info"] == {"name": "python"}
    assert "widgets" not in nb["metadata"]


@every_notebook
def test_outputs_are_saved_only_where_they_are_compared(path):
    for cell in read(path)["cells"]:
        if cell["cell_type"] == "code":
            ran = cell["execution_count"] is not None
            assert ran == (path == BY_HAND), cell["id"]
            assert ran or not cell["outputs"], cell["id"]


@every_notebook
def test_it_holds_no_token_and_asks_for_nothing(path):
    assert not re.search(r"hf_[A-Za-z0-9]{20,}", path.read_text(encoding="utf-8"))
    for name, code in code_of(path).items():
        if name not in ("method", "bundle"):
            assert not re.search(r"\binput\(|getpass|notebook_login|^\s*[!%]", code, re.M), name


@every_notebook
def test_cells_are_short_and_hold_no_logic(path):
    for name, code in code_of(path).items():
        tree = ast.parse(code)
        if name in ("method", "bundle"):
            continue
        assert len(code.splitlines()) <= (PARAMETER_LINES if name == "params" else CELL_LINES), name
        assert not any(isinstance(n, ast.ClassDef | ast.While | ast.Try) for n in ast.walk(tree)), name
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            assert path in (BY_HAND, CLASS) and function.end_lineno - function.lineno <= 3, (
                name,
                function.name,
            )


def test_one_heading_and_numbered_steps():
    prose = ["".join(c["source"]) for c in read(MAIN)["cells"] if c["cell_type"] == "markdown"]
    headings = re.findall(r"^(#+) (.*)$", "\n".join(prose), re.M)
    assert [level for level, _ in headings].count("#") == 1
    steps = [text for level, text in headings if level == "##"]
    assert [text.split(".")[0] for text in steps[:-1]] == [str(i + 1) for i in range(len(steps) - 1)]


# The parameter cell, by Colab's grammar: `name = literal  #@param [options] {type: …}` on one line.

PARAM = re.compile(r"(?P<name>[a-z_]+) = (?P<literal>.+?)  #@param (?P<options>\[.*\])? ?(?P<form>\{.*\})?")
INPUTS = {"string": str, "number": float, "integer": int, "boolean": bool}


def form_of(text):
    """Colab's `{type:"raw", allow-input: true}`, whose keys need no quotes."""
    return json.loads(re.sub(r"([{,]\s*)([a-z-]+)\s*:", r'\1"\2":', text or "{}"))


def parameter_lines():
    title, *lines = code_of(MAIN)["params"].splitlines()
    assert title.startswith("#@title ")
    return lines


def test_the_parameter_cell_is_tagged_and_alone():
    tagged = [c["id"] for c in read(MAIN)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert tagged == ["params"]


def test_the_four_of_the_article_come_first():
    names = [line.split(" = ")[0] for line in parameter_lines()]
    assert names[:4] == list(FIELDS)[:4] == ["base_model", "dataset", "epochs", "learning_rate"]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("line", parameter_lines(), ids=lambda line: line.split(" = ")[0])
def test_a_parameter_is_in_colabs_grammar_and_holds_its_default(line):
    found = PARAM.fullmatch(line)
    assert found, line
    name, form = found["name"], form_of(found["form"])
    (statement,) = ast.parse(line).body
    assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
    value = ast.literal_eval(found["literal"])
    assert value == DEFAULTS[name] and type(value) is type(DEFAULTS[name])
    if found["options"]:
        assert form.keys() <= {"type", "allow-input"} and form.get("type", "string") in ("string", "raw")
        options = json.loads(found["options"])
        values = [ast.literal_eval(o) for o in options] if form.get("type") == "raw" else options
        assert value in values
        if choices := FIELDS[name].metadata["choices"]:
            assert tuple(options) == choices and "allow-input" not in form
        else:
            assert form["allow-input"] is True
        assert name not in SUGGESTIONS or tuple(options) == SUGGESTIONS[name]
    else:
        assert form.keys() == {"type"} and INPUTS[form["type"]] is FIELDS[name].type


def further():
    """The lines of cells that do something only when asked: (cell, its code)."""
    return {name: code for name, code in code_of(MAIN).items() if "show.when(" in code}


def test_what_takes_a_run_further_is_asked_for_by_boxes_that_are_off():
    code = "\n".join(further().values())
    for what in ("ask_both", "compare", "probe", "share.merge", "share.export_gguf", "share.ollama",
                 "share.archive", "share.push", "share.lines"):  # fmt: skip
        assert re.search(rf"show\.when\((\w+), {re.escape(what)}, ", code), what
    boxes = re.findall(r"show\.when\((\w+),", code)
    assert len(set(boxes)) == len(boxes)
    for box in boxes:
        assert re.search(rf'^{box} = False  #@param {{type:"boolean"}}$', code, re.M), box


def test_every_line_of_a_form_is_in_colabs_grammar():
    for path in (MAIN, VERSUS):
        for name, code in code_of(path).items():
            for line in (line for line in code.splitlines() if "#@param" in line):
                assert PARAM.fullmatch(line), (name, line)
                form_of(PARAM.fullmatch(line)["form"])


def test_no_other_cell_assigns_a_setting():
    for path in (MAIN, STANDALONE):
        for cell, code in code_of(path).items():
            stored = {
                n.id
                for n in ast.walk(ast.parse(code))
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            imported = {
                a.asname or a.name
                for n in ast.walk(ast.parse(code))
                if isinstance(n, ast.ImportFrom)
                for a in n.names
            }
            assert cell == "params" or not (stored | imported) & FIELDS.keys(), cell


def test_the_first_cell_is_the_same_in_every_notebook_that_is_opened_beside_the_library():
    assert len({code_of(path)["setup"] for path in (MAIN, VERSUS, PAIRS, CLASS)}) == 1


@pytest.mark.parametrize("fault", ["no parent", "not ours to read", "gone"])
@pytest.mark.parametrize("path", [MAIN, VERSUS, PAIRS, CLASS], ids=lambda path: path.stem)
def test_the_first_cell_needs_no_parent_process(path, fault, monkeypatch):
    def fails(process, *given):
        raise {"gone": psutil.ZombieProcess}.get(fault, psutil.AccessDenied)(process.pid)

    here = psutil.Process()
    monkeypatch.setattr(psutil.Process, "parent", lambda process: None if fault == "no parent" else here)
    monkeypatch.setattr(psutil.Process, "cmdline", fails)
    monkeypatch.setattr(psutil.Process, "parents", lambda process: [p for p in [process.parent()] if p])
    monkeypatch.setattr(sys, "path", list(sys.path))
    cell, seen = code_of(path)["setup"].split("from lazyorpo_lib")[0], {}
    exec(cell, seen)
    assert seen["opened"] == [] and Path.cwd() in seen["homes"]


# Run on the tiny model, each in a kernel of its own.

ENVIRONMENT = {
    "LAZYORPO_PRESET": "tiny", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
ARTIFACTS = {
    "settings.json", "data_report.json", "dropped.jsonl", "history.jsonl", "live.png", "summary.json",
    "model", "README.md",
}  # fmt: skip


def execute(path, *arguments, cwd, **environment):
    """`jupyter execute`, or papermill where arguments are given; the executed notebook."""
    done = cwd / f"executed-{len(list(cwd.glob('executed-*')))}.ipynb"
    command = (
        ["papermill", "--no-progress-bar", path, done, *arguments]
        if arguments
        else ["jupyter", "execute", path, f"--output={done}"]
    )
    env = (
        {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | ENVIRONMENT
        | environment
        | {"HF_TOKEN": PLANTED}
    )
    ran = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert not files_holding(cwd, PLANTED)
    return nbformat.read(done, 4)


def outputs(notebook, cell_id):
    (cell,) = (c for c in notebook.cells if c.id == cell_id)
    return cell.outputs


def printed(notebook, cell_id):
    return "".join(o.text for o in outputs(notebook, cell_id) if o.output_type == "stream")


@pytest.mark.slow
def test_run_all_trains_shows_and_is_finished_the_second_time(tmp_path):
    """The first time by papermill from another folder, with flags and YAML, where there is papermill."""
    run, has_papermill = tmp_path / "run", importlib.util.find_spec("papermill")
    yaml = f"{{learning_rate: 5e-6, output_dir: {run}, max_steps: 6}}"
    flags = ["-p", "epochs", "0.5", "-p", "max_minutes", "9", "-y", yaml] if has_papermill else []
    given = {"epochs": 0.5, "max_minutes": 9.0, "learning_rate": 5e-6, "max_steps": 6}
    same = {f"LAZYORPO_{name.upper()}": str(value) for name, value in given.items()}
    same |= {"LAZYORPO_OUTPUT_DIR": str(run)}
    first = execute(MAIN, *flags, cwd=tmp_path, **{} if flags else same)
    kept = json.loads((run / "settings.json").read_text())
    for name, value in given.items():
        assert (kept["settings"][name], kept["sources"][name]) == (value, "cell" if flags else "env")
    assert ARTIFACTS <= {item.name for item in run.iterdir()}
    assert (run / "model" / "adapter_model.safetensors").is_file()
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 6 and all(loss == loss for loss in losses)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    assert json.loads((run / "settings.json").read_text())["sources"]["preset"] == "env"
    pictures = [o for o in outputs(first, "train") if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    assert (tmp_path / "executed-0.ipynb").stat().st_size < 400_000

    again = execute(MAIN, cwd=tmp_path, **same)
    assert "finished" in printed(again, "model")
    assert not [o for cell in again.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert len((run / "history.jsonl").read_text().splitlines()) == len(rows)
    for shown in ("answers", "held-out"):
        assert [o.data for o in outputs(again, shown)] == [o.data for o in outputs(first, shown)]


@pytest.mark.slow
def test_an_interrupt_in_a_kernel_ends_the_step_saves_and_the_cells_below_still_run(tmp_path, capsys):
    from jupyter_client.manager import start_new_kernel

    from lazyorpo_lib.results.live import show_progress

    folder, settings = (
        tmp_path / "run",
        dict(preset="tiny", max_steps=50_000, max_pairs=0, save_every_steps=0, eval_pairs=0),
    )
    code = f"""
import signal, sys
sys.path[:0] = [{str(NOTEBOOKS.parent)!r}]
from lazyorpo_lib.run import Run
from lazyorpo_lib.settings import resolve
run = Run(*resolve([("test", {settings | {"output_dir": str(folder)}!r})])[:2])
run.load_pairs()
run.load_model()
handler = signal.getsignal(signal.SIGINT)
run.train()
"""
    below = "summary = run.finish()\nassert signal.getsignal(signal.SIGINT) is handler"
    below += ' and "SIGINT" in summary["why"]'
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path), env=os.environ | ENVIRONMENT)
    try:
        asked = client.execute(code), client.execute(below)
        deadline = time.monotonic() + 120
        while len(read_rows(folder / "history.jsonl")) < 3:
            assert time.monotonic() < deadline and manager.is_alive()
            time.sleep(0.1)
        show_progress(folder)  # as a second kernel would, while training goes on
        manager.interrupt_kernel()
        said = iter(
            lambda: client.get_shell_msg(timeout=60), None
        )  # a kernel slow to start may answer its first question twice
        replies = [next(r for r in said if r["parent_header"]["msg_id"] in asked) for _ in asked]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert [(r["parent_header"]["msg_id"], r["content"]["status"]) for r in replies] == [
        (i, "ok") for i in asked
    ], replies
    (checkpoint,) = folder.glob("checkpoint-*")
    steps = [row["step"] for row in read_rows(folder / "history.jsonl")]
    assert steps == list(range(1, int(checkpoint.name.split("-")[1]) + 1)) and (folder / "model").is_dir()
    assert re.match(r"Step \d+, written \d s ago", capsys.readouterr().out)


@pytest.mark.slow
def test_papermill_lists_the_parameters(tmp_path):
    pytest.importorskip("papermill")
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", str(MAIN)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert all(line.split(" = ")[0] + ": " in done.stdout for line in parameter_lines()), done.stdout


@pytest.mark.slow
def test_the_standalone_notebook_runs_where_there_is_nothing_else(tmp_path):
    shutil.copy(STANDALONE, tmp_path)
    run = tmp_path / "run"
    done = execute(
        tmp_path / STANDALONE.name, cwd=tmp_path, LAZYORPO_OUTPUT_DIR=str(run), LAZYORPO_MAX_STEPS="2"
    )
    assert "digest" in printed(done, "bundle")
    assert ARTIFACTS <= {item.name for item in run.iterdir()}
    for name in further():  # nobody asked
        assert printed(done, name) == "" and not (run / "merged").exists()


@pytest.mark.slow
def test_in_the_standalone_notebook_every_box_can_be_ticked_without_a_terminal(tmp_path):
    """All but the push, which needs a hub; and the command line behind the first cells."""
    content, run = read(STANDALONE), tmp_path / "run"
    for cell in content["cells"]:
        text = "".join(cell["source"])
        if "show.when(" in text and cell["cell_type"] == "code":
            text = text.replace(" = False  #@param", " = True  #@param").replace(
                "push_now = True", "push_now = False"
            )
            text = text.replace('other_run = ""', f"other_run = {str(tmp_path / 'other')!r}")
            cell["source"] = text.splitlines(keepends=True)
    last = {"cell_type": "code", "id": "terminal", "execution_count": None, "metadata": {}, "outputs": []}
    content["cells"] += [last | {"source": ["!python -m lazyorpo_lib merge --help"]}]
    (tmp_path / "ticked.ipynb").write_text(json.dumps(content))
    from lazyorpo_lib.run import execute as execute_run
    from lazyorpo_lib.settings import resolve

    settings = {"preset": "tiny", "max_steps": 1, "output_dir": str(tmp_path / "other")}
    execute_run(*resolve([("test", settings)])[:2], show=lambda text: None)
    done = execute(
        tmp_path / "ticked.ipynb", cwd=tmp_path, LAZYORPO_OUTPUT_DIR=str(run), LAZYORPO_MAX_STEPS="2"
    )
    assert (run / "probe" / "probe.json").is_file() and "recommended" in str(outputs(done, "probe")).lower()
    assert (run / "merged" / "Modelfile").is_file() and (run / "run.zip").is_file()
    assert "ollama create my-model" in printed(done, "export") and "gguf" in printed(done, "export")
    assert "vllm serve" in printed(done, "take-home")
    assert "Results on held-out pairs" in str(outputs(done, "compare-runs"))
    assert "Name three fruits." in str(outputs(done, "ask-both"))
    assert "usage: lazyorpo merge RUN" in printed(done, "terminal")


@pytest.mark.slow
def test_pairs_are_made_in_a_notebook_and_shown_to_be_clicked_on(tmp_path):
    pytest.importorskip("papermill")
    for _ in range(2):  # the second time they are there
        done = execute(PAIRS, "-p", "base_model", "tiny-random", cwd=tmp_path)  # by papermill: it runs there
    rows = read_rows(tmp_path / "pairs.jsonl")
    assert len(rows) == 8 and rows[0]["from"]["base_model"] == "tiny-random"
    assert "is there already" in printed(done, "make") and "VBox" in str(outputs(done, "clicks"))
