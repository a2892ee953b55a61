"""The picture of a run while it goes on, and of several runs over or beside each other.

The only module that imports matplotlib, and never pyplot, so that no global state is touched. In a notebook
it is one image output, updated in place; elsewhere a file.
"""

import io
import itertools
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import BoxStyle, FancyBboxPatch
from matplotlib.ticker import FixedLocator, MaxNLocator
from PIL import Image

from ..errors import expanded, say
from ..folder import read_json, read_rows
from ..marker import write_atomically
from ..session import duration, in_notebook
from . import reading

MAX_POINTS = 600  # a line; longer histories are averaged down
FILE_SECONDS = 30.0  # between two writes of the file while training goes on
INCHES = (10, 5.2)
METADATA = {"image/png": {"width": 1000, "height": 520}}  # CSS pixels: an updated output keeps its height
CHOSEN, REJECTED = "#0072B2", "#D55E00"  # Okabe-Ito; in print the dashes tell them apart
COLORS = (CHOSEN, REJECTED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
DASHES = ("-", (0, (4, 1.3)), (0, (1, 1)), (0, (6, 1.3, 1, 1.3)), (0, (8, 3)))
INK, QUIET, PAPER = "#222222", "#666666", "#FBFBF9"  # its own light paper, for dark themes too
BOTTOM, TOP, GAP = 0.181, 0.819, 0.095  # of the axes, as shares of the height
NOTE = dict(loc="right", size=7.5, color=QUIET, y=1, pad=6)
NICE = [1, 2, 5, 10]  # steps of ticks
STYLE = {
    "figure.facecolor": PAPER, "figure.dpi": 160, "font.family": "DejaVu Sans", "font.size": 9,
    "text.color": INK, "text.usetex": False, "axes.titlecolor": INK, "axes.titlesize": 9.5,
    "axes.titlelocation": "left", "axes.labelcolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.edgecolor": "#BDBDB8", "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#E6E6E3", "grid.linewidth": 0.8,
}  # fmt: skip
# Of axes: heading, {curve: what is written at its end}, note, level at which nothing is preferred, ticks.
SIDES = {"log_odds_chosen": "chosen\n{:+.2f}", "log_odds_rejected": "rejected\n{:+.2f}"}
PANELS = (
    ("nll (nats per token)", {"nll": "{:.2f}"}, "", [], []),
    ("or_loss (nats)", {"or_loss": "{:.2f}"}, "- - ln 2: no preference", [math.log(2)], []),
    ("odds term (share of gradient)", {"odds_gradient_share": "{:.2f}"}, "", [], [0, 0.5, 1]),
    ("accuracy (share of pairs)", {"accuracy": "{:.2f}"}, "", [0.5], [0, 0.5, 1]),
)


def _points(rows, name):
    """Give the finite points of a curve, (points, 2): step, value; of more than MAX_POINTS the means."""
    points = np.array([(row["step"], row.get(name)) for row in rows], dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]  # None is a nan by now
    starts = np.arange(0, len(points), math.ceil(len(points) / MAX_POINTS) or 1)
    ends = np.append(starts[1:], len(points))[: len(starts)]
    means = np.add.reduceat(points[:, 1], starts) / (ends - starts) if len(starts) else []
    return np.column_stack([points[ends - 1, 0], means])


def _smooth(values):
    """Take a Gaussian mean over a thirtieth of the curve, without lag, its window cut at both ends."""
    if len(values) < 3:
        return values
    sigma = max(1.0, len(values) / 30)
    reach = min(math.ceil(3 * sigma), (len(values) - 1) // 2)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _curve(axes, rows, name, color, style):
    """Draw one quantity: faint points, a smoothed line, hollow held-out marks. Returns the line, what the
    axes must hold, single outliers left out, and where it ends; None without points."""
    dots, marks = _points(rows, name), _points(rows, f"eval_{name}")
    smooth, gap = _smooth(dots[:, 1]), math.ceil(len(marks) / 25) or 1
    axes.plot(*dots.T, ".", color=color, alpha=0.36, markersize=4.5, markeredgewidth=0)
    (line,) = axes.plot(dots[:, 0], smooth, linestyle=style, color=color, linewidth=2.2)
    (held_out,) = axes.plot(*marks.T, ":o", color=color, linewidth=1.1, markersize=5, markevery=gap)
    held_out.set(markerfacecolor=PAPER, clip_on=False, zorder=3)
    seen = [*smooth, *marks[:, 1], *(np.percentile(dots[:, 1], [2, 98]) if len(dots) else [])]
    return line, seen, next((values[-1] for values in (smooth, marks[:, 1]) if len(values)), None)


def _label(axes, ends):
    """Write [(height, line, words)] at the end of each line, two never on each other and inside the axes."""
    (low, high), apart = axes.get_ylim(), 0.15
    ends = sorted(ends, key=lambda end: end[0], reverse=True)
    heights = [(end - low) / (high - low) for end, _, _ in ends]
    if len(ends) == 2 and heights[0] - heights[1] < apart:
        middle = min(max(sum(heights) / 2, apart), 1 - apart)
        heights = [middle + apart / 2, middle - apart / 2]
    for (end, line, words), height in zip(ends, heights, strict=True):
        text, color = words.format(end).replace("-", "\N{MINUS SIGN}"), line.get_color()
        label = axes.annotate(text, (1, height), (8, 0), "axes fraction", "offset points", color=color)
        label.set(va="center", weight="bold")


def _draw_axes(figure, rows, place, heading, words, note, level, ticks):
    """Draw curves into axes of their own, which hold all steps and what the curves show, and the ground
    between two."""
    axes, two = figure.add_axes(place, label=heading, xlabel="optimizer step"), len(words) > 1
    axes.set_title(heading, y=1, pad=6)
    axes.set_title(note, **NOTE)
    looks = zip(COLORS, DASHES, strict=False) if two else [(INK, "-")]
    curves = [_curve(axes, rows, name, *look) for name, look in zip(words, looks, strict=False)]
    if two:
        chosen, rejected = (line.get_xydata() for line, _, _ in curves)
        axes.fill(*np.concatenate([chosen, rejected[::-1]]).T, color=CHOSEN, alpha=0.13, linewidth=0)
    for height in level:
        axes.axhline(height, color=QUIET, linewidth=1, linestyle=(0, (2, 2)))
    steps = [row["step"] for row in rows] or [0]
    first, last = min(steps), max(*steps, min(steps) + 1)
    seen = [value for _, seen, _ in curves for value in seen] + level + ticks or [0.0]
    side, room = 0.01 * (last - first), 0.06 * (max(seen) - min(seen)) or 0.5
    axes.set(ylim=(min(seen) - room, max(seen) + room), xlim=(first - side, last + side))
    axes.xaxis.set_major_locator(MaxNLocator(6 if two else 3, steps=NICE, integer=True))
    axes.yaxis.set_major_locator(FixedLocator(ticks) if ticks else MaxNLocator(6 if two else 2, steps=NICE))
    ends = zip(curves, words.values(), strict=True)
    _label(axes, [(end, line, text) for (line, _, end), text in ends if end is not None])
    return axes


def _figure(rows, title, status, results=None) -> Figure:
    figure, kept = Figure(INCHES, facecolor="none"), (results or {}).get("kept_step")
    rounded = BoxStyle("Round", pad=0, rounding_size=0.014)
    paper = FancyBboxPatch((0.006, 0.014), 0.988, 0.972, rounded, mutation_aspect=INCHES[0] / INCHES[1])
    paper.set(facecolor=PAPER, edgecolor="#DDDDD8", transform=figure.transFigure, zorder=-1)
    figure.add_artist(paper)
    short = title if len(title) <= 50 else title[:49] + "…"
    figure.text(0.03, 0.929, short, size=12.5, weight="bold", va="center", parse_math=False)
    figure.text(0.97, 0.929, status, size=10, color=QUIET, ha="right", va="center")
    figure.text(0.03, 0.053, reading.read_curves(rows, results).capitalize(), size=10.5, va="center")
    marked = kept or any(len(_points(rows, f"eval_{side}")) for side in SIDES)
    note = "\N{WHITE CIRCLE} held-out pairs" * bool(marked)
    note += f"   \u250a step {kept:,} is kept" if kept else ""
    _draw_axes(figure, rows, (0.058, BOTTOM, 0.5, TOP - BOTTOM), "log-odds (nats)", SIDES, note, [], [])
    panels = [p for p in PANELS if "odds_gradient_share" not in p[1] or len(_points(rows, *p[1]))]
    height = (TOP - BOTTOM + GAP) / len(panels)
    for k, panel in enumerate(panels, 1):
        axes = _draw_axes(figure, rows, (0.705, TOP + GAP - k * height, 0.22, height - GAP), *panel)
        axes.tick_params(labelbottom=k == len(panels))
        axes.xaxis.label.set_visible(k == len(panels))
    for axes in figure.axes if kept else ():
        axes.axvline(kept, color=QUIET, linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
    return figure


def _png(figure, path=None) -> bytes:
    """Draw a figure in 256 colors, a quarter of the bytes of all; returns a PNG, also written to `path`."""
    buffer, canvas = io.BytesIO(), FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(buffer, "png")
    if path:
        write_atomically(path, buffer.getvalue())
    return buffer.getvalue()


@rc_context(STYLE)
def draw(rows: list[dict], path=None, *, title: str = "", status: str = "", results=None) -> bytes:
    """Draw a history, with what the held-out pairs said; returns PNG bytes, also written to a `path`."""
    return _png(_figure(rows, title, status or f"step {reading.last_step(rows):,}", results), path)


def show_progress(folder) -> None:
    """Show from its history how far the run in this folder is, after a lost tab or in a second kernel."""
    path = expanded(folder) / "history.jsonl"
    rows, results = read_rows(path), read_json(path.with_name("summary.json"))
    if not rows:
        say(f"No step is logged in {folder} yet.")
        return
    if in_notebook():
        _show(draw(rows, title=Path(folder).name, results=results))
    age = duration((time.time() - path.stat().st_mtime) / 60)
    say(f"Step {rows[-1]['step']:,}, written {age} ago. {reading.read_curves(rows, results).capitalize()}.")


def _show(png, handle=None, **options):
    """Put a picture into a notebook's output, a new one or that of a handle; returns the new one's handle."""
    shown = handle.update if handle else sys.modules["IPython"].display.display
    bundle = {"image/png": png, "text/plain": "LazyORPO live plot"}  # constant: nbval compares the text
    return shown(bundle, raw=True, metadata=METADATA, **options)


class LivePlot:
    """The picture of a run while it goes on; an error in it is logged once and ends it, never the run.

    It draws at the first row and at `close`; between them at most every `min_seconds` (and every 1/300 of the
    time so far), and only while it takes less than `max_share` of training's time. `drawn` counts pictures,
    `cost_seconds` is the wall time they took; `results` is what the held-out pairs said.

    Args:
        path: of the file; None: no file. In a notebook's kernel it is displayed too.
        total_steps: optimizer steps of the whole run, for the time left; 0: unknown.
    """

    def __init__(
        self, path, title="", total_steps=0, *, min_seconds=2.0, max_share=0.03, clock=time.monotonic
    ):
        self.path, self.title, self.total_steps, self.max_share = path, title, total_steps, max_share
        self.drawn, self.cost_seconds, self.results, self.clock = 0, 0.0, {}, clock
        self._shown = in_notebook()
        self._gap, self._off = min_seconds if self._shown else FILE_SECONDS, not (path or self._shown)
        self._rows, self._handle, self._first = [], None, None
        self._began, self._drawn_at, self._written_at = clock(), -math.inf, -math.inf

    def update(self, row: dict) -> None:
        """Take in one row of the history, of training or of an evaluation; draws when it is time to."""
        self._guard(self._update, row)

    def close(self) -> None:
        """Draw the end of the run and write the file."""
        self._guard(self._draw, True)

    def _guard(self, work, argument):
        try:
            if not self._off:
                work(argument)
        except Exception as error:  # a picture is never worth a run
            self._off = True
            words = "The live picture is off (%s: %s); training goes on."
            logging.getLogger(__name__).warning(words, type(error).__name__, error)

    def _update(self, row):
        self._rows.append(row)
        now = self.clock()
        if not (self._first or reading.is_evaluation(row)):
            self._first = row["step"], now
        run = now - self._first[1] if self._first else 0.0  # training alone, no evaluation before it
        with_next = self.cost_seconds * (1 + 2 / (self.drawn or 1))  # and the last one
        is_time = now - self._drawn_at >= max(self._gap, run / 300) and with_next <= self.max_share * run
        if is_time or not self.drawn:
            self._draw(False)

    def _draw(self, final):
        began = self.clock()
        png = draw(self._rows, title=self.title, status=self._status(began, final), results=self.results)
        if self._handle:
            _show(png, self._handle)
        elif self._shown:
            self._handle = _show(png, display_id=True)
        if self.path and (final or began - self._written_at >= FILE_SECONDS):
            write_atomically(self.path, png)
            self._written_at = began
        self._drawn_at = self.clock()
        self.cost_seconds += self._drawn_at - began
        self.drawn += 1

    def _status(self, now, final):
        step, total = reading.last_step(self._rows), self.total_steps
        first, since = self._first or (step, now)
        said = f"step {step:,}" + (f" of {total:,}" if total else "")
        if final:
            return f"{said} · {duration((now - self._began) / 60)}"
        if not first < step < total:
            return said
        return f"{said} · {duration((total - step) * (now - since) / (step - first) / 60)} left"


@rc_context(STYLE)
def draw_runs(histories: dict[str, list[dict]], path=None) -> bytes:
    """Draw log_odds_ratio and nll of several runs, {name: rows}, over each other; returns PNG bytes."""
    figure = Figure(INCHES)
    headings = {"log_odds_ratio": "log-odds ratio (nats)", "nll": "nll (nats per token)"}
    for axes, (name, heading) in zip(figure.subplots(1, 2), headings.items(), strict=True):
        looks = zip(histories.values(), itertools.cycle(COLORS), itertools.cycle(DASHES), strict=False)
        lines = [_curve(axes, rows, name, *look)[0] for rows, *look in looks]
        axes.set(title=heading, xlabel="optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=NICE, integer=True))
    names = [name.replace("$", r"\$") for name in histories]
    figure.legend(lines, names, loc="lower center", ncols=min(4, len(names)), frameon=False, handlelength=3.5)
    bottom = 0.16 + 0.05 * math.ceil(len(names) / 4)
    figure.subplots_adjust(left=0.07, right=0.975, top=0.9, bottom=bottom, wspace=0.2)
    return _png(figure, path)


@rc_context(STYLE)
def draw_trials(trials: dict[str, dict[str, list[float]]], path=None) -> bytes:
    """Draw {kind: {figure: its value in each run}}, a panel a figure, a dot a run, a bar at the mean; PNG."""
    kinds, names = list(trials), list(next(iter(trials.values())))
    columns = min(len(names), 3)
    lines = math.ceil(len(names) / columns)
    figure = Figure((INCHES[0], 0.7 + lines * (0.9 + 0.28 * len(kinds))), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        for k, kind in enumerate(kinds):
            values, color = trials[kind][name], COLORS[k % len(COLORS)]
            axes.plot(values, [k] * len(values), "o", color=color, alpha=0.6, markersize=6, markeredgewidth=0)
            axes.plot(np.mean(values), k, "|", color=color, markersize=16, markeredgewidth=2.5)
        axes.set(title=name, yticks=range(len(kinds)), yticklabels=kinds, ylim=(len(kinds) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.12)
    for axes in figure.axes[len(names) :]:
        axes.remove()
    return _png(figure, path)
