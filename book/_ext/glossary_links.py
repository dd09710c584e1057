"""In each chapter, the first time a word of the glossary is emphasised, it links to its entry there.

The notebooks stay plain Markdown: `*early stopping*` and `**Early stopping.**` are enough.  The link's title is what
the glossary says, so that a reader who points at the word need not leave the page.
"""

import re

from docutils import nodes
from flatmin_book import chapters
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

IRREGULAR = {"minimum": "minima", "matrix": "matrices", "epoch": "epochs"}


def forms(term):
    """How a term may be written in a chapter, in lower case: itself and its plural."""
    term = term.lower()
    *_, last = term.split()
    plural = (
        IRREGULAR.get(last)
        or re.sub("(s|x|ch|sh)$", r"\1e", re.sub("([^aeiou])y$", r"\1ie", last)) + "s"
    )
    return {term, term.removesuffix(last) + plural}


def written(text):
    """An emphasised text as `forms` has it: in lower case, without the stop of a run-in heading."""
    return re.sub(r"\s+", " ", text).strip(" .:,;?").lower().replace("’", "'")


def glossary(env):
    """What the glossary holds: {how a term may be written: (term, page, id, definition)}."""
    found = {}
    for (kind, term), (page, label) in env.get_domain("std").objects.items():
        if kind == "term":
            found |= dict.fromkeys(forms(term), (term, page, label))
    said = {}
    for page in {page for _, page, _ in found.values()}:
        for item in env.get_doctree(page).findall(nodes.definition_list_item):
            text = re.sub(r"\s*\(Chapters? [^()]*\)$", "", item[-1].astext().strip())
            said |= {label: text for term in item.findall(nodes.term) for label in term["ids"]}
    return {form: (*place, said.get(place[2], "")) for form, place in found.items()}


class LinkTerms(SphinxPostTransform):
    """The links, made when a chapter is written."""

    default_priority = 5  # before the cross-references are resolved
    formats = ("html",)

    def run(self):
        if self.env.docname not in chapters(self.env):
            return
        left, place = glossary(self.env), (nodes.title, nodes.reference, addnodes.pending_xref)
        for node in self.document.findall(
            lambda node: isinstance(node, (nodes.emphasis, nodes.strong))
        ):
            entry = left.get(written(node.astext()))
            above = node.parent
            while above is not None and not isinstance(above, place):
                above = above.parent
            if entry is None or above is not None:
                continue
            term, page, label, said = entry
            content = nodes.inline("", "", *[child.deepcopy() for child in node.children])
            link = make_refnode(self.app.builder, self.env.docname, page, label, content, said)
            link["classes"].append("term")
            node.children = []
            node += link
            left = {form: entry for form, entry in left.items() if entry[0] != term}


def chapters_to_write_again(app, env):
    """All chapters, when the glossary says something else than when they were written."""
    before, env.flatmin_glossary = getattr(env, "flatmin_glossary", None), glossary(env)
    return list(chapters(env)) if before not in (None, env.flatmin_glossary) else []


def setup(app):
    app.add_post_transform(LinkTerms)
    app.connect("env-updated", chapters_to_write_again)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
