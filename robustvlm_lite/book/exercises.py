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
from ..stats import paired_shares
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


def check_ensemble(fn: Callable[[Tensor], Tensor]) -> None:
    """`fn(raw)` makes text features [C, D] of unit length from raw ones [T, C, D], one for each template and class.

    Every template counts the same: each feature is brought to unit length, then averaged, then brought there again.
    """
    g = generator("exercise", "ensemble")
    raw = torch.randn(4, 5, 8, generator=g) * torch.tensor([0.5, 1.0, 2.0, 9.0])[:, None, None]
    unit = F.normalize(raw, dim=2)
    want = F.normalize(unit.mean(0), dim=1)
    got = _call(fn, raw.clone())
    classes = "That is one feature for each template: you average over the classes. Average over dim=0."
    assert got.shape != (4, 8), classes
    _require_shape(got, (5, 8), "one feature for each class, [C, D]")
    wrong = {
        "The mean of unit vectors is shorter than 1: bring it to unit length again.": unit.mean(0),
        "Templates with long vectors drown the others: bring each to unit length before you average.": (
            F.normalize(raw.mean(0), dim=1)
        ),
        "Nothing is of unit length; a cosine needs it before and after the mean.": raw.mean(0),
        "You divide along another axis: the length of a feature is taken over D, the last one.": (
            F.normalize(F.normalize(raw, dim=1).mean(0), dim=1)
        ),
        "That is a single template; the mean over all of them is asked.": unit[0],
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got.float(), mistake, atol=1e-4), hint
    told = f"expected {want[0, 0]:.3f} as the first number, got {float(got[0, 0]):.3f}"
    assert torch.allclose(got.float(), want, atol=1e-4), f"Not the ensemble: {told}."
    print("✓ each template counts the same, and each class has a feature of unit length")


def check_folded(fn: Callable, clip: ZeroShotCLIP) -> None:
    """`fn(weight, mean, std)` folds the normalization of pixels into the patch filters.

    weight [W, 3, p, p], mean and std [3] -> (weight', bias [W]), so that a convolution of plain pixels with them gives
    what `weight` gives on normalized pixels.
    """
    weight, mean, std = clip.visual.conv1.weight.detach(), clip.mean.flatten(), clip.std.flatten()
    side = weight.shape[-1]
    x = torch.rand(2, 3, 2 * side, 2 * side, generator=generator("exercise", "folded")).to(weight)

    def patches(w, b=None, images=x):
        return F.conv2d(images, w, b, stride=side)

    want = patches(weight, images=(x - clip.mean) / clip.std)
    folded = fn(weight.clone(), mean.clone(), std.clone())
    pair = isinstance(folded, tuple | list) and len(folded) == 2
    assert pair, f"Expected two tensors, weight and bias; got {type(folded).__name__}."
    w, b = folded
    assert w.shape == weight.shape, f"Expected a weight of shape {list(weight.shape)}, got {list(w.shape)}."
    assert b.shape == weight.shape[:1], (
        f"Expected a bias for each filter, {list(weight.shape[:1])}; got {list(b.shape)}."
    )
    std4, mean4 = std.view(3, 1, 1), mean.view(3, 1, 1)
    right = weight / std4, -(weight / std4 * mean4).sum(dim=(1, 2, 3))
    wrong = {
        "The weight is right and the bias has the wrong sign: the mean is subtracted.": (right[0], -right[1]),
        "The bias is missing: the mean contributes the same to every patch.": (right[0], torch.zeros_like(b)),
        "The std is missing: each channel of the weight is divided by its own.": (
            weight,
            -(weight * mean4).sum((1, 2, 3)),
        ),
        "You multiply by std; normalizing divides by it.": (weight * std4, -(weight * std4 * mean4).sum((1, 2, 3))),
        "The bias forgets that the weight changed: use the divided weight in it.": (
            right[0],
            -(weight * mean4).sum((1, 2, 3)),
        ),
    }
    scale = want.abs().max()
    for hint, (mw, mb) in wrong.items():
        same = torch.allclose(w, mw, atol=1e-5) and torch.allclose(b, mb, atol=1e-5 * scale)
        assert not same or torch.allclose(mb, right[1], atol=1e-5 * scale), hint
    off = ((patches(w, b) - want).abs().max() / scale).item()
    assert off < 1e-4, f"Not the same patches: the largest difference is {off:.1e} of the largest value."
    print(f"✓ plain pixels give the same patch vectors (largest difference {off:.1e} of the largest value)")


def check_templates(templates, clip: ZeroShotCLIP, tried: ImageSet, held: ImageSet, *, final: bool = False) -> None:
    """Do the reader's templates beat the bare class name? Measured on `tried`, to choose by; on `held` too if `final`.

    templates: a list of texts with {} for the class name. Prints accuracies and a paired interval, on `held` if it was
    looked at; no verdict is wrong, an unusable list is.
    """
    listed = isinstance(templates, list | tuple) and all(isinstance(t, str) for t in templates)
    assert listed and templates, (
        "Expected a list of texts, e.g. ['a photo of a {}.']; one text alone goes into a list too."
    )
    unfilled = [t for t in templates if t.count("{}") != 1]
    assert not unfilled, (
        f"{unfilled[0]!r}: the class name goes where {{}} stands, once; without it all classes read the same."
    )
    found = {}
    for images in (tried, held) if final else (tried,):
        for name, texts in (("yours", templates), ("the bare name", ["{}"])):
            try:
                model = clip.classifier(images.class_names, texts)
            except UserError as error:
                raise AssertionError(f"The text tower cannot read them: {error}") from None
            with torch.no_grad():
                answers = torch.cat(
                    [model(part.to(clip.device)).argmax(1).cpu() for part in images.pixels().split(128)]
                )
            found[images.split, name] = (answers == images.labels).numpy()
    judged = held if final else tried
    diff, low, high = paired_shares(found[judged.split, "yours"], found[judged.split, "the bare name"])
    told = "; ".join(f"{split}: {name} {100 * right.mean():.1f} %" for (split, name), right in found.items())
    verdict = "better" if low > 0 else "worse" if high < 0 else "no measurable difference"
    print(f"✓ {told}")
    print(
        f"  on {judged.split}: {100 * diff:+.1f} points [{100 * low:.1f}, {100 * high:.1f}], n = {len(judged)}: {verdict}"
    )


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
