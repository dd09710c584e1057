"""Link each glossary term to its entry where a chapter first emphasises it.

The notebooks stay plain Markdown: `*early stopping*` and `**Early stopping.**` are enough.  The
title of a link is the definition, so that a reader who points at the term need not leave the page.
"""

import re

from docutils import nodes
from flatmin_book import chapters
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

IRREGULAR = {"minimum": "minima", "matrix": "matrices", "epoch": "epochs"}


def forms(term):
    """The forms of a term in a chapter, in lower case: singular and plural."""
    term = term.lower()
    *_, last = term.split()
    plural = (
        IRREGULAR.get(last)
        or re.sub("(s|x|ch|sh)$", r"\1e", re.sub("([^aeiou])y$", r"\1ie", last)) + "s"
    )
    return {term, term.removesuffix(last) + plural}


def normalized(text):
    """An emphasised text as in `forms`: in lower case, without final punctuation."""
    return re.sub(r"\s+", " ", text).strip(" .:,;?").lower().replace("’", "'")


def glossary(env):
    """{form of a term: (term, page, id, definition)}."""
    entries = {}
    for (kind, term), (page, label) in env.get_domain("std").objects.items():
        if kind == "term":
            entries |= dict.fromkeys(forms(term), (term, page, label))
    definitions = {}
    for page in {page for _, page, _ in entries.values()}:
        for item in env.get_doctree(page).findall(nodes.definition_list_item):
            text = re.sub(r"\s*\(Chapters? [^()]*\)$", "", item[-1].astext().strip())
            labels = [label for term in item.findall(nodes.term) for label in term["ids"]]
            definitions |= dict.fromkeys(labels, text)
    return {
        form: (term, page, label, definitions.get(label, ""))
        for form, (term, page, label) in entries.items()
    }


class LinkTerms(SphinxPostTransform):
    """Makes the links when a chapter is written."""

    default_priority = 5  # before the cross-references are resolved
    formats = ("html",)

    def run(self):
        if self.env.docname not in chapters(self.env):
            return
        remaining = glossary(self.env)
        never_linked_in = (nodes.title, nodes.reference, addnodes.pending_xref)
        for node in self.document.findall(
            lambda node: isinstance(node, (nodes.emphasis, nodes.strong))
        ):
            entry = remaining.get(normalized(node.astext()))
            ancestor = node.parent
            while ancestor is not None and not isinstance(ancestor, never_linked_in):
                ancestor = ancestor.parent
            if entry is None or ancestor is not None:
                continue
            term, page, label, definition = entry
            content = nodes.inline("", "", *[child.deepcopy() for child in node.children])
            link = make_refnode(
                self.app.builder, self.env.docname, page, label, content, definition
            )
            link["classes"].append("term")
            node.children = []
            node += link
            remaining = {form: entry for form, entry in remaining.items() if entry[0] != term}


def chapters_to_rewrite(app, env):
    """All chapters, if the glossary has changed since they were written."""
    before, env.flatmin_glossary = getattr(env, "flatmin_glossary", None), glossary(env)
    return list(chapters(env)) if before not in (None, env.flatmin_glossary) else []


def setup(app):
    app.add_post_transform(LinkTerms)
    app.connect("env-updated", chapters_to_rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
