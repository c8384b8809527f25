"""The exercises of the chapters on prompt tuning: divergences, whom to trust, and what a map's loss can see.

As in `exercises`, a check prints one line that begins with ✓, or raises AssertionError with a hint.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import generator
from .exercises import _call, _require_shape


def check_divergence(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`fn(target, logits)` is KL(softmax(target) || softmax(logits)) of each image, [B], from logits [B, C]."""
    g = generator("exercise", "divergence")
    target, logits = (2 * torch.randn(4, 7, generator=g) for _ in range(2))
    p, q = target.softmax(1), logits.softmax(1)
    want = (p * (p / q).log()).sum(1)
    got = _call(fn, target.clone(), logits.clone())
    assert got.shape != (), "One number for the batch; the loss weighs each image by its own alpha, so keep [B]."
    _require_shape(got, (4,), "one divergence for each image, [B]; sum over classes only")
    wrong = {
        "The other way round: that is KL(logits || target). F.kl_div takes the prediction first.": (q * (q / p).log()).sum(1),
        "You average over classes, which weighs the term by 1 / C; sum over dim=1.": want / 7,
        "That is the cross-entropy of soft labels; the target's own entropy is missing.": -(p * q.log()).sum(1),
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got, mistake, atol=1e-4), hint
    told = f"expected {want[0]:.3f} for the first image, got {float(got[0]):.3f}"
    assert torch.allclose(got, want, atol=1e-4), f"Not the divergence: {told}."
    print("✓ the target first, summed over classes, one value an image")


def check_reliability(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`fn(frozen_loss, tuned_loss)` is p_fz / (p_fz + p_tr) of the true class, [B], from cross-entropies [B]."""
    p, q = torch.tensor([0.8, 0.5, 0.05, 0.9]), torch.tensor([0.2, 0.5, 0.9, 0.99])
    want = p / (p + q)
    got = _call(fn, -p.log(), -q.log())
    _require_shape(got, (4,), "one weight for each image, [B]")
    wrong = {
        "That is the tuned model's share; the weight belongs to the frozen one.": 1 - want,
        "That is a ratio of losses (reading A3); A1 is a ratio of probabilities, and p = exp(-loss).": q.log() / (p.log() + q.log()),
        "That is the frozen model's probability alone (reading A2).": p,
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got, mistake, atol=1e-4), hint
    assert torch.allclose(got, want, atol=1e-4), f"Expected {want[0]:.3f} for p = 0.8 and 0.2, got {float(got[0]):.3f}."
    hopeless = _call(fn, torch.tensor([200.0, 201.0]), torch.tensor([200.0, 200.0]))
    lost = "exp(-200) is 0 in float32, and 0 / 0 is NaN: divide by p_fz, and a function of the difference of losses is left."
    assert torch.isfinite(hopeless).all(), lost
    assert torch.allclose(hopeless, torch.tensor([0.5, 1 / (1 + torch.e)]), atol=1e-4), lost
    print("✓ a sigmoid of the difference of two cross-entropies, which no loss is too large for")


def check_trust(fn: Callable[[Tensor, Tensor], Tensor], frozen: Tensor, tuned: Tensor, y: Tensor) -> None:
    """`fn(frozen, tuned)` weighs the frozen model by clean logits [B, C] alone, [B] in [0, 1]; labels only judge it."""
    got = _call(fn, frozen.clone(), tuned.clone())
    _require_shape(got, (len(y),), "one weight for each image, [B]")
    assert 0 <= got.min() and got.max() <= 1, f"Expected weights in [0, 1], got {float(got.min()):.2f} to {float(got.max()):.2f}."
    sure = 20 * F.one_hot(torch.tensor([0, 1]), 4).float()
    high, low = (_call(fn, a, b).mean().item() for a, b in ((sure, 0 * sure), (0 * sure, sure)))
    assert high > low, f"Where the frozen model alone is sure the weight is {high:.2f}, where the tuned one is, {low:.2f}."
    right = {name: (z.argmax(1) == y) for name, z in (("frozen", frozen), ("tuned", tuned))}
    only = {name: got[right[name] & ~right[other]] for name, other in (("frozen", "tuned"), ("tuned", "frozen"))}
    told = ", ".join(f"{w.mean():.2f} where {name} alone is right (n = {len(w)})" for name, w in only.items() if len(w))
    print(f"✓ a weight in [0, 1] without labels; mean {got.mean():.2f}{', ' + told if told else ''}")


def check_signed_split(fn: Callable[[Tensor], Tensor]) -> None:
    """`fn(a)` makes of signed maps [B, N] distributions [B, 2 N]: positive parts, then negative ones, over their sum."""
    a = torch.tensor([[0.3, -0.1, 0.0, 0.6], [-0.2, -0.2, 0.4, 0.0]])
    want = torch.cat([a.clamp_min(0), (-a).clamp_min(0)], 1) / a.abs().sum(1, keepdim=True)
    got = _call(fn, a.clone())
    assert got.shape != a.shape, "Positive and negative evidence of a token are two places, so that a sign change shows: [B, 2 N]."
    _require_shape(got, (2, 8), "positive parts, then negative parts of each map, [B, 2 N]")
    wrong = {
        "Rows must sum to 1: divide by the sum of absolute values.": torch.cat([a.clamp_min(0), (-a).clamp_min(0)], 1),
        "You normalize the halves one by one; how much is for and against a class would be lost.": torch.cat(
            [h / h.sum(1, keepdim=True) for h in (a.clamp_min(0), (-a).clamp_min(0))], 1
        ),
        "A softmax over raw attributions is flat, and its KL sees nothing; split by sign and divide.": torch.cat([a, -a], 1).softmax(1),
        "Negative parts come first; positive ones do.": want.roll(4, 1),
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got, mistake, atol=1e-4), hint
    assert torch.allclose(got, want, atol=1e-3), f"Expected {want[0].tolist()} for the first map, got {got[0].tolist()}."
    print("✓ both signs kept, each map a distribution")


def check_projection(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`fn(z_v, z_t)` is the gradient of cos(z_v, z_t) in z_t, [B, D], for image features of length 1."""
    g = generator("exercise", "projection")
    z_v, z_t = F.normalize(torch.randn(3, 6, generator=g), dim=1), 3 * torch.randn(3, 6, generator=g)
    leaf = z_t.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.cosine_similarity(z_v, leaf, dim=1).sum(), leaf)
    got = _call(fn, z_v.clone(), z_t.clone())
    _require_shape(got, (3, 6), "a gradient as long as z_t for each pair, [B, D]")
    own = F.normalize(z_t, dim=1)
    wrong = {
        "The length of z_t is missing: a longer text feature turns more slowly.": want * z_t.norm(dim=1, keepdim=True),
        "That is the gradient of the dot product; take off the part along z_t.": z_v / z_t.norm(dim=1, keepdim=True),
        "The sign is reversed.": -want,
        "That is the part along z_t; the gradient is what is left without it.": (z_v * own).sum(1, keepdim=True) * own,
    }
    for hint, mistake in wrong.items():
        assert not torch.allclose(got, mistake, atol=1e-4), hint
    assert torch.allclose(got, want, atol=1e-4), f"Expected {want[0, 0]:.3f} as the first entry, got {float(got[0, 0]):.3f}."
    doubled = _call(fn, 2 * z_v, z_t)
    assert torch.allclose(doubled, 2 * got, atol=1e-4), "It must be linear in the image feature: do not normalize z_v again."
    print("✓ linear in the image feature: what the text map sees of an image is a projection of it")


