"""The panel: what wins over what, where a value came from, and that it works with and without ipywidgets."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.machine import this_machine
from lazyorpo_lib.notebook import panel as module
from lazyorpo_lib.notebook.panel import FIRST, GROUPS, SUGGESTIONS, Panel
from lazyorpo_lib.plan import beside
from lazyorpo_lib.plan.beside import Beside
from lazyorpo_lib.settings import DEFAULTS, FIELDS, Settings


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in FIELDS:
        monkeypatch.delenv(f"LAZYORPO_{name.upper()}", raising=False)


def now(panel, name):
    settings, sources, _ = panel.resolve()
    return getattr(settings, name), sources[name]


LAYERS = [  # preset, environment, cell, panel edit -> value and source of learning_rate
    (None, None, "auto", None, (2e-3, "preset demo")),
    ("phi2-article", None, "auto", None, (5e-6, "preset phi2-article")),
    ("phi2-article", "1e-5", "auto", None, (1e-5, "env")),
    (None, "1e-5", "auto", None, (1e-5, "env")),
    (None, "1e-5", 2e-5, None, (2e-5, "cell")),
    (None, "1e-5", "2e-5", None, (2e-5, "cell")),  # papermill's YAML gives text
    (None, None, " Auto ", None, (2e-3, "preset demo")),
    (None, None, 5e-4, None, (5e-4, "cell")),
    ("phi2-article", "1e-5", 2e-5, "3e-5", (3e-5, "panel")),
    (None, None, "auto", "auto", ("auto", "panel")),  # an edit counts even where it repeats the default
]


@pytest.mark.parametrize(("preset", "env", "cell", "edit", "expected"), LAYERS)
def test_the_stronger_layer_wins_and_is_named(monkeypatch, preset, env, cell, edit, expected):
    if env:
        monkeypatch.setenv("LAZYORPO_LEARNING_RATE", env)
    panel = Panel({"learning_rate": cell, "preset": preset or "auto"})
    if edit:
        panel.edit("learning_rate", edit)
    assert now(panel, "learning_rate") == expected


def test_where_no_preset_applies_the_default_yields_to_the_environment_alone(monkeypatch):
    notebook = {"base_model": "owner/model", "learning_rate": "auto"}
    assert now(Panel(notebook), "learning_rate") == ("auto", "default")
    monkeypatch.setenv("LAZYORPO_LEARNING_RATE", "1e-5")
    assert now(Panel(notebook), "learning_rate") == (1e-5, "env")


def test_an_edit_survives_running_the_cells_again():
    notebook = {"epochs": 1.0}
    Panel(notebook).edit("epochs", "3")
    notebook["epochs"] = 1.0  # the parameter cell is run again
    assert now(Panel(notebook), "epochs") == (3.0, "panel")


def test_a_cell_changed_after_an_edit_wins():
    notebook = {"epochs": "auto"}
    panel = Panel(notebook)
    panel.edit("epochs", "3")
    notebook["epochs"] = 2.0
    assert now(panel, "epochs") == (2.0, "cell")
    panel.edit("epochs", "4")
    assert now(panel, "epochs") == (4.0, "panel")
    notebook["epochs"] = "auto"  # back to the default: that is a change too
    assert now(panel, "epochs") == (1.0, "preset demo")


def test_a_variable_added_to_the_cell_after_an_edit_wins():
    notebook = {}
    Panel(notebook).edit("seed", 7)
    notebook["seed"] = 8
    assert now(Panel(notebook), "seed") == (8, "cell")


def test_an_edit_gives_way_only_in_its_own_setting():
    notebook = {"epochs": 1.0, "seed": 42}
    panel = Panel(notebook)
    panel.edit("epochs", 3)
    notebook["seed"] = 1
    assert now(panel, "epochs") == (3.0, "panel")


def test_a_table_under_the_name_of_a_setting_is_a_wrong_value_and_no_crash():
    class Table(list):
        def __eq__(self, other):
            raise ValueError("the truth of a table is ambiguous")

        __ne__ = __eq__

    panel = Panel({"dataset": Table()})
    assert panel.table().startswith("dataset is [], but must be text")
    assert panel.table().startswith("dataset is [], but must be text")


def test_reset_forgets_the_edits():
    panel = Panel({"epochs": 2.0})
    panel.edit("epochs", 3)
    panel.reset()
    assert now(panel, "epochs") == (2.0, "cell")


def test_other_variables_of_the_notebook_are_left_alone():
    assert now(Panel({"answer": 42, "np": object()}), "seed") == (42, "default")


def test_every_setting_is_in_the_panel_once():
    listed = [*FIRST, *(name for names in GROUPS.values() for name in names)]
    assert sorted(listed) == sorted(FIELDS)


def test_suggestions_begin_with_the_default():
    assert all(values[0] == DEFAULTS[name] for name, values in SUGGESTIONS.items())


def test_a_wrong_value_is_a_sentence_until_the_settings_are_asked_for():
    panel = Panel({"learning_rate": "fast"})
    assert panel.table().startswith("learning_rate is 'fast', but must be a number")
    with pytest.raises(UserError, match="learning_rate is 'fast'"):
        panel.resolve()


def test_a_misspelt_environment_variable_is_told(monkeypatch):
    monkeypatch.setenv("LAZYORPO_EPOCH", "2")
    panel = Panel({})
    with pytest.raises(UserError, match="did you mean epochs"):
        panel.resolve()


def test_the_estimate_is_asked_once_for_each_change_and_its_failure_is_text():
    asked = []

    def estimate(settings):
        asked.append(settings.epochs)
        if settings.epochs == 9:
            raise RuntimeError("no such model")
        return f"{settings.epochs:g} minutes"

    panel = Panel({}, estimate=estimate)
    panel.table(), panel.table()
    panel.edit("epochs", 5)
    assert panel.table().endswith("5 minutes")
    assert asked == [1.0, 5.0]
    panel.edit("epochs", 9)
    assert panel.table().endswith("No estimate: no such model")


def test_without_ipywidgets_the_panel_is_a_table(monkeypatch, capsys):
    monkeypatch.setattr(module, "ipywidgets", None)
    panel = Panel({"epochs": 2.0})
    panel.edit("seed", 3)
    panel.show()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FIELDS) + 1
    assert [line.split() for line in lines if line.startswith(("epochs ", "seed "))] == [
        ["epochs", "2.0", "cell"],
        ["seed", "3", "panel"],
    ]


def test_a_broken_ipywidgets_is_as_good_as_none(tmp_path):
    (tmp_path / "ipywidgets.py").write_text("raise AttributeError('made for another version')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, '.']; "
    code += "from lazyorpo_lib.notebook.panel import Panel; Panel({}).show()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("base_model "), done.stderr


# With widgets. These run under ipywidgets 7.7.1 and 8 alike.


@pytest.fixture
def form():
    pytest.importorskip("ipywidgets")
    return Panel({"epochs": 2.0})


@pytest.mark.filterwarnings("error")
def test_the_form_is_built_without_a_warning(form):
    assert set(form.inputs) == set(FIELDS)
    assert form.inputs["epochs"].value == "2.0"
    assert "cell" in form.notes["epochs"].value


def test_typing_into_the_form_is_an_edit(form):
    form.inputs["learning_rate"].value = "5e-6"
    assert now(form, "learning_rate") == (5e-6, "panel")
    assert "panel" in form.notes["learning_rate"].value


def test_moving_the_widgets_is_no_edit(form):
    form.inputs["preset"].value = "phi2-article"
    assert form.inputs["base_model"].value == "microsoft/phi-2"
    assert form.memory["edits"] == {"preset": "phi2-article"}


def test_a_wrong_entry_stands_in_the_form_as_text_and_is_escaped(form):
    form.inputs["learning_rate"].value = "<b>fast</b>"
    assert "&lt;b&gt;fast" in form.status.value and "<b>fast" not in form.status.value
    form.inputs["learning_rate"].value = "1e-4"
    assert now(form, "learning_rate") == (1e-4, "panel")
    assert "must be" not in form.status.value


def test_a_wrong_value_in_the_cell_does_not_break_the_form(form):
    for name, value in {
        "method": "magic",
        "liger_kernel": "perhaps",
        "seed": "x",
        "dataset": object(),
    }.items():
        assert "must be" in Panel({name: value}).status.value


def test_the_form_is_moved_to_a_changed_cell(form):
    form.inputs["epochs"].value = "3"
    form.namespace["epochs"] = 5.0
    assert Panel(form.namespace).inputs["epochs"].value == "5.0"


def test_reset_moves_the_form_back(form):
    form.inputs["epochs"].value = "3"
    form.box.children[-1].click()
    assert form.inputs["epochs"].value == "2.0"


def test_a_saved_form_stays_small(form):
    import ipywidgets

    ipywidgets.Widget.close_all()
    Panel({})
    state = str(ipywidgets.Widget.get_manager_state())
    assert 10_000 < len(state) < 100_000


def test_a_secret_typed_into_the_panel_is_not_kept_with_the_notebook():
    space = {}
    panel = Panel(space)
    panel.edit("dataset", "https://me:s3cretpass@host/pairs?sig=f00ba4")
    shown = repr(space) + panel.table() + repr(panel.inputs and {n: w.value for n, w in panel.inputs.items()})
    assert "s3cretpass" not in shown and "f00ba4" not in shown and "(token left out)" in shown


class Slow:
    """A planner that takes until `go` is set; what it was asked for, in order."""

    def __init__(self):
        self.asked, self.go = [], threading.Event()

    def __call__(self, settings):
        self.asked.append(settings.epochs)
        assert self.go.wait(20)
        return f"{settings.epochs:g} minutes"


def planned(panel):
    """The form's line once nothing is planned any more."""
    if thread := panel._planning:
        thread.join(60)
    return panel.status.value


