"""A CLIP by name: registered weights, an open_clip tag or a local file, checked before it is handed out."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..runtime import UserError, resolve_device, sha256
from . import architectures, files, registry
from .model import ZeroShotCLIP, image_side
from .registry import Weights


def load_clip(name: str = "nano", *, pretrained: str = "", device: str = "") -> ZeroShotCLIP:
    """A CLIP in evaluation mode.

    name: registered weights, bundled ("nano") or published ("fare2-vit-l-14"), or an open_clip architecture
    ("ViT-B-32-quickgelu").
    pretrained: for an architecture, one of its open_clip tags ("openai") or a local weights file; for registered
    weights, empty or a local file. There an image tower alone is completed by the text side that it was tuned beside.
    Shapes, activation and, where it is published, the checksum must fit: nothing is resized and a wrong GELU is an error.
    """
    entry = registry.find(name, pretrained)
    architecture = entry.architecture if entry else name
    architectures.config_of(architecture)
    given = bool(pretrained) and not (entry and pretrained == entry.tag)
    path = _local_file(name, pretrained) if given or not entry else _registered_file(entry)
    digest = sha256(path)
    if entry and entry.bundled and not given:
        _check_hash(path, digest, entry)
    _check_known(path, digest, name, architecture, entry)
    state = files.read_weights(path)
    tower = files.is_image_tower(state)
    if entry and not entry.bundled and not tower:  # the published sum is that of a whole model
        _check_hash(path, digest, entry)
    if tower:
        state = files.with_image_tower(state, _base_state(path, name, entry))
    model = architectures.empty_model(architecture)
    if entry:
        _check_entry(model, entry)
    files.fit(model, state, name, path)
    return ZeroShotCLIP(model, architectures.tokenizer(architecture), name, digest).eval().to(resolve_device(device))


def random_clip(name: str = "nano", seed: int = 0) -> ZeroShotCLIP:
    """Shapes of `name`, one of our own models or an open_clip architecture, with seeded random weights: it has learned nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = architectures.empty_model(name)
    return ZeroShotCLIP(model, architectures.tokenizer(name), name, f"random-{seed}").eval()


def _local_file(name: str, pretrained: str) -> Path:
    """The file at `pretrained`, or of an open_clip tag that the registry does not list."""
    if not pretrained:
        raise UserError(
            f"backbone {name!r} has no bundled weights; pass pretrained, a tag such as 'openai' or a local file"
        )
    tags = architectures.tags(name)
    if pretrained in tags:
        return architectures.download_tag(name, pretrained)
    if not Path(pretrained).is_file():
        choices = f"a tag ({', '.join(tags[:4])})" if tags else "a local file"
        raise UserError(
            f"expected weights for {name!r} at {pretrained}, found none; pass {choices} or put the file there"
        )
    return Path(pretrained)


def _registered_file(entry: Weights) -> Path:
    """The entry's file, downloaded from the hub where it is not here yet."""
    path, mend = registry.on_machine(entry), registry.how_to_get(entry)
    if path is None and not entry.hub:
        raise UserError(f"expected the weights {entry.name!r} on this machine, found none; {mend}")
    return path or architectures.download({"hf_hub": entry.hub}, f"weights {entry.name!r}", mend)


def _base_state(path: Path, name: str, entry: Weights | None) -> dict[str, Tensor]:
    """The whole model beside whose text side an image tower was tuned: the entry's base, or the bundled model itself."""
    if not entry or not (entry.base or entry.bundled):
        complete = [w.name for w in registry.published().values() if w.base and w.architecture == name]
        mend = f"name the weights that it belongs to: {', '.join(complete)}" if complete else "save the whole model"
        raise UserError(f"expected a whole model for {name!r}, got {path} with an image tower alone; {mend}")
    base = registry.find(entry.base) if entry.base else entry
    file = _registered_file(base)
    _check_hash(file, sha256(file), base)
    return files.read_weights(file)


def _check_hash(path: Path, digest: str, entry: Weights) -> None:
    if entry.sha256 and digest != entry.sha256:
        again = "check out the file again" if entry.bundled else "fetch it again"
        raise UserError(f"expected SHA-256 {entry.sha256[:12]}… for {path.name}, got {digest[:12]}…; {again}")


def _check_known(path: Path, digest: str, name: str, architecture: str, entry: Weights | None) -> None:
    """Refuse a file whose checksum says that it is something else, such as weights of the other activation."""
    known = registry.by_sha256(digest)
    other = known and entry and not entry.bundled and known.name != entry.name
    if known and (other or known.architecture != architecture):
        raise UserError(
            f"expected weights for {name!r}, got {path}, which is {known.name!r} ({known.architecture}, "
            f"{known.activation}); load it by that name"
        )


def _check_entry(model: nn.Module, entry: Weights) -> None:
    """Hold the registry to the architecture that open_clip built."""
    built = (architectures.activation(model), image_side(model.visual), model.context_length)
    stated = (entry.activation, entry.image_size, entry.context_length)
    if built != stated:
        raise UserError(
            f"expected {entry.name!r} with activation, image size and context length {stated}, got {built} from "
            f"{entry.architecture!r}; correct models.yml"
        )
