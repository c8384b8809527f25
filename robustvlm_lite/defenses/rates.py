"""Factors on the papers' learning rates for short tunings, searched on held-back training images (`train_prompts.py --search`).

A search belongs to one protocol, a chapter under one profile ("05_capt-tiny"), and keeps every trial: what it was measured on,
and "trials" of (method, rate, seed, clean, robust). A factor's score is the mean of clean and attacked accuracy, over the
seeds; the best wins, of equal ones the smallest.
"""

import json
from collections.abc import Mapping

from ..runtime import UserError, asset, near_miss

SEARCHED = "searched"  # what a profile says in place of one factor for all


def rate_search(base: str, protocol: str) -> dict:
    """Every factor that was tried for the prompts on a bundled CLIP in one protocol. Without a search there are no trials."""
    path = asset("defenses", f"{base}-{protocol}-search.json")
    return json.loads(path.read_text()) if path.exists() else {"trials": []}


def scores(found: Mapping, method: str) -> dict[float, dict[str, float]]:
    """factor -> clean, robust and score, means over the seeds, of one method in one search; by growing factor."""
    by_rate: dict[float, list] = {}
    for trial in found["trials"]:
        if trial["method"] == method:
            by_rate.setdefault(trial["rate"], []).append((trial["clean"], trial["robust"]))
    means = {rate: [sum(v) / len(pairs) for v in zip(*pairs, strict=True)] for rate, pairs in sorted(by_rate.items())}
    return {rate: {"clean": c, "robust": r, "score": round((c + r) / 2, 9)} for rate, (c, r) in means.items()}


def winner(scored: Mapping[float, Mapping[str, float]]) -> float:
    """The factor of the best score, of equal ones the smallest."""
    return min(scored, key=lambda rate: (-scored[rate]["score"], rate))


def searched_rate(base: str, protocol: str, method: str) -> float:
    """The factor of a method in a protocol. Raises UserError if none was searched."""
    found = rate_search(base, protocol)
    known = list(dict.fromkeys(trial["method"] for trial in found["trials"]))
    if method not in known:
        raise UserError(
            f"no learning rate was searched for {method!r} in {protocol}; {near_miss(method, known)}, or give tuning a number as rate"
        )
    return winner(scores(found, method))
