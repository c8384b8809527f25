"""Strips of pictures: images with captions, an attacked image with what the model says to it, maps laid over images."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from torch import Tensor

from ..attention import upsample
from ..threat import check_images
from .style import NARROW, POINTS, WIDE, new_figure, require, styled

RIGHT, WRONG = "#0072B2", "#D55E00"
LOUDEST = 0.45  # the largest change of the perturbation is drawn this far from gray
OVERLAY, MAP = 0.6, "viridis"
LINE = 0.165  # inches of a line of text


@styled
def captioned(images: Tensor, captions: Sequence[str], *, columns: int = 3, title: str = ""):
    """A sheet of images, row by row, each with its caption below.

    images: [N, 3, H, W] in [0, 1]; captions: one text an image.
    """
    check_images(images, "images")
    require(len(captions) == len(images), f"expected a caption for each of {len(images)} images, got {len(captions)}")
    width = max(8, int((NARROW - 0.2) / columns * 72 / (0.55 * POINTS)))  # characters
    texts = [textwrap.fill(text, width) for text in captions]
    rows = -(-len(images) // columns)
    lines = sum(max(t.count("\n") + 1 for t in texts[i * columns : (i + 1) * columns]) for i in range(rows))
    fig = new_figure(NARROW, rows * NARROW / columns + 0.17 * lines + (0.3 if title else 0.1))
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.04)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        ax = fig.add_subplot(rows, columns, i + 1)
        ax.imshow(image.detach().cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_xlabel(text, labelpad=2)
        if title and i == 0:
            ax.set_title(title, loc="left", pad=3)
    return fig


@styled
def attacked_strip(
    x: Tensor,
    x_adv: Tensor,
    probabilities_clean: Tensor,
    probabilities_adv: Tensor,
    class_names: Sequence[str],
    label: int,
    eps_255: float,
):
    """One image clean, adversarial, and their difference (amplified, the factor stated), with the top five classes.

    x, x_adv: [3, H, W] in [0, 1]; probabilities: [C] each; label: index of the true class.
    """
    check_images(x[None], "x")
    check_images(x_adv[None], "x_adv")
    require(x.shape == x_adv.shape, f"expected two images of one shape, got {list(x.shape)} and {list(x_adv.shape)}")
    for p in (probabilities_clean, probabilities_adv):
        right_size = p.shape == (len(class_names),)
        require(right_size, f"expected {len(class_names)} probabilities, got {list(p.shape)}; one for each class name")
        total = float(p.sum())
        require(abs(total - 1) < 1e-2, f"expected probabilities, got a sum of {total:.2f}; apply softmax to the logits")
    delta = (x_adv - x).detach().cpu()
    factor = _round_factor(LOUDEST / max(float(delta.abs().max()), 1e-8))
    linf = 255 * float(delta.abs().max())

    fig = new_figure(NARROW, 3.9)
    grid = fig.add_gridspec(3, 2, width_ratios=(1, 1.75))
    pictures = (("clean", x), ("adversarial", x_adv), (f"difference × {factor:g}", 0.5 + factor * delta))
    for i, (name, picture) in enumerate(pictures):
        ax = fig.add_subplot(grid[i, 0])
        _picture(ax, picture)
        ax.set_title(name, loc="left", pad=3)
    for i, p in enumerate((probabilities_clean, probabilities_adv)):
        _top_five(fig.add_subplot(grid[i, 1]), p.detach().cpu(), class_names, label)
    note = fig.add_subplot(grid[2, 1])
    note.axis("off")
    lines = (f"true class: {class_names[label]}", f"budget ε = {eps_255:g}/255", f"largest change {linf:.3g}/255")
    text = "\n".join((*lines, "gray: no change"))
    note.text(0.02, 0.5, text, transform=note.transAxes, va="center", linespacing=1.5)
    return fig


@styled
def guesses(
    images: Tensor, probabilities: Tensor, class_names: Sequence[str], labels: Sequence[int], *, title: str = ""
):
    """Images, each with its five most probable classes; the true one is blue and marked.

    images: [B, 3, H, W] in [0, 1]; probabilities: [B, C]; labels: index of the true class of each.
    """
    check_images(images, "images")
    wanted = (len(images), len(class_names))
    require(probabilities.shape == wanted, f"expected probabilities {list(wanted)}, got {list(probabilities.shape)}")
    fig = new_figure(NARROW, 0.2 + 1.15 * len(images))
    grid = fig.add_gridspec(len(images), 2, width_ratios=(1, 1.9))
    for i, image in enumerate(images):
        ax = fig.add_subplot(grid[i, 0])
        _picture(ax, image)
        if title and i == 0:
            ax.set_title(title, loc="left", pad=3)
        _top_five(fig.add_subplot(grid[i, 1]), probabilities[i].detach().cpu(), class_names, int(labels[i]))
    return fig


@styled
def picture_rows(rows: Mapping[str, Tensor], heads: Sequence[str], *, feet: Sequence[str] = ()):
    """Pictures in a table: one column a head, one row a name, and a text below each column if `feet` are given.

    rows: name -> [K, 3, h, w] in [0, 1], for K heads.
    """
    k = len(heads)
    require(rows and k, f"expected at least one row and one head, got {len(rows)} and {k}")
    require(not feet or len(feet) == k, f"expected a text for each of {k} columns, got {len(feet)}")
    for name, pictures in rows.items():
        check_images(pictures, name)
        require(len(pictures) == k, f"row {name!r}: expected {k} pictures, one a head, got {len(pictures)}")
    width = NARROW if k <= 3 else WIDE
    cell = (width - 0.3) / k
    letters = max(6, int(cell * 72 / (0.55 * POINTS)))
    above, below = (["\n".join(textwrap.fill(line, letters) for line in text.split("\n")) for text in texts] for texts in (heads, feet))
    top, bottom = (0.08 + LINE * max((text.count("\n") + 1 for text in texts), default=0) for texts in (above, below))
    height = len(rows) * (cell + 0.03) + top + bottom
    fig = new_figure(width, height)
    fig.set_layout_engine("none")  # the constrained one makes no room for texts of several lines beside pictures
    sides = {"left": 0.24 / width, "right": 1 - 0.02 / width, "bottom": bottom / height, "top": 1 - top / height}
    axes = fig.add_gridspec(len(rows), k, **sides, wspace=0.03, hspace=0.03).subplots(squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for ax, picture in zip(line, pictures, strict=True):
            _picture(ax, picture)
        line[0].text(-0.04, 0.5, name, transform=line[0].transAxes, rotation=90, ha="right", va="center")
    for ax, head in zip(axes[0], above, strict=True):
        ax.set_title(head, pad=3, va="bottom")
    for ax, foot in zip(axes[-1], below, strict=False):
        ax.text(0.5, -0.04, foot, transform=ax.transAxes, ha="center", va="top")
    return fig


def _round_factor(factor: float) -> float:
    """Down to a power of two, which reads well and never clips."""
    return 2.0 ** np.floor(np.log2(factor))


def _picture(ax, picture: Tensor) -> None:
    ax.imshow(picture.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    ax.set_axis_off()


def _top_five(ax, p: Tensor, class_names: Sequence[str], label: int) -> None:
    """Bars with the class name on them; the true class in blue and marked, so that color is not the only sign."""
    top = p.topk(min(5, len(p)))
    for y, (value, c) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
        true = c == label
        ax.barh(y, value, height=0.82, color=RIGHT if true else WRONG, alpha=0.35, linewidth=0)
        name = textwrap.shorten(class_names[c], 18, placeholder=" …")
        ax.text(0.02, y, f"✓ {name}" if true else name, va="center", weight="bold" if true else "normal")
        ax.text(1, y, f"{100 * value:.0f} %", va="center", ha="right")
    ax.set(xlim=(0, 1), ylim=(4.5, -0.5))
    ax.set_axis_off()


@styled
def map_strip(images: Tensor, maps: Mapping[str, Tensor], masks: Tensor | None = None, *, labels: Sequence[str] = ()):
    """Images and maps over them: one row an image, the plain image first, then one column a map.

    images: [B, 3, H, W] in [0, 1], square. maps: name -> [B, N] patches (as `attention` makes them), [B, g, g] or
    [B, H, W], in [0, 1]; small ones are upsampled bilinearly. masks: [B, H, W] bool, drawn as an outline.
    labels: one text an image, left of its row.
    """
    check_images(images, "images")
    side = images.shape[-1]
    require(images.shape[-2] == side, f"expected square images, got {list(images.shape[-2:])}")
    require(maps, "expected at least one map, got none")
    drawn = {name: _full_size(name, m, len(images), side) for name, m in maps.items()}
    gray = (images.detach().cpu() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    gray = 0.3 + 0.4 * gray  # a bright object must not pass for a high value of the map

    columns = 1 + len(drawn)
    width = NARROW if columns <= 3 else WIDE
    cell = (width - 0.1 - (0.2 if labels else 0)) / columns
    heads = [textwrap.fill(name, max(8, int(cell * 72 / (0.55 * POINTS)))) for name in ("image", *drawn)]
    head_lines = max(head.count("\n") + 1 for head in heads)
    fig = new_figure(width, len(images) * cell + 0.17 * head_lines + 0.4)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    axes = fig.subplots(len(images), columns, squeeze=False)
    for i, row in enumerate(axes):
        _picture(row[0], images[i])
        for ax, m in zip(row[1:], drawn.values(), strict=True):
            over = OVERLAY * colormaps[MAP](m[i].numpy())[..., :3] + (1 - OVERLAY) * gray[i, ..., None].numpy()
            ax.imshow(over, interpolation="nearest")
            ax.set_axis_off()
        if masks is not None and masks[i].any():  # a photograph has none
            for ax in row:
                _outline(ax, masks[i])
        if labels:
            row[0].text(-0.04, 0.5, labels[i], transform=row[0].transAxes, rotation=90, ha="right", va="center")
    for ax, head in zip(axes[0], heads, strict=True):
        ax.set_title(head, pad=3, va="bottom")
    _color_key(fig, axes)
    return fig


def _full_size(name: str, m: Tensor, n: int, side: int) -> Tensor:
    """[B, side, side] from patches or a grid."""
    m = m.detach().cpu().float()
    require(len(m) == n, f"map {name!r}: expected {n} maps, one an image, got {len(m)}")
    grid = round(m[0].numel() ** 0.5)
    require(m[0].numel() == grid * grid, f"map {name!r}: expected a square of patches, got {list(m.shape[1:])}")
    low, high = float(m.min()), float(m.max())  # NaN fails the comparison
    require(0 <= low <= high <= 1, f"map {name!r}: expected values in [0, 1], got [{low:.2f}, {high:.2f}]; use minmax")
    return m.view(n, side, side) if grid == side else upsample(m.flatten(1), side)


def _outline(ax, mask: Tensor) -> None:
    """White over black, so that it shows on any map."""
    shape = np.pad(mask.cpu().numpy().astype(float), 1)  # an object that touches the border is closed too
    at = np.arange(-1, len(shape) - 1)
    for hue, width in (("black", 2.2), ("white", 1.0)):
        ax.contour(at, at, shape, levels=[0.5], colors=hue, linewidths=width)
    ax.set(xlim=(-0.5, len(shape) - 2.5), ylim=(len(shape) - 2.5, -0.5))


def _color_key(fig, axes) -> None:
    place = {"location": "bottom", "shrink": 0.3, "aspect": 25, "pad": 0.02}
    key = fig.colorbar(ScalarMappable(cmap=MAP), ax=axes, ticks=[0, 1], alpha=OVERLAY, **place)
    key.ax.set_xticklabels(["0 least", "1 most"])
    key.outline.set_visible(False)
