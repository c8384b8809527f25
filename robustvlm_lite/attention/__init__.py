"""Maps of where a CLIP looks: text-guided maps, rollouts, their distances, and how well a map covers an object.

A map is [B, N] over the N patches, row by row. What is compared or shown lies in [0, 1] (`minmax`); the maps of `guide`,
which order pixels and weigh views, keep their own scale and any leading dimensions.
"""

from .bidirectional import FUSIONS, NORMS, as_distribution, bidirectional_map, both_maps, explain, map_divergence
from .convolution import pool_rollout, sharpen, stage_cam
from .distance import METRICS, gram, map_distance
from .faithfulness import area, patch_curve
from .guide import FORMS, guide, guide_pixels, require_form
from .overlap import center_prior, iou, map_iou, mask_map, random_map
from .rollout import attention_rollout, gar, gradient_rollout
from .scaling import clip_top, is_flat, minmax, upsample, upsampling
from .score import top_logit
from .smoothness import SCALES, total_variation
from .text_guided import TOKEN_NORMS, cls_map, complementary_map, grad_cam, named_maps, text_map, value_map
from .token_rollout import cls_row, through_norm, token_relevance, token_rollout

__all__ = [
    "FORMS",
    "FUSIONS",
    "METRICS",
    "NORMS",
    "SCALES",
    "TOKEN_NORMS",
    "area",
    "as_distribution",
    "attention_rollout",
    "bidirectional_map",
    "both_maps",
    "center_prior",
    "clip_top",
    "cls_map",
    "cls_row",
    "complementary_map",
    "explain",
    "gar",
    "grad_cam",
    "gradient_rollout",
    "gram",
    "guide",
    "guide_pixels",
    "iou",
    "is_flat",
    "map_distance",
    "map_divergence",
    "map_iou",
    "mask_map",
    "minmax",
    "named_maps",
    "patch_curve",
    "pool_rollout",
    "random_map",
    "require_form",
    "sharpen",
    "stage_cam",
    "text_map",
    "through_norm",
    "token_relevance",
    "token_rollout",
    "top_logit",
    "total_variation",
    "upsample",
    "upsampling",
    "value_map",
]
