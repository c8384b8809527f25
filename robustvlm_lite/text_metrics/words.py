"""How a text becomes words before it is scored, and how varied a model's texts are."""

import re
from collections import Counter
from collections.abc import Sequence

from ..runtime import UserError

TOKENIZER = "lower case, [a-z']+"  # what a card says about it
_WORD = re.compile("[a-z']+")


def words(text: str) -> list[str]:
    """Lower-case runs of letters and apostrophes: punctuation and digits are dropped."""
    return _WORD.findall(text.lower())


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """How varied the texts about different images are (specification, section 4.2); a metric of consistency rewards sameness.

    distinct: different texts over all texts. n_words: mean length. repeated_bigrams: of all pairs of neighboring words, the
    share that stood in the same text before. Raises UserError where there is no text.
    """
    if not texts:
        raise UserError("expected at least one text, got none; was anything generated?")
    split = [words(text) for text in texts]
    pairs = [Counter(zip(row, row[1:], strict=False)) for row in split]
    total = sum(map(Counter.total, pairs))
    return {
        "distinct": len(set(map(tuple, split))) / len(split),
        "n_words": sum(map(len, split)) / len(split),
        "repeated_bigrams": 1 - sum(map(len, pairs)) / total if total else 0.0,
    }
