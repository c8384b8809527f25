"""What a prompt-tuned defense learned, in a file: safetensors with the choices that build it again and checksums.

A file holds prompts alone, or a head. It names the base weights, the defense whose image tower the prompts were learned on
("none" for the base itself), and the hash of that tower: on another one the prompts mean nothing.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..runtime import UserError, weights_sha256
from .checkpoints import read_facts

KIND = "prompts"
KEYS = ("method", "base", "base_sha256", "backbone", "tower_sha256", "tensors_sha256", "spec", "class_names", "config")


def save_prompts(defense, path: Path, *, backbone: str = "none", **facts) -> None:
    """Write what a prompt-tuned `defense` learned; facts (JSON values) go into the header.

    backbone: name of the fine-tuned defense whose CLIP carries the prompts, as `load_defense` takes it.
    """
    state = {name: value.contiguous() for name, value in defense.state().items()}
    clip = defense.clip
    header = {"kind": KIND, "method": defense.name, "base": clip.name, "base_sha256": clip.weights_sha256}
    header |= {"backbone": backbone, "tower_sha256": weights_sha256(clip.visual), "tensors_sha256": _sum(state)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"facts": json.dumps(header | defense.choices() | facts)})


def prompt_facts(path: Path) -> dict:
    """The header of a prompt file. Raises UserError if it is none, or lacks a fact."""
    facts = read_facts(path)
    missing = [key for key in KEYS if key not in facts]
    if facts.get("kind") != KIND or missing:
        got = f"one without {', '.join(missing)}" if facts.get("kind") == KIND else "another checkpoint"
        raise UserError(f"expected a prompt file at {path}, got {got}; make it again")
    return facts


def load_prompts(defense, path: Path):
    """Give a `defense` that was built from the file's facts what the file learned; the defense.

    Raises UserError, before anything moves, if base weights, image tower, tensors or shapes differ.
    """
    facts, clip = prompt_facts(path), defense.clip
    if facts["base_sha256"] != clip.weights_sha256:
        raise UserError(
            f"expected {path.name} on the weights it was trained on ({facts['base']}), got {clip.name} with others"
        )
    if facts["tower_sha256"] != weights_sha256(clip.visual):
        raise UserError(
            f"expected {path.name} on the image tower of {facts['backbone']!r} that it was trained on, got another; train it again"
        )
    state = load_file(path)
    if facts["tensors_sha256"] != _sum(state):
        raise UserError(f"expected the tensors of {path.name} with the checksum in its header, got others; make it again")
    defense.load_state(state)
    defense.facts = facts
    return defense


def _sum(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
