"""Train the prompt-tuned defenses whose files ship with the package.

    python data_scripts/train_prompts.py                    every method of CAPT, CBA-FAPT and their rivals (make prompts)
    python data_scripts/train_prompts.py --only CAPT FAP
    python data_scripts/train_prompts.py --search           rates for the profiles, tried on held-back training images

Sixteen shots of the bundled photographs, budget and length of the `tiny` profiles of chapters 05 and 06. Methods of CAPT's
protocol are learned on the bundled TeCoA, those of CBA-FAPT's on the bundled CLIP itself. No test image is read.
"""

import argparse
from functools import partial

import torch

from robustvlm_lite import attacks, data, defenses
from robustvlm_lite.clip import load_clip
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.runtime import profile
from robustvlm_lite.threat import ThreatModel

SET, SHOTS = "photos/caltech", 16
# What FAP and CBA-FAPT compare: prompts on an undefended CLIP.
FAP_PROTOCOL = [name for name in defenses.PROMPT_METHODS if name.startswith(("Adv", "FAP", "CBA"))]

RATES = (1.0, 3.0, 10.0, 30.0)
SEARCHED = {"05_capt": "CAPT", "06_cba_fapt": "CBA-FAPT (no maps)"}  # the method that sets the factor of its chapter


def tuned(name: str, sizes, shots: data.ImageSet, seed: int, **changed):
    """(defense, its training budget): a method on these shots at the length and budget of a profile."""
    style, carrier = defenses.PROMPT_METHODS[name].style, defenses.load_defense(sizes.backbone, load_clip(sizes.model)).clip
    eps, options = style.attack(sizes.eps_255)
    attack = partial(attacks.pgd, threat=ThreatModel(eps), **options)
    defense = defenses.build_prompts(name, carrier, shots.class_names)
    defense.fit(shots, attack=attack, training=style.short(shots, **sizes.tuning | changed), seed=seed, progress=False)
    return defense, eps


def search(seed: int) -> None:
    """Clean and PGD-10 accuracy of each factor on training images that were held back; no test image is read."""
    for chapter, name in SEARCHED.items():
        sizes = profile(chapter, "tiny")
        rest, held = data.load(sizes.train[0][0], "train", n=sizes.train[0][1]).split_off(0.3, seed)
        held = held.balanced(min(120, len(held)), seed)
        for rate in RATES:
            defense, eps = tuned(name, sizes, data.few_shot(rest, sizes.shots, seed), seed, rate=rate)
            model, attack = defense.classifier(held.class_names), (attacks.get_attack("pgd-10"), ThreatModel(eps))
            surface = defense.attack_surface(model)
            rows = evaluate(model, held, [attack], method=name, seed=seed, surface=surface, progress=False)
            print(f"{chapter} {name}, rate {rate:g}: clean {rows[0].value:.3f}, robust {rows[1].value:.3f}, n = {len(held)}", flush=True)


def train(name: str, seed: int) -> None:
    sizes = profile("06_cba_fapt" if name in FAP_PROTOCOL else "05_capt", "tiny")
    shots = data.load(SET, "train", shots=SHOTS, seed=seed)
    defense, eps = tuned(name, sizes, shots, seed)
    path = defenses.checkpoint(name, sizes.model)
    facts = {"data_sha256": [shots.sha256], "seed": seed, "eps_255": eps, "shots": SHOTS}
    facts |= {"collapsed_at": defense.collapsed(len(shots.class_names))}
    defenses.save_prompts(defense, path, backbone=sizes.backbone, **facts)
    print(f"{name}: {path.stat().st_size / 1e3:.0f} kB, last {defense.history[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="try learning rates instead of training")
    parser.add_argument("--only", nargs="*", default=[], help="names of methods; all if left out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.search:
        search(args.seed)
        return
    for name in args.only or defenses.PROMPT_METHODS:
        train(name, args.seed)


if __name__ == "__main__":
    main()
