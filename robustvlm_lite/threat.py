"""What an attacker may do, and the check that it did no more.

Pixels are floats in [0, 1]. Budgets are written in 1/255 units (`eps_255`) and converted here and nowhere else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from .runtime import UserError

NORMS = ("linf", "l2")
TOLERANCE = 1e-6  # pixels; float32 rounding of x + delta stays below 1e-7, so this hides no real violation

Generators = torch.Generator | Sequence[torch.Generator]


class AuditError(RuntimeError):
    """An attack returned images that its threat model does not allow."""


def check_images(x: torch.Tensor, name: str = "x") -> None:
    """Raises UserError unless `x` is a floating [B, 3, H, W] tensor of finite values in [0, 1]."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise UserError(f"{name}: expected a floating-point tensor in [0, 1], got {kind}; divide 8-bit images by 255")
    if x.ndim != 4 or x.shape[1] != 3:
        raise UserError(f"{name}: expected shape [B, 3, H, W], got {list(x.shape)}; stack RGB images, channels first")
    if not x.numel():
        return
    low, high = (v.item() for v in torch.aminmax(x.detach()))  # NaN wins both
    if math.isnan(low):
        raise UserError(f"{name}: expected finite pixels, got NaN; look at the images before they reach this call")
    if low < 0 or high > 1:
        got = f"got [{low:.2f}, {high:.2f}]"
        raise UserError(f"{name}: expected pixels in [0, 1], {got}; pass images before CLIP normalisation")


