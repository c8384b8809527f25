"""The exercises of the comparison: the worst case of an image, the front of cost and gain, and how many images an interval takes.

As in `exercises`, a check prints one line that begins with ✓, or raises AssertionError with a hint.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..runtime import generator
from .exercises import _require_shape


def check_worst(fn: Callable[[Tensor], Tensor]) -> None:
    """`fn(correct)` is the share of images that survive every attack, from verdicts [K, N] of K attacks on N images."""
    correct = torch.rand(4, 50, generator=generator("exercise", "worst")) < 0.8
    got = float(_answer(fn, correct.clone()))
    single = correct.float().mean(1)
    assert abs(got - single.min().item()) > 1e-6, (
        "That is the strongest attack over all images. The worst case picks an attack for each image."
    )
    assert abs(got - single.mean().item()) > 1e-6, "That is the mean over attacks. One success is enough to lose an image."
    survives = sum(all(correct[k, i] for k in range(4)) for i in range(50)) / 50
    assert abs(got - survives) < 1e-6, f"Expected {survives:.2f}, got {got:.2f}: an image survives if no attack takes it."
    print("✓ an image counts only where it survives every attack")


def check_front(fn: Callable[[Mapping[str, tuple[float, float]]], list[str]]) -> None:
    """`fn(points)` are the names that no other beats, cheapest first, from name -> (cost, gain)."""
    points = {"a": (1.0, 0.2), "b": (2.0, 0.5), "c": (3.0, 0.4), "d": (4.0, 0.9), "e": (4.0, 0.7), "f": (1.0, 0.1)}
    got = list(_answer(fn, dict(points)))
    assert "c" not in got, "c costs more than b and gives less: b beats it."
    assert "e" not in got and "f" not in got, "At the same cost only the higher gain stays on the front."
    assert set(got) == {"a", "b", "d"}, f"Expected a, b and d, got {got}: cheap points stay, even where they give little."
    assert got == ["a", "b", "d"], f"Expected the cheapest first, got {got}."
    print("✓ what is left is a choice between cost and gain, and nothing else")


def check_needed(fn: Callable[[float, float], int]) -> None:
    """`fn(share, half)` is the least number of images whose 95 % interval about a share reaches at most `half` either way."""
    for share, half in ((0.5, 0.05), (0.3, 0.02), (0.9, 0.01)):
        got = _answer(fn, share, half)
        _require_shape(torch.as_tensor(got), (), "one number")
        spread = share * (1 - share)
        assert abs(float(got) - (1.96 / half) * spread**0.5) > 2, "Squares are missing: the error falls with the root of n."
        assert float(got) == int(got), f"Expected a whole number of images, got {got}; round up."
        wide = 1.96 * (spread / (int(got) - 1)) ** 0.5
        assert 1.96 * (spread / int(got)) ** 0.5 <= half * (1 + 1e-9), f"With {int(got)} images the interval is still wider than {half}."
        assert wide > half * (1 - 1e-9), f"{int(got)} images are more than are needed for ±{half} about {share}."
    print("✓ half the width takes four times the images")


def _answer(fn: Callable, *args):
    got = fn(*args)
    assert got is not None, "Your function returns nothing; is the return missing?"
    return got
