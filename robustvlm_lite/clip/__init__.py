"""CLIP behind one contract: pixels in [0, 1] go in, CLIP's mean and std live inside.

The bundled models, OpenAI's and published robust ones go through the same function, `load_clip`, and the same open_clip
classes.
"""

from .architectures import imagenet_names
from .loading import load_clip, random_clip
from .model import MEAN, STD, Classifier, ZeroShotCLIP, autocast, written_out
from .registry import is_registered

__all__ = [
    "MEAN", "STD", "Classifier", "ZeroShotCLIP", "autocast", "imagenet_names", "is_registered", "load_clip",
    "random_clip", "written_out",
]  # fmt: skip
