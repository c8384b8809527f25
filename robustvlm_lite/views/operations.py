"""The nine operations of AugMix (Hendrycks et al. 2020) on batches of levels, as Pillow does them on 8-bit images.

Each takes levels [M, 3, H, W] (whole numbers 0 … 255) and an amount [M], and returns levels. Gradients: geometry is exact;
autocontrast takes darkest and brightest level as constants; solarize has slope 1 or -1; posterize and equalize, which are
steps, pass the gradient on.
"""

import torch
from torch import Tensor

from .geometry import affine
from .levels import look_up

LEVELS = 256


def autocontrast(levels: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to 0 … 255; a channel of one level stays."""
    low, high = _range(levels)
    scale = torch.where(high > low, 255.0 / (high - low).clamp_min(1), 1.0)
    offset = torch.where(high > low, -low * scale, 0.0)
    table = (_ramp(levels) * scale + offset).trunc().clamp(0, 255)  # in float64, where Pillow's own rounding happens
    return look_up(levels, table, scale[..., None].to(levels.dtype))


def equalize(levels: Tensor, _: Tensor) -> Tensor:
    """Each channel's histogram made as even as a look-up table can; a channel with too few levels stays."""
    index = levels.detach().long().flatten(2)
    counts = torch.zeros(*index.shape[:2], LEVELS, dtype=torch.long, device=levels.device)
    counts.scatter_add_(2, index, torch.ones_like(index))
    brightest = counts.gather(2, index.amax(dim=2, keepdim=True))
    step = (counts.sum(dim=2, keepdim=True) - brightest) // 255
    below = counts.cumsum(dim=2) - counts
    table = ((step // 2 + below) // step.clamp_min(1)).clamp(max=255)
    return look_up(levels, torch.where(step > 0, table, _ramp(levels).long()))


def posterize(levels: Tensor, bits: Tensor) -> Tensor:
    """Only the highest `bits` bits of each level."""
    width = (2 ** (8 - bits.double()))[:, None, None]
    return look_up(levels, ((_ramp(levels) / width).floor() * width).expand(-1, 3, -1))


def solarize(levels: Tensor, threshold: Tensor) -> Tensor:
    """Levels of at least `threshold` inverted."""
    ramp, least = _ramp(levels), threshold[:, None, None]
    slope = 1 - 2.0 * (levels.detach() >= least[..., None]) if levels.requires_grad else 1.0
    return look_up(levels, torch.where(ramp >= least, 255 - ramp, ramp).expand(-1, 3, -1), slope)


def rotate(levels: Tensor, degrees: Tensor) -> Tensor:
    """Counterclockwise about the center, black corners."""
    a, center = -degrees.double().deg2rad(), levels.shape[-1] / 2
    cos, sin = a.cos(), a.sin()
    return affine(levels, _matrix(levels, cos, sin, center * (1 - cos - sin), -sin, cos, center * (1 - cos + sin)))


def shear_x(levels: Tensor, amount: Tensor) -> Tensor:
    """Rows shifted in proportion to their height."""
    return affine(levels, _matrix(levels, 1, amount, 0, 0, 1, 0))


def shear_y(levels: Tensor, amount: Tensor) -> Tensor:
    """Columns shifted in proportion to their place."""
    return affine(levels, _matrix(levels, 1, 0, 0, amount, 1, 0))


def translate_x(levels: Tensor, pixels: Tensor) -> Tensor:
    """Shifted to the left by whole pixels."""
    return affine(levels, _matrix(levels, 1, 0, pixels, 0, 1, 0))


def translate_y(levels: Tensor, pixels: Tensor) -> Tensor:
    """Shifted up by whole pixels."""
    return affine(levels, _matrix(levels, 1, 0, 0, 0, 1, pixels))


OPERATIONS = {
    f.__name__: f
    for f in (autocontrast, equalize, posterize, rotate, solarize, shear_x, shear_y, translate_x, translate_y)
}


def amount(operation: str, strength: Tensor, sign: Tensor, side: int) -> Tensor:
    """How much an operation does at AugMix's severity 1, [M]. strength [M] in [0.1, 1], sign [M] of 1 and -1.

    Posterize: bits to keep, always 4; solarize: threshold, 231 to 254; rotate: whole degrees up to 2; shear: up to 0.03;
    translate: whole pixels up to a thirtieth of the side, 7 of 224 and 2 of 64.
    """
    if operation == "posterize":
        return 4 - (0.4 * strength).trunc()
    if operation == "solarize":
        return LEVELS - (25.6 * strength).trunc()
    if operation == "rotate":
        return sign * (3 * strength).trunc()
    if operation.startswith("shear"):
        return sign * 0.03 * strength
    if operation.startswith("translate"):
        return sign * (side / 30 * strength).trunc()
    return torch.zeros_like(strength)


def _ramp(like: Tensor) -> Tensor:
    """The levels 0 … 255 in float64."""
    return torch.arange(LEVELS, dtype=torch.float64, device=like.device)


def _range(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Darkest and brightest level of each channel, [M, 3, 1] in float64."""
    flat = levels.detach().flatten(2).double()
    return flat.amin(dim=2, keepdim=True), flat.amax(dim=2, keepdim=True)


def _matrix(levels: Tensor, *entries: Tensor | float) -> Tensor:
    """[M, 2, 3] from six entries, each a number or [M]."""
    columns = [torch.as_tensor(e, dtype=levels.dtype, device=levels.device).expand(len(levels)) for e in entries]
    return torch.stack(columns, dim=1).view(-1, 2, 3)
