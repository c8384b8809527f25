"""Sphinx extension of the book: directives that fill pages from the committed cards, the head of a chapter, the gallery.

    ```{from-cards} all_rows
    ```

names a function of `site_tables` that takes the committed cards.
"""

import base64
import io
import re
import shutil
from html import unescape
from pathlib import Path

import site_tables
import yaml
from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from robustvlm_lite.cards import committed, shelf
from robustvlm_lite.runtime import PACKAGE

FROM_CARDS = "committed_cards all_rows claims verdict_counts times estimates growth carried_check".split()
THUMBNAIL = (480, 300)  # pixels at most; twice what a tile shows
FIRST_FIGURE = re.compile(r'<img alt="([^"]*)"[^>]*src="data:image/png;base64,([^"]+)"')
PICTURES = "pictures"  # folder beside the pages of book/


class gallery(nodes.General, nodes.Element):
    """Stands for the gallery until every chapter has been read."""


class FromCards(SphinxDirective):
    """One table of `site_tables`, made from the committed cards."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in FROM_CARDS:
            raise self.error(f"expected one of {', '.join(FROM_CARDS)}, got {name!r}")
        depend_on_cards(self.env)
        return [html(getattr(site_tables, name)(committed()))]


class ByClasses(SphinxDirective):
    """The cost of texts by the number of classes."""

    def run(self) -> list[nodes.Node]:
        return [html(site_tables.by_classes())]


class BookBibtex(SphinxDirective):
    """How to cite the book."""

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / "CITATION.cff"
        self.env.note_dependency(str(path))
        repository = self.config.html_theme_options["repository_url"]
        return [html(site_tables.bibtex(yaml.safe_load(path.read_text(encoding="utf-8")), repository))]


class Gallery(SphinxDirective):
    """The chapters, each with its first figure."""

    def run(self) -> list[nodes.Node]:
        return [gallery()]


def html(text: str) -> nodes.raw:
    return nodes.raw("", str(text), format="html")


def depend_on_cards(env) -> None:
    """Read the page again when a card, a claim or the code behind them changed."""
    sources = [*shelf().glob("*/card.json"), PACKAGE.parent / "book" / "claims.yml", *PACKAGE.rglob("*.py")]
    for path in (*sources, *Path(__file__).parent.glob("*.py")):
        env.note_dependency(str(path))


def mark_chapter(app: Sphinx, doctree: nodes.document) -> None:
    """Put the committed cards below the badges of a chapter."""
    chapter = app.env.docname.removeprefix("notebooks/")
    if chapter == app.env.docname:
        return
    depend_on_cards(app.env)
    first = next(iter(doctree.findall(nodes.section)), doctree)
    paragraphs = [i for i, node in enumerate(first.children) if isinstance(node, nodes.paragraph)]
    line = html(site_tables.cards_line(chapter, committed()))
    first.insert(paragraphs[1] + 1 if len(paragraphs) > 1 else 1, line)


def fill_gallery(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Replace the gallery by tiles, once every chapter's outputs are known."""
    places = list(doctree.findall(gallery))
    if not places:
        return
    toc = yaml.safe_load((Path(app.srcdir) / "_toc.yml").read_text(encoding="utf-8"))
    pictures = {}
    for name in sorted(app.env.found_docs):
        if name.startswith("notebooks/") and (found := first_figure(app.env.get_doctree(name))):
            chapter, (alt, png) = name.removeprefix("notebooks/"), found
            pictures[chapter] = (write_thumbnail(png, Path(app.outdir) / "book" / PICTURES / f"{chapter}.png"), alt)
    for place in places:
        place.replace_self(html(site_tables.gallery(toc["parts"], pictures)))


def first_figure(doctree: nodes.document) -> tuple[str, bytes] | None:
    """(alternative text, PNG) of the first figure that a chapter shows; None if it shows none."""
    for node in doctree.findall(nodes.raw):
        if found := FIRST_FIGURE.search(node.astext()):
            return unescape(found[1]), base64.b64decode(found[2])
    return None


def write_thumbnail(png: bytes, path: Path) -> str:
    """Write a small copy and return its path from book/."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail(THUMBNAIL)
    picture.save(path)
    return f"{PICTURES}/{path.name}"


def copy_cards(app: Sphinx, failed: Exception | None) -> None:
    """The cards lie beside the pages that link them, so that links hold without a network."""
    if failed is None and app.builder.format == "html":
        shutil.copytree(shelf(), Path(app.outdir) / "book" / "cards", dirs_exist_ok=True)


def setup(app: Sphinx) -> dict:
    app.add_node(gallery)
    app.add_directive("from-cards", FromCards)
    app.add_directive("by-classes", ByClasses)
    app.add_directive("book-bibtex", BookBibtex)
    app.add_directive("gallery", Gallery)
    app.connect("doctree-read", mark_chapter)
    app.connect("doctree-resolved", fill_gallery)
    app.connect("build-finished", copy_cards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