def test_a_slow_plan_is_made_beside_a_form_that_goes_on_and_only_the_newest_edits_is_shown():
    pytest.importorskip("ipywidgets")
    slow, began = Slow(), time.monotonic()
    panel = Panel({"epochs": 2.0}, estimate=slow)
    while not slow.asked:
        time.sleep(0.01)
    for epochs in ("3", "4", "5"):
        panel.inputs["epochs"].value = epochs
        assert panel.status.value.endswith("<br>planning …</div>")
        assert now(panel, "epochs") == (float(epochs), "panel")
    assert time.monotonic() - began < 2
    slow.go.set()
    assert planned(panel).endswith("5 minutes</div>") and slow.asked == [2.0, 5.0]
    slow.go.clear()
    panel.inputs["epochs"].value = "6"
    assert "planning … (before this change: 5 minutes)" in panel.status.value
    panel.inputs["epochs"].value = "5"  # as it was
    assert panel.status.value.endswith("<br>5 minutes</div>")
    slow.go.set()
    assert planned(panel).endswith("5 minutes</div>")


def test_a_plan_that_comes_late_does_not_hide_what_is_wrong():
    pytest.importorskip("ipywidgets")
    slow = Slow()
    panel = Panel({}, estimate=slow)
    panel.inputs["epochs"].value = "many"
    slow.go.set()
    assert "must be a number" in planned(panel)
    panel.inputs["epochs"].value = "2"
    assert planned(panel).endswith("2 minutes</div>")


