"""How hard each distance pulls on a text-guided map, against the paper's L2 at the same weight.

    python benchmarks/metric_force.py

Maps of the undefended nano CLIP on attacked training photographs, as TGA-ZSR meets them at its first steps. The ratios are
what `defenses` uses for its "equal force" variants.
"""

import argparse

import torch

from robustvlm_lite import attacks, attention, data
from robustvlm_lite.clip import load_clip
from robustvlm_lite.threat import ThreatModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=256, help="training photographs")
    parser.add_argument("--eps-255", type=float, default=2.0, help="budget of the two attack steps, in 1/255")
    args = parser.parse_args()
    clip, photos, threat = load_clip("nano"), data.load("photos/caltech", "train", n=args.n), ThreatModel(args.eps_255)
    model, x, y = clip.classifier(photos.class_names, photos.templates), photos.pixels(), photos.labels
    x_adv = attacks.pgd(
        attacks.cross_entropy(model, y), x, threat, n_steps=2, step_255=args.eps_255, start="zero", keep="last"
    )
    with torch.no_grad():
        clean, attacked = (attention.text_map(clip.tokens(images), model.text_features[y]) for images in (x, x_adv))
    pull = {}
    for metric in attention.METRICS:
        own = attacked.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(attention.map_distance(own, clean, metric).sum(), own)
        pull[metric] = gradient.norm(dim=1).mean().item()
    print(f"{'distance':10s} {'gradient norm on the map':>25s} {'L2 over it':>12s}   (n = {args.n}, ε = {args.eps_255:g}/255)")
    for metric, value in pull.items():
        print(f"{metric:10s} {value:25.4g} {pull['l2'] / value:12.1f}")


if __name__ == "__main__":
    main()
