"""Cut the photographs that ship with the package out of the image packs.

    python data_scripts/make_photos.py --data-root DIR

photos/caltech: the 25 best-filled classes of Caltech101 (CC BY 4.0), 20 test and up to 60 training images a class, stored
bytes untouched; training images with a near copy in a test split are left out. photos/web: the images of the NIPS 2017
set (each CC BY 2.0) whose class is one of Tiny-ImageNet's 200, resized to 64 pixels, with their attribution.csv.
"""

import argparse
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

OUT = Path(__file__).resolve().parents[1] / "robustvlm_lite" / "assets" / "photos"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CALTECH_CLASSES, PER_CLASS, SIDE = 25, 60, 64


def read(root: Path, pack: str, split: str) -> list[dict]:
    files = sorted((root / pack).glob(f"{split}-*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files]).to_pylist()


def write(folder: Path, split: str, rows: list[tuple[dict, int]], class_names: list[str], note: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {"image": pa.array([r for r, _ in rows], IMAGE), "label": pa.array([y for _, y in rows], pa.int64())}
    )
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", compression="zstd")
    (folder / "classes.json").write_text(json.dumps({"names": class_names, "note": note}, indent=1) + "\n")
    print(f"{folder.name}/{split}: {len(rows)} images, {len(class_names)} classes")


def caltech(root: Path) -> None:
    names = json.loads((root / "caltech101" / "classes.json").read_text())["names"]
    with open(root / "near_duplicates.csv") as f:
        copies = {r["train_path"] for r in csv.DictReader(f) if r["train_pack"] == "caltech101"}
    train, test = read(root, "caltech101", "train"), read(root, "caltech101", "test")
    filled = sorted(range(len(names)), key=lambda c: (-sum(r["label"] == c for r in train), names[c]))
    chosen = sorted(filled[:CALTECH_CLASSES], key=lambda c: names[c])
    for split, rows, most in (
        ("train", [r for r in train if r["image"]["path"] not in copies], PER_CLASS),
        ("test", test, 20),
    ):
        kept = [(r["image"], new) for new, c in enumerate(chosen) for r in [r for r in rows if r["label"] == c][:most]]
        write(
            OUT / "caltech", split, kept, [names[c] for c in chosen], "Caltech101 by CaltechDATA, CC BY 4.0; 64 pixels"
        )


def web(root: Path) -> None:
    tiny = json.loads((root / "tiny_imagenet" / "classes.json").read_text())
    name_of = dict(zip(tiny["wnid"], tiny["names"], strict=True))
    rows = [r for r in read(root, "imagenet_compatible_nips2017", "test") if r["wnid"] in name_of]
    wnids = sorted({r["wnid"] for r in rows})
    kept = []
    for r in rows:
        small = io.BytesIO()
        Image.open(io.BytesIO(r["image"]["bytes"])).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(
            small, "WEBP", quality=90
        )
        kept.append(({"bytes": small.getvalue(), "path": r["image"]["path"]}, wnids.index(r["wnid"])))
    write(
        OUT / "web", "test", kept, [name_of[w] for w in wnids], "NIPS 2017 images, each CC BY 2.0, see attribution.csv"
    )
    wanted = {Path(r["image"]["path"]).stem for r in rows}
    with open(root / "imagenet_compatible_nips2017" / "attribution.csv") as f:
        lines = list(csv.DictReader(f))
    credits = [line for line in lines if line["image_id"] in wanted]
    if len(credits) != len(wanted):
        raise SystemExit(f"expected a credit line for each of {len(wanted)} images, found {len(credits)}")
    with open(OUT / "web" / "attribution.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(credits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root", type=Path, required=True, help="folder that holds caltech101/, tiny_imagenet/, …"
    )
    root = parser.parse_args().data_root
    caltech(root)
    web(root)


if __name__ == "__main__":
    main()
