"""The command line's table: help, mistakes, what each command does; modules that have moved name their new
place."""

import importlib
import subprocess
import sys

import pytest

import lazyorpo_lib
from lazyorpo_lib import __main__ as terminal
from lazyorpo_lib.__main__ import COMMANDS, main
from lazyorpo_lib.errors import UserError


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_command_is_help(name, flag, capsys):
    assert main([name, flag]) == 0
    assert capsys.readouterr().out.startswith(f"usage: lazyorpo {name} RUN")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"]])
def test_help_lists_every_setting_and_every_command(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    out = capsys.readouterr().out
    assert end.value.code == 0
    for name in [*terminal.FIELDS, "plan", "probe", "device", "json"]:
        assert f"--{name.replace('_', '-')}" in out
    words = " ".join(out.split()).replace("- ", "-")  # lines break at hyphens
    assert all(f"{name} RUN" in words for name in COMMANDS)


@pytest.mark.parametrize(
    "given,near", [("chta", "chat"), ("export", "export-gguf"), ("Compare", "compare"), ("runs", "run")]
)
def test_an_unknown_command_is_one_sentence_that_names_the_nearest(given, near):
    with pytest.raises(
        UserError, match=f"no command '{given}'; did you mean {near}\\? All: run, chat, merge"
    ):
        main([given, "folder"])


@pytest.mark.parametrize("words", ["--help", "--version"])
def test_a_reader_that_has_seen_enough_is_no_traceback(words):
    command = [sys.executable, "-m", "lazyorpo_lib", words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        started.stdout.close()  # before anything is written, as `| head -0`
        assert started.stderr.read() == ""
    assert started.returncode in (0, 1)


def test_a_mistake_is_one_line_on_stderr_and_exit_status_2():
    done = subprocess.run([sys.executable, "-m", "lazyorpo_lib", "chta"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lazyorpo: There is no command") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_tell_wrong_use_and_wrong_folders(name, tmp_path):
    for wrong in ([], ["--flag"], ["a"] * 100):
        with pytest.raises(UserError, match=f"lazyorpo_lib {name} RUN"):
            main([name, *wrong])
    two = [str(tmp_path / "none"), "x"] if name in ("compare", "push") else [str(tmp_path / "none")]
    with pytest.raises(UserError, match="not the folder of a run"):
        main([name, *two])


@pytest.mark.parametrize(
    "name,given,said",
    [
        ("merge", ["a"], "The full model is in ('a',)"),
        ("merge", ["a", "b"], "The full model is in ('a', 'b')"),
        ("export-gguf", ["a"], "('a',)"), ("push", ["a", "me/b"], "Pushed to ('a', 'me/b')"),
        ("chat", ["a"], ""),
    ],
)  # fmt: skip
def test_a_command_hands_its_words_on_and_tells_what_came_of_it(name, given, said, monkeypatch, capsys):
    act = name.replace("-", "_")
    monkeypatch.setattr(f"lazyorpo_lib.results.share.{act}", lambda *given: given)
    assert main([name, *given]) == 0 and capsys.readouterr().out.strip() == said


def test_a_flag_or_run_is_a_run(monkeypatch):
    seen = []
    monkeypatch.setattr(terminal, "train", lambda given: seen.append(given) or 0)
    for words in ([], ["--seed", "1"], ["run"], ["run", "--seed", "1"]):
        assert main(words) == 0
    assert seen == [[], ["--seed", "1"], [], ["--seed", "1"]]


# What has moved.


@pytest.mark.parametrize("name", lazyorpo_lib._MOVED)
def test_a_module_that_moved_names_its_new_place_which_is_there(name):
    place = lazyorpo_lib._MOVED[name].split(" ")[0]
    for code in (
        f"import lazyorpo_lib.{name}",
        f"from lazyorpo_lib import {name}",
        f"from lazyorpo_lib.{name} import x",
    ):
        with pytest.raises(
            ImportError, match=f"lazyorpo_lib.{name} has moved: import it from lazyorpo_lib.{place}"
        ):
            exec(code, {})
    assert importlib.util.find_spec(f"lazyorpo_lib.{place}")


@pytest.mark.parametrize("name,place", [("probe", "probe"), ("compare_recipes", "recipes")])
def test_a_function_of_the_module_that_became_a_room_names_its_new_place_which_has_it(name, place):
    code = f"from lazyorpo_lib.trials import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    where = f"lazyorpo_lib.trials.{place}"
    said = f"ImportError: lazyorpo_lib.trials.{name} has moved: import it from {where}."
    assert done.stderr.splitlines()[-1] == said
    assert callable(getattr(importlib.import_module(where), name))


def test_what_never_was_is_not_found_as_ever():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lazyorpo_lib.nothing")
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from lazyorpo_lib import nothing", {})


def test_importing_the_package_is_light():
    heavy = "torch", "numpy", "argparse", "difflib"
    code = f"import sys, lazyorpo_lib; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
