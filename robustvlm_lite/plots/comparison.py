"""Charts of many methods side by side: what each keeps under two or three measurements, and what it costs."""

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from .pictures import RIGHT, WRONG
from .style import NARROW, POINTS, ink, new_figure, require, spread, styled

STAGES = (("#000000", "o", True), ("#0072B2", "D", False), ("#D55E00", "s", True), ("#009E73", "^", False))  # color, marker, filled
GRAY = "#767676"
THREAD = {"arrowstyle": "-", "color": "#CCCCCC", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3, "zorder": 1}  # from name to point
LINE = 1.25 * POINTS / 72  # inches between two names


@styled
def copies(images: Tensor, answers: Mapping[str, Mapping[str, tuple[str, bool]]]):
    """A column of images, beside each its heading and what every model says to it, marked ✓ or ✗, a line each.

    images: [N, 3, H, W] in [0, 1]; answers: heading of an image -> model -> (what it says, is it right?), in the same order.
    """
    require(len(images) == len(answers), f"expected a heading for each of {len(images)} images, got {len(answers)}")
    fig = new_figure(NARROW, 1.12 * len(images))
    grid = fig.add_gridspec(len(images), 2, width_ratios=(1, 2.1))
    for i, (image, (head, said)) in enumerate(zip(images, answers.items(), strict=True)):
        picture, text = fig.add_subplot(grid[i, 0]), fig.add_subplot(grid[i, 1])
        picture.imshow(image.detach().cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
        picture.set(xticks=[], yticks=[])
        picture.spines[:].set_visible(False)
        text.set_axis_off()
        text.text(0, 0.85, head, weight="bold", va="center")
        for k, (model, (answer, right)) in enumerate(said.items()):
            hue = ink(RIGHT if right else WRONG)
            text.text(0, 0.6 - 0.22 * k, f"{'✓' if right else '✗'} {model}: {answer}", color=hue, va="center")
    return fig


@styled
def stages(values: Mapping[str, Mapping[str, tuple[float, float, float]]], *, quantity: str, groups: Mapping[str, Sequence[str]]):
    """One line a method, its accuracy (0 to 100 %) at up to four stages as points, each with its 95 % interval.

    values: method -> stage -> (value, low, high) as fractions, the same stages for all. groups: heading -> methods, from
    top to bottom.
    """
    names = [name for members in groups.values() for name in members]
    require(names and set(names) == set(values), f"expected each method in one group, got {sorted(set(names) ^ set(values))}")
    heads = list(values[names[0]])
    require(len(heads) <= len(STAGES), f"expected at most {len(STAGES)} stages, got {len(heads)}")
    lines = len(names) + len(groups)
    fig = new_figure(NARROW + 0.6, 0.9 + 1.45 * LINE * lines)
    ax = fig.add_subplot()
    y, ticks = 0, []
    for head, members in groups.items():
        ax.text(0, y, head, va="center", color=GRAY, style="italic")
        y += 1
        for name in members:
            found = [values[name][stage] for stage in heads]
            ax.plot([100 * found[0][0], 100 * found[-1][0]], [y, y], color="#BBBBBB", linewidth=1, zorder=1)
            for k, ((value, low, high), (hue, sign, filled)) in enumerate(zip(found, STAGES, strict=False)):
                at = y + 0.22 * (k - (len(heads) - 1) / 2)
                ax.plot([100 * low, 100 * high], [at, at], color=hue, linewidth=0.8, alpha=0.6, zorder=2)
                face = hue if filled else "white"
                ax.plot(100 * value, at, sign, color=hue, markerfacecolor=face, markersize=4.5, clip_on=False, zorder=3)
            ticks.append((y, name))
            y += 1
    ax.set(ylim=(y - 0.4, -0.6), xlim=(0, 100), xlabel=quantity)
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    handles = [
        Line2D([], [], color=hue, marker=sign, linestyle="", markerfacecolor=hue if filled else "white", label=stage)
        for stage, (hue, sign, filled) in zip(heads, STAGES, strict=False)
    ]
    fig.legend(handles=handles, loc="outside upper left", ncols=len(heads), frameon=False, handletextpad=0.2, columnspacing=1)
    return fig


@styled
def cost_front(
    points: Mapping[str, tuple[float, float, float, float]], best: Sequence[str], *, cost: str, quantity: str,
    kinds: Mapping[str, str], hues: Mapping[str, str],
):  # fmt: skip
    """Accuracy (0 to 100 %) against a cost on a logarithmic axis; the methods that no other beats joined by a step line.

    points: name -> (cost, accuracy, low, high), accuracies as fractions. best: names on the front, cheapest first.
    kinds: name -> kind, which the legend explains; hues: kind -> color. Every point is named at its own height where there is
    room: those of the cheap half right of it, the others right of the axes.
    """
    require(points, "expected at least one point, got none")
    require(min(p[0] for p in points.values()) > 0, "expected costs above zero on a logarithmic axis")
    used = [kind for kind in hues if kind in kinds.values()]
    height = max(2.8, 0.8 + 1.15 * LINE * len(points))
    fig = new_figure(NARROW + 1.4, height + LINE * -(-len(used) // 3))
    ax = fig.add_subplot()
    ax.step([points[m][0] for m in best], [100 * points[m][1] for m in best], where="post", color=GRAY, linewidth=1, gid="front")
    for name, (at, value, low, high) in points.items():
        hue = hues[kinds[name]]
        ax.plot([at, at], [100 * low, 100 * high], color=ink(hue), linewidth=0.7, alpha=0.5)
        face = hue if name in best else "white"
        ax.plot(at, 100 * value, "o", color=ink(hue), markerfacecolor=face, markersize=6, clip_on=False, zorder=3, gid=name)
    ax.set(xscale="log", ylim=(0, 100), xlabel=cost, ylabel=quantity)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    limits = ax.get_xlim()
    _names(ax, points, best, {name: ink(hues[kind]) for name, kind in kinds.items()}, 100 * LINE / (height - 0.6))
    ax.set_xlim(limits)
    handles = [Line2D([], [], color=ink(hues[k]), marker="o", linestyle="", markerfacecolor=hues[k], label=k) for k in used]
    fig.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, handletextpad=0.2, columnspacing=1)
    return fig


def _names(ax, points: Mapping[str, tuple], best: Sequence[str], inks: Mapping[str, str], gap: float) -> None:
    """The name of each point, on a white ground that keeps lines off its letters."""
    costs = [p[0] for p in points.values()]
    middle = (min(costs) * max(costs)) ** 0.5
    for cheap in (True, False):
        half = sorted((m for m in points if (points[m][0] <= middle) == cheap), key=lambda m: (points[m][1], -points[m][0]))
        heights = spread([100 * points[m][1] for m in half], gap, gap / 3, 100 - gap / 3)
        place = (1.35 * max(points[m][0] for m in half), ax.transData) if cheap else (1.05, ax.get_yaxis_transform())
        for name, y in zip(half, heights, strict=True):
            ax.annotate(name, (points[name][0], 100 * points[name][1]), (place[0], y), xycoords="data", textcoords=place[1],
                        va="center", color=inks[name], weight="bold" if name in best else "normal", zorder=2.5,
                        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}, arrowprops=THREAD)  # fmt: skip
