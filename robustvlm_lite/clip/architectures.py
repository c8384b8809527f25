"""What open_clip builds for us: empty models and tokenizers by the name of an architecture, and its downloads."""

import contextlib
import io
import logging
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from .. import resnet
from ..runtime import UserError, asset, near_miss
from .model import MEAN, STD, written_out
from .registry import bundled, published

PLAIN = {  # the fields of towers that `transformer` and `resnet` write out
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}


@lru_cache
def open_clip():
    """open_clip with the bundled models registered; slow to import, so only where a model is needed."""
    import open_clip

    open_clip.add_model_config(asset("clip"))
    return open_clip


def config_of(name: str) -> dict:
    """open_clip's config of an architecture; UserError for one that pools or embeds in another way than ours do."""
    config = open_clip().get_model_config(name)
    if config is None:
        known = {*open_clip().list_models(), *bundled(), *published()}
        raise UserError(f"unknown backbone {name!r}; {near_miss(name, known)}")
    extra = set(config) - {"embed_dim", "quick_gelu", *PLAIN}
    extra |= {key for tower, known in PLAIN.items() for key in set(config[tower]) - known}
    if extra:
        raise UserError(f"expected a CLIP built like OpenAI's, got {name!r} with {min(extra)}; try ViT-B-32-quickgelu")
    return config


def empty_model(name: str) -> nn.Module:
    """The architecture; open_clip's warning that no weights were loaded would mislead, they come next."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model = open_clip().create_model(name, load_weights=False)
    finally:
        logging.disable(disabled)
    if written_out(model.visual) is resnet:
        model.visual.to(memory_format=torch.channels_last)  # convolutions on a CPU want it so
    return model


def tokenizer(name: str):
    """CLIP's tokenizer, for our own models with their own small vocabulary."""
    own = asset("clip", f"{name}.json").exists()
    return open_clip().get_tokenizer(name, **({"bpe_path": str(asset("clip", "bpe.txt.gz"))} if own else {}))


def activation(model: nn.Module) -> str:
    """What the blocks of a built model use: "QuickGELU" or "GELU"."""
    return type(model.transformer.resblocks[0].mlp.gelu).__name__


def tags(name: str) -> list[str]:
    """The weights that open_clip publishes for an architecture."""
    return open_clip().list_pretrained_tags_by_model(name)


def download_tag(name: str, tag: str) -> Path:
    """The file of a tag; refuses weights that were trained with another activation or input normalization."""
    cfg, quick_here = open_clip().get_pretrained_cfg(name, tag), bool(config_of(name).get("quick_gelu", False))
    quick = bool(cfg.get("quick_gelu", False))
    if quick != quick_here:
        needs, other = ("QuickGELU", f"{name}-quickgelu") if quick else ("GELU", name.removesuffix("-quickgelu"))
        raise UserError(f"weights {tag!r} need {needs}, {name!r} has the other activation; use {other!r}")
    if (tuple(cfg.get("mean", MEAN)), tuple(cfg.get("std", STD))) != (MEAN, STD):
        raise UserError(f"weights {tag!r} of {name!r} need another mean and std than CLIP's; take another tag")
    return download(cfg, f"weights {tag!r} of {name!r}", "fetch them elsewhere and pass the file's path as pretrained")


def download(cfg: dict, what: str, mend: str) -> Path:
    """The file of an open_clip config (`hf_hub` or `url`) through open_clip's own download; one clear line without network."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
            return Path(open_clip().download_pretrained(cfg))
    except Exception as error:  # the hub client raises many kinds: no network, no such file, no room on the disk
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{what} could not be had ({type(error).__name__}: {reason}); without network: {mend}") from None


def imagenet_names() -> tuple[str, ...]:
    """Prompt names of ImageNet-1k in label order, as OpenAI cleaned them and open_clip carries them."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)
