"""Write the committed evaluation subsets: which test rows the attacks see, so that every machine attacks the same images.

    python data_scripts/make_subsets.py --data-root DIR

One list of up to 1,000 rows a pack, classes as equally filled as the split allows; its first 500 rows are the subset for
the costlier attacks. Only row numbers and a hash of the labels are stored. Full-size sets need no list: their subsets are
the same function of labels and seed (`data.subsets.choose_rows`).
"""

import argparse
import json

import torch

from robustvlm_lite.data import PACKS, pack_folder, read_rows
from robustvlm_lite.data.imageset import balanced_rows
from robustvlm_lite.data.subsets import labels_sha256
from robustvlm_lite.runtime import asset

MOST = 1000


def manifest(name: str, labels: torch.Tensor, split: str) -> dict:
    """The entry of one pack for labels [N] of its test split."""
    rows = balanced_rows(labels, min(MOST, len(labels)), 0, name)
    return {"split": split, "labels_sha256": labels_sha256(labels), "rows": rows.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True, metavar="DIR", help="folder that holds cifar10/, pacs/ …")
    root = parser.parse_args().data_root
    entries = {}
    for name, pack in PACKS.items():
        labels = read_rows(pack_folder(name, root), pack.test_split)[2]
        entries[name] = manifest(name, labels, pack.test_split)
        print(f"{name}: {len(entries[name]['rows'])} of {len(labels)} rows")
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    asset("subsets.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
