"""Data sets of a few flat images on disk, in the layouts of the originals: what is red tells the class.

Each function writes below a folder and returns {class key of the layout: red level}.
"""

import io
import json
import pickle
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

from robustvlm_lite.data import registry

LEVELS = (40, 120, 200)


def flat(red: int, side: int = 8) -> bytes:
    """A PNG of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(members, links=()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def zipped(members, mode=0o100644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def put(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def class_folders(folder: Path, keys, name="{i}.jpg", each=2) -> dict[str, int]:
    for c, key in enumerate(keys):
        for i in range(1, each + 1):
            put(folder / key / name.format(c=c + 1, i=i, key=key), flat(LEVELS[c]))
    return dict(zip(keys, LEVELS, strict=False))


def _batch(n: int) -> bytes:
    rows = [np.concatenate([np.full(1024, LEVELS[i % 3]), np.zeros(2048)]) for i in range(n)]
    return pickle.dumps({"data": np.array(rows, dtype=np.uint8), "labels": [i % 3 for i in range(n)]})


def cifar10(root, monkeypatch):
    from hashlib import md5

    from torchvision.datasets import CIFAR10

    keys = ["cat", "dog", "frog"]
    meta, batch = pickle.dumps({"label_names": keys}), _batch(6)
    put(root / "cifar-10-batches-py/batches.meta", meta)
    put(root / "cifar-10-batches-py/test_batch", batch)
    put(root / "cifar-10-batches-py/data_batch_1", batch)
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(meta).hexdigest()})
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(batch).hexdigest()]])
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5(batch).hexdigest()]])
    return dict(zip(keys, LEVELS, strict=True))


def stl10(root, monkeypatch):
    from torchvision.datasets import STL10

    images = np.zeros((6, 3, 96, 96), dtype=np.uint8)
    images[:, 0] = np.array(LEVELS * 2).reshape(6, 1, 1)
    for part in ("train", "test"):
        put(root / f"stl10_binary/{part}_X.bin", images.tobytes())
        put(root / f"stl10_binary/{part}_y.bin", bytes([1, 2, 3] * 2))
    put(root / "stl10_binary/class_names.txt", "cat\ndog\nhorse\n")
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    return {"cat": LEVELS[0], "dog": LEVELS[1], "horse": LEVELS[2]}


def food101(root, monkeypatch):
    keys = ["apple_pie", "hot_dog", "sushi"]
    for split in ("train", "test"):
        put(root / f"food-101/meta/{split}.json", json.dumps({k: [f"{k}/1", f"{k}/2"] for k in keys[::-1]}))
    return class_folders(root / "food-101/images", keys)


def oxford_pets(root, monkeypatch):
    keys, lines = ("Abyssinian", "american_bulldog", "Bengal"), []
    for c, key in enumerate(keys):
        for i in (1, 2):
            put(root / f"oxford-iiit-pet/images/{key}_{i}.jpg", flat(LEVELS[c]))
            lines.append(f"{key}_{i} {c + 1} 1 1\n")
    for split in ("trainval", "test"):
        put(root / f"oxford-iiit-pet/annotations/{split}.txt", "".join(lines[::-1]))
    return dict(zip(("abyssinian", "american bulldog", "bengal"), LEVELS, strict=True))


def flowers102(root, monkeypatch):
    from torchvision.datasets import Flowers102

    keys = ["pink primrose", "sunflower", "rose"]
    for i in range(6):
        put(root / f"flowers-102/jpg/image_{i + 1:05d}.jpg", flat(LEVELS[i % 3]))
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array([1, 2, 3] * 2)})
    ids = np.array([5, 1, 6, 2, 4, 3])
    savemat(root / "flowers-102/setid.mat", {"trnid": ids, "valid": ids, "tstid": ids})
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    monkeypatch.setattr(Flowers102, "classes", keys, raising=False)
    return dict(zip(keys, LEVELS, strict=True))


def dtd(root, monkeypatch):
    keys = ["banded", "dotted", "zigzagged"]
    for split in ("train", "val", "test"):
        put(root / f"dtd/dtd/labels/{split}1.txt", "".join(f"{k}/{k}_{i}.jpg\n" for i in (1, 2) for k in keys[::-1]))
    return class_folders(root / "dtd/dtd/images", keys, "{key}_{i}.jpg")


def eurosat(root, monkeypatch):
    return class_folders(root / "eurosat/2750", ["AnnualCrop", "River", "SeaLake"])


def fgvc_aircraft(root, monkeypatch):
    base = root / "fgvc-aircraft-2013b/data"
    keys = ["707-320", "A380", "Fokker 70"]
    put(base / "variants.txt", "\n".join(keys) + "\n")
    for split in ("train", "val", "test"):
        put(base / f"images_variant_{split}.txt", "".join(f"00{i} {keys[i % 3]}\n" for i in (5, 0, 3, 2, 4, 1)))
    for i in range(6):
        put(base / f"images/00{i}.jpg", flat(LEVELS[i % 3]))
    return dict(zip(keys, LEVELS, strict=True))


def sun397(root, monkeypatch):
    keys = ["abbey", "apartment_building/outdoor", "zoo"]
    put(root / "SUN397/ClassName.txt", "".join(f"/{k[0]}/{k}\n" for k in keys))
    for c, key in enumerate(keys):
        for i in (2, 1):
            put(root / "SUN397" / key[0] / key / f"sun_{i}.jpg", flat(LEVELS[c]))
    return dict(zip(keys, LEVELS, strict=True))


def caltech101(root, monkeypatch):
    base = root / "caltech101/101_ObjectCategories"
    class_folders(base, ["BACKGROUND_Google"], "image_000{i}.jpg")
    return class_folders(base, ["Faces", "Faces_easy", "yin_yang"], "image_000{i}.jpg")


def caltech256(root, monkeypatch):
    keys = ["001.ak47", "002.airplanes-101", "003.clutter"]
    return class_folders(root / "caltech256/256_ObjectCategories", keys, "00{c}_000{i}.jpg")


def stanford_cars(root, monkeypatch):
    keys = ["Audi TT Hatchback 2011", "BMW X5 SUV 2007", "smart fortwo Convertible 2012"]
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(keys, dtype=object)})
    form = np.dtype([("fname", object), ("class", object)])
    rows = np.array([(f"0000{i}.jpg", i % 3 + 1) for i in (5, 0, 3, 2, 4, 1)], dtype=form)
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    for i in range(6):
        put(base / f"cars_test/0000{i}.jpg", flat(LEVELS[i % 3]))
    return dict(zip(keys, LEVELS, strict=True))


TORCHVISION = {
    f.__name__: f
    for f in (cifar10, stl10, food101, oxford_pets, flowers102, dtd, eurosat, fgvc_aircraft, sun397)
    + (caltech101, caltech256, stanford_cars)
}


def coop_pets(root, change=lambda split: split):
    """The folder of coop/oxford_pets with two images a class and a split; `change` may spoil the list."""
    base = root / "full/oxford_pets"
    rows = []
    for c, key in enumerate(("abyssinian", "american_bulldog", "bengal")):
        for i in (1, 2):
            put(base / f"oxford-iiit-pet/images/{key}_{i}.jpg", flat(LEVELS[c]))
            rows.append([f"{key}_{i}.jpg", c, key])
    put(base / "split_zhou_OxfordPets.json", json.dumps(change({"train": rows, "val": rows, "test": rows[::-1]})))
    return base


def coop_eurosat(root: Path) -> None:
    keys, rows = ("AnnualCrop", "River", "SeaLake"), []
    class_folders(root / "full/eurosat/eurosat/2750", keys)
    for c, key in enumerate(keys):
        rows += [[f"{key}/{i}.jpg", c, key] for i in (1, 2)]
    put(root / "full/eurosat/split_zhou_EuroSAT.json", json.dumps({"train": rows, "val": rows, "test": rows}))


def shrink(monkeypatch, name: str, keys=None, n: int = 6, classes: int = 3) -> None:
    """Tell the registry that the set behind the use `name` has n images a split and these classes only."""
    group, short = name.split("/")
    dataset = registry.datasets()[short]
    use = dataset.uses[group]
    splits = {split: wanted | {"n": n} for split, wanted in use.splits.items()}
    wanted = {"".join(filter(str.isalnum, key.lower())) for key in keys or ()}
    names = {k: v for k, v in dataset.names.items() if not keys or "".join(filter(str.isalnum, k.lower())) in wanted}
    small = replace(dataset, names=names, uses=dataset.uses | {group: replace(use, classes=classes, splits=splits)})
    everything = registry.datasets() | {short: small}
    monkeypatch.setattr(registry, "datasets", lambda: everything)


def write_parquet(
    folder: Path, split: str, rows, names=None, columns=("image", "label"), part="00000-of-00001", **extra
):
    """Parquet in the Hugging Face layout with two-row groups; rows are (bytes, label)."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b, "path": None} for b, _ in rows], layout)
    table = pa.table({columns[0]: images, columns[1]: pa.array([y for _, y in rows], pa.int64()), **extra})
    if names:
        labels = {
            columns[1]: {"names": names, "_type": "ClassLabel"},
            "coarse": {"names": ["a"], "_type": "ClassLabel"},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": labels}})})
    pq.write_table(table, folder / f"{split}-{part}.parquet", row_group_size=2)
