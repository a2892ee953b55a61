"""live.py: when it draws, what it draws, how it is shown, and that it never stops a run."""

import base64
import io
import logging
import os
import subprocess
import sys
import types

import matplotlib.image
import numpy as np
import pytest

from lazyorpo_lib.folder import append_row
from lazyorpo_lib.results import live, reading


def row(step, part=0.0, prefix=""):
    """A history row after this part (0 to 1) of a healthy run."""
    curves = dict(
        nll=1.6 - 0.5 * part,
        or_loss=0.69 - 0.6 * part,
        log_odds_chosen=-1 + part,
        log_odds_rejected=-1 - 2 * part,
        log_odds_ratio=3 * part,
        accuracy=0.5 + 0.5 * part,
    )
    only_in_training = {} if prefix else {"odds_gradient_share": 0.5 - 0.4 * part}
    return {"step": step} | {prefix + name: value for name, value in curves.items()} | only_in_training


def healthy(steps):
    rows = [row(step, step / steps) for step in range(1, steps + 1)]
    return [row(0, 0, "eval_"), *rows, row(steps, 1, "eval_")]


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Shown:
    """Stands for IPython's display: keeps every call, hands out one handle a call."""

    def __init__(self):
        self.new, self.updates = [], []

    def __call__(self, bundle, **options):
        self.new.append((bundle, options))
        return types.SimpleNamespace(update=lambda bundle, **options: self.updates.append((bundle, options)))

    @property
    def count(self):
        return len(self.new) + len(self.updates)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def shown(monkeypatch):
    """A notebook kernel, as live.py sees it."""
    import IPython

    fake, shell = Shown(), types.SimpleNamespace(kernel=object())
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", fake)
    return fake


@pytest.fixture
def no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)


@pytest.fixture
def pictures_cost(monkeypatch, clock):
    """Replace the picture by one that costs this many seconds of the clock."""

    def set_cost(seconds):
        def draw(*_, **__):
            clock.now += seconds
            return b"png"

        monkeypatch.setattr(live, "draw", draw)

    return set_cost


def train(plot, clock, rows, seconds_each):
    for one in rows:
        clock.now += seconds_each
        plot.update(one)


def pixels(png):
    return (matplotlib.image.imread(io.BytesIO(png), format="png") * 255).round().astype(int)


def has_color(png, name, tolerance=12):
    wanted = [int(name[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels(png)[..., :3] - wanted).max(-1) <= tolerance).sum() > 100)


def figure(rows, title="", status=""):
    """The picture as matplotlib has it: the large axes first, then the small ones from top to bottom."""
    with matplotlib.rc_context(live.STYLE):
        drawn = live._figure(rows, title, status)
        drawn.canvas.draw()
    return drawn


def test_first_and_last_are_always_drawn(tmp_path, clock, shown, pictures_cost):
    pictures_cost(50.0)  # far above its share of the time
    plot = live.LivePlot(tmp_path / "live.png", clock=clock)
    train(plot, clock, healthy(10), 0.1)
    assert plot.drawn == 1
    plot.close()
    assert plot.drawn == 2 and plot.cost_seconds == 100.0
    assert (tmp_path / "live.png").read_bytes() == b"png"


def test_between_them_it_keeps_the_gap(clock, shown, pictures_cost):
    pictures_cost(0.0)
    plot = live.LivePlot(None, min_seconds=2.0, clock=clock)
    train(plot, clock, healthy(100), 0.5)
    assert plot.drawn == 1 + 101 // 4


def test_drawing_keeps_below_its_share_of_the_time(clock, shown, pictures_cost):
    pictures_cost(0.5)
    plot = live.LivePlot(None, min_seconds=0.0, max_share=0.03, clock=clock)
    train(plot, clock, [row(0, 0, "eval_")], 1000.0)  # an evaluation before training gives no time to draw in
    start = clock.now
    for step in range(2000):
        clock.now += 0.5
        plot.update(row(step))
        assert plot.drawn == 1 or plot.cost_seconds <= 0.03 * (clock.now - start)
    plot.close()
    assert 0.02 * (clock.now - start) <= plot.cost_seconds <= 0.03 * (clock.now - start)


def test_eight_hours_are_fewer_pictures_than_nbval_can_take(clock, shown, pictures_cost):
    pictures_cost(0.01)
    plot = live.LivePlot(None, clock=clock)
    train(plot, clock, (row(step) for step in range(8 * 3600)), 1.0)
    assert 500 < plot.drawn < 1500  # 1,500 passed in one cell, 2,500 overflowed its socket


def test_ten_thousand_rows_in_no_time_are_two_pictures(clock, shown, pictures_cost):
    pictures_cost(0.0)
    plot = live.LivePlot(None, clock=clock)
    train(plot, clock, healthy(10_000), 0.0001)
    plot.close()
    assert shown.count == 2


