"""Copy the repository's address from _config.yml and the version to install into all files.

python tools/links.py            rewrite, and update the bootstrap cells
python tools/links.py --check    only list the files that would change
"""

import re
import sys
import tomllib

from notebooks import BOOK, ROOT, bootstrap, chapters, repository, source

BOOTSTRAP = re.compile(
    r"(```\{code-cell\}[^\n]*\n:tags: \[remove-cell, nbval-ignore-output\]\n\n).*?(\n```)", re.S
)

INSTALLED = re.compile(r"git\+https://github\.com/[\w.-]+/[\w.-]+?(?:@[\w.-]+)?(?=[\s\"'])")


def slug(url):
    """owner/name"""
    return "/".join(url.rstrip("/").split("/")[-2:])


def recorded():
    """The address that the files now have, according to pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def files():
    fixed = [
        ROOT / name
        for name in (
            "README.md",
            "CITATION.cff",
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "pyproject.toml",
        )
    ]
    notebooks = [
        path
        for folder in (BOOK, ROOT / "assignments")
        for end in ("md", "ipynb")
        for path in folder.rglob(f"*.{end}")
    ]
    return [
        path
        for path in fixed + sorted(notebooks)
        if path.exists() and ".ipynb_checkpoints" not in path.parts
    ]


def rewritten():
    """{path: new text} of the files that are out of date."""
    old, new, halves = slug(recorded()), slug(repository()["url"]), set(chapters())
    changed = {}
    for path in files():
        text = path.read_text()
        updated = text.replace(old, new)
        if path.name != "CHANGELOG.md":
            updated = INSTALLED.sub(source(), updated)
        if path in halves:
            updated = BOOTSTRAP.sub(lambda cell: cell[1] + bootstrap() + cell[2], updated, count=1)
        if updated != text:
            changed[path] = updated
    return changed


if __name__ == "__main__":
    changed = rewritten()
    for path, text in changed.items():
        print(path.relative_to(ROOT))
        if "--check" not in sys.argv:
            path.write_text(text)
    sys.exit(1 if changed and "--check" in sys.argv else 0)
