"""The expression language in which claims are decided, and the quantities that it measures on a card.

    acc("TeCoA", attack="pgd-*", eps_255=(1, 2), dataset="photos/*")   accuracy of a method
    diff(a, b)             a - b over the same images, with a paired 95 % interval
    row("R1", "rouge_l_gain", attack="worst", eps_255=0.5)   a row of another metric as it stands in the card
    lo(d), hi(d)           the ends of the interval of a diff or a row
    numbers, names of expressions above, + - * /, comparisons, and, or, not

attack: "none" is clean accuracy. Of the attacks that fit a pattern ("pgd-*", the default) and that all methods met, the
strongest counts: most steps, then most restarts; a variant with a paper's settings only if there is no other.
eps_255: the card's own budget if left out; several are averaged per image, and so are several seeds.
dataset: a pattern; of the data sets that fit, those count on which every method was measured, each with equal weight.

Expressions are parsed by `ast` and walked node by node. Nothing else has a meaning in them, and nothing is executed.
"""

import ast
import math
import operator
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa

from .records import verdicts
from .runtime import UserError
from .stats import paired_bootstrap

FUNCTIONS = ("acc", "diff", "row", "lo", "hi")
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
}
GRAMMAR = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Tuple, ast.Call, ast.keyword),
    *(ast.UnaryOp, ast.BinOp, ast.Compare, ast.BoolOp, ast.And, ast.Or, *OPERATORS),
)


class NotMeasured(Exception):
    """The card lacks what an expression needs; the text says what."""


def parse(expressions: dict[str, str], owner: str) -> dict[str, ast.expr]:
    """Named expressions, checked, in their order: each may use the names above it.

    Raises UserError, one line that begins with `owner`, for anything outside the language.
    """
    trees: dict[str, ast.expr] = {}
    for name, text in expressions.items():
        where = f"{owner}, {name}"
        try:
            tree = ast.parse(str(text), mode="eval")
        except SyntaxError as error:
            raise UserError(f"{where}: {error.msg} in {text!r}") from None
        functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            known = FUNCTIONS if id(node) in functions else tuple(trees)
            if not isinstance(node, GRAMMAR) or (id(node) in functions and not isinstance(node, ast.Name)):
                raise UserError(f"{where}: {type(node).__name__} is not part of the rule language ({text})")
            if isinstance(node, ast.Name) and node.id not in known:
                raise UserError(f"{where}: expected one of {', '.join(known) or 'the functions'}, got {node.id!r}")
        trees[name] = tree.body
        try:
            _selectors([tree])
        except (TypeError, ValueError):
            usage = 'acc("method", attack="...", eps_255=..., dataset="...") or row("method", "metric", ...) with plain values'
            raise UserError(f"{where}: expected {usage}, got {text}") from None
    return trees


def compute(trees: dict[str, ast.expr], card: dict, examples: pa.Table) -> tuple[dict, dict[str, int]]:
    """`(values, sizes)`: the value of every expression on a card, and n of each data set that was used.

    Raises NotMeasured where rows are missing, TypeError or ZeroDivisionError where an expression makes no sense.
    """
    scope, values = _Scope(card, examples, _selectors(trees.values())), {}
    for name, tree in trees.items():
        values[name] = _evaluate(tree, scope, values)
    return values, scope.sizes


def _evaluate(node: ast.expr, scope: "_Scope", values: dict):
    def value(child):
        return _evaluate(child, scope, values)

    match node:
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.Name():
            return values[node.id]
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](value(node.operand))
        case ast.BinOp():
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        case ast.BoolOp():
            parts = [bool(value(child)) for child in node.values]
            return all(parts) if isinstance(node.op, ast.And) else any(parts)
        case ast.Compare():
            sides = [value(child) for child in (node.left, *node.comparators)]
            return all(OPERATORS[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))
        case ast.Call(func=ast.Name(id="acc")):
            return scope.acc(_selector(node))
        case ast.Call(func=ast.Name(id="row")):
            return scope.row(*_row_of(node))
        case ast.Call(func=ast.Name(id="diff")):
            return scope.diff(*map(value, node.args))
        case ast.Call(args=[difference]):
            return getattr(_interval(value(difference)), node.func.id)
    raise TypeError(f"{ast.unparse(node)} has no meaning here")


