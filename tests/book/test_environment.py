"""pyproject.toml, constraints.txt and environment.yml name the same packages with the same bounds."""

import re
import tomllib

import pytest
import yaml
from notebooks import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
NOT_ON_CONDA_FORGE = {"mnist1d", "sphinx-mathjax-offline", "playwright"}

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
groups = {"": project["dependencies"], **project["optional-dependencies"]}
by_name = {canonicalize_name(r.name): r for group in groups.values() for r in map(Requirement, group)}
pins = {
    canonicalize_name(r.name): r
    for r in map(Requirement, re.findall(r"^\w.*$", (ROOT / "constraints.txt").read_text(), re.M))
}


def conda_specs():
    """{name: bounds} of environment.yml, pip's part under "pip:name"."""
    found = {}
    for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]:
        lines, prefix = ([entry], "") if isinstance(entry, str) else (entry["pip"], "pip:")
        for line in lines:
            name, bounds = re.fullmatch(r"(-e \.|[\w-]+)(.*)", line).groups()
            found[prefix + name] = bounds
    return found


@pytest.mark.parametrize("name", by_name)
def test_pin_satisfies_bound(name):
    assert name in pins, f"constraints.txt does not pin {name}"
    [pin] = pins[name].specifier
    assert pin.operator == "==" and by_name[name].specifier.contains(pin.version, prereleases=True)


def test_environment_repeats_the_bounds():
    wanted = {"python": project["requires-python"], "pip": "", "pip:-e .": ""}
    for group in ("", "book", "test", "course"):
        for requirement in map(Requirement, groups[group]):
            pip = requirement.name in NOT_ON_CONDA_FORGE
            name = f"pip:{requirement.name}" if pip else CONDA_NAMES.get(requirement.name, requirement.name)
            wanted[name] = str(requirement.specifier)
    assert {name: set(bounds.split(",")) for name, bounds in conda_specs().items()} == {
        name: set(bounds.split(",")) for name, bounds in wanted.items()
    }


@pytest.mark.parametrize("line", groups[""])
def test_the_package_sets_only_lower_bounds(line):
    """An upper bound would make pip replace what Colab has."""
    assert [spec.operator for spec in Requirement(line).specifier] == [">="]
