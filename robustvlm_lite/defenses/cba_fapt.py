"""CBA-FAPT (Feng et al., AAAI 2026): prompts that hold an attribution map in place, in the image and in the text.

    L = CE(x) + 5 CE(x_adv) + 0.05 |A_v(x) - A_v(x_adv)|_2 + 0.03 KL(A_t(x) || A_t(x_adv))                 (Eq. 9 to 11)

A_v lies over the patches and A_t over context and class name of the true class, both `attention.bidirectional_map` of the
last block for the score S = cos(z_v, z_t). Despite the name FAP's loss is not in it: only FAP's prompts are. The formula
of A_t is not printed; by symmetry it is that of A_v at the end token, and it is linear in the unit image feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import attention
from ..attention import FUSIONS, NORMS
from ..clip import ZeroShotCLIP
from ..prompts import PromptSpec, Tail
from ..runtime import UserError, near_miss
from . import terms
from .prompting import STYLES, Method, PromptBatch, PromptTask, PromptTuning

CLASSES, LENGTHS, BASES = ("label", "predicted", "logprob"), ("none", "l1", "l2"), ("ce_ce", "fap")
FAP_WEIGHT = 1.5
TINY = 1e-12  # under the root of L_VAA, whose slope at 0 is infinite


@dataclass(frozen=True)
class Choices:
    """Weights of Eq. 11 and what the paper leaves open.

    natural, alpha, beta, gamma: of CE(x), of CE(x_adv), of the image map, of the text map; a map of weight 0 is not
    computed. base: "ce_ce" (the paper's Eq. 11) or "fap", the loss that the title suggests, with FAP's own weight and
    attack. score_scale: S is a cosine, or that times 100, as the caption's "logit-driven" may mean. score: S for the true
    "label", for the class "predicted" for each image, or "logprob", log p(y | x). fusion, text_norm: see `attention`.
    length: of A_v before it is compared, "none" (as printed), "l1" or "l2" to 1. stop_clean: no gradient through the
    clean maps.
    """

    alpha: float = 5.0
    beta: float = 0.05
    gamma: float = 0.03
    base: str = "ce_ce"
    score: str = "label"
    score_scale: float = 1.0
    fusion: str = "F1"
    text_norm: str = "N1"
    length: str = "none"
    stop_clean: bool = False
    natural: float = 1.0

    def __post_init__(self):
        for name in ("natural", "alpha", "beta", "gamma"):
            if not getattr(self, name) >= 0:
                raise UserError(f"CBA-FAPT: expected {name} >= 0, got {getattr(self, name)}; 0 leaves the term out")
        known = {"base": BASES, "score": CLASSES, "fusion": FUSIONS, "text_norm": NORMS, "length": LENGTHS}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; {near_miss(str(getattr(self, name)), names)}")
        if not self.score_scale > 0:
            raise UserError(f"CBA-FAPT: expected score_scale > 0, got {self.score_scale}; 1 is the paper's cosine")


@dataclass(kw_only=True)
class MapBatch(PromptBatch):
    """A step that also keeps the text's last block: its maps need it."""

    tail: Tail


@dataclass(frozen=True)
class Maps:
    """Of clean and attacked images, 2 B rows: image [2 B, patches]; text [2 B, L] over content [2 B, L]."""

    image: Tensor
    text: Tensor
    content: Tensor


class CBAFAPT(PromptTuning):
    """CBA-FAPT over any prompts of a vision transformer; with beta = gamma = 0 it is its base, CE(x) + 5 CE(x_adv).

    Maps and what leads to them are computed in the weights' own type: second derivatives in bfloat16 are noise.
    """

    name = "CBA-FAPT"

    def __init__(
        self,
        clip: ZeroShotCLIP,
        spec: PromptSpec,
        name: str = "",
        class_names: Sequence[str] = (),
        config: Choices | None = None,
    ):
        super().__init__(clip, spec, name, class_names, config or Choices())
        if not clip.is_vit:
            raise UserError(f"CBA-FAPT: expected a vision transformer, whose tokens it maps, got {clip.name}; choose a ViT")
        self.attacks_divergence = self.config.base == "fap"

    def batch(self, task: PromptTask, index: Tensor, x: Tensor, y: Tensor) -> MapBatch:
        prompts = self.learner()
        tail = task.model.text_tail(prompts)
        text = F.normalize(task.model.head_text(tail.o, tail.r), dim=-1)
        return MapBatch(task, index, x, y, x, prompts=prompts, text=text, tail=tail)

    def losses(self, batch: MapBatch) -> dict[str, Tensor]:
        c, model, n = self.config, batch.task.model, len(batch.y)
        image = model.image_tail(torch.cat([batch.x, batch.x_adv]), batch.prompts)
        features = F.normalize(model.head_image(image.o, image.r), dim=-1)
        clean, adv = self.logits(features, batch).split(n)
        weighted = self._base(clean, adv, features, batch)
        batch.notes["divergence"] = terms.kl(clean, adv).mean().item()
        if c.beta or c.gamma:
            weighted |= self._alignment(self.maps(image, features, batch), batch)
        return weighted

    def _base(self, clean: Tensor, adv: Tensor, features: Tensor, batch: MapBatch) -> dict[str, Tensor]:
        ce = F.cross_entropy(clean, batch.y)
        natural = {"ce": self.config.natural * ce} if self.config.natural else {}
        batch.notes["ce"] = ce.item()
        if self.config.base == "ce_ce":
            return natural | {"ce_adv": self.config.alpha * F.cross_entropy(adv, batch.y)}
        consistency = terms.feature_aware_kl(clean, adv, *features.split(len(batch.y))).mean()
        return natural | {"consistency": FAP_WEIGHT * consistency}

    def _alignment(self, maps: Maps, batch: MapBatch) -> dict[str, Tensor]:
        c, n, weighted = self.config, len(batch.y), {}
        batch.notes["map"] = maps.image.detach().abs().mean().item()  # a flat map satisfies the term, too
        if c.beta:
            a, b = _at_length(maps.image, c.length).split(n)
            gap = ((a.detach() if c.stop_clean else a) - b).square().sum(dim=1)
            weighted["vaa"] = c.beta * (gap + TINY).sqrt().mean()
        if c.gamma:
            either = (maps.content[:n] | maps.content[n:]).repeat(2, 1)  # predicted classes may differ in length
            p, q = attention.as_distribution(maps.text * maps.content, either, c.text_norm).split(n)
            weighted["taa"] = c.gamma * attention.map_divergence(p.detach() if c.stop_clean else p, q).mean()
        return weighted

    def maps(self, image: Tail, features: Tensor, batch: MapBatch) -> Maps:
        """The maps of the images in `image` (2 B of them, clean then attacked), in the graph of the prompts.

        Each image has its own copy of its class's text output, so that its gradient there is its own.
        """
        model, of = batch.task.model, self._classes(features, batch)
        text = batch.tail.take(of)
        score = self._score(features, F.normalize(model.head_text(text.o, text.r), dim=-1), of, batch)
        found = attention.both_maps(model, image, text, score, self.config.fusion, create_graph=True)
        return Maps(*found, text.content)

    def _classes(self, features: Tensor, batch: MapBatch) -> Tensor:
        """The class [2 B] that each image's maps explain."""
        if self.config.score == "predicted":
            return self.logits(features, batch).argmax(dim=1)
        return torch.cat([batch.y, batch.y])

    def _score(self, features: Tensor, own: Tensor, of: Tensor, batch: MapBatch) -> Tensor:
        """S [2 B] of image features with each image's own copy of its class's text feature."""
        cosine = (features * own).sum(dim=1)
        if self.config.score != "logprob":
            return self.config.score_scale * cosine
        logits = self.logits(features, batch).scatter(1, of[:, None], (self.clip.logit_scale * cosine)[:, None])
        return logits.log_softmax(dim=1).gather(1, of[:, None])[:, 0]


def _at_length(maps: Tensor, length: str) -> Tensor:
    """Maps [N, P] as they are, or each over its own L1 or L2 length."""
    if length == "none":
        return maps
    norm = maps.abs().sum(dim=1) if length == "l1" else (maps.square().sum(dim=1) + TINY).sqrt()
    return maps / norm[:, None].clamp_min(TINY)


PROMPTS = PromptSpec(n_text=2, depth_text=9, n_vision=2, depth_vision=9, coupling="fap")
FULL = Choices()
METHODS = {
    "CBA-FAPT": Method(CBAFAPT, PROMPTS, STYLES["maple"], FULL),
    "CBA-FAPT (no maps)": Method(CBAFAPT, PROMPTS, STYLES["maple"], replace(FULL, beta=0.0, gamma=0.0)),
    "CBA-FAPT (adversarial only)": Method(CBAFAPT, PROMPTS, STYLES["maple"], replace(FULL, natural=0.0, beta=0.0, gamma=0.0)),
    "CBA-FAPT (image map)": Method(CBAFAPT, PROMPTS, STYLES["maple"], replace(FULL, gamma=0.0)),
    "CBA-FAPT (text map)": Method(CBAFAPT, PROMPTS, STYLES["maple"], replace(FULL, beta=0.0)),
    "CBA-FAPT (FAP's loss)": Method(CBAFAPT, PROMPTS, STYLES["maple"], replace(FULL, base="fap")),
}
