"""The tables of a chapter: accuracies with intervals, claims with verdicts, soundness checks, provenance."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape

import yaml

from ..cards import VERDICTS, Card
from ..claims import decide, load_claims
from ..evaluate import paired
from ..records import Row
from ..runtime import PACKAGE, UserError
from .markup import CARD_ANCHOR, Html, table

PAIRED = ("clean_acc", "robust_acc", "robust_acc_worst")  # metrics whose verdicts `evaluate.paired` compares


def accuracy_table(
    rows: Sequence[Row],
    *,
    columns: Mapping[str, Mapping],
    caption: str,
    methods: Sequence[str] = (),
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Html:
    """Methods down, measurements across: "54.3 (50.2–58.4)" in percent, the 95 % interval in parentheses.

    columns: heading -> fields that pick one row a method, e.g. {"PGD, ε 1": {"attack": "pgd-20", "eps_255": 1.0,
    "metric": "robust_acc"}}. published: heading -> method -> percent, in gray columns at the right. The highest value
    of a column is bold only if its paired interval to the runner-up excludes zero. n and the attacks go into the
    caption.
    """
    methods = list(methods) or list(dict.fromkeys(row.method for row in rows))
    cells = {(m, head): _pick(rows, m, head, fields) for head, fields in columns.items() for m in methods}
    if not any(cells.values()):
        raise UserError(f"no row fits the columns {', '.join(columns)}; compare their fields with those of the rows")
    lines = []
    for m in methods:
        line = {"method": m} | {head: _accuracy(cells[m, head]) for head in columns}
        lines.append(line | {head: values.get(m) for head, values in (published or {}).items()})
    best = [(methods.index(m), head) for head in columns if (m := _clear_winner([cells[m, head] for m in methods]))]
    used = [row for row in cells.values() if row]
    return table(
        lines,
        caption=f"{caption} {_conditions(used)}",
        published=tuple(published or ()),
        best=best,
        formats=dict.fromkeys(published or (), ".1f"),
        card_link=True,
    )


def sets_table(rows: Sequence[Row], classes: Mapping[str, int], *, caption: str) -> Html:
    """One line a data set: number of classes, n, accuracy of guessing, and the accuracies with their intervals.

    rows: of one method, clean ones alone or also under one attack, a column for each ε. classes: data set -> number of
    classes.
    """
    alone, lines = all(row.attack == "none" for row in rows), {}
    for row in rows:
        known = {"data set": row.dataset, "classes": classes[row.dataset], "images": row.n}
        line = lines.setdefault(row.dataset, known | {"chance": 100 / classes[row.dataset]})
        clean = "accuracy (95 % interval)" if alone else "clean"
        line[f"ε = {row.eps_255:g}/255" if row.eps_255 else clean] = _accuracy(row)
    told = "" if alone else f" {_conditions(rows)}"
    return table(list(lines.values()), caption=f"{caption} In percent.{told}", formats={"chance": ".1f"}, card_link=True)


def paired_table(
    rows: Sequence[Row], reference: Row, *, caption: str, by: str = "method",
    more: Mapping[str, Callable[[Row], object]] | None = None,
) -> Html:  # fmt: skip
    """One line a row: its accuracy, and the difference to `reference` on the same images, both with 95 % intervals.

    by: the field that names a line, "method" or "attack". more: heading -> what it shows of a row.
    """
    head = {"method": "what is done"}.get(by, by)
    lines = []
    for row in rows:
        change = {"points": "–" if row is reference else points(paired(row.records, reference.records))}
        line = {head: getattr(row, by), "accuracy": _accuracy(row)} | change
        lines.append(line | {name: show(row) for name, show in (more or {}).items()})
    n = " or ".join(str(size) for size in sorted({row.n for row in rows}))
    told = f"accuracy in percent; points: paired difference to {getattr(reference, by)}; in parentheses the 95 % intervals."
    return table(lines, caption=f"{caption} n = {n}; {told}", card_link=True)


def points(diff: tuple[float, float, float]) -> str:
    """A paired difference (diff, lo, hi) of fractions as "+1.2 (−0.3 to +2.7)", in percentage points."""
    diff, low, high = (100 * v for v in diff)
    return f"{diff:+.1f}\u00a0({low:+.1f} to {high:+.1f})".replace("-", "−")


def _pick(rows: Sequence[Row], method: str, head: str, fields: Mapping) -> Row | None:
    found = [r for r in rows if r.method == method and all(getattr(r, name) == value for name, value in fields.items())]
    if len(found) > 1:
        kinds = sorted({f"{r.dataset}, {r.attack}, ε {r.eps_255:g}, {r.metric}" for r in found})
        raise UserError(f"column {head!r}: {len(found)} rows of {method} fit ({'; '.join(kinds)}); give more fields")
    return found[0] if found else None


def _accuracy(row: Row | None) -> str | None:
    return None if row is None else with_interval(row.value, row.ci95)


def with_interval(value: float, interval: Sequence[float]) -> str:
    """A fraction and its interval in percent, "54.3 (50.2–58.4)", with no line break inside."""
    low, high = interval
    return f"{100 * value:.1f}\u00a0({100 * low:.1f}\u2060–\u2060{100 * high:.1f})"


def _clear_winner(rows: Sequence[Row | None]) -> str:
    """The method that is ahead of the second by more than the paired interval; empty if none is."""
    ranked = sorted((row for row in rows if row), key=lambda row: row.value, reverse=True)
    if len(ranked) < 2 or any(row.records is None or row.metric not in PAIRED for row in ranked[:2]):
        return ""
    _, low, _ = paired(ranked[0].records, ranked[1].records)
    return ranked[0].method if low > 0 else ""


def _conditions(rows: Sequence[Row]) -> str:
    """n and, for each attack met, its ε, steps and step size."""
    sizes = sorted({row.n for row in rows})
    parts = [
        "n = " + " or ".join(str(n) for n in sizes) + "; in parentheses the 95 % interval of each accuracy by itself"
    ]
    budgets: dict[str, dict[float, Row]] = {}
    for row in rows:
        if row.attack != "none":
            budgets.setdefault(row.attack, {})[row.eps_255] = row
    for attack, by_eps in budgets.items():
        some = next(iter(by_eps.values()))
        parts.append(f"{attack} at ε = {', '.join(f'{eps:g}' for eps in sorted(by_eps))}/255{_steps(some)}")
    return "; ".join(parts) + "."


def _steps(row: Row) -> str:
    if row.extra.get("attacks"):
        return f" (per image the strongest of {', '.join(row.extra['attacks'])})"
    if row.extra.get("components"):
        return f" ({', then '.join(row.extra['components'])})"
    n_steps, step = row.extra.get("n_steps"), row.extra.get("step_255")
    if not n_steps:
        return ""
    share = f" of {step / row.eps_255:.3g} ε" if step else ""
    restarts = row.extra.get("n_restarts", 1)
    return f" ({n_steps} steps{share}{f', {restarts} restarts' if restarts > 1 else ''})"


def compared(diff: tuple[float, float, float]) -> str:
    """A paired difference (diff, lo, hi) in words for {glue:text}: its direction where the interval excludes zero."""
    _, low, high = diff
    return "more than" if low > 0 else "less than" if high < 0 else "not measurably more or less than"


def told(diff: tuple[float, float, float]) -> str:
    """A paired difference (diff, lo, hi) of fractions for {glue:text}: its size, and whether it can be told from none."""
    value, rest = points(diff).split("\u00a0", 1)
    return f"{value} points {rest}" + ("" if diff[1] > 0 or diff[2] < 0 else ", no measurable difference")


def rates_table(searched: Mapping) -> Html:
    """The learning rates of a search (`defenses.search_results`): methods down, rates across, "clean / robust"."""
    lines: dict[str, dict] = {}
    for r in searched["runs"]:
        if "alpha" not in r:
            cell = f"{100 * r['clean']:.1f}\u00a0/\u00a0{100 * r['robust']:.1f}"
            lines.setdefault(r["method"], {"method": r["method"]})[f"rate {r['lr']:g}"] = cell
    caption = "Learning rates: clean / robust accuracy in percent on the same held-back training images. Every method takes TeCoA's best."
    return table(list(lines.values()), caption=f"{caption} n = {searched['n']}.")


def claims_table(chapter: str, card: Card | Mapping | None = None) -> Html:
    """The paper's own statements; with a card, the verdict on each and why.

    card: the one that the run is filling (verdicts are computed now), or one read by `cards.load_card`.
    """
    claims = load_claims(chapter=chapter)
    if not claims:
        raise UserError(f"expected claims of chapter {chapter!r} in claims.yml, found none; check its name")
    if isinstance(card, Card):
        decided = decide(claims, card.as_dict(), card.examples)
    else:
        decided = card["claims"] if card else []
    by_id = {d["id"]: d for d in decided}
    lines = []
    for claim in claims:
        stated = {
            "what the paper states": claim["statement"],
            "where": claim["where"],
            "published": str(claim["published"]),
        }
        if card is None:
            lines.append({"claim": claim["id"]} | stated)
        else:
            found = by_id.get(claim["id"], {"verdict": "not_tested", "why": "The card says nothing about it."})
            verdict = {"claim": claim["id"], "verdict": badge(found["verdict"])}  # first, where a phone shows it
            lines.append(verdict | stated | {"why": found["why"]})
    if card is None:
        caption = "What the paper states, in our words. The verdicts follow below, computed from what is measured."
    else:
        source = "this run's examples" if isinstance(card, Card) else f"the examples of a {card['profile']} run"
        caption = f"Verdicts on the paper's statements, computed by rule from {source}."
    return table(lines, caption=caption, published=("published",), kind="claims", card_link=card is not None)


def published_table(chapter: str) -> Html:
    """What others published on the chapter's question, from book/published.yml, all in gray."""
    known = yaml.safe_load((PACKAGE.parent / "book" / "published.yml").read_text(encoding="utf-8"))[chapter]
    lines = [{"method": m} | dict(zip(known["columns"], values, strict=True)) for m, values in known["rows"].items()]
    formats = dict.fromkeys(known["columns"], ".2f")
    return table(lines, caption=known["caption"], published=tuple(known["columns"]), formats=formats)


