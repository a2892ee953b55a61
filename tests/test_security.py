"""What a model's files could do to the user is not done; what the user has stays here: a token, and what is
outside output_dir."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lazyorpo_lib import model
from lazyorpo_lib.__main__ import main
from lazyorpo_lib.demo.model import TINY_MODEL, write_tiny
from lazyorpo_lib.errors import UserError, printable, without_secrets
from lazyorpo_lib.settings import FIELDS, Settings
from tests import audit
from tests.conftest import PLANTED, booby_trap, files_holding
from tests.hub import serve


def base(folder):
    return model.load_base(str(folder), dtype=torch.float32, device="cpu")


@pytest.fixture
def tiny(tmp_path):
    write_tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("also", ["", "model.safetensors"])
def test_a_pickle_of_weights_in_a_model_folder_is_never_loaded(tiny, also):
    (tiny / "pytorch_model.bin").write_bytes(booby_trap(tiny / "sprung"))
    if also:
        base(tiny)
    else:
        (tiny / "model.safetensors").unlink()
        with pytest.raises(UserError, match="no weights in safetensors, the only format"):
            base(tiny)
    assert not (tiny / "sprung").exists()


def test_a_pickle_in_place_of_an_adapter_is_never_loaded(tiny):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": TINY_MODEL,
        "r": 4,
        "target_modules": ["q_proj"],
    }
    (tiny / "adapter_config.json").write_text(json.dumps(config))
    (tiny / "adapter_model.bin").write_bytes(booby_trap(tiny / "sprung"))
    with pytest.raises(UserError, match="no weights in safetensors, the only format"):
        model.load_finished(tiny)
    assert not (tiny / "sprung").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_never_run(tiny, file):
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]}
    config = json.loads((tiny / file).read_text()) | {"auto_map": auto, "tokenizer_class": "EvilTokenizer"}
    (tiny / file).write_text(json.dumps(config | ({"model_type": "evil"} if file == "config.json" else {})))
    (tiny / "evil.py").write_text(f"open({str(tiny / 'sprung')!r}, 'w')\nclass C: pass\n")
    for load in (model.load_config, model.load_tokenizer, base, model.load_finished):
        try:
            load(str(tiny))
        except UserError as error:
            assert "\n" not in str(error)
    assert not (tiny / "sprung").exists()


# What lets somebody in, and around it what may be said.
SECRETS = [
    (PLANTED, PLANTED),
    (f"owner/name:{PLANTED}", PLANTED),
    ("hf_PLANTEDsecret", "PLANTEDsecret"),
    (f"https://user:{PLANTED}@host/pairs.jsonl", PLANTED),
    ("https://user:s3cret/p@ss@host/pairs.jsonl", "s3cret/p@ss"),
    ("user:s3cretpass@host.org/pairs.jsonl", "s3cretpass"),
    ("https://host/pairs.jsonl?X-Amz-Expires=9&X-Amz-Signature=f00ba4", "f00ba4"),
    ("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/pairs", "wJalrXUtnFEMI"),
    ("host/pairs.jsonl?sig=f00ba4", "f00ba4"),
    ("sk-proj-abcdefghij0123456789", "abcdefghij0123456789"),
    ("kept in the environment 0815", "environment 0815"),
]


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("MY_DATABASE_PASSWORD", "kept in the environment 0815")


@pytest.mark.parametrize("value,secret", SECRETS)
def test_a_secret_is_told_by_no_error_and_leaving_it_out_twice_changes_nothing(value, secret, environment):
    said = str(UserError(f"Dataset {value!r} cannot be read: 401 for url {value}."))
    assert secret not in said and said.startswith("Dataset '") and without_secrets(said) == said
    assert secret not in str(UserError(KeyError(value)))


@pytest.mark.parametrize(
    "text",
    ["/data/hf_models_cache/tiny", "HuggingFaceH4/ultrafeedback_binarized:train_prefs", "max_tokens=2048",
     "C:\\pairs\\x@2.jsonl", "prompt=question,chosen=best", "https://huggingface.co/me/x", "12:30:45 token"],
)  # fmt: skip
def test_ordinary_texts_are_said_as_they_are(text):
    assert without_secrets(text) == text == str(UserError(text))


@pytest.mark.parametrize("door", ["flag", "env", "file", "python"])
@pytest.mark.parametrize("name", FIELDS)
def test_a_secret_in_any_setting_is_refused_and_repeated_by_no_door(
    name, door, environment, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAZYORPO_MAX_STEPS", "1")
    for value, secret in SECRETS:
        flags = [f"--{name.replace('_', '-')}", value] if door == "flag" else []
        if door == "env":
            monkeypatch.setenv(f"LAZYORPO_{name.upper()}", value)
        elif door == "file":
            (tmp_path / "settings.json").write_text(json.dumps({"settings": {name: value}}))
            flags = ["--settings", "settings.json"]
        with pytest.raises(UserError, match=name) as error:
            if door == "python" and FIELDS[name].type is str:
                Settings(**{name: value})
            else:
                main([*flags, f"--{name.replace('_', '-')}", value] if door == "python" else flags)
        assert secret not in str(error.value) and secret not in str(capsys.readouterr())
    assert {file.name for file in tmp_path.iterdir()} <= {"settings.json"}


@pytest.mark.parametrize("piece", ["a:", "://", "sk-", "token=", "://?", "a@b:", "bearer "])
def test_no_text_takes_long_to_clear_of_secrets(piece):
    began = time.monotonic()
    without_secrets(piece * 20_000)
    assert time.monotonic() - began < 10


def test_a_folder_that_is_there_may_be_called_as_a_token_is(tmp_path):
    (tmp_path / "hf_Llama3Converted").mkdir()
    assert Settings(base_model=str(tmp_path / "hf_Llama3Converted"), output_dir="hf_finetuned")


def test_control_sequences_are_written_in_letters_and_ordinary_text_is_not_changed():
    evil = "a\x1b[2J\x1b]0;title\x07b\x9b31m\rc\x08\u202ed\ud800"
    assert printable(evil) == r"a\x1b[2J\x1b]0;title\x07b\x9b31m\rc\x08\u202ed\ud800"
    for fine in (
        "two\nlines\tand a tab\r\n",
        "na\u00efve \u6f22\u5b57 \U0001f469\u200d\U0001f680",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    ):
        assert printable(fine) == fine
    with pytest.raises(UserError, match=r"x\\x1b\[2Jy"):
        raise UserError("x\x1b[2Jy")


@pytest.mark.slow
def test_a_token_stays_unsaid_and_nothing_is_written_outside_the_runs_folder(tmp_path):
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    with serve() as server:
        server.status = 403  # whose text repeats the token
        environment = {
            "HF_TOKEN": PLANTED,
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "lazyorpo_lib", "--preset", "tiny", "--max-steps", "2",
                "--save-every-steps", "1", "--hub-repo",
             "me/tuned", "--output-dir", str(tmp_path / "run")], cwd=tmp_path / "here", capture_output=True,
             text=True,
            env=os.environ | environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
    assert (
        done.returncode == 2
        and "Nothing was pushed to 'me/tuned'" in done.stderr
        and "set HF_TOKEN" in done.stderr
    )
    assert PLANTED not in done.stdout + done.stderr and not files_holding(tmp_path, PLANTED)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
    assert not list((tmp_path / "here").iterdir())
    assert {p.name for p in (tmp_path / "home").iterdir()} <= {".cache", ".config", ".triton"}
    shutil.rmtree(tmp_path / "home")


def test_the_audit_fails_on_what_is_not_accepted_and_says_when_nobody_could_be_asked(monkeypatch):
    package = {"name": "torch", "version": "2.13.0", "vulns": [{"id": "PYSEC-1"}]}
    other = {"name": "numpy", "version": "2.4.6", "vulns": []}
    assert audit.judge({}) == audit.judge({"dependencies": [{"name": "torch", "skip_reason": "not found"}]})
    assert audit.judge({})[0] == 0 and "could be asked" in audit.judge({})[1]
    status, text = audit.judge({"dependencies": [package, other]})
    assert status == 1 and "torch 2.13.0 has PYSEC-1: not accepted" in text and "2 of 2 packages" in text
    monkeypatch.setitem(audit.ACCEPTED, "PYSEC-1", "2026-11-25, that code is not reached")
    assert audit.judge({"dependencies": [package, other]})[0] == 0
    assert audit.judge({"dependencies": [other]})[0] == 0
