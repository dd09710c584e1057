"""Carry the repository's address from _config.yml, and the version to install, to every file that names them, and renew the bootstrap cells.

python tools/links.py            rewrite
python tools/links.py --check    only name the files that would change
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
    """The address that the files were last given: pyproject.toml remembers it."""
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
    """{path: new text} of the files that do not say what they should."""
    old, new, halves = slug(recorded()), slug(repository()["url"]), set(chapters())
    changed = {}
    for path in files():
        text = path.read_text()
        fresh = text.replace(old, new)
        fresh = fresh if path.name == "CHANGELOG.md" else INSTALLED.sub(source(), fresh)
        if path in halves:
            fresh = BOOTSTRAP.sub(lambda cell: cell[1] + bootstrap() + cell[2], fresh, count=1)
        if fresh != text:
            changed[path] = fresh
    return changed


if __name__ == "__main__":
    changed = rewritten()
    for path, text in changed.items():
        print(path.relative_to(ROOT))
        if "--check" not in sys.argv:
            path.write_text(text)
    sys.exit(1 if changed and "--check" in sys.argv else 0)
