"""From pixels to logits: an open_clip model with CLIP's normalization inside, and its zero-shot classifiers."""

import contextlib
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import resnet, transformer
from ..runtime import UserError, multiplies_bfloat16

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images (Radford et al. 2021)
STD = (0.26862954, 0.26130258, 0.27577711)
LEVELS = 10  # no normalization in use takes pixels so far; above are 8-bit levels


class Classifier(nn.Module):
    """Zero-shot classifier: pixels [B, 3, H, W] in [0, 1] to float32 logits [B, C] for one list of classes.

    precision: None computes in the weights' own type, torch.bfloat16 runs the image tower under autocast. Pixels of 0 to
    255 would be answered with half of the accuracy and no error: without gradients, where it costs little, they are refused.
    Narrower mistakes are for `threat.check_images`; a front end may leave [0, 1] on purpose.
    """

    def __init__(self, clip: "ZeroShotCLIP", class_names: Sequence[str], templates: Sequence[str], precision=None):
        super().__init__()
        self.clip, self.precision = clip, precision
        self.class_names, self.templates = tuple(class_names), tuple(templates)
        self.register_buffer("text_features", clip.text_features(class_names, templates), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x.numel() and x.amax() > LEVELS:
            raise UserError(f"expected pixels in [0, 1], got values up to {x.amax():.0f}; divide 8-bit images by 255")
        return self.clip.logits(x, self.text_features, self.precision)

    def fast(self) -> "Classifier":
        """The same classifier for gradients, in bfloat16 where the hardware multiplies it: attacks take half the time, and no
        gradient underflows (bfloat16 has the exponents of float32). Verdicts belong to the original."""
        return Classifier(self.clip, self.class_names, self.templates, torch.bfloat16)


class ZeroShotCLIP(nn.Module):
    """An open_clip model with pixels outside and normalization inside."""

    def __init__(self, model: nn.Module, tokenizer, name: str, weights_sha256: str):
        super().__init__()
        self.model, self.tokenizer, self.name, self.weights_sha256 = model, tokenizer, name, weights_sha256
        self.image_size = image_side(model.visual)
        self.is_vit = written_out(model.visual) is transformer
        self.grid = model.visual.grid_size[0] if self.is_vit else self.image_size // resnet.STRIDE
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self._text_cache: dict[tuple, Tensor] = {}

    @property
    def visual(self) -> nn.Module:
        """The image tower (all that fine-tuning defenses train)."""
        return self.model.visual

    @property
    def vit(self) -> nn.Module:
        """The image tower of a vision transformer; UserError for a ResNet, which has no blocks of attention to follow."""
        if not self.is_vit:
            raise UserError(f"expected a vision transformer for this map, got {self.name}; choose a ViT backbone")
        return self.visual

    @property
    def logit_scale(self) -> Tensor:
        """The scale as used, exp of the stored parameter; no defense of the book trains it."""
        return self.model.logit_scale.exp().detach()

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalize(self, x: Tensor) -> Tensor:
        """CLIP's input normalization; refuses another image size instead of resizing in silence."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"expected images of {self.image_size}x{self.image_size} pixels for {self.name}, got "
                f"{x.shape[-2]}x{x.shape[-1]}; load the data with size={self.image_size}"
            )
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def train(self, mode: bool = True) -> "ZeroShotCLIP":
        """Batch norm stays in evaluation mode: its statistics are part of the published model, whoever attacks or tunes it."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def tokens(self, x: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """All image tokens in the joint space, [B, 1 + N, D], not normalized: what the image feature is made of, then the grid.

        The first is CLS of a transformer or the pooled mean token of a ResNet; N = grid * grid, row by row.
        """
        with autocast(self.device, precision):
            tokens = written_out(self.visual).image_tokens(self.visual, self.normalize(x))
        return tokens.float() if precision else tokens

    def image_features(self, x: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """Unit image features [B, D]."""
        return F.normalize(self.tokens(x, precision)[:, 0], dim=-1)

    @torch.no_grad()
    def text_features(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit text features [C, D]: the mean over templates of unit features, made unit again; computed once a key."""
        key = (tuple(class_names), tuple(templates), str(self.device), self._text_version())
        if not class_names or not templates or not all("{}" in t for t in templates):
            got = f"{len(class_names)} names and {list(templates)}"
            raise UserError(f"expected class names and templates with {{}} for the name, got {got}")
        if key not in self._text_cache:
            per_template = [self.encode_text([t.format(c) for c in class_names]) for t in templates]
            self._text_cache[key] = F.normalize(torch.stack(per_template).mean(0), dim=-1)
        return self._text_cache[key]

    def _text_version(self) -> int:
        """Counts what was written into the text tower: a tuned or loaded tower must not meet the features of the old one."""
        return sum(p._version for name, p in self.model.named_parameters() if not name.startswith("visual."))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit text features [T, D] of whole sentences; a text longer than the context is refused, not cut."""
        ids = self.tokenizer(list(texts)).to(self.device)
        end = self.model.vocab_size - 1
        for text, row in zip(texts, ids, strict=True):
            if row[-1] == end and len(self.tokenizer.encode(text)) + 2 > len(row):
                raise UserError(
                    f"expected at most {len(row) - 2} tokens, got {len(self.tokenizer.encode(text))} in {text!r}"
                )
        return F.normalize(transformer.text_features(self.model, ids), dim=-1)

    def logits(self, x: Tensor, text_features: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """Scaled cosines [B, C]."""
        return self.logit_scale * self.image_features(x, precision) @ text_features.T

    def classifier(self, class_names: Sequence[str], templates: Sequence[str]) -> Classifier:
        """A module from pixels to logits; its text side is computed here, once."""
        return Classifier(self, class_names, templates).to(self.device)


def image_side(visual: nn.Module) -> int:
    """Pixels along a side of the images that an image tower takes."""
    return visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size


def written_out(visual: nn.Module) -> ModuleType:
    """The room whose `image_tokens` runs this image tower: `transformer` or `resnet`."""
    return transformer if hasattr(visual, "class_embedding") else resnet


def autocast(device: torch.device, precision: torch.dtype | None):
    """Autocast to `precision`; nothing for None, nor for bfloat16 on a device that only emulates it, at many times the cost of float32."""
    slow = precision is torch.bfloat16 and not multiplies_bfloat16(device.type)
    return contextlib.nullcontext() if precision is None or slow else torch.autocast(device.type, dtype=precision)
