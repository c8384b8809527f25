"""Images with captions or questions, as they lie on disk: COCO, Flickr8k, Flickr30k, VQAv2 and Visual Genome.

Nothing is decoded before it is asked for, so that a training split fits into memory.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from ..runtime import UserError, asset, generator, near_miss
from .decoding import UNREADABLE, unreadable
from .registry import Dataset, find


@dataclass(frozen=True, slots=True)
class TextRow:
    """One image with its captions, or with one question and the answers that people gave to it."""

    image: Path
    texts: tuple[str, ...]
    question: str = ""


@dataclass(frozen=True)
class TextSet:
    """The rows of one split, in the order of the files; `image` of a row is opened by `pixels` alone."""

    name: str
    split: str
    rows: tuple[TextRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, n: int, seed: int = 0) -> "TextSet":
        """A seeded subset of n rows, in shuffled order; the first rows of a larger one."""
        if not 0 < n <= len(self):
            raise UserError(f"expected 1 to {len(self)} rows of {self.name}, got n={n}; ask for fewer")
        order = torch.randperm(len(self), generator=generator(seed, self.name, "subset"))[:n]
        return replace(self, rows=tuple(self.rows[i] for i in order.tolist()))

    def pixels(self, index: Sequence[int], size: int, *, bicubic: bool = False) -> Tensor:
        """float32 [len(index), 3, size, size] in [0, 1]: the whole image, its sides stretched to `size`, as captioners read it.

        bicubic: BLIP-2's resize; otherwise bilinear, ViT-GPT2's (specification, section 2). Raises UserError for an image
        that cannot be decoded, naming its file.
        """
        images = np.stack([_stretched(self.rows[i].image, size, bicubic) for i in index])
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def read_texts(name: str, split: str, data_root: str) -> TextSet:
    """A split of "coco_captions", "flickr8k", "flickr30k", "vqav2" or "visual_genome_qa" below `data_root`/full/NAME.

    Raises UserError, with the way to obtain what lacks, for a missing file or image, and for files of another form, with
    rows without a text, or of another length than the registry states.
    """
    if name not in _layouts():
        raise UserError(f"unknown dataset with texts {name!r}; {near_miss(name, _layouts())}")
    dataset, layout = find(name), _layouts()[name]
    if split not in layout["splits"]:
        raise UserError(f"expected split {' or '.join(map(repr, layout['splits']))} of {name}, got {split!r}")
    if not data_root:
        raise UserError(f"dataset {name!r} is not bundled; pass data_root, the folder that holds full/{name}/")
    wanted, folder = layout["splits"][split], dataset.folder(data_root)
    _check_there(dataset, wanted, folder)
    try:
        rows = tuple(_READERS[layout["reader"]](folder, wanted, split))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(f"expected the published form of {wanted['texts']} in {folder}, got {got}; fetch it again") from None
    if len(rows) != wanted.get("n", len(rows)):
        raise UserError(
            f"expected {wanted['n']} {split} rows of {dataset.title} in {folder}, got {len(rows)}; complete the files or fetch them again"
        )
    if empty := next((row for row in rows if not (row.question or any(row.texts))), None):
        raise UserError(f"expected a text for each image of {dataset.title}, got none for {empty.image.name}; fetch the files again")
    if lost := next((image for image in dict.fromkeys(row.image for row in rows) if not image.is_file()), None):
        raise UserError(f"expected the image {lost} of {dataset.title}, found none; {_how(dataset)}")
    return TextSet(name, split, rows)


@lru_cache
def _layouts() -> dict[str, dict]:
    """{data set: its `texts` entry}."""
    entries = yaml.safe_load(asset("datasets.yml").read_text(encoding="utf-8"))
    return {name: entry["texts"] for name, entry in entries.items() if "texts" in entry}


def _check_there(dataset: Dataset, wanted: dict, folder: Path) -> None:
    files = [wanted[key] for key in ("texts", "list", "answers") if key in wanted]
    for name in (*files, *_folders(wanted)):
        if not (folder / name).exists():
            raise UserError(f"expected {name} of {dataset.title} in {folder}, found none; {_how(dataset)}")


def _folders(wanted: dict) -> list[str]:
    return wanted["images"] if isinstance(wanted["images"], list) else [wanted["images"]]


def _how(dataset: Dataset) -> str:
    if dataset.downloads:
        return f"robustvlm data prepare {dataset.name} --root DIR fetches it ({dataset.licence})"
    return f"obtain it: {dataset.obtain} ({dataset.licence})"


def _stretched(path: Path, size: int, bicubic: bool) -> np.ndarray:
    try:
        with Image.open(path) as image:
            resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
            return np.asarray(image.convert("RGB").resize((size, size), resampling))
    except UNREADABLE as error:
        raise unreadable(error, str(path)) from None


# ---- one reader a form


def _json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _words(text: str) -> str:
    """A text on one line: some published captions end in a line break."""
    return " ".join(text.split())


def _coco(folder: Path, wanted: dict, split: str) -> Iterator[TextRow]:
    """{images: [{id, file_name}], annotations: [{image_id, caption}]}."""
    stored, captions = _json(folder / wanted["texts"]), defaultdict(list)
    for annotation in stored["annotations"]:
        captions[annotation["image_id"]].append(_words(annotation["caption"]))
    for image in stored["images"]:
        yield TextRow(folder / wanted["images"] / image["file_name"], tuple(captions[image["id"]]))


def _token_list(folder: Path, wanted: dict, split: str) -> Iterator[TextRow]:
    """Lines "IMAGE#k <tab> caption", and a list of the split's images."""
    captions = defaultdict(list)
    for line in (folder / wanted["texts"]).read_text(encoding="utf-8").splitlines():
        key, caption = line.split("\t")
        captions[key.rpartition("#")[0]].append(_words(caption))
    for name in (folder / wanted["list"]).read_text(encoding="utf-8").split():
        yield TextRow(folder / wanted["images"] / name, tuple(captions[name]))


