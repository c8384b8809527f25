"""Adam on a perturbation that is written as a tanh (after Carlini and Wagner, 2017), over any objective."""

import torch
from torch import Tensor

from ..runtime import UserError
from ..threat import ThreatModel, check_images
from .objectives import Objective, value_and_grad


def adam_tanh(objective: Objective, x: Tensor, threat: ThreatModel, *, n_steps: int = 20, lr: float = 0.3) -> Tensor:
    """Maximize `objective` over x + ε tanh(w), from w = 0; the best iterate of each image, projected, detached.

    Where sign steps jump between corners of the ball, Adam moves by the size of the gradient: another road for gradients
    that are small or uneven. x [B, 3, H, W] in [0, 1]; an ℓ∞ threat. Raises UserError for bad arguments, RuntimeError naming
    the step if the objective or its gradient is not finite.
    """
    check_images(x)
    if threat.norm != "linf":
        raise UserError(f"adam_tanh: expected norm linf, whose ball a tanh fills, got {threat.norm}; 'pgd' attacks in both norms")
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0 or not 0 < lr < float("inf"):
        raise UserError(f"adam_tanh: expected an integer n_steps >= 0 and a finite lr > 0, got {n_steps!r} and {lr!r}; try 20 and 0.3")
    w = torch.zeros_like(x, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=lr)
    best, most = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
    for step in range(n_steps + 1):
        shown = threat.project(x + threat.eps * w.detach().tanh(), x)
        value, gradient = value_and_grad(objective, shown)
        if not (value.isfinite().all() and gradient.isfinite().all()):  # NaN beats no iterate: x would come back and look robust
            raise RuntimeError(f"adam_tanh: the objective or its gradient is NaN or infinite at step {step}")
        better = value > most
        best[better], most[better] = shown[better], value[better].to(most)
        if step < n_steps:
            w.grad = -gradient * threat.eps * (1 - w.detach().tanh().square())
            optimizer.step()
    return best
