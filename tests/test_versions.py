"""docs/versions.md: it has every private name of others that the library touches, and what it says is so."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
ROWS = re.findall(
    r"^\| `([\w.]+)` \| (.+) \| (.+) \| .+ \|$", (HOME / "docs/versions.md").read_text(encoding="utf-8"), re.M
)
FILES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in HOME.glob("lazyorpo_lib/**/*.py")}
PUBLIC = {"_replace", "_asdict", "_exit"}  # documented by Python: of a named tuple, and of os


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def on(node, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def own_names() -> set[str]:
    """What the library itself calls so."""
    names = set()
    for node in (node for tree in FILES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on(node.value, "self"):
            names.add(node.attr)
    return names | PUBLIC


def touched(node, own: set[str]) -> list[str]:
    """The names of other packages in one place of the code: imported, an attribute, a string for getattr."""
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [part for alias in node.names for part in f"{node.module}.{alias.name}".split(".")]
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.Attribute):
        inherited = isinstance(node.value, ast.Call) and on(node.value.func, "super")
        return [node.attr] if inherited or node.attr not in own else []
    if isinstance(node, ast.Call) and re.search(
        r"(getattr|hasattr|setattr|patch\.object)$", ast.unparse(node.func)
    ):
        return [
            x.value
            for x in node.args
            if isinstance(x, ast.Constant) and isinstance(x.value, str) and x.value not in own
        ]
    return []


@pytest.mark.parametrize("name", FILES)
def test_every_private_name_that_a_file_touches_stands_in_the_table(name):
    told, own = {part for row, *_ in ROWS for part in row.split(".")}, own_names()
    found = {part for node in ast.walk(FILES[name]) for part in touched(node, own) if private(part)}
    assert found <= told


def resolves(path: str) -> bool:
    """Whether a dotted name is there: in a module, on a class, or given by a class to its instances."""
    top, *parts = path.split(".")
    found = importlib.import_module(top)
    for i, part in enumerate(parts):
        if hasattr(found, part):
            found = getattr(found, part)
        elif inspect.isclass(found):
            return part in getattr(found, "__annotations__", {}) or f"self.{part} = " in inspect.getsource(
                found
            )
        else:
            try:
                found = importlib.import_module(".".join([top, *parts[: i + 1]]))
            except ImportError:
                return False
    return True


def test_every_name_that_is_said_to_be_in_all_versions_is_in_these():
    everywhere = [name for name, _, there in ROWS if there == "all"]
    assert len(everywhere) >= 29
    assert [name for name in everywhere if not resolves(name)] == []
    assert not resolves("torch.nn.Module._no_such_name") and not resolves("transformers.no_such_module.name")


def test_every_file_that_the_table_names_touches_what_is_told_of_it():
    def touches(name, file):
        home = HOME / "lazyorpo_lib"
        path = home / file if (home / file).exists() else next(home.glob(f"*/{file}"))
        return re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))

    told = [(name.split(".")[-1], file.strip("`")) for name, files, _ in ROWS for file in files.split(", ")]
    told = [(name, file) for name, file in told if file.endswith(".py")]
    assert len(told) >= 29 and [row for row in told if not touches(*row)] == []
