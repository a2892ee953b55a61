"""The command line's table: help, mistakes, what each command does; modules that have moved name their new
place."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from lazyorpo_lib import __main__ as terminal
from lazyorpo_lib.__main__ import COMMANDS, main
from lazyorpo_lib.errors import UserError, say


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
    "given,near",
    [("chta", "chat"), ("export", "export-gguf"), ("Compare", "compare"), ("runs", "run"), ("pair", "pairs")],
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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-16"])
@pytest.mark.parametrize("words", [["--help"], ["chta"]])
def test_any_encoding_of_the_console_will_do(encoding, words):
    command = [sys.executable, "-m", "lazyorpo_lib", *words]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == (2 if words == ["chta"] else 0)
    assert "Traceback" not in (done.stdout + done.stderr).decode(encoding, "replace")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's redirections")
@pytest.mark.parametrize("where", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", "<&-"])
@pytest.mark.parametrize("word,status", [("--version", 0), ("chta", 2)])
def test_a_console_that_is_closed_or_full_changes_no_status(where, word, status):
    shell = f"{sys.executable} -m lazyorpo_lib {word} {where}"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr and "ignored" not in done.stderr


RUN = """
import sys
from lazyorpo_lib import __main__ as terminal
def run(words):
    for text in ("one", "\u6f22\u5b57\u2026", "three"):
        print(text, flush=True)
        print(text, file=sys.stderr, flush=True)
        print("noted", file=open(sys.argv[1], "a"))
    return 0
terminal.main = run
terminal.console()
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_run_whose_reader_or_terminal_has_gone_goes_on_to_its_end(tmp_path, encoding):
    command = [sys.executable, "-c", RUN, str(tmp_path / "notes")]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, start_new_session=True
    ) as started:
        started.stdout.close()
        started.stderr.close()
    assert started.returncode == 0 and (tmp_path / "notes").read_text() == "noted\n" * 3
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env, start_new_session=True) as started:
        os.close(theirs)
        os.close(ours)
    assert started.returncode == 0 and (tmp_path / "notes").read_text() == "noted\n" * 6


class Gone(io.StringIO):
    def write(self, text):
        raise OSError(5, "Input/output error")


def test_what_is_said_stops_nothing_and_no_terminal_obeys_it(monkeypatch, capsys):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    closed = io.StringIO()
    closed.close()
    for stream in (Gone(), closed, None, narrow):
        monkeypatch.setattr(sys, "stdout", stream)
        say("\u6f22\x1b[2J")
    assert narrow.buffer.getvalue() == b"?\\x1b[2J\n"


def test_an_unexpected_error_of_the_command_line_shows_no_token(tmp_path):
    token = "hf_" + "AbCdEfGh" * 4
    address = f"https://me:{token}@host/x?anything=abcd"
    code = f"from lazyorpo_lib import __main__ as m; m.main = lambda w: {{}}[{address!r}]; m.console()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "KeyError: 'https://(token left out)@host/x?(token" in done.stderr
    assert token not in done.stderr


# --settings FILE


def test_a_file_of_settings_is_a_runs_own_and_flags_beside_it_win(tmp_path, monkeypatch):
    seen, file = [], tmp_path / "settings.json"
    monkeypatch.setattr(terminal, "resolve", lambda layers, **more: seen.append(layers) or 1 / 0)
    kept = {"version": "0", "settings": {"epochs": 2.0, "seed": 1}, "sources": {}}
    file.write_text(json.dumps(kept))
    with pytest.raises(ZeroDivisionError):
        main(["--settings", str(file), "--seed", "9"])
    assert [values for _, values in seen[0]] == [{}, kept["settings"], {"seed": 9}]


@pytest.mark.parametrize("content", [None, "folder", "pipe", "", "{", "[]", "{}", '{"settings": 3}', "\xff"])
def test_a_file_that_holds_no_settings_is_one_sentence(tmp_path, content):
    file = tmp_path / "settings.json"
    if content == "folder":
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    elif content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="holds no settings: give the settings.json of a run"):
        main(["--settings", str(file)])


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
        ("export-gguf", ["a"], "('a',)"), ("export-gguf", ["a", "f16"], "('a', 'f16')"),
        ("ollama", ["a", "me/b"], "('a', 'me/b')"), ("lines", ["a"], "('a',)"), ("archive", ["a"], "('a',)"),
        ("push", ["a", "me/b"], "Pushed to ('a', 'me/b')"),
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


def test_what_never_was_is_not_found_as_ever():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lazyorpo_lib.nothing")
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from lazyorpo_lib import nothing", {})


def test_importing_the_package_is_light():
    heavy = "torch", "numpy", "argparse", "difflib"
    code = f"import sys, lazyorpo_lib; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_stop_that_a_library_turns_into_another_error_is_told_as_a_stop(monkeypatch):
    def broken_off(arguments):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as stopped:  # as transformers does while it imports
            raise ModuleNotFoundError("Could not import module") from stopped

    monkeypatch.setattr(terminal, "main", broken_off)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as ended:
        terminal.console()
    sys.stderr.stream.flush()
    assert ended.value.code == 130
    assert sys.stderr.stream.buffer.getvalue() == b"lazyorpo: interrupted (SIGTERM)\n"
