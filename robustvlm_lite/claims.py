"""What a paper claims, and what a card says to it: verdicts by rule, never typed."""

from pathlib import Path

import pyarrow as pa
import yaml

from .rules import Accuracy, Difference, NotMeasured, Reading, compute, parse
from .runtime import PACKAGE, PROFILES, UserError

FIELDS = "id chapter paper statement where published scale profile measure reproduced partly".split()


def load_claims(path=None, *, chapter: str = "") -> list[dict]:
    """The claims of a file (default: the book's), of one chapter if given. Raises UserError for an unusable file."""
    path = Path(path) if path else PACKAGE.parent / "book" / "claims.yml"
    try:
        claims = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no claims at {path}; run inside a checkout of the book or give the path") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        raise UserError(f"{path}: expected a list of claims, got {type(claims).__name__}")
    for claim in claims:
        missing = [field for field in FIELDS if field not in claim]
        if missing or claim["profile"] not in PROFILES:
            raise UserError(f"{path}: claim {claim.get('id', '?')} lacks {', '.join(missing) or 'a known profile'}")
        _parse(claim)
    return [claim for claim in claims if chapter in ("", claim["chapter"])]


def decide(claims: list[dict], card: dict, examples: pa.Table) -> list[dict]:
    """`{"id", "verdict", "why"}` of each claim, computed from a card (`Card.as_dict`, `load_card`) and its examples.

    reproduced, partly: the condition of that name holds, in this order; not_reproduced: neither does; not_tested: rows
    are missing or the card's profile is smaller than the claim asks. `why` is text with the numbers and the rule.
    """
    return [{"id": claim["id"], **_decide(claim, card, examples)} for claim in claims]


def _decide(claim: dict, card: dict, examples: pa.Table) -> dict:
    profile, needed = card["profile"], claim["profile"]
    try:
        if PROFILES.index(profile) < PROFILES.index(needed):
            raise NotMeasured(f"it needs the {needed} profile and this card is {profile}")
        values, sizes = compute(_parse(claim), card, examples)
    except NotMeasured as missing:
        return {"verdict": "not_tested", "why": f"Not tested: {missing}."}
    except (ZeroDivisionError, TypeError) as error:
        raise UserError(f"claim {claim['id']}: its rule cannot be computed ({error})") from None
    verdict = next((name for name in ("reproduced", "partly") if values[name]), "not_reproduced")
    if verdict == "not_reproduced":
        rule = f"Neither the rule for reproduced ({claim['reproduced']}) nor that for partly ({claim['partly']}) holds."
    else:
        rule = f"The rule for {verdict} holds: {claim[verdict]}."
    datasets = " and ".join(f"{dataset} (n = {n})" for dataset, n in sorted(sizes.items()))
    numbers = "; ".join(f"{name} = {_told(values[name])}" for name in claim["measure"])
    return {"verdict": verdict, "why": f"Profile {profile}, {datasets}: {numbers}. {rule}"}


def _parse(claim: dict) -> dict:
    rules = {name: claim[name] for name in ("reproduced", "partly")}
    return parse(claim["measure"] | rules, f"claim {claim['id']}")


def _told(value) -> str:
    if isinstance(value, Difference):
        return f"{100 * value:+.1f} points [{100 * value.lo:.1f}, {100 * value.hi:.1f}]"
    if isinstance(value, Reading):
        return f"{value:.3g} [{value.lo:.3g}, {value.hi:.3g}]"
    return f"{100 * value:.1f} % ({value.label})" if isinstance(value, Accuracy) else f"{value:.3f}"
