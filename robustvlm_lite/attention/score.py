"""The score whose gradient says what an image was recognized by."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip import ZeroShotCLIP


def top_logit(clip: ZeroShotCLIP, features: Tensor, text_features: Tensor) -> Tensor:
    """Largest logit of each image, summed over all images, so that one backward pass serves them all; knows no label.

    features [..., D], not yet unit. text_features [C, D], unit, or [I, 1, C, D] for features [I, V, D] of which each
    image I has a text of its own.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    cosines = (F.normalize(wide, dim=-1)[..., None, :] @ text_features.mT).squeeze(-2)
    return (clip.logit_scale * cosines).amax(dim=-1).sum()