def _interval(value) -> "Interval":
    if not isinstance(value, Interval):
        raise TypeError("lo and hi take a diff or a row")
    return value


# ---- measured quantities: numbers that remember the images behind them


class Accuracy(float):
    """An accuracy with its `label` and its `images`: per data set the index and the score in [0, 1] of each image."""

    label: str
    images: dict[str, tuple[np.ndarray, np.ndarray]]


class Interval(float):
    """A number with the ends `lo` and `hi` of its 95 % interval."""

    lo: float
    hi: float

    @classmethod
    def of(cls, value: float, lo: float, hi: float):
        interval = cls(value)
        interval.lo, interval.hi = lo, hi
        return interval


class Difference(Interval):
    """A paired difference of two accuracies."""


class Reading(Interval):
    """The value of a row, in the unit of its metric."""


@dataclass(frozen=True)
class Selector:
    """The arguments of one `acc(...)`."""

    method: str
    attack: str = "pgd-*"
    eps_255: tuple[float, ...] = ()
    dataset: str = "*"


def _selector(call: ast.Call) -> Selector:
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    selector = Selector(*map(ast.literal_eval, call.args), **named)
    texts = (selector.method, selector.attack, selector.dataset)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("method, attack and dataset are texts")
    return replace(selector, eps_255=tuple(np.atleast_1d(selector.eps_255).astype(float).tolist()))


