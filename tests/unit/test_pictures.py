"""Pictures: attacked strips, maps over images, sheets with captions."""

import numpy as np
import pytest
import torch
from toy_figures import texts

from robustvlm_lite import plots
from robustvlm_lite.runtime import UserError

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")


def attacked(eps_255=2.0, **changed):
    x = torch.full((3, 8, 8), 0.5)
    p, q = torch.tensor([0.7, 0.1, 0.1, 0.05, 0.03, 0.02]), torch.tensor([0.02, 0.7, 0.1, 0.1, 0.05, 0.03])
    given = {"x": x, "x_adv": x + eps_255 / 255, "probabilities_clean": p, "probabilities_adv": q} | changed
    return plots.attacked_strip(**given, class_names=NAMES, label=0, eps_255=eps_255)


def test_attacked_strip_states_amplification_budget_and_both_top_fives():
    fig = attacked()
    heads = [ax.get_title(loc="left") for ax in fig.axes]
    assert heads[:3] == ["clean", "adversarial", "difference × 32"]
    difference = fig.axes[2].images[0].get_array()
    assert float(difference.max()) == pytest.approx(0.5 + 32 * 2 / 255, abs=1e-6)  # as stated, and not clipped
    clean, adversarial = texts(fig.axes[3]), texts(fig.axes[4])
    assert clean[:2] == ["✓ ant", "70 %"] and adversarial[:2] == ["bee", "70 %"]
    assert "✓ ant" not in adversarial and len(clean) == len(adversarial) == 10  # five names, five numbers
    assert "ε = 2/255" in texts(fig.axes[5])[0] and "true class: ant" in texts(fig.axes[5])[0]


def test_attacked_strip_survives_an_unchanged_image_and_refuses_logits():
    attacked(x_adv=torch.full((3, 8, 8), 0.5))
    with pytest.raises(UserError, match="apply softmax"):
        attacked(probabilities_adv=torch.full((6,), 3.0))
    with pytest.raises(UserError, match="6 probabilities"):
        attacked(probabilities_clean=torch.full((2,), 0.5))
    with pytest.raises(UserError, match=r"pixels in \[0, 1\]"):
        attacked(x_adv=torch.full((3, 8, 8), 2.0))


def test_map_strip_has_a_column_a_map_and_outlines():
    images, masks = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[:, 0:5, 4:9] = True  # touches the border
    maps = {"patches": torch.rand(2, 16), "a grid": torch.rand(2, 4, 4), "pixels": torch.rand(2, 16, 16)}
    fig = plots.map_strip(images, maps, masks, labels=["ant", "bee"])
    heads = [ax.get_title() for ax in fig.axes[:4]]
    assert heads == ["image", *maps]
    assert all(ax.collections for ax in fig.axes[:8])
    assert texts(fig.axes[0]) == ["ant"] and texts(fig.axes[4]) == ["bee"]
    assert np.allclose(fig.axes[0].images[0].get_array(), images[0].permute(1, 2, 0))
    assert fig.get_size_inches()[0] == 7
    assert plots.map_strip(images, {"one": maps["patches"]}).get_size_inches()[0] == 3.4


def test_small_maps_are_upsampled_bilinearly():
    step = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    fig = plots.map_strip(torch.zeros(1, 3, 8, 8), {"m": step})
    red = np.asarray(fig.axes[1].images[0].get_array())[0, :, 1]
    assert len(np.unique(red.round(4))) > 2 and (np.diff(red) >= 0).all()  # a ramp, no step


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"m": torch.rand(1, 16)}, "expected 2 maps"),
        ({"m": torch.rand(2, 15)}, "square of patches"),
        ({"m": torch.rand(2, 16) * 3 + 1}, "use minmax"),
        ({"m": torch.full((2, 16), float("nan"))}, "use minmax"),
        ({}, "at least one map"),
    ],
)
def test_map_strip_refuses(maps, message):
    with pytest.raises(UserError, match=message):
        plots.map_strip(torch.rand(2, 3, 16, 16), maps)


def test_guesses_show_five_classes_an_image():
    p = torch.softmax(torch.arange(14.0).view(2, 7), 1)
    fig = plots.guesses(torch.rand(2, 3, 8, 8), p, list("abcdefg"), [6, 0], title="clean")
    assert texts(fig.axes[1])[0] == "✓ g" and "✓" not in "".join(texts(fig.axes[3])) and len(texts(fig.axes[1])) == 10
    with pytest.raises(UserError, match=r"probabilities \[2, 7\]"):
        plots.guesses(torch.rand(2, 3, 8, 8), p[:1], list("abcdefg"), [6, 0])


def test_picture_rows_put_each_picture_under_its_head():
    pictures = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fig = plots.picture_rows({"a": pictures, "b": 1 - pictures}, ["clean", "ε = 1", "ε = 2"], feet=["x", "y", "z"])
    assert len(fig.axes) == 6
    for column, (head, foot) in enumerate((("clean", "x"), ("ε = 1", "y"), ("ε = 2", "z"))):
        above, below = fig.axes[column], fig.axes[3 + column]
        assert above.get_title() == head and foot in texts(below) and foot not in texts(above)
        assert np.allclose(above.images[0].get_array(), pictures[column].permute(1, 2, 0), atol=1e-6)
        assert np.allclose(below.images[0].get_array(), 1 - pictures[column].permute(1, 2, 0), atol=1e-6)
    assert "a" in texts(fig.axes[0]) and "b" in texts(fig.axes[3])


@pytest.mark.parametrize(
    "pictures, heads, feet, message",
    [
        (torch.rand(2, 3, 4, 4), ["a"], [], "expected 1 pictures, one a head, got 2"),
        (torch.rand(1, 3, 4, 4), ["a"], ["x", "y"], "a text for each of 1 columns, got 2"),
        (torch.rand(1, 3, 4, 4) + 1, ["a"], [], r"row: expected pixels in \[0, 1\]"),
        (torch.rand(0, 3, 4, 4), [], [], "at least one row and one head"),
    ],
)
def test_picture_rows_refuse(pictures, heads, feet, message):
    with pytest.raises(UserError, match=message):
        plots.picture_rows({"row": pictures}, heads, feet=feet)


def test_captioned_sheet_keeps_order_and_wraps():
    images = torch.rand(4, 3, 8, 8)
    fig = plots.captioned(images, ["a star", "b", "a photo of a large striped orange arrow", "d"], title="toy")
    assert [ax.get_xlabel() for ax in fig.axes[:2]] == ["a star", "b"] and "\n" in fig.axes[2].get_xlabel()
    assert fig.axes[2].get_xlabel().split() == "a photo of a large striped orange arrow".split()
    for ax, image in zip(fig.axes, images, strict=True):
        assert np.allclose(ax.get_images()[0].get_array(), image.permute(1, 2, 0))
    assert fig.axes[0].get_title(loc="left") == "toy" and not fig.axes[1].get_title(loc="left")
    with pytest.raises(UserError, match="a caption for each of 4 images, got 1"):
        plots.captioned(images, ["one"])
