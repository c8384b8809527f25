"""PRSL's rivals against torch's own losses and distributions, in float64."""

import pytest
import torch
import torch.nn.functional as F

from robustvlm_lite.captioner import IGNORED, cross_entropy
from robustvlm_lite.defenses.token_losses import ConfidencePenalty, LabelSmoothing, LogitSqueezing
from robustvlm_lite.runtime import UserError, generator

RIVALS = (LabelSmoothing, ConfidencePenalty, LogitSqueezing)


def drawn(*shape):
    """Logits in float64, and labels with positions where nothing is predicted; text 1 has fewer words than text 0."""
    logits = 3 * torch.randn(*shape, generator=generator("logits"), dtype=torch.float64)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator("labels"))
    labels[0, 0], labels[1, 1:] = 0, IGNORED
    return logits, labels


def added(rival, z):
    """What a rival adds to cross-entropy at rows of logits z [N, V], from torch's distributions; label smoothing has its own test."""
    if rival is ConfidencePenalty:
        return -torch.distributions.Categorical(logits=z).entropy()
    return torch.linalg.vector_norm(z, dim=1) ** 2 / z.shape[1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torchs(reduction, weight):
    logits, labels = drawn(3, 4, 9)
    got = LabelSmoothing(weight)(logits, labels, reduction)
    by_torch = [
        F.cross_entropy(z, t, ignore_index=IGNORED, label_smoothing=weight)
        for z, t in ((logits.flatten(0, 1), labels.flatten()), *zip(logits, labels, strict=True))
    ]
    assert torch.allclose(got, by_torch[0] if reduction == "mean" else torch.stack(by_torch[1:]), rtol=1e-12)


@pytest.mark.parametrize("rival", [ConfidencePenalty, LogitSqueezing])
def test_the_other_rivals_are_their_formulas(rival):
    logits, labels = drawn(3, 4, 9)
    whole = cross_entropy(logits, labels) + 0.2 * added(rival, logits[labels != IGNORED]).mean()
    assert torch.allclose(rival(0.2)(logits, labels), whole, rtol=1e-12)
    each = [added(rival, z[t != IGNORED]).mean() for z, t in zip(logits, labels, strict=True)]
    want = cross_entropy(logits, labels, "none") + 0.2 * torch.stack(each)
    assert torch.allclose(rival(0.2)(logits, labels, "none"), want, rtol=1e-12)


@pytest.mark.parametrize("rival", RIVALS)
def test_gradients_are_finite_differences(rival):
    logits, labels = drawn(2, 3, 5)
    assert torch.autograd.gradcheck(lambda z: rival(0.3)(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("rival", RIVALS)
def test_positions_without_a_target_change_nothing(rival):
    logits, labels = drawn(2, 4, 9)
    more = torch.cat([logits, 50 * torch.ones(2, 3, 9, dtype=torch.float64)], dim=1)
    ignored = torch.cat([labels, torch.full((2, 3), IGNORED)], dim=1)
    for reduction in ("mean", "none"):
        assert torch.allclose(rival(0.1)(more, ignored, reduction), rival(0.1)(logits, labels, reduction), rtol=1e-14)
    nothing = rival(0.1)(logits.requires_grad_(), torch.full((2, 4), IGNORED))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(rival, dtype):
    logits, labels = drawn(2, 4, 9)
    logits = (100 * logits).to(dtype).requires_grad_()  # squares pass what float16 holds
    loss = rival(0.1)(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx(rival(0.1)(logits.double(), labels).item(), rel=1e-5)


def test_rivals_compare_and_print():
    assert repr(LabelSmoothing(0.1)) == "LabelSmoothing(weight=0.1)"
    assert LogitSqueezing(0.1) == LogitSqueezing(0.1) != LogitSqueezing(0.2)
    assert LabelSmoothing(0.1) != ConfidencePenalty(0.1)


@pytest.mark.parametrize(
    "rival, weight, complaint",
    [
        *((rival, weight, f"got {weight}") for rival in RIVALS for weight in (-0.1, float("nan"), float("inf"))),
        (LabelSmoothing, 1.5, r"in \[0, 1\], which the target gives away, got 1.5"),
    ],
)
def test_wrong_weights_are_one_line(rival, weight, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        rival(weight)
    assert "\n" not in str(caught.value)
