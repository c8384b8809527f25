"""Charts of measured numbers: accuracy against ε, paired differences, cost, convergence, a grid of settings."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from .style import NARROW, color, ink, looks, luminance, method_labels, new_figure, require, styled

LINES = {"pgd": "-", "cw": "--", "autoattack": ":", "apgd": ":", "noise": "-.", "worst": (0, (1, 1))}
OTHER_LINE = (0, (5, 1, 1, 1, 1, 1))
ACCURACIES = ("clean_acc", "robust_acc", "robust_acc_worst")
GRAY = "#595959"


@styled
def accuracy_vs_eps(rows, *, chance: float, order: Sequence[str] = (), width: float = NARROW, height: float = 2.8):
    """Accuracy (0 to 100 %) against ε in evenly spaced steps, from clean (ε = 0) on; one data set a figure.

    rows: `Row`s of one data set (of a card: `Row(**row)`); the 8-bit ones are left out. Color tells the method, line
    style the attack; the curves of a single method are named by their attack. The band is the 95 % interval. Of several
    seeds, each is a thin line and their mean a thick one. chance: accuracy of guessing, as a fraction. order: methods
    from back to front, all of the rows by default.
    """
    rows = [row for row in rows if row.metric in ACCURACIES]
    methods = list(order) or list(dict.fromkeys(row.method for row in rows))
    datasets = sorted({row.dataset for row in rows})
    require(len(datasets) == 1, f"expected rows of one data set, got {datasets or 'none'}; draw one figure for each")
    require(0 <= chance <= 1, f"expected chance as a fraction, got {chance}; pass 1 / number of classes")
    attacks = [a for a in dict.fromkeys(row.attack for row in rows) if a != "none"]
    require(attacks, "expected rows under an attack, got clean rows only; evaluate with attacks")
    budgets = sorted({0.0} | {float(row.eps_255) for row in rows if row.method in methods})
    sizes = sorted({row.n for row in rows})

    fig = new_figure(width, height)
    ax = fig.add_subplot()
    ax.axhline(100 * chance, color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)), gid="chance")
    ax.annotate("chance", (0, 100 * chance), (-2, 2), textcoords="offset points", color=GRAY)
    drawn, look = {}, looks(methods)  # (method, attack) -> curve
    for method in methods:
        for attack in attacks:
            seeds = _curves(rows, method, attack)
            if seeds:
                how = look[method] | _line(attack, attacks) | {"label": method}
                drawn[method, attack] = _draw_curve(ax, seeds, budgets, how)
    absent = [method for method in methods if method not in {m for m, _ in drawn}]
    require(not absent, f"expected attacked rows of each method, got none of {', '.join(absent)}; check `order`")
    ax.set(ylim=(0, 100), ylabel="accuracy (%)", xlim=(-0.15, len(budgets) - 0.85))
    ax.set_xticks(range(len(budgets)), [f"{eps:g}".removeprefix("0") or "0" for eps in budgets])
    only = f" of {attacks[0]}" if len(attacks) == 1 else ""
    ax.set_xlabel(f"ε (1/255){only}, n = {'–'.join(str(n) for n in dict.fromkeys((sizes[0], sizes[-1])))}")
    ax.set_title(datasets[0], loc="left", color=GRAY)
    if len(methods) == 1 < len(attacks):  # then each curve is named by its attack
        curves = {attack: curve for (_, attack), curve in drawn.items()}
        look = {attack: look[methods[0]] | _line(attack, attacks) for attack in curves}
    else:
        curves = {method: next(c for (m, _), c in drawn.items() if m == method) for method in methods}
        if len(attacks) > 1:
            handles = [Line2D([], [], color=GRAY, label=a, **_line(a, attacks)) for a in attacks]
            ax.legend(handles=handles, loc="upper right", frameon=False, handlelength=2.2, borderaxespad=0)
    method_labels(ax, _heights(curves, budgets), height - 0.75, look)
    return fig


def _require_fractions(values: Sequence[float], low: float = 0) -> None:
    wrong = [value for value in values if not low <= value <= 1]  # NaN too
    require(not wrong, f"expected accuracies as fractions, got {wrong[0] if wrong else 0:g}; the figure makes percent")


def _curves(rows, method: str, attack: str) -> dict[int, dict[float, object]]:
    """seed -> ε -> row, with the clean row at ε = 0; empty if the attack was not run."""
    seeds: dict[int, dict] = {}
    for row in rows:
        if row.method == method and row.attack in ("none", attack):
            seeds.setdefault(row.extra.get("seed", 0), {})[float(row.eps_255)] = row
    return {seed: curve for seed, curve in seeds.items() if any(eps > 0 for eps in curve)}


def _line(attack: str, attacks: Sequence[str]) -> dict:
    return {"linestyle": "-" if len(attacks) == 1 else LINES.get(attack.split("-")[0], OTHER_LINE)}


def _draw_curve(ax, seeds, budgets, look: dict) -> dict[float, float]:
    """Draws one method under one attack and returns ε -> mean accuracy in percent."""
    mean = {eps: [] for eps in budgets}
    for curve in seeds.values():
        for eps, row in curve.items():
            mean[eps].append(100 * row.value)
        if len(seeds) > 1:
            points = [(budgets.index(eps), 100 * curve[eps].value) for eps in sorted(curve)]
            ax.plot(
                *zip(*points, strict=True), color=look["color"], linestyle=look["linestyle"], linewidth=0.6, alpha=0.7
            )
    mean = {eps: float(np.mean(values)) for eps, values in mean.items() if values}
    x = [budgets.index(eps) for eps in mean]
    if len(seeds) == 1:
        (curve,) = seeds.values()
        low, high = np.array([curve[eps].ci95 for eps in mean]).T * 100
        ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    ax.plot(x, list(mean.values()), clip_on=False, zorder=3, **look)
    return mean


def _heights(curves: Mapping[str, Mapping[float, float]], budgets) -> dict[str, float]:
    """Where to name each curve: at its height where all lie farthest apart, so that names keep their order."""
    shared = [eps for eps in budgets if all(eps in curve for curve in curves.values())]
    at = max(shared, key=lambda eps: np.std([curve[eps] for curve in curves.values()]), default=None)
    return {m: curve[at] if at is not None else list(curve.values())[-1] for m, curve in curves.items()}


@styled
def paired_bars(
    diffs: Mapping[str, tuple[float, float, float]],
    *,
    reference: str,
    quantity: str = "robust accuracy",
    title: str = "",
):
    """Paired differences with 95 % intervals against a reference, in percentage points, zero line drawn.

    diffs: name -> (difference, low, high) as fractions, as `evaluate.paired` gives them. A filled marker means that the
    interval excludes zero.
    """
    require(diffs, "expected at least one difference, got none")
    _require_fractions([end for interval in diffs.values() for end in interval], low=-1)
    fig = new_figure(NARROW, 0.75 + 0.28 * len(diffs))
    ax = fig.add_subplot()
    ax.axvline(0, color="black", linewidth=0.8, gid="zero")
    for y, (name, (diff, low, high)) in enumerate(diffs.items()):
        hue, sure = color(name), low > 0 or high < 0
        edge = ink(hue)
        ax.barh(y, 100 * diff, height=0.5, color=hue, alpha=0.35)
        ax.plot([100 * low, 100 * high], [y, y], color=edge, solid_capstyle="butt")
        ax.plot(100 * diff, y, "o", color=edge, markerfacecolor=edge if sure else "white")
    ax.set_yticks(range(len(diffs)), list(diffs))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(diffs) - 0.5, -0.5)
    ax.spines["left"].set_visible(False)
    ax.use_sticky_edges = False  # a bar that ends at zero leaves room for its dot
    ax.margins(x=0.08)
    ax.set_xlabel(f"{quantity} minus {reference}'s (points)", x=1, ha="right")
    ax.set_title(title, loc="left", color=GRAY)
    return fig


@styled
def cost_scatter(points: Mapping[str, tuple], *, cost: str, quantity: str = "robust accuracy (%)", log: bool = False):
    """Accuracy (0 to 100 %) against a cost per training step or per image; the upper left is the place to be.

    points: name -> (cost, accuracy) or (cost, accuracy, low, high), accuracies as fractions. cost: label of the x axis
    with its unit, e.g. "seconds per training step".
    """
    require(points, "expected at least one point, got none")
    height = 2.6
    fig = new_figure(NARROW, height)
    ax = fig.add_subplot()
    _require_fractions([value for point in points.values() for value in point[1:]])
    look = looks(points)
    costs = [point[0] for point in points.values()]
    require(min(costs) > 0 if log else min(costs) >= 0, f"expected costs above zero, got {min(costs):g}")
    for name, (at, value, *interval) in points.items():
        if interval:
            ax.plot([at, at], [100 * end for end in interval], color=look[name]["markeredgecolor"], linewidth=1.2)
        ax.plot(at, 100 * value, clip_on=False, zorder=3, label=name, markersize=7, **look[name])
    ax.set(ylim=(0, 100), ylabel=quantity, xlabel=cost, xscale="log" if log else "linear")
    if log:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.set_xlim(0, 1.08 * max(costs))
    method_labels(ax, {name: 100 * point[1] for name, point in points.items()}, height - 0.6, look, linestyle="")
    return fig


@styled
def convergence(
    curves: Mapping, *, quantity: str, steps: str = "attack steps", percent: bool = False, log: bool = False,
    names: Sequence[str] = (),
):  # fmt: skip
    """A quantity against attack steps; a curve that has gone flat says that more steps would change nothing.

    curves: name -> values [S] for steps 0 to S - 1, or (steps [S], values [S]). percent: the values are fractions and
    the axis runs from 0 to 100. log: the steps are drawn by their logarithm.
    names: written in place of the numbers 0 to S - 1.
    """
    require(curves, "expected at least one curve, got none")
    height = 2.4
    fig = new_figure(NARROW, height)
    ax = fig.add_subplot()
    ends, look = {}, looks(curves)
    for name, curve in curves.items():
        at, values = curve if isinstance(curve, tuple) else (range(len(curve)), curve)
        values = np.asarray(values, dtype=float) * (100 if percent else 1)
        require(len(at) == len(values) > 0, f"{name}: expected a value for each step, got {len(values)} for {len(at)}")
        ax.plot(at, values, clip_on=not percent, markevery=max(1, len(values) // 6), **look[name])
        ends[name] = values[-1]
    ax.set(xlabel=steps, ylabel=quantity)
    if log:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if percent:
        ax.set_ylim(0, 100)
    if names:
        ax.set_xticks(range(len(names)), names, rotation=90)
    method_labels(ax, ends, height - 0.55, look)
    return fig


@styled
def ablation_grid(values: Mapping[tuple, float], *, rows: str, columns: str, mark: tuple = (), decimals: int = 1):
    """A small heat table of accuracies over two settings, numbers in percent.

    values: (row setting, column setting) -> fraction; missing pairs stay empty. rows, columns: names of the settings,
    e.g. "α" and "β". mark: the pair to frame, e.g. the paper's.
    """
    require(values, "expected at least one value, got none")
    _require_fractions(list(values.values()))
    down, across = (sorted({pair[i] for pair in values}) for i in (0, 1))
    table = np.full((len(down), len(across)), np.nan)
    for (a, b), value in values.items():
        table[down.index(a), across.index(b)] = 100 * value
    fig = new_figure(min(NARROW, 0.75 + 0.65 * len(across)), 0.55 + 0.32 * len(down))
    ax = fig.add_subplot()
    shown = ax.imshow(table, cmap="cividis", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if not np.isnan(value):
            dark = luminance(shown.cmap(shown.norm(value))[:3]) < 0.18
            ax.text(j, i, f"{value:.{decimals}f}", ha="center", va="center", color="white" if dark else "black")
    if mark:
        require(mark in values, f"mark: expected one of the pairs {list(values)}, got {mark}")
        i, j = down.index(mark[0]), across.index(mark[1])
        corner = (j - 0.48, i - 0.46)
        ax.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, edgecolor=color("TGA-ZSR"), linewidth=2.5))
    ax.set_xticks(range(len(across)), [f"{b:g}" for b in across])
    ax.set_yticks(range(len(down)), [f"{a:g}" for a in down])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel=columns)
    ax.set_ylabel(rows, rotation=0, ha="right", va="center")
    return fig
