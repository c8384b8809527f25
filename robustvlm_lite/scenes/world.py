"""What may stand in a scene: attributes, the held-out pairs, zero-shot tasks, and how scenes are drawn by chance."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from robustvlm_lite.runtime import UserError, near_miss
from robustvlm_lite.scenes import words
from robustvlm_lite.scenes.render import PAINTED, PALETTE, SKETCH, Objects, draw, uniform
from robustvlm_lite.scenes.shapes import SHAPE_TABLE, SHAPES

COLORS = tuple(PALETTE)
TEXTURES = ("solid", "striped", "dotted")
COUNTS = ("one", "two", "three", "four")
STYLES = ("painting", "sketch")
PAIRS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

# Never drawn in training: one pair for every shape, one for every color and a second for red and blue.
HELD_OUT_PAIRS = (
    "cyan circle",
    "orange square",
    "purple triangle",
    "green star",
    "red cross",
    "yellow ring",
    "blue heart",
    "white crescent",
    "red arrow",
    "blue bar",
)

NOUN_TEMPLATES = ("the {}", "one {}", "a photo of the {}", "a picture of the {}")
KIND_TEMPLATES = ("the {} shape", "one {} shape", "a photo of the {} object", "a picture of the {} object")
# task -> (class names, templates).  No template puts "a" before a class name: "a orange arrow" is not English.
TASKS = {
    "shape": (SHAPES, NOUN_TEMPLATES),
    "color": (COLORS, KIND_TEMPLATES),
    "texture": (TEXTURES, KIND_TEMPLATES),
    "pair": (PAIRS, NOUN_TEMPLATES),
    "pair-heldout": (PAIRS, NOUN_TEMPLATES),
    "count": (
        ("one object", "two objects", "three objects", "four objects"),
        ("{}", "a photo of {}", "a picture of {}"),
    ),
    "style": (STYLES, ("this is a {}", "a {} of one object")),
}
MAX_OBJECTS = len(COUNTS)
SHARE_SEVERAL, SHARE_SKETCH = 0.20, 0.10  # of the training mixture; the rest is one painted object


@dataclass(frozen=True)
class Scenes:
    """N rendered scenes of up to four objects; unused object slots hold -1 (ids) or 0 (geometry).

    A sketch has no color and no texture (-1).  Geometry is in fractions of the image side: center is (x right, y down).
    """

    images: Tensor  # uint8 [N, 3, S, S]
    masks: Tensor  # bool [N, S, S], union of the objects
    shape: Tensor  # int64 [N, 4]
    color: Tensor  # int64 [N, 4]
    texture: Tensor  # int64 [N, 4]
    count: Tensor  # int64 [N], the number of objects, 1 to 4
    style: Tensor  # int64 [N], index into STYLES
    center: Tensor  # float32 [N, 4, 2]
    radius: Tensor  # float32 [N, 4]
    rotation: Tensor  # float32 [N, 4], radians, counter-clockwise

    def __len__(self) -> int:
        return len(self.images)

    def labels(self, task: str) -> Tensor:
        """Class index of each scene in ``TASKS[task]``: int64 [N], -1 where the scene has no single answer."""
        check_task(task)
        if task == "count":
            return self.count - 1
        if task == "style":
            return self.style.clone()
        shape, color = self.shape[:, 0], self.color[:, 0]
        pair = torch.where(color >= 0, color * len(SHAPES) + shape, color)
        label = {"shape": shape, "color": color, "texture": self.texture[:, 0]}.get(task, pair)
        return torch.where(self.count == 1, label, -1)

    def things(self, i: int) -> list[words.Thing]:
        """The objects of scene i in words."""
        rows = zip(
            self.shape[i].tolist(),
            self.color[i].tolist(),
            self.texture[i].tolist(),
            self.center[i, :, 0].tolist(),
            self.radius[i].tolist(),
            strict=True,
        )
        return [
            words.Thing(SHAPES[s], COLORS[c] if c >= 0 else "", TEXTURES[t] if t >= 0 else "", x, r)
            for s, c, t, x, r in list(rows)[: int(self.count[i])]
        ]

    def captions(self, i: int) -> list[str]:
        """Paraphrases of scene i, from coarse to fine."""
        return words.captions(self.things(i), STYLES[int(self.style[i])])

    def questions(self, i: int) -> list[tuple[str, str]]:
        """Questions about scene i with answers of one word."""
        return words.questions(self.things(i), STYLES[int(self.style[i])], SHAPES)


def caption_vocabulary() -> list[str]:
    """Every word that captions, questions, answers, class names or templates can contain, sorted."""
    texts = words.all_texts(SHAPES, COLORS, TEXTURES, STYLES)
    for class_names, templates in TASKS.values():
        texts += [*class_names, *(template.replace("{}", "") for template in templates)]
    return sorted({word for text in texts for word in words.split(text)})


def check_task(task: str) -> None:
    if task not in TASKS:
        raise UserError(f"expected a scene task, got {task!r}; {near_miss(task, TASKS)}")


def pair_ids(held_out: bool) -> Tensor:
    """Indices into PAIRS of the pairs that may be drawn."""
    return torch.tensor([i for i, pair in enumerate(PAIRS) if (pair in HELD_OUT_PAIRS) == held_out])


def draw_counts_and_styles(n: int, task: str | None, generator: Generator) -> tuple[Tensor, Tensor]:
    """Number of objects and style, int64 [n] each."""
    one, painted = torch.ones(n, dtype=torch.int64), torch.full((n,), PAINTED)
    if task == "count":
        return torch.randint(1, MAX_OBJECTS + 1, (n,), generator=generator), painted
    if task == "style":
        return one, torch.randint(0, len(STYLES), (n,), generator=generator)
    if task is not None:
        return one, painted
    kind = torch.rand(n, generator=generator)
    several = torch.randint(2, MAX_OBJECTS + 1, (n,), generator=generator)
    count = torch.where(kind < SHARE_SEVERAL, several, one)
    return count, torch.where(kind >= 1 - SHARE_SKETCH, SKETCH, painted)


def place(count: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Centers [N, 4, 2] and radii [N, 4] such that the disks stay inside the image and never meet.

    One object roams over the image; several take different quarters of it, in random order.
    """
    n, margin = len(count), 0.01
    alone = (count == 1)[:, None]
    radius = torch.where(
        alone,
        uniform((n, 1), 0.22, 0.42, generator).expand(n, MAX_OBJECTS),
        uniform((n, MAX_OBJECTS), 0.16, 0.225, generator),
    )
    quarter = torch.rand((n, MAX_OBJECTS), generator=generator).argsort(dim=1)
    middle = torch.stack((quarter % 2, quarter // 2), dim=-1) * 0.5 + 0.25
    middle = torch.where(alone[..., None], torch.tensor(0.5), middle)
    reach = torch.where(alone, torch.tensor(0.5), torch.tensor(0.25)) - margin - radius
    return middle + uniform((n, MAX_OBJECTS, 2), -1, 1, generator) * reach[..., None], radius


def sample(n: int, generator: Generator, *, task: str | None = None, held_out: bool = False, size: int = 64) -> Scenes:
    """Draw n scenes; the same generator state gives the same scenes.

    task: a key of TASKS draws what that task evaluates; None draws the training mixture (70 % one painted object, 20 %
    two to four, 10 % a sketch).  held_out: draw only HELD_OUT_PAIRS (implied by "pair-heldout"); otherwise they are
    never drawn.  Raises UserError for an unknown task, n < 1, size < 16 or held-out training scenes.
    """
    if task is not None:
        check_task(task)
    elif held_out:
        raise UserError("held-out pairs are for evaluation; expected a task beside held_out=True, got task=None")
    if n < 1 or size < 16:
        raise UserError(f"expected n >= 1 scenes of at least 16 pixels, got n={n}, size={size}")
    count, style = draw_counts_and_styles(n, task, generator)
    present = torch.arange(MAX_OBJECTS) < count[:, None]
    colored = present & (style == PAINTED)[:, None]

    pairs = pair_ids(held_out or task == "pair-heldout")
    pair = pairs[torch.randint(0, len(pairs), (n, MAX_OBJECTS), generator=generator)]
    texture = torch.randint(0, len(TEXTURES), (n, MAX_OBJECTS), generator=generator)
    shape = torch.where(present, pair % len(SHAPES), -1)
    color, texture = torch.where(colored, pair // len(SHAPES), -1), torch.where(colored, texture, -1)

    center, radius = place(count, generator)
    largest_turn = torch.tensor([turn for _, turn in SHAPE_TABLE.values()])
    rotation = uniform((n, MAX_OBJECTS), -1, 1, generator) * largest_turn[shape] * present
    center, radius = center * present[..., None], radius * present

    image, slot = present.nonzero(as_tuple=True)
    flat = (attribute[image, slot] for attribute in (shape, color, texture, center, radius, rotation))
    images, masks = draw(style, Objects(image, *flat), size, generator)
    return Scenes(images, masks, shape, color, texture, count, style, center, radius, rotation)
