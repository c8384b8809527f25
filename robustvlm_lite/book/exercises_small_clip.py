"""The exercises of chapter 10, on the loss that the bundled CLIPs were trained with and on when to trust an answer.

As in `exercises`, a check prints one line that begins with ✓, or raises AssertionError with a hint.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import generator
from ..stats import wilson
from .exercises import _call, _require_shape


def check_own_set_loss(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """`fn(z, y, image_set, text_set)` is the mean cross-entropy of images over the captions of their own label set.

    z: logits [B, T]; y: index of the right caption [B]; image_set [B] and text_set [T]: the label set of each.
    """
    g = generator("exercise", "own set")
    image_set, text_set = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1, 0, 1, 0])
    y = torch.tensor([0, 2, 4, 2, 3, 1])
    z = 3 * torch.randn(6, 5, generator=g)
    own = image_set[:, None] == text_set
    each = torch.stack([F.cross_entropy(row[m], m[:c].sum()) for row, m, c in zip(z, own, y.tolist(), strict=True)])
    want, got = each.mean(), _call(fn, z.clone(), y, image_set, text_set)
    _require_shape(got, (), "one number, the mean over the images")
    inverted = "The right caption is masked out: hide the captions whose set is NOT the image's own."
    assert torch.isfinite(got), inverted
    wrong = {
        "All captions compete: hide those of other sets, with -inf before the softmax.": F.cross_entropy(z, y),
        "A logit of 0 still competes, e⁰ is 1: hide the captions of other sets with -inf.": F.cross_entropy(z * own, y),
        "That is the sum over the images; divide by their number.": each.sum(),
        "You average over the sets; each image counts the same.": (each[:4].mean() + each[4:].mean()) / 2,
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got.float(), mistake, atol=1e-4), hint
    told = f"expected {want:.3f}, got {float(got):.3f}"
    assert torch.allclose(got.float(), want, atol=1e-4), f"Not the mean over images of their own set's loss: {told}."
    print("✓ captions of other sets have no say, and each image counts the same")


def check_loss_floor(fn: Callable[[Tensor], Tensor]) -> None:
    """`fn(labels)` is the lowest value of CLIP's in-batch loss for a batch with class labels [B]."""
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    times = labels.bincount()
    each = times[labels].float()
    want = each.log().mean()
    got = _call(fn, labels)
    _require_shape(got, (), "one number, a mean over the batch")
    wrong = {
        "That is the mean over classes; the loss is a mean over images, and a class counts as often as it occurs.": (
            times.float().log().mean()
        ),
        "You take the log of the mean; the loss is a mean of logs.": each.mean().log(),
        "You count the other images alone; the image's own pair shares its probability too.": (
            (each - 1).clamp_min(1).log().mean()
        ),
        "Cross-entropy uses the natural logarithm.": each.log2().mean(),
        "A batch in which captions repeat cannot reach zero: equal captions share the probability.": torch.zeros(()),
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got.float(), mistake, atol=1e-4), hint
    told = f"expected {want:.3f} for the labels {labels.tolist()}, got {float(got):.3f}"
    assert torch.allclose(got.float(), want, atol=1e-4), f"Not the lowest value: {told}."
    print("✓ the lowest value: the mean over images of the log of how often their caption occurs")


def check_trust(fn: Callable[[Tensor], Tensor], z: Tensor, labels: Tensor) -> None:
    """`fn(z)` says from logits z [N, C] alone how much each answer can be trusted, [N]; only its order counts.

    Prints how often the more trusted half of the answers is right, beside the order by the largest probability.
    """
    got = _call(fn, z.clone())
    _require_shape(got, (len(z),), "one score for each image")
    if len(z) < 2:
        print("not judged: one answer has no halves")
        return
    assert got.unique().numel() > 1, "All scores are equal: nothing is told apart."
    right = z.argmax(1) == labels
    halves = {name: right[score.argsort(stable=True)].chunk(2) for name, score in (
        ("yours", got), ("the largest probability", z.softmax(1).amax(1)))}  # fmt: skip
    less, more = halves["yours"]
    sure_less, sure_more = (wilson(int(half.sum()), len(half)) for half in (less, more))
    assert sure_more[1] >= sure_less[0], "The half that you trust less is right more often: turn the sign of the score."
    told = "; ".join(
        f"by {name} {100 * more.float().mean():.1f} % and {100 * less.float().mean():.1f} %"
        for name, (less, more) in halves.items()
    )
    print(f"✓ right in the trusted and in the other half: {told} (n = {len(z)})")