def test_a_notebook_gets_one_handle_constant_text_and_a_fixed_size(tmp_path, clock, shown):
    plot = live.LivePlot(tmp_path / "live.png", clock=clock, max_share=1.0)
    train(plot, clock, healthy(4), 5.0)
    plot.close()
    assert len(shown.new) == 1 and len(shown.updates) == plot.drawn - 1 > 2
    assert shown.new[0][1].pop("display_id") is True
    bundles, options = zip(*shown.new, *shown.updates, strict=True)
    assert {bundle["text/plain"] for bundle in bundles} == {"LazyORPO live plot"}
    assert all(one == {"raw": True, "metadata": live.METADATA} for one in options)
    assert all(pixels(bundle["image/png"]).shape == (832, 1600, 4) for bundle in bundles)
    assert (tmp_path / "live.png").read_bytes() == bundles[-1]["image/png"]


@pytest.mark.parametrize("inside", ["plain Python", "terminal IPython"])
def test_without_a_kernel_it_only_writes_a_file(tmp_path, clock, shown, pictures_cost, monkeypatch, inside):
    pictures_cost(0.0)
    if inside == "plain Python":
        monkeypatch.delitem(sys.modules, "IPython")
    if inside == "terminal IPython":
        monkeypatch.setattr(sys.modules["IPython"], "get_ipython", object)
    plot = live.LivePlot(tmp_path / "live.png", clock=clock)
    train(plot, clock, [row(step) for step in range(300)], 1.0)
    plot.close()
    assert shown.count == 0 and 300 // 30 <= plot.drawn <= 300 // 30 + 2


def test_with_neither_file_nor_kernel_nothing_is_drawn(clock, no_notebook, pictures_cost):
    pictures_cost(1.0)
    plot = live.LivePlot(None, clock=clock)
    train(plot, clock, healthy(10), 10.0)
    plot.close()
    assert plot.drawn == 0


