"""Train the defenses whose checkpoints ship with the package, after choosing their hyper-parameters.

    python data_scripts/train_defenses.py --search          choose on a validation share of the training images
    python data_scripts/train_defenses.py                   train every method and ablation (make checkpoints)
    python data_scripts/train_defenses.py --only TeCoA FARE

Data, attack and sizes are those of the `tiny` profile of chapter 04. --search writes assets/defenses/<model>-search.json with
every run it made; the chosen values stand in assets/profiles.yml. No test image is read.
"""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from statistics import median

import torch

from robustvlm_lite import attacks, data, defenses
from robustvlm_lite.clip import load_clip
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.runtime import asset, profile
from robustvlm_lite.threat import ThreatModel

SHARE = 0.2  # of the training images, held back while searching
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
ALPHAS, BETAS = (0.0, 0.02, 0.08), (0.0, 0.01, 0.05)


def setting(seed: int):
    sizes = profile("04_tga_zsr", "tiny")
    sets = [data.load(name, "train", n=n, seed=seed) for name, n in sizes.train]
    threat = ThreatModel(sizes.eps_train)
    attack = partial(attacks.pgd, threat=threat, n_steps=2, step_255=threat.eps_255, keep="last")
    return sizes, load_clip(sizes.model), sets, attack, defenses.Training(**sizes.training)


def score(defense, sets, seed: int, n: int = 300) -> dict[str, float]:
    """Clean and PGD-20 accuracy at 2/255 on held-back training images, averaged over the sets."""
    out = {"clean": 0.0, "robust": 0.0}
    for images in sets:
        images = images.take(range(min(n, len(images))))
        model = defense.classifier(images.class_names, images.templates)
        attack = [(attacks.get_attack("pgd-20"), ThreatModel(2.0))]
        rows = evaluate(
            model, images, attack, method=defense.name, seed=seed, surface=defense.attack_surface(model), progress=False
        )
        out["clean"] += rows[0].value / len(sets)
        out["robust"] += rows[1].value / len(sets)
    return {k: round(v, 4) for k, v in out.items()}


def search(seed: int) -> None:
    _, clip, sets, attack, training = setting(seed)
    rest, held_back = zip(*[s.split_off(SHARE, seed) for s in sets], strict=True)
    path = asset("defenses", f"{clip.name}-search.json")
    before = json.loads(path.read_text()) if path.exists() else {}
    runs = before["runs"] if before.get("base_sha256") == clip.weights_sha256 else []

    def run(name: str, training, **weights) -> None:
        wanted = {"method": name, "lr": training.lr, **weights}
        if any(wanted.items() <= r.items() for r in runs):
            return  # done before the script was stopped
        defense = defenses.build(name, clip, **weights)
        defense.fit(list(rest), attack=attack, training=training, seed=seed, progress=False)
        cost = {"seconds_per_step": round(median(defense.step_seconds), 4)}
        runs.append(wanted | score(defense, held_back, seed) | cost)
        print(json.dumps(runs[-1]), flush=True)
        path.parent.mkdir(exist_ok=True)
        n = sum(min(300, len(h)) for h in held_back)
        tried = {"base_sha256": clip.weights_sha256, "seed": seed, "n": n, "eps_255": 2.0, "runs": runs}
        path.write_text(json.dumps(tried, indent=1) + "\n")

    for name in ("TeCoA", "FARE", "FT-clean"):
        for lr in LEARNING_RATES:
            run(name, replace(training, lr=lr))
    best = max((r for r in runs if r["method"] == "TeCoA"), key=lambda r: r["clean"] + r["robust"])
    for alpha in ALPHAS:
        for beta in BETAS:
            run("TGA-ZSR", replace(training, lr=best["lr"]), alpha=alpha, beta=beta)


def train(seed: int, only: list[str]) -> None:
    sizes, clip, sets, attack, training = setting(seed)
    for name in only or defenses.METHODS:
        defense = defenses.build(name, clip, **sizes.tga)
        defense.fit(sets, attack=attack, training=training, seed=seed, progress=False)
        facts = {
            "training": {**asdict(training), "precision": str(training.precision)},
            "seed": seed,
            "eps_255": sizes.eps_train,
            "data_sha256": [s.sha256 for s in sets],
        }
        facts |= {"config": asdict(defense.config)} if hasattr(defense, "config") else {}
        facts |= {
            "seconds_per_step": round(median(defense.step_seconds), 4),
            "last_losses": {k: round(v, 4) for k, v in defense.history[-1].items()},
        }
        path = defenses.checkpoint(name, clip.name)
        defenses.save_change(defense, clip, path, **facts)
        print(f"{name}: {median(defense.step_seconds):.2f} s a step, {path.stat().st_size / 1e6:.2f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="choose hyper-parameters instead of training")
    parser.add_argument("--only", nargs="*", default=[], help="names of methods; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    search(args.seed) if args.search else train(args.seed, args.only)


if __name__ == "__main__":
    main()
