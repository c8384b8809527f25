"""Captions and questions on small local files in the form of the published ones."""

import json

import numpy as np
import pytest
from PIL import Image
from small_sets import LEVELS, flat, put

from robustvlm_lite.data import texts
from robustvlm_lite.data.registry import datasets
from robustvlm_lite.data.texts import TextRow, read_texts
from robustvlm_lite.runtime import UserError


def coco(folder):
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]
    captions = [(3, "A dog."), (7, "A cat \n"), (3, "One dog")]
    rows = [{"image_id": i, "id": k, "caption": text} for k, (i, text) in enumerate(captions)]
    put(folder / "annotations/captions_val2017.json", json.dumps({"images": images, "annotations": rows}))
    return "val", {"val2017/a.jpg": (("A cat",), ""), "val2017/b.jpg": (("A dog.", "One dog"), "")}


def flickr8k(folder):
    lines = ["x.jpg#0\tA dog .", "y.jpg#0\tA cat .", "x.jpg#1\tDog", "lost.jpg.1#0\tin no list"]
    put(folder / "Flickr8k_text/Flickr8k.token.txt", "\n".join(lines) + "\n")
    put(folder / "Flickr8k_text/Flickr_8k.devImages.txt", "y.jpg\nx.jpg\n")
    return "val", {"Flicker8k_Dataset/y.jpg": (("A cat .",), ""), "Flicker8k_Dataset/x.jpg": (("A dog .", "Dog"), "")}


def flickr30k(folder):
    images = [
        {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f"image {i}."}, {"raw": "again"}]}
        for i, split in enumerate(("train", "test", "test", "val"))
    ]
    put(folder / "dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}))
    return "test", {f"flickr30k-images/{i}.jpg": ((f"image {i}.", "again"), "") for i in (1, 2)}


def vqav2(folder):
    questions = [{"question_id": 420, "image_id": 42, "question": "What color?"}, {"question_id": 421, "image_id": 9, "question": "Why?"}]
    answers = {421: ["because"] * 10, 420: ["red"] * 9 + ["dark red"]}
    rows = [{"question_id": q, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(given)]} for q, given in answers.items()]
    put(folder / "v2_OpenEnded_mscoco_val2014_questions.json", json.dumps({"questions": questions}))
    put(folder / "v2_mscoco_val2014_annotations.json", json.dumps({"annotations": rows}))
    return "val", {
        "val2014/COCO_val2014_000000000042.jpg": (("red",) * 9 + ("dark red",), "What color?"),
        "val2014/COCO_val2014_000000000009.jpg": (("because",) * 10, "Why?"),
    }


def visual_genome_qa(folder):
    qas = [[(1, "Where is it?", "On the table."), (1, "Who?", "Nobody.")], [], [(2, "When?", "At night.")]]
    entries = [{"id": i, "qas": [{"image_id": k, "question": q, "answer": a} for k, q, a in row]} for i, row in enumerate(qas)]
    put(folder / "question_answers.json", json.dumps(entries))
    return "all", {"VG_100K/1.jpg": (("On the table.",), "Where is it?"), "VG_100K_2/2.jpg": (("At night.",), "When?")}