@pytest.mark.parametrize("broken", ["png", "row", "disk", "display"])
def test_an_error_is_logged_once_and_never_leaves(tmp_path, clock, shown, monkeypatch, caplog, broken):
    path, bad = tmp_path / "live.png", row(1)
    if broken == "png":
        monkeypatch.setattr(live, "_figure", lambda *_: 1 / 0)
    elif broken == "row":
        bad = {"nll": "no step here"}
    elif broken == "disk":
        path = tmp_path / "no such folder" / "live.png"
    else:
        monkeypatch.setattr(sys.modules["IPython"].display, "display", lambda *_, **__: 1 / 0)
    plot = live.LivePlot(path, clock=clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            plot.update(bad)
        plot.close()
    assert len(caplog.records) == 1 and "training goes on" in caplog.text


def test_an_interrupt_while_drawing_is_the_callers(tmp_path, clock, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "_figure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        live.LivePlot(tmp_path / "live.png", clock=clock).update(row(1))


def test_the_time_left_is_told_from_the_training_steps_alone(clock, shown, pictures_cost):
    pictures_cost(0.0)
    plot = live.LivePlot(None, total_steps=500, clock=clock)
    train(
        plot, clock, [row(0, 0, "eval_")], 1000.0
    )  # the evaluation before training, and a resume at step 100
    train(plot, clock, [row(step) for step in range(100, 201)], 0.6)
    assert plot._status(clock.now, final=False) == "step 200 of 500 · 3 min left"
    assert plot._status(clock.now, final=True) == "step 200 of 500 · 18 min"


def test_both_curves_are_in_the_picture_in_their_own_colors(tmp_path):
    png = live.draw(healthy(50), tmp_path / "live.png", title="tiny")
    assert (tmp_path / "live.png").read_bytes() == png
    assert 10_000 < len(png) <= 80_000
    assert has_color(png, live.CHOSEN) and has_color(png, live.REJECTED)
    assert not has_color(live.draw([]), live.CHOSEN)


def test_the_picture_reads_on_any_background(tmp_path):
    image = pixels(live.draw(healthy(50)))
    assert image[0, 0, 3] == 0  # outside the rounded corner
    inside = image[20:-20, 20:-20]
    assert (inside[..., 3] > 250).all() and inside[0, 0, :3].min() > 240


def test_ten_thousand_rows_are_at_most_six_hundred_points_a_line():
    both = [row(i + 1, i / 10_000, prefix) for i in range(10_000) for prefix in ("", "eval_")]
    main, *small = figure(both).axes
    lines = [line for axes in (main, *small) for line in axes.get_lines() if len(line.get_xdata()) != 2]
    assert (
        len(lines) == 6 * 3 and len(lines[-4].get_xdata()) == 0
    )  # the odds term's share is training's alone
    for x in (line.get_xdata() for line in lines if len(line.get_xdata())):
        assert 300 <= len(x) <= 600 and x[-1] == 10_000
    chosen = main.get_lines()[0].get_ydata()
    assert np.allclose(chosen, np.linspace(-1, 0, len(chosen)), atol=0.01)  # averaged, not left out


@pytest.mark.parametrize("objective,panels", [("orpo", 4), ("sft", 3)])
def test_the_odds_terms_share_of_the_gradient_is_drawn_where_it_is_known(objective, panels):
    without = set() if objective == "orpo" else {"odds_gradient_share"}
    rows = [{name: value for name, value in one.items() if name not in without} for one in healthy(20)]
    _, *small = figure(rows).axes
    boxes = [axes.get_position() for axes in small]
    assert len(small) == panels and all(
        upper.y0 > lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False)
    )
    assert [axes.xaxis.label.get_visible() for axes in small] == [False] * (panels - 1) + [True]
    if objective == "orpo":
        assert [label.get_text() for label in small[2].texts] == ["0.11"]
        assert small[2].get_title("left") == "odds term (share of gradient)"


def test_averaging_passes_over_missing_numbers(monkeypatch):
    monkeypatch.setattr(live, "MAX_POINTS", 2)
    values = (1.0, None, 3.0, float("nan"), 5.0, 8.0)
    rows = [{"step": step, "nll": value, "or_loss": None} for step, value in enumerate(values, 1)]
    assert live._points(rows, "nll").tolist() == [[3, 2.0], [6, 6.5]]
    assert live._points(rows, "or_loss").shape == live._points(rows, "accuracy").shape == (0, 2)


def test_smoothing_keeps_lines_straight_and_has_no_lag():
    assert np.allclose(live._smooth(np.full(50, 2.0)), 2.0)
    slope = live._smooth(np.arange(100.0))
    assert np.allclose(slope[10:-10], np.arange(100.0)[10:-10])
    for few in range(4):
        assert len(live._smooth(np.arange(float(few)))) == few


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_skipped(bad):
    rows = healthy(30)
    rows[5]["log_odds_chosen"] = rows[9]["nll"] = rows[-1]["eval_accuracy"] = bad
    assert has_color(live.draw(rows), live.CHOSEN)
    assert len(live.draw([{"step": 1, "nll": bad, "log_odds_chosen": bad}])) > 5000


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0, 0, "eval_")],
        [row(0, 0, "eval_"), row(9, 1, "eval_")],
        [row(1)],
        [row(1), row(2)],
        [{"step": 3}],
    ],
    ids=["none", "one evaluation", "two evaluations", "one step", "two steps", "no curves"],
)
def test_short_histories_are_drawn(rows):
    assert len(live.draw(rows)) > 2000


def test_one_outlier_does_not_flatten_the_curves():
    rows = [one | ({"log_odds_rejected": -500.0} if one["step"] == 100 else {}) for one in healthy(200)]
    assert figure(rows).axes[0].get_ylim()[0] > -60


@pytest.mark.parametrize("apart", [0.0, 0.01, 0.2, 5.0])
@pytest.mark.parametrize("level", [-3.0, 0.0, 3.0])
def test_labels_never_touch_and_stay_inside(apart, level):
    rows = []
    for step in range(20):
        ends = {"log_odds_chosen": level * step / 19 + apart, "log_odds_rejected": level * step / 19}
        rows.append(row(step) | ends)
    main = figure(rows).axes[0]
    boxes = {label.get_text().split()[0]: label.get_window_extent() for label in main.texts}
    assert boxes["chosen"].y0 >= boxes["rejected"].y1
    assert boxes["rejected"].y0 > main.get_window_extent().y0 - 20


def test_long_and_odd_titles_do_no_harm():
    status = "step 1,000,000 of 9,000,000 · 99 h 59 min left"
    drawn = figure([row(1)], "$\\a$ " + "model_" * 40, status)
    title, told, _ = (text.get_window_extent() for text in drawn.texts)
    assert title.x1 < told.x0


@pytest.mark.parametrize("change", [dict(), dict(chosen=-1, rejected=-3), dict(noise=6), dict(nll=1)])
def test_the_reading_stands_under_the_curves_and_fits(change):
    from tests.results.test_reading import curves

    drawn = figure(curves(**change))
    *_, text = drawn.texts
    assert text.get_text().lower() == reading.read_curves(curves(**change))
    assert text.get_window_extent().x1 < drawn.bbox.x1


