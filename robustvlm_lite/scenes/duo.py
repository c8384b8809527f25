"""Scenes of two objects for captioning and question answering, with one true caption each.

The world of `world` has many captions for one scene. An attack on a captioner needs the opposite: one sentence that is
right, and a parser that says which of its slots are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from robustvlm_lite.runtime import UserError
from robustvlm_lite.scenes.render import PALETTE, Objects, object_frame, signed_distance, uniform
from robustvlm_lite.scenes.shapes import SHAPE_TABLE, SHAPES

PAINTS = PALETTE | {"pink": (1.0, 0.55, 0.78), "brown": (0.48, 0.27, 0.08), "black": (0.02, 0.02, 0.02), "teal": (0.0, 0.46, 0.46)}
SIZES = {"small": 0.125, "big": 0.205}  # radius, as a fraction of the image side
RELATIONS = ("left of", "above", "below")
OPPOSITES = {"right of": "left of", "below": "above"}
YES_NO = ("no", "yes")
SLOTS = ("size", "color", "shape", "relation", "size", "color", "shape")
EDGE, GAP = 0.01, 0.02  # free rim of the image; free space between objects
CLEAR, LEFT = 0.15, 0.08  # by how much one axis decides the relation; by how much one object is the left one at least
CHUNK = 256
KINDS = ("what", "what", "yes", "no")  # of questions, in turn: half of them ask for a word


class Duo(NamedTuple):
    """One scene in words: the first object is the left one, wherever it lies."""

    first: tuple[str, str, str]  # size, color, shape
    relation: str
    second: tuple[str, str, str]

    @property
    def slots(self) -> tuple[str, ...]:
        """The seven slots in the order of SLOTS, whichever object a sentence begins with."""
        return _slots(self.first, self.relation, self.second)

    def caption(self) -> str:
        return f"a {' '.join(self.first)} {self.relation} a {' '.join(self.second)}"

    def questions(self) -> list[tuple[str, str]]:
        """Every question that has an answer, with it."""
        places = {"left of": ("left", "right"), "above": ("above", "below"), "below": ("below", "above")}[self.relation]
        asked = []
        for place, thing in zip(places, (self.first, self.second), strict=True):
            for slot, word in zip(("size", "color", "shape"), thing, strict=True):
                asked.append((f"what {slot} is the {place} thing ?", word))
        seen = {*self.first, *self.second}
        asked += [(f"is there a {color} thing ?", YES_NO[color in seen]) for color in PAINTS]
        asked += [(f"is there a {shape} ?", YES_NO[shape in seen]) for shape in SHAPES]
        for k, slot in enumerate(("size", "color", "shape")):
            asked.append((f"do both have the same {slot} ?", YES_NO[self.first[k] == self.second[k]]))
        return asked


@dataclass(frozen=True)
class DuoScenes:
    """N scenes: images uint8 [N, 3, S, S] and what they show."""

    images: Tensor
    duos: tuple[Duo, ...]

    def __len__(self) -> int:
        return len(self.duos)

    def pixels(self) -> Tensor:
        """Images [N, 3, S, S] in [0, 1]."""
        return self.images.float() / 255

    def captions(self) -> list[str]:
        return [duo.caption() for duo in self.duos]


def sample_duos(n: int, generator: Generator, *, size: int = 64) -> DuoScenes:
    """Draw n scenes; the same generator state gives the same scenes. Raises UserError for n < 1 or size < 32."""
    if n < 1 or size < 32:
        raise UserError(f"expected n >= 1 scenes of at least 32 pixels, got n={n}, size={size}")
    kinds = [torch.randint(0, len(known), (n, 2), generator=generator) for known in (SIZES, PAINTS, SHAPES)]
    radius = torch.tensor(list(SIZES.values()))[kinds[0]]
    center = _places(radius, generator)
    order = center[:, :, 0].argsort(dim=1)
    kinds, radius = [k.gather(1, order) for k in kinds], radius.gather(1, order)
    center = center.gather(1, order[:, :, None].expand(-1, -1, 2))
    right, down = (center[:, 1] - center[:, 0]).unbind(dim=1)
    relation = torch.where(right > down.abs(), 0, torch.where(down > 0, 1, 2))
    images = torch.cat([_draw(kinds, center, radius, size, part, generator) for part in torch.arange(n).split(CHUNK)])
    words = [list(known) for known in (SIZES, PAINTS, SHAPES)]
    rows = [zip(*(k[:, side].tolist() for k in kinds), strict=True) for side in (0, 1)]
    things = [[tuple(names[k] for names, k in zip(words, row, strict=True)) for row in side] for side in rows]
    relations = [RELATIONS[r] for r in relation]
    return DuoScenes(images, tuple(Duo(a, r, b) for a, r, b in zip(things[0], relations, things[1], strict=True)))


def _places(radius: Tensor, generator: Generator) -> Tensor:
    """Centers [n, 2, 2] inside the image, drawn again until the objects are apart and one axis clearly decides."""
    center = torch.empty((*radius.shape, 2))
    open_ = torch.ones(len(radius), dtype=torch.bool)
    while open_.any():
        low = (radius[open_] + EDGE)[..., None]
        center[open_] = low + torch.rand((int(open_.sum()), 2, 2), generator=generator) * (1 - 2 * low)
        step = center[:, 1] - center[:, 0]
        right, down = step.abs().unbind(dim=1)
        clear = ((right - down).abs() >= CLEAR) & (right >= LEFT)
        open_ = ~(clear & (step.norm(dim=1) >= radius.sum(1) + GAP))
    return center


def _draw(kinds: list[Tensor], center: Tensor, radius: Tensor, size: int, part: Tensor, generator: Generator) -> Tensor:
    """Images uint8 [B, 3, S, S] of the scenes `part`: a gray field with grain, and both objects on it."""
    n = len(part)
    field = uniform((n, 1, 1, 1), 0.235, 0.47, generator) + uniform((n, 1, size, size), -0.03, 0.03, generator)
    canvas = field.expand(-1, 3, -1, -1).clone()
    turn = torch.tensor([most for _, most in SHAPE_TABLE.values()])
    palette = torch.tensor(list(PAINTS.values()))
    for side in (0, 1):
        _, color, shape = (k[part, side] for k in kinds)
        rotation = uniform((n,), -1, 1, generator) * turn[shape]
        thing = Objects(torch.arange(n), shape, color, color, center[part, side], radius[part, side], rotation)
        distance = signed_distance(shape, *object_frame(thing, size)) * (radius[part, side] * size)[:, None, None]
        rgb = palette[color] * uniform((n, 1), 0.94, 1.0, generator)
        canvas = torch.lerp(canvas, rgb[:, :, None, None], (0.5 - distance).clamp(0, 1)[:, None])
    return canvas.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def ask(duos: Sequence[Duo], kinds: Sequence[str], generator: Generator) -> list[tuple[str, str]]:
    """A random question with its answer for each scene; kinds: of the question, "what", or by its answer "yes" or "no"."""
    asked = []
    for duo, kind in zip(duos, kinds, strict=True):
        fits = [qa for qa in duo.questions() if (qa[1] if qa[1] in YES_NO else "what") == kind]
        asked.append(fits[torch.randint(len(fits), (), generator=generator)])
    return asked


def duo_vocabulary() -> tuple[str, ...]:
    """Every word that a caption, a question or an answer of this world holds, in a fixed order."""
    thing = ("small", next(iter(PAINTS)), SHAPES[0])
    texts = [*SIZES, *PAINTS, *SHAPES, *YES_NO]
    for relation in RELATIONS:
        duo = Duo(thing, relation, thing)
        texts += [duo.caption(), *(question for question, _ in duo.questions())]
    return tuple(dict.fromkeys(word for text in texts for word in text.split()))


def parse(caption: str) -> tuple[str, ...] | None:
    """The seven slots of a caption in the order of SLOTS, or None for what is no caption of this world.

    "a X right of a Y" reads as "a Y left of a X", "below" as "above": the same scene in other words.
    """
    words = caption.lower().split()
    for said in {*RELATIONS, *OPPOSITES}:
        middle = said.split()
        if len(words) == 8 + len(middle) and words[4 : 4 + len(middle)] == middle and words[0] == words[4 + len(middle)] == "a":
            first, second = tuple(words[1:4]), tuple(words[5 + len(middle) :])
            if all(s in SIZES and c in PAINTS and t in SHAPES for s, c, t in (first, second)):
                return _slots(first, said, second)
    return None


def _slots(first: tuple, relation: str, second: tuple) -> tuple[str, ...]:
    """One order for both sentences of a scene: the left or the upper object first."""
    if relation in OPPOSITES:
        return (*second, OPPOSITES[relation], *first)
    return (*first, relation, *second)


def slots_right(captions: list[str], truth: list[Duo] | tuple[Duo, ...]) -> Tensor:
    """Which slots of each caption are right, bool [N, 7]; all wrong where a caption cannot be read."""
    if len(captions) != len(truth):
        raise UserError(f"expected one caption a scene, got {len(captions)} for {len(truth)}; pass them in the scenes' order")
    read = [parse(caption) or ("",) * len(SLOTS) for caption in captions]
    return torch.tensor([[a == b for a, b in zip(slots, duo.slots, strict=True)] for slots, duo in zip(read, truth, strict=True)])