SETS = {make.__name__: make for make in (coco, flickr8k, flickr30k, vqav2, visual_genome_qa)}
SETS["coco_captions"] = SETS.pop("coco")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function of a name that writes the set and two flat images, and returns (split, {image: (texts, question)})."""

    def make(name):
        folder = tmp_path / "full" / name
        split, expected = SETS[name](folder)
        for level, image in zip(LEVELS, expected, strict=False):
            put(folder / image, flat(level))
        layout = texts._layouts()[name]
        if "n" in layout["splits"][split]:
            monkeypatch.setitem(layout["splits"][split], "n", len(expected))
        return split, expected

    return make


@pytest.mark.parametrize("name", SETS)
def test_rows_are_those_of_the_files(name, made, tmp_path):
    split, expected = made(name)
    read = read_texts(name, split, str(tmp_path))
    rows = {row.image.relative_to(tmp_path / "full" / name).as_posix(): (row.texts, row.question) for row in read.rows}
    if name == "visual_genome_qa":  # two questions on one image
        assert [row.question for row in read.rows] == ["Where is it?", "Who?", "When?"]
        assert read.rows[0].image == read.rows[1].image
        rows["VG_100K/1.jpg"] = (read.rows[0].texts, read.rows[0].question)
    assert rows == expected
    if name != "visual_genome_qa":
        assert list(rows) == list(expected), "the order of the files"
    levels = [round(float(x) * 255) for x in read.pixels(range(len(read)), 8)[:, 0, 0, 0]]
    assert levels == ([LEVELS[0]] * 2 + [LEVELS[1]] if name == "visual_genome_qa" else list(LEVELS[:2]))


def test_every_set_with_texts_is_read_and_its_counts_are_the_published_ones():
    assert set(texts._layouts()) == set(SETS) == {name for name, d in datasets().items() if not d.uses}
    published = {
        "coco_captions": {"train": 118287, "val": 5000},
        "flickr8k": {"train": 6000, "val": 1000, "test": 1000},
        "flickr30k": {"train": 29000, "val": 1014, "test": 1000},
        "vqav2": {"train": 443757, "val": 214354},
        "visual_genome_qa": {"all": None},
    }
    stated = {name: {s: row.get("n") for s, row in layout["splits"].items()} for name, layout in texts._layouts().items()}
    assert stated == published


def test_the_whole_image_is_stretched_and_no_side_is_cut(tmp_path):
    columns = np.zeros((10, 40, 3), dtype=np.uint8)
    columns[:, 20:] = 250  # left black, right bright; a center cut of 10 x 10 would lose where the halves end
    columns[5:, :, 2] = 100
    Image.fromarray(columns).save(tmp_path / "wide.png")
    x = texts.TextSet("toy", "test", (TextRow(tmp_path / "wide.png", ("words",)),)).pixels([0], 20)
    assert x.shape == (1, 3, 20, 20) and x.dtype.is_floating_point
    assert x[0, 0, 0].round(decimals=2).tolist()[:9] == [0.0] * 9
    assert x[0, 0, 0, 11:].allclose(x.new_tensor(250 / 255)) and x[0, 2, -1, 0] == pytest.approx(100 / 255)
    bicubic = texts.TextSet("toy", "test", (TextRow(tmp_path / "wide.png", ("words",)),)).pixels([0], 20, bicubic=True)
    assert not bicubic.equal(x) and (bicubic - x).abs().mean() < 0.05


def test_a_sample_is_seeded_and_a_smaller_one_begins_it(made, tmp_path):
    split, _ = made("visual_genome_qa")
    read = read_texts("visual_genome_qa", split, str(tmp_path))
    orders = {tuple(row.question for row in read.sample(3, seed).rows) for seed in range(12)}
    assert len(orders) > 2 and read.sample(2, 5).rows == read.sample(3, 5).rows[:2]
    for n in (0, 4):
        with pytest.raises(UserError, match="expected 1 to 3 rows of visual_genome_qa"):
            read.sample(n)


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path, made):
    root = str(tmp_path)
    for name, split, data_root, match in (
        ("coco_caption", "val", root, "unknown dataset with texts 'coco_caption'; did you mean 'coco_captions'"),
        ("cifar10", "test", root, "unknown dataset with texts 'cifar10'"),
        ("coco_captions", "test", root, "expected split 'train' or 'val' of coco_captions, got 'test'"),
        ("vqav2", "val", "", "pass data_root, the folder that holds full/vqav2/"),
        ("vqav2", "val", root, "expected v2_OpenEnded.+found none; robustvlm data prepare vqav2 --root DIR fetches it .+CC BY"),
        ("flickr8k", "test", root, "expected Flickr8k_text/.+found none; obtain it: the request form .+research only"),
    ):
        with pytest.raises(UserError, match=match):
            read_texts(name, split, data_root)
    split, expected = made("coco_captions")
    image = tmp_path / "full/coco_captions" / next(iter(expected))
    put(image, b"no image")
    with pytest.raises(UserError, match="expected a readable image, got .+a.jpg .no known format"):
        read_texts("coco_captions", split, root).pixels([0], 8)
    image.unlink()
    with pytest.raises(UserError, match="expected the image .+a.jpg of COCO captions .2017., found none; robustvlm data prepare"):
        read_texts("coco_captions", split, root)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "expected the published form of annotations/captions_val2017.json .+JSONDecodeError"),
        ('{"images": []}', "expected the published form .+KeyError: 'annotations'"),
        ('{"images": [], "annotations": []}', "expected 2 val rows of COCO captions .+got 0; complete the files"),
        (
            '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}], '
            '"annotations": [{"image_id": 1, "caption": "x"}]}',
            "expected a text for each image of COCO captions .2017., got none for b.jpg",
        ),
    ],
)
def test_a_file_of_another_form_is_one_line(content, match, made, tmp_path):
    split, _ = made("coco_captions")
    put(tmp_path / "full/coco_captions/annotations/captions_val2017.json", content)
    with pytest.raises(UserError, match=match) as caught:
        read_texts("coco_captions", split, str(tmp_path))
    assert "\n" not in str(caught.value)
