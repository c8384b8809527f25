"""Train the prompt-tuned defenses whose files ship with the package.

    python data_scripts/train_prompts.py                    every method of CAPT, CBA-FAPT and their rivals (make prompts)
    python data_scripts/train_prompts.py --only CAPT FAP
    python data_scripts/train_prompts.py --search           a rate for each method of both chapters

Sixteen shots of the bundled photographs, budget and length of the `tiny` profiles of chapters 05 and 06. Methods of CAPT's
protocol are learned on the bundled TeCoA, those of CBA-FAPT's on the bundled CLIP itself. No test image is read.

The search tries factors on each paper's rate, the same for all methods: GRID, then on past an end that wins. It tunes as the
chapter does, on training images less a held-back share, and scores on that share. Every trial is kept beside the files, and
trials that stand there are not run again. A method that neither chapter tunes under `tiny` takes FACTOR, unsearched.
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
HELD, SEEDS, ATTACK = 120, (11, 12), "pgd-10"  # seeds of the search's shots and prompts, none of them a chapter's


def tuned(name: str, sizes, shots: data.ImageSet, seed: int, rate: float):
    """(defense, its training budget): a method on these shots at the length and budget of a profile."""
    style, carrier = defenses.PROMPT_METHODS[name].style, defenses.load_defense(sizes.backbone, load_clip(sizes.model)).clip
    eps, options = style.attack(sizes.eps_255)
    attack = partial(attacks.pgd, threat=ThreatModel(eps), **options)
    defense = defenses.build_prompts(name, carrier, shots.class_names)
    training = style.short(shots, **sizes.tuning | {"rate": rate})
    return defense.fit(shots, attack=attack, training=training, seed=seed, progress=False), eps


def searched_methods(chapter: str) -> list[str]:
    """Every method that the chapter tunes under `tiny`."""
    sizes = profile(chapter, "tiny")
    methods = [*sizes.methods, *getattr(sizes, "general", []), *getattr(sizes, "components", []), *ALSO[chapter]]
    return [name for name in dict.fromkeys(methods) if name in defenses.PROMPT_METHODS]


def pools(chapter: str) -> tuple[data.ImageSet, data.ImageSet]:
    """(images that shots may come from, held-back ones): of the training split, where new classes matter its base half."""
    name, n = profile(chapter, "tiny").train[0]
    whole = data.load(name, "train", n=n)
    if chapter == "06_cba_fapt":
        whole = data.base_and_new(whole)[0]
    rest, held = whole.split_off(0.3, 0)
    return rest, held.balanced(min(HELD, len(held)), 0)


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


def search(only: list[str]) -> None:
    """A factor for each method of both chapters, on training images that were held back; no test image is read."""
    path = asset("defenses", "nano-prompts-search.json")
    kept = json.loads(path.read_text()) if path.exists() else {"chapters": {}}
    kept["base_sha256"] = load_clip("nano").weights_sha256
    for chapter in CHAPTERS:
        sizes, (rest, held) = profile(chapter, "tiny"), pools(chapter)
        facts = {"set": rest.name, "pool": len(rest), "held": len(held), "held_sha256": held.sha256, "seeds": list(SEEDS)}
        facts |= {"eps_255": sizes.eps_255, "attack": ATTACK, "steps": sizes.tuning["steps"], "batch": sizes.tuning["batch"]}
        found = kept["chapters"].get(chapter, {"trials": []})
        if any(found.get(key, value) != value for key, value in facts.items()):
            found = {"trials": []}  # of another search
        found = kept["chapters"][chapter] = facts | {"trials": found["trials"]}
        found["untuned"] = _measured(defenses.load_defense(sizes.backbone, load_clip(sizes.model)), held, sizes.eps_255, SEEDS[0])
        _write(path, kept)
        for name in searched_methods(chapter):
            if not only or name in only:
                trial = partial(_trial, found, name, sizes, rest, held, partial(_write, path, kept))
                best = best_rate(trial, partial(rates.scores, found, name))
                print(f"{chapter} {name}: {best:g} of {rates.scores(found, name)}", flush=True)


def _trial(found: dict, name: str, sizes, rest: data.ImageSet, held: data.ImageSet, write: Callable, rate: float) -> None:
    for seed in SEEDS:
        if not any((t["method"], t["rate"], t["seed"]) == (name, rate, seed) for t in found["trials"]):
            defense, _ = tuned(name, sizes, data.few_shot(rest, sizes.shots, seed), seed, rate)
            found["trials"].append({"method": name, "rate": rate, "seed": seed} | _measured(defense, held, sizes.eps_255, seed))
            write()


def _measured(defense, held: data.ImageSet, eps_255: float, seed: int) -> dict[str, float]:
    model, attack = defense.classifier(held.class_names, held.templates), (attacks.get_attack(ATTACK), ThreatModel(eps_255))
    rows = evaluate(model, held, [attack], method=defense.name, seed=seed, surface=defense.attack_surface(model), progress=False)
    return {name: round(row.value, 6) for name, row in zip(("clean", "robust"), rows, strict=False)}


def _write(path: Path, kept: dict) -> None:
    path.write_text(json.dumps(kept, indent=1) + "\n")


def train(name: str, seed: int) -> None:
    chapter = "06_cba_fapt" if name in FAP_PROTOCOL else "05_capt"
    sizes = profile(chapter, "tiny")
    try:
        rate = rates.searched_rate(sizes.model, chapter, name)
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
    parser.add_argument("--only", nargs="*", default=[], help="names of methods; all if left out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.search:
        search(args.only)
        return
    for name in args.only or defenses.PROMPT_METHODS:
        train(name, args.seed)


if __name__ == "__main__":
    main()
