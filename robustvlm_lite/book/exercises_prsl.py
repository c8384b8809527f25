"""Checks of chapter 08's exercises: each tries an answer on cases that a plausible mistake gets wrong."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..defenses.prsl import PrslConfig
from ..runtime import UserError, generator


def check_bound(fn: Callable[[int], float]) -> None:
    """fn(n): the least value of R1 over n positions."""
    for n in (1, 2, 12, 100):
        same = torch.zeros(1, n, 6, dtype=torch.float64)
        want = PrslConfig(end=4).penalty(same, torch.zeros(1, n, dtype=torch.long)).item()
        if abs(float(fn(n)) - want) > 1e-9:
            raise UserError(f"expected {want:.4f} for {n} positions, got {float(fn(n)):.4f}; what is a softmax over n equal numbers?")
    print("right: n ln n, and 0 for a single token")


def check_centered(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(z [N, V], targets [N]): R1 (K = 4) of logits that offsets of single positions cannot move."""
    z = torch.randn(7, 9, dtype=torch.float64, generator=generator("exercise", 1))
    targets = torch.arange(7)
    moved = z + torch.randn(7, 1, dtype=torch.float64, generator=generator("exercise", 2))
    if not torch.allclose(fn(z, targets), fn(moved, targets)):
        raise UserError("expected one value for logits that differ by a number at each position; take out each position's mean")
    want = PrslConfig().penalty((z - z.mean(1, keepdim=True))[None], targets[None])
    if not torch.allclose(fn(z, targets), want):
        raise UserError(f"expected {want:.4f}, the released reading on centered logits, got {fn(z, targets):.4f}; drop the target first")
    print("right: probabilities decide it now")


def check_floor(fn: Callable[[list[str], list[str]], float]) -> None:
    """fn(attacked, clean): share of attacked texts equal to the clean one, corrected by the share equal to the next image's."""
    cases = {
        "a captioner that always says the same": (["a"] * 4, ["a"] * 4, 0.0),
        "a captioner that no attack moved": (list("abcd"), list("abcd"), 1.0),
        "half of the texts kept": (["a", "b", "x", "y"], list("abcd"), 0.5),
        "two texts kept, one that became the next image's": (["a", "b", "d", "x"], list("abcd"), 1 / 3),
    }
    for name, (attacked, clean, want) in cases.items():
        got = float(fn(attacked, clean))
        if abs(got - want) > 1e-9:
            raise UserError(f"{name}: expected {want:g}, got {got:g}; (score - floor) / (1 - floor), and 0 without room")
    print("right: sameness earns nothing")
