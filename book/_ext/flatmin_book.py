"""The book's own directive and role.

`{claims-list}` lists every claim that a chapter asserts; `` {colab}`02_flooding` `` links a chapter to Colab.
"""

import ast
import json
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective, SphinxRole

COLAB = "https://colab.research.google.com/github/{slug}/blob/{branch}/{book}/{name}.ipynb"


def claims_in(path):
    """The (id, text) of each `claim("id", "text", ...)` in a notebook's code cells, in order."""
    found = []
    for cell in json.loads(Path(path).read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Call) and "claim" in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
                words = [getattr(argument, "value", None) for argument in node.args[:2]]
                if len(words) < 2 or not all(isinstance(word, str) for word in words):
                    raise ValueError(f"{path}: a claim's id and text must be plain strings: {ast.unparse(node)}")
                found.append(tuple(words))
    return found


class ClaimsList(SphinxDirective):
    """A table of all claims: chapter, name, text."""

    def run(self):
        chapters = {name: self.env.doc2path(name) for name in sorted(self.env.found_docs)}
        chapters = {name: path for name, path in chapters.items() if str(path).endswith(".ipynb")}
        rows, owner = [], {}
        for chapter, path in chapters.items():
            self.env.note_dependency(str(path))
            for name, text in claims_in(path):
                if name in owner:
                    raise self.error(f"the claim {name!r} stands in {owner[name]} and in {chapter}")
                owner[name] = chapter
                rows.append((f"{{doc}}`{chapter}`", f"`{name}`", text))
        if not rows:
            return [nodes.paragraph("", "No chapter claims anything yet.")]
        return [self.table(("Chapter", "Claim", "What is asserted"), rows)]

    def table(self, head, rows):
        group = nodes.tgroup("", *[nodes.colspec(colwidth=width) for width in (20, 25, 55)], cols=3)
        group += nodes.thead("", self.row(head))
        group += nodes.tbody("", *[self.row(row) for row in rows])
        return nodes.table("", group, classes=["claims"])

    def row(self, cells):
        entries = (nodes.paragraph("", "", *self.state.inline_text(cell, self.lineno)[0]) for cell in cells)
        return nodes.row("", *[nodes.entry("", entry) for entry in entries])


class Colab(SphinxRole):
    """A link that opens a chapter in Colab; the repository stands in _config.yml."""

    def run(self):
        options = self.config.html_theme_options
        address = COLAB.format(
            slug="/".join(options["repository_url"].rstrip("/").split("/")[-2:]),
            branch=options["repository_branch"], book=options["path_to_docs"], name=self.text,
        )
        if self.text not in self.env.found_docs:
            raise ValueError(f"{{colab}}`{self.text}`: there is no such chapter")
        return [nodes.reference("", "open in Colab", refuri=address, classes=["colab"])], []


def setup(app):
    app.add_directive("claims-list", ClaimsList)
    app.add_role("colab", Colab())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
