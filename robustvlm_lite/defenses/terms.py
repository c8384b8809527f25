"""Loss terms that several papers share: divergences between the answers to clean and to attacked images."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) of each row, [B]; summed over classes, in float32 or wider.

    The sum matters: an average over classes would weigh the term by 1 / C.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_target = (t.to(wide).log_softmax(dim=1) for t in (logits, target))
    return F.kl_div(log_p, log_target, log_target=True, reduction="none").sum(dim=1)


def feature_aware_kl(clean: Tensor, adv: Tensor, clean_features: Tensor, adv_features: Tensor) -> Tensor:
    """FAP's consistency [B]: (cos(z(x_adv), z(x)) + 1) KL(p(x) || p(x_adv)) (Zhou et al., NeurIPS 2024).

    clean, adv: logits [B, C]; features: unit [B, D]. Nothing is detached: lowering the cosine lowers the term, too.
    """
    return ((clean_features * adv_features).sum(dim=1) + 1) * kl(clean, adv)
