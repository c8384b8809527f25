"""The reader's own images: decoded as documented, and refused by name where something is wrong with them."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.transforms.functional import center_crop, resize

from robustvlm_lite import data
from robustvlm_lite.data import from_path
from robustvlm_lite.data.decoding import decode
from robustvlm_lite.runtime import UserError


def picture(seed=0, width=40, height=30) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def encoded(image: Image.Image, kind="PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_pack(folder: Path, rows, names=("cat", "dog"), split="test", part="00000-of-00001", metadata=None) -> Path:
    """Parquet in the Hugging Face layout; rows are (bytes, label)."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b, "path": f"{i}.png"} for i, (b, _) in enumerate(rows)], layout)
    table = pa.table({"image": images, "label": pa.array([y for _, y in rows], pa.int64())})
    pq.write_table(table.replace_schema_metadata(metadata), folder / f"{split}-{part}.parquet")
    (folder / "classes.json").write_text(json.dumps({"names": list(names)}))
    return folder


def write_folders(folder: Path) -> Path:
    for i, name in enumerate(("big_cat", "dog")):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            (folder / name / f"{k}.png").write_bytes(encoded(picture(2 * i + k)))
    return folder


def test_decoding_is_a_short_side_resize_and_a_center_crop():
    for size in ((128, 80), (80, 128), (32, 32), (64, 64), (70, 64)):
        image = picture(3, *size)
        scale = 64 / min(size)
        expected = center_crop(resize(image, [round(s * scale) for s in size[::-1]]), [64, 64])
        assert np.array_equal(decode(encoded(image), 64, "here"), np.asarray(expected)), size


