"""The prompts of a method as parameters, and as the tensors that one forward pass needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..clip import ZeroShotCLIP
from ..runtime import UserError, generator
from .spec import PromptSpec
from .words import context_ids

STD = 0.02  # of prompts that start from a normal draw (CoOp, MaPLe, FAP)
FREE = {  # coupling -> what is learned as it is; the rest follows from it through linear maps
    "none": ("ctx", "text_deep", "vision", "vision_deep"),
    "text2vision": ("ctx", "text_deep"),
    "vision2text": ("vision", "vision_deep"),
    "fap": ("ctx", "vision_deep"),
}


@dataclass(frozen=True)
class Prompts:
    """What a prompted forward pass reads, the same for all images or one for each of B images.

    text: one tensor a prompted block, [n, W] or [B, 1, n, W]; the first may differ by class, [C, n, W] or [B, C, n, W].
    vision: one tensor a prompted block, [n, W] or [B, n, W].  pixel: [3, H, W] or [B, 3, H, W], added to normalized images.
    """

    text: tuple[Tensor, ...] = ()
    vision: tuple[Tensor, ...] = ()
    pixel: Tensor | None = None

    def detach(self) -> "Prompts":
        """The same values as constants, for an attack during training."""
        return self._each(Tensor.detach, Tensor.detach)

    def expand(self, batch: int) -> "Prompts":
        """An own copy for each of `batch` images, leaves that require a gradient (test-time tuning).

        Images do not meet in any layer, so the gradient of a sum over images is each image's own.
        """
        if batch < 1:
            raise UserError(f"expected a batch of at least 1 image, got {batch}; pass the number of images")

        def copies(t: Tensor, shared: bool = False) -> Tensor:
            t = t.detach()[None] if shared else t.detach()
            return t.expand(batch, *t.shape).clone().requires_grad_()

        return self._each(lambda t: copies(t, shared=t.ndim == 2), copies)

    def _each(self, text: Callable, image: Callable) -> "Prompts":
        pixel = None if self.pixel is None else image(self.pixel)
        return Prompts(tuple(map(text, self.text)), tuple(map(image, self.vision)), pixel)


class PromptLearner(nn.Module):
    """The parameters of a `PromptSpec` for the towers of `clip`; calling it gives `Prompts`.

    class_names: the classes that class-specific contexts belong to; other prompts know no classes.  seed: of all random
    starts. Parameters (None where the spec has none): ctx [n, Wt] or [C, n, Wt], text_deep [depth - 1, n, Wt],
    vision [n, Wv], vision_deep [depth - 1, n, Wv], frame [3, pixels of the frame], and the maps to_vision, to_text.
    Raises UserError if the prompts do not fit the towers.
    """

    def __init__(self, clip: ZeroShotCLIP, spec: PromptSpec, class_names: Sequence[str] = (), seed: int = 0):
        super().__init__()
        spec.check_towers(clip)
        if spec.class_specific != bool(class_names):
            wanted = "the class names of class-specific contexts" if spec.class_specific else "no class names"
            raise UserError(f"expected {wanted}, got {len(class_names)} names; they go with class_specific=True alone")
        self.spec, self.seed, self.class_names, self.image_size = spec, seed, tuple(class_names), clip.image_size
        embedding = clip.model.token_embedding.weight
        text, vision = embedding.shape[1], clip.visual.conv1.out_channels
        shapes = {
            "ctx": (*([len(class_names)] if spec.class_specific else []), spec.n_text, text),
            "text_deep": (spec.depth_text - 1, spec.n_text, text),
            "vision": (spec.n_vision, vision),
            "vision_deep": (spec.depth_vision - 1, spec.n_vision, vision),
        }
        for name, shape in shapes.items():
            used = name in FREE[spec.coupling] and 0 not in shape
            self.register_parameter(name, nn.Parameter(embedding.new_empty(shape)) if used else None)
        depth = spec.depth_text  # coupled prompts are equally deep in both towers
        to_vision, to_text = {"text2vision": (depth, 0), "vision2text": (0, depth), "fap": (1, depth - 1)}.get(
            spec.coupling, (0, 0)
        )
        self.to_vision = _linear(min(to_vision, 1) if spec.share_projection else to_vision, text, vision, embedding)
        self.to_text = _linear(min(to_text, 1) if spec.share_projection else to_text, vision, text, embedding)
        ids = torch.tensor(context_ids(clip, spec)[: spec.n_text], dtype=torch.int64, device=embedding.device)
        self.register_buffer("origin", clip.model.token_embedding(ids).detach(), persistent=False)
        self.register_buffer("rim", _rim(self.image_size, spec.pixel_pad).to(embedding.device), persistent=False)
        self.frame = nn.Parameter(embedding.new_empty(3, len(self.rim))) if spec.pixel_pad else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start that spec and seed give, bit for bit."""
        g = generator("prompts", self.seed)
        for name, p in self.named_parameters():
            if name == "ctx" and self.spec.start == "words":
                p.copy_(self.origin)
            elif name.startswith("to_"):  # torch's own start of a linear layer
                bound = self.get_submodule(name.rpartition(".")[0]).in_features ** -0.5
                p.copy_((2 * torch.rand(p.shape, generator=g) - 1) * bound)
            else:
                p.copy_(torch.randn(p.shape, generator=g) * (1.0 if name == "frame" else STD))

    def forward(self) -> Prompts:
        ctx, vision = self.ctx, self.vision
        deep_text = () if self.text_deep is None else tuple(self.text_deep)
        deep_vision = () if self.vision_deep is None else tuple(self.vision_deep)
        if self.spec.coupling == "text2vision":
            vision, *deep_vision = _through(self.to_vision, (ctx, *deep_text))
        elif self.spec.coupling == "vision2text":
            ctx, *deep_text = _through(self.to_text, (vision, *deep_vision))
        elif self.spec.coupling == "fap":
            (vision,), deep_text = _through(self.to_vision, (ctx,)), _through(self.to_text, deep_vision)
        text = () if ctx is None else (ctx, *deep_text)
        return Prompts(text, () if vision is None else (vision, *deep_vision), self._pixels())

    def expand(self, batch: int) -> Prompts:
        """An own copy of the present prompts for each of `batch` images; see `Prompts.expand`."""
        return self().expand(batch)

    def num_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters())

    def state(self) -> dict[str, Tensor]:
        """What is learned, by name, as copies on the CPU; nothing of CLIP, nothing of the classes."""
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> "PromptLearner":
        """Take over a `state`. Raises UserError, before anything moves, if a name or a shape differs."""
        own = dict(self.named_parameters())
        for name in sorted(own.keys() | state.keys()):
            wanted, got = (tuple(d[name].shape) if name in d else "none" for d in (own, state))
            if wanted != got:
                raise UserError(f"expected prompts {name} of shape {wanted}, got {got}; load them into their own spec")
        for name, p in own.items():
            p.copy_(state[name])
        return self

    def _pixels(self) -> Tensor | None:
        if self.frame is None:
            return None
        side = self.image_size
        return self.frame.new_zeros(3, side * side).index_copy(1, self.rim, self.frame).view(3, side, side)


def _linear(n: int, width_in: int, width_out: int, like: Tensor) -> nn.ModuleList:
    """n linear maps without values; `reset` gives them theirs, from its own generator."""
    place = {"device": like.device, "dtype": like.dtype}
    return nn.ModuleList(nn.utils.skip_init(nn.Linear, width_in, width_out, **place) for _ in range(n))


def _through(maps: nn.ModuleList, prompts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each prompt through its own map, or all through the one that they share."""
    return tuple(maps[min(i, len(maps) - 1)](p) for i, p in enumerate(prompts))


def _rim(side: int, width: int) -> Tensor:
    """Where the pixels of a frame lie in a flattened side x side image."""
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[width : side - width, width : side - width] = True
    return (~inside).flatten().nonzero()[:, 0]