def badge(verdict: str) -> Html:
    """A verdict as a colored word."""
    if verdict not in VERDICTS:
        raise UserError(f"expected a verdict of {', '.join(VERDICTS)}, got {verdict!r}")
    return Html(f'<span class="verdict verdict-{verdict}">{verdict.replace("_", " ")}</span>')


def sanity_table(checks: Sequence) -> Html:
    """The soundness battery (`sanity.Check`s), one line a check."""
    lines = []
    for check in checks:
        mark = '<span class="passed">✓ holds</span>' if check.passed else '<span class="failed">✗ fails</span>'
        lines.append({"check": check.name, "result": Html(mark), "value": check.value, "what it means": check.why})
    held = sum(check.passed for check in checks)
    caption = f"Is the evaluation sound? {held} of {len(lines)} checks hold."
    return table(lines, caption=caption, kind="sanity", card_link=True)


def provenance_table(card: Mapping, *, out: str, command: str) -> Html:
    """Where the numbers of a card come from, and the command that makes them again.

    card: as `Card.as_dict` or `cards.load_card` give it. out: folder of the card, empty if it is a temporary one.
    """
    p = card["provenance"]
    commit = f"{p['commit'][:12] or 'none (an installed copy)'}{', with local changes' if p['dirty'] else ''}"
    facts = {
        "card": f"{out}/card.json" if out else "card.json in a temporary folder; give out= to keep it",
        "made by": Html(f"<code>{escape(command)}</code>"),
        "commit": commit,
        "versions": f"robustvlm_lite {p['package']}, torch {p['torch']}",
        "device": p["device"],
        "weights": _hashes(p["weights_sha256"], p.get("weights", {})),
        "data": _hashes(p["data_sha256"], p.get("data", {})),
        "code": _hashes(p["code_sha256"], {}),
        "started": p["started"],
        "wall time": f"{p['wall_s']:.0f} s",
    }
    made = table(
        [{"what": name, "value": value} for name, value in facts.items()],
        caption="Provenance of every number on this page (hashes are SHA-256).",
        kind="provenance",
    )
    return Html(f'<div id="{CARD_ANCHOR}">{made}</div>', f"provenance of {card['chapter']}, profile {card['profile']}")


def _hashes(whole: str, parts: Mapping[str, str]) -> Html:
    """Hashes cut to 12 digits, whole ones on hover. What shares a hash shares a line: the first name and how many more."""
    names: dict[str, list[str]] = {whole: []} if whole else {}
    for name, digest in parts.items():
        names.setdefault(digest, []).append(name)
    told = {digest: "" if digest == whole else _first(found) for digest, found in names.items()}
    codes = (f'{escape(text)}<code title="{escape(digest)}">{escape(digest[:12])}</code>' for digest, text in told.items())
    return Html(", ".join(codes) or "–")


def _first(names: Sequence[str]) -> str:
    return f"{names[0]} " if len(names) == 1 else f"{names[0]} and {len(names) - 1} more "


def command_line(chapter: str, profile: str, seed: int, parameters: Mapping) -> str:
    """The command that repeats a run."""
    words = ["robustvlm", "run", chapter, "--profile", profile, "--seed", str(seed)]
    for name, value in parameters.items():
        words += ["-p", name, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
