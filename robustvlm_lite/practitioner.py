"""The practitioner's door: own images and an own checkpoint through the book's harness, into the same card."""

from pathlib import Path

from . import data as datasets
from .attacks import Attack, get_attack
from .attacks.registry import FAMILIES
from .cards import Card
from .data import ImageSet
from .defenses import load_defense
from .evaluate import evaluate
from .records import Store
from .runfolder import CARD, finished, run_folder
from .runner import check_seed
from .runtime import UserError, resolve_device, sha256
from .threat import ThreatModel

DEFAULT_N = 500


def evaluate_own(
    *,
    data: str,
    data_root: str = "",
    model: str = "nano",
    pretrained: str = "",
    defense: str = "none",
    attack: str = "pgd",
    eps_255: float = 1.0,
    n: int | None = None,
    seed: int = 0,
    device: str = "",
    out: str = "runs",
    resume: bool = False,
) -> Path:
    """Accuracy on `data`, clean and under one ℓ∞ attack of `eps_255`/255, as OUT/evaluate/own-<seed>-<hash>/card.json.

    data: a folder (one subfolder a class, or Parquet with classes.json) or a name that `data.names` lists. n: images,
    balanced over classes; None takes all up to 500. attack: as `get_attack` takes it, "pgd" for "pgd-20".

    Raises UserError for anything that cannot be read or does not exist, before anything is written.
    """
    threat, chosen = ThreatModel(eps_255), named_attack(attack)
    check_seed(seed)
    resolve_device(device)
    if n is not None and n < 1:
        raise UserError(f"expected at least one image, got -n {n}; leave it out for up to {DEFAULT_N}")
    from .clip import load_clip

    clip = load_clip(model, pretrained=pretrained, device=device)
    defended = load_defense(defense, clip)
    images = read_images(data, data_root=data_root, size=clip.image_size, n=n, seed=seed)
    classifier = defended.classifier(images.class_names, images.templates)
    parameters = {"data": data, "model": model, "pretrained": pretrained, "defense": defense}
    parameters |= {"attack": chosen.name, "eps_255": threat.eps_255, "n": len(images)}
    hashes = {"weights": clip.weights_sha256, "images": images.sha256}
    hashes |= {"defense file": sha256(Path(defense))} if Path(defense).is_file() else {}
    with run_folder(Path(out) / "evaluate", f"own-{seed}", parameters | hashes, resume=resume) as folder:
        if not finished(folder / CARD):
            card = Card("evaluate", "own", seed, parameters, weights_sha256=clip.weights_sha256, device=device)
            rows = evaluate(
                classifier,
                images,
                [(chosen, threat)],
                method=defended.name,
                seed=seed,
                surface=defended.attack_surface(classifier),
                batch_size=8 if defended.adapts_at_test_time else 64,  # an attacker's views all lie in one graph
                store=Store(folder / "cells"),
            )
            card.add(rows).write(folder)
    return folder / CARD


def named_attack(name: str) -> Attack:
    """The attack of this name; a PGD-like family without a number gets its default into its name, as in "pgd-20"."""
    return get_attack(f"{name}-{FAMILIES[name]}" if name in ("pgd", "cw", "bim", "mifgsm") else name)


def read_images(source: str, *, data_root: str, size: int, n: int | None, seed: int) -> ImageSet:
    """A folder's images, or those of a named set where no such folder exists."""
    by_name = source.split("/")[0] in {name.split("/")[0] for name in datasets.names()} and not Path(source).is_dir()
    if source in datasets.uses():  # decodes no more than is asked: a full set need not fit into memory
        n = min(DEFAULT_N, datasets.find_use(source)[1].splits["test"]["n"]) if n is None else n
        return datasets.load(source, data_root=data_root, size=size, n=n, seed=seed)
    if by_name:
        images = datasets.load(source, data_root=data_root, size=size, seed=seed)
    else:
        images = datasets.from_path(source, size=size)
    return images.balanced(min(DEFAULT_N, len(images)) if n is None else n, seed)
