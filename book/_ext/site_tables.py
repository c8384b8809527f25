"""Tables of the site, made from the committed cards while the book is built: every function returns HTML for a page in book/."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from robustvlm_lite import estimate
from robustvlm_lite.book.markup import Html, table
from robustvlm_lite.book.tables import badge, command_line
from robustvlm_lite.cards import VERDICTS, is_stale
from robustvlm_lite.records import ACCURACIES
from robustvlm_lite.runtime import PROFILES, UserError, chapters
from robustvlm_lite.verdicts import Verdict, book_verdicts

STALE = '<span class="stale" title="the package or the chapter has changed since; run it again">stale</span>'
SEARCHED = ("chapter", "profile", "method", "data set", "attack", "ε · 255", "metric")  # results.js makes filters of these
CLASSES = (10, 47, 100, 1000)  # of CIFAR-10, DTD, CIFAR-100 and ImageNet


def card_link(name: str, text: str = "") -> Html:
    """Link to a committed card; `site_pages` copies them beside the pages."""
    return Html(f'<a href="cards/{escape(name)}/card.json">{escape(text or name)}</a>')


def chapter_link(chapter: str, text: str = "") -> Html:
    return Html(f'<a href="../notebooks/{escape(chapter)}.html">{escape(text or chapter)}</a>')


def committed_cards(cards: Mapping[str, dict]) -> Html:
    """One line a card: what made it, and whether the code is still the same."""
    lines = []
    for name, card in cards.items():
        made = card["provenance"]
        command = command_line(card["chapter"], card["profile"], card["seed"], card["parameters"])
        changed = " with local changes" if made["dirty"] else ""
        lines.append(
            {
                "card": card_link(name),
                "code": Html(STALE if is_stale(card) else "current"),
                "made by": Html(f"<code>{escape(command)}</code>"),
                "commit": Html(f"<code>{escape(made['commit'][:12])}</code>{changed}"),
                "rows": len(card["rows"]),
                "claims": len(card["claims"]),
                "examples": Html(f'<a href="cards/{escape(name)}/examples.parquet">Parquet</a>'),
            }
        )
    told = "stale: package or chapter have changed since the run; its numbers are those of the commit named."
    return table(lines, caption=f"The committed cards. {told}", kind="cards")


def all_rows(cards: Mapping[str, dict]) -> str:
    """Every row of every card as one table. It reads without JavaScript; results.js adds sorting and filters."""
    head = (*SEARCHED, "value (95 % interval)", "n")
    body = [row for name, card in cards.items() for row in _rows(name, card)]
    heads = "".join(
        f'<th scope="col"{" data-filter" if title in SEARCHED else ""}>{escape(title)}</th>' for title in head
    )
    return (
        '<div class="rvl-scroll rvl-results full-width" tabindex="0" role="region" aria-label="All results">'
        f'<table id="rvl-results"><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        '<script src="../_static/results.js"></script>'
    )


def _rows(name: str, card: Mapping) -> Iterator[str]:
    chapter, stale = card["chapter"], STALE if is_stale(card) else ""
    first = f'<td data-key="{escape(chapter)}">{card_link(name, chapter)} {stale}</td>'
    for row in card["rows"]:
        texts = (card["profile"], row["method"], row["dataset"], row["attack"], f"{row['eps_255']:g}", row["metric"])
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        yield f'<tr>{first}{cells}<td data-value="{row["value"]!r}">{value(row)}</td><td>{row["n"]}</td></tr>'


def value(row: Mapping) -> str:
    """A measured value with its interval: accuracies and success rates in percent."""
    low, high = row["ci95"]
    if row["metric"] in (*ACCURACIES, "asr"):
        return f"{100 * row['value']:.1f}&nbsp;% ({100 * low:.1f}–{100 * high:.1f})"
    return f"{row['value']:.3g} ({low:.3g}–{high:.3g})"


# ---- claims


def claims(cards: Mapping[str, dict]) -> Html:
    """Every claim of the book with its verdict, its card, or what would test it."""
    lines = [_claim_line(v, cards) for v in book_verdicts(cards)]
    caption = "Every claim of the papers, in our words; those that begin with (ours) are this book's."
    return table(lines, caption=caption, published=("published",), kind="claims")


def verdict_counts(cards: Mapping[str, dict]) -> str:
    """How many claims have which verdict, those of the papers apart from the book's own."""
    found, lines = book_verdicts(cards), []
    for whose, ours in (("of the papers", False), ("of this book's own", True)):
        said = [v.verdict for v in found if (v.claim["paper"] == "none") == ours]
        counted = [f"{badge(name)} {said.count(name)}" for name in VERDICTS if not ours or name in said]
        lines += [f"{len(said)} claims {whose}: {' · '.join(counted)}"] if said else []
    return f'<p class="rvl-counts">{"<br>".join(lines)}</p>'