@pytest.mark.slow  # torch and all else is imported anew
def test_a_planner_beside_plans_or_says_in_a_sentence_why_not_and_ends_with_the_notebook(
    tmp_path, monkeypatch
):
    from lazyorpo_lib.demo.model import write_tiny

    write_tiny(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    planner = Beside()
    panel = Panel({"base_model": "base", "method": "lora"}, estimate=planner)
    line = panel.table().splitlines()[-2:]
    assert "GiB, about" in line[0] and "learning_rate 0.0005" in line[1]
    panel.edit("base_model", "./none")
    assert panel.table().splitlines()[-1].startswith("No estimate: base_model is './none'")
    planner.process.stdin.close()  # as when the notebook ends
    assert planner.process.wait(60) == 0


def quick(monkeypatch, *lines):
    """A planner beside whose process imports nothing, and runs `lines` for each question."""
    begin, _, _ = beside._BEGIN.partition("from lazyorpo_lib")
    loop = "".join(f"\n    {line}" for line in lines)
    monkeypatch.setattr(beside, "_BEGIN", f"{begin}for line in sys.stdin:{loop}")
    return Beside()


ANSWER = """print('["7 GiB", ""]', file=answers, flush=True)"""


def test_a_planner_beside_that_was_ended_begins_anew(monkeypatch):
    planner = quick(monkeypatch, ANSWER)
    assert planner(Settings()) == "7 GiB"
    first = planner.process
    assert planner(Settings()) == "7 GiB" and planner.process is first
    first.kill()
    assert planner(Settings()) == "7 GiB" and planner.process is not first
    planner.process.stdin.close()


def test_a_planner_beside_that_ends_at_each_question_is_a_sentence(monkeypatch):
    with pytest.raises(UserError, match="the process that plans has ended: use --plan"):
        quick(monkeypatch, "os._exit(1)")(Settings())


def test_an_answer_that_a_kill_tore_is_none(monkeypatch):
    planner = quick(monkeypatch, """answers.write('["7 G')""", "answers.flush()", "os._exit(1)")
    with pytest.raises(UserError, match="the process that plans has ended: use --plan"):
        planner(Settings())


def test_a_token_that_the_notebook_takes_back_is_gone_beside_it_too(monkeypatch, tmp_path):
    def asked(**hub):
        question = dict(settings=asdict(Settings()), machine=asdict(this_machine()), folder=str(tmp_path))
        return json.dumps(question | {"hub": hub})

    def estimate(settings, machine, brief):
        return SimpleNamespace(said=lambda: os.environ.get("HF_TOKEN"))

    def end(status):
        raise SystemExit(status)

    monkeypatch.setenv("HF_TOKEN", "of this test's process")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lazyorpo_lib.plan.planner.estimate", estimate)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([asked(HF_TOKEN="hf_x"), asked()])))
    answers = io.StringIO()
    with pytest.raises(SystemExit):
        beside.serve(answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [["hf_x", ""], [None, ""]]


def test_what_a_library_prints_is_no_answer_of_the_planner_beside(monkeypatch):
    planner = quick(monkeypatch, "print('from Python', flush=True)", "os.write(1, b'from C')", ANSWER)
    assert planner(Settings()) == planner(Settings()) == "7 GiB"
    planner.process.stdin.close()


PAIR = {"prompt": "Why?", "chosen": "Yes", "rejected": "No"}


def test_rows_in_a_variable_become_a_file_that_names_the_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = {"dataset": [PAIR]}
    name, source = now(Panel(notebook), "dataset")
    assert (tmp_path / name).is_file() and source == "cell" and notebook["dataset"] == name
    notebook["dataset"] = [PAIR]  # the parameter cell is run again
    assert now(Panel(notebook), "dataset") == (name, "cell")
    with pytest.raises(UserError, match="must be text: .* a list of dicts or a DataFrame"):
        Panel({"dataset": 5}).resolve()


@pytest.mark.parametrize("version", [7, 8])
def test_an_upload_is_written_beside_the_notebook_and_set(tmp_path, monkeypatch, version):
    monkeypatch.chdir(tmp_path)
    panel = Panel({})

    def upload(name, content):
        file = {"name": name, "content": content}
        panel.take_upload((file,) if version == 8 else {name: {"content": content, "metadata": {}}})

    upload("../my pairs.csv", memoryview(b"prompt,chosen,rejected\n"))
    assert now(panel, "dataset") == ("my pairs.csv", "panel")
    assert (tmp_path / "my pairs.csv").read_bytes() == b"prompt,chosen,rejected\n"
    upload("picture.png", b"x")
    assert "is no table of pairs" in panel.status.value and not (tmp_path / "picture.png").exists()
    upload("my pairs.csv", b"other")
    assert "is here already" in panel.status.value
    assert (tmp_path / "my pairs.csv").read_bytes() == b"prompt,chosen,rejected\n"
    assert now(panel, "dataset") == ("my pairs.csv", "panel")
