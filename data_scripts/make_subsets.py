"""Write the committed evaluation subsets: which test rows the attacks see, so that every machine attacks the same images.

    python data_scripts/make_subsets.py --data-root DIR

One list of up to 1,000 rows a data set, classes as equally filled as the split allows; its first 500 rows are the subset
for the costlier attacks. Only row numbers and a hash of the labels are stored. A data set that DIR lacks keeps the list it
has; without one, its subset is the same function of labels and seed (`data.subsets.choose_rows`), only not held to them.
"""

import argparse
import json

import torch

from robustvlm_lite.data import PACKS, find_use, pack_folder, read_rows, uses
from robustvlm_lite.data.imageset import balanced_rows
from robustvlm_lite.data.sources import read_listing
from robustvlm_lite.data.subsets import labels_sha256, manifests
from robustvlm_lite.runtime import UserError, asset

MOST = 1000


def manifest(name: str, labels: torch.Tensor, split: str) -> dict:
    """The entry of one data set for labels [N] of its test split."""
    rows = balanced_rows(labels, min(MOST, len(labels)), 0, name)
    return {"split": split, "labels_sha256": labels_sha256(labels), "rows": rows.tolist()}


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
    entries = {}
    for name in (*PACKS, *uses()):
        try:
            entries[name] = manifest(name, *labels_of(name, root))
            print(f"{name}: {len(entries[name]['rows'])} rows")
        except UserError as error:
            if name in manifests():
                entries[name] = manifests()[name]
            print(f"{name}: left as it was: {error}")
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    asset("subsets.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
