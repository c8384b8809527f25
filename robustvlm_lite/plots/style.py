"""One look for every figure: hues of the methods, text sizes, and labels that stay clear of each other."""

import functools
from collections import Counter
from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from ..runtime import UserError

# Hues of Okabe and Ito (2008), told apart with any color vision. Black is undefended, gray is trained without attack.
COLORS = {
    "CLIP": "#000000",
    "FT-clean": "#767676",
    "FT-adv": "#E69F00",
    "TeCoA": "#56B4E9",
    "PMG-AFT": "#009E73",
    "FARE": "#CC79A7",
    "TGA-ZSR": "#D55E00",
    "Comp-TGA": "#0072B2",
    "Vision-guided": "#F0E442",
}
MARKERS = dict(zip(COLORS, "osD^vP*Xh", strict=True))
# Methods on prompts have the hue and the marker of one that no figure shows beside them.
LENT = {
    "HEP": "CLIP",
    "PAFT": "FT-clean",
    "AVP": "TeCoA",
    "AdvVP": "TeCoA",
    "APT": "FT-adv",
    "TRADES": "PMG-AFT",
    "CAPT (distillation)": "FARE",
    "CAPT": "TGA-ZSR",
    "AdvVLP": "Vision-guided",
    "AdvMaPLe": "FT-adv",
    "FAP": "PMG-AFT",
    "CBA-FAPT (adversarial only)": "TGA-ZSR",
    "CBA-FAPT (no maps)": "FARE",
    "CBA-FAPT": "Comp-TGA",
}
UNKNOWN = "#767676"
BORROWED = ("Comp-TGA", "TGA-ZSR", "PMG-AFT", "FARE", "FT-adv", "TeCoA")  # looks for names that are no method
OTHER_MARKERS = "<>pd"
NARROW, WIDE = 3.4, 7.0  # inches
DPI = 150
POINTS = 9
PALE = 0.5  # relative luminance above which a line needs a dark edge to be seen on white

RC = {
    "font.size": POINTS,
    "axes.labelsize": POINTS,
    "axes.titlesize": POINTS,
    "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS,
    "legend.fontsize": POINTS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.dpi": DPI,
    "figure.facecolor": "white",  # a white card, in dark mode too
    "savefig.facecolor": "white",
}


def styled(draw):
    """Decorator: `draw` runs under the book's matplotlib settings, whatever the reader's own are."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(RC)
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """A figure that pyplot does not know: nothing shows it twice, nothing has to close it."""
    return Figure(figsize=(width, height), layout="constrained")


def _known(method: str) -> str:
    """The method of COLORS that a name is drawn as: what it begins with ("TGA-ZSR (strict)"), or what that is lent (LENT)."""
    family = max((known for known in (*COLORS, *LENT) if method.startswith(known)), key=len, default="")
    return LENT.get(family, family)


def color(method: str) -> str:
    """Hue of a method for the whole book, as hex; gray for a name that has none."""
    return COLORS.get(_known(method), UNKNOWN)


def luminance(hue) -> float:
    """Relative luminance in [0, 1] (WCAG 2)."""
    rgb = np.array(to_rgb(hue))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def ink(hue) -> str:
    """The hue, darkened until text in it reaches a contrast of 4.5 : 1 on white."""
    rgb = np.array(to_rgb(hue))
    while 1.05 / (luminance(rgb) + 0.05) < 4.5:
        rgb = rgb * 0.97
    return to_hex(rgb)


def looks(names: Iterable[str]) -> dict[str, dict]:
    """Keyword arguments of `Axes.plot` for each of the names that share a figure, no two alike.

    A method has its hue and marker. Its second variant ("TGA-ZSR (strict)") has white markers, further ones other
    markers. A name that is no method ("cross-entropy") borrows the look of one that is not in the figure.
    """
    names = list(names)
    families = {name: _known(name) for name in names}
    spare = [family for family in BORROWED if family not in families.values()]
    seen: Counter[str] = Counter()
    look = {}
    for name in names:
        family = families[name] or (spare.pop(0) if spare else "")
        hue, variant = COLORS.get(family, UNKNOWN), seen[family]
        seen[family] += 1
        sign = MARKERS.get(family, "o") if variant < 2 else OTHER_MARKERS[(variant - 2) % len(OTHER_MARKERS)]
        look[name] = {"color": hue, "marker": sign, "markeredgecolor": ink(hue), "markeredgewidth": 0.6}
        if variant == 1:
            look[name] |= {"markerfacecolor": "white", "markeredgewidth": 1.2}
        if luminance(hue) > PALE:
            edge = patheffects.Stroke(linewidth=2.8, foreground=ink(hue))
            look[name]["path_effects"] = [edge, patheffects.Normal()]
    return look


def spread(wanted, gap: float, low: float, high: float) -> np.ndarray:
    """Positions in [low, high] nearest to `wanted` (least squares) that keep their order and lie `gap` apart."""
    wanted = np.asarray(wanted, dtype=float)
    order, steps = np.argsort(wanted, kind="stable"), gap * np.arange(len(wanted))
    blocks: list[list[float]] = []  # neighbors that touch move as one: [mean, size]
    for value in wanted[order] - steps:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, n), (b, m) = blocks.pop(-2), blocks.pop()
            blocks.append([(n * a + m * b) / (n + m), n + m])
    packed = np.repeat([b[0] for b in blocks], [b[1] for b in blocks]) if blocks else np.empty(0)
    placed = np.empty(len(wanted))
    placed[order] = packed.clip(low, max(low, high - gap * (len(wanted) - 1))) + steps
    return placed


def label_gap(ax, height: float) -> float:
    """Distance in data units between two lines of text, for axes about `height` inches high."""
    low, high = ax.get_ylim()
    return (high - low) * 1.3 * POINTS / 72 / height


def method_labels(ax, wanted: dict[str, float], height: float, look: dict[str, dict], **more) -> None:
    """Names right of the axes, each with its line and marker, near the height where its curve runs."""
    gap = label_gap(ax, height)
    low, high = ax.get_ylim()
    across = ax.get_yaxis_transform()  # x in axes, y in data
    for name, y in zip(wanted, spread(list(wanted.values()), gap, low + gap / 3, high - gap / 3), strict=True):
        ax.plot([1.05, 1.1, 1.15], [y] * 3, transform=across, clip_on=False, markevery=[1], **look[name], **more)
        ax.text(1.18, y, name, transform=across, va="center", color=look[name]["markeredgecolor"])


def require(holds, expected: str) -> None:
    """Raises UserError for a figure that cannot be drawn from what was given."""
    if not holds:
        raise UserError(expected)
