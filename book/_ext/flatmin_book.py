"""The book's own directives, role and cross-references, made from the chapters and the package.

`{claims-list}` lists every claim that a chapter asserts, `{papers-list}` every row of the tables
*The paper beside us*, `{records-list}` every experiment, `{benchmarks-list}` every recorded
benchmark; `` {colab}`02_flooding` `` links a chapter to Colab.  Each chapter ends with links to
what it imports from the package, and each entry of the API reference names the chapters that import
it.
"""

import ast
import functools
import importlib
import inspect
import json
import os
import re
from pathlib import Path

import nbformat
from docutils import nodes
from jupyter_cache import get_cache
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective, SphinxRole

import flatmin
from flatmin.book import experiments
from flatmin.book.experiments.display import caption, duration
from flatmin.book.plotting import use_style

PROVENANCE = ("device", "machine", "python", "numpy", "torch", "cuda", "flatmin", "commit", "data")
COLAB = "https://colab.research.google.com/github/{slug}/blob/{branch}/{book}/{name}.ipynb"


def cells_in(path, cache=None):
    """The code cells of a notebook; with their outputs from a cache, if one is given."""
    notebook = nbformat.reads(Path(path).read_text(encoding="utf-8"), as_version=4)
    if cache:
        _, notebook = get_cache(cache).merge_match_into_notebook(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_in(path):
    """The syntax tree of each code cell of a notebook."""
    return [ast.parse(cell.source) for cell in cells_in(path)]


def claims_in(path):
    """The (id, text) of each `claim("id", "text", ...)` in a notebook's code cells, in order."""
    return strings_in(path, "claim", 2)


def stated_in(path):
    """The text of each `stated("text", ...)` in a notebook's code cells, in order."""
    return [text for (text,) in strings_in(path, "stated", 1)]


def strings_in(path, function, count):
    """The first arguments of each call of a function in a notebook; they must be plain strings."""
    calls = []
    for node in (node for tree in code_in(path) for node in ast.walk(tree)):
        names = (getattr(getattr(node, "func", None), name, "") for name in ("id", "attr"))
        if isinstance(node, ast.Call) and function in names:
            values = [getattr(argument, "value", None) for argument in node.args[:count]]
            if len(values) < count or not all(isinstance(value, str) for value in values):
                raise ValueError(
                    f"{path}: {function} must be given plain strings: {ast.unparse(node)}"
                )
            calls.append(tuple(values))
    return calls


# The packages under whose names the API reference lists the contents of private modules.
PACKAGES = ("batch", "gradient", "optimizer", "measure", "pipeline", "stack", "book")


def public_name(thing):
    """The name under which the API reference lists a function or class."""
    if "._" not in thing.__module__:
        return f"{thing.__module__}.{thing.__qualname__}"
    owners = (importlib.import_module(f"flatmin.{name}") for name in PACKAGES)
    owner = next(o for o in owners if getattr(o, thing.__qualname__, None) is thing)
    return f"{owner.__name__}.{thing.__qualname__}"


def names_in(path):
    """The package's public functions and classes that a notebook imports, by full name, in order."""
    imported = []
    for node in (node for tree in code_in(path) for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flatmin":
            names = [alias.name for alias in node.names]
            module = __import__(node.module, fromlist=names)  # submodules, too
            things = [getattr(module, name) for name in names]
            imported += [public_name(thing) for thing in things if hasattr(thing, "__qualname__")]
    return list(dict.fromkeys(imported))


def papers_in(path, cache=None):
    """The rows of a notebook's tables with a verdict: {finding, theirs, ours, setting, verdict}."""
    rows = []
    for output in (output for cell in cells_in(path, cache) for output in cell.outputs):
        lines = output.get("data", {}).get("text/markdown", "").splitlines()
        cells = [
            [cell.strip() for cell in line.strip("| ").split(" | ")]
            for line in lines
            if line.startswith("|")
        ]
        if cells and cells[0][-1] == "verdict":
            head = [name.removeprefix("article: ") for name in cells[0]]
            rows += [dict(zip(head, row)) for row in cells[2:]]
    return rows


def records_of(name):
    """(size, record) for each recorded size of an experiment."""
    for size in experiments.experiment(name).SETTINGS:
        try:
            yield size, experiments.record(name, size)
        except FileNotFoundError:
            pass


def benchmarks_in(folder):
    """(name, setting) of each recorded benchmark."""
    for path in sorted(Path(folder).glob("benchmark_*.json")):
        yield path.name, json.loads(path.read_text(encoding="utf-8"))["setting"]


def first_paragraph(thing):
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.getdoc(thing).split("\n\n")[0].split())


def command(name, size):
    """The command that makes a record."""
    return f"python -m flatmin.book.experiments {name}" + (
        "" if size == experiments.default_size(name) else f" --size {size}"
    )


def chapters(env):
    """The notebooks that are pages of the book: {name: path}."""
    paths = {name: str(env.doc2path(name)) for name in sorted(env.found_docs)}
    return {name: path for name, path in paths.items() if path.endswith(".ipynb")}


def numbered(name):
    """A chapter's number, linked: 2, or "2, evidence"."""
    folder, _, stem = name.rpartition("/")
    return f"{int(stem[:2])}{folder and f', {folder}'} <{name}>"


def attribute_text(attributes, key):
    """An attribute of a record as text, with a commit shortened to twelve digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", f"{key} {attributes[key]}")


class Table(SphinxDirective):
    """A table from rows of Markdown."""

    def table(self, widths, head, rows, kind):
        if not rows:
            return [nodes.paragraph("", "Nothing yet.")]
        group = nodes.tgroup(
            "", *[nodes.colspec(colwidth=width) for width in widths], cols=len(widths)
        )
        group += nodes.thead("", self.row(head))
        group += nodes.tbody("", *[self.row(row) for row in rows])
        return [nodes.table("", group, classes=[kind])]

    def row(self, cells):
        entries = (
            nodes.paragraph("", "", *self.state.inline_text(cell, self.lineno)[0]) for cell in cells
        )
        return nodes.row("", *[nodes.entry("", entry) for entry in entries])

    def depend_on_records(self):
        """Rebuild the page when a record is added or changed."""
        for folder in filter(Path.exists, experiments.FOLDERS):
            for path in (Path(__file__), folder, *folder.glob("*.nc.xz"), *folder.glob("*.json")):
                self.env.note_dependency(str(path))

    def notebooks(self):
        for chapter, path in chapters(self.env).items():
            self.env.note_dependency(path)
            yield chapter, path


class ClaimsList(Table):
    """A table of all claims: chapter, name, text."""

    def run(self):
        rows, owner = [], {}
        for chapter, path in self.notebooks():
            for name, text in claims_in(path):
                if name in owner:
                    raise self.error(f"the claim {name!r} is in {owner[name]} and in {chapter}")
                owner[name] = chapter
                rows.append((f"{{doc}}`{chapter}`", f"`{name}`", text))
        return self.table((20, 25, 55), ("Chapter", "Claim", "What is asserted"), rows, "claims")


class PapersList(Table):
    """A table of the papers' findings, with those of the chapters."""

    def run(self):
        rows, config = [], self.config
        # make book shows what this machine computed
        cache = config.nb_execution_cache_path if config.nb_execution_mode == "cache" else None
        for chapter, path in self.notebooks():
            for row in papers_in(path, cache):
                finding = ": ".join(row[key] for key in ("paper", "finding") if key in row)
                ours = [row.get(key, "–") for key in ("theirs", "ours", "our setting", "verdict")]
                rows.append((f"{{doc}}`{numbered(chapter)}`", finding, *ours))
        head = ("Ch.", "Finding", "Theirs", "Ours", "Our setting", "Verdict")
        return self.table((4, 24, 20, 22, 16, 14), head, rows, "papers")


class RecordsList(Table):
    """A section per experiment: its source, commands and their time, records and figures."""

    def run(self):
        self.depend_on_records()
        sections = []
        for name in experiments.NAMES:
            module = experiments.experiment(name)
            self.env.note_dependency(module.__file__)
            section = nodes.section(ids=[nodes.make_id(name)], names=[name])
            section += nodes.title("", name)
            self.state.document.note_implicit_target(section)
            section += self.text(f"{first_paragraph(module)} It repeats: {module.SOURCE}.")
            recorded = dict(records_of(name))
            section += self.table(
                (15, 55, 30),
                ("Size", "Command", "Record"),
                [
                    (size, f"`{command(name, size)}`", self.state_of(name, size, recorded))
                    for size in module.SETTINGS
                    if size != "tiny"
                ],
                "records",
            )
            for size, record in recorded.items():
                section += self.text(
                    ", ".join(attribute_text(record.attrs, key) for key in PROVENANCE) + "."
                )
                section += self.figure(name, size, record)
            sections.append(section)
        return sections

    def text(self, words):
        return nodes.paragraph("", "", *self.state.inline_text(words, self.lineno)[0])

    def state_of(self, name, size, recorded):
        if size in recorded:
            attrs = recorded[size].attrs
            seeds = len(json.loads(attrs["seeds"]))
            changed = attrs["size"].partition(", ")[2]
            return (
                f"recorded{f' with `{changed}`' * bool(changed)} on {attrs['device']}, {seeds} seeds, "
                f"{duration(float(attrs['seconds']))}"
            )
        estimate = experiments.plan(name, size).seconds()
        if estimate is None:
            return "not yet recorded"
        seconds, measured = estimate
        return (
            f"not yet recorded; about {duration(seconds)} at the rate of {measured.attrs['size']}"
        )

    def figure(self, name, size, record):
        """The figure that the experiment's module draws, with its docstring as caption."""
        import matplotlib

        path = Path(self.env.app.doctreedir) / "records" / f"{name}-{size}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = caption(name, record)
        with matplotlib.rc_context({"svg.hashsalt": name}):
            use_style()
            drawn = experiments.plot(name, record)
            drawn.savefig(path, metadata={"Date": None})
            matplotlib.pyplot.close(drawn)
        here = Path(self.env.doc2path(self.env.docname)).parent
        image = nodes.image(
            uri=os.path.relpath(path, here), alt=f"{name}, {size}: {words}", width="100%"
        )
        return nodes.figure(
            "", image, nodes.caption("", "", *self.state.inline_text(words, self.lineno)[0])
        )


class BenchmarksList(Table):
    """A table of the recorded benchmarks: file, device, versions, settings."""

    def run(self):
        self.depend_on_records()
        rows = []
        for folder in experiments.FOLDERS:
            for name, setting in benchmarks_in(folder):
                where = ", ".join(
                    attribute_text(setting, key) for key in PROVENANCE if key in setting
                )
                rest = ", ".join(
                    f"{key} {value}" for key, value in setting.items() if key not in PROVENANCE
                )
                rows.append((f"`{name}`", where, rest))
        return self.table((20, 30, 50), ("Record", "Where", "Settings"), rows, "records")


class Colab(SphinxRole):
    """A link that opens a chapter in Colab; _config.yml names the repository."""

    def run(self):
        options = self.config.html_theme_options
        address = COLAB.format(
            slug="/".join(options["repository_url"].rstrip("/").split("/")[-2:]),
            branch=options["repository_branch"],
            book=options["path_to_docs"],
            name=self.text,
        )
        if self.text not in self.env.found_docs:
            raise ValueError(f"{{colab}}`{self.text}`: there is no such chapter")
        return [nodes.reference("", "open in Colab", refuri=address, classes=["colab"])], []


def name_folded_cells(app, doctree):
    """Let a folded cell's button say what is inside, as its first line `#@title ...` does in Colab."""
    for cell in doctree.findall(nodes.container):
        code = next(iter(cell.findall(nodes.literal_block)), None)
        if "prompt_show" in cell and code and (title := re.match("#@title (.+)", code.astext())):
            cell["prompt_show"] = cell["prompt_hide"] = title[1]


def link_chapter_to_package(app, doctree):
    """Append to a chapter what it imports from the package, linked to the API reference."""
    env = app.env
    path = chapters(env).get(env.docname)
    if path is None or "api" not in env.found_docs or not (names := names_in(path)):
        return
    links = [
        addnodes.pending_xref(
            "",
            nodes.literal("", name.rsplit(".", 1)[1]),
            refdomain="py",
            reftype="obj",
            reftarget=name,
            refexplicit=True,
            refwarn=True,
            refdoc=env.docname,
        )
        for name in names
    ]
    text = nodes.paragraph("", "In the package: ", classes=["in-the-package"])
    for i, link in enumerate(links):
        text += [nodes.Text(", "), link] if i else link
    text += nodes.Text(".")
    next(iter(doctree.findall(nodes.section))).append(text)


def link_package_to_chapters(app, what, name, thing, options, lines):
    """Add to the API reference the chapters that use a function or class."""
    users = [chapter for chapter, path in chapters(app.env).items() if name in names_in(path)]
    if users:
        lines += [
            "",
            "In the book: " + "; ".join(f":doc:`{numbered(user)}`" for user in users) + ".",
            "",
        ]


def resolve_public_name(app, env, node, content):
    """Resolve `fit` or `flatmin.fit` in a docstring to `flatmin.stack.fit` of the API reference."""
    name = node.get("reftarget", "").removeprefix("flatmin.")
    thing = functools.reduce(
        lambda thing, part: getattr(thing, part, None), name.split("."), flatmin
    )
    if node.get("refdomain") == "py" and hasattr(thing, "__qualname__"):
        target = public_name(thing)
        return env.get_domain("py").resolve_xref(
            env, node["refdoc"], app.builder, "obj", target, node, content
        )


def setup(app):
    app.add_directive("claims-list", ClaimsList)
    app.add_directive("papers-list", PapersList)
    app.add_directive("records-list", RecordsList)
    app.add_directive("benchmarks-list", BenchmarksList)
    app.add_role("colab", Colab())
    app.connect("doctree-read", link_chapter_to_package)
    app.connect("doctree-read", name_folded_cells)
    app.connect("missing-reference", resolve_public_name)
    app.connect("autodoc-process-docstring", link_package_to_chapters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
