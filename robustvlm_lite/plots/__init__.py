"""The figures of the book: each function returns a matplotlib Figure for `book.show`, which saves and displays it.

Figures are 3.4 in wide, so that a phone shows their 9 pt text at full size; `book.show` sets several side by side where
there is room. Strips of many columns are 7 in wide. There are no titles: the caption carries the message.
"""

from .charts import ablation_grid, accuracy_vs_eps, convergence, cost_scatter, paired_bars
from .grids import confusion_grid, mosaics, pair_grid, similarities, stretched, token_grids
from .pictures import attacked_strip, captioned, guesses, map_strip, picture_rows
from .style import COLORS, color

__all__ = [
    "COLORS",
    "ablation_grid",
    "accuracy_vs_eps",
    "attacked_strip",
    "captioned",
    "color",
    "confusion_grid",
    "convergence",
    "cost_scatter",
    "guesses",
    "map_strip",
    "mosaics",
    "pair_grid",
    "paired_bars",
    "picture_rows",
    "similarities",
    "stretched",
    "token_grids",
]
