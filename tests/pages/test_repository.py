"""The repository's address and version are those of _config.yml and pyproject.toml everywhere."""

import re
import tomllib

import yaml
from notebooks import BOOK, ROOT, read, repository, source

URL = repository()["url"]
OWNER, NAME = URL.split("/")[-2:]
ADDRESS = re.compile(
    r"(?:github\.com|colab\.research\.google\.com/github|raw\.githubusercontent\.com)/([\w.-]+/[\w.-]*\w)(/[^\s)\"'>\]]*)?"
)
FILES = [
    *(ROOT / name for name in ("README.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml")),
    *sorted(BOOK.rglob("*.md")),
    *sorted(BOOK.rglob("*.ipynb")),
    *sorted((ROOT / "assignments").rglob("*.md")),
]


def addresses():
    """(file, owner/name, rest) of each GitHub or Colab address of this repository, old or new."""
    for path in (path for path in FILES if ".ipynb_checkpoints" not in path.parts):
        for slug, rest in ADDRESS.findall(read(path)):
            slug = slug.removesuffix(".git")
            if slug.startswith(f"{OWNER}/") or slug.endswith(f"/{NAME}"):
                yield path.relative_to(ROOT), slug, rest


def test_every_address_is_the_configured_one():
    """CONTRIBUTING.md has the command that moves them all."""
    found = list(addresses())
    assert found
    assert {(str(path), slug) for path, slug, _ in found if slug != f"{OWNER}/{NAME}"} == set()


def test_every_installation_is_of_this_version():
    """CONTRIBUTING.md has the command for a release."""
    found = {
        (path.name, address)
        for path in FILES
        for address in re.findall(r"git\+https://github\.com/[\w./-]+(?:@[\w.-]+)?", read(path))
    }
    assert found and {pair for pair in found if pair[1] != source()} == set()


def test_colab_links_open_what_exists():
    for path, _, rest in addresses():
        if match := re.fullmatch(r"/blob/([^/]+)/(.+)", rest):
            branch, file = match.groups()
            assert branch == repository()["branch"] and (ROOT / file.split("#")[0]).exists(), (
                f"{path}: {rest}"
            )


def test_metadata_names_the_repository_and_the_version():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert project["urls"]["Repository"] == citation["repository-code"] == URL
    assert citation["version"] == project["version"]
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()


def test_every_reference_can_be_found():
    entries = read(BOOK / "references.bib").split("\n@")
    assert [
        entry.split("\n")[0]
        for entry in entries
        if not re.search(r"^\s*(doi|eprint|url) =", entry, re.M)
    ] == []
