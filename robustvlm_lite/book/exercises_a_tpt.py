"""The exercises of the chapter on A-TPT: which views are sure, what a first AdamW step is, and weights that many views share.

As in `exercises`, a check prints one line that begins with ✓, or raises AssertionError with a hint.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..runtime import generator
from .exercises import _call, _require_shape


def check_surest(fn: Callable[[Tensor, int], Tensor]) -> None:
    """`fn(logits, keep)` are the indices [I, keep] of the views of lowest entropy, from logits [I, V, C]."""
    logits = 3 * torch.randn(3, 8, 5, generator=generator("exercise", "surest"))
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    want = entropy.argsort(dim=1)[:, :3]
    got = _call(fn, logits.clone(), 3)
    _require_shape(got, (3, 3), "three views of each of three images, [I, keep]")
    wrong = {
        "Those are the least sure views: low entropy is sure.": entropy.argsort(dim=1, descending=True)[:, :3],
        "That is the largest logit, not the entropy: softmax first.": logits.amax(-1).argsort(dim=1, descending=True)[:, :3],
    }
    for hint, mistake in wrong.items():
        assert not torch.equal(got.sort(1).values, mistake.sort(1).values), hint
    assert torch.equal(got.sort(1).values, want.sort(1).values), f"Expected views {want[0].tolist()}, got {got[0].tolist()}."
    print("✓ the surest views, chosen by entropy for each image")


def check_first_step(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`fn(context, g)` is the context after one AdamW step from a fresh state: rate 0.005, weight decay 0.01."""
    g = generator("exercise", "first step")
    start, slope = torch.randn(4, 6, generator=g), 1e-3 * torch.randn(4, 6, generator=g)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=5e-3, weight_decay=0.01)
    parameter.grad = slope.clone()
    optimizer.step()
    want, got = parameter.detach(), _call(fn, start.clone(), slope.clone())
    _require_shape(got, (4, 6), "a context of the same shape")
    wrong = {
        "That is plain gradient descent; Adam divides by the root of the mean square.": start - 5e-3 * slope,
        "The weight decay is missing: AdamW first shrinks the context by lr · 0.01.": start - 5e-3 * slope.sign(),
        "The sign is reversed.": start * (1 - 5e-5) + 5e-3 * slope.sign(),
        "With a fresh state the bias corrections cancel (1 - β): the step is not that short.": start * (1 - 5e-5)
        - 5e-3 * 0.1 / 0.001**0.5 * slope.sign(),
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got, mistake, atol=1e-6), hint
    assert torch.allclose(got, want, atol=1e-6), f"Expected {want[0, 0]:.6f} as the first entry, got {float(got[0, 0]):.6f}."
    print("✓ a step of the rate's size in each coordinate, whatever the loss's scale")


def check_shared_weights(fn: Callable[[Tensor], Tensor], variation: Tensor) -> None:
    """`fn(variation)` weighs views by their total variation [I, V]: calmer ones more, and at least half of them take part."""
    got = _call(fn, variation.clone())
    _require_shape(got, tuple(variation.shape), "one weight for each view, [I, V]")
    assert torch.allclose(got.sum(1), torch.ones(len(got)), atol=1e-4), "The weights of an image must sum to 1."
    assert (got >= 0).all(), "Expected weights of at least 0."
    calmest = got.gather(1, variation.argmin(1, keepdim=True))[:, 0]
    assert (calmest >= got.amax(1) - 1e-6).all(), "The calmest view must weigh most."
    many = (1 / got.square().sum(1)).mean().item()
    half = variation.shape[1] / 2
    assert many >= half, f"{many:.1f} of {variation.shape[1]} views take part on average: the scale of TV decides, not its order."
    assert many <= 0.98 * variation.shape[1], "All views weigh the same: then TV has no say."
    scaled = _call(fn, 3 * variation)
    assert torch.allclose(scaled, got, atol=1e-3), "A finer grid only scales TV up; your weights change with it."
    print(f"✓ calmer views weigh more, {many:.1f} of {variation.shape[1]} take part, and the grid's size does not matter")
