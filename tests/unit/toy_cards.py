"""Cards whose accuracies a test decides."""

import numpy as np
import pyarrow as pa

from robustvlm_lite.claims import decide
from robustvlm_lite.evaluate import _row
from robustvlm_lite.records import Cell, records_table
from robustvlm_lite.rules import compute, parse


class Toy:
    """A card with the accuracies that a test asks for, and the examples behind them."""

    def __init__(self, profile="tiny", **parameters):
        self.rows, self.tables = [], []
        self.profile, self.parameters = profile, {"eps_255": 1.0} | parameters

    def add(self, method, correct, attack="pgd-20", eps_255=1.0, dataset="toy/a", seed=0):
        correct = np.asarray(correct, dtype=bool)
        n = len(correct)
        records = records_table(
            **{"n": n, "method": method, "dataset": dataset, "attack": attack, "eps_255": eps_255, "seed": seed},
            **{"index": range(n), "label": 1, "prediction": correct.astype(int), "margin": correct - 0.5},
            **{
                "prediction_8bit": correct.astype(int),
                "linf_255": eps_255,
                "correct": correct,
                "correct_8bit": correct,
            },
        )
        metric = "clean_acc" if attack == "none" else "robust_acc"
        self.rows.append(_row(Cell(records, 0.0, 0, 0), metric, {}, {"seed": seed}).as_dict())
        self.tables.append(records)
        return self

    @property
    def card(self):
        return {"profile": self.profile, "parameters": self.parameters, "rows": self.rows}

    def value(self, expression, **measures):
        trees = parse(measures | {"asked": expression}, "test")
        return compute(trees, self.card, pa.concat_tables(self.tables))[0]["asked"]

    def decide(self, **claim):
        claim = {"id": "T1", "profile": "tiny", "measure": {}, "partly": "0 > 1"} | claim
        (outcome,) = decide([claim], self.card, pa.concat_tables(self.tables))
        assert outcome.pop("id") == "T1"
        return outcome


def share(k, n=200):
    """n verdicts of which the first k are right."""
    return np.arange(n) < k


TWO = Toy().add("TGA-ZSR", share(120)).add("TeCoA", share(100))
