"""Models that write: captions and answers from pixels in [0, 1], behind one contract for ViT-GPT2 and BLIP-2."""

from .blip2 import Blip2
from .contract import IGNORED, Captioner, TokenLoss, cross_entropy
from .loading import load_captioner, new_captioner
from .vit_gpt2 import ViTGPT2

__all__ = ["IGNORED", "Blip2", "Captioner", "TokenLoss", "ViTGPT2", "cross_entropy", "load_captioner", "new_captioner"]
