"""Train the prompt-tuned defenses whose files ship with the package.

    python data_scripts/train_prompts.py                    every method of CAPT, CBA-FAPT and their rivals (make prompts)
    python data_scripts/train_prompts.py --only CAPT FAP

Sixteen shots of the bundled photographs, budget and length of the `tiny` profiles of chapters 05 and 06. Methods of CAPT's
protocol are learned on the bundled TeCoA, those of CBA-FAPT's on the bundled CLIP itself. No test image is read.
"""

import argparse
from functools import partial

import torch

from robustvlm_lite import attacks, data, defenses
from robustvlm_lite.clip import load_clip
from robustvlm_lite.runtime import profile
from robustvlm_lite.threat import ThreatModel

SET, SHOTS = "photos/caltech", 16
# What FAP and CBA-FAPT compare: prompts on an undefended CLIP.
FAP_PROTOCOL = [name for name in defenses.PROMPT_METHODS if name.startswith(("Adv", "FAP", "CBA"))]


def train(name: str, seed: int) -> None:
    method = defenses.PROMPT_METHODS[name]
    sizes = profile("06_cba_fapt" if name in FAP_PROTOCOL else "05_capt", "tiny")
    clip, shots = load_clip(sizes.model), data.load(SET, "train", shots=SHOTS, seed=seed)
    carrier = defenses.load_defense(sizes.backbone, clip).clip
    eps = method.style.attack_eps or sizes.eps_255
    attack = partial(
        attacks.pgd, threat=ThreatModel(eps), n_steps=method.style.attack_steps,
        step_255=method.style.attack_step * eps, keep="last",
    )  # fmt: skip
    training = method.style.short(shots, **sizes.tuning)
    defense = defenses.build_prompts(name, carrier, shots.class_names)
    defense.fit(shots, attack=attack, training=training, seed=seed, progress=False)
    path = defenses.checkpoint(name, clip.name)
    facts = {"data_sha256": [shots.sha256], "seed": seed, "eps_255": eps, "shots": SHOTS}
    facts |= {"collapsed_at": defense.collapsed(len(shots.class_names))}
    defenses.save_prompts(defense, path, backbone=sizes.backbone, **facts)
    print(f"{name}: {path.stat().st_size / 1e3:.0f} kB, last {defense.history[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of methods; all if left out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.only or defenses.PROMPT_METHODS:
        train(name, args.seed)


if __name__ == "__main__":
    main()