def check_flatter(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`fn(a, b)` compares maps [B, N] of clean and attacked images, [B]: 0 for equal ones, unmoved by both shrinking."""
    g = generator("exercise", "flatter")
    a = torch.randn(4, 9, generator=g)
    b = a + 0.3 * torch.randn(4, 9, generator=g)
    got = _call(fn, a, b)
    _require_shape(got, (4,), "one distance for each image, [B]")
    assert torch.isfinite(got).all() and (got > 0).all(), "Different maps must have a positive, finite distance."
    assert torch.allclose(_call(fn, a, a), torch.zeros(4), atol=1e-3), "Equal maps must have distance 0."
    small = _call(fn, 0.01 * a, 0.01 * b)
    told = f"from {float(got[0]):.4f} to {float(small[0]):.4f}"
    assert torch.allclose(small, got, rtol=0.05), f"A hundredth of both maps changes your distance {told}: flat maps would satisfy it."
    assert (_call(fn, a, -a) > _call(fn, a, b)).all(), "Evidence that turns its sign must count as a large change."
    print("✓ a distance that flat maps cannot satisfy")


def check_paired_over_seeds(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`fn(a, b)` is [2], the mean difference and its standard error over images, of verdicts [S, N] under S tunings."""
    g = generator("exercise", "paired over seeds")
    hard = torch.rand(1, 60, generator=g)  # an image is hard for everybody: its verdicts under several tunings go together
    a, b = (torch.rand(3, 60, generator=g) < (0.2 + 0.6 * hard + shift) for shift in (0.15, 0.0))
    d = a.double().mean(0) - b.double().mean(0)
    want = (d.mean(), (d - d.mean()).square().sum().div(59).sqrt() / 60**0.5)
    got = _call(fn, a.clone(), b.clone())
    _require_shape(got, (2,), "two numbers, the difference and its standard error")
    value, error = got.tolist()
    assert abs(value - want[0]) < 1e-4, f"Expected a difference of {want[0]:.4f}, got {value:.4f}: a minus b, over all verdicts."
    each = a.double() - b.double()
    apart = sum((side.double().mean(0).var() / 60 for side in (a, b)), torch.zeros(())).sqrt()
    wrong = {
        "You counted each tuning's verdict as an image of its own; average over the seeds first.": each.std() / each.numel() ** 0.5,
        "That is the spread of one image's difference; the mean of N images has it divided by the root of N.": want[1] * 60**0.5,
        "You took the two methods for independent; they answered the same images, so take the difference first.": apart,
    }
    for hint, mistake in wrong.items():
        assert abs(error - float(mistake)) > 1e-4, hint
    assert abs(error - want[1]) < 2e-3, f"Expected a standard error of {want[1]:.4f}, got {error:.4f}."
    print("✓ seeds averaged, then images taken as the sample: three answers to one image are not three images")
