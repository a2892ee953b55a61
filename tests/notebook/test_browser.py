"""The main notebook in a real JupyterLab and a real Chromium: run all, change settings in the panel, run all
again.

python -m tests.notebook.test_browser docs    takes the README's screenshots of the demo into docs
"""

import csv
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TROUBLE = (
    '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
)
LAB_SETTINGS = {
    "notebook-extension/tracker": {
        "windowingMode": "none",
        "autoStartDefaultKernel": True,
    },  # every cell is in the page, seen or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
HOSTILE = "<script>window.hostile = 1</script><img src=nowhere onerror='window.hostile = 2'>"
CHANGED = {"epochs": "120", "learning_rate": "5e-3"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.skipif(
        find_spec("playwright") is None, reason="Playwright's Python package is not installed"
    ),
    pytest.mark.skipif(find_spec("jupyterlab") is None, reason="JupyterLab is not installed"),
]


class Notebook:
    """The notebook's page, as a user has it."""

    def __init__(self, page):
        self.page = page

    def cell(self, code: str):
        return self.page.locator(".jp-CodeCell").filter(has=self.page.locator(".jp-InputArea", has_text=code))

    def text(self, code: str) -> str:
        return self.cell(code).locator(".jp-OutputArea").inner_text()

    def run_all(self) -> None:
        for _ in range(6):
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            for _ in range(100):
                if self.running():
                    return
                self.page.wait_for_timeout(100)
            self.page.keyboard.press(
                "Escape"
            )  # a menu opened before JupyterLab was ready holds entries that do nothing
        raise TimeoutError("JupyterLab runs no cell")

    def run_all_to_the_end(self, seconds: float) -> None:
        """Run all; once more in a page loaded anew where ipywidgets lost the panel, as it does where
        JupyterLab was connecting to the kernel ("Error displaying widget: model not found"): what the
        notebook itself tells its users to do."""
        for _ in range(3):
            self.run_all()
            self.wait(seconds)
            if self.entry("epochs").count():
                return
            self.page.reload()
            self.ready()
        raise AssertionError("the panel is not shown: " + self.text("panel.show()"))

    def ready(self) -> None:
        self.page.locator(".jp-CodeCell").first.wait_for()
        self.page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()

    def running(self) -> bool:
        return self.page.locator(".jp-InputPrompt", has_text="*").count() > 0

    def wait(self, seconds: float, during=lambda: None) -> None:
        """Until every cell has run; calls `during` all the while."""
        deadline = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < deadline, "the notebook is still running"
            during()
            self.page.wait_for_timeout(100)

    def entry(self, name: str):
        return self.cell("panel.show()").get_by_label(name, exact=True)

    def change(self, name: str, value: str) -> None:
        self.entry(name).fill(value)
        self.entry(name).press("Tab")

    def upload(self, file: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.cell("panel.show()").get_by_role("button", name="Upload pairs").click()
        chooser.value.set_files(file)
        while not self.entry("dataset").input_value().endswith(file.name):
            self.page.wait_for_timeout(100)

    def tick(self, code: str, *boxes: str) -> str:
        """Set boxes of a cell's form, run it, and give what it shows."""
        cells = json.loads((HOME / "notebooks/LazyORPO.ipynb").read_text(encoding="utf-8"))["cells"]
        [(place, text)] = [(i, t) for i, c in enumerate(cells) if code in (t := "".join(c["source"]))]
        cell = self.page.locator(".jp-Notebook .jp-Cell").nth(place)
        for box in boxes:
            text = text.replace(f"{box} = False", f"{box} = True")
        cell.locator(".jp-Placeholder").click()  # the code is folded
        cell.locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+A")
        self.page.keyboard.insert_text(text)
        self.page.keyboard.press("Shift+Enter")
        for _ in range(20):  # until it has begun, or was over at once
            self.page.wait_for_timeout(100)
            if self.running():
                break
        self.wait(300)
        return cell.locator(".jp-OutputArea").inner_text()

    def folder(self) -> Path:
        return Path(re.search(r"^Folder: (.+)$", self.text("run = Run("), re.M)[1])

    def picture(self) -> str | None:
        images = self.cell("run.train()").locator("img")
        return images.first.get_attribute("src") if images.count() else None


@contextmanager
def jupyter_lab(folder: Path, **environment: str):
    """The main notebook, opened in a JupyterLab of its own that knows nothing of the user's."""
    from playwright.sync_api import sync_playwright

    shutil.copytree(
        HOME / "lazyorpo_lib", folder / "lazyorpo_lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "notebooks").mkdir()
    for name in ("requirements.txt", "notebooks/LazyORPO.ipynb"):
        shutil.copy(HOME / name, folder / name)
    homes = {
        name: str(folder / ".jupyter" / name.lower())
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR")
    }
    for name, content in LAB_SETTINGS.items():
        path = Path(homes["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", name + ".jupyterlab-settings")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    token = secrets.token_hex(8)
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        f"--IdentityProvider.token={token}",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "LAZYORPO_PRESET": "tiny"} | homes | environment
    with open(folder / "lab.log", "w") as log, sync_playwright() as play:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            address = _address(Path(homes["JUPYTER_RUNTIME_DIR"]), server)
            browser = play.chromium.launch(executable_path=CHROMIUM)
            page = browser.new_page(viewport={"width": 1280, "height": 1400})
            page.set_default_timeout(60_000)
            # Where a cell is run before the notebook's kernel has come, JupyterLab asks which one to take:
            # the one it offers.
            page.add_locator_handler(
                page.locator(".jp-Dialog"), lambda dialog: dialog.locator(".jp-mod-accept").click()
            )
            page.on(
                "dialog", lambda dialog: dialog.accept()
            )  # the browser's own: leave a notebook that is not saved?
            page.goto(f"{address}lab/tree/notebooks/LazyORPO.ipynb?token={token}")
            notebook = Notebook(page)
            notebook.ready()
            try:
                yield notebook
            except BaseException:
                page.screenshot(path=folder / "failure.png")
                raise
            browser.close()
        finally:
            server.terminate()
            server.wait(30)


def _address(runtime: Path, server: subprocess.Popen) -> str:
    for _ in range(600):
        assert server.poll() is None, "JupyterLab has ended"
        for file in runtime.glob("jpserver-*.json"):
            return json.loads(file.read_text())["url"]
        time.sleep(0.1)
    raise TimeoutError("JupyterLab did not start")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What was seen of two runs of the whole notebook, with edits in the panel between them."""
    from lazyorpo_lib.model import locate

    folder = tmp_path_factory.mktemp("lab")
    other = shutil.copytree(locate("tiny-random"), folder / "another-model")
    pairs = folder / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps(dict(prompt=f"{HOSTILE} {i}?", chosen=f"{HOSTILE} yes", rejected=f"no {HOSTILE}"))
            + "\n"
            for i in range(40)
        )
    )
    own = folder / "own.csv"  # as a spreadsheet writes it where a comma is the decimal sign
    with open(own, "w", newline="") as file:
        rows = [[f"{HOSTILE} {i}?", f"{HOSTILE} yes", f"no {HOSTILE}"] for i in range(40)]
        csv.writer(file, delimiter=";").writerows([["Prompt", "Chosen", "Rejected"], *rows])
    with jupyter_lab(folder, LAZYORPO_DATASET=str(pairs)) as notebook:
        seen, page = {"changed": CHANGED | {"base_model": str(other)}, "pictures": []}, notebook.page
        notebook.run_all_to_the_end(600)
        seen["first"] = json.loads((notebook.folder() / "settings.json").read_text())
        notes = notebook.cell("panel.show()").locator(".widget-html", has_text=re.compile(r"^panel ·"))
        for edits, (name, value) in enumerate(seen["changed"].items()):
            notebook.change(name, value)
            notes.nth(edits).wait_for()
        notebook.upload(own)

        def look():
            if (picture := notebook.picture()) not in [None, *seen["pictures"]]:
                seen["pictures"].append(picture)

        notebook.run_all()
        notebook.wait(600, look)
        seen["second"] = json.loads((notebook.folder() / "settings.json").read_text())
        seen["steps"] = json.loads((notebook.folder() / "summary.json").read_text())["steps"]
        cells = {
            "Ask the base and": ["ask_now"],
            "Lines for vLLM": ["lines_now", "zip_now"],
            "Merge, GGUF": ["merge_now"],
        }
        seen["ticked"] = {code: notebook.tick(code, *boxes) for code, boxes in cells.items()}
        seen["folder"] = notebook.folder()
        seen["trouble"] = page.locator(TROUBLE).all_inner_texts()
        seen["hostile"] = page.evaluate("window.hostile")
        seen["pair"], seen["answers"] = notebook.text("show.pair(run)"), notebook.text("show.answers(run)")
        yield seen


def test_what_is_changed_in_the_panel_is_what_the_next_run_trains_with(seen):
    for name, value in seen["changed"].items():
        now = seen["second"]["settings"][name]
        assert (str(now), seen["second"]["sources"][name]) == (str(type(now)(value)), "panel")
        assert seen["first"]["settings"][name] != now and seen["first"]["sources"][name] != "panel"
    assert seen["steps"] == 120 * 8


def test_an_uploaded_table_of_another_country_is_what_the_next_run_trains_on(seen):
    assert seen["second"]["settings"]["dataset"].endswith("own.csv")
    assert seen["second"]["sources"]["dataset"] == "panel"


def test_the_cells_behind_boxes_do_what_they_say(seen):
    ticked = seen["ticked"]
    assert all(word in ticked["Ask the base and"] for word in ("Why is it dark at night?", "base", "tuned"))
    assert "vllm serve" in ticked["Lines for vLLM"] and ".zip" in ticked["Lines for vLLM"]
    assert "merged" in ticked["Merge, GGUF"] and (seen["folder"] / f"{seen['folder'].name}.zip").is_file()
    assert (seen["folder"] / "merged" / "model.safetensors").is_file()


def test_the_live_picture_moves_while_training_runs(seen):
    assert (
        len(seen["pictures"]) >= 4
    )  # the first run's, this one's first and last, and at least one between them
    assert all(picture.startswith("data:image/png;base64,") for picture in seen["pictures"])


def test_no_cell_shows_an_error_or_a_warning(seen):
    assert seen["trouble"] == []


def test_markup_in_a_dataset_is_shown_as_text_and_never_run(seen):
    assert HOSTILE in seen["pair"].replace("\n", "") and HOSTILE in seen["answers"]
    assert seen["hostile"] is None


def take_screenshots(target: Path) -> None:
    """The panel, the live picture and five answers of a demo run, each below 300 kB."""
    from PIL import Image

    with (
        tempfile.TemporaryDirectory() as folder,
        jupyter_lab(Path(folder), LAZYORPO_PRESET="demo", LAZYORPO_ANSWERS="5") as notebook,
    ):
        notebook.run_all_to_the_end(1800)
        for name, code in {
            "panel": "panel.show()",
            "training": "run.train()",
            "answers": "show.answers(run)",
        }.items():
            path = target / f"notebook-{name}.png"
            cell = notebook.cell(code)
            cell.scroll_into_view_if_needed()
            cell.screenshot(path=path)
            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    take_screenshots(Path(sys.argv[1]))
