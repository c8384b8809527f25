"""Grids of numbers and pictures: cosines of images and texts, confusions, accuracy by pair of words, patches."""

import textwrap
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from ..threat import check_images
from .style import NARROW, WIDE, color, luminance, new_figure, require, styled

LABEL = 15  # characters of a name beside a grid
FRAME = "TGA-ZSR"  # the hue of frames
GRAY = "#595959"


def _heat(ax, values: np.ndarray, texts, *, low: float, high: float, cmap: str = "cividis") -> None:
    """A heat table with a text in each cell; NaN stays white."""
    shown = ax.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if texts[i][j]:
            dark = not np.isnan(value) and luminance(shown.cmap(shown.norm(value))[:3]) < 0.18
            ax.text(j, i, texts[i][j], ha="center", va="center", color="white" if dark else "black")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _frame(ax, i: int, j: int) -> None:
    hue = color(FRAME)
    ax.add_patch(Rectangle((j - 0.46, i - 0.45), 0.92, 0.9, fill=False, edgecolor=hue, linewidth=2))


def _short(name: str) -> str:
    return textwrap.shorten(name, LABEL, placeholder=" …") if " " in name else name[:LABEL]


@styled
def similarities(images: Tensor, texts: Sequence[str], cosines: Tensor):
    """Texts down, images across: the cosine of each with each. A frame marks the text that lies nearest to an image.

    images: [B, 3, H, W] in [0, 1]; cosines: [B, T].
    """
    check_images(images, "images")
    b, t = len(images), len(texts)
    require(cosines.shape == (b, t), f"expected cosines [{b}, {t}], got {list(cosines.shape)}")
    table = cosines.detach().cpu().float().T.numpy()  # [T, B]
    fig = new_figure(NARROW, 0.75 + 0.26 * t)
    ratios = (0.45, 0.26 * t)
    grid = fig.add_gridspec(2, b, height_ratios=ratios)
    fig.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.01, hspace=0.02)
    for i in range(b):
        ax = fig.add_subplot(grid[0, i])
        ax.imshow(images[i].detach().cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_axis_off()
    ax = fig.add_subplot(grid[1, :])
    _heat(ax, table, [[_cosine(v) for v in row] for row in table], low=min(0.0, table.min()), high=table.max())
    for j in range(b):
        _frame(ax, int(table[:, j].argmax()), j)
    ax.set_yticks(range(t), [_short(text) for text in texts])
    ax.set_xticks([])
    return fig


def _cosine(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".").replace("-", "−")


@styled
def confusion_grid(
    labels: Sequence[int], predictions: Sequence[int], class_names: Sequence[str], *, most: int = 10, title: str = ""
):
    """True classes down, answers across, numbers of images: the classes that errors touch most, and "other" for the rest.

    The hue is the share of a class's images. Errors are those off the diagonal.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    require(len(labels) == len(predictions) > 0, f"expected an answer for each label, got {len(predictions)}")
    counts = np.zeros((len(class_names), len(class_names)), dtype=int)
    np.add.at(counts, (labels, predictions), 1)
    errors = counts - np.diag(counts.diagonal())
    touched = errors.sum(0) + errors.sum(1)
    kept = np.sort(np.argsort(-touched, kind="stable")[:most])
    other = counts[kept].sum(1) - counts[np.ix_(kept, kept)].sum(1)
    table = np.column_stack([counts[np.ix_(kept, kept)], *([other] if other.any() else [])])
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)

    fig = new_figure(NARROW, 1.0 + 0.22 * len(kept))
    ax = fig.add_subplot()
    texts = [[str(n) if n else "" for n in row] for row in table]
    _heat(ax, np.where(table > 0, shares, np.nan), texts, low=-0.2, high=1.1, cmap="Blues")
    for i in range(len(kept)):
        _frame(ax, i, i)
    names = [_short(class_names[c]) for c in kept]
    ax.set_yticks(range(len(kept)), names)
    ax.set_xticks(range(table.shape[1]), [*names, "other"][: table.shape[1]], rotation=90)
    ax.set_title(title, loc="left", color=GRAY)
    return fig


@styled
def pair_grid(values: Mapping[tuple[str, str], float], *, marked: Collection[tuple[str, str]] = ()):
    """Accuracy of pairs of words in percent, first words down and second words across; `marked` pairs are framed.

    values: (first, second) -> fraction; missing pairs stay empty.
    """
    require(values, "expected at least one pair, got none")
    down, across = (list(dict.fromkeys(pair[i] for pair in values)) for i in (0, 1))
    table = np.full((len(down), len(across)), np.nan)
    for (a, b), value in values.items():
        require(0 <= value <= 1, f"expected accuracies as fractions, got {value:g}; the figure makes percent")
        table[down.index(a), across.index(b)] = 100 * value
    fig = new_figure(NARROW, 0.75 + 0.25 * len(down))
    ax = fig.add_subplot()
    _heat(ax, table, [["" if np.isnan(v) else f"{v:.0f}" for v in row] for row in table], low=0, high=100)
    for a, b in marked:
        _frame(ax, down.index(a), across.index(b))
    ax.set_yticks(range(len(down)), down)
    ax.set_xticks(range(len(across)), across, rotation=90)
    return fig


@styled
def token_grids(panels: Mapping[str, Tensor], tokens: Sequence[str], *, columns: str):
    """Signed numbers of each token and candidate, one panel a name, each on a scale of its own about zero.

    panels: name -> [T, K], rows as in `tokens`. columns: what stands across. Blue is negative, red positive; the largest
    magnitude of each panel is written beside its name.
    """
    require(panels, "expected at least one panel, got none")
    fig = new_figure(WIDE, 0.75 + 0.19 * len(tokens))
    for k, (name, values) in enumerate(panels.items()):
        require(len(values) == len(tokens), f"{name}: expected a row for each of {len(tokens)} tokens, got {len(values)}")
        most = float(values.abs().max())
        ax = fig.add_subplot(1, len(panels), k + 1)
        ax.imshow(values.detach().cpu().numpy(), cmap="RdBu_r", vmin=-(most or 1), vmax=most or 1, aspect="auto")
        ax.set_title(f"{name}\n(up to {most:.1g})", loc="left", pad=3)
        ax.set_yticks(range(len(tokens)), tokens if k == 0 else [""] * len(tokens))
        ax.set_xticks([])
        ax.set_xlabel(columns if k == 0 else "")
        ax.tick_params(length=0)
    return fig


@styled
def mosaics(panels: Mapping[str, Tensor], *, columns: int = 2, gap: int = 1):
    """Small pictures laid out as squares with gaps between them, one panel a name.

    panels: name -> tiles [N, 3, h, w] in [0, 1], row by row. gap: in pixels of a tile.
    """
    require(panels, "expected at least one panel, got none")
    rows = -(-len(panels) // columns)
    fig = new_figure(NARROW, 0.1 + rows * (NARROW / columns + 0.2))
    for i, (name, tiles) in enumerate(panels.items()):
        check_images(tiles, name)
        n, _, h, w = tiles.shape
        side = int(np.ceil(n**0.5))
        sheet = np.ones((-(-n // side) * (h + gap) - gap, side * (w + gap) - gap, 3))
        for k, tile in enumerate(tiles.detach().cpu().permute(0, 2, 3, 1).numpy()):
            top, left = k // side * (h + gap), k % side * (w + gap)
            sheet[top : top + h, left : left + w] = tile
        ax = fig.add_subplot(rows, columns, i + 1)
        ax.imshow(sheet, interpolation="nearest")
        ax.set_title(name, loc="left", pad=3)
        ax.set_axis_off()
    return fig


def stretched(tiles: Tensor) -> Tensor:
    """Tiles [N, 3, h, w] of any values, each stretched to [0, 1] about gray, so that weights can be looked at."""
    largest = tiles.detach().abs().flatten(1).amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return torch.clamp(0.5 + 0.5 * tiles.detach() / largest, 0, 1)
