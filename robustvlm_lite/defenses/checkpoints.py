"""Fine-tuned models in small files: the change of each weight in 8 bits, as safetensors.

Fine-tuning moves weights by little. Stored as int8 steps of one scale a row, the change of a tower takes a quarter of
float32 and is more exact than the tower in half precision.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..clip import ZeroShotCLIP
from ..runtime import UserError
from .base import Defense


def _tower(clip: ZeroShotCLIP) -> dict[str, Tensor]:
    """Weights and statistics of the image tower, without the step counters of batch norm."""
    return {key: value for key, value in clip.visual.state_dict().items() if value.is_floating_point()}


def save_change(defense: Defense, original: ZeroShotCLIP, path: Path, **facts) -> None:
    """Write the change from `original`'s image tower to the defense's; facts (JSON values) go into the header."""
    header = {"base": original.name, "base_sha256": original.weights_sha256, "method": defense.name} | facts
    write_change(_tower(original), _tower(defense.clip), path, header)


def write_change(before: dict[str, Tensor], after: dict[str, Tensor], path: Path, header: dict) -> None:
    """Write the change of each tensor of `after` in 8 bits, with one scale a row."""
    tensors = {}
    for key, value in after.items():
        change = (value - before[key]).detach().float().cpu()
        rows = change.reshape(len(change), -1) if change.ndim > 1 else change.reshape(1, -1)
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        tensors[key] = (rows / scale).round().to(torch.int8).contiguous()
        tensors[f"{key}.scale"] = scale[:, 0].contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"facts": json.dumps(header)})


def read_facts(path: Path) -> dict:
    """The header of a checkpoint: base, method, configuration, training."""
    try:
        with safe_open(path, "pt") as f:
            return json.loads((f.metadata() or {})["facts"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"expected a defense checkpoint at {path}, got a file that does not load ({error}); make it again"
        ) from None


@torch.no_grad()
def load_change(defense: Defense, path: Path) -> Defense:
    """Apply a checkpoint to a defense that still holds its base weights. Raises UserError if base or shapes differ."""
    clip = defense.clip
    defense.facts = apply_change(_tower(clip), path, clip.name, clip.weights_sha256)
    clip.requires_grad_(False)
    return defense


@torch.no_grad()
def apply_change(tensors: dict[str, Tensor], path: Path, name: str, weights_sha256: str) -> dict:
    """Add the changes in a file to tensors in place, all or none; returns the file's facts. name, weights_sha256: of the base."""
    facts, changes = read_facts(path), load_file(path)
    if facts["base_sha256"] != weights_sha256:
        raise UserError(f"expected {path.name} on the weights it was trained from ({facts['base']}), got {name} with others")
    for key, value in tensors.items():
        rows = len(value) if value.ndim > 1 else 1
        wanted = {key: (rows, value.numel() // rows), f"{key}.scale": (rows,)}
        for tensor, shape in wanted.items():
            got = tuple(changes[tensor].shape) if tensor in changes else "none"
            if got != shape:
                raise UserError(f"expected in {path.name} a tensor {tensor} of shape {shape}, got {got}; make it again")
    for key, value in tensors.items():
        change = changes[key].float() * changes[f"{key}.scale"][:, None]
        value.add_(change.reshape(value.shape).to(value.device))
    return facts
