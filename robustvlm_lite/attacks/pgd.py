"""Projected gradient descent (Madry et al., 2018) over any objective, from scratch.

    x_0 = P(x + start),   x_{k+1} = P(x_k + step · direction(∇ objective(x_k)))

P and direction belong to the threat model (`threat.ThreatModel`), the objective to the caller.
"""

import math

import torch

from ..runtime import UserError, near_miss
from ..threat import Generators, ThreatModel, check_images
from .objectives import Objective, value_and_grad

STARTS = ("uniform", "corner", "zero")
KEEPS = ("best", "last")


def pgd(
    objective: Objective,
    x: torch.Tensor,
    threat: ThreatModel,
    *,
    n_steps: int = 20,
    step_255: float | None = None,
    start: str | torch.Tensor = "uniform",
    n_restarts: int = 1,
    keep: str = "best",
    generators: Generators | None = None,
) -> torch.Tensor:
    """Maximize `objective` around the images `x` [B, 3, H, W] in [0, 1]; returns x_adv, same shape and dtype, detached.

    n_steps: gradient steps; 0 returns the projected start.  step_255: step size in 1/255 units, a quarter of the
    budget if None.  start: "uniform" in the ball, a "corner" of the ball, "zero", or a perturbation [B, 3, H, W].
    n_restarts: fresh random starts, of which the best is kept per image.  keep: per image, the "last" iterate, or the
    "best" by the objective among all of them (one more forward pass).  generators: one per image, which makes the
    result independent of batch and order, or one for the batch; random starts need them.

    Parameter gradients are neither computed nor touched. The model's mode (train or eval) is the caller's business.
    Raises UserError for bad arguments, RuntimeError naming the step if the objective or its gradient is not finite.
    """
    check_images(x)
    _check_arguments(x, n_steps, step_255, start, n_restarts, keep, generators)
    if not len(x):
        return x.clone()
    step = threat.eps / 4 if step_255 is None else step_255 / 255
    # Half precision cannot hold steps of eps/4: iterate in float32, show the objective the caller's dtype.
    center = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    same = center.dtype == x.dtype
    best = _Best()
    for _ in range(n_restarts):
        x_adv = threat.project(center + _start(center, threat, start, generators), center)
        for k in range(n_steps):
            shown = x_adv if same else threat.project(x_adv, x)
            value, grad = value_and_grad(objective, shown)
            grad = grad.to(center.dtype)
            _require_finite(k, objective=value, gradient=grad)
            if keep == "best":
                best.offer(shown, value)
            x_adv = threat.project(threat.step(x_adv, grad, step), center)
        shown = x_adv if same else threat.project(x_adv, x)
        if keep == "last" and n_restarts == 1:
            return shown.detach()
        with torch.no_grad():
            value = objective(shown)
        _require_finite(n_steps, objective=value)
        best.offer(shown, value)
    return best.x.detach()


class _Best:
    """Per image, the candidate with the highest value offered so far, the latest among equals.

    Equals matter: float32 cross-entropy of a confident image is 0 at many iterates, while the gradient still leads on.
    """

    def __init__(self):
        self.x, self.value = None, None

    def offer(self, x: torch.Tensor, value: torch.Tensor) -> None:
        if self.x is None:
            self.x, self.value = x, value
            return
        better = value >= self.value
        self.x = torch.where(better[:, None, None, None], x, self.x)
        self.value = torch.where(better, value, self.value)


def _start(x: torch.Tensor, threat: ThreatModel, start, generators) -> torch.Tensor:
    if isinstance(start, torch.Tensor):
        return start.to(x)
    if start == "zero":
        return torch.zeros_like(x)
    return threat.random_start(x, generators, corner=start == "corner")


def _require_finite(step: int, **tensors: torch.Tensor) -> None:
    for name, t in tensors.items():
        if not math.isfinite(t.sum()):  # one pass and no mask as large as the images
            broken = int((~t.reshape(len(t), -1).isfinite().all(1)).sum())
            raise RuntimeError(f"pgd: {name} is NaN or infinite at step {step}, for {broken} of {len(t)} images")


def _check_arguments(x, n_steps, step_255, start, n_restarts, keep, generators) -> None:
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0:
        raise UserError(f"n_steps: expected an integer of at least 0, got {n_steps!r}; 20 is a usual choice")
    if isinstance(n_restarts, bool) or not isinstance(n_restarts, int) or n_restarts < 1:
        raise UserError(f"n_restarts: expected an integer of at least 1, got {n_restarts!r}; 1 means a single start")
    if step_255 is not None and not 0 < step_255 <= 255:
        raise UserError(f"step_255: expected a step in (0, 255] in 1/255 units, got {step_255!r}; None means eps/4")
    if keep not in KEEPS:
        raise UserError(f"keep: expected 'best' or 'last', got {keep!r}; {near_miss(str(keep), KEEPS)}")
    if isinstance(start, torch.Tensor):
        if start.shape != x.shape:
            raise UserError(f"start: expected shape {list(x.shape)}, got {list(start.shape)}; match the images")
    elif start not in STARTS:
        raise UserError(f"start: expected a tensor or one of {STARTS}, got {start!r}; {near_miss(str(start), STARTS)}")
    elif start != "zero" and generators is None:
        raise UserError(f"start={start!r} is random: expected generators, got None; pass generators= or start='zero'")
    if n_restarts > 1 and (isinstance(start, torch.Tensor) or start == "zero"):
        raise UserError(f"n_restarts: expected 1 with a fixed start, got {n_restarts}; restarts need a random start")