def _row_of(call: ast.Call) -> tuple[Selector, str]:
    """The arguments of one `row(...)`: of which method, attack and data set, and of which metric."""
    method, metric = map(ast.literal_eval, call.args)
    named = {"attack": "none"} | {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    if not all(isinstance(text, str) for text in (method, metric, named["attack"])):
        raise TypeError("method, metric and attack are texts")
    return Selector(method, **named | {"eps_255": tuple(np.atleast_1d(named.get("eps_255", ())).astype(float).tolist())}), metric


def _selectors(trees) -> list[Selector]:
    """The arguments of every `acc(...)`; those of `row(...)` are looked at too, so that a wrong one is found at once."""
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        if call.func.id == "row":
            _row_of(call)
    return list(dict.fromkeys(_selector(call) for call in calls if call.func.id == "acc"))


class _Scope:
    """The selectors of one claim resolved on one card: the same data sets, images and attacks for all of them."""

    def __init__(self, card: dict, examples: pa.Table, selectors: list[Selector]):
        self.examples, self.card_rows = examples, card["rows"]
        self.budget = float(card["parameters"].get("eps_255", 1.0))
        self.sizes: dict[str, int] = {}  # n of the data sets that were used
        self.rows: dict[tuple, list[dict]] = {}  # several only where several seeds were run
        for row in card["rows"]:
            if row["metric"] in ("clean_acc", "robust_acc", "robust_acc_worst"):
                key = (row["method"], row["dataset"], row["attack"], row["eps_255"])
                self.rows.setdefault(key, []).append(row)
        options = {selector: self._options(selector) for selector in selectors}
        absent = [self._label(selector, selector.attack) for selector, found in options.items() if not found]
        if absent:
            raise NotMeasured(f"no row of {', nor of '.join(absent)}")

        def shared(selector, dataset):
            alike = [s for s in selectors if (s.attack, s.dataset) == (selector.attack, selector.dataset)]
            return set.intersection(*(options[s].get(dataset, set()) for s in alike))

        self.cells: dict[Selector, dict[str, str]] = {}  # data set -> attack
        for selector, found in options.items():
            peers = [s for s in selectors if s.dataset == selector.dataset]
            common = [dataset for dataset in sorted(found) if all(shared(s, dataset) for s in peers)]
            if not common:
                raise NotMeasured("the methods share no data set on which all of them met the same attacks")
            self.cells[selector] = {dataset: max(shared(selector, dataset), key=_strength) for dataset in common}

    def acc(self, selector: Selector) -> Accuracy:
        """Mean over images, then over data sets."""
        images = {}
        for dataset, attack in self.cells[selector].items():
            rows = [row for eps in self._eps(selector) for row in self.rows[selector.method, dataset, attack, eps]]
            parts = [verdicts(self.examples, row) for row in rows]
            index = parts[0][0]
            if any(not np.array_equal(index, other) for other, _ in parts):
                raise NotMeasured(f"{selector.method} met other images of {dataset} at another budget or seed")
            images[dataset] = (index, np.mean([correct for _, correct in parts], axis=0))
            self.sizes[dataset] = len(index)
        accuracy = Accuracy(np.mean([score.mean() for _, score in images.values()]))
        accuracy.images = images
        accuracy.label = self._label(selector, "/".join(sorted(set(self.cells[selector].values()))))
        return accuracy

    def diff(self, a: Accuracy, b: Accuracy) -> Difference:
        """Paired over images, data sets with equal weight."""
        if not (isinstance(a, Accuracy) and isinstance(b, Accuracy)):
            raise TypeError("diff takes two accuracies")
        same = a.images.keys() == b.images.keys()
        if not same or any(not np.array_equal(a.images[d][0], b.images[d][0]) for d in a.images):
            raise NotMeasured(f"{a.label} and {b.label} did not meet the same images")
        strata = np.concatenate([np.full(len(index), dataset) for dataset, (index, _) in a.images.items()])
        scores = [np.concatenate([side.images[dataset][1] for dataset in a.images]) for side in (a, b)]
        return Difference.of(*paired_bootstrap(*scores, strata=strata))

    def row(self, selector: Selector, metric: str) -> Reading:
        """Value and interval of the rows of one metric; of several (seeds, data sets) the mean of each number."""
        found = [
            row
            for row in self.card_rows
            if (row["method"], row["metric"], row["attack"]) == (selector.method, metric, selector.attack)
            and row["eps_255"] in self._eps(selector)
            and fnmatchcase(row["dataset"], selector.dataset)
        ]
        if not found:
            raise NotMeasured(f"no row of {metric} of {self._label(selector, selector.attack)}")
        self.sizes |= {row["dataset"]: row["n"] for row in found}
        numbers = [(row["value"], *row["ci95"]) for row in found]
        return Reading.of(*np.mean(numbers, axis=0).tolist())

    def _eps(self, selector: Selector) -> tuple[float, ...]:
        if selector.attack == "none":
            return (0.0,)
        return selector.eps_255 or (self.budget,)

    def _label(self, selector: Selector, attack: str) -> str:
        where = "" if selector.dataset == "*" else f" on {selector.dataset}"
        budget = " and ".join(f"{eps:g}/255" for eps in self._eps(selector))
        return f"{selector.method}, " + ("clean" if attack == "none" else f"{attack} at ε = {budget}") + where

    def _options(self, selector: Selector) -> dict[str, set[str]]:
        """Per data set the attacks of the pattern that were run at every budget asked."""
        found: dict[str, dict[str, set]] = {}
        for method, dataset, attack, eps in self.rows:
            fits = fnmatchcase(dataset, selector.dataset) and fnmatchcase(attack, selector.attack)
            if method == selector.method and fits:
                found.setdefault(dataset, {}).setdefault(attack, set()).add(eps)
        asked = set(self._eps(selector))
        whole = {d: {attack for attack, eps in attacks.items() if asked <= eps} for d, attacks in found.items()}
        return {dataset: attacks for dataset, attacks in whole.items() if attacks}


def _strength(attack: str) -> tuple[float, str]:
    """Order of attacks of one family: "…-paper" < "pgd-10" < "pgd-20" < "pgd-20x5"; no number is the full attack."""
    if attack.endswith(("-paper", "-released")):
        return -1, attack
    steps = re.search(r"-(\d+)(x\d+)?$", attack)
    return int(steps[1]) if steps else math.inf, attack
