"""The acceptance suite for a card, where there is none: its small forms pass, what is wrong is told.

So is what does not fit. And README names no figure of a card which no committed result holds.
"""

import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.gpu import __main__ as suite

ROOT = Path(__file__).parents[1]
ABOUT = {
    "device": "cpu",
    "card": "CPU, 1 threads",
    "memory_gib": 4.0,
    "date": "2026-01-02",
    "commit": "abc",
    "versions": {},
}
LINE = r"(PASS|FAIL) \S+, .+: .+ \(.+\) in \d+\.\d s|SKIP \S+: .+ in \d+\.\d s"


def part(name: str) -> suite.Part:
    return next(p for p in suite.PARTS if p.name == name)


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """main() with its parts in this process; the exit status and the JSON."""

    def started(part, small, seconds):
        said = []
        suite.measure(part, small, said.append)
        return said

    def call(*arguments):
        status = suite.main([*arguments, "--out", str(tmp_path)])
        return status, json.loads((tmp_path / "2026-01-02-cpu.json").read_text())

    monkeypatch.setattr(suite, "machine", lambda: dict(ABOUT))
    monkeypatch.setattr(suite, "started", started)
    return call


def replaced(monkeypatch, name: str, function):
    module, attribute = part(name).function.split(".")
    monkeypatch.setattr(importlib.import_module(f"tests.gpu.{module}"), attribute, function)


def test_a_figure_outside_its_limits_fails_and_so_does_nan():
    from tests.gpu.bench import check, same

    assert check("x", 1.0, high=1.0)["ok"] and check("x", 1.0, 1.0)["ok"] and check("x", 1.0, 0.9, 1.1)["ok"]
    for wrong in (
        check("x", 1.01, high=1.0),
        check("x", 0.99, 1.0),
        check("x", 1.2, 0.9, 1.1),
        same("x", 1, 2),
    ):
        assert wrong["ok"] is False and suite.verdict([check("y", 1.0, high=2.0), wrong]) == "FAIL"
    for limits in (dict(high=1.0), dict(low=0.0), dict(low=0.0, high=1.0)):
        unknown = check("x", float("nan"), **limits)
        assert unknown["ok"] is False and json.dumps(unknown, allow_nan=False)
    assert suite.verdict([check("x", 3.0)]) == "PASS" and check("x", 3.0)["ok"] is None  # only told
    assert suite.verdict([]) == "FAIL"  # a part that looks at nothing has shown nothing
    assert suite.verdict([same("x", 1, 1), {"skip": "no card"}]) == "SKIP"


def test_a_failed_check_and_a_crash_are_told_and_give_exit_status_1(in_process, monkeypatch, capsys):
    from tests.gpu.bench import check

    def wrong(small):
        yield check("right", 1.0, high=2.0)
        yield check("wrong", 3.0, high=2.0, unit="GiB")

    def crash(small):
        yield check("right", 1.0, high=2.0)
        raise ValueError("of a kind\nnobody thought of")

    replaced(monkeypatch, "env", wrong)
    replaced(monkeypatch, "kernel", crash)
    status, record = in_process("env", "kernel")
    assert status == 1
    lines = [re.sub(r"in \d+\.\d s$", "in time", line) for line in capsys.readouterr().out.splitlines()]
    assert "PASS env, right: 1 (<= 2) in time" in lines
    assert "FAIL env, wrong: 3 GiB (<= 2) in time" in lines
    assert "FAIL kernel, end: ValueError: of a kind (told) in time" in lines
    assert [(row["part"], row["verdict"], len(row["checks"])) for row in record["parts"]] == [
        ("env", "FAIL", 2),
        ("kernel", "FAIL", 2),
    ]
    assert lines[-2].startswith(" 2 kernel") and "failed: end" in lines[-2]


