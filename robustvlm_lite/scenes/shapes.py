"""The ten shapes as signed-distance functions.

Each function takes coordinates ``u`` (right) and ``v`` (up) of any equal shape, in units of the object's radius, and
returns a distance of the same shape: negative inside, zero on the outline, positive outside, with slope one next to the
outline (that is what makes the edges anti-alias correctly).  Every shape fits into the unit disk, so objects whose
disks do not meet cannot overlap.
"""

import math

import torch
from torch import Tensor


def circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.92


def square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.70


def triangle(u: Tensor, v: Tensor) -> Tensor:
    """Equilateral, one corner up: three half-planes at the inradius 1/2, corners on the unit circle."""
    return torch.maximum(-v, math.sqrt(0.75) * u.abs() + 0.5 * v) - 0.5


def star(u: Tensor, v: Tensor) -> Tensor:
    """Five-pointed: two reflections fold the plane onto one half-tip, which is a single straight edge."""
    u = u.abs()
    for sign in (1.0, -1.0):
        nu, nv = sign * math.cos(math.pi / 5), -math.sin(math.pi / 5)
        overshoot = 2.0 * (nu * u + nv * v).clamp(min=0.0)
        u, v = u - overshoot * nu, v - overshoot * nv
    u, v = u.abs(), v - 1.0
    edge_u, edge_v = 0.45 * math.sin(math.pi / 5), 0.45 * math.cos(math.pi / 5) - 1.0
    return (v * edge_u - u * edge_v) / math.hypot(edge_u, edge_v)


def cross(u: Tensor, v: Tensor) -> Tensor:
    u, v = u.abs(), v.abs()
    return torch.minimum(torch.maximum(u - 0.94, v - 0.29), torch.maximum(u - 0.29, v - 0.94))


def ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.73).abs() - 0.22


def heart(u: Tensor, v: Tensor) -> Tensor:
    """A square standing on its corner, with a half disk on each of its two upper sides."""
    side, u, v = 1.08, u.abs(), v + 0.14
    quarter = side * math.sqrt(2.0) / 4.0
    diamond = (u + v.abs()) * math.sqrt(0.5) - side / 2.0
    lobe = torch.hypot(u - quarter, v - quarter) - side / 2.0
    return torch.minimum(diamond, lobe)


def crescent(u: Tensor, v: Tensor) -> Tensor:
    u = u - 0.12
    return torch.maximum(torch.hypot(u + 0.12, v) - 0.97, 0.78 - torch.hypot(u - 0.40, v))


def arrow(u: Tensor, v: Tensor) -> Tensor:
    """Points to the right: a shaft and a triangular head."""
    v = v.abs()
    shaft = torch.maximum(v - 0.22, (u + 0.40).abs() - 0.56)
    head = torch.maximum(-u - 0.02, 0.6 * u + 0.8 * v - 0.58)
    return torch.minimum(shaft, head)


def bar(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs() - 0.95, v.abs() - 0.27)


HALF_TURN = math.pi
# name -> (function, largest rotation either way in radians).  A square that turns by 45 degrees is a diamond and a
# heart upside down is no longer one, so those stay near upright; the others keep their identity at any angle.
SHAPE_TABLE = {
    "circle": (circle, HALF_TURN),
    "square": (square, math.radians(14)),
    "triangle": (triangle, math.radians(18)),
    "star": (star, HALF_TURN),
    "cross": (cross, math.radians(30)),
    "ring": (ring, HALF_TURN),
    "heart": (heart, math.radians(25)),
    "crescent": (crescent, HALF_TURN),
    "arrow": (arrow, HALF_TURN),
    "bar": (bar, HALF_TURN),
}
SHAPES = tuple(SHAPE_TABLE)
