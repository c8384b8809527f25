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


def check_map_iou(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`fn(m, masks)` is the overlap [B] of maps m [B, H, W] with object masks [B, H, W] (bool).

    The map's region is its highest pixels, as many as the mask has. Intersection over union of the two.
    """
    g = generator("exercise", "iou")
    m = torch.rand(4, 12, 12, generator=g) * torch.tensor([1.0, 0.3, 5.0, 1.0])[:, None, None]
    masks = torch.zeros(4, 12, 12, dtype=torch.bool)
    for i, side in enumerate((3, 6, 9, 5)):
        masks[i, 1 : 1 + side, 2 : 2 + side] = True
    m = m + masks * m.amax(dim=(1, 2), keepdim=True) * 0.4  # a map that knows a little of the object
    m[3] = masks[3] * (1.0 + m[3])  # and one that is exactly right
    got = _call(fn, m.clone(), masks)
    _require_shape(got, (4,), "one overlap for each image, [B]; do not average over the batch")
    area, flat, object_ = masks.sum(dim=(1, 2)), m.flatten(1), masks.flatten(1)
    chosen = torch.stack([row >= row.topk(int(k)).values[-1] for row, k in zip(flat, area, strict=True)])
    pooled = (m.flatten() >= m.flatten().topk(int(area.sum())).values[-1]).view(4, -1)
    lowest = torch.stack([row <= -(-row).topk(int(k)).values[-1] for row, k in zip(flat, area, strict=True)])
    both = (chosen & object_).sum(1)
    want = both / (chosen | object_).sum(1)
    wrong = {
        "You threshold at a fixed value; take as many pixels as the mask has, e.g. with topk or by rank.": (
            _overlap(flat > 0.5, object_)
        ),
        "You rank all pixels of the batch together; each map against its own mask.": _overlap(pooled, object_),
        "You take the lowest pixels; sort in descending order.": _overlap(lowest, object_),
        "That is the covered share of the object (with equal areas, also Dice); divide by the union.": both / area,
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got.float(), mistake.float(), atol=1e-3) or torch.allclose(mistake, want), hint
    told = f"expected {want[0]:.3f} for the first image, got {float(got[0]):.3f}"
    assert torch.allclose(got.float(), want, atol=1e-3), f"Not the intersection over union: {told}."
    print("✓ each map's highest pixels, as many as its object has, against the object's own mask")


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


def _overlap(chosen: Tensor, masks: Tensor) -> Tensor:
    return (chosen & masks).sum(1) / (chosen | masks).sum(1)
