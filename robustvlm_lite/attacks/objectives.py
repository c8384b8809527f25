"""What an attack maximizes: functions from images x_adv [B, 3, H, W] to one value per image [B].

Values are per image and never averaged over a batch, so images do not influence each other. Logits are taken to
float32 before the loss: in half precision a confident model has no gradient left (see `quirk_fp16_mean`).
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from ..runtime import UserError

Objective = Callable[[torch.Tensor], torch.Tensor]
Model = Callable[[torch.Tensor], torch.Tensor]


def _logits(model: Model, x: torch.Tensor) -> torch.Tensor:
    z = model(x)
    return z.to(torch.promote_types(z.dtype, torch.float32))


def cross_entropy(model: Model, y: torch.Tensor, *, quirk_fp16_mean=False, mean_over: int = 256) -> Objective:
    """-log p(y | x_adv) for labels y [B]; `model` maps pixels to logits [B, C].

    quirk_fp16_mean: as the released evaluation of TGA-ZSR computes it, the forward pass under float16 autocast and the
    loss averaged over a batch of `mean_over` (256 in its evaluation, 128 in training), with no loss scaling. The
    gradient then underflows to exactly zero for confident images, which the attack leaves where they are. The divisor
    is fixed, so the quirk does not depend on our batch size.
    """

    def objective(x_adv):
        half = torch.autocast(x_adv.device.type, torch.float16) if quirk_fp16_mean else nullcontext()
        with half:
            z = _logits(model, x_adv)
        loss = F.cross_entropy(z, y, reduction="none")
        return loss / mean_over if quirk_fp16_mean else loss

    return objective


def margin(model: Model, y: torch.Tensor) -> Objective:
    """max over j != y of z_j, minus z_y: positive where the prediction is wrong. The objective of Carlini and Wagner.

    It has no softmax to saturate. The released CW attack of TGA-ZSR adds 50 inside a ReLU, which never cuts at its
    logit scale, and so computes this. `model` maps pixels to logits [B, C] with C >= 2; y is [B].
    """

    def objective(x_adv):
        z = _logits(model, x_adv)
        true = F.one_hot(y, z.shape[1]).bool()
        return z.masked_fill(true, -torch.inf).amax(1) - z[true]

    return objective


def value_and_grad(objective: Objective, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective at `x` and its gradient with respect to `x`: ([B], [B, 3, H, W]), both detached.

    Works under torch.no_grad and leaves the `.grad` of every parameter as it was. Raises UserError if the objective
    does not return [B] values or does not depend differentiably on the images.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = objective(x)
        if value.shape != x.shape[:1]:
            raise UserError(f"objective: expected {len(x)} values, got {list(value.shape)}; return one per image")
        if not value.requires_grad:
            raise UserError("objective: expected a gradient in the images, got a constant; drop no_grad or detach")
        (grad,) = torch.autograd.grad(value, x, torch.ones_like(value))
    return value.detach(), grad


def zero_gradient_share(objective: Objective, x: torch.Tensor) -> torch.Tensor:
    """Share of the 3HW pixel values of each image with a gradient of exactly zero, [B] in [0, 1].

    Near 1 means that a gradient attack cannot move: masked by underflow, rounding or a detached step.
    """
    _, grad = value_and_grad(objective, x)
    return (grad == 0).flatten(1).double().mean(1)
