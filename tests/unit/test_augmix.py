"""AugMix and base views on tensors against Pillow and torchvision, and their draws against what AugMix prescribes."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from robustvlm_lite import views
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.views import OPERATIONS, amount, augmix, base_views
from robustvlm_lite.views import base as base_room
from robustvlm_lite.views.augmix import _draw
from robustvlm_lite.views.geometry import resized_crops

SIDES = (64, 224)
SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def pictures(side):
    """uint8 [6, side, side, 3]: noise, waves, low contrast, few levels, nearly one level, one level."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(17 * y), np.sin(40 * x * y)], axis=2)
    noise = rng.integers(0, 256, (side, side, 3))
    nearly = np.full((side, side, 3), 77)
    nearly[0, 0] = 78
    few = 60 * rng.integers(0, 4, (side, side, 3)) + 7
    each = [noise, 127.5 + 127 * waves, 90 + 20 * waves, few, nearly, np.full((side, side, 3), 200)]
    return np.stack(each).astype(np.uint8)


def to_tensor(images):
    """Levels [M, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def pillow(name, image, much):
    """One operation in Pillow, with the calls of the AugMix reference."""
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    if name in ("posterize", "solarize"):
        return getattr(ImageOps, name)(image, int(much))
    if name == "rotate":
        return image.rotate(int(much), resample=Image.BILINEAR)
    matrix = {
        "shear_x": (1, much, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, much, 1, 0),
        "translate_x": (1, 0, much, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, much),
    }[name]
    return image.transform(image.size, Image.AFFINE, matrix, resample=Image.BILINEAR)


def amounts(name, side):
    """What AugMix's severity 1 can ask of an operation, both ends included: its reference code in NumPy."""
    strength = np.array([0.1, 0.2, 0.34, 0.5, 0.67, 0.85, 1 - 1e-6])
    size = {"posterize": 0.4, "rotate": 3, "solarize": 25.6, "translate": side / 30}.get(name.split("_")[0])
    much = 0.03 * strength if name.startswith("shear") else np.floor((size or 0) * strength)
    much = {"posterize": 4 - much, "solarize": 256 - much}.get(name, much)
    return torch.tensor(strength), np.concatenate([much, -much]) if name in SIGNED else much


# --- operations


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pillows_within_one_level(name, side):
    images = pictures(side)
    for much in np.unique(amounts(name, side)[1]):
        expected = to_tensor([np.asarray(pillow(name, Image.fromarray(i), float(much))) for i in images])
        own = OPERATIONS[name](to_tensor(images), torch.full((len(images),), float(much)))
        off = (own - expected).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 0.01, f"{name} by {much}"
        assert torch.equal(own, own.round()), "whole levels"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_amounts_are_those_of_severity_1(name, side):
    strength, much = amounts(name, side)
    own = torch.cat([amount(name, strength, torch.full_like(strength, s), side) for s in (1, -1)][: 2 - (len(much) == 7)])
    assert np.abs(own.numpy() - much).max() < 1e-9
    all_of_it = amount(name, torch.linspace(0.1, 1, 1001, dtype=torch.float64)[:-1], torch.ones(1000), side)
    span = {"rotate": (0, 2), "posterize": (4, 4), "solarize": (231, 254), "shear": (0.003, 0.03)}
    span |= {"translate": (0, 7 if side == 224 else 2)}
    if (key := name.split("_")[0]) in span:
        assert all_of_it.min() == pytest.approx(span[key][0]) and all_of_it.max() == pytest.approx(span[key][1], rel=1e-2)


def test_posterize_leaves_16_levels():
    own = OPERATIONS["posterize"](to_tensor(pictures(64)), torch.full((6,), 4.0))
    assert own.unique().tolist() == [16.0 * k for k in range(16)]


def test_each_image_has_its_own_amount():
    images = torch.cat([to_tensor(pictures(64)[:1])] * 3)
    for name, much in (("rotate", [1.0, -2.0, 0.0]), ("solarize", [231.0, 240.0, 254.0]), ("translate_y", [2.0, -1, 0])):
        together = OPERATIONS[name](images, torch.tensor(much))
        for i, m in enumerate(much):
            assert torch.equal(together[i], OPERATIONS[name](images[i : i + 1], torch.tensor([m]))[0]), name


