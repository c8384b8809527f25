"""HTML for notebooks and pages: everything that came from data is escaped, everything wide scrolls in its own box.

Classes for the style sheet: rvl-table, rvl-figure, rvl-scroll, rvl-panels, num, published, best, claims, sanity,
provenance, verdict, verdict-reproduced (-partly, -not_reproduced, -not_tested), passed, failed.
"""

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from numbers import Integral, Real
from textwrap import shorten

from ..plots.style import DPI
from ..runtime import UserError

MAX_COLUMNS = 7
CARD_ANCHOR = "rvl-card"  # the footer of a chapter carries it; every table of results links there
CSS_DPI = 96
LEGIBLE = 0.7  # a picture is shrunk no further than this; below, it scrolls
PANELS = "display:flex;flex-wrap:wrap;align-items:flex-start;gap:0.5rem;overflow-x:auto"
SCROLL = '<div class="rvl-scroll" style="overflow-x:auto">'


class Html(str):
    """HTML that a notebook displays when it ends a cell; everywhere else it shows as one short line."""

    def __new__(cls, html: str, short: str = "HTML"):
        self = super().__new__(cls, html)
        self.short = short
        return self

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"[{self.short}]"


def display(html: Html) -> None:
    """Show HTML in a notebook; outside of one, print its short line."""
    from IPython import display, get_ipython

    if get_ipython() is None:
        print(repr(html))
    else:
        display.display(html)


def table(
    rows: Sequence[Mapping],
    *,
    caption: str,
    published: Collection[str] = (),
    best: Collection[tuple[int, str]] = (),
    formats: Mapping[str, str] | None = None,
    kind: str = "",
    card_link: bool = False,
) -> Html:
    """Rows (column -> value) as an HTML table with its caption above; what a row lacks shows as a dash.

    published: columns that quote a paper, shown in gray. best: cells (row index, column) in bold. formats: column ->
    format such as ".1f"; left out, a column has the decimals that give its largest number three digits. kind: an extra
    class of the table. card_link: end the caption with a link to the chapter's card. Values are escaped unless they are
    `Html`.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not rows or len(columns) > MAX_COLUMNS:
        got = f"{len(columns)} columns" if rows else "no row"
        raise UserError(f"expected a table of at least one row and at most {MAX_COLUMNS} columns, got {got}; split it")
    unknown = [name for name in (*published, *(column for _, column in best), *(formats or {})) if name not in columns]
    if unknown:
        raise UserError(f"expected columns among {', '.join(columns)}, got {unknown[0]!r}")
    formats = {name: _column_format([row.get(name) for row in rows]) for name in columns} | dict(formats or {})
    gray = {name: _classes(name in published and "published") for name in columns}
    head = "".join(f'<th scope="col"{gray[name]}>{_safe(name)}</th>' for name in columns)
    body = []
    for i, row in enumerate(rows):
        cells = []
        for name in columns:
            value = row.get(name)
            text = _shown(value, formats[name])
            text = f"<strong>{text}</strong>" if (i, name) in best else text
            kinds = (name in published and "published", (i, name) in best and "best", _is_number(value) and "num")
            cells.append(f"<td{_classes(*kinds)}>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    link = f' <a href="#{CARD_ANCHOR}">Card</a>.' if card_link else ""
    html = (
        f'<figure class="rvl-table" style="margin:1em 0"><figcaption>{_safe(caption)}{link}</figcaption>{SCROLL}'
        f"<table{_classes('rvl-table', kind)}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "</div></figure>"
    )
    return Html(html, f"table, {len(rows)} rows: {shorten(caption, 60, placeholder=' …')}")


def figure(figs: Sequence, *, alt: str, caption: str, short: str) -> tuple[Html, list[bytes]]:
    """Matplotlib figures as one HTML figure, side by side where there is room and below each other on a phone.

    Returns the HTML, which holds the pictures, and the PNG files. A wide picture is not shrunk below legibility: on a
    phone it scrolls.
    """
    pictures, images = [], []
    for i, fig in enumerate(figs):
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
        pictures.append(buffer.getvalue())
        width = round(fig.get_size_inches()[0] * CSS_DPI)
        part = f"{alt} (part {i + 1} of {len(figs)})" if len(figs) > 1 else alt
        style = f"width:{width}px;min-width:{round(LEGIBLE * width)}px;max-width:100%;height:auto;background:#fff"
        data = base64.b64encode(pictures[-1]).decode()
        images.append(f'<img alt="{escape(part)}" style="{style}" src="data:image/png;base64,{data}">')
    text = f"<figcaption>{_safe(caption)}</figcaption>" if caption else ""
    panels = f'<div class="rvl-panels" style="{PANELS}">'
    html = f'<figure class="rvl-figure" style="margin:1em 0">{panels}{"".join(images)}</div>{text}</figure>'
    return Html(html, short), pictures


def _safe(value) -> str:
    return str(value) if isinstance(value, Html) else escape(str(value))


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value, spec: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (_is_number(value) and math.isnan(value)):
        return "–"
    if not _is_number(value):
        return _safe(value)
    return format(value, spec).replace("-", "−")


def _column_format(values: Sequence) -> str:
    """The same decimals down a column, so that its numbers can be compared by eye."""
    numbers = [value for value in values if _is_number(value) and math.isfinite(value)]
    if all(isinstance(value, Integral) for value in numbers):
        return ","
    largest = max(abs(value) for value in numbers)
    return f",.{min(6, max(0, 2 - math.floor(math.log10(largest)))) if largest else 1}f"


def _classes(*names) -> str:
    kept = " ".join(escape(name) for name in names if name)
    return f' class="{kept}"' if kept else ""
