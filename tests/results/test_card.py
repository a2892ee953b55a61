"""card.py: the hub's front matter, honest figures, and texts that stay texts."""

import json
import time

import pytest
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt

from lazyorpo_lib.folder import FILES
from lazyorpo_lib.marker import MARKER
from lazyorpo_lib.results import card
from lazyorpo_lib.settings import DEFAULTS

EVIL = (
    "<script>alert(1)</script> | a | ``` b\n---\nlicense: evil\n---\n"
    "# Head\n![x](javascript:1) `c` *d* [e](f) \u202e"
)
FIGURE = {
    "pairs": 40, "before": 0.55, "before_interval": [0.4, 0.7], "after": 0.8, "after_interval": [0.675, 0.9],
    "change": 0.25, "change_interval": [0.1, 0.4], "more_than_noise": True,
}  # fmt: skip


def write_run(folder, *, settings=None, summary=None, held_out=None, without=()):
    """The files of a finished run, without its model."""
    folder.mkdir(exist_ok=True)
    (folder / MARKER).write_text(json.dumps({"what": "run", "files": dict.fromkeys(FILES)}))
    values = (
        DEFAULTS
        | {"base_model": "owner/base", "dataset": "maker/pairs:train", "method": "lora"}
        | (settings or {})
    )
    figures = dict.fromkeys(("mean", "p50", "p95", "max"), 30.0)
    texts = ["first\nsecond"]
    files = {
        "settings.json": {"version": "0.1.0", "settings": values, "sources": {"method": "flag"}},
        "data_report.json": {
            "read": 100, "kept": 90, "dropped": {"equal_answers": 10}, "chosen_longer": 0.61,
            "train": 50, "held_out": 40, "digest": "d",
            "tokens": {side: figures for side in ("prompt", "chosen", "rejected")},
        },
        "held_out.json": held_out or {
            "columns": ["accuracy"], "prompts": ["Why?"], "chosen_shorter": [True],
            "before": {"pairs": [[0.0]] * 40, "answers": texts},
            "after": {"pairs": [[1.0]] * 40, "answers": texts},
        },
        "summary.json": {
            "finished": True, "why": "every step was taken", "steps": 12, "epochs": 1.0,
            "method": values["method"], "layout": "shared", "precision": "float32",
            "device": "CPU, 2 threads", "minutes": 3.0, "training_minutes": 2.5, "peak_memory_gib": 1.25,
            "bad_steps": [], "out_of_memory": [], "accuracy_after": 0.8, "held_out": {"accuracy": FIGURE},
            "verdict": "Accuracy 55% -> 80%: more than noise.",
        } | (summary or {}),
    }  # fmt: skip
    for name, content in files.items():
        if name not in without:
            (folder / name).write_text(json.dumps(content))
    rows = [{"step": step, "nll": 2.0 - step / 100, "log_odds_ratio": step / 10} for step in range(1, 13)]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "live.png").write_bytes(b"png")
    return folder


def front_matter(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def rendered(text):
    body = text.split("---\n", 2)[2]
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


def test_front_matter_is_what_the_hub_takes_and_reads_back(tmp_path):
    front = front_matter(card.write_card(write_run(tmp_path)))
    assert front["base_model"] == "owner/base" and front["base_model_relation"] == "adapter"
    assert front["datasets"] == ["maker/pairs"] and front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation" and {"orpo", "lazyorpo", "preference", "lora"} == set(
        front["tags"]
    )
    _, (result,) = model_index_to_eval_results(front["model-index"])
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.8, "maker/pairs")
    ModelCardData(**front)
    assert "license" not in front


def test_local_model_and_data_show_only_their_names(tmp_path):
    settings = {
        "base_model": "/home/me/secret dir/my-model/",
        "dataset": "C:\\data\\pairs.jsonl",
        "output_dir": "/home/me/o",
    }
    stopped = {"finished": False, "why": "no room ([Errno 28] No space left: '/home/me/secret dir/x')"}
    text = card.write_card(write_run(tmp_path, settings=settings, summary=stopped))
    front = front_matter(text)
    assert not {"base_model", "datasets", "model-index"} & front.keys()
    assert "my-model" in text and "pairs.jsonl" in text and "No space left" in text
    assert not any(part in text for part in ("/home", "secret dir", "C:\\", "C:&#92;", str(tmp_path)))


