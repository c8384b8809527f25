"""Learned prompts in front of a frozen CLIP: text, deep, visual, coupled, class-specific, pixel frame; one for all images or one each."""

from .image import Trace
from .learner import PromptLearner, Prompts
from .model import PromptedCLIP
from .spec import PromptSpec
from .tail import Tail
from .words import ClassWords

__all__ = ["ClassWords", "PromptLearner", "PromptSpec", "PromptedCLIP", "Prompts", "Tail", "Trace"]