def test_what_does_not_fit_into_the_minutes_or_needs_a_card_is_skipped_by_name(
    in_process, monkeypatch, capsys
):
    from tests.gpu.bench import check

    replaced(monkeypatch, "env", lambda small: iter([check("right", 1.0, high=2.0)]))
    seconds = part("env").small
    status, record = in_process("env", "equal", "oom", "--minutes", str((seconds + 1) / 60))
    assert status == 0
    told = {row["part"]: row["verdict"] for row in record["parts"]}
    assert told == {"env": "PASS", "equal": "SKIP", "oom": "SKIP"}
    out = capsys.readouterr().out
    some, left = part("equal").small, f"({seconds}|{seconds + 1})"
    assert re.search(rf"^SKIP equal: some {some} s do not fit into the {left} s that are left", out, re.M)
    assert re.search(r"^SKIP oom: needs a card in", out, re.M)


def test_a_second_call_of_the_day_adds_to_the_file_and_takes_no_figure_away(in_process, monkeypatch):
    from tests.gpu.bench import check

    replaced(monkeypatch, "kernel", lambda small: iter([check("right", 1.0, high=2.0)]))
    in_process("kernel")
    replaced(monkeypatch, "env", lambda small: iter([check("right", 1.0, high=2.0)]))
    _, record = in_process("env", "kernel", "--minutes", str((part("env").small + 0.5) / 60))
    assert [(row["part"], row["verdict"]) for row in record["parts"]] == [("env", "PASS"), ("kernel", "PASS")]


def test_packages_and_cards_that_a_part_needs_are_looked_for_first():
    big = part("peaks/phi-2")
    assert suite.why_not(big, False, ABOUT, 1e6) == "needs a card of 60 GiB"
    assert not suite.why_not(big, False, ABOUT | {"memory_gib": 79.0}, 1e6)
    assert (
        suite.why_not(part("env")._replace(needs=("no_such_package",)), True, ABOUT, 1e6)
        == "no_such_package is not installed"
    )


def test_a_part_that_does_not_end_is_killed_and_fails():
    *_, last = suite.started(part("env"), True, 0.3)
    assert last["ok"] is False and "status -9" in last["measured"]


@pytest.mark.parametrize("names", [["nonsense"], ["0", "99"], ["env", "pack"], ["pack"]])
def test_a_wrong_call_is_one_sentence_and_exit_status_2(names, capsys):
    assert suite.main(names) == 2
    said = capsys.readouterr().err
    assert said.startswith("tests.gpu: ") and said.count("\n") == 1 and len(said) < 400


def test_parts_are_chosen_by_number_range_and_name():
    assert [p.number for p in suite.chosen(["0-2", "9"])] == [0, 1, 2, 9]
    assert {p.name for p in suite.chosen(["peaks"])} == {p.name for p in suite.PARTS if p.number == 10}
    assert [p.name for p in suite.chosen(["peaks/phi-2", "env"])] == ["env", "peaks/phi-2"]
    assert suite.chosen([]) == list(suite.PARTS)


def test_every_part_has_a_function_a_name_of_its_own_and_the_short_form_fits_its_minutes():
    assert sorted({p.number for p in suite.PARTS}) == list(range(18))
    assert len({p.name for p in suite.PARTS}) == len(suite.PARTS)
    for p in suite.PARTS:
        module, function = p.function.split(".")
        assert callable(getattr(importlib.import_module(f"tests.gpu.{module}"), function))
    assert {p.number for p in suite.SHORT} == {0, 1, 2, 3, 4, 5, 10, 11}
    assert sum(p.number == 10 for p in suite.SHORT) == 2


def test_pack_keeps_one_cuda_library_and_refuses_what_is_too_large(tmp_path, monkeypatch):
    libraries = [
        f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda118", "cuda130", "rocm63")
    ]
    size = [1]

    def pip(command, **kwargs):
        assert "--no-deps" in command and set(suite.PACKED) <= set(command)
        with zipfile.ZipFile(
            Path(command[command.index("-d") + 1], "some-1.0-py3-none-any.whl"), "w"
        ) as wheel:
            for name in [*libraries, "trl/__init__.py", "xxhash/tests/big.py"]:
                wheel.writestr(name, b"0" * size[0])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(suite.subprocess, "run", pip)
    suite.pack(tmp_path / "a")
    kept = sorted(
        str(file.relative_to(tmp_path / "a")) for file in (tmp_path / "a").rglob("*") if file.is_file()
    )
    assert kept == [libraries[0], libraries[2], "trl/__init__.py"]
    size[0] = 33 * 2**20
    with pytest.raises(suite.Wrong, match="more than 64"):
        suite.pack(tmp_path / "b")