def _claim_line(v: Verdict, cards: Mapping[str, dict]) -> dict:
    source = Html(f"{card_link(v.card)} {STALE if v.stale else ''}") if v.card else Html("")
    if v.verdict == "not_tested":
        source = Html(f"{escape(v.why)} {_price(v.claim, cards)}")
    known = v.claim["chapter"] in chapters()
    return {
        "claim": chapter_link(v.claim["chapter"], v.claim["id"]) if known else v.claim["id"],
        "verdict": badge(v.verdict),
        "what is claimed": v.claim["statement"],
        "published": "–" if v.claim["paper"] == "none" else f"{v.claim['published']} ({v.claim['paper']}, {v.claim['where']})",
        "card, or what would test it": source,
    }


def _price(claim: Mapping, cards: Mapping[str, dict]) -> str:
    """What a run of the profile that a claim needs would cost."""
    card = estimate.nearest(cards, claim["chapter"])
    if card is None or PROFILES.index(claim["profile"]) <= PROFILES.index(card["profile"]):
        return ""
    try:
        hours = estimate.estimate(card, claim["profile"]).hours
    except UserError:
        return ""
    least = "at least " if estimate.uncounted(claim["chapter"], claim["profile"]) else ""
    return f'That run is put at {least}<a href="estimate.html">{_hours(hours)}</a>.'


# ---- time and cost


def times(cards: Mapping[str, dict]) -> Html:
    """How long each committed run took, and how many images went through the image tower."""
    lines = []
    for name, card in cards.items():
        passes, made = estimate.evaluation(card), card["provenance"]
        lines.append(
            {
                "chapter": chapter_link(card["chapter"]),
                "profile": card_link(name, card["profile"]),
                "seed": card["seed"],
                "wall time": _minutes(made["wall_s"]),
                "device": made["device"],
                "images forward": passes.forwards,
                "images backward": passes.backwards,
            }
        )
    return table(lines, caption="Committed runs. Passes are those of the accuracies, without training.")


def estimates(cards: Mapping[str, dict]) -> Html:
    """GPU hours of each chapter's paper profile."""
    lines = []
    for chapter in chapters():
        line = {"chapter": chapter_link(chapter)}
        card = estimate.nearest(cards, chapter)
        try:
            if card is None:
                raise UserError("no card to carry over yet")
            found = estimate.estimate(card)
            missing = estimate.uncounted(chapter)
            line |= {"evaluation": f"at least {_hours(found.evaluation_hours)}" if missing else _hours(found.evaluation_hours)}
            line |= {"training": _hours(found.training_hours) if found.training else "not counted" + f": {missing}" * bool(missing)}
            line |= {"backbone": found.model, "from": f"the card of {card['profile']}"}
            line |= {"images forward": _big(found.evaluation.forwards), "backward": _big(found.evaluation.backwards)}
        except UserError as reason:
            line |= {"evaluation": f"none: {reason}"}
        lines.append(line)
    speed = f"{estimate.SUSTAINED / 1e12:g} TFLOP/s"
    return table(lines, caption=f"One run of each chapter's profile paper, one seed, on a GPU that keeps up {speed}.")


def growth(cards: Mapping[str, dict]) -> Html:
    """What one more data set, budget or seed adds."""
    lines = []
    for chapter in chapters():
        try:
            card = estimate.nearest(cards, chapter)
            added = estimate.growth(card) if card else {}
        except UserError:
            continue
        if added:
            least = "at least " if estimate.uncounted(chapter) else ""
            per = {f"one more {what}": least + _hours(hours) for what, hours in added.items()}
            lines.append({"chapter": chapter_link(chapter)} | per)
    told = "A data set is as large as the mean of the profile's; a budget is one point on every curve over ε."
    return table(lines, caption=f"What is added to the hours above. {told}")