def test_own_pictures_stand_upright_and_what_is_transparent_is_white(tmp_path):
    folder, seen = write_folders(tmp_path / "pets"), picture(7, 40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it", as of a telephone held upright
    lying = seen.rotate(90, expand=True)
    lying.save(folder / "dog" / "0.png", exif=exif)
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # black hides behind full transparency
    clear.paste((200, 10, 10, 255), (0, 0, 64, 32))
    clear.save(folder / "dog" / "1.png")
    own = from_path(str(folder), size=64).images
    assert np.array_equal(own[2].permute(1, 2, 0).numpy(), decode(encoded(seen), 64, "here"))
    assert (own[3][:, 40:] == 255).all() and own[3][:, 8, 8].tolist() == [200, 10, 10]
    assert not decode(encoded(clear), 64, "here")[40:].any(), "a published set is read as before"


def test_a_split_that_was_not_asked_for_is_named(tmp_path):
    rows = [(encoded(picture(k)), k % 2) for k in range(4)]
    assert from_path(str(write_pack(tmp_path / "own", rows))).name == "own/own"
    assert from_path(str(write_pack(tmp_path / "other", rows, split="train"))).name == "own/other (train split)"


def test_gray_and_transparent_pictures_become_rgb():
    image = picture(4, 64, 64)
    gray = decode(encoded(image.convert("L")), 64, "here")
    assert gray.shape == (64, 64, 3) and (gray == gray[:, :, :1]).all()
    assert np.array_equal(decode(encoded(image.convert("RGBA")), 64, "here"), np.asarray(image))
    deep = Image.fromarray(np.full((64, 64), 30000, dtype=np.uint16))
    with pytest.raises(UserError, match="8 bits a channel"):
        decode(encoded(deep), 64, "here")


def test_subfolders_are_classes(tmp_path):
    own = from_path(write_folders(tmp_path / "pets"))
    assert own.class_names == ("big cat", "dog") and own.labels.tolist() == [0, 0, 1, 1] and own.name == "own/pets"
    assert own.ids == ("big_cat/0.png", "big_cat/1.png", "dog/0.png", "dog/1.png") and own.templates == data.PHOTO
    assert from_path(tmp_path / "pets", size=32, templates=("{}",)).images.shape == (4, 3, 32, 32)


WHOLE = encoded(picture())
PARQUET = "test-00000-of-00001.parquet"
HUGE_BMP = (
    b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + b"\xff\xff\1\0" * 2 + b"\1\0\x18\0" + bytes(24)
)  # 131071 x 131071


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


FOLDER_ERRORS = {
    "corrupt": (lambda f: (f / "dog/1.png").write_bytes(WHOLE[: len(WHOLE) // 2]), "bytes at .+dog/1.png"),
    "zero bytes": (lambda f: (f / "dog/1.png").write_bytes(b""), r"got 0 bytes at .+dog/1.png \(no known format\)"),
    "no image": (lambda f: (f / "dog/1.png").write_text("hello"), "got 5 bytes at .+dog/1.png"),
    "bomb": (lambda f: (f / "dog/1.bmp").write_bytes(HUGE_BMP), "dog/1.bmp .+exceeds limit"),
    "empty class": (lambda f: (f / "empty").mkdir(), "images in the class folder .+empty, found none"),
    "one class": (lambda f: remove(f / "dog"), "at least two classes .+got 1"),
    "no class": (lambda f: (remove(f / "dog"), remove(f / "big_cat")), "one subfolder a class in .+found none"),
}


@pytest.mark.parametrize("what", FOLDER_ERRORS)
def test_a_bad_folder_is_refused_by_name(tmp_path, what):
    folder = write_folders(tmp_path / "own")
    spoil, match = FOLDER_ERRORS[what]
    spoil(folder)
    with pytest.raises(UserError, match=match) as error:
        from_path(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and " object at 0x" not in str(error.value)


def two_parts(folder: Path) -> Path:
    """Rows 0 and 1 in the first file, 2 and 3 in the second."""
    write_pack(folder, [(WHOLE, 0), (WHOLE, 1)], part="00000-of-00002")
    return write_pack(folder, [(WHOLE, 1), (WHOLE, 0)], part="00001-of-00002")


def sums(folder: Path, text: str) -> None:
    """A list of SHA-256 of the pack's file beside the pack, as of a file that held `text`."""
    line = f"{hashlib.sha256(text.encode()).hexdigest()}  {folder.name}/{PARQUET}\n"
    (folder.parent / "SHA256SUMS").write_text(line)


def truncate(file: Path, n: int) -> None:
    file.write_bytes(file.read_bytes()[:n])


PACK_ERRORS = {
    "corrupt image": (
        lambda f: write_pack(f, [(WHOLE, 0), (WHOLE[:60], 1)]),
        f"60 bytes at own/1.png, row 1 of {PARQUET}",
    ),
    "missing part": (
        lambda f: (two_parts(f) / "test-00000-of-00002.parquet").unlink(),
        "test-00000-of-00002.+ missing",
    ),
    "parts of two versions": (
        lambda f: write_pack(two_parts(f), [(WHOLE, 0)]),
        "expected . test files in .+, got 3; remove",
    ),
    "bad row of a later part": (
        lambda f: write_pack(two_parts(f), [(WHOLE, 0), (b"no", 1)], part="00001-of-00002"),
        "2 bytes at own/1.png, row 1 of test-00001-of-00002.parquet",
    ),
    "bad label of a later part": (
        lambda f: write_pack(two_parts(f), [(WHOLE, 0), (WHOLE, -1)], part="00001-of-00002"),
        "labels in 0..1 .+ got -1 to 1 .first at row 1 of test-00001-of-00002.parquet",
    ),
    "checksum": (lambda f: sums(write_pack(f, [(WHOLE, 0)]), "another"), f"expected SHA-256 .+ for .+{PARQUET}, got"),
    "class list": (
        lambda f: write_pack(f, [(WHOLE, 0)], metadata={"class_names": '["cat", "dog", "emu"]'}),
        "the 3 classes of test-.+ in .+classes.json, got 2",
    ),
    "null image": (lambda f: write_pack(f, [(WHOLE, 0), (None, 1)]), "0 bytes at own/1.png"),
    "no row": (lambda f: write_pack(f, []), "without a row"),
    "label": (lambda f: write_pack(f, [(WHOLE, 2)]), f"labels in 0..1 .+ got 2 to 2 .first at row 0 of {PARQUET}"),
    "one class": (lambda f: write_pack(f, [(WHOLE, 0)], names=["cat"]), "at least two classes"),
    "zero bytes": (lambda f: truncate(write_pack(f, []) / PARQUET, 0), PARQUET),
    "truncated": (lambda f: truncate(write_pack(f, [(WHOLE, 0)]) / PARQUET, -9), PARQUET),
    "no names": (lambda f: (write_pack(f, [(WHOLE, 0)]) / "classes.json").unlink(), "classes.json"),
    "columns": (lambda f: pq.write_table(pa.table({"x": [1]}), write_pack(f, []) / PARQUET), "columns image"),
    "split": (lambda f: write_pack(f, [(WHOLE, 0)], split="all"), "split test, validation or train"),
}


@pytest.mark.parametrize("what", PACK_ERRORS)
def test_a_bad_pack_is_refused_by_name(tmp_path, what):
    spoil, match = PACK_ERRORS[what]
    spoil(tmp_path / "own")
    with pytest.raises(UserError, match=match) as error:
        from_path(tmp_path / "own")
    assert "\n" not in str(error.value) and "own" in str(error.value)


def test_parts_are_read_in_order_and_a_right_checksum_is_content(tmp_path):
    pack = two_parts(tmp_path / "own")
    assert from_path(pack).labels.tolist() == [0, 1, 1, 0]
    listed = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  own/{f.name}\n" for f in pack.glob("*.parquet")]
    (tmp_path / "SHA256SUMS").write_text("".join(listed))
    assert len(from_path(pack)) == 4


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder of images or Parquet files, found none at .+ check --data"):
        from_path(tmp_path / "nowhere")
