"""share.py: the merged model is the tuned one, the talk goes as in training, a push is whole."""

import base64
import errno
import io
import json
import os
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from lazyorpo_lib import marker, model
from lazyorpo_lib.demo.model import TINY_MODEL
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.machine import this_machine
from lazyorpo_lib.marker import MARKER
from lazyorpo_lib.orpo.encoding import prepare_tokenizer
from lazyorpo_lib.results import share
from lazyorpo_lib.results.compare import compare
from lazyorpo_lib.run import execute
from lazyorpo_lib.settings import Settings, resolve
from tests.hub import serve
from tests.results.test_card import write_run

IDS = torch.arange(10, 40)[None]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny model whose adapter has learned something random; never changed by a test."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "a", settings={"base_model": TINY_MODEL})
    tuned = model.add_adapters(
        model.load_base(TINY_MODEL, dtype=torch.float32, device="cpu"), Settings(base_model=TINY_MODEL)
    )
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = model.load_tokenizer(TINY_MODEL)
    prepare_tokenizer(tokenizer)
    tuned.generation_config.eos_token_id = [2, 7]
    model.save_model(tuned, tokenizer, folder / "model", base_model=TINY_MODEL)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A function that makes another run's folder with the same model."""

    def make(name, **options):
        write_run(tmp_path / name, **options)
        (tmp_path / name / "model").symlink_to(run / "model")
        return tmp_path / name

    return make


def logits(folder, **options):
    with torch.no_grad():
        return model.load_finished(folder, **options)[0](IDS).logits


def test_merged_model_alone_gives_the_logits_of_the_adapter(run, tmp_path):
    out = share.merge(run, tmp_path / "deep" / "merged")
    assert not (out / "adapter_config.json").exists() and list(out.glob("*.safetensors"))
    adapted = logits(run / "model")
    assert (logits(out) - adapted).abs().max() < 1e-5
    base = model.load_base(TINY_MODEL, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        assert (base(IDS).logits - adapted).abs().max() > 0.1  # the adapter does something


def test_merged_folder_has_template_generation_settings_and_cache(run, tmp_path):
    out = share.merge(run, tmp_path / "merged")
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7]
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    assert (out / "chat_template.jinja").read_text() == (run / "model" / "chat_template.jinja").read_text()


