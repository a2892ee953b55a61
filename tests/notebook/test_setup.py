"""The first cell: what is installed and what is left alone, where the token comes from; what a run cannot do
without."""

import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lazyorpo_lib
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.notebook import setup

COLAB = Path(__file__).parents[3] / "shared" / "data" / "colab-runtime-2026-08-19.txt"
ABSENT_ON_COLAB = {"bitsandbytes", "nbval", "gguf"}
SECRET = "hf_" + "secret"


def test_importing_it_imports_nothing_heavy():
    heavy = "torch", "numpy", "packaging", "ipywidgets"
    code = f"import sys, lazyorpo_lib.notebook.setup; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_requirements_are_floors_only():
    lines = [line.split("#")[0].strip() for line in setup.REQUIREMENTS.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    for one in wanted:
        assert [s.operator for s in one.specifier] == [">="], one
    assert [f"{name}>={floor}" for name, floor in setup.requirements()] == list(map(str, wanted))


@pytest.mark.skipif(not COLAB.is_file(), reason="the package list of Colab's runtime is not here")
def test_nothing_that_colab_ships_is_changed():
    frozen = dict(line.split("==") for line in COLAB.read_text().splitlines() if "==" in line)
    frozen = {name.lower().replace("_", "-"): version for name, version in frozen.items()}
    for name, floor in setup.requirements():
        shipped = frozen.get(name.lower().replace("_", "-"))
        assert (shipped is None) == (name in ABSENT_ON_COLAB), name
        assert shipped is None or Requirement(f"{name}>={floor}").specifier.contains(shipped), (name, shipped)


@pytest.fixture
def wishes(tmp_path, monkeypatch):
    """Writes a requirements file, and keeps the pip commands that would have been run."""
    path, commands = tmp_path / "requirements.txt", []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, wishes.exit_status, "", wishes.complaint)

    def wishes(text):
        path.write_text(text)

    wishes.exit_status, wishes.complaint, wishes.commands = 0, "", commands
    monkeypatch.setattr(setup, "REQUIREMENTS", path)
    monkeypatch.setattr(lazyorpo_lib.subprocess, "run", run)
    return wishes


def test_only_what_is_missing_or_too_old_is_wanted(wishes):
    wishes("pytest>=1  # here\n\n# a comment\nno-such-package-lazyorpo>=2\npytest>=9999\n")
    assert setup.missing_requirements() == ["no-such-package-lazyorpo>=2", "pytest>=9999"]


def test_a_local_or_development_version_is_new_enough(wishes, monkeypatch):
    versions = {"torch": "2.11.0+cu128", "numpy": "3.0.0.dev0"}
    monkeypatch.setattr(setup.metadata, "version", versions.__getitem__)
    wishes("torch>=2.6\nnumpy>=1.26\n")
    assert setup.missing_requirements() == []


def test_pip_gets_exactly_the_missing_and_no_upgrade(wishes):
    wishes("")
    setup.install(["a>=1", "b>=2"])
    assert wishes.commands == [
        [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "a>=1", "b>=2"]
    ]


