"""Measure a pre-trained CLIP and install it: weights, and a card beside them.

    python data_scripts/clip_card.py --model nano --work DIR --data-root DIR

Reads what `pretrain_clip.py` left in DIR; writes robustvlm_lite/assets/clip/<model>.{safetensors,card.json}. The card
holds the recipe, data hashes and training curve, zero-shot accuracy with 95 % Wilson intervals on every whole test
split, and the overlap of text-guided maps with exact object masks against a center prior.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from robustvlm_lite import attention, data
from robustvlm_lite.clip import ZeroShotCLIP, load_clip
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.runtime import asset, sha256


def zero_shot(clip: ZeroShotCLIP, data_root: str) -> dict[str, dict]:
    """Accuracy of every small dataset's whole test split (rendered tasks: 1,000 scenes), templates averaged."""
    result = {}
    for name in sorted(set(data.names()) - set(data.uses()), key=data.names().index):  # full-size sets are fetched by hand
        images = data.load(name, data_root=data_root, size=clip.image_size)
        row = evaluate(
            clip.classifier(images.class_names, images.templates),
            images,
            [],
            method=clip.name,
            batch_size=250,
            progress=False,
        )[0]
        result[name] = {"classes": len(images.class_names), "n": row.n, "accuracy": round(row.value, 4)}
        result[name]["ci95"] = [round(v, 4) for v in row.ci95]
        print(f"{name:28s} {100 * row.value:5.1f} %  [{100 * row.ci95[0]:.1f}, {100 * row.ci95[1]:.1f}]  n = {row.n}")
    return result


@torch.no_grad()
def map_overlap(clip: ZeroShotCLIP, n: int = 512) -> dict[str, float]:
    """Mean overlap with the object mask, on scenes of one object, each map guided by the scene's own caption."""
    scenes = data.load("scenes/pair", n=n, seed=1)
    x, text = scenes.pixels(), clip.text_features(scenes.class_names, scenes.templates)
    own, mean = text[scenes.labels], text.mean(0)
    tokens = clip.tokens(x)
    maps = {"center prior": attention.center_prior(clip.grid, n)}
    maps |= {f"token_norm {norm}": attention.text_map(tokens, own, norm) for norm in attention.TOKEN_NORMS}
    maps |= attention.named_maps(clip, x, own, mean)
    overlap = {name: round(attention.map_iou(m, scenes.masks).mean().item(), 4) for name, m in maps.items()}
    for name, value in overlap.items():
        print(f"{name:32s} {value:.3f}")
    return overlap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--work", type=Path, required=True, help="folder that pretrain_clip.py wrote")
    parser.add_argument("--data-root", required=True, help="folder that holds cifar10/, tiny_imagenet/, …")
    args = parser.parse_args()
    source, target = args.work / f"{args.model}.safetensors", asset("clip", f"{args.model}.safetensors")
    made = json.loads((args.work / "recipe.json").read_text())
    if sha256(source) != made["weights_sha256"]:
        raise SystemExit(
            f"expected the weights that {args.work}/recipe.json describes, got others; run pretrain_clip.py to its end"
        )
    shutil.copyfile(source, target)
    card = target.with_suffix(".card.json")
    card.write_text(json.dumps(made, indent=1) + "\n")  # load_clip checks the sum that stands in it
    clip = load_clip(args.model)
    made |= {"parameters": sum(p.numel() for p in clip.model.parameters()), "bytes": target.stat().st_size}
    made |= {"zero_shot": zero_shot(clip, args.data_root), "map_overlap": map_overlap(clip)}
    card.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