def _karpathy(folder: Path, wanted: dict, split: str) -> Iterator[TextRow]:
    """{images: [{filename, split, sentences: [{raw}]}]}."""
    for image in _json(folder / wanted["texts"])["images"]:
        if image["split"] == split:
            captions = tuple(_words(sentence["raw"]) for sentence in image["sentences"])
            yield TextRow(folder / wanted["images"] / image["filename"], captions)


def _vqa(folder: Path, wanted: dict, split: str) -> Iterator[TextRow]:
    """{questions: [{question_id, image_id, question}]} and {annotations: [{question_id, answers: [{answer}]}]}."""
    annotations = _json(folder / wanted["answers"])["annotations"]
    answers = {row["question_id"]: tuple(answer["answer"] for answer in row["answers"]) for row in annotations}
    for row in _json(folder / wanted["texts"])["questions"]:
        name = f"COCO_{wanted['images']}_{row['image_id']:012d}.jpg"
        yield TextRow(folder / wanted["images"] / name, answers[row["question_id"]], _words(row["question"]))


def _visual_genome(folder: Path, wanted: dict, split: str) -> Iterator[TextRow]:
    """[{qas: [{image_id, question, answer}]}]; the images lie in two folders."""
    where = {path.name: path for part in _folders(wanted) for path in (folder / part).iterdir()}
    for entry in _json(folder / wanted["texts"]):
        for row in entry["qas"]:
            name = f"{row['image_id']}.jpg"
            image = where.get(name, folder / _folders(wanted)[0] / name)
            yield TextRow(image, (_words(row["answer"]),), _words(row["question"]))


_READERS = {"coco": _coco, "token_list": _token_list, "karpathy": _karpathy, "vqa": _vqa, "visual_genome": _visual_genome}