def by_classes() -> Html:
    """What the texts of a class list cost, once and at every step."""
    models = sorted({model for chapter in chapters() if (model := _paper_tower(chapter))})
    lines = []
    for n in CLASSES:
        share = {model: estimate.text_share(model, n) for model in models}
        lines.append({"classes": n} | {f"{model}, in image passes": round(s) for model, s in share.items()})
    return table(lines, caption="Encoding one prompt a class, over one forward pass of one image.")


def carried_check(cards: Mapping[str, dict]) -> str:
    """The rule held against a run that was made: a tiny card carried to small, beside what small's card counted."""
    found = []
    for chapter in chapters():
        by_profile = {card["profile"]: card for card in cards.values() if card["chapter"] == chapter}
        if {"tiny", "small"} <= by_profile.keys() and "paper" in chapters()[chapter]["profiles"]:
            ahead = estimate.carried(by_profile["tiny"], "small").flops(1)
            counted = estimate.evaluation(by_profile["small"]).flops(1)
            found.append(f"{chapter_link(chapter)}: {ahead / counted:.1f}")
    return f"<p>Carried over, divided by counted: {'; '.join(found) or 'no chapter has both cards yet'}.</p>"


def _paper_tower(chapter: str) -> str:
    """The backbone of the chapter's paper profile where its arithmetic is known, else empty."""
    try:
        model = estimate.backbone(chapter)
        estimate.tower(model)
    except UserError:
        return ""
    return model


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} GPU hours"
    return f"{60 * hours:.0f} GPU minutes" if 60 * hours >= 1 else f"{3600 * hours:.0f} GPU seconds"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def _big(count: float) -> str:
    return f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,.0f}"


# ---- frame


def gallery(parts: Sequence[Mapping], pictures: Mapping[str, tuple[str, str]]) -> str:
    """The chapters in their order, each with its part and its first figure.

    parts: of _toc.yml. pictures: chapter -> (path of its picture from book/, alternative text).
    """
    files = [(part["caption"], c["file"]) for part in parts for c in part["chapters"]]
    names = [(caption, file.removeprefix("notebooks/")) for caption, file in files if file.startswith("notebooks/")]
    tiles = [_tile(caption, name, *pictures.get(name, ("", ""))) for caption, name in names]
    return f'<div class="rvl-gallery">{"".join(tiles)}</div>'


def _tile(part: str, chapter: str, picture: str, alt: str) -> str:
    known = chapters()[chapter]
    image = f'<img src="{escape(picture)}" alt="{escape(alt)}" loading="lazy">' if picture else ""
    minutes = known["profiles"]["tiny"]["minutes"]
    return (
        f'<a class="rvl-tile" href="../notebooks/{escape(chapter)}.html">{image}<span>{escape(part)}</span>'
        f"<strong>{escape(known['title'])}</strong>"
        f"<span>{escape(known['reproduces'])}</span><span>tiny: {minutes} min</span></a>"
    )


def cards_line(chapter: str, cards: Mapping[str, dict]) -> str:
    """The committed cards of a chapter, for the head of its page; one made by other code is marked."""
    own = [(name, card) for name, card in cards.items() if card["chapter"] == chapter]
    links = [
        f'<a href="../book/cards/{escape(name)}/card.json">{escape(card["profile"])}, seed {card["seed"]}</a>'
        f"{' ' + STALE if is_stale(card) else ''}"
        for name, card in own
    ]
    more = f'<a href="../book/results.html#chapter={escape(chapter)}">all rows</a>' if own else "none yet"
    return f'<p class="rvl-cards">Committed cards: {" · ".join([*links, more])}</p>'


def bibtex(citation: Mapping, repository: str) -> str:
    """A BibTeX entry of the book, from CITATION.cff."""
    authors = " and ".join("{" + author["name"] + "}" for author in citation["authors"])
    fields = {"author": authors, "title": "{" + citation["title"] + "}", "version": citation["version"], "url": repository}
    fields |= {name: citation[name] for name in ("doi",) if name in citation}
    lines = ",\n".join(f"  {name} = {{{text}}}" for name, text in fields.items())
    return f"<pre>@software{{robustvlm_lite,\n{escape(lines)}\n}}</pre>"
