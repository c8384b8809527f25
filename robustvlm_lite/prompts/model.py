"""A frozen CLIP with learned prompts, behind the contract of every classifier of the book."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import transformer
from ..clip import ZeroShotCLIP, autocast
from ..runtime import UserError
from .image import Trace, image_tail, image_trace
from .learner import PromptLearner, Prompts
from .tail import Tail
from .text import text_tail
from .words import class_words


class PromptedCLIP(nn.Module):
    """Pixels [B, 3, H, W] in [0, 1] to float32 logits [B, C] for one list of classes.

    Called, it is a classifier to evaluate and to attack: the prompts are constants, and the text is encoded again only
    after they changed. To train, take `prompts = model.learner()` once a step and hand it to `text_features` and `logits`;
    an attack inside the step takes `prompts.detach()` and the detached text.

    clip: shared, not copied; its weights are frozen here. For other classes make another one (`for_classes`): prompts know
    no classes unless they are class-specific. precision: None, or torch.bfloat16 for the image tower under autocast.
    """

    def __init__(self, clip: ZeroShotCLIP, learner: PromptLearner, class_names: Sequence[str], precision=None):
        super().__init__()
        self.words = class_words(clip, learner.spec, class_names)
        self.class_names = tuple(class_names)
        if learner.spec.class_specific and self.class_names != learner.class_names:
            raise UserError(
                f"expected the {len(learner.class_names)} classes of the class-specific contexts, got {len(class_names)} "
                "others; learn one context for all classes (class_specific=False) to change them"
            )
        self.clip, self.learner, self.precision = clip.requires_grad_(False), learner, precision
        self._known: tuple = (None, None)  # state of the prompts, and what follows from it

    def forward(self, x: Tensor) -> Tensor:
        prompts, text = self.constants()
        return self.logits(x, text, prompts, self.precision)

    def fast(self) -> "PromptedCLIP":
        """The same classifier for gradients in bfloat16, as `clip.Classifier.fast`; verdicts belong to the original."""
        return PromptedCLIP(self.clip, self.learner, self.class_names, torch.bfloat16)

    def for_classes(self, class_names: Sequence[str]) -> "PromptedCLIP":
        """The same prompts for another list of classes (base to new, across data sets)."""
        return PromptedCLIP(self.clip, self.learner, class_names, self.precision)

    @torch.no_grad()
    def constants(self) -> tuple[Prompts, Tensor]:
        """The prompts and the text features [C, D] as they stand, computed again only after a parameter changed."""
        place = (self.clip.device, self.clip.mean.dtype)
        state = place, [(id(p), p._version, p.device, p.dtype) for p in self.learner.parameters()]
        if self._known[0] != state:
            prompts = self.learner().detach()
            self._known = (state, (prompts, self.text_features(prompts)))
        return self._known[1]

    def text_features(self, prompts: Prompts | None = None, precision: torch.dtype | None = None) -> Tensor:
        """Unit text features [C, D], or [B, C, D] for prompts with a context an image; in the graph of the prompts."""
        tail = self.text_tail(prompts, precision)
        with autocast(self.clip.device, precision):
            raw = self.head_text(tail.o, tail.r)
        return F.normalize(raw.float() if precision else raw, dim=-1)

    def image_features(self, x: Tensor, prompts: Prompts | None = None, precision: torch.dtype | None = None) -> Tensor:
        """Unit image features [B, D], in the graph of pixels and prompts."""
        prompts = self.learner() if prompts is None else prompts
        if not self.clip.is_vit:
            with autocast(self.clip.device, precision):
                raw = self.clip.visual(self._pixels(x, prompts))
        else:
            tail = self.image_tail(x, prompts, precision)
            with autocast(self.clip.device, precision):
                raw = self.head_image(tail.o, tail.r)
        return F.normalize(raw.float() if precision else raw, dim=-1)

    def logits(
        self,
        x: Tensor,
        text: Tensor | None = None,
        prompts: Prompts | None = None,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Scaled cosines [B, C] of images with `text`, [C, D] or each image's own [B, C, D]; of the prompts if None."""
        prompts = self.learner() if prompts is None else prompts
        text = self.text_features(prompts) if text is None else text
        return self.compare(self.image_features(x, prompts, precision), text)

    def compare(self, image_features: Tensor, text: Tensor) -> Tensor:
        """Logits of features that are at hand: image [B, D] or views [B, V, D], text [C, D] or [B, C, D] -> [B(, V), C]."""
        if text.ndim == 3 and len(text) != len(image_features):
            raise UserError(
                f"expected the text of {len(image_features)} images, got that of {len(text)}; expand to the batch"
            )
        if text.ndim == 3 and image_features.ndim == 2:
            return self.clip.logit_scale * (text @ image_features[:, :, None])[..., 0]
        return self.clip.logit_scale * image_features @ text.mT

    def image_tail(self, x: Tensor, prompts: Prompts | None = None, precision: torch.dtype | None = None) -> Tail:
        """The last image block at CLS, N = B; vision transformers only."""
        prompts = self._for_tokens(prompts)
        with autocast(self.clip.device, precision):
            return image_tail(self.clip.visual, self._pixels(x, prompts), prompts.vision)

    def text_tail(self, prompts: Prompts | None = None, precision: torch.dtype | None = None) -> Tail:
        """The last text block at the end token of each class, N = C, or [B, C] for prompts with a context an image."""
        prompts = self.learner() if prompts is None else prompts
        with autocast(self.clip.device, precision):
            return text_tail(self.clip.model, self.words, prompts.text)

    def image_trace(self, x: Tensor, blocks: Sequence[int], prompts: Prompts | None = None) -> tuple[Tensor, Trace]:
        """Unit image features [B, D], and what entered and mixed the `blocks` (from 0; -1 is the last), in their order."""
        prompts, n = self._for_tokens(prompts), len(self.clip.visual.transformer.resblocks)
        if not blocks or not all(-n <= b < n for b in blocks):
            raise UserError(
                f"expected blocks of {self.clip.name} from 0 to {n - 1}, got {list(blocks)}; choose among them"
            )
        chosen = sorted({b % n for b in blocks})
        cls, trace = image_trace(self.clip.visual, self._pixels(x, prompts), prompts.vision, chosen)
        return F.normalize(transformer.project(self.clip.visual, cls), dim=-1), trace

    def head_image(self, o: Tensor, r: Tensor) -> Tensor:
        """Image features (not normalized) [..., D] from o, r [..., W] of an image tail."""
        block = self.clip.visual.transformer.resblocks[-1]
        return transformer.project(self.clip.visual, transformer.finish_block(block, r, block.attn.out_proj(o)))

    def head_text(self, o: Tensor, r: Tensor) -> Tensor:
        """Text features (not normalized) [..., D] from o, r [..., W] of a text tail."""
        model, block = self.clip.model, self.clip.model.transformer.resblocks[-1]
        return model.ln_final(transformer.finish_block(block, r, block.attn.out_proj(o))) @ model.text_projection

    def _for_tokens(self, prompts: Prompts | None) -> Prompts:
        if not self.clip.is_vit:
            raise UserError(
                f"expected a vision transformer for image tokens, got {self.clip.name}; choose a ViT backbone"
            )
        return self.learner() if prompts is None else prompts

    def _pixels(self, x: Tensor, prompts: Prompts) -> Tensor:
        x = self.clip.normalize(x)
        return x if prompts.pixel is None else x + prompts.pixel
