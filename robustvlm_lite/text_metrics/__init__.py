"""Scores of what a model writes: captions against references, consistency above its floor, answers against people's."""

from .answers import exact_match, normalize_answer, vqa_accuracy
from .captions import METRICS, CaptionMetrics, CaptionScores
from .consistency import Consistency, consistency, derangement, paired_corrected
from .resampling import bootstrap_values, corpus_values, paired_corpus_bootstrap
from .words import TOKENIZER, diversity, words

__all__ = [
    "METRICS",
    "TOKENIZER",
    "CaptionMetrics",
    "CaptionScores",
    "Consistency",
    "bootstrap_values",
    "consistency",
    "corpus_values",
    "derangement",
    "diversity",
    "exact_match",
    "normalize_answer",
    "paired_corpus_bootstrap",
    "paired_corrected",
    "vqa_accuracy",
    "words",
]
