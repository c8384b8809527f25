"""The map that guides A-TPT's views, for each tower and each form of the method."""

from functools import partial

from torch import Tensor

from ..clip import ZeroShotCLIP
from ..runtime import UserError, near_miss
from .convolution import pool_rollout, sharpen, stage_cam
from .rollout import gar
from .scaling import minmax, upsample
from .token_rollout import token_rollout

TRANSFORMER = {
    "paper": token_rollout,
    "released": partial(token_rollout, form="released"),
    "gar": gar,
    "gar_last_two": partial(gar, last=2),
}
CONVOLUTION = {"paper": pool_rollout, "released": stage_cam}
FORMS = tuple(TRANSFORMER)


def guide(clip: ZeroShotCLIP, x: Tensor, text_features: Tensor, form: str = "paper") -> Tensor:
    """Attention of the largest logit over the tower's grid, [..., N] >= 0, detached; not stretched to [0, 1].

    x [..., 3, H, W], images or images and views; text_features [C, D], or [I, 1, C, D] for a text of each image of
    x [I, V, 3, H, W]. form: "paper" and "released" (A-TPT), "gar" and "gar_last_two" (its ablation: gradients of
    attention matrices, over all blocks or two). A ResNet takes the first two: `pool_rollout` and `stage_cam`.
    """
    if form not in FORMS:
        raise UserError(f"unknown form of attention {form!r}; {near_miss(form, FORMS)}")
    return _ways(clip, form)[form](clip, x, text_features)


def guide_pixels(clip: ZeroShotCLIP, maps: Tensor, form: str = "paper") -> Tensor:
    """The maps [..., N] of `guide` as pictures [..., H, W] in [0, 1] of the tower's image size.

    In steps of 2^-16: pixels between the same cells are equal, and rounding, which hangs on the batch, must not order them.
    """
    pictures = (upsample(minmax(maps, 1e-8), clip.image_size) * 2**16).round() / 2**16
    return sharpen(pictures) if form == "released" and not clip.is_vit else pictures


def require_form(clip: ZeroShotCLIP, form: str) -> None:
    """Raises UserError, in one line, if the tower of `clip` has no tokens for this form of attention."""
    _ways(clip, form)


def _ways(clip: ZeroShotCLIP, form: str) -> dict:
    """The maps that a tower can give; UserError where it has no tokens for `form`."""
    if clip.is_vit:
        if (depth := len(clip.visual.transformer.resblocks)) < 2:
            raise UserError(f"expected a transformer of at least 2 blocks for attention, got {depth} in {clip.name}")
        return TRANSFORMER
    if not hasattr(clip.visual, "attnpool"):
        raise UserError(f"expected a ViT or a ResNet with attention pool, got {clip.name}; choose one of OpenAI's towers")
    if form not in CONVOLUTION:
        known = " or ".join(CONVOLUTION)
        raise UserError(f"expected a vision transformer for attention {form!r}, got {clip.name}; a ResNet takes {known}")
    return CONVOLUTION
