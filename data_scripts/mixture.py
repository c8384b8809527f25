"""The training stream of the bundled CLIPs: photographs of the packs and rendered scenes, each with a caption and its rivals.

An image is trained against the captions of its own label set (a pack's classes, the 20 superclasses of CIFAR-100, the
domains of PACS, a task of the rendered world): those that occur in the batch and a random share of the others, all
encoded in the same step. Captions of other sets are never negatives, so two names for one thing do not fight, and
captions of held-out pairs are never negatives either.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm_lite import scenes
from robustvlm_lite.data.decoding import decode
from robustvlm_lite.data.packs import read_rows
from robustvlm_lite.runtime import generator, sha256

# Share of the photographs; p, for rare classes are drawn with weight count^-p (1 makes classes even); how often a batch's
# images of the pack are cut and mixed. After 3.6 million images the accuracy on training rows lay above that on held-back
# rows by 2 to 3 points for CIFAR-10 and PACS, 7 for CIFAR-100 and 10 to 17 for the others: these are mixed.
SHARES = {
    "tiny_imagenet": (0.35, 0.0, 0.4),
    "cifar100": (0.18, 0.0, 0.2),
    "cifar10": (0.13, 0.0, 0.0),
    "caltech101": (0.10, 0.75, 0.6),
    "pacs": (0.09, 0.5, 0.0),
    "flowers102": (0.07, 0.5, 0.5),
    "stl10": (0.06, 0.0, 0.6),
    "oxford_pets_3class": (0.02, 0.0, 0.6),
}
TEMPLATES = (
    "a photo of a {}.", "a picture of a {}.", "this is a photo of a {}.", "a {}.", "a photo of a {}",
    "this is a photo of a {}", "a photo of the {}.", "{}",
)  # fmt: skip
KINDS = {"flowers102": ", a type of flower.", "oxford_pets_3class": ", a type of pet."}
DOMAINS = {
    "art_painting": "an art painting of a {}",
    "cartoon": "a cartoon of a {}",
    "photo": "a photo of a {}",
    "sketch": "a sketch of a {}",
}
# How the rendered share is split over what is asked of a scene: shapes are learned last, colors at once.
SCENE_TASKS = {
    "pair": 0.42,
    "shape": 0.26,
    "caption": 0.14,
    "count": 0.06,
    "texture": 0.05,
    "color": 0.04,
    "style": 0.03,
}
SEEN_PAIRS = [i for i, pair in enumerate(scenes.PAIRS) if pair not in scenes.HELD_OUT_PAIRS]


class PackData:
    """One pack decoded to uint8, with its label sets: {set name: (labels [N], captions of class c by template)}."""

    def __init__(self, root: Path, name: str, cache: Path, validation: float = 0.02):
        folder = root / name
        stored = cache / f"{name}.npy"
        _, paths, labels, names, table = read_rows(folder, "train")
        if not stored.exists():
            side = 32 if name.startswith("cifar") else 64
            rows = table["image"].to_pylist()
            images = np.stack([decode(r["bytes"], side, r["path"]) for r in rows]).transpose(0, 3, 1, 2)
            part = cache / f"{name}.part.npy"
            np.save(part, np.ascontiguousarray(images))
            part.replace(stored)
        self.name, self.labels, self.class_names = name, labels, names
        self.images = np.load(stored, mmap_mode="r")
        with open(root / "near_duplicates.csv") as f:
            copies = {r["train_path"] for r in csv.DictReader(f) if r["train_pack"] == name}
        keep = torch.tensor([i for i, p in enumerate(paths) if p not in copies])
        cut = round(len(keep) * validation)  # rows are stratified, so any prefix is balanced
        self.validation, self.train = keep[:cut], keep[cut:]
        count = labels[self.train].bincount(minlength=len(names)).float()
        self.weights = count[labels[self.train]] ** -SHARES[name][1]
        self.sets = {name: (labels, [list(names)])}
        self.others: dict[str, float] = {}
        if name == "cifar100":
            info = json.loads((folder / "classes.json").read_text())
            coarse = torch.tensor(info["coarse_label_of_label"])[labels]
            self.sets["cifar100 superclasses"], self.others = (
                (coarse, [info["superclasses"]]),
                {"cifar100 superclasses": 0.25},
            )
        if name == "pacs":
            domains = list(DOMAINS)
            domain = torch.tensor([domains.index(d) for d in table["domain"].to_pylist()])
            captions = [DOMAINS[d].format(c) for d in domains for c in names]
            self.sets["pacs domains"], self.others = (domain * len(names) + labels, [captions]), {"pacs domains": 0.5}

    def captions(self, set_name: str, classes: list[int], g: torch.Generator) -> list[str]:
        texts = self.sets[set_name][1][0]
        if set_name == "pacs domains":
            return [texts[c] for c in classes]
        picks = torch.randint(0, len(TEMPLATES), (len(classes),), generator=g).tolist()
        kind = KINDS.get(self.name, "")
        result = []
        for c, t in zip(classes, picks, strict=True):
            text = TEMPLATES[t].format(texts[c])
            result.append(text.rstrip(".") + kind if kind and t % 3 == 0 else text)
        return result


def augment(images: Tensor, size: int, g: torch.Generator, chunk: int = 8) -> Tensor:
    """Crops of 35 to 100 % of the area (one box a chunk of images), flips, brightness within 25 %, contrast and color
    within 40 %; to `size` pixels."""
    out = []
    side = images.shape[-1]
    for part in images.split(chunk):
        area, ratio, top, left = torch.rand(4, generator=g).tolist()
        scale, stretch = (0.35 + 0.65 * area) ** 0.5, 0.85 * (1 / 0.85**2) ** ratio
        h, w = (min(side, max(8, round(side * scale * s))) for s in (stretch**0.5, stretch**-0.5))
        y, x = int(top * (side - h + 1)), int(left * (side - w + 1))
        crop = part[..., y : y + h, x : x + w].float()
        out.append(F.interpolate(crop, size=(size, size), mode="bilinear", antialias=h > size or w > size))
    x = torch.cat(out)
    flip = torch.rand(len(x), 1, 1, 1, generator=g) < 0.5
    x = torch.where(flip, x.flip(-1), x) / 255
    for still in (x.mean((1, 2, 3), keepdim=True), x.mean(1, keepdim=True)):
        x = still + (x - still) * (0.6 + 0.8 * torch.rand(len(x), 1, 1, 1, generator=g))
    return brighten(x, g)


def cutmix(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """The images with one box, up to half of the area, from another image of the batch; its index; the share it leaves
    (Yun et al., CutMix, ICCV 2019)."""
    side, other = x.shape[-1], torch.randperm(len(x), generator=g)
    area, top, left = torch.rand(3, generator=g).tolist()
    edge = round(side * (area / 2) ** 0.5)
    y, z = int(top * (side - edge + 1)), int(left * (side - edge + 1))
    x = x.clone()
    x[..., y : y + edge, z : z + edge] = x[other][..., y : y + edge, z : z + edge]
    return x, other, 1 - (edge / side) ** 2


def brighten(x: Tensor, g: torch.Generator) -> Tensor:
    return (x * (0.75 + 0.5 * torch.rand(len(x), 1, 1, 1, generator=g))).clamp(0, 1)


class Mixture:
    """Batches of (images [B, 3, S, S], captions, groups): a group is (image rows, target, caption rows) of one
    label set; its target are indices or, for mixed images, shares [rows, captions]."""

    def __init__(self, root: Path, cache: Path, rendered: float, absent: float = 0.25):
        cache.mkdir(parents=True, exist_ok=True)
        self.packs = [PackData(root, name, cache) for name in SHARES]
        self.rendered, self.absent = rendered, absent
        self.shares = torch.tensor([SHARES[p.name][0] for p in self.packs])
        files = sorted(f for p in self.packs for f in (root / p.name).glob("train-*.parquet"))
        self.data_sha256 = {f"{f.parent.name}/{f.name}": sha256(f) for f in files}
        self.facts = {p.name: {"share": SHARES[p.name][0], "train_images": len(p.train)} for p in self.packs}

    def candidates(
        self, target: Tensor, n_classes: int, g: torch.Generator, pool: list[int] | None = None
    ) -> list[int]:
        """Classes that occur, then a random share of those that do not."""
        present = target.unique().tolist()
        others = [c for c in (pool or range(n_classes)) if c not in set(present)]
        order = torch.randperm(len(others), generator=g)[: round(self.absent * len(others))].tolist()
        return present + [others[i] for i in order]

    def batch(self, size: int, n: int, *key) -> tuple[Tensor, list[str], list[tuple[Tensor, Tensor, Tensor]]]:
        """The batch of `key` (seed, step, rank): the same key gives the same batch, so a resumed run is the same run."""
        g = generator("mixture", *key)
        images, captions, groups, start = [], [], [], 0

        def add(rows: Tensor, target: Tensor, classes: list[int], texts: list[str]) -> None:
            position = {c: k for k, c in enumerate(classes)}
            local = torch.tensor([position[c] for c in target.tolist()])
            groups.append((rows, local, torch.arange(len(captions), len(captions) + len(texts))))
            captions.extend(texts)

        n_rendered = round(n * self.rendered)
        drawn = torch.multinomial(self.shares, n - n_rendered, replacement=True, generator=g).bincount(
            minlength=len(self.packs)
        )
        for pack, count in zip(self.packs, drawn.tolist(), strict=True):
            if not count:
                continue
            index = pack.train[torch.multinomial(pack.weights, count, replacement=True, generator=g)]
            x = augment(torch.from_numpy(pack.images[index.numpy()]), size, g)
            other, share = next(iter(pack.others.items()), ("", 0.0))
            use_other = torch.rand(count, generator=g) < share
            for set_name, chosen in ((pack.name, ~use_other), (other, use_other)):
                if not chosen.any():
                    continue
                target = pack.sets[set_name][0][index[chosen]]
                classes = self.candidates(target, len(pack.sets[set_name][1][0]), g)
                add(start + chosen.nonzero()[:, 0], target, classes, pack.captions(set_name, classes, g))
                if torch.rand((), generator=g) < SHARES[pack.name][2]:
                    x[chosen], other, kept = cutmix(x[chosen], g)
                    rows, local, texts = groups[-1]
                    one = F.one_hot(local, len(texts)).float()
                    groups[-1] = rows, kept * one + (1 - kept) * one[other], texts
            images.append(x)
            start += count
        if n_rendered:
            images.append(self._render(n_rendered, start, size, g, add))
        return torch.cat(images), captions, groups

    def _render(self, n: int, start: int, size: int, g: torch.Generator, add) -> Tensor:
        drawn = scenes.sample(n, g)
        asked = torch.multinomial(torch.tensor(list(SCENE_TASKS.values())), n, replacement=True, generator=g).tolist()
        rows: dict[str, list[int]] = defaultdict(list)
        for i, task in enumerate(asked):
            name = list(SCENE_TASKS)[task]
            several, sketch = int(drawn.count[i]) > 1, int(drawn.style[i]) == 1
            if several:
                name = "count" if name in ("count", "style") else "caption"
            elif sketch:
                name = "style" if name in ("style", "count", "color") else "shape"
            rows[name].append(i)
        for task, where in rows.items():
            index = torch.tensor(where)
            if task == "caption":
                texts = [drawn.captions(i) for i in where]
                texts = [t[-1 - int(torch.randint(0, min(4, len(t)), (1,), generator=g))] for t in texts]
                unique = sorted(set(texts))
                target = torch.tensor([unique.index(t) for t in texts])
                add(start + index, target, list(range(len(unique))), unique)
                continue
            class_names, templates = scenes.TASKS[task]
            target = drawn.labels(task)[index]
            classes = self.candidates(target, len(class_names), g, SEEN_PAIRS if task == "pair" else None)
            if task != "pair":  # few classes: all of them, each time
                classes = list(range(len(class_names)))
            picks = torch.randint(0, len(templates), (len(classes),), generator=g).tolist()
            add(
                start + index,
                target,
                classes,
                [templates[t].format(class_names[c]) for c, t in zip(classes, picks, strict=True)],
            )
        x = (
            F.interpolate(drawn.images.float(), size=(size, size), mode="bilinear", antialias=True)
            if size != 64
            else drawn.images.float()
        )
        return brighten(x / 255, g)