def test_the_longest_reading_of_held_out_pairs_fits_too():
    from tests.results.test_reading import curves

    names = ("log_odds_chosen", "log_odds_rejected", "log_odds_ratio", "nll")
    for low in ((-1, 1, -1, -0.01), (1, 1, -0.01, -1)):
        figures = {n: {"change_interval": (at, at + 0.02)} for n, at in zip(names, low, strict=True)}
        with matplotlib.rc_context(live.STYLE):
            drawn = live._figure(curves(), "", "", {"held_out": figures})
            drawn.canvas.draw()
        *_, text = drawn.texts
        assert text.get_text().startswith("On held-out pairs margin f") and len(text.get_text()) > 95
        assert text.get_window_extent().x1 < 0.99 * drawn.bbox.x1


def test_the_step_that_is_kept_is_marked_in_every_curve_and_named():
    rows = healthy(40)
    assert live.draw(rows) == live.draw(rows, results={}), "no mark where the last step is kept"
    with matplotlib.rc_context(live.STYLE):
        drawn = live._figure(rows, "", "", {"kept_step": 12_345})
        drawn.canvas.draw()
    marks = [[line for line in axes.lines if list(line.get_xdata()) == [12_345] * 2] for axes in drawn.axes]
    assert len(marks) == 5 and all(len(found) == 1 for found in marks)
    heading, note = drawn.axes[0]._left_title, drawn.axes[0]._right_title
    assert "held-out pairs" in note.get_text() and "step 12,345 is kept" in note.get_text()
    assert note.get_window_extent().x0 > heading.get_window_extent().x1


def test_progress_is_shown_from_the_folder_alone(tmp_path, shown, capsys):
    for one in healthy(40):
        append_row(tmp_path / "history.jsonl", one)
    live.show_progress(tmp_path)
    bundle, out = shown.new[0][0], capsys.readouterr().out
    assert has_color(bundle["image/png"], live.CHOSEN) and bundle["text/plain"] == "LazyORPO live plot"
    assert out.startswith("Step 40, written ") and out.endswith("Margin rising, nll falling: healthy.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


@pytest.mark.parametrize("folder", ["", "not there yet"])
def test_progress_of_a_run_without_steps_is_a_sentence(tmp_path, capsys, folder):
    live.show_progress(tmp_path / folder)
    assert capsys.readouterr().out == f"No step is logged in {tmp_path / folder} yet.\n"


def test_the_users_own_plot_style_changes_nothing_either_way():
    before = live.draw(healthy(20))
    with matplotlib.rc_context(
        {"text.color": "red", "axes.facecolor": "black", "axes.grid": False, "font.size": 30}
    ):
        style = dict(matplotlib.rcParams)
        assert live.draw(healthy(20)) == before
        assert dict(matplotlib.rcParams) == style


@pytest.mark.parametrize("backend", [None, "module://matplotlib_inline.backend_inline"])
def test_it_draws_without_pyplot_or_a_backend(tmp_path, backend):
    code = (
        "import sys; from lazyorpo_lib.results import live; p = live.LivePlot(sys.argv[1]);"
        "p.update({'step': 1, 'nll': 1});p.close(); assert p.drawn == 2;"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"MPLBACKEND": backend} if backend else {}
    assert (
        subprocess.run([sys.executable, "-c", code, tmp_path / "live.png"], env=environment).returncode == 0
    )
    assert (tmp_path / "live.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_saved_notebook_of_ten_thousand_steps_holds_one_picture_and_passes_nbval(tmp_path):
    """One cell logs 10,000 steps, with the progress bar, on a clock on which they take two minutes."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    code = f"""
import sys
sys.path[:0] = [{os.path.dirname(os.path.dirname(os.path.dirname(__file__)))!r}]
from lazyorpo_lib.folder import append_row, read_rows
from lazyorpo_lib.results import live
from lazyorpo_lib.session import progress_bar
from tests.results.test_live import Clock, healthy
clock = Clock()
plot = live.LivePlot("live.png", total_steps=10_000, max_share=1.0, clock=clock)
with progress_bar(10_000, "steps", desc="training") as bar:
    for row in healthy(10_000):
        clock.now += 0.012
        append_row("history.jsonl", row)
        plot.update(row)
        bar.update()
plot.close()
assert 30 < plot.drawn < 100 and len(read_rows("history.jsonl")) % 10_002 == 0
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = [o for o in notebook.cells[0].outputs if "image/png" in o.data]
    assert base64.b64decode(output["data"]["image/png"]).startswith(b"\x89PNG")
    assert output["data"]["text/plain"] == "LazyORPO live plot" and output["metadata"] == live.METADATA
    path = tmp_path / "saved.ipynb"
    nbformat.write(notebook, path)
    assert path.stat().st_size < 200_000
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval",
        "--nbval-current-env",
        path,
    ]
    done = subprocess.run([*command, f"--rootdir={tmp_path}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]
