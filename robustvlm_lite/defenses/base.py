"""What every defense of the book answers to."""

from collections.abc import Callable, Sequence

from torch import nn

from ..clip import Classifier, ZeroShotCLIP

# A training attack: (objective to maximise, images, generators=...) -> adversarial images. Defenses receive it, and so
# need not know how it works: functools.partial(attacks.pgd, threat=..., n_steps=2, step_255=..., keep="last").
TrainingAttack = Callable


class Defense(nn.Module):
    """A defended CLIP. The flags tell an attacker (and the sanity battery) what to expect."""

    name = "CLIP"
    differentiable = True
    deterministic = True
    adapts_at_test_time = False

    def __init__(self, clip: ZeroShotCLIP):
        super().__init__()
        self.clip = clip
        self.facts: dict = {}  # what a loaded checkpoint says of its making

    def fit(self, data, *, attack: TrainingAttack | None = None, **_) -> "Defense":
        """Train on labelled images; a defense without training returns itself."""
        return self

    def classifier(self, class_names: Sequence[str], templates: Sequence[str]) -> Classifier:
        """Pixels [B, 3, H, W] to logits [B, C] for these classes."""
        return self.clip.classifier(class_names, templates)

    def attack_surface(self, classifier: Classifier) -> nn.Module:
        """What a white-box attacker differentiates: the defended classifier itself, in bfloat16 for speed."""
        return classifier.fast()
