"""What chapter 08 compares: each a fine-tuning of one base captioner with another loss, at one budget.

The weights were chosen on validation scenes (`data_scripts/tune_captioners.py --search`); those of PRSL are the release's 1e-5
and the largest of a grid that keeps clean accuracy within two points.
"""

from ..captioner import TokenLoss, cross_entropy
from ..defenses.prsl import PrslConfig
from ..defenses.token_losses import ConfidencePenalty, LabelSmoothing, LogitSqueezing
from ..runtime import UserError, near_miss

ADVERSARIAL = "Adversarial training"  # cross-entropy on attacked images
TEXT_METHODS: dict[str, TokenLoss] = {
    "CE": cross_entropy,
    "PRSL": PrslConfig(b=1e-5),
    "PRSL, strong": PrslConfig(b=1e-1),
    "Top-K variance": PrslConfig("topk_variance", b=1e-1),
    "Top-K mass": PrslConfig("topk_mass", b=1.0),
    "Label smoothing": LabelSmoothing(0.1),
    "Confidence penalty": ConfidencePenalty(0.1),
    "Logit squeezing": LogitSqueezing(1e-2),
    ADVERSARIAL: cross_entropy,
}


def text_method(name: str) -> TokenLoss:
    """The loss of a method. Raises UserError for an unknown one."""
    if name not in TEXT_METHODS:
        raise UserError(f"unknown method {name!r}; {near_miss(name, TEXT_METHODS)}")
    return TEXT_METHODS[name]
