"""The rendered world against independent references: closed-form areas, nearest palette colors, words against ids."""

import colorsys
import math

import pytest
import torch

from robustvlm_lite import scenes
from robustvlm_lite.runtime import UserError
from robustvlm_lite.scenes import render
from robustvlm_lite.scenes.words import split


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def mixture():
    return scenes.sample(600, seeded(1))


def one_object(shape, *, size=64, radius=0.35, style=render.PAINTED, center=(0.5, 0.5), rotation=0.0):
    """Image and mask of one solid red object, and the background that it was painted on."""
    painted = style == render.PAINTED
    objects = render.Objects(
        image=torch.tensor([0]),
        shape=torch.tensor([scenes.SHAPES.index(shape)]),
        color=torch.tensor([0 if painted else -1]),
        texture=torch.tensor([render.SOLID if painted else -1]),
        center=torch.tensor([center]),
        radius=torch.tensor([radius]),
        rotation=torch.tensor([rotation]),
    )
    images, masks = render.draw(torch.tensor([style]), objects, size, seeded(5))
    bare = render.draw_background(torch.tensor([style]), size, seeded(5))
    return images[0], masks[0], bare.clamp(0, 1).mul(255).round().to(torch.uint8)[0]


@pytest.mark.parametrize(
    "shape, area, outline",
    [  # area and length of the outline in units of radius, from the definitions in shapes.py
        ("circle", math.pi * 0.92**2, 2 * math.pi * 0.92),
        ("square", 1.4**2, 4 * 1.4),
        ("triangle", 3 * math.sqrt(3) / 4, 3 * math.sqrt(3)),
        ("ring", math.pi * (0.95**2 - 0.51**2), 2 * math.pi * (0.95 + 0.51)),
        ("cross", 4 * 0.94 * 0.29 * 2 - (2 * 0.29) ** 2, 8 * 0.94),
        ("bar", 4 * 0.95 * 0.27, 4 * (0.95 + 0.27)),
        # a square of side a and one whole disk of diameter a (two halves)
        ("heart", 1.08**2 * (1 + math.pi / 4), 1.08 * (2 + math.pi)),
    ],
)
@pytest.mark.parametrize("rotation", [0.0, 0.2])
def test_mask_area_is_the_closed_form(shape, area, outline, rotation):
    size, radius = 96, 0.35
    _, mask, _ = one_object(shape, size=size, radius=radius, rotation=rotation, center=(0.503, 0.491))
    radius_px = size * radius
    # A pixel counts by its center, so the error is a fraction of a pixel along the outline at the very most.
    assert abs(mask.sum().item() - area * radius_px**2) < 0.25 * outline * radius_px


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_fits_its_disk_and_has_unit_slope_at_its_outline(shape):
    axis = torch.linspace(-1.2, 1.2, 241)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    function, _ = scenes.shapes.SHAPE_TABLE[shape]
    distance = function(u, v)
    assert torch.hypot(u, v)[distance < 0].max() <= 1.02
    du, dv = torch.gradient(distance, spacing=0.01)
    near = (distance.abs() < 0.03) & (distance.abs() > 0.01)
    slope = torch.hypot(du, dv)[near]
    assert abs(slope.median() - 1) < 0.01 and (slope - 1).abs().mean() < 0.06


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_mask_is_what_changes_when_the_object_is_removed(shape):
    image, mask, bare = one_object(shape)
    changed = (image != bare).any(0)
    assert changed[mask].float().mean() > 0.99
    grown = torch.nn.functional.max_pool2d(mask[None].float(), 3, stride=1, padding=1)[0] > 0
    assert not (changed & ~grown).any()  # anti-aliasing reaches one pixel beyond the mask, no further


def test_same_seed_same_scenes_and_other_seed_other_scenes():
    a, b, c = (scenes.sample(40, seeded(seed)) for seed in (7, 7, 8))
    for name in scenes.Scenes.__dataclass_fields__:
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.images, c.images)


def test_types_and_shapes(mixture):
    n = len(mixture)
    assert mixture.images.dtype == torch.uint8 and mixture.images.shape == (n, 3, 64, 64)
    assert mixture.masks.dtype == torch.bool and mixture.masks.shape == (n, 64, 64)
    for ids in (mixture.shape, mixture.color, mixture.texture):
        assert ids.dtype == torch.int64 and ids.shape == (n, 4)
    assert torch.equal((mixture.shape >= 0).sum(1), mixture.count)
    assert scenes.sample(3, seeded(), size=32).images.shape == (3, 3, 32, 32)


