"""Classifiers that draw random numbers at test time, from a generator of each image's own."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ..runtime import UserError, generator


class Keyed(nn.Module):
    """A classifier that draws random numbers for each image, from a generator of the image's own.

    `keyed(keys)` fixes the draws by one key an image: every call gives the same answers, whatever the batch or the order.
    `streaming(keys)` draws on from call to call, also for each image by itself: what an attacker averages over. Without
    keys each call draws anew from torch's global stream.
    """

    keys: tuple = ()
    streams: tuple = ()

    def keyed(self, keys: Sequence[tuple]) -> "Keyed":
        """The same classifier, nothing copied, with draws fixed by a key for each image of the next batch."""
        other = copy.copy(self)
        other.keys, other.streams = tuple(keys), ()
        return other

    def streaming(self, keys: Sequence[tuple]) -> "Keyed":
        """The same classifier with a stream of draws for each image of a batch, or of its first images."""
        other = copy.copy(self)
        other.keys, other.streams = (), tuple(generator("stream", *key) for key in keys)
        return other

    def generators(self, n: int) -> list[torch.Generator]:
        if n <= len(self.streams):
            return list(self.streams[:n])
        if not (self.keys or self.streams):
            fresh = torch.randint(2**62, ()).item()
            return [generator("fresh", fresh, i) for i in range(n)]
        if len(self.keys) != n:
            raise UserError(
                f"expected a key for each of {n} images, got {len(self.keys or self.streams)}; key the classifier for this batch"
            )
        return [generator(*key) for key in self.keys]
