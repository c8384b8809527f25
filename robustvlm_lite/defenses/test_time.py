"""Defenses that answer an image by many views of it, and may tune a text context on them first: one recipe a method.

    x -> views -> features, once -> the surest views -> one step on the context -> answers of the views, weighed

Everything begins anew with each image: context, optimizer and random numbers. Images meet in no operation, so a batch gives
what they would give one by one. Sources: TPT (Shu et al. 2022), C-TPT (Yoon et al. 2024), MTA (Zanella and Ben Ayed 2024),
R-TPT (Sheng et al. 2025).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import attention, views
from ..clip import ZeroShotCLIP
from ..prompts import PromptedCLIP, PromptLearner, Prompts, PromptSpec
from ..runtime import UserError
from .base import Defense
from .keyed import Keyed
from .recipe import CONTROLS, Evidence, Passes, Recipe
from .view_making import calm_weights, make_views

CHUNK = 256  # views that are in memory at once
ATTACKER_VIEWS = 9  # the image and 8 views, drawn anew in each step, as T-VSS attacks R-TPT (its appendix C.8)
ADAM_EPS = 1e-8


class TestTime(Defense):
    """A frozen CLIP behind a recipe; nothing is trained."""

    __test__ = False  # pytest: not a test
    deterministic = False
    adapts_at_test_time = True

    def __init__(self, clip: ZeroShotCLIP, name: str, recipe: Recipe):
        super().__init__(clip.requires_grad_(False))
        self.name, self.recipe = name, recipe
        if recipe.answer == "tv" or (recipe.mixing == "guided" and recipe.guide not in CONTROLS):
            attention.require_form(clip, recipe.guide if recipe.guide not in CONTROLS else "paper")

    def classifier(self, class_names: Sequence[str], templates: Sequence[str] = ()) -> "TestTimeClassifier":
        """Pixels [B, 3, H, W] to logits [B, C]. templates: not read; these methods tune one template, the recipe's."""
        return TestTimeClassifier(self.clip, self.recipe, class_names)

    def attack_surface(self, classifier: "TestTimeClassifier") -> nn.Module:
        """The defense itself on fewer views, in bfloat16: the attacker knows all of it. The papers attack
        `classifier.undefended()` instead; other rungs are `classifier.smooth()` and the classifiers of other recipes."""
        return classifier.fewer(min(ATTACKER_VIEWS, self.recipe.n_views)).fast()


