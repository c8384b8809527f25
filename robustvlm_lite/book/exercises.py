"""Exercises that answer back: a check takes the reader's function and says what is wrong with it.

A check prints one line that begins with ✓, or raises AssertionError with a hint.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import pgd
from ..attention import gram, map_distance, text_map
from ..clip import ZeroShotCLIP
from ..data import ImageSet
from ..runtime import UserError, generator
from ..threat import ThreatModel


def check_minmax(fn: Callable[[Tensor], Tensor]) -> None:
    """`fn` stretches each row of a map [B, N] to [0, 1] on its own; a constant row must not become NaN."""
    scale = torch.tensor([[1.0], [5.0], [0.02], [0.0]])  # the last row is constant
    m = 0.3 + scale * torch.randn(4, 49, generator=generator("exercise", "minmax"))
    before = m.clone()
    got = _call(fn, m)
    assert torch.equal(m, before), "Your function changes its input in place; compute a new tensor."
    _require_shape(got, (4, 49), "one map for each image, [B, N]")
    assert torch.isfinite(got[:3]).all(), "NaN or infinity in an ordinary row; do you divide by max − min of that row?"
    assert torch.isfinite(got).all(), (
        "A constant row gives NaN: max − min is 0 there. Keep the divisor from zero, e.g. with clamp_min(1e-6)."
    )
    low, high = m.amin(1, keepdim=True), m.amax(1, keepdim=True)
    want = (m - low) / (high - low).clamp_min(1e-6)
    wrong = {
        "You use one minimum and maximum for the whole batch; take them per image, over dim=1 with keepdim=True.": (
            (m - m.min()) / (m.max() - m.min())
        ),
        "You normalize each patch over the batch (dim=0); the map of an image is a row, dim=1.": _stretched(m, 0),
        "You divide by max − min but do not subtract the minimum first.": m / (high - low).clamp_min(1e-6),
        "You subtract the minimum but divide by the maximum; divide by max − min.": (m - low) / high,
        "Your map is upside down: the largest value must become 1, not 0.": 1 - want,
        "That is a softmax: its rows sum to 1. Here the smallest value must become 0 and the largest 1.": m.softmax(1),
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got[:3], mistake[:3], atol=1e-4), hint
    assert torch.allclose(got[:2], want[:2], atol=0.05), (
        f"Expected rows from 0 to 1, got values from {float(got[:2].min()):.2f} to {float(got[:2].max()):.2f}."
    )
    assert torch.allclose(got[:3], want[:3], atol=2e-3), (
        "A row with a small range (about 0.1) is not stretched to [0, 1]; what guards the divisor is too large."
    )
    assert (got[3] - got[3, 0]).abs().max() < 1e-6, "A constant row must stay constant; any value in [0, 1] will do."
    print("✓ each map runs from 0 to 1 on its own, and a constant map gives no NaN")


def check_gram_distance(fn: Callable[[Tensor, Tensor], Tensor], grid: int = 4, side: int = 32) -> None:
    """`fn(d, g)` is |U d| for differences d [B, N] from the Gram matrix g = UᵀU [N, N] alone, without upsampling."""
    d = torch.randn(5, grid * grid, generator=generator("exercise", "gram"))
    g = gram(grid, side)
    pixels = F.interpolate(d.view(-1, 1, grid, grid), size=(side, side), mode="bilinear", align_corners=False)
    want = torch.linalg.vector_norm(pixels, dim=(1, 2, 3))
    got = _call(fn, d, g)
    pairs = "You return all pairs [B, B]: d @ g @ d.T mixes images. Multiply by d and sum over dim=1."
    assert got.shape != (5, 5), pairs
    _require_shape(got, (5,), "one distance for each image, [B]; do not average over the batch")
    wrong = {
        "That is the squared distance; the square root is missing.": want**2,
        "That is |d| on the grid; the upsampling, which g stands for, is missing.": d.norm(dim=1),
        "That is |g d|. You want dᵀ g d under the root: multiply by d once more and sum.": (d @ g).norm(dim=1),
        "That is the root mean square over pixels; the paper's norm sums, it does not average.": want / side,
        "That is the negative distance; check the sign.": -want,
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got, mistake, rtol=1e-3), hint
    told = f"expected {want[0]:.3f} for the first image (explicit upsampling to {side}×{side}), got {got[0]:.3f}"
    assert torch.allclose(got, want, rtol=1e-4), f"Not the distance of the upsampled maps: {told}."
    zero = torch.zeros(2, grid * grid, requires_grad=True)
    (slope,) = torch.autograd.grad(_call(fn, zero, g).sum(), zero)
    assert torch.isfinite(slope).all(), (
        "At d = 0 the gradient is NaN, and training begins there: the root has no slope at 0. "
        "Use clamp_min(1e-12) under the root."
    )
    print(f"✓ equal to explicit upsampling ({side}×{side}), with a finite gradient where the maps agree")


def check_attention_attack(
    fn: Callable, clip: ZeroShotCLIP, data: ImageSet, *, eps_255: float = 4.0, n_steps: int = 20, n: int = 32
) -> None:
    """`fn` makes an objective that moves the text-guided map while the prediction stays.

    fn(map_of, logits_of, x, y) -> objective, where map_of takes images [B, 3, H, W] to maps [B, N] and logits_of takes
    them to logits [B, C]; x are the clean images, y their labels. PGD maximises objective(x_adv) [B] on up to n images
    that `clip` classifies correctly. At least four of five predictions must stay, and the map must move at least twice
    as far as under random noise of the same size, and as under PGD on an objective that knows no map.
    """
    threat = ThreatModel(eps_255)
    text_features = clip.text_features(data.class_names, data.templates)
    x, y = data.pixels().to(text_features.device), data.labels.to(text_features.device)
    with torch.no_grad():
        correct = (clip.logits(x, text_features).argmax(1) == y).nonzero()[:n, 0]
    if not len(correct):
        print(f"not judged: the model classifies no image of {data.name} correctly, so no prediction could stay")
        return
    x, y = x[correct], y[correct]

    def map_of(images):
        return text_map(clip.tokens(images), text_features[y])

    def logits_of(images):
        return clip.logits(images, text_features)

    def moved(images):
        with torch.no_grad():
            return map_distance(map_of(images), map_of(x)).mean().item()

    objective = fn(map_of, logits_of, x, y)
    got = type(objective).__name__
    assert callable(objective), f"Expected a function of x_adv, got {got}; return the inner function."

    def attacked(goal):
        return pgd(goal, x, threat, n_steps=n_steps, generators=[generator("exercise", int(i)) for i in correct])

    try:
        x_adv = attacked(objective)
    except (UserError, RuntimeError) as error:
        raise AssertionError(f"PGD cannot use your objective. {error}") from None
    noise = threat.random_start(x, [generator("exercise", "noise", int(i)) for i in correct], corner=True)
    blind = attacked(lambda images: -F.cross_entropy(logits_of(images), y, reduction="none"))  # knows no map
    with torch.no_grad():
        kept = (logits_of(x_adv).argmax(1) == y).float().mean().item()
    unit = max(moved(x + noise), 1e-12)
    ratio, floor = moved(x_adv) / unit, max(1.0, moved(blind) / unit)
    numbers = f"the map moved {ratio:.1f} times as far as under noise and {kept:.0%} of the predictions stayed"
    assert kept >= 0.8, (
        f"The prediction changes: {numbers}. That is an ordinary attack; subtract what grows when a prediction leaves "
        "its class, e.g. the cross-entropy, with a weight."
    )
    assert ratio >= 2 * floor, (
        f"The map hardly moves: {numbers}; an objective without the map reaches {floor:.1f}. Check the sign (PGD "
        "maximises, so the movement enters with a plus) and its weight."
    )
    print(f"✓ {numbers} (n = {len(x)}, ε = {eps_255:g}/255)")


def _call(fn: Callable, *args: Tensor) -> Tensor:
    got = fn(*args)
    assert got is not None, "Your function returns nothing; is the return missing?"
    kind = type(got).__name__
    assert isinstance(got, Tensor), f"Expected a tensor, got {kind}; x.min(dim) gives a pair, x.amin(dim) does not."
    return got


def _require_shape(got: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    assert got.shape == shape, f"Expected shape {list(shape)}, {meaning}; got {list(got.shape)}."


def _stretched(m: Tensor, dim: int) -> Tensor:
    low, high = m.amin(dim, keepdim=True), m.amax(dim, keepdim=True)
    return (m - low) / (high - low).clamp_min(1e-6)
