"""A run of a chapter with toy sizes, one claim and a handful of images, for the tests of `book`."""

import numpy as np
import pytest
import yaml

from robustvlm_lite import book, runtime
from robustvlm_lite.book import run as run_module
from robustvlm_lite.claims import load_claims
from robustvlm_lite.records import Row, records_table
from robustvlm_lite.stats import wilson

CHAPTER = "04_tga_zsr"


def row(method, correct, attack="pgd-20", eps_255=1.0, metric="robust_acc", **extra):
    """A Row over images of which `correct` (0/1) were right."""
    n, hits = len(correct), sum(correct)
    prediction = [c if c else 2 for c in correct]
    records = records_table(
        **{"n": n, "method": method, "dataset": "toy/gray", "attack": attack, "eps_255": eps_255, "seed": 0},
        **{"index": np.arange(n), "label": 1, "prediction": prediction, "correct": np.array(correct, dtype=bool)},
        **{"margin": [c - 0.5 for c in correct], "linf_255": eps_255},
        **{"prediction_8bit": prediction, "correct_8bit": np.array(correct, dtype=bool)},
    )
    extra = {"seed": 0, "n_steps": 20, "step_255": eps_255 / 4} | extra
    number = (metric, n, hits / n, wilson(hits, n))
    return Row(method, "toy/gray", attack, eps_255, *number, extra=extra, records=records, weights_sha256="w" * 64)


def filled(run):
    clean = [row(m, [1] * 20, attack="none", eps_255=0.0, metric="clean_acc") for m in ("CLIP", "TeCoA")]
    run.card.add([*clean, row("CLIP", [0] * 20), row("TeCoA", [1] * 16 + [0] * 4)])
    return run


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """`book.start` with toy sizes, whatever weights are on this disk."""
    sizes = {"minutes": 1, "where": "here", "model": "toy"}
    known = {CHAPTER: {"title": "t", "parameters": {"eps_255": [0.0, 64.0]}, "profiles": {"tiny": sizes}}}
    monkeypatch.setattr(runtime, "chapters", lambda: known)
    monkeypatch.setattr(run_module, "check_resources", lambda *args: None)
    monkeypatch.setattr(run_module, "_current", None)

    def start(**options):
        return book.start(CHAPTER, **({"out": str(tmp_path / "run"), "device": "cpu"} | options))

    return start


@pytest.fixture
def claims(tmp_path, monkeypatch):
    """One claim about TeCoA, which `run` and the tables read in place of the book's."""
    claim = {"id": "TGA-C1", "chapter": CHAPTER, "paper": "p", "where": "Table 1", "published": "+23.16", "scale": "s"}
    claim |= {"statement": "TeCoA <beats> CLIP & more", "profile": "tiny", "reproduced": "lo(gain) > 0"}
    claim |= {"measure": {"gain": 'diff(acc("TeCoA"), acc("CLIP"))'}, "partly": "gain > 0"}
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump([claim], allow_unicode=True))
    for module in (run_module, book.tables):
        monkeypatch.setattr(module, "load_claims", lambda chapter="": load_claims(path, chapter=chapter))
    return claim
