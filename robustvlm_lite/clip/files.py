"""Weight files: read without executing anything, recognized by their form, and fitted to a model or refused."""

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from ..runtime import UserError

# Where publishers wrap a state dict: TeCoA (Mao et al. 2023) keeps the image tower beside its prompter's state, which
# it calls state_dict; open_clip's training keeps the whole model under that name.
WRAPPERS = ("vision_encoder_state_dict", "state_dict")
NUMBERS = ("input_resolution", "context_length", "vocab_size")  # that OpenAI stores among the tensors
COUNTERS = ("attn_mask", "num_batches_tracked")  # buffers that say nothing about a model


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors or `weights_only` torch file, as float32; nothing from the file is executed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = next((state[key] for key in WRAPPERS if key in state), state)
        return {k.removeprefix("module."): v.float() for k, v in state.items() if k not in NUMBERS}
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        mend = "save its state dict" if "TorchScript" in reason else "fetch it again"
        raise UserError(f"expected whole weights in {path}, got a file that does not load ({reason}); {mend}") from None


def is_image_tower(state: dict[str, Tensor]) -> bool:
    """Whether a state dict holds an image tower alone, under open_clip's names without their leading `visual.`."""
    return "conv1.weight" in state


def with_image_tower(tower: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole model: the text side of `base` and this image tower."""
    text = {k: v for k, v in base.items() if not k.startswith("visual.")}
    return text | {f"visual.{k}": v for k, v in tower.items()}


def fit(model: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Load `state` into `model`; UserError unless every tensor is there, none is unknown and every shape agrees."""
    own = {k: v for k, v in model.state_dict().items() if not k.endswith(COUNTERS)}
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    missing = [k for k in own if k not in state]
    if wrong or missing:
        what = (
            f"{wrong[0]} is {tuple(state[wrong[0]].shape)} instead of {tuple(own[wrong[0]].shape)}"
            if wrong
            else f"{missing[0]} is missing"
        )
        raise UserError(
            f"expected weights shaped like {name!r} (image size and context length included), got {path}: {what}"
        )
    unknown = [k for k in state if k not in own and not k.endswith(COUNTERS)]
    if unknown:
        raise UserError(f"expected the weights of {name!r}, got {path} with an unknown tensor {unknown[0]!r}")
    model.load_state_dict(state, strict=False)
