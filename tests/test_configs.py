"""The files in configs/ parse, and their commands are ones that our and accelerate's command lines take."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from lazyorpo_lib.__main__ import _run_parser
from lazyorpo_lib.settings import FIELDS, coerce, resolve

HOME = Path(__file__).parents[1]
FILES = {path.name: path.read_text() for path in sorted((HOME / "configs").iterdir())}
JOBS = [name for name in FILES if name not in ("ddp.yaml", "fsdp2.yaml")]


def text_of(name):
    """What a shell is told in a file, on one line, variables and sums replaced by a number."""
    text = FILES[name]
    if name.endswith(".yaml"):
        told = yaml.safe_load(text)
        text = told["run"] if "run" in told else told["spec"]["trainer"]["args"][0]
    text = re.sub(r"\\\n\s*|&&\n\s*", " ", text)
    return re.sub(r"\$\(\(.*?\)\)|\$\w+", "2", text.replace("$HUB_REPO", "OWNER/NAME"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_parses_and_its_first_words_name_it(name):
    if name.endswith(".yaml"):
        assert isinstance(yaml.safe_load(FILES[name]), dict)
    else:
        subprocess.run(["bash", "-n", HOME / "configs" / name], check=True)
    assert f"configs/{name}" in "\n".join(FILES[name].splitlines()[:2])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_starts_the_kit_with_flags_that_it_has(name):
    words = re.search(r"-m lazyorpo_lib( [^'\n]*)", text_of(name))[1].split()
    given = vars(_run_parser().parse_args(words))
    resolve([("flag", {n: coerce(n, value) for n, value in given.items() if n in FIELDS})])


@pytest.mark.parametrize("name", [name for name in JOBS if "accelerate launch" in FILES[name]])
def test_a_job_starts_accelerate_with_flags_and_files_that_are_there(name):
    words = re.search(r"accelerate launch (.*?-m lazyorpo_lib)", text_of(name))[1].split()
    assert (HOME / launch_command_parser().parse_args(words).config_file).is_file()


def test_sbatch_has_its_directives_before_its_first_command():
    lines = FILES["slurm.sbatch"].splitlines()
    directives = [i for i, line in enumerate(lines) if re.fullmatch(r"#SBATCH --[a-z-]+=\S+", line)]
    assert directives == list(range(2, 2 + len(directives))) and lines[0] == "#!/bin/bash"
    assert sum("SBATCH" in line for line in lines) == len(directives)


def test_the_page_says_how_each_job_is_started():
    page = (HOME / "docs" / "scale.md").read_text()
    for name in JOBS:
        command = re.search(rf"(\w+ [^:\n]*configs/{re.escape(name)}[^(\n]*)", FILES[name])[1].strip()
        assert (
            shlex.split(command)[:2]
            == shlex.split(re.search(rf"^({command.split()[0]} .*{re.escape(name)})", page, re.M)[1])[:2]
        )