def test_training_mixture_has_its_shares(mixture):
    several = (mixture.count > 1).float().mean().item()
    sketch = (mixture.style == render.SKETCH).float().mean().item()
    assert abs(several - 0.20) < 0.06 and abs(sketch - 0.10) < 0.05
    assert set(mixture.count.tolist()) == {1, 2, 3, 4}


def test_held_out_pairs_are_balanced_and_only_drawn_on_request(mixture):
    colors, shapes = zip(*(pair.split() for pair in scenes.HELD_OUT_PAIRS), strict=True)
    assert sorted(shapes) == sorted(scenes.SHAPES)
    assert set(colors) == set(scenes.COLORS) and max(map(colors.count, colors)) == 2
    assert len(scenes.PAIRS) == len(set(scenes.PAIRS)) == 80
    for task in (None, *set(scenes.TASKS) - {"pair-heldout"}):
        drawn = mixture if task is None else scenes.sample(150, seeded(2), task=task)
        names = {f"{t.color} {t.shape}" for i in range(len(drawn)) for t in drawn.things(i)}
        assert not names & set(scenes.HELD_OUT_PAIRS)
        assert not any(pair in " ".join(drawn.captions(i)) for i in range(len(drawn)) for pair in scenes.HELD_OUT_PAIRS)
    for drawn in (
        scenes.sample(150, seeded(3), task="pair-heldout"),
        scenes.sample(150, seeded(3), task="pair", held_out=True),
    ):
        assert {scenes.PAIRS[k] for k in drawn.labels("pair").tolist()} == set(scenes.HELD_OUT_PAIRS)


@pytest.mark.parametrize("task", list(scenes.TASKS))
def test_labels_agree_with_captions(task):
    class_names, templates = scenes.TASKS[task]
    drawn = scenes.sample(120, seeded(4), task=task)
    labels = drawn.labels(task)
    assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < len(class_names)
    if task != "pair-heldout":
        assert len(labels.unique()) > 0.6 * len(class_names)
    for i, label in enumerate(labels.tolist()):
        captions = drawn.captions(i)
        assert templates[0].format(class_names[label]) in captions
        wrong = [name for name in class_names if name != class_names[label]]
        assert not any(templates[0].format(name) in captions for name in wrong)


def test_scenes_without_a_single_answer_have_no_label(mixture):
    several, sketch = mixture.count > 1, mixture.style == render.SKETCH
    assert (mixture.labels("shape")[several] == -1).all() and (mixture.labels("shape")[~several] >= 0).all()
    for task in ("color", "texture", "pair", "pair-heldout"):
        assert (mixture.labels(task)[several | sketch] == -1).all()
        assert (mixture.labels(task)[~several & ~sketch] >= 0).all()
    assert torch.equal(mixture.labels("count") + 1, mixture.count)


def test_answers_agree_with_the_ids(mixture):
    """Every question is answered again from the id tensors, by other code than the one that wrote it."""
    for i in range(200):
        n = int(mixture.count[i])
        shapes = [scenes.SHAPES[k] for k in mixture.shape[i, :n].tolist()]
        colors = [scenes.COLORS[k] if k >= 0 else None for k in mixture.color[i, :n].tolist()]
        textures = [scenes.TEXTURES[k] if k >= 0 else None for k in mixture.texture[i, :n].tolist()]
        asked = mixture.questions(i)
        assert len(asked) == len(dict(asked)) >= 5 or n > 1
        for question, answer in asked:
            words = split(question)
            if words[:2] == ["how", "many"]:
                hits = n if words[2] == "objects" else sum(words[2] in (s + "s", s + "es") for s in shapes)
                assert answer == scenes.COUNTS[hits - 1]
            elif words[:2] == ["what", "color"]:
                assert [answer] == [c for c, s in zip(colors, shapes, strict=True) if s == words[-1]]
            elif words[:2] == ["what", "shape"]:
                chosen = [s for s, c in zip(shapes, colors, strict=True) if c == words[-2] or words[-2] == "the"]
                assert [answer] == chosen
            elif words[:2] == ["is", "there"]:
                assert answer == ("yes" if words[-1] in shapes else "no")
            elif words[:2] == ["is", "this"]:
                assert answer == scenes.STYLES[int(mixture.style[i])]
            else:
                assert [answer] == [t for t, s in zip(textures, shapes, strict=True) if s == words[2]]