def test_a_folder_that_looks_like_a_hub_id_is_local(tmp_path, monkeypatch):
    (tmp_path / "owner" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(card.write_card(write_run(tmp_path)))


def test_full_tuning_is_a_model_of_its_own(tmp_path):
    text = card.write_card(write_run(tmp_path, settings={"method": "full"}))
    front = front_matter(text)
    assert front["library_name"] == "transformers" and front["base_model_relation"] == "finetune"
    assert "lora" not in front["tags"] and "PeftModel" not in text


def test_no_text_of_data_model_or_user_acts_as_markup(tmp_path):
    held_out = {
        "columns": ["accuracy"], "prompts": [EVIL], "chosen_shorter": [True],
        "before": {"pairs": [], "answers": ["```\n" + "`" * 30 + "\n" + EVIL]},
        "after": {"pairs": [], "answers": ["~~~\n" + EVIL + "\ud800"]},
    }  # fmt: skip
    settings = {"columns": EVIL, "base_model": EVIL, "dataset": EVIL, "hub_repo": EVIL}
    summary = {"why": EVIL, "finished": False, "device": EVIL, "verdict": EVIL, "held_out": {EVIL: FIGURE}}
    text = card.write_card(write_run(tmp_path, settings=settings, summary=summary, held_out=held_out))
    assert front_matter(text).keys() == {"library_name", "pipeline_tag", "tags"}
    page = rendered(text)
    text.encode("utf-8")
    assert "<script" not in page and 'javascript:1"' not in page and "<em>" not in page
    assert page.count("<img") == 1 and page.count("<h1>") == 1
    rows = {row.count("<td") for row in page.split("<tr>")[1:] if "<td" in row}
    assert rows <= {2, 3, 4, 5, 6} and "<details>" not in page
    code = [part.split("</code>")[0] for part in page.split("<code")[1:]]
    assert sum("alert(1)" in part for part in code) == 3  # the prompt and both answers


def test_a_local_name_cannot_write_front_matter(tmp_path):
    run = write_run(tmp_path, settings={"base_model": "/home/me/x\n---\nlicense: evil\n---\n"})
    front = front_matter(card.write_card(run))
    assert front["model-index"][0]["name"] == "x --- license: evil --- ORPO pairs" and "license" not in front


@pytest.mark.parametrize(
    "text", ["__a b__", "_x_", "www.a.b", "https://a.b", "a|b", "a\nb", "<b>", "&amp;", "\\|", "~~a~~", "$a$"]
)
def test_inline_text_renders_as_itself(text):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    html = parser.render(card.table(["a"], [[f"x {text}"]]))
    cell = html.split("<td>")[1].split("</td>")[0]
    plain = cell.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert plain == "x " + " ".join(text.split())


def test_setting_names_stay_readable():
    assert card.inline("max_prompt_tokens: 5e-06, on (a, b)") == "max_prompt_tokens: 5e-06, on (a, b)"


@pytest.mark.parametrize("name", ["settings.json", "data_report.json", "summary.json", "held_out.json"])
def test_a_card_is_written_whatever_file_is_missing(tmp_path, name):
    text = card.write_card(write_run(tmp_path, without=(name,)))
    assert text.startswith("---\n") and "## Limits" in text
    assert ("not finished" in text) == (name == "summary.json")


def test_an_empty_folder_gives_a_card_that_claims_nothing(tmp_path):
    text = card.write_card(tmp_path)
    assert (
        "ended before anything was measured" in text
        and "live.png" not in text
        and "No pair was held out" in text
    )


def test_results_settings_plan_and_drops_are_told(tmp_path):
    both = {"peak_gib": [1.5, 1.25], "minutes": [2.0, 2.5]}
    summary = {
        "planned_against_measured": both,
        "versions": {"torch": "2.9.0"},
        "habit_before": 0.25,
        "habit_after": 0.5,
    }
    run = write_run(tmp_path, settings={"learning_rate": 1e-4}, summary=summary)
    text = card.write_card(run)
    assert (
        "| accuracy | 40 | 0.550 (0.400 to 0.700) | 0.800 (0.675 to 0.900) | 0.250 (0.100 to 0.400) | yes |"
        in text
    )
    assert "| equal answers | 10 |" in text and "61% of the kept pairs" in text
    assert "| learning_rate | 0.0001 | auto |" in text and "| method | lora | auto | flag |" in text
    assert "| peak memory, GiB | 1.50 | 1.25 |" in text and "| minutes of training | 2.00 | 2.50 |" in text
    assert "in 3.0 minutes" in text and "demo's habit: 25% before, 50% after" in text
    assert "torch 2.9.0" in text and "2403.07691" in text


def test_no_token_is_ever_shown(tmp_path):
    token = "hf_" + "AbCdEfGh12345678"
    text = card.write_card(
        write_run(tmp_path, settings={"hub_repo": token}, summary={"why": token, "finished": False})
    )
    assert token not in text and "token left out" in text


def test_licence_is_told_only_where_a_card_at_hand_states_it(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    run = write_run(tmp_path, settings={"base_model": str(base), "dataset": "demo"})
    assert "Licence of the base model: not known" in card.write_card(run)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    text = card.write_card(run)
    assert front_matter(text)["license"] == "mit" and "Licence of the data: apache-2.0" in text
    record = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(record | {"licences": {"model": "gpl", "dataset": "mit"}}))
    assert front_matter(card.write_card(run))["license"] == "mit"  # its own word is newer than the hub's
    (base / "README.md").unlink()
    assert front_matter(card.write_card(run))["license"] == "gpl"
    (run / "settings.json").write_text(json.dumps(record))
    (base / "README.md").write_text("---\nlicense: [mit\n---\n# broken\n")
    assert "license" not in front_matter(card.write_card(run))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "front",
    [
        f"{BOMB}license: *i\n",
        f"license: mit\n{BOMB}",
        "license: " + "[" * 3000 + "\n",
        "x: " + "[" * 100_000 + "\n",
        "license: [&a [x, x, x, x], &b [*a, *a, *a, *a], &c [*b, *b, *b, *b], [*c, *c, *c, *c]]\n",
        "license:\n" + "- mit\n" * 100_000,
        "license: !!python/object/apply:os.system [echo]\n",
        "license: {a: b}\n",
        "\x00\x01: \xff\n",
        "x: " + "y" * 2**24 + "\n",
    ],
)
def test_front_matter_of_any_kind_costs_no_time_and_no_memory(tmp_path, front):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{front}---\n# Base\n", encoding="latin-1")
    run, began = write_run(tmp_path, settings={"base_model": str(base)}), time.monotonic()
    text = card.write_card(run)
    assert time.monotonic() - began < 2 and len(text) < 10_000
    assert front_matter(text).get("license") in (None, "mit")