@pytest.mark.parametrize("name", SIGNED)
def test_the_gradient_of_geometry_is_exact(name):
    """Pillow's transform of a *float* picture is the linear map without its rounding."""
    much, rng = {"rotate": 2, "shear_x": 0.021, "shear_y": -0.013, "translate_x": 2, "translate_y": -1}[name], generator(1)
    levels = to_tensor(pictures(64)[:2]).requires_grad_()
    weights, direction = torch.randn(2, 3, 64, 64, generator=rng), torch.randn(2, 3, 64, 64, generator=rng)
    (gradient,) = torch.autograd.grad((weights * OPERATIONS[name](levels, torch.full((2,), float(much)))).sum(), levels)
    moved = [[np.asarray(pillow(name, Image.fromarray(c.numpy()), much)) for c in image] for image in direction]
    expected = (weights * torch.from_numpy(np.array(moved))).sum()
    assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-3)


def test_gradients_of_the_look_up_tables():
    image = to_tensor(pictures(64)[2:3])  # low contrast
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    slopes = {
        "autocontrast": (0, 255 / (high - low)),
        "equalize": (0, torch.ones(1)),
        "posterize": (4, torch.ones(1)),
        "solarize": (100, torch.where(image >= 100, -1.0, 1.0)),
    }
    for name, (much, slope) in slopes.items():
        levels = image.clone().requires_grad_()
        OPERATIONS[name](levels, torch.tensor([float(much)])).sum().backward()
        assert torch.allclose(levels.grad, slope.expand_as(image)), name


# --- base views


@pytest.mark.parametrize("side", SIDES)
def test_crops_are_those_of_torchvision_on_pillow_images(side):
    images = pictures(side)[:3]
    crop = RandomResizedCrop(side, scale=(0.08, 1))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        boxes = [[crop.get_params(torch.empty(3, side, side), crop.scale, crop.ratio) for _ in range(3)] for _ in images]
    boxes[0][0] = (0, 0, side, side)
    mirror = torch.tensor([[False, True, False]] * 3)
    own = resized_crops(to_tensor(images), torch.tensor(boxes), mirror)
    for i, image in enumerate(images):
        for k, box in enumerate(boxes[i]):
            view = tv.resized_crop(Image.fromarray(image), *box, [side, side], InterpolationMode.BILINEAR)
            expected = to_tensor([np.asarray(tv.hflip(view) if mirror[i, k] else view)])[0]
            assert (own[i, k] - expected).abs().max() <= 1
    assert torch.equal(own[0, 0], to_tensor(images)[0]), "the whole image is itself"


