"""Write the committed evaluation subsets and few-shot lists: which test rows the attacks see, which training rows are shots.

    python data_scripts/make_subsets.py --data-root DIR

One list of up to 1,000 rows a data set, classes as equally filled as the split allows; its first 500 rows are the subset
for the costlier attacks. Only row numbers and a hash of the labels are stored. A data set that DIR lacks keeps the list it
has; without one, its subset is the same function of labels and seed (`data.subsets.choose_rows`), only not held to them.

The few-shot lists of the packs (`few_shot.json`) hold 16 shots a class for each seed, or as many as the rarest class has; of each
class the first 8 are its 8 shots, and so on down. They are what `data.few_shot_rows` draws, and a test holds it to them.
"""

import argparse
import contextlib
import json

import torch

from robustvlm_lite.data import PACKS, find_use, pack_folder, read_rows, uses
from robustvlm_lite.data.imageset import balanced_rows
from robustvlm_lite.data.sources import read_listing
from robustvlm_lite.data.subsets import FEW_SHOT_SEEDS, SHOTS, few_shot_rows, labels_sha256, manifests
from robustvlm_lite.runtime import UserError, asset

MOST = 1000


def manifest(name: str, labels: torch.Tensor, split: str) -> dict:
    """The entry of one data set for labels [N] of its test split."""
    rows = balanced_rows(labels, min(MOST, len(labels)), 0, name)
    return {"split": split, "labels_sha256": labels_sha256(labels), "rows": rows.tolist()}


def few_shot_lists(name: str, labels: torch.Tensor) -> dict:
    """The most shots that every class of labels [N] of a training split can give, up to the papers' most, and their rows by seed."""
    shots = max(k for k in SHOTS if k <= labels.bincount().min())
    rows = {seed: few_shot_rows(labels, shots, seed, name).tolist() for seed in FEW_SHOT_SEEDS}
    return {"labels_sha256": labels_sha256(labels), "shots": shots, "rows": rows}


def write_lists(file: str, entries: dict[str, dict]) -> None:
    """One data set a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    asset(file).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def labels_of(name: str, root: str) -> tuple[torch.Tensor, str]:
    """(labels [N], name of the split as it is stored) of a pack or a full-size set."""
    if name in PACKS:
        split = PACKS[name].test_split
        return read_rows(pack_folder(name, root), split)[2], split
    return read_listing(*find_use(name), "test", root).labels, "test"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True, metavar="DIR", help="folder that holds cifar10/, pacs/ …, full/")
    root = parser.parse_args(argv).data_root
    tests, shots = {}, json.loads(asset("few_shot.json").read_text()) if asset("few_shot.json").exists() else {}
    for name in (*PACKS, *uses()):
        try:
            tests[name] = manifest(name, *labels_of(name, root))
            print(f"{name}: {len(tests[name]['rows'])} rows")
        except UserError as error:
            if name in manifests():
                tests[name] = manifests()[name]
            print(f"{name}: left as it was: {error}")
    for name in PACKS:
        with contextlib.suppress(UserError):  # not here, or a set without a training split
            shots[name] = few_shot_lists(name, read_rows(pack_folder(name, root), "train")[2])
    write_lists("subsets.json", tests)
    write_lists("few_shot.json", shots)


if __name__ == "__main__":
    main()