def test_without_pip_uv_runs_it_and_without_both_a_sentence_says_what_to_run(wishes, monkeypatch):
    wishes("")
    monkeypatch.setattr(lazyorpo_lib.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(lazyorpo_lib.shutil, "which", lambda name: f"/bin/{name}")
    setup.install(["a>=1"])
    (command,) = wishes.commands
    assert command[:3] == ["/bin/uv", "tool", "run"] and command.count(sys.executable) == 2
    assert command[-4:] == ["install", "-q", "--disable-pip-version-check", "a>=1"]
    monkeypatch.setattr(lazyorpo_lib.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"neither pip nor uv: run .* -m ensurepip, then again"):
        setup.install(["a>=1"])


# What a run cannot do without.


def test_a_torch_below_the_floor_is_one_sentence(monkeypatch):
    there = setup._version
    monkeypatch.setattr(setup, "_version", lambda name: "2.5.1+cu124" if name == "torch" else there(name))
    with pytest.raises(UserError, match=r"torch is 2\.5\.1\+cu124, but >=2\.6 is needed: pip install"):
        setup.check_requirements()


@pytest.mark.parametrize("command", [[], ["--plan"], ["merge", "a"], ["chat", "a"]])
def test_where_something_is_missing_the_command_line_says_what_to_install_before_it_imports_anything(command):
    """In a Python that sees no installed packages at all."""
    code = "import runpy, sys; sys.path.append('.'); sys.argv[1:] = {}; "
    code += "runpy.run_module('lazyorpo_lib', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code.format(command)], capture_output=True, text=True,
        cwd=Path(lazyorpo_lib.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub"):
        assert f"{name} is not installed, but >=" in done.stderr and f"'{name}>=" in done.stderr
    assert "nbval" not in done.stderr and "pip install 'torch>=" in done.stderr


def test_a_failing_pip_is_one_sentence(wishes):
    wishes("")
    wishes.exit_status, wishes.complaint = 1, "much\nERROR: no matching distribution"
    with pytest.raises(UserError, match=r"could not install a>=1 \(ERROR: no matching distribution\)"):
        setup.install(["a>=1"])


def test_a_package_replaced_while_in_use_asks_for_a_restart(wishes, monkeypatch):
    wishes("pytest>=1\n")
    versions = iter(["1.0", "2.0"])
    monkeypatch.setattr(setup, "_version", lambda name: next(versions))
    with pytest.raises(UserError, match="pytest had to be replaced .*Restart session"):
        setup.install(["pytest>=2"])


def test_with_nothing_missing_prepare_runs_no_command(wishes, monkeypatch, capsys):
    wishes("pytest>=1\n")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    setup.prepare()
    assert wishes.commands == []
    out = capsys.readouterr().out
    assert "from the environment" in out and SECRET not in out


# Colab, without Colab.


@pytest.fixture
def colab(monkeypatch):
    """A fake google.colab; `colab.userdata.get` and `colab.drive.mount` are the test's to give."""
    package = types.ModuleType("google.colab")
    package.userdata, package.drive = types.SimpleNamespace(), types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setenv("HF_TOKEN", "")
    setup._colab_secret.cache_clear()
    yield package
    setup._colab_secret.cache_clear()


def test_the_environment_comes_before_colabs_secrets(colab, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)  # userdata.get does not exist: asking it would fail
    assert setup.find_token() == "from the environment"


def test_colabs_secret_reaches_the_environment_and_is_never_printed(colab, capsys):
    colab.userdata.get = {"HF_TOKEN": SECRET}.get
    assert setup.find_token() == "from Colab's secrets"
    assert os.environ["HF_TOKEN"] == SECRET
    assert SECRET not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["NotebookAccessError", "SecretNotFoundError", "TimeoutException"])
def test_colabs_refusals_are_told_once_and_stop_nothing(colab, name):
    asked = []

    def get(key):
        asked.append(key)
        raise type(name, (Exception,), {})(key)

    colab.userdata.get = get
    for _ in range(2):
        assert setup.find_token() == f"none (Colab's secrets: {name}); public models and datasets need none"
    assert asked == ["HF_TOKEN"]


def test_colab_without_a_gpu_names_the_menu_and_goes_on(colab, wishes, monkeypatch, capsys):
    wishes("")
    colab.userdata.get = {}.get
    monkeypatch.setattr(lazyorpo_lib.shutil, "which", lambda tool: None)
    setup.prepare()
    assert "Runtime > Change runtime type > T4 GPU" in capsys.readouterr().out


def test_elsewhere_no_gpu_is_not_a_matter_for_setup(wishes, capsys):
    wishes("")
    setup.prepare()
    assert "GPU" not in capsys.readouterr().out


# Colab's torchao 0.10, at which peft raises.


@pytest.mark.slow
def test_an_old_torchao_does_not_stop_lora(tmp_path):
    info = tmp_path / "torchao-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("__version__ = '0.10.0'\n")
    code = (
        "import sys, torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "import peft\n"
        "if sys.argv[1] == 'kit':\n"
        "    from lazyorpo_lib.model import import_peft\n"
        "    peft = import_peft()\n"
        "sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16)\n"
        "config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)\n"
        "model = LlamaForCausalLM(config)\n"
        "config = peft.LoraConfig(target_modules='all-linear', task_type='CAUSAL_LM')\n"
        "lora = peft.get_peft_model(model, config)\n"
        "lora.merge_and_unload()\n"
    )
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}

    def build(how):
        return subprocess.run([sys.executable, "-c", code, how], env=env, capture_output=True, text=True)

    done = build("kit")
    assert done.returncode == 0, done.stderr
    major, minor = map(int, importlib.metadata.version("peft").split(".")[:2])
    if (major, minor) >= (0, 19):  # there the refusal is real, and it is the kit that gets past it
        assert "torchao" in build("plain").stderr
