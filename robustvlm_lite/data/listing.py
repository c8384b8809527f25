"""One split of a data set before any image is decoded, and the images of chosen rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime import UserError
from .decoding import UNREADABLE, decode, square, unreadable


@dataclass(frozen=True)
class Listing:
    """Labels int64 [N] and ids of a split's rows, and how a row's image is read.

    keys: the data's own class names, in label order; empty where the data do not name them. named: whether the keys are
    prompt names already. read: the encoded image of a row, or an opened one. where: what an error calls a row, its file
    among it.
    """

    labels: Tensor
    ids: tuple[str, ...]
    keys: tuple[str, ...]
    read: Callable[[int], bytes | Image.Image]
    where: Callable[[int], str]
    named: bool = False

    def images(
        self, rows: Tensor, size: int, zoom: float = 1.0, bicubic: bool = False, *, own: bool = False
    ) -> Tensor:
        """uint8 [len(rows), 3, size, size], in the order of `rows`; zoom, bicubic and own as `decode` takes them.

        Rows are decoded in the order of the files, which reads each Parquet row group once.
        """
        images = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        for i in rows.argsort().tolist():
            images[i] = self._square(int(rows[i]), size, zoom, bicubic, own)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _square(self, row: int, size: int, zoom: float, bicubic: bool, own: bool) -> np.ndarray:
        try:
            image = self.read(row)
            if not isinstance(image, Image.Image):
                return decode(image, size, self.where(row), zoom, bicubic, own=own)
            with image:
                return square(image, size, zoom, bicubic)
        except FileNotFoundError:
            raise UserError(f"expected the image {self.where(row)}, found none; fetch the files again") from None
        except UserError:  # is a ValueError, as an unreadable image is
            raise
        except UNREADABLE as error:
            raise unreadable(error, self.where(row)) from None