@pytest.mark.parametrize(
    "front,licence",
    [("license: apache-2.0\r\nx: 1\r\n", "apache-2.0"), ("tags:\n- a\nlicense: 'mit'  # so\n", "mit"),
     ("license:\n- mit\n- cc-by-4.0\ntags: [x]\n", "mit, cc-by-4.0"), ("license: [mit, gpl]\n", "mit, gpl"),
     ("license_name: own\n", ""), ("about:\n  license: mit\n", ""), ("x: 1\n---\nlicense: mit\n", "")],
)  # fmt: skip
def test_a_stated_licence_is_read_in_every_form(tmp_path, front, licence):
    (tmp_path / "README.md").write_bytes(f"---\n{front}---\n# Base\n".encode())
    assert card._licence(str(tmp_path), "model") == licence


def test_what_an_older_run_wrote_down_of_a_secret_is_shown_in_no_card(tmp_path):
    token, address = "hf_" + "AbCdEfGh12345678", "https://me:s3cretpass@host/x?X-Signature=f00ba4"
    for value in (token, f"me/{token}", address):
        settings = {
            name: value
            for name, default in DEFAULTS.items()
            if isinstance(default, str) and name != "objective"
        }
        summary = {"why": value, "finished": False, "device": value, "verdict": value, "layout": value}
        answers = {"pairs": [], "answers": [f"{value} it is"]}
        held_out = {"prompts": [value], "before": answers, "after": answers}
        text = card.write_card(write_run(tmp_path, settings=settings, summary=summary, held_out=held_out))
        assert not any(part in text for part in (token, "s3cretpass", "f00ba4"))


def test_the_example_code_is_python(tmp_path):
    for method in ("lora", "full"):
        text = card.write_card(write_run(tmp_path, settings={"method": method}), repo="me/tuned")
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert 'name = "me/tuned"' in code


def test_the_reading_of_the_curves_on_the_card_does_not_contradict_its_held_out_table(tmp_path):
    from tests.results.test_reading import curves

    rising = {"change": 0.6, "change_interval": [0.5, 0.7]}
    falling = {"change": -0.6, "change_interval": [-0.7, -0.5]}
    names = dict(log_odds_chosen=rising, log_odds_rejected=falling, log_odds_ratio=rising, nll=falling)
    figures = {name: FIGURE | change for name, change in names.items()} | {"accuracy": FIGURE}
    folder = write_run(tmp_path / "a", summary={"held_out": figures})
    rows = curves(nll=-0.5)  # flat in training
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "on held-out pairs margin rising, nll falling: healthy" in card.write_card(folder)