def test_left_and_right_are_where_the_centers_are():
    drawn = scenes.sample(200, seeded(6), task="count")
    seen = 0
    for i in (drawn.count == 2).nonzero()[:, 0].tolist():
        names = [f"{t.color} {t.shape}" for t in drawn.things(i)]
        for caption in drawn.captions(i):
            if " left of " in caption:
                left = int(caption.split(" ", 1)[1].startswith(names[1]))
                assert drawn.center[i, left, 0] < drawn.center[i, 1 - left, 0]
                seen += 1
    assert seen > 5


def test_vocabulary_covers_what_is_written(mixture):
    vocabulary = set(scenes.caption_vocabulary())
    for i in range(len(mixture)):
        texts = mixture.captions(i) + [text for pair in mixture.questions(i) for text in pair]
        assert {word for text in texts for word in split(text)} <= vocabulary


def test_palette_colors_are_what_they_are_called_and_far_apart():
    hue_degrees = {"red": 0, "orange": 30, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "purple": 285}
    assert {*hue_degrees, "white"} == set(scenes.COLORS)
    for name, hue in hue_degrees.items():
        measured, saturation, value = colorsys.rgb_to_hsv(*render.PALETTE[name])
        assert abs((measured * 360 - hue + 180) % 360 - 180) < 12 and saturation > 0.7 and value > 0.6
    assert min(render.PALETTE["white"]) > 0.9
    assert torch.pdist(torch.tensor(list(render.PALETTE.values()))).min() > 0.4


def test_solid_objects_have_the_labelled_color_and_backgrounds_none():
    drawn = scenes.sample(200, seeded(9), task="color")
    palette = torch.tensor([render.PALETTE[name] for name in scenes.COLORS])
    pixels = drawn.images.float() / 255
    for i in (drawn.texture[:, 0] == render.SOLID).nonzero()[:, 0].tolist():
        inner = -torch.nn.functional.max_pool2d(-drawn.masks[i][None].float(), 3, stride=1, padding=1)[0] > 0
        nearest = torch.cdist(pixels[i][:, inner].T, palette)
        assert (nearest.argmin(1) == drawn.color[i, 0]).all() and nearest.min(1).values.max() < 0.12
    clear = -torch.nn.functional.max_pool2d(drawn.masks.float(), 5, stride=1, padding=2) == 0
    ground = pixels.permute(0, 2, 3, 1)[clear]
    assert torch.cdist(ground[::7], palette).min(1).values.quantile(0.001) > 0.2


def test_textures_show_a_second_tone():
    drawn = scenes.sample(150, seeded(10), task="texture")
    light = drawn.images.float().amax(1) / 255
    for i, texture in enumerate(drawn.labels("texture").tolist()):
        inside = light[i][drawn.masks[i]]
        dark = (inside < 0.72 * inside.quantile(0.9)).float().mean()
        assert (dark < 0.10) if texture == render.SOLID else (0.08 < dark < 0.60)


def test_sketches_are_dark_lines_on_pale_paper_without_color():
    drawn = scenes.sample(80, seeded(11), task="style")
    pixels = drawn.images.float() / 255
    saturated = ((pixels.amax(1) - pixels.amin(1)) > 0.25).float().mean((1, 2))
    dark = (pixels.amax(1) < 0.5).float().mean((1, 2))
    sketch = drawn.labels("style") == render.SKETCH
    assert saturated[sketch].max() < 0.01 and dark[sketch].max() < 0.15 and dark[sketch].min() > 0.005
    assert (pixels.mean((1, 2, 3))[sketch] > 0.7).all() and (pixels.mean((1, 2, 3))[~sketch] < 0.7).all()


def test_several_objects_do_not_touch_and_one_object_is_large_enough():
    drawn = scenes.sample(200, seeded(12), task="count")
    alone = drawn.count == 1
    assert drawn.radius[alone, 0].min() >= 0.22 and drawn.radius[alone, 0].max() <= 0.42
    for i in (~alone).nonzero()[:, 0].tolist():
        n = int(drawn.count[i])
        gaps = torch.cdist(drawn.center[i, :n], drawn.center[i, :n])
        gaps = gaps - drawn.radius[i, :n] - drawn.radius[i, :n, None] + 9 * torch.eye(n)
        assert gaps.min() > 0
        low, high = drawn.center[i, :n] - drawn.radius[i, :n, None], drawn.center[i, :n] + drawn.radius[i, :n, None]
        assert low.min() >= 0 and high.max() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 4, "task": "shapes"}, "did you mean 'shape'"),
        ({"n": 0}, "n >= 1"),
        ({"n": 4, "size": 8}, "16 pixels"),
        ({"n": 4, "held_out": True}, "expected a task"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        scenes.sample(arguments.pop("n"), seeded(), **arguments)
    assert "\n" not in str(error.value)
