"""The book's verdict on every claim, from the committed cards, and whether a card still says what its examples give."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .cards import VERDICTS, is_stale, load_card, load_examples, recompute
from .claims import decide, load_claims
from .runtime import PROFILES

EVERY_DIGIT = 1e-12  # a library may sum in another order; nobody types a number that differs by less


@dataclass(frozen=True)
class Verdict:
    """What the book says of one claim: verdict and `why` of one committed card, named by its folder ("" if none)."""

    claim: dict
    verdict: str
    why: str
    card: str
    stale: bool


def book_verdicts(cards: Mapping[str, dict]) -> list[Verdict]:
    """One verdict for each claim of claims.yml, in its order.

    cards: folder name -> card, as `cards.committed` gives them. A card that tests the claim goes before one that does
    not, a larger profile before a smaller; of several cards of one profile, as of several seeds, the least favorable
    counts.
    """
    found, stale = [], cache(lambda card: is_stale(cards[card]))  # asked once a card: it reads all code that the card stands on
    for claim in load_claims():
        best = max(_said(claim, cards), key=lambda said: said[0], default=None)
        _, card, decided = best or (None, "", {"verdict": "not_tested", "why": "no card yet"})
        found.append(Verdict(claim, decided["verdict"], decided["why"], card, bool(card) and stale(card)))
    return found


def _said(claim: dict, cards: Mapping[str, dict]) -> Iterator[tuple[tuple, str, dict]]:
    """(rank, folder name, verdict) of each card that speaks of the claim."""
    for name, card in cards.items():
        for decided in card["claims"]:
            if decided["id"] == claim["id"] and card["chapter"] == claim["chapter"]:
                verdict = decided["verdict"]
                rank = (verdict != "not_tested", PROFILES.index(card["profile"]), VERDICTS.index(verdict))
                yield rank, name, decided


def contradictions(folder) -> list[str]:
    """Where the card in `folder` says something else than its examples give, one line each."""
    path, card = Path(folder) / "card.json", load_card(folder)
    claims = load_claims(chapter=card["chapter"])
    written = {claim["id"]: claim["verdict"] for claim in card["claims"]}
    given = {claim["id"]: claim["verdict"] for claim in decide(claims, card, load_examples(folder))}
    found = [
        f"{path}: {id} says {written.get(id, 'nothing')}, its examples give {given.get(id, 'nothing')}"
        for id in written | given
        if written.get(id) != given.get(id)
    ]
    for said, row in recompute(folder):
        numbers = [(said[name], row[name]) for name in ("n", "value")] + [*zip(said["ci95"], row["ci95"], strict=True)]
        if not all(math.isclose(a, b, abs_tol=EVERY_DIGIT) for a, b in numbers):
            name = " ".join(str(row[key]) for key in ("method", "dataset", "attack", "eps_255", "metric"))
            found.append(f"{path}: {name} says {_told(said)}, its examples give {_told(row)}")
    return found


def _told(row: dict) -> str:
    low, high = row["ci95"]
    return f"{row['value']:g} [{low:.4f}, {high:.4f}], n = {row['n']}"
