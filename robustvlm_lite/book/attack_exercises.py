"""Exercises of the chapters on attacks and on sound evaluation; how a check answers stands in `exercises`."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import cross_entropy, get_attack, pgd
from ..data import ImageSet
from ..runtime import UserError, generator
from ..stats import paired_shares
from ..threat import ThreatModel
from .exercises import _call, _require_shape


def check_project_l2(fn: Callable[[Tensor, float], Tensor], eps: float = 2.0) -> None:
    """`fn(delta, eps)` brings each perturbation [B, 3, H, W] into the Euclidean ball of radius `eps`."""
    delta = torch.randn(4, 3, 6, 6, generator=generator("exercise", "l2"))
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta = delta / length * eps * torch.tensor([0.25, 0.9, 1.5, 6.0]).view(-1, 1, 1, 1)  # two inside, two outside
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    want = delta * (eps / length).clamp(max=1)
    got = _call(fn, delta.clone(), eps)
    _require_shape(got, tuple(delta.shape), "a perturbation like the one you were given")
    wrong = {
        "You bring every perturbation to the surface; one that lies inside must stay.": delta * eps / length,
        "You clamp each value: that is the ball of the maximum norm. Scale the whole perturbation.": delta.clamp(-eps, eps),
        "You measure the length of the whole batch; each image has its own.": delta * min(1.0, eps / float(delta.norm())),
        "You divide by the squared length; take its root.": delta * (eps / length**2).clamp(max=1),
        "You measure the length along the channels only; take it over all values of an image.": (
            delta * (eps / delta.norm(dim=1, keepdim=True)).clamp(max=1)
        ),
    }
    _refuse(got, want, wrong)
    long = float(got.flatten(1).norm(dim=1).max())
    assert torch.allclose(got, want, atol=1e-4), f"Not the projection: the longest result is {long:.3f}, allowed {eps:g}."
    zero = _call(fn, torch.zeros(1, 3, 6, 6), eps)
    assert zero.isfinite().all(), "A perturbation of zero gives NaN: its length divides. Use clamp_min."
    print("✓ what lies outside is shrunk to the surface, image by image; what lies inside stays")


def check_best_gain(fn: Callable[[Tensor, float, str], Tensor], eps: float = 0.03) -> None:
    """`fn(g, eps, norm)` is the largest g · delta over the ball of radius `eps`, [B], for "linf" and "l2"."""
    g = torch.randn(5, 3, 8, 8, generator=generator("exercise", "dual"))
    flat = g.flatten(1)
    for norm, dual in (("linf", 1), ("l2", 2)):
        want = eps * torch.linalg.vector_norm(flat, ord=dual, dim=1)
        got = _call(fn, g.clone(), eps, norm)
        _require_shape(got, (5,), "one gain for each image, [B]; do not average over the batch")
        other = eps * torch.linalg.vector_norm(flat, ord=3 - dual, dim=1)
        wrong = {
            f"{norm}: that is the gain of the other ball. The dual of the maximum norm is the sum of sizes.": other,
            f"{norm}: you take the largest slope alone; in this ball other pixels add to it.": eps * flat.abs().amax(1),
            f"{norm}: that is the dual norm of g; the budget is missing.": want / eps,
            f"{norm}: you average over the pixels; their gains add up.": want / flat.shape[1],
            f"{norm}: you sum signed slopes. The perturbation takes the sign of each, so sizes count.": eps * flat.sum(1),
        }
        _refuse(got, want, wrong)
        told = f"expected {want[0]:.4f} for the first image, got {float(got[0]):.4f}"
        assert torch.allclose(got, want, rtol=1e-4), f"{norm}: not the largest gain: {told}."
        step = ThreatModel(255 * eps, norm).step(torch.zeros_like(g), g, eps)  # reaches the bound
        assert torch.allclose((g * step).flatten(1).sum(1), want, rtol=1e-4)
    print("✓ equal to what the steepest step of each ball gains on a plane")


def check_objective(fn: Callable, model: nn.Module, data: ImageSet, *, eps_255: float, n_steps: int = 10) -> None:
    """`fn(model, y)` makes an objective for PGD; it meets cross-entropy on the same images and starts.

    No verdict is wrong but one: an objective under which more images stay right than under noise points the wrong way.
    """
    threat, x, y = ThreatModel(eps_255), data.pixels(), data.labels
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x, y = x.to(device), y.to(device)
    starts = [("exercise", "objective", i) for i in range(len(x))]

    def right(x_adv: Tensor) -> np.ndarray:
        with torch.no_grad():
            return (model(x_adv).argmax(1) == y).cpu().numpy()

    def attacked(objective) -> np.ndarray:
        return right(pgd(objective, x, threat, n_steps=n_steps, generators=[generator(*key) for key in starts]))

    yours = fn(model, y)
    got = type(yours).__name__
    assert callable(yours), f"Expected a function of x_adv, got {got}; return the inner function."
    try:
        mine = attacked(yours)
    except (UserError, RuntimeError) as error:
        raise AssertionError(f"PGD cannot use your objective. {error}") from None
    theirs = attacked(cross_entropy(model, y))
    noise = right(get_attack("noise-corner").run(model, x, y, threat, starts))
    diff, low, high = (100 * v for v in paired_shares(mine, theirs))
    told = f"cross-entropy leaves {100 * theirs.mean():.1f} %, yours {100 * mine.mean():.1f} %, noise {100 * noise.mean():.1f} %"
    helps_the_model = paired_shares(mine, noise)[1] > 0
    assert not helps_the_model, f"Your objective helps the model: {told}. PGD maximizes; check the sign."
    verdict = "stronger" if high < 0 else "weaker" if low > 0 else "no measurable difference"
    print(f"✓ {told} (n = {len(x)}, PGD-{n_steps}, ε = {eps_255:g}/255)")
    print(f"  yours minus cross-entropy: {diff:+.1f} points [{low:.1f}, {high:.1f}]: {verdict}")


def check_worst_case(fn: Callable[[Tensor], Tensor]) -> None:
    """`fn(right)` is the worst-case accuracy of verdicts right [A, N] (bool) of A attacks on N images, a scalar."""
    right = torch.rand(3, 40, generator=generator("exercise", "worst")) < torch.tensor([[0.6], [0.5], [0.7]])
    want = right.all(0).float().mean()
    got = _call(fn, right.clone())
    assert got.ndim == 0, f"Expected one number, got a tensor of shape {list(got.shape)}; average over the images."
    wrong = {
        "That is the smallest accuracy of a table. Another attack may turn other images: combine image by image first.": (
            right.float().mean(1).amin()
        ),
        "An image counts as right only if no attack turns it; you ask for any attack that fails.": (
            right.any(0).float().mean()
        ),
        "You average over the attacks; an attacker would not.": right.float().mean(),
        "That is the share that falls; the accuracy is what is left.": 1 - want,
        "You multiply accuracies, as if attacks were independent; they fail on the same images.": right.float().mean(1).prod(),
    }
    _refuse(got.float(), want, wrong)
    assert torch.isclose(got.float(), want), f"Expected {want:.3f} for these verdicts, got {float(got):.3f}."
    print("✓ an image is right only if it stays right under every attack")


def check_paired_error(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`fn(a, b)` is the standard error of mean(a) - mean(b) for verdicts a, b [N] (bool) on the same images."""
    g = generator("exercise", "paired")
    a = torch.rand(200, generator=g) < 0.6
    b = torch.where(torch.rand(200, generator=g) < 0.85, a, torch.rand(200, generator=g) < 0.4)
    d, n = a.double() - b.double(), len(a)
    want = (d.square().mean() - d.mean() ** 2).sqrt() / n**0.5
    got = _call(fn, a.clone(), b.clone())
    assert got.ndim == 0, f"Expected one number, got a tensor of shape {list(got.shape)}."
    pa, pb = a.double().mean(), b.double().mean()
    apart = ((pa * (1 - pa) + pb * (1 - pb)) / n).sqrt()
    wrong = {
        "That is the error of two independent samples. These are the same images: take the spread of a - b.": apart,
        "That is the spread of one image's difference; divide by the root of n.": want * n**0.5,
        "That is the variance; take its root.": want**2,
        "You divide by n instead of its root.": want / n**0.5,
        "You add the two errors; what both share cancels in the difference.": (
            (pa * (1 - pa) / n).sqrt() + (pb * (1 - pb) / n).sqrt()
        ),
    }
    for hint, mistake in wrong.items():
        assert not torch.isclose(got.double(), mistake, rtol=1e-2), hint
    told = f"expected {want:.4f}, got {float(got):.4f}"
    assert torch.isclose(got.double(), want, rtol=1e-2), f"Not the standard error of the difference: {told}."
    print(f"✓ {want:.4f}, against {apart:.4f} if the images had been others")


