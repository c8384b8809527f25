"""How many bytes of tensors a computation holds at once, on any device."""

import gc
import weakref
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Held(TorchDispatchMode):
    """Watches every tensor that is made, and the largest number of bytes that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._watch(given.untyped_storage(), size=0)  # if unknown, it was there before
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._watch(made.untyped_storage(), made.untyped_storage().nbytes())
        return out

    def _watch(self, storage, size: int) -> None:
        place = storage._cdata
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors that `function` held at once; weights and inputs that were there before do not count."""
    gc.collect()
    held = _Held()
    with held:
        kept = function()
    del kept
    return held.peak
