"""Gather the cards of a grid: OUT/leaderboard.json for programs, OUT/leaderboard.md to read.

    python workflow/leaderboard.py OUT JOB [JOB ...]
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from robustvlm_lite import runtime
from robustvlm_lite.cards import is_stale, load_card
from robustvlm_lite.records import write_whole
from robustvlm_lite.stats import seed_spread

METRICS = ("clean_acc", "robust_acc", "robust_acc_worst", "robust_acc_8bit")
KEY = ("profile", "backbone", "dataset", "attack", "eps_255", "metric", "n", "method")


def backbone(card: Mapping) -> str:
    """What was defended: the model that was asked for, else that of the chapter's profile; and the weights, where others were given."""
    asked, weights = (card["parameters"].get(name, "") for name in ("model", "pretrained"))
    if not asked:
        sizes = runtime.profile(card["chapter"], card["profile"])
        asked = getattr(sizes, "model", "") or sizes.captioner
    return f"{asked}, {weights}" if weights else asked


def gather(cards: Mapping[str, dict]) -> dict:
    """name -> card to {"cards": [...], "rows": [...]}, best first within a data set, attack, budget and metric.

    A row is the mean over seeds; sd is None for a single one. Rows of different sizes n are never averaged. A cell that
    two cards of one seed measured (a grid over something that does not change it) counts once if both agree, and is
    kept apart by `cards` if they do not.
    """
    found: dict[tuple, dict[int, dict[float, list[str]]]] = {}
    for name, card in cards.items():
        defended = backbone(card)
        for row in card["rows"]:
            if row["metric"] in METRICS:
                place = row | {"profile": card["profile"], "backbone": defended}
                seeds = found.setdefault(tuple(place[k] for k in KEY), {})
                seed = row.get("extra", {}).get("seed", card["seed"])
                seeds.setdefault(seed, {}).setdefault(row["value"], []).append(name)
    rows = [line for key, seeds in found.items() for line in _lines(key, seeds)]
    rows.sort(key=lambda row: (*(row[k] for k in KEY[:-2]), -row["value"], row["method"]))
    listed = [{"name": n, "chapter": c["chapter"], "seed": c["seed"], "stale": is_stale(c)} for n, c in cards.items()]
    return {"cards": listed, "rows": rows}


def _lines(key: tuple, seeds: Mapping[int, Mapping[float, list[str]]]) -> list[dict]:
    place = dict(zip(KEY, key, strict=True))
    if any(len(values) > 1 for values in seeds.values()):
        return [
            place | {"value": value, "sd": None, "seeds": 1, "cards": names}
            for values in seeds.values()
            for value, names in values.items()
        ]
    mean, sd, n_seeds = seed_spread([next(iter(values)) for values in seeds.values()])
    names = sorted({name for values in seeds.values() for names in values.values() for name in names})
    return [place | {"value": mean, "sd": None if math.isnan(sd) else sd, "seeds": n_seeds, "cards": names}]


def markdown(board: Mapping) -> str:
    """The rows as a table; accuracies in percent."""
    head = ("profile", "backbone", "data set", "attack", "ε · 255", "metric", "method", "mean ± sd", "seeds", "n")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in board["rows"]:
        spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.1f}"
        cells = [*(row[k] for k in ("profile", "backbone", "dataset", "attack")), f"{row['eps_255']:g}", row["metric"]]
        cells += [row["method"], f"{100 * row['value']:.1f}{spread}", row["seeds"], row["n"]]
        lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    stale = [card["name"] for card in board["cards"] if card["stale"]]
    told = f"{len(board['cards'])} cards. Made by other code than this: {', '.join(stale) or 'none'}."
    return "\n".join(["# Leaderboard", "", told, "", *lines, ""])


def main(argv: list[str]) -> int:
    out, *names = argv
    board = gather({name: load_card(Path(out) / name) for name in names})
    texts = {"leaderboard.json": json.dumps(board, indent=1, ensure_ascii=False) + "\n", "leaderboard.md": markdown(board)}
    for name, text in texts.items():
        write_whole(Path(out) / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    print(f"{len(board['rows'])} rows of {len(names)} cards in {out}/leaderboard.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
