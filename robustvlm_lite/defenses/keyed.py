"""Classifiers that draw random numbers at test time, from a generator of each image's own."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ..runtime import UserError, generator


class Keyed(nn.Module):
    """A classifier that draws random numbers for each image, from a generator of the image's own.

    `keyed(keys)` fixes the draws by one key an image, so that an answer depends on the key and not on batch or order.
    Called without keys it draws anew in every call, from torch's global stream: what an attacker averages over.
    """

    keys: tuple | None = None

    def keyed(self, keys: Sequence[tuple]) -> "Keyed":
        """The same classifier, nothing copied, with draws fixed by a key for each image of the next batch."""
        other = copy.copy(self)
        other.keys = tuple(keys)
        return other

    def generators(self, n: int) -> list[torch.Generator]:
        keys = self.keys
        if keys is None:
            fresh = torch.randint(2**62, ()).item()
            keys = [("fresh", fresh, i) for i in range(n)]
        if len(keys) != n:
            raise UserError(f"expected a key for each of {n} images, got {len(keys)}; key the classifier for this batch")
        return [generator(*key) for key in keys]