def test_lengths_are_those_of_three_hundred_pairs_without_their_five_duplicates():
    rows = json.loads((ROOT / "tests" / "lengths.json").read_text())
    assert len(rows) == 295 and all(len(row) == 3 and min(row) >= 1 for row in rows)
    assert max(map(sum, rows)) == 4906


@pytest.mark.slow
def test_the_command_prints_its_lines_writes_its_json_and_ends_well(tmp_path):
    command = [sys.executable, "-m", "tests.gpu", "env", "oom", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL", "SKIP"))]
    assert len(lines) >= 4 and all(re.fullmatch(LINE, line) for line in lines), lines
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record.keys() >= {"card", "capability", "date", "commit", "versions", "memory_gib", "parts"}
    assert [row["verdict"] for row in record["parts"] if row["part"] == "env"] == ["PASS"]


SMALL = [
    p for p in suite.PARTS if p.small is not None and p.name not in ("env", "probe", "trl/llama-3-8b")
]  # those have tests


@pytest.mark.slow
@pytest.mark.parametrize("some", SMALL, ids=lambda p: p.name)
def test_the_small_form_of_a_part_passes_on_a_cpu(some, monkeypatch):
    for name in ("last_exc", "last_value", "last_type", "last_traceback"):
        monkeypatch.setattr(sys, name, None, raising=False)
    said = []
    suite.measure(some, True, said.append)
    assert suite.verdict(said) == "PASS", "\n".join(
        suite.line(some.name, check) for check in said if "skip" not in check
    )


# README's table of figures from a card.


def unknown_figures(text: str, records: list[dict]) -> list[str]:
    """Figures in the tables below a paragraph that names `tests.gpu`, first column and head apart, that are
    in no check of a card's record, rounded as they are shown."""
    rows = [row for record in records if record["device"] == "cuda" for row in record["parts"]]
    checks = [
        check.get(name) for row in rows for check in row["checks"] for name in ("measured", "low", "high")
    ]
    known = [number for number in checks if isinstance(number, int | float)]
    unknown, follows = [], False
    for block in re.split(r"\n\s*\n", text):
        if not block.lstrip().startswith("|"):
            follows = "tests.gpu" in block
        elif follows:
            cells = "  ".join(
                " | ".join(line.strip("| ").split("|")[1:]) for line in block.strip().splitlines()[2:]
            )
            for shown, share in re.findall(r"(?<![\w.-])(\d[\d,]*(?:\.\d+)?)(?![\w-])(\s?%)?", cells):
                digits, factor = len(shown.partition(".")[2]), 100 if share else 1
                if not any(f"{factor * number:.{digits}f}" == shown.replace(",", "") for number in known):
                    unknown.append(shown)
    return unknown


def test_readme_names_no_figure_of_a_card_that_is_in_no_result():
    files = (ROOT / "tests" / "results").glob("*.json")
    records = [
        record for file in files if "parts" in (record := json.loads(file.read_text())) and "device" in record
    ]
    assert unknown_figures((ROOT / "README.md").read_text(encoding="utf-8"), records) == []


def test_an_invented_figure_is_found():
    checks = [
        {"measured": 3.482, "high": 6.0},
        {"measured": 0.871},
        {"measured": 1688},
        {"measured": "phi 77"},
    ]
    card = {"device": "cuda", "card": "NVIDIA H100", "parts": [{"checks": checks}]}
    table = "\n\n| model | a run, min | busy | steps |\n|---|---|---|---|\n| phi-2, 99 | {} | {} | {} |\n\n"
    table += "More 55 text."
    text = "Measured by `python -m tests.gpu`:" + table
    assert unknown_figures(text.format("3.48 (<= 6)", "87 %", "1,688 on an A100-80"), [card]) == []
    assert unknown_figures(text.format("3.49", "88 %", "77"), [card]) == ["3.49", "88", "77"]
    assert unknown_figures(text.format("3.48", "87 %", "1688"), [card | {"device": "cpu"}]) == [
        "3.48",
        "87",
        "1688",
    ]
    assert unknown_figures("On a CPU:" + table.format("1", "2", "3"), [card]) == []