def check_unmasked(fn: Callable, masked: nn.Module, data: ImageSet, *, eps_255: float, n_steps: int = 10) -> None:
    """`fn(masked)` is what the attacker differentiates in place of `masked`; its attack must beat noise.

    PGD on that module is judged on `masked` itself, beside PGD through the mask and beside noise of the same size.
    """
    threat, attack = ThreatModel(eps_255), get_attack(f"pgd-{n_steps}")
    device = next((p.device for p in masked.parameters()), torch.device("cpu"))
    x, y = data.pixels().to(device), data.labels.to(device)
    keys = [("exercise", "unmasked", i) for i in range(len(x))]
    surface = fn(masked)
    kind = type(surface).__name__
    assert isinstance(surface, nn.Module), f"Expected a torch module from pixels to logits, got {kind}."

    def left(by: nn.Module | None) -> np.ndarray:
        chosen = attack if by is not None else get_attack("noise-corner")
        x_adv = chosen.run(masked if by is None else by, x, y, threat, keys)
        with torch.no_grad():
            return (masked(x_adv).argmax(1) == y).cpu().numpy()

    try:
        yours = left(surface)
    except (ValueError, RuntimeError) as error:
        raise AssertionError(f"PGD cannot use your module. {error}") from None
    through, noise = left(masked), left(None)
    told = f"through the mask {100 * through.mean():.1f} % stay right, noise leaves {100 * noise.mean():.1f} %"
    numbers = f"{told}, your surface {100 * yours.mean():.1f} % (n = {len(x)}, ε = {eps_255:g}/255)"
    if not noise.any():
        print(f"not judged: {numbers}; nothing is left to attack")
        return
    assert yours.mean() < noise.mean(), (
        f"No better than noise: {numbers}. Does a gradient reach the pixels? Look at attacks.zero_gradient_share, and let "
        "the backward pass skip the step that has none."
    )
    print(f"✓ {numbers}")


def _refuse(got: Tensor, want: Tensor, wrong: dict[str, Tensor]) -> None:
    """The hint of the mistake that `got` equals, unless it is the right answer here, too."""
    for hint, mistake in wrong.items():
        same = got.shape == mistake.shape and torch.allclose(got, mistake, rtol=1e-3, atol=1e-7)
        assert not same or torch.allclose(mistake, want, rtol=1e-3, atol=1e-7), hint
