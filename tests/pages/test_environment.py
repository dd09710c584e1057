"""pyproject.toml, constraints.txt and environment.yml agree; tools/install.py installs them."""

import ast
import re
import sys
import tomllib

import install
import pytest
import yaml
from notebooks import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
NOT_ON_CONDA_FORGE = {"mnist1d", "sphinx-mathjax-offline", "playwright", "axe-playwright-python"}

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
groups = {"": project["dependencies"], **project["optional-dependencies"]}
OURS = (
    "",
    "data",
    "plot",
    "book",
    "test",
    "course",
)  # what environment.yml and the Makefile install
by_name = {
    canonicalize_name(r.name): r
    for group in groups.values()
    for r in map(Requirement, group)
    if r.name != "flatmin"
}
pins = {
    canonicalize_name(r.name): r
    for r in map(Requirement, re.findall(r"^\w.*$", (ROOT / "constraints.txt").read_text(), re.M))
}


def conda_specs():
    """{name: bounds} of environment.yml, pip's part under "pip:name"."""
    specs = {}
    for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]:
        lines, prefix = ([entry], "") if isinstance(entry, str) else (entry["pip"], "pip:")
        for line in lines:
            name, bounds = re.fullmatch(r"(-e \.|[\w-]+)(.*)", line).groups()
            specs[prefix + name] = bounds
    return specs


@pytest.mark.parametrize("name", by_name)
def test_pin_satisfies_bound(name):
    assert name in pins, f"constraints.txt does not pin {name}"
    [pin] = pins[name].specifier
    assert pin.operator == "==" and by_name[name].specifier.contains(pin.version, prereleases=True)


def test_environment_repeats_the_bounds():
    wanted = {"python": project["requires-python"], "pip": "", "pip:-e .": ""}
    for requirement in (Requirement(line) for group in OURS for line in groups[group]):
        if requirement.name != "flatmin":
            pip = requirement.name in NOT_ON_CONDA_FORGE
            name = (
                f"pip:{requirement.name}"
                if pip
                else CONDA_NAMES.get(requirement.name, requirement.name)
            )
            wanted[name] = str(requirement.specifier)
    assert {name: set(bounds.split(",")) for name, bounds in conda_specs().items()} == {
        name: set(bounds.split(",")) for name, bounds in wanted.items()
    }


def test_all_is_what_a_chapter_needs():
    """A chapter's first cell installs `all`; the other extras contain it."""
    assert groups["all"] == ["flatmin[data,plot]"]
    assert all("flatmin[all]" in groups[extra] for extra in ("book", "test", "course"))


@pytest.mark.parametrize("line", [line for extra in ("", "data", "plot") for line in groups[extra]])
def test_the_package_sets_only_lower_bounds(line):
    """An upper bound would make pip replace what Colab has."""
    assert [spec.operator for spec in Requirement(line).specifier] == [">="]


# ------------------------------------------------------------------------------------ tools/install.py


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder that looks like a virtual environment; calls of pip are only recorded."""
    folder = tmp_path / "env"
    scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
    scripts.mkdir(parents=True)
    (scripts / ("python.exe" if sys.platform == "win32" else "python")).touch()
    there = {"version_info": "1", "import pip": "pip", "version('torch')": ""}
    monkeypatch.setattr(
        install, "output_of", lambda python, code: next(v for k, v in there.items() if k in code)
    )
    calls = []
    monkeypatch.setattr(
        install, "install", lambda python, pins: calls.append(install.read(pins)) or True
    )
    return str(folder), there, calls


def test_an_old_python_can_run_the_installer_and_report_that_it_is_old(tmp_path, monkeypatch):
    source = (ROOT / "tools" / "install.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(
        SystemExit,
        match=r"Python 3.11 or newer is needed, and .* is 3.9. Use another one: make PYTHON=python",
    ):
        install.main(str(tmp_path / "env"))
    assert not (tmp_path / "env").exists()


def test_without_venv_the_error_says_what_to_install_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(install.subprocess, "call", lambda command: (tmp_path / "env").mkdir() or 1)
    with pytest.raises(SystemExit, match=r"sudo apt install python3\.\d+-venv"):
        install.main(str(tmp_path / "env"))
    assert not (tmp_path / "env").exists()


def test_an_installed_torch_is_kept(home):
    folder, there, calls = home
    there["version('torch')"] = "2.9.1+cu128"
    install.main(folder)
    pinned = (ROOT / "constraints.txt").read_text()
    assert (
        calls == [re.sub(r"(?m)^torch==.*$", "torch==2.9.1+cu128", pinned)]
        and "torch==2.9.1+cu128\nnumpy==" in calls[0]
    )


def test_an_environment_that_we_made_follows_the_pins(home):
    folder, there, calls = home
    there["version('torch')"] = "2.9.1"
    open(f"{folder}/.made-by-flatmin", "w").close()
    install.main(folder)
    assert calls == [(ROOT / "constraints.txt").read_text()]


def test_what_is_installed_is_not_installed_again(home):
    """A file that was only touched (as git does) must not cause a download."""
    folder, _, calls = home
    install.main(folder)
    install.main(folder)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("version_info", "Remove .*env, and use another"),
        ("import pip", "there is no pip in .*-m ensurepip"),
    ],
)
def test_what_is_wrong_with_an_environment_is_named(home, absent, message):
    folder, there, calls = home
    there[absent] = ""
    with pytest.raises(SystemExit, match=message):
        install.main(folder)
    assert calls == []


def test_a_failed_installation_is_reported_and_tried_again(home, monkeypatch):
    folder, _, _ = home
    monkeypatch.setattr(install, "install", lambda python, pins: False)
    with pytest.raises(
        SystemExit,
        match=r"pip could not install everything, see above; \d+ GB are free .* needs a network",
    ):
        install.main(folder)
    assert install.read(f"{folder}/.flatmin-ready") == ""


def test_every_way_of_installing_names_the_same_extras():
    readme = (ROOT / "README.md").read_text()
    assert (
        f'-e "{install.EXTRAS}"' in readme
        and install.EXTRAS in (ROOT / "constraints.txt").read_text()
    )
