"""CLIP behind one contract: pixels in [0, 1] go in, CLIP's mean and std live inside.

The bundled models and OpenAI's go through the same function, `load_clip`, and the same open_clip classes.
"""

import contextlib
import io
import json
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import transformer
from .runtime import UserError, asset, near_miss, resolve_device, sha256

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images (Radford et al. 2021)
STD = (0.26862954, 0.26130258, 0.27577711)


class Classifier(nn.Module):
    """Zero-shot classifier: pixels [B, 3, H, W] in [0, 1] to float32 logits [B, C] for one list of classes.

    precision: None computes in the weights' own type, torch.bfloat16 runs the image tower under autocast.
    """

    def __init__(self, clip: "ZeroShotCLIP", class_names: Sequence[str], templates: Sequence[str], precision=None):
        super().__init__()
        self.clip, self.precision = clip, precision
        self.class_names, self.templates = tuple(class_names), tuple(templates)
        self.register_buffer("text_features", clip.text_features(class_names, templates), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.logits(x, self.text_features, self.precision)

    def fast(self) -> "Classifier":
        """The same classifier for gradients in bfloat16: attacks on a CPU take half the time, and no
        gradient underflows (bfloat16 has the exponents of float32). Verdicts belong to the original."""
        return Classifier(self.clip, self.class_names, self.templates, torch.bfloat16)


class ZeroShotCLIP(nn.Module):
    """An open_clip model with pixels outside and normalization inside."""

    def __init__(self, model: nn.Module, tokenizer, name: str, weights_sha256: str):
        super().__init__()
        self.model, self.tokenizer, self.name, self.weights_sha256 = model, tokenizer, name, weights_sha256
        self.image_size = int(
            model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size
        )
        self.is_vit = hasattr(model.visual, "class_embedding")
        self.grid = model.visual.grid_size[0] if self.is_vit else 0
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self._text_cache: dict[tuple, Tensor] = {}

    @property
    def visual(self) -> nn.Module:
        """The image tower (all that fine-tuning defenses train)."""
        return self.model.visual

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

    def tokens(self, x: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """All image tokens in the joint space, [B, 1 + N, D], CLS first, not normalized (transformers only)."""
        if not self.is_vit:
            raise UserError(f"expected a vision transformer for image tokens, got {self.name}; choose a ViT backbone")
        with autocast(self.device, precision):
            tokens = transformer.image_tokens(self.visual, self.normalize(x))
        return tokens.float() if precision else tokens

    def image_features(self, x: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """Unit image features [B, D]."""
        if self.is_vit:
            return F.normalize(self.tokens(x, precision)[:, 0], dim=-1)
        with autocast(self.device, precision):
            features = self.visual(self.normalize(x))
        return F.normalize(features.float() if precision else features, dim=-1)

    @torch.no_grad()
    def text_features(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit text features [C, D]: the mean over templates of unit features, made unit again; computed once a key."""
        key = (tuple(class_names), tuple(templates), str(self.device))
        if not class_names or not templates or not all("{}" in t for t in templates):
            got = f"{len(class_names)} names and {list(templates)}"
            raise UserError(f"expected class names and templates with {{}} for the name, got {got}")
        if key not in self._text_cache:
            per_template = [self.encode_text([t.format(c) for c in class_names]) for t in templates]
            self._text_cache[key] = F.normalize(torch.stack(per_template).mean(0), dim=-1)
        return self._text_cache[key]

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


def autocast(device: torch.device, precision: torch.dtype | None):
    """Autocast to `precision`, or nothing for None."""
    return contextlib.nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)


def load_clip(name: str = "nano", *, pretrained: str = "", device: str = "") -> ZeroShotCLIP:
    """A CLIP in evaluation mode.

    name: a bundled model ("nano") or an open_clip architecture ("ViT-B-32-quickgelu").
    pretrained: for an open_clip architecture, one of its weight tags ("openai") or a local weights file; for a bundled
    model, empty for its own weights or a local file of the same shapes. Shapes and the activation function must fit:
    nothing is resized and a wrong GELU is an error.
    """
    open_clip = _open_clip()
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"unknown backbone {name!r}; {near_miss(name, open_clip.list_models())}")
    _check_plain(config, name)
    bundled = asset("clip", f"{name}.json").exists()
    if not pretrained and not bundled:
        raise UserError(
            f"backbone {name!r} has no bundled weights; pass pretrained, a tag such as 'openai' or a local file"
        )
    path = Path(pretrained) if pretrained else asset("clip", f"{name}.safetensors")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        _check_tag(open_clip.get_pretrained_cfg(name, pretrained), config, name, pretrained)
        path = _download(open_clip, name, pretrained)
    elif not path.is_file():
        choices = f"a tag ({', '.join(tags[:4])})" if tags else "a local file"
        raise UserError(f"expected weights for {name!r} at {path}, found none; pass {choices} or put the file there")
    if bundled and not pretrained:
        _check_sum(path)
    model = _empty_model(open_clip, name)
    _load(model, read_weights(path), name, path)
    return ZeroShotCLIP(model, _tokenizer(open_clip, name), name, sha256(path)).eval().to(resolve_device(device))


@lru_cache
def _open_clip():
    """open_clip with the bundled models registered; slow to import, so only where a model is needed."""
    import open_clip

    open_clip.add_model_config(asset("clip"))
    return open_clip


def _empty_model(open_clip, name: str) -> nn.Module:
    """The architecture; open_clip's warning that no weights were loaded would mislead, they come next."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return open_clip.create_model(name, load_weights=False)
    finally:
        logging.disable(disabled)


def _tokenizer(open_clip, name: str):
    """CLIP's tokenizer, for the bundled models with their own small vocabulary."""
    bundled = asset("clip", f"{name}.json").exists()
    return open_clip.get_tokenizer(name, **({"bpe_path": str(asset("clip", "bpe.txt.gz"))} if bundled else {}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors or `weights_only` torch file, as float32; nothing from the file is executed."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        skip = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI stores among the tensors
        return {k.removeprefix("module."): v.float() for k, v in state.items() if k not in skip}
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        AttributeError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        mend = "save its state dict" if "TorchScript" in reason else "fetch it again"
        raise UserError(f"expected whole weights in {path}, got a file that does not load ({reason}); {mend}") from None


def _load(model: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    own = model.state_dict()
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    missing = [k for k in own if k not in state and k != "attn_mask"]
    if wrong or missing:
        what = (
            f"{wrong[0]} is {tuple(state[wrong[0]].shape)} instead of {tuple(own[wrong[0]].shape)}"
            if wrong
            else f"{missing[0]} is missing"
        )
        raise UserError(
            f"expected weights shaped like {name!r} (image size and context length included), got {path}: {what}"
        )
    unknown = [k for k in state if k not in own and k != "attn_mask"]
    if unknown:
        raise UserError(f"expected the weights of {name!r}, got {path} with an unknown tensor {unknown[0]!r}")
    model.load_state_dict(state, strict=False)


def _check_plain(config: dict, name: str) -> None:
    """Refuse architectures that pool or embed in another way than `transformer` writes out."""
    plain = {
        "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
        "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
    }
    extra = set(config) - {"embed_dim", "quick_gelu", *plain}
    extra |= {key for tower, known in plain.items() for key in set(config[tower]) - known}
    if extra:
        raise UserError(f"expected a CLIP built like OpenAI's, got {name!r} with {min(extra)}; try ViT-B-32-quickgelu")


def _check_tag(tag: dict, config: dict, name: str, pretrained: str) -> None:
    """Refuse published weights that were trained with another activation or input normalization."""
    quick = bool(tag.get("quick_gelu", False))
    if quick != bool(config.get("quick_gelu", False)):
        needs, other = ("QuickGELU", f"{name}-quickgelu") if quick else ("GELU", name.removesuffix("-quickgelu"))
        raise UserError(f"weights {pretrained!r} need {needs}, {name!r} has the other activation; use {other!r}")
    if (tuple(tag.get("mean", MEAN)), tuple(tag.get("std", STD))) != (MEAN, STD):
        raise UserError(f"weights {pretrained!r} of {name!r} need another mean and std than CLIP's; take another tag")


def _check_sum(path: Path) -> None:
    expected = json.loads(path.with_suffix(".card.json").read_text())["weights_sha256"]
    if sha256(path) != expected:
        raise UserError(
            f"expected SHA-256 {expected[:12]}… for {path.name}, got {sha256(path)[:12]}…; check out the file again"
        )


def _download(open_clip, name: str, tag: str) -> Path:
    """Weights of an open_clip tag through open_clip's own checksummed download; one clear line without network."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    offline = "without network: fetch them elsewhere and pass the file's path as pretrained"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
            cfg = open_clip.get_pretrained_cfg(name, tag)
            return Path(open_clip.download_pretrained(cfg))
    except Exception as error:  # the hub client raises many kinds; each means that the file is not here
        raise UserError(f"weights {tag!r} of {name!r} could not be had ({type(error).__name__}) {offline}") from None


def random_clip(name: str = "nano", seed: int = 0) -> ZeroShotCLIP:
    """Shapes of `name`, a bundled model or an open_clip architecture, with seeded random weights: it has learned nothing."""
    open_clip = _open_clip()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _empty_model(open_clip, name)
    return ZeroShotCLIP(model, _tokenizer(open_clip, name), name, f"random-{seed}").eval()


def imagenet_names() -> tuple[str, ...]:
    """Prompt names of ImageNet-1k in label order, as OpenAI cleaned them and open_clip carries them."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)