def test_crops_are_drawn_as_torchvision_draws_them():
    side, n = 64, 4000
    boxes, mirror = base_room._draw(generator("crops"), n, side, "rrc_flip")
    assert abs(mirror.float().mean() - 0.5) < 0.03
    top, left, height, width = boxes.T
    assert boxes.min() >= 0 and (top + height).max() <= side and (left + width).max() <= side
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = torch.tensor(
            [RandomResizedCrop.get_params(torch.empty(3, side, side), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(n)]
        )
    for a, b in ((boxes, other), (boxes[:, 2:].prod(1), other[:, 2:].prod(1)), (width / height, other[:, 3] / other[:, 2])):
        a, b = a.double(), b.double()
        error = (a.var(0) / n + b.var(0) / n).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all() and torch.allclose(a.std(0), b.std(0), rtol=0.07)


def test_flipped_centers_are_two_views():
    x = to_tensor(pictures(64)[:2]) / 255
    base = base_views(x, [generator(0, i) for i in range(2)], 40)
    same, mirrored = ((base == other[:, None]).flatten(2).all(2) for other in (x, x.flip(3)))
    assert (same ^ mirrored).all() and 0 < same[0].sum() < 40 and not torch.equal(same[0], same[1])


def test_the_anchor_is_view_0_and_untouched():
    x = torch.rand(2, 3, 64, 64, generator=generator("off the grid"))
    made = views.with_anchor(x, base_views(x, [generator(0, i) for i in range(2)], 5))
    assert made.shape == (2, 6, 3, 64, 64) and torch.equal(made[:, 0], x)
    assert (255 * made[:, 1:] - (255 * made[:, 1:]).round()).abs().max() < 1e-4, "views lie on the 8-bit grid"


# --- chains


def test_the_mixture_equals_chains_in_pillow():
    """The same random numbers, image by image and operation by operation."""
    n, side = 12, 64
    base = (to_tensor(pictures(side)[1:2])[:, None] / 255).expand(1, n, -1, -1, -1)
    made, draw = augmix(base, [generator("chains")]), _draw(generator("chains"), n)
    names, image = list(OPERATIONS), Image.fromarray(pictures(side)[1])
    expected = np.zeros((n, side, side, 3))
    for v in range(n):
        for c in range(3):
            chain = image
            for k, strength, sign in zip(draw.operation[v, c], draw.strength[v, c], draw.sign[v, c], strict=True):
                if k >= 0:
                    chain = pillow(names[k], chain, amount(names[k], strength, sign, side).item())
            expected[v] += draw.weight[v, c].item() * np.asarray(chain) / 255
    off = 255 * (made.mix[0] - to_tensor(expected)).abs()
    assert off.mean() < 0.02 and (off > 1).float().mean() < 1e-3
    assert made.mix.min() >= 0 and made.mix.max() <= 1 + 1e-6
    share = draw.blend.view(1, n, 1, 1, 1)
    assert torch.allclose(made.blended(base), share * base + (1 - share) * made.mix)
    assert (made.mix[0, 0] - base[0, 0]).abs().max() > 0.05, "the chains did something"


def test_draws_have_the_distributions_of_augmix():
    n = 6000
    draw = _draw(generator("draws"), n)
    steps = (draw.operation >= 0).sum(2)
    assert all(abs((steps == k).float().mean() - 1 / 3) < 0.02 for k in (1, 2, 3))
    drawn = draw.operation[draw.operation >= 0]
    assert (torch.bincount(drawn) / len(drawn) - 1 / 9).abs().max() < 0.01
    assert 0.1 <= draw.strength.min() and draw.strength.max() <= 1 and abs(draw.strength.mean() - 0.55) < 0.01
    assert set(draw.sign.unique().tolist()) == {-1, 1} and abs(draw.sign.mean()) < 0.02
    assert torch.allclose(draw.weight.sum(1), torch.ones(n)) and (draw.weight.mean(0) - 1 / 3).abs().max() < 0.01
    assert (draw.weight.var(0) - 1 / 18).abs().max() < 0.003, "the variance of Dirichlet(1, 1, 1)"
    assert abs(draw.blend.mean() - 0.5) < 0.02 and abs(draw.blend.var() - 1 / 12) < 0.005


@pytest.mark.parametrize("kind", views.KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_views_depend_on_the_image_alone(kind, side):
    n = 5 if side == 64 else 2
    x = to_tensor(pictures(side)[:3]) / 255

    def make(indices):
        streams = [generator(0, "toy", i) for i in indices]
        base = base_views(x[indices], streams, n, kind)
        made = augmix(base, streams)
        return base, made.mix, made.blend

    together = make([0, 1, 2])
    for order in ([2, 0, 1], [1], [0, 2]):
        for whole, part in zip(together, make(order), strict=True):
            assert torch.equal(whole[order], part)
    again = base_views(x[:1], [generator(1, "toy", 0)], n, kind)
    if kind == "rrc_flip":
        assert not torch.equal(again, together[0][:1]), "another seed, other views"


def test_a_gradient_reaches_the_image_through_the_views():
    x = (to_tensor(pictures(64)[:2]) / 255).requires_grad_()
    streams = [generator(0, i) for i in range(2)]
    base = base_views(x, streams, 6, "rrc_flip")
    made = augmix(base, streams)
    weights = torch.randn(made.mix.shape, generator=generator("weights"))
    (gradient,) = torch.autograd.grad((weights * made.blended(base)).sum(), x)
    assert gradient.isfinite().all() and (gradient != 0).flatten(1).float().mean(1).min() > 0.9
    (of_base,) = torch.autograd.grad(base_views(x, [generator(0, i) for i in range(2)], 6).sum(), x)
    assert torch.allclose(of_base, torch.full_like(x, 6)), "each pixel feeds one pixel of each mirrored view"


@pytest.mark.parametrize("call, match", [
    (lambda x, g: base_views(x, g, 4, "flip"), "unknown base view 'flip'; did you mean 'rrc_flip'"),
    (lambda x, g: base_views(x[..., :32], g, 4), "expected square images, got 64x32; cut them"),
    (lambda x, g: base_views(x, g, 0), "expected at least 1 view besides the image itself, got 0"),
    (lambda x, g: base_views(x, g[:1], 4), "expected one generator per image, got 1 for 2 images"),
    (lambda x, g: base_views(x, g[0], 4), "expected one generator per image, got a single one for 2"),
    (lambda x, g: augmix(x[:, None], g[:1]), "expected one generator per image, got 1 for 2 images"),
    (lambda x, g: base_views(255 * x, g, 4), r"expected pixels in \[0, 1\]"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(call, match):
    x = to_tensor(pictures(64)[:2]) / 255
    with pytest.raises(UserError, match=match) as error:
        call(x, [generator(0, i) for i in range(2)])
    assert "\n" not in str(error.value)


def test_a_box_that_never_fits_is_the_whole_image(monkeypatch):
    monkeypatch.setattr(base_room, "RATIO", (4.0, 5.0))
    monkeypatch.setattr(base_room, "AREA", (0.9, 1.0))
    boxes, _ = base_room._draw(generator(0), 3, 64, "rrc_flip")
    assert boxes.tolist() == [[0, 0, 64, 64]] * 3
