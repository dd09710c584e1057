"""The repository's address is set in _config.yml and the same in all other files."""

import re
import shutil
import subprocess
import sys
import tomllib

import links
import yaml
from notebooks import BOOK, ROOT, chapters, repository

URL = repository()["url"]
ADDRESS = re.compile(
    r"(?:github\.com|colab\.research\.google\.com/github|raw\.githubusercontent\.com)/([\w.-]+/[\w.-]*\w)(/[^\s)\"'>\]]*)?"
)


def addresses():
    """(file, owner/name, rest) of each GitHub or Colab address of this repository, old or new."""
    owner, name = links.slug(URL).split("/")
    for path in links.files():
        for slug, rest in ADDRESS.findall(path.read_text()):
            slug = slug.removesuffix(".git")
            if slug.startswith(f"{owner}/") or slug.endswith(f"/{name}"):
                yield path.relative_to(ROOT), slug, rest


def test_nothing_is_left_to_rewrite():
    assert [str(path.relative_to(ROOT)) for path in links.rewritten()] == []


def test_every_address_is_the_configured_one():
    assert {(str(path), slug) for path, slug, _ in addresses() if slug != links.slug(URL)} == set()


def test_colab_links_open_what_exists():
    for path, _, rest in addresses():
        if match := re.fullmatch(r"/blob/([^/]+)/(.+)", rest):
            branch, file = match.groups()
            assert branch == repository()["branch"] and (ROOT / file.split("#")[0]).exists(), (
                f"{path}: {rest}"
            )


def test_metadata_names_the_repository():
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"] == URL
    )
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == URL


def test_citation_states_the_package_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert (
        citation["version"]
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    )


def test_a_move_is_one_edit(tmp_path):
    """Changing _config.yml and running links.py changes the address everywhere."""
    for path in [ROOT / "_config.yml", *links.files()]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    shutil.copytree(
        ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__")
    )
    config = tmp_path / "_config.yml"
    config.write_text(config.read_text().replace(URL, "https://github.com/someone/elsewhere"))

    def run(*command):
        return subprocess.run(
            [sys.executable, tmp_path / "tools" / command[0], *command[1:]], capture_output=True
        ).returncode

    assert run("links.py", "--check") == 1
    assert (
        run("links.py") == 0
        and run("links.py", "--check") == 0
        and run("notebooks.py", "check") == 0
    )
    texts = {
        path.relative_to(tmp_path): path.read_text()
        for path in tmp_path.rglob("*")
        if path.suffix in {".md", ".ipynb", ".toml", ".cff"}
    }
    assert [name for name, text in texts.items() if links.slug(URL) in text] == []
    assert all(
        "git+https://github.com/someone/elsewhere" in texts[path.relative_to(ROOT)]
        for path in chapters()
    )


def test_every_reference_can_be_found():
    entries = (BOOK / "references.bib").read_text().split("\n@")
    assert [
        entry.split("\n")[0]
        for entry in entries
        if not re.search(r"^\s*(doi|eprint|url) =", entry, re.M)
    ] == []
