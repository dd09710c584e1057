"""Imports go one way, along the pipeline."""

import ast
import importlib
import pkgutil
import runpy
import sys
from pathlib import Path

import pytest

import flatmin

ROOT = Path(flatmin.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")
}
STAGES = {"batch", "loss", "gradient", "optimizer"}
LEAVES = {name for name in FILES if name[0] == "_" and name != "__init__"}
ALLOWED = {
    **dict.fromkeys(LEAVES | STAGES | {"measure", "layers", "data"}, LEAVES),
    "pipeline": LEAVES | STAGES,
    "stack": LEAVES | {"data", "pipeline"},
    "loops": LEAVES | STAGES,
    "__init__": LEAVES | STAGES | {"measure", "layers", "data", "pipeline", "stack", "loops"},
    "check": {"book"},  # the names of the first edition
    "experiments": {"book"},
}


def folder(name):
    """The folder, or the top-level file, that a module belongs to."""
    return name.split(".")[0]


def imports(name):
    """(module, imported name) for each import within the package, also in functions."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if folder(a.name) == "flatmin"], name
        if not isinstance(node, ast.ImportFrom) or not (
            node.level or folder(node.module) == "flatmin"
        ):
            continue
        above = package[: len(package) + 1 - node.level] if node.level else []
        below = (node.module or "").removeprefix("flatmin").strip(".")
        module = ".".join([*above, *below.split(".")] if below else above)
        for alias in node.names:
            deeper = f"{module}.{alias.name}".strip(".")
            known = deeper in FILES or f"{deeper}.__init__" in FILES
            yield (deeper, None) if known else (module, alias.name)


@pytest.mark.parametrize("name", sorted(name for name in FILES if folder(name) != "book"))
def test_imports_go_one_way(name):
    inside = {folder(name)} if name.endswith(".__init__") else set()
    assert {folder(module) for module, _ in imports(name)} - ALLOWED[folder(name)] - inside == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_module_imports_private_names(name):
    assert [(module, used) for module, used in imports(name) if used and used[0] == "_"] == []


PACKAGES = [
    "flatmin",
    *(f"flatmin.{name}" for name in sorted(STAGES | {"measure", "loops", "book"})),
]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_shadows_a_public_name(name):
    package = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules & {*package.__all__} == set()
    assert all(hasattr(package, public) for public in package.__all__)


def test_the_first_editions_names_of_two_packages_still_work(monkeypatch, capsys):
    from flatmin import check, experiments

    assert check.flooded is importlib.import_module("flatmin.book.check").flooded
    assert experiments.record is importlib.import_module("flatmin.book.experiments").record
    monkeypatch.delitem(sys.modules, "flatmin.experiments")  # as at the start of python -m
    monkeypatch.setattr(sys, "argv", ["experiments", "--list"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module("flatmin.experiments", run_name="__main__")
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == experiments.NAMES