class TestTimeClassifier(Keyed):
    """Pixels [B, 3, S, S] in [0, 1] to logits [B, C], log-probabilities where views are averaged as probabilities.

    Differentiable as an attacker would have it: through views, features and weights, with masks, selection and the tuned
    context as constants that are computed again in each call (BPDA). smooth() also lets the gradient into the step.
    passes: what all calls have cost.  settings: the recipe in words, which tells results of one CLIP apart.
    """

    __test__ = False

    def __init__(self, clip: ZeroShotCLIP, recipe: Recipe, class_names: Sequence[str], smooth=False, precision=None):
        super().__init__()
        spec = PromptSpec(n_text=len(clip.tokenizer.encode(recipe.template.split("{}")[0])), template=recipe.template)
        self.model = PromptedCLIP(clip, PromptLearner(clip, spec), class_names)
        if len(class_names) < 2:
            raise UserError(f"expected at least 2 classes, got {len(class_names)}: every view is sure of a single one")
        self.clip, self.recipe, self.class_names, self.is_smooth = clip, recipe, tuple(class_names), smooth
        self.precision, self.settings = precision, f"{recipe}, smooth {smooth}, precision {precision}"
        self.passes = Passes()
        self._left: list[Tensor] = []  # under quirk_leak, the texts [C, D] that the image before left; shared by keyed copies

    def undefended(self) -> PromptedCLIP:
        """CLIP with the recipe's template."""
        return self.model

    def fewer(self, n_views: int) -> "TestTimeClassifier":
        """The same method on fewer views."""
        return TestTimeClassifier(self.clip, self.recipe.fewer(n_views), self.class_names, self.is_smooth, self.precision)

    def smooth(self) -> "TestTimeClassifier":
        """The same answers; the gradient sees sign-like steps g / (|g| + ε) with the median of |g| for ε."""
        return TestTimeClassifier(self.clip, self.recipe, self.class_names, True, self.precision)

    def fast(self) -> "TestTimeClassifier":
        """The same method for gradients, features in bfloat16, as `clip.Classifier.fast`; verdicts belong to the original."""
        return TestTimeClassifier(self.clip, self.recipe, self.class_names, self.is_smooth, torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        generators = self.generators(len(x))
        size = 1 if self.recipe.quirk_leak else max(1, CHUNK // self.recipe.n_views)
        parts = [self._look(x[i : i + size], generators[i : i + size]).logits for i in range(0, len(x), size)]
        return torch.cat(parts) if parts else x.new_zeros(0, len(self.class_names))

    @torch.no_grad()
    def look(self, x: Tensor) -> Evidence:
        """Everything about a batch that fits into memory; the logits are those of a call."""
        return self._look(x, self.generators(len(x)))

    def _look(self, x: Tensor, generators: list[torch.Generator]) -> Evidence:
        recipe = self.recipe
        text = self.model.constants()[1]
        if recipe.quirk_truncate:
            x = views.truncated(x)
        seen = make_views(self.clip, recipe, x, generators, self._left[0] if self._left else text, self.passes)
        flat = seen.views.flatten(0, 1)
        seen.features = self.model.image_features(flat, precision=self.precision).view(*seen.views.shape[:2], -1)
        self.passes.image_forwards += len(flat)
        seen.first = self.model.compare(seen.features.detach(), text)
        seen.chosen = views.lowest_entropy(seen.first, recipe.chosen)
        seen.text = self._tuned(seen) if recipe.loss else text
        if recipe.quirk_leak:
            self._left[:] = [seen.text[-1].detach()]
        self._answer(seen, text)
        return seen

    def _tuned(self, seen: Evidence) -> Tensor:
        """Text features [I, C, D] after one AdamW step from a fresh state, on a context of each image's own.

        From a fresh state Adam's step is g / (|g| + eps) in closed form; its size does not depend on the loss's scale.
        """
        recipe, n = self.recipe, len(seen.features) * len(self.class_names)
        smooth = self.is_smooth and seen.features.requires_grad
        near = seen.features.take_along_dim(seen.chosen[..., None], dim=1)
        with torch.enable_grad():
            context = self.model.learner.expand(len(near)).text[0]
            text = self.model.text_features(Prompts((context,)))
            loss = tuning_loss(recipe, self.model.compare(near if smooth else near.detach(), text), text).sum()
            (g,) = torch.autograd.grad(loss, context, create_graph=smooth)
        context, kept = context.detach(), 1 - recipe.lr * recipe.weight_decay
        with torch.set_grad_enabled(smooth):
            new = kept * context - recipe.lr * (g / (g.abs() + ADAM_EPS)).detach()
            if smooth:
                middle = g.detach().abs().flatten(1).median(dim=1).values.view(-1, 1, 1, 1).clamp_min(ADAM_EPS)
                new = views.straight_through(kept * context - recipe.lr * g / (g.abs() + middle), new)
            text = self.model.text_features(Prompts((new,)))
        self.passes.text_forwards += 2 * n
        self.passes.text_backwards += n
        return text

    def _answer(self, seen: Evidence, text: Tensor) -> None:
        """Weights and logits, by the recipe's answer."""
        recipe, n = self.recipe, seen.features.shape[1]
        logits = self.model.compare(seen.features, seen.text)
        if recipe.answer == "mode":
            mode, seen.weights = views.mean_shift(seen.features, logits)
            seen.logits = self.model.compare(mode, seen.text)
            return
        if recipe.answer == "anchor":
            seen.weights, seen.logits = torch.eye(n, device=logits.device)[0].expand(len(logits), n), logits[:, 0]
            return
        if recipe.answer == "uniform" or n == 1:
            seen.weights = logits.new_full(logits.shape[:2], 1 / n)
        elif recipe.answer == "neighbors":
            some = min(recipe.n_neighbors, n - 1)
            seen.weights = views.neighbor_weights(seen.features, some, quirk_self=recipe.quirk_self)
        else:
            seen.weights = calm_weights(self.clip, recipe, seen, text, self.passes)
        w = seen.weights[..., None]
        seen.logits = (w * logits).sum(dim=1) if recipe.as_logits else (logits.log_softmax(dim=-1) + w.log()).logsumexp(dim=1)


def tuning_loss(recipe: Recipe, logits: Tensor, text: Tensor) -> Tensor:
    """The loss of each image, [I], from the chosen views' logits [I, k, C] and the class texts [I, C, D]."""
    loss = views.marginal_entropy(logits) if recipe.loss == "marginal" else views.entropy(logits).mean(dim=-1)
    if recipe.dispersion:  # C-TPT: texts far from their mean are better calibrated
        loss = loss - recipe.dispersion * (text - text.mean(dim=1, keepdim=True)).norm(dim=-1).mean(dim=-1)
    return loss


# Each method as its paper has it, on AugMix views of resized crops. Those without a step: no text pass at all.
METHODS = {
    "View ensemble": Recipe(answer="uniform"),
    "TPT": Recipe(loss="marginal"),
    "TPT-Ensemble": Recipe(loss="marginal", answer="uniform"),
    "C-TPT": Recipe(loss="marginal", dispersion=50.0),
    "MTA": Recipe(answer="mode"),
    "R-TPT": Recipe(loss="pointwise", answer="neighbors", as_logits=True),
    "R-TPT (released)": Recipe(
        loss="pointwise", answer="neighbors", as_logits=True, quirk_self=True, quirk_truncate=True
    ),
}
