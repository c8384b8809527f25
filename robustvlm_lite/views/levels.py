"""8-bit levels as floats: rounding and look-up tables whose gradient an attacker can still use."""

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, slope):
        ctx.slope = slope
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope, None, None


def straight_through(x: Tensor, y: Tensor, slope: Tensor | float = 1.0) -> Tensor:
    """The values of y with the gradient `slope` with respect to x: BPDA where the true gradient is zero or absent."""
    return _StraightThrough.apply(x, y.detach(), slope)


def to_levels(x: Tensor) -> Tensor:
    """Pixels in [0, 1] as whole levels 0 … 255 in float32 (float64 stays), nearest level."""
    levels = 255 * x.to(torch.promote_types(x.dtype, torch.float32))
    return straight_through(levels, levels.round())


def truncated(x: Tensor) -> Tensor:
    """Pixels in [0, 1] on the 8-bit grid, cut off and not rounded, as PIL's ToPILImage does; 8-bit images stay."""
    return straight_through(x, ((255 * x + 1e-3).floor() / 255).to(x.dtype))


def look_up(levels: Tensor, table: Tensor, slope: Tensor | float = 1.0) -> Tensor:
    """Each level of [M, 3, H, W] through its table [M, 3, 256], or [256] for all; `slope` is the gradient."""
    index = levels.detach().long().flatten(2)
    new = table.to(levels.dtype).expand(*index.shape[:2], 256).gather(2, index)
    return straight_through(levels, new.view_as(levels), slope)
