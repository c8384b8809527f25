"""A set of labelled images in memory, as every room of the book receives it."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..runtime import UserError, generator


@dataclass(frozen=True)
class ImageSet:
    """Images of one zero-shot task.

    images: uint8 [N, 3, H, W]; labels: int64 [N]; class_names and templates: what the text side is built from;
    masks: bool [N, H, W] where the object is known exactly, else None; ids: one name an image.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    split: str = "test"
    masks: Tensor | None = None
    ids: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index=slice(None)) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1]."""
        return self.images[index].float() / 255

    def take(self, index) -> "ImageSet":
        """The images at `index` (a tensor or list of positions), in that order."""
        index = torch.as_tensor(index)
        ids = tuple(self.ids[i] for i in index.tolist()) if self.ids else ()
        masks = None if self.masks is None else self.masks[index]
        return replace(self, images=self.images[index], labels=self.labels[index], masks=masks, ids=ids)

    def balanced(self, n: int, seed: int = 0) -> "ImageSet":
        """A seeded subset of n images with classes as equally filled as the set allows, in shuffled order."""
        return self.take(balanced_rows(self.labels, n, seed, self.name))

    def split_off(self, share: float, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """(rest, share) of the set: hyper-parameters are chosen on the share, never on test images."""
        order = torch.randperm(len(self), generator=generator(seed, self.name, "validation"))
        cut = round(len(self) * share)
        return self.take(order[cut:]), self.take(order[:cut])

    @cached_property
    def sha256(self) -> str:
        """Hash of pixels, labels, class names and templates."""
        digest = hashlib.sha256(repr((self.class_names, self.templates, tuple(self.images.shape))).encode())
        digest.update(self.images.contiguous().numpy().tobytes() + self.labels.numpy().tobytes())
        return digest.hexdigest()


def balanced_rows(labels: Tensor, n: int, seed: int, name: str) -> Tensor:
    """Rows of n images, classes as equally filled as labels [N] allow, in an order that depends on (seed, name) alone."""
    if not 0 < n <= len(labels):
        raise UserError(f"expected 1 to {len(labels)} images of {name}, got n={n}; ask for fewer")
    order = torch.randperm(len(labels), generator=generator(seed, name, "subset"))
    rank = torch.zeros(len(labels), dtype=torch.int64)  # how many images of the same class come before this one
    for c in labels.unique():
        rows = order[labels[order] == c]
        rank[rows] = torch.arange(len(rows))
    return order[rank[order].argsort(stable=True)][:n]
