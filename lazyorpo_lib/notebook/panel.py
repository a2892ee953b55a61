"""The panel: a form over the settings of the parameter cell; the last thing touched wins.

Where ipywidgets is absent or broken the panel is a table. Each value names its source. It starts no
training, and knows no type and no limit: `settings.coerce` does.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from html import escape
from pathlib import Path

from ..errors import UserError, without_secrets
from ..marker import write_atomically
from ..rows.dataset import ENDINGS, written
from ..rows.files import reader_of
from ..settings import DEFAULTS, FIELDS, PRESETS, Settings, coerce, from_environment, resolve

try:
    import ipywidgets
except Exception:  # absent, or broken by a version that does not go with the rest: the panel is a table then
    ipywidgets = None

FIRST = ("base_model", "dataset", "epochs", "learning_rate", "preset")
GROUPS = {
    "Training": "method or_weight or_beta nll_over objective dpo_beta lora_rank lora_alpha lora_dropout "
    "pairs_per_step warmup_steps lr_schedule optimizer weight_decay max_grad_norm seed",
    "Memory": "max_tokens max_prompt_tokens tokens_per_batch checkpointed_layers precision liger_kernel",
    "Data": "overlong columns max_pairs eval_pairs",
}
GROUPS = {title: tuple(names.split()) for title, names in GROUPS.items()}
GROUPS["Run"] = tuple(name for name in FIELDS if name not in sum(GROUPS.values(), FIRST))
_MODELS = (PRESETS[name]["base_model"] for name in ("demo", "colab-t4", "phi2-article"))
SUGGESTIONS = {
    "base_model": ("auto", *_MODELS, "mistralai/Mistral-7B-v0.1"),
    "dataset": ("demo", "argilla/dpo-mix-7k", "HuggingFaceH4/ultrafeedback_binarized:train_prefs"),
}
_MEMORY = "_lazyorpo_panel"  # in the notebook's globals: as old as the kernel, however often the cell is run


class Panel:
    """Hold the settings of a notebook: its globals, `LAZYORPO_*` and the edits made in the form.

    From strongest to weakest: an edit in the panel made after the cell's value last changed; a value in the
    cell that is not the default (form, hand, papermill); the environment; preset and default.

    Args:
        namespace: `globals()` of the notebook, in which edits outlive a cell that is run again.
        gpu_gib: memory of the GPU at hand, GiB, for `preset="auto"`.
        estimate: what a run with these settings will take, as text; asked when a value has changed, by a
            thread that nobody waits for, so it must change nothing of the process (plan/beside.py does not).
    """

    def __init__(self, namespace: dict, *, gpu_gib=0.0, estimate: Callable[[Settings], str] | None = None):
        self.namespace, self.gpu_gib, self.estimate = namespace, gpu_gib, estimate
        self.memory = namespace.setdefault(_MEMORY, {"edits": {}, "seen": {}})
        self._estimated: tuple[Settings | None, str] = (None, "")
        self._wanted: tuple[Settings, str] | None = None  # the settings that are shown, and about the preset
        self._planning, self._lock = None, threading.RLock()
        self._moving = False  # while the panel itself moves its widgets
        self.box = None if ipywidgets is None else self._build()

    def resolve(self) -> tuple[Settings, dict[str, str], str]:
        """Give the settings as they stand, where each came from, and a sentence on the preset."""
        env, cell = from_environment(), self._changed_in_cell()  # which may end edits
        layers = [("env", env), ("cell", cell), ("panel", self.memory["edits"])]
        return resolve(layers, gpu_gib=self.gpu_gib)

    def show(self) -> None:
        """Display the form, or print the table where there are no widgets."""
        if self.box is None:
            print(self.table())
        else:
            from IPython.display import display

            display(self.box)

    def table(self) -> str:
        """Write every setting, its value and its source, as text."""
        try:
            settings, sources, why = self.resolve()
        except UserError as error:
            return str(error)
        rows = [f"{name:<20} {str(getattr(settings, name)):<40} {source}" for name, source in sources.items()]
        self._plan(settings, why)
        if planning := self._planning:
            planning.join()
        return "\n".join([*rows, why, self._estimated[1]]).rstrip()

    def edit(self, name: str, value) -> None:
        """Take in an edit, as if it were made in the form; a secret in it is not kept with the notebook."""
        self._changed_in_cell()
        is_text = isinstance(value, str) and not os.path.exists(value)
        self.memory["edits"][name] = without_secrets(value) if is_text else value
        self._refresh()

    def reset(self) -> None:
        """Forget every edit made in the panel."""
        self.memory["edits"].clear()
        self._refresh()

    def _changed_in_cell(self) -> dict:
        """Give the cell's values that are not defaults. An edit gives way to a later change of the cell."""
        edits, seen, changed = self.memory["edits"], self.memory["seen"], {}
        if not isinstance(rows := self.namespace.get("dataset", ""), str | Path):
            with contextlib.suppress(UserError):  # `coerce` says what it must be
                self.namespace["dataset"] = written(rows)  # dataset = my_rows
        for name in FIELDS.keys() & self.namespace.keys():
            now, default = _mark(name, self.namespace[name]), _mark(name, DEFAULTS[name])
            if seen.get(name, default) != now:
                edits.pop(name, None)
            seen[name] = now
            if now != default:
                changed[name] = self.namespace[name]
        return changed

    def _plan(self, settings: Settings, why: str) -> None:
        """Show these settings' estimate, or that it is made: of edits in quick succession for the last."""
        with self._lock:
            self._wanted = settings, why
            self._tell()
            if self.estimate and self._estimated[0] != settings and not self._planning:
                self._planning = threading.Thread(target=self._keep_planning, daemon=True)
                self._planning.start()

    def _keep_planning(self) -> None:
        while True:
            with self._lock:
                self._tell()
                if not self._wanted or self._wanted[0] == self._estimated[0]:
                    self._planning = None
                    return
                settings = self._wanted[0]
            try:
                text = self.estimate(settings)
            except Exception as error:  # an estimate is a courtesy: the run says what is really wrong
                text = f"No estimate: {without_secrets(error)}"
            self._estimated = settings, text

    def _tell(self) -> None:
        if ipywidgets is None or not self._wanted:
            return
        (settings, why), (planned, text) = self._wanted, self._estimated
        if self.estimate and planned != settings:
            before = text.partition("\n")[0]
            text = "planning …" + f" (before this change: {before})" * bool(before)
        text = escape(f"{why[0].upper()}{why[1:]}.\n{text}").replace("\n", "<br>")
        self.status.value = f'<div style="line-height:1.5;padding:6px">{text}</div>'

    def _refuse(self, why: object) -> None:
        """Show what is wrong, in the place of any plan."""
        with self._lock:
            self._wanted = None
            self.status.value = f'<b style="color:#D55E00">{escape(str(why))}</b>'

    def _build(self):  # of what ipywidgets 7.7.1 (Colab) and 8 both have
        w, self._styles = ipywidgets, {}
        wide, plain = w.Layout(width="430px"), w.Layout()
        self.inputs = {name: self._input(name, wide) for name in FIELDS}
        self.notes = {name: self._make(w.HTML, layout=plain) for name in FIELDS}
        self.status = self._make(w.HTML, layout=plain)
        for name, entry in self.inputs.items():
            entry.observe(lambda new, name=name: self._moving or self.edit(name, new["new"]), names="value")
        columns = w.Layout(grid_template_columns="440px minmax(0, 1fr)")

        def rows(names):
            return w.GridBox([of[name] for name in names for of in (self.inputs, self.notes)], layout=columns)

        groups = w.Accordion([rows(names) for names in GROUPS.values()], selected_index=None, layout=plain)
        for i, title in enumerate(GROUPS):
            groups.set_title(i, title)
        button = w.Button(description="Reset", tooltip="Forget the edits made here", layout=plain)
        button.on_click(lambda _: self.reset())
        upload = w.FileUpload(description="Upload pairs", multiple=False, layout=plain)
        upload.observe(lambda change: self.take_upload(change["new"]), names="value")
        self._refresh()
        return w.VBox([rows(FIRST), groups, self.status, upload, button], layout=plain)

    def take_upload(self, value) -> None:
        """Write an uploaded file beside the notebook and make it the dataset. `value`: what FileUpload has,
        ({"name", "content"}, …) in ipywidgets 8, {name: {"content"}} in 7."""
        files = value.items() if isinstance(value, dict) else ((file["name"], file) for file in value)
        for name, file in files:
            path, content = Path(Path(name.replace("\\", "/")).name), bytes(file["content"])
            if not reader_of(path):
                self._refuse(f"The upload {path.name!r} is no table of pairs: give a file that is {ENDINGS}.")
            elif path.exists() and path.read_bytes() != content:
                other = f"A file {path.name!r} is here already, and is another one"
                self._refuse(f"{other}: rename the one you upload.")
            else:
                write_atomically(path, content)
                self.edit("dataset", path.name)

    def _make(self, kind, **options):
        """Make a widget that shares its style, as its layout: each of them is saved with the notebook."""
        made = kind(style=self._styles.get(kind, {"description_width": "150px"}), **options)
        self._styles[kind] = made.style
        return made

    def _input(self, name, layout):
        w, field = ipywidgets, FIELDS[name]
        value = self.memory["edits"].get(name, self.namespace.get(name, DEFAULTS[name]))
        options = {"description": name, "layout": layout}
        if choices := field.metadata["choices"]:
            value = value if value in choices else DEFAULTS[name]
            return self._make(w.Dropdown, options=choices, value=value, **options)
        if field.type is bool:
            return self._make(w.Checkbox, value=value is True, **options)
        options |= {"value": str(value), "continuous_update": False}  # an edit is a finished value, not a key
        if name in SUGGESTIONS:
            return self._make(w.Combobox, options=SUGGESTIONS[name], ensure_option=False, **options)
        return self._make(w.Text, **options)

    def _refresh(self) -> None:
        if ipywidgets is None:
            return
        try:
            settings, sources, why = self.resolve()
        except UserError as error:
            return self._refuse(error)
        self._moving = True
        try:
            for name, source in sources.items():
                value = getattr(settings, name)
                self.inputs[name].value = value if isinstance(value, bool) else str(value)
                whence = escape(source) if source == "default" else f"<b>{escape(source)}</b>"
                text = f"{whence} · {escape(FIELDS[name].metadata['help'])}"
                self.notes[name].value = f"<div style=line-height:1.3;padding:5px>{text}</div>"
        finally:
            self._moving = False
        self._plan(settings, why)


def _mark(name: str, value):
    """Give what a cell's value is compared by: 5e-6 and "5e-6" are the same, and a wrong value is itself."""
    try:
        return coerce(name, value)
    except UserError:
        return "wrong", repr(value)
