"""Train the prompt-tuned defenses whose files ship with the package.

    python data_scripts/train_prompts.py                    every method of CAPT, CBA-FAPT and their rivals (make prompts)
    python data_scripts/train_prompts.py --only CAPT FAP
    python data_scripts/train_prompts.py --search           a rate for each method of both chapters under tiny
    python data_scripts/train_prompts.py --search --profile small --data-root DIR

Sixteen shots of the bundled photographs, budget and length of the `tiny` profiles of chapters 05 and 06. Methods of CAPT's
protocol are learned on the bundled TeCoA, those of CBA-FAPT's on the bundled CLIP itself. No test image is read.

The search tries factors on each paper's rate, the same for all methods: GRID, then on past an end that wins. It tunes as the
chapter does, on training images less a held-back share, and scores on that share. Every trial is kept beside the files, and
trials that stand there are not run again. A method that neither chapter tunes under `tiny` takes FACTOR, unsearched. The two
chapters can be searched side by side: each has a file for each profile.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from robustvlm_lite import attacks, data, defenses
from robustvlm_lite.clip import load_clip
from robustvlm_lite.defenses import rates
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.runtime import UserError, asset, profile
from robustvlm_lite.threat import ThreatModel

SET, SHOTS = "photos/caltech", 16
# What FAP and CBA-FAPT compare: prompts on an undefended CLIP.
FAP_PROTOCOL = [name for name in defenses.PROMPT_METHODS if name.startswith(("Adv", "FAP", "CBA"))]
CHAPTERS = ("05_capt", "06_cba_fapt")
ALSO = {"05_capt": ["CAPT (own answer)", "CAPT (text only)", "CAPT (image only)"], "06_cba_fapt": []}  # of the ablations

FACTOR = 10.0
GRID, ENDS = (3.0, 10.0, 30.0), (1.0, 3000.0)
NEXT = {3.0: 1.0, 30.0: 100.0, 100.0: 300.0, 300.0: 1000.0, 1000.0: 3000.0}  # past an end of what was tried
ATTACK = "pgd-10"
# Share of the training images that is held back, at most n of them scored on; seeds of shots and prompts, none of them a chapter's.
SEARCHES = {"tiny": {"share": 0.3, "n": 120, "seeds": (11, 12)}, "small": {"share": 0.05, "n": 300, "seeds": (11,)}}


def tuned(name: str, sizes, shots: data.ImageSet, seed: int, rate: float):
    """(defense, its training budget): a method on these shots at the length and budget of a profile."""
    style, carrier = defenses.PROMPT_METHODS[name].style, defenses.load_defense(sizes.backbone, load_clip(sizes.model)).clip
    eps, options = style.attack(sizes.eps_255)
    attack = partial(attacks.pgd, threat=ThreatModel(eps), **options)
    defense = defenses.build_prompts(name, carrier, shots.class_names)
    training = style.short(shots, **sizes.tuning | {"rate": rate})
    return defense.fit(shots, attack=attack, training=training, seed=seed, progress=False), eps


def searched_methods(chapter: str, name: str) -> list[str]:
    """Every method that the chapter tunes under the profile `name`."""
    sizes = profile(chapter, name)
    methods = [*sizes.methods, *getattr(sizes, "general", []), *getattr(sizes, "components", []), *ALSO[chapter]]
    return [name for name in dict.fromkeys(methods) if name in defenses.PROMPT_METHODS]


def pools(chapter: str, name: str, data_root: str) -> tuple[data.ImageSet, data.ImageSet]:
    """(images that shots may come from, held-back ones): of the first training set, where new classes matter its base half."""
    (images, n), asked = profile(chapter, name).train[0], SEARCHES[name]
    whole = data.load(images, "train", n=n, data_root=data_root)
    if chapter == "06_cba_fapt":
        whole = data.base_and_new(whole)[0]
    rest, held = whole.split_off(asked["share"], 0)
    return rest, held.balanced(min(asked["n"], len(held)), 0)


def best_rate(trial: Callable[[float], dict], seeds_done: Callable[[], dict]) -> float:
    """Tries GRID, then the next factor past whichever end wins; `trial` records, `seeds_done` gives the scores so far."""
    waiting = list(GRID)
    while waiting:
        for rate in waiting:
            trial(rate)
        best = rates.winner(seeds_done())
        tried = sorted(seeds_done())
        at_end = best in (tried[0], tried[-1]) and best not in ENDS
        waiting = [NEXT[best]] if at_end else []
    return best


def search(chapter: str, name: str, only: list[str], data_root: str) -> None:
    """A factor for each method of a chapter under the profile `name`, on training images that were held back; no test image is read."""
    sizes, (rest, held), seeds = profile(chapter, name), pools(chapter, name, data_root), SEARCHES[name]["seeds"]
    path = asset("defenses", f"{sizes.model}-{chapter}-{name}-search.json")
    facts = {"base_sha256": load_clip(sizes.model).weights_sha256, "set": rest.name, "pool": len(rest), "held": len(held)}
    facts |= {"held_sha256": held.sha256, "seeds": list(seeds), "eps_255": sizes.eps_255, "attack": ATTACK}
    facts |= {"steps": sizes.tuning["steps"], "batch": sizes.tuning["batch"]}
    found = rates.rate_search(sizes.model, f"{chapter}-{name}")
    if any(found.get(key, value) != value for key, value in facts.items()):
        found = {"trials": []}  # of another search
    found = facts | {"trials": found["trials"]}
    found["untuned"] = _measured(defenses.load_defense(sizes.backbone, load_clip(sizes.model)), held, sizes.eps_255, seeds[0])
    _write(path, found)
    for method in searched_methods(chapter, name):
        if not only or method in only:
            trial = partial(_trial, path, found, method, sizes, rest, held)
            best = best_rate(trial, partial(rates.scores, found, method))
            print(f"{chapter} {method}: {best:g} of {rates.scores(found, method)}", flush=True)


def _trial(path: Path, found: dict, method: str, sizes, rest: data.ImageSet, held: data.ImageSet, rate: float) -> None:
    for seed in found["seeds"]:
        if not any((t["method"], t["rate"], t["seed"]) == (method, rate, seed) for t in found["trials"]):
            defense, _ = tuned(method, sizes, data.few_shot(rest, sizes.shots, seed), seed, rate)
            found["trials"].append({"method": method, "rate": rate, "seed": seed} | _measured(defense, held, sizes.eps_255, seed))
            _write(path, found)


def _measured(defense, held: data.ImageSet, eps_255: float, seed: int) -> dict[str, float]:
    model, attack = defense.classifier(held.class_names, held.templates), (attacks.get_attack(ATTACK), ThreatModel(eps_255))
    rows = evaluate(model, held, [attack], method=defense.name, seed=seed, surface=defense.attack_surface(model), progress=False)
    return {name: round(row.value, 6) for name, row in zip(("clean", "robust"), rows, strict=False)}


def _write(path: Path, found: dict) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def train(name: str, seed: int) -> None:
    chapter = "06_cba_fapt" if name in FAP_PROTOCOL else "05_capt"
    sizes = profile(chapter, "tiny")
    try:
        rate = rates.searched_rate(sizes.model, f"{chapter}-tiny", name)
    except UserError:
        rate = FACTOR
    shots = data.load(SET, "train", shots=SHOTS, seed=seed)
    defense, eps = tuned(name, sizes, shots, seed, rate)
    path = defenses.checkpoint(name, sizes.model)
    facts = {"data_sha256": [shots.sha256], "seed": seed, "eps_255": eps, "shots": SHOTS, "rate": rate}
    facts |= {"collapsed_at": defense.collapsed(len(shots.class_names))}
    defenses.save_prompts(defense, path, backbone=sizes.backbone, **facts)
    print(f"{name}, rate {rate:g}: {path.stat().st_size / 1e3:.0f} kB, last {defense.history[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="try learning rates instead of training")
    parser.add_argument("--profile", choices=SEARCHES, default="tiny", help="of the search: length, budget and data set")
    parser.add_argument("--chapter", choices=CHAPTERS, nargs="*", default=CHAPTERS, help="of the search; both if left out")
    parser.add_argument("--data-root", default="", help="folder of the image packs, which `small` tunes on")
    parser.add_argument("--only", nargs="*", default=[], help="names of methods; all if left out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.search:
        for chapter in args.chapter:
            search(chapter, args.profile, args.only, args.data_root)
        return
    for name in args.only or defenses.PROMPT_METHODS:
        train(name, args.seed)


if __name__ == "__main__":
    main()
