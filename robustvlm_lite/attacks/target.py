"""The model while it is attacked: evaluation mode, full precision, gradients on, nothing left behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..runtime import eval_mode, generator


@contextmanager
def as_target(model: nn.Module, x: torch.Tensor, key: tuple) -> Iterator[None]:
    """Inside: `model` in evaluation mode, autocast off, gradients on, the global random stream seeded from `key`.

    Outside again, even after an error: each submodule's own mode, every parameter's `.grad` and the random stream are
    as before. torchattacks switches a whole model to train mode and, in FAB and CW, adds to parameter gradients.
    """
    grads = [(p, p.grad) for p in model.parameters()]
    for p, _ in grads:
        p.grad = None
    devices = [x.device] if x.is_cuda else []
    try:
        with (
            eval_mode(model),
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            torch.autocast(x.device.type, enabled=False),
        ):
            torch.manual_seed(generator(*key).initial_seed())
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
