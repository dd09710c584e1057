"""pyproject.toml, constraints.txt and environment.yml agree; `make` installs them."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from notebooks import ROOT, read
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
NOT_ON_CONDA_FORGE = {"mnist1d", "sphinx-mathjax-offline", "playwright", "axe-playwright-python"}

project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
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
    for r in map(Requirement, re.findall(r"^\w.*$", read(ROOT / "constraints.txt"), re.M))
}


def conda_specs():
    """{name: bounds} of environment.yml, pip's part under "pip:name"."""
    specs = {}
    for entry in yaml.safe_load(read(ROOT / "environment.yml"))["dependencies"]:
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


# ------------------------------------------------------------------------------------ make's setup

# A stand-in for Python and pip: fails as FAILS says, and records the pins that it was given.
PYTHON = """#!/usr/bin/env bash
case "$*" in
*version_info*) [[ $FAILS != *old* ]] ;;
*"-m venv"*) mkdir -p "$3/bin" && [[ $FAILS != *venv* ]] && cp "$0" "$3/bin/python" ;;
*"pip --version"*) [[ $FAILS != *nopip* ]] ;;
*importlib.metadata*) [ "$TORCH" ] && echo "$TORCH" ;;
*"pip install"*) cp "$6" pins-used.txt; echo 1 >> installed.txt; [[ $FAILS != *network* ]] ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Sets up an environment in an empty folder, with the stand-in; returns what was said."""
    if not (shutil.which("make") and shutil.which("bash")):
        pytest.skip("no make or no bash on this system")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON, encoding="utf-8")
    (tmp_path / "python").chmod(0o755)

    def run(fails="", torch="", python="./python"):
        ran = subprocess.run(
            ["make", f"PYTHON={python}", "VENV=env", "env/.flatmin-ready"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "FAILS": fails, "TORCH": torch},
            capture_output=True,
            encoding="utf-8",
        )
        assert bool(ran.returncode) == ("setup: env is ready" not in ran.stdout), ran
        return " ".join(ran.stdout.split("setup: ")[-1].split())

    run.folder = tmp_path
    # as if some time had passed: make compares times, and a disk's have ticks
    run.later = lambda: os.utime(tmp_path / "env" / ".flatmin-ready", (1, 1))
    return run


def test_a_new_environment_gets_the_pins_and_follows_them(make):
    for torch in ("", "2.9.1"):  # an older one was installed by us
        pins = read(ROOT / "constraints.txt") + f"# {torch}\n"
        (make.folder / "constraints.txt").write_text(pins, encoding="utf-8")
        assert make(torch=torch) == "env is ready"
        assert read(make.folder / "pins-used.txt") == pins
        make.later()


def test_what_is_installed_is_not_installed_again(make):
    """A file that was only touched (as git does) must not need a network."""
    make()
    make.later()
    command = ["make", "VENV=env", "env/.flatmin-ready"]
    ran = subprocess.run(command, cwd=make.folder, env={"PATH": os.environ["PATH"]})
    assert ran.returncode == 0
    assert read(make.folder / "installed.txt") == "1\n"
    with open(make.folder / "pyproject.toml", "a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    make.later()
    make()
    assert read(make.folder / "installed.txt") == "1\n1\n"


def test_in_another_environment_an_installed_torch_is_kept(make):
    (make.folder / "env" / "bin").mkdir(parents=True)
    shutil.copy(make.folder / "python", make.folder / "env" / "bin")
    assert make(torch="2.9.1+cu128") == "env is ready"
    pinned = read(ROOT / "constraints.txt")
    assert read(make.folder / "pins-used.txt") == re.sub(
        "^torch==.*$", "torch==2.9.1+cu128", pinned, flags=re.M
    )


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (
            "old",
            r"Python 3.11 or newer is needed, and ./python is older. .* make PYTHON=python3.12",
        ),
        ("venv", r"could not be made, see above. .* sudo apt install python3-venv"),
        ("nopip", r"there is no pip in env: run env/bin/python -m ensurepip"),
        ("network", r"pip could not install everything, see above; \S+ are free .* a network"),
    ],
)
def test_what_is_wrong_is_named_and_tried_again(make, fails, message):
    assert re.search(message, make(fails))
    assert make() == "env is ready"


def test_a_missing_or_older_interpreter_is_named(make):
    assert re.search("there is no ./nowhere here", make(python="./nowhere"))
    make()
    (make.folder / "env" / ".flatmin-ready").unlink()
    assert re.search("env/bin/python is older. Remove env, and use another", make("old"))


@pytest.mark.parametrize("venv", ["", "my env"])
def test_an_environment_that_make_cannot_name_is_refused(make, venv):
    command = ["make", f"VENV={venv}", "lint"]
    env = {"PATH": os.environ["PATH"]}  # without what a make around this test passes on
    ran = subprocess.run(command, cwd=make.folder, env=env, capture_output=True, encoding="utf-8")
    assert ran.returncode and f'VENV must be a path without spaces, got "{venv}"' in ran.stderr
    assert not ran.stdout


def test_every_way_of_installing_names_the_same_extras():
    [extras] = re.findall(r"^EXTRAS := (.*)$", read(ROOT / "Makefile"), re.M)
    assert f'-e "{extras}"' in read(ROOT / "README.md")
    assert extras in read(ROOT / "constraints.txt")
