"""The rendered world: small pictures drawn by code, with captions, labels, questions and exact masks."""

from robustvlm_lite.scenes.world import (
    COLORS,
    COUNTS,
    HELD_OUT_PAIRS,
    PAIRS,
    SHAPES,
    STYLES,
    TASKS,
    TEXTURES,
    Scenes,
    caption_vocabulary,
    sample,
)

__all__ = [
    "COLORS",
    "COUNTS",
    "HELD_OUT_PAIRS",
    "PAIRS",
    "SHAPES",
    "STYLES",
    "TASKS",
    "TEXTURES",
    "Scenes",
    "caption_vocabulary",
    "sample",
]