def test_tools_on_transformers_4_know_the_class_of_the_saved_tokenizer(run):
    saved = json.loads((run / "model" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_further_special_tokens_are_saved_as_transformers_4_reads_them_and_come_back(run, tmp_path):
    loaded, tokenizer = model.load_finished(run / "model", merge=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<further>"]})
    model.save_model(loaded, tokenizer, tmp_path / "m", base_model="")
    saved = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert saved["additional_special_tokens"] == ["<further>"] and "extra_special_tokens" not in saved
    back = model.load_finished(tmp_path / "m")[1]
    assert back.extra_special_tokens == ["<further>"] and back("a<further>") == tokenizer("a<further>")


def test_merged_weights_have_the_precision_of_the_run(copy):
    folder = copy("half", summary={"precision": "bfloat16"})
    merged = share.merge(folder)
    assert merged == folder / "merged"
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert (logits(merged) - logits(folder / "model")).abs().max() < 0.1


def test_gguf_is_written_by_llama_cpps_converter_or_its_commands_are_told(copy, tmp_path, monkeypatch):
    folder, tools = copy("a run"), tmp_path / "tools"
    monkeypatch.setenv("PATH", str(tools))
    told = share.export_gguf(folder)
    assert (
        "git clone" in told
        and "requirements" not in told
        and f"'{folder / 'merged'}' --outtype q8_0 --outfile '{folder / 'merged'}.gguf'" in told
    )
    tools.mkdir()
    converter = tools / "convert_hf_to_gguf.py"
    converter.write_text("import sys\nopen(sys.argv[-1], 'w').write(' '.join(sys.argv[1:]))")
    converter.chmod(0o755)
    assert share.export_gguf(folder) == f"{folder / 'merged'}.gguf is written."
    assert (folder / "merged.gguf").read_text().startswith(str(folder / "merged"))
    converter.write_text("import nothing_of_this_name")
    with pytest.raises(UserError, match="nothing_of_this_name"):
        share.export_gguf(folder)


@pytest.mark.slow
def test_a_4_bit_base_is_merged_in_16_bit_and_reloads_to_the_same_logits(tmp_path):
    settings = {
        "preset": "tiny",
        "method": "qlora",
        "max_steps": 2,
        "precision": "bfloat16",
        "answers": 0,
        "output_dir": str(tmp_path / "q"),
    }
    execute(*resolve([("test", settings)])[:2], show=lambda text: None)
    merged = share.merge(tmp_path / "q")
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    exact = share.merge(tmp_path / "q", tmp_path / "exact", dtype=torch.float32)
    assert (logits(exact) - logits(tmp_path / "q" / "model")).abs().max() < 1e-5
    assert (logits(merged) - logits(exact)).abs().max() < 0.1


def test_streamed_pieces_are_the_answer_of_plain_generation(run):
    tuned, tokenizer = model.load_finished(run / "model")
    tuned.generation_config.suppress_tokens = list(range(40))  # letters, so that there is something to see
    pieces, messages = [], [{"role": "user", "content": "Hello"}]
    answer = share.reply(tuned, tokenizer, messages, pieces.append, max_tokens=12)
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = tuned.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True).strip() and len(answer) > 5
    assert "".join(pieces).strip() == answer


def test_a_talk_longer_than_the_context_is_cut_not_refused(run):
    tuned, tokenizer = model.load_finished(run / "model")
    tuned.config.max_position_embeddings = 64
    seen = []
    generate = tuned.generate
    tuned.generate = lambda **options: seen.append(options["input_ids"].shape[1]) or generate(**options)
    share.reply(tuned, tokenizer, [{"role": "user", "content": "long " * 100}], max_tokens=8)
    assert seen == [56]


def test_special_tokens_typed_by_the_user_stay_text(run):
    tuned, tokenizer = model.load_finished(run / "model")
    seen = []
    tuned.generate = lambda input_ids, **options: seen.append(input_ids[0].tolist()) or input_ids
    share.reply(tuned, tokenizer, [{"role": "user", "content": "a<eos>b"}])
    assert tokenizer.eos_token_id not in seen[0] and "a<eos>b" in tokenizer.decode(seen[0])


def test_a_notebook_asks_the_model_of_its_run_and_reloads_it_where_it_is_gone(run, capsys):
    here = types.SimpleNamespace(folder=run, dtype=torch.float32, machine=this_machine())
    share.ask(here, "Hello")
    first = capsys.readouterr().out
    share.ask(here, "Hello")
    assert (
        capsys.readouterr().out == first and "lora" in str(type(here.model)).lower() + str(here.model).lower()
    )


def test_chat_keeps_the_talk_and_ends_at_exit(run, monkeypatch, capsys):
    heard = []

    def answer(tuned, tokenizer, messages, on_text):
        heard.append([turn["content"] for turn in messages])
        if messages[-1]["content"] == "bad":
            raise UserError("no")
        on_text("yes")
        return "yes"

    monkeypatch.setattr(share, "reply", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\nbad\ntwo\n/new\nthree\n/exit\nnever\n"))
    talk = share.chat(run)
    assert heard == [["one"], ["one", "yes", "bad"], ["one", "yes", "two"], ["three"]]
    assert [turn["content"] for turn in talk] == ["three", "yes"]
    assert capsys.readouterr().out.count("Model: yes") == 3


def test_an_export_is_of_the_model_as_it_is_now_and_never_of_an_older_merged_one(copy, monkeypatch, tmp_path):
    folder = copy("a")
    share.merge(folder)
    (folder / "model").unlink()
    shutil.copytree(copy("b") / "model", folder / "model")  # the run went on
    file = folder / "model" / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    marker.seal(folder / "model", "model")
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    assert "git clone" in share.export_gguf(folder)
    assert (logits(folder / "merged") - logits(folder / "model")).abs().max() < 1e-5


def test_a_converter_that_fails_half_way_leaves_what_was_there(copy, tmp_path, monkeypatch):
    folder, tools = copy("a"), tmp_path / "tools"
    monkeypatch.setenv("PATH", str(tools))
    tools.mkdir()
    converter = tools / "convert_hf_to_gguf.py"
    converter.write_text("import sys\nopen(sys.argv[-1], 'w').write('whole')")
    converter.chmod(0o755)
    share.export_gguf(folder)
    converter.write_text("import sys\nopen(sys.argv[-1], 'w').write('half')\nraise OSError(28, 'No space')")
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="No space"):
        share.export_gguf(folder)
    assert (folder / "merged.gguf").read_text() == "whole" and sorted(folder.iterdir()) == before


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("writes", ["tokenizer", "generation settings", "weights"])
def test_a_disk_that_fails_while_merging_is_one_sentence_and_leaves_nothing_half(
    copy, tmp_path, monkeypatch, fault, writes
):
    folder, out = copy("a"), tmp_path / "out"

    def fails(*given, **more):
        raise OSError(fault, os.strerror(fault))

    where = {
        "tokenizer": "transformers.PreTrainedTokenizerFast.save_pretrained",
        "generation settings": "transformers.GenerationConfig.save_pretrained",
        "weights": "transformers.LlamaForCausalLM.save_pretrained",
    }
    monkeypatch.setattr(where[writes], fails)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"can be written to .*out.*{os.strerror(fault)}.*merge again"):
        share.merge(folder, out)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("out", ["/proc/nothing/merged", "/dev/null/merged", "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_sentence(copy, out):
    with pytest.raises(UserError, match="cannot be"):
        share.merge(copy("a"), out)


def test_nobodys_home_is_the_folder_of_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a home that is not there: write the folder out"):
        share.chat("~nobody-of-this-name/run")


DAMAGED = (
    "",
    "{",
    '{"set',
    "{}",
    "[]",
    "null",
    '"text"',
    '{"settings": 3}',
    '{"held_out": 7, "precision": []}',
)


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("name", ["settings.json", "summary.json", "held_out.json", "data_report.json"])
def test_a_run_whose_files_are_empty_half_or_others_is_used_or_refused_in_one_sentence(
    hub, copy, name, content
):
    folder, other = copy("a"), copy("b")
    (folder / name).write_text(content)
    for use in (
        lambda: share.merge(folder),
        lambda: share.push(folder, "me/tuned"),
        lambda: compare([folder, other]),
        lambda: compare([other, folder]),
    ):
        try:
            use()
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error) and "JSON" not in type(error).__name__


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["summary.json", "held_out.json", "history.jsonl", "live.png", "README.md"])
def test_a_pipe_in_the_folder_of_a_run_is_refused_and_not_waited_for(copy, name):
    folder, other = copy("a"), copy("b")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for use in (share.merge, share.chat, lambda f: share.push(f, "a/b"), lambda f: compare([other, f])):
        with pytest.raises(UserError, match="is a pipe or a device"):
            use(folder)


def test_an_answer_is_printed_without_what_a_terminal_would_obey(run, monkeypatch, capsys):
    evil = ["\x1b[2J", "\x1b]52;c;aGk=\x07", "fine \u6f22\n", "\x9b31m\r"]

    def answer(tuned, tokenizer, messages, on_text):
        for piece in evil:
            on_text(piece)
        if len(messages) > 1:
            raise UserError("no \x1b[2J")
        return "".join(evil)

    monkeypatch.setattr(share, "reply", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    share.chat(run)
    share.ask(types.SimpleNamespace(folder=run, model=None, tokenizer=None), "one")
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\x9b\r") and out.count("fine \u6f22\n") == 3


# To the hub.


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_testtoken")
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def commit(hub):
    lines = [json.loads(line) for path, body in hub.heard if "/commit/" in path for line in body.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }


def test_push_makes_a_private_repository_with_model_card_picture_and_summary(hub, run):
    assert share.push(run, "me/tuned").endswith("/me/tuned")
    path, body = next(heard for heard in hub.heard if "create" in heard[0])
    made = json.loads(body)
    assert made.get("private") is True or made.get("visibility") == "private"
    files = commit(hub)
    own = {f.name for f in (run / "model").iterdir()} - {MARKER}
    assert set(files) == own | {"README.md", "live.png", "summary.json"}
    assert files["adapter_model.safetensors"] == (run / "model" / "adapter_model.safetensors").read_bytes()
    assert b'name = "me/tuned"' in files["README.md"] and b"More Information Needed" not in files["README.md"]


def test_push_takes_no_local_path_and_no_other_file_along(hub, copy, tmp_path):
    folder = copy("a", settings={"base_model": "/home/me/base"}, summary={"why": "no room: '/home/me/x'"})
    (folder / "model").unlink()
    (folder / "model").mkdir()
    (folder / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/home/me/base"})
    )
    (folder / "dropped.jsonl").write_text("{}")
    share.push(folder, "me/tuned")
    files = commit(hub)
    assert set(files) == {"adapter_config.json", "README.md", "live.png", "summary.json"}
    assert not any(b"/home/me" in content for content in files.values())


@pytest.mark.parametrize(("status", "way_out"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (500, "connection")])
def test_a_refused_push_is_one_sentence_without_the_token(hub, run, status, way_out):
    hub.status = status
    with pytest.raises(UserError, match=way_out) as error:
        share.push(run, "me/tuned")
    assert "hf_testtoken" not in str(error.value) and "\n" not in str(error.value)


def test_a_bad_name_and_no_connection_are_one_sentence(hub, run, monkeypatch):
    with pytest.raises(UserError, match="name that the hub allows"):
        share.push(run, "a/b/c d")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="connection"):
        share.push(run, "me/tuned")


# Wrong folders.


WORKS = {
    "chat": share.chat,
    "merge": share.merge,
    "export_gguf": share.export_gguf,
    "push": lambda folder: share.push(folder, "a/b"),
}


@pytest.mark.parametrize("name", WORKS)
def test_a_folder_that_is_no_run_and_a_run_without_a_model_are_told(name, tmp_path):
    with pytest.raises(UserError, match="not the folder of a run"):
        WORKS[name](tmp_path / "none")
    with pytest.raises(UserError, match="no model yet"):
        WORKS[name](write_run(tmp_path))