def _norm(delta: torch.Tensor) -> torch.Tensor:
    """L2 norm of each image, [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)


def _draw(function, shape, x: torch.Tensor, generators: Generators) -> torch.Tensor:
    """[B, *shape] random numbers for the images `x`: one stream for the batch, or one per image."""
    if isinstance(generators, torch.Generator):
        return function((len(x), *shape), generator=generators, device=generators.device).to(x)
    if len(generators) != len(x):
        raise UserError(f"expected one generator per image, got {len(generators)} for {len(x)} images; pass one each")
    return torch.stack([function(shape, generator=g, device=g.device) for g in generators]).to(x)


@dataclass(frozen=True)
class ThreatModel:
    """All images within `eps_255`/255 of the clean one, in the given norm, that are images (pixels in [0, 1]).

    For "l2" the radius is in 1/255 units of pixel value too: eps_255=255 means a radius of 1.0.
    """

    eps_255: float = 1.0
    norm: str = "linf"

    def __post_init__(self):
        eps = self.eps_255
        if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 < eps <= 255:  # NaN fails the comparison
            raise UserError(f"eps_255: expected a number in (0, 255], got {eps!r}; the papers use 1 to 4 (1/255 units)")
        if self.norm not in NORMS:
            raise UserError(f"norm: expected 'linf' or 'l2', got {self.norm!r}; choose one of the two")
        object.__setattr__(self, "eps_255", float(eps))

    @property
    def eps(self) -> float:
        """The budget in pixel units, where white is 1."""
        return self.eps_255 / 255

    def project(self, x_adv: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Bring `x_adv` [B, 3, H, W] into the ball around `x` and into [0, 1].

        Exact Euclidean projection for linf. For l2 the ball comes first and the box second, as in common practice:
        the result lies in both. Half precision is computed in float32 and rounded towards `x`, never out of the ball.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        center = x.to(wide)
        delta = x_adv.to(wide) - center
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * (self.eps / _norm(delta)).clamp(max=1)
        exact = (center + delta).clamp(0, 1)
        if wide == x.dtype:
            return exact
        rounded = exact.to(x.dtype)
        too_far = (rounded.to(wide) - center).abs() > (exact - center).abs()
        return torch.where(too_far, torch.nextafter(rounded, x), rounded)

    def step(self, z: torch.Tensor, grad: torch.Tensor, size: float) -> torch.Tensor:
        """Move `z` (a perturbation or an image, [B, 3, H, W]) by `size` along the steepest ascent of the norm.

        linf: the sign of the gradient. l2: the gradient at unit length; a zero gradient moves nothing in either.
        """
        if self.norm == "linf":
            return z + size * grad.sign()
        return z + size * (grad / (_norm(grad) + 1e-10))

    def random_start(self, x: torch.Tensor, generators: Generators, corner: bool = False) -> torch.Tensor:
        """A perturbation [B, 3, H, W] drawn uniformly from the ball, or from its corners (linf) or surface (l2).

        It is cut so that x + delta stays in [0, 1]. `generators` is one torch.Generator per image (independent of
        batch and order) or a single one for the batch.
        """
        if self.norm == "linf":
            delta = 2 * _draw(torch.rand, x.shape[1:], x, generators) - 1
            delta = self.eps * (delta.sign() if corner else delta)
        else:
            direction = _draw(torch.randn, x.shape[1:], x, generators)
            radius = _draw(torch.rand, (1, 1, 1), x, generators) ** (1 / x[0].numel())  # uniform in volume
            delta = self.eps * direction / _norm(direction) * (1 if corner else radius)
        return self.project(x + delta, x) - x


def to_8bit(x_adv: torch.Tensor, x: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
    """The nearest 8-bit image to `x_adv` that keeps the budget around the 8-bit image `x`; [B, 3, H, W] floats k/255.

    linf: each level is rounded, then moved to the closest one inside the budget, so that a budget below 1/255 leaves
    `x` itself. l2: the perturbation is shrunk until its rounded form fits. Where no level lies inside the budget
    (possible only for an `x` off the 8-bit grid), the level nearest to `x` is taken.
    """
    center, target = 255 * x.double(), 255 * x_adv.double()
    slack = 255 * TOLERANCE / 2  # x = k/255 is not exact in float32
    if threat.norm == "linf":
        lowest = (center - threat.eps_255 - slack).ceil().clamp(min=0)
        highest = (center + threat.eps_255 + slack).floor().clamp(max=255)
        levels = target.round().clamp(lowest, highest)
        levels = torch.where(lowest <= highest, levels, center.round())
    else:
        levels = _round_inside_l2(center, target, threat.eps_255 + slack)
    return levels.clamp(0, 255).to(x_adv.dtype) / 255


def _round_inside_l2(center: torch.Tensor, target: torch.Tensor, radius: float) -> torch.Tensor:
    """Levels of center + s (target - center) for the largest s in [0, 1], by bisection, whose distance is <= radius."""

    def levels(share):
        return (center + share * (target - center)).round()

    low = torch.zeros_like(center[:, :1, :1, :1])
    high = torch.ones_like(low)
    low = torch.where(_norm(levels(high) - center) <= radius, high, low)
    for _ in range(20):
        middle = (low + high) / 2
        fits = _norm(levels(middle) - center) <= radius
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return levels(low)


@dataclass(frozen=True)
class Audit:
    """What `audit` measured: largest distances in 1/255 units, pixel range, and the share of images that changed."""

    n: int
    max_linf_255: float
    max_l2_255: float
    min: float
    max: float
    changed: float

    def __str__(self) -> str:
        return (
            f"{self.n} images, {self.changed:.0%} changed: at most {self.max_linf_255:.3g}/255 (ℓ∞), "
            f"{self.max_l2_255:.3g}/255 (ℓ2); pixels in [{self.min:.3g}, {self.max:.3g}]; tolerance {TOLERANCE:g} pixels"
        )


def audit(x: torch.Tensor, x_adv: torch.Tensor, threat: ThreatModel) -> Audit:
    """Measure `x_adv` against the clean `x` (both [B, 3, H, W]) and the threat model.

    Raises AuditError, which names the rule and the first image that breaks it: shape or dtype, non-finite pixels,
    pixels outside [0, 1], distance beyond the budget (each with a tolerance of 1e-6 pixels).
    """
    if x_adv.shape != x.shape or not x_adv.is_floating_point():
        raise AuditError(f"expected floating images of shape {list(x.shape)}, got {x_adv.dtype} {list(x_adv.shape)}")
    if not len(x):
        return Audit(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    adv = x_adv.detach().double().flatten(1)
    delta = adv - x.detach().double().flatten(1)
    linf, l2 = delta.abs().amax(1), torch.linalg.vector_norm(delta, dim=1)
    distance = linf if threat.norm == "linf" else l2

    def refuse(broken: torch.Tensor, text):
        if broken.any():
            i = int(broken.nonzero()[0])
            raise AuditError(f"image {i} ({int(broken.sum())} of {len(x)}): {text(i)}")

    refuse(~adv.isfinite().all(1), lambda i: "pixels are NaN or infinite")
    outside = (adv.amin(1) < -TOLERANCE) | (adv.amax(1) > 1 + TOLERANCE)
    refuse(outside, lambda i: f"pixels in [{adv[i].min():.4f}, {adv[i].max():.4f}], allowed [0, 1]")
    beyond = distance > threat.eps + TOLERANCE
    refuse(beyond, lambda i: f"{threat.norm} distance {255 * distance[i]:.4f}/255, allowed {threat.eps_255:g}/255")
    return Audit(
        n=len(x),
        max_linf_255=255 * linf.max().item(),
        max_l2_255=255 * l2.max().item(),
        min=adv.min().item(),
        max=adv.max().item(),
        changed=(linf > 0).double().mean().item(),
    )
