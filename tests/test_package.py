"""The wheel: what is in it and what is not, its entry point, its requirements."""

import email
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lazyorpo_lib

HOME = Path(lazyorpo_lib.__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this checkout, opened; built without network."""
    if not all(importlib.util.find_spec(name) for name in ("pip", "setuptools")):
        pytest.skip("pip and setuptools, which build the wheel, are not both here")
    home = tmp_path_factory.mktemp("clone")
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("lazyorpo_lib", "tests", "notebooks"):
        shutil.copytree(HOME / name, home / name, ignore=leave)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(HOME / name, home)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", home, home], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(home.glob("*.whl"))) as archive:
        yield archive


def test_it_holds_the_package_whole_and_nothing_else(wheel):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {
        file.relative_to(HOME).as_posix()
        for file in (HOME / "lazyorpo_lib").rglob("*")
        if file.suffix in (".py", ".jsonl", ".md")
    }
    assert "lazyorpo_lib/demo/pairs.jsonl" in inside


def test_its_metadata_name_the_version_the_requirements_and_the_command(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    about = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    lines = [line.split("#")[0].strip() for line in (HOME / "requirements.txt").read_text().splitlines()]
    assert about["Version"] == lazyorpo_lib.__version__
    assert about.get_all("Requires-Dist") == list(filter(None, lines))
    assert "lazyorpo = lazyorpo_lib.__main__:console" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_an_installed_kit_knows_what_it_was_installed_with_and_ignores_a_file_of_that_name(wheel, tmp_path):
    packages = tmp_path / "site-packages"
    wheel.extractall(packages)
    (packages / "requirements.txt").write_text("somebody-elses>=1\n")
    code = "from lazyorpo_lib.notebook import setup; print(setup.__file__, setup.requirements()[0])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=packages,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(packages)},
    )
    assert str(packages) in done.stdout and "('torch', '2.6')" in done.stdout, done.stderr
