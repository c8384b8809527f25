"""Write the lists by which `robustvlm data prepare small/NAME` makes a pack again: split, path, label and mean color of each row.

    python data_scripts/make_pack_lists.py --data-root DIR

The order of the rows is the pack's, since the committed evaluation subsets count them. No image is kept.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from robustvlm_lite.data import PACKS, pack_folder
from robustvlm_lite.data.rebuild import FORMS, mean_color
from robustvlm_lite.runtime import asset

FACTS = (b"huggingface", b"class_names", b"source")


def listing(folder: Path, splits: tuple[str, ...]) -> pa.Table:
    """Every row of a pack without its image; classes.json and the source's commit stand in the metadata."""
    parts = []
    for split in splits:
        table = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob(f"{split}-*.parquet"))])
        images = table["image"].to_pylist()
        means = [mean_color(image["bytes"]) for image in tqdm(images, desc=f"{folder.name} {split}", disable=None)]
        known = {"split": [split] * len(images), "path": [image["path"] for image in images]}
        known |= {"mean": pa.array(means, pa.list_(pa.uint8(), 3))}
        parts.append(pa.table(known | {c: table[c] for c in table.column_names if c != "image"}))
        facts = {key: table.schema.metadata[key] for key in FACTS}
    return pa.concat_tables(parts).replace_schema_metadata(facts | {b"classes": (folder / "classes.json").read_bytes()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True, metavar="DIR", help="folder that holds cifar10/, pacs/ …")
    root = parser.parse_args().data_root
    for short in FORMS:
        rows = listing(pack_folder(f"small/{short}", root), ("train", PACKS[f"small/{short}"].test_split))
        words = [c for c in rows.column_names if c in ("split", "wnid", "domain", "caption")]
        pq.write_table(rows, asset("packs", f"{short}.parquet"), compression="zstd", compression_level=22, use_dictionary=words)
        print(f"small/{short}: {len(rows)} rows of {rows.schema.metadata[b'source'].decode()}")


if __name__ == "__main__":
    main()
