"""Clean and robust accuracy with per-example records, worst cases and paired differences."""

import hashlib
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .data.imageset import ImageSet
from .records import Cell, Row, Store, column, records_table
from .runtime import UserError
from .stats import paired_bootstrap, wilson
from .threat import audit, to_8bit


def evaluate(
    model: nn.Module,
    data: ImageSet,
    attacks,
    *,
    method: str,
    seed: int = 0,
    batch_size: int = 64,
    surface: nn.Module | None = None,
    store: Store | None = None,
    fingerprint: str = "",
    progress: bool = True,
) -> list[Row]:
    """Accuracy of `model` on clean images, then under each attack.

    model: pixels `[B,3,H,W]` in [0,1] -> logits `[B,K]`, in eval mode during the call. data: an `ImageSet`. attacks: list of (Attack, ThreatModel).
    surface: what the attacker differentiates and queries, where that is not the model itself. store: keeps finished cells. fingerprint: names what the weights do not show (templates,
    settings of a test-time defense).

    Returns a clean_acc row, then robust_acc and robust_acc_8bit rows for each attack, with their records. Only images
    that are classified correctly when clean are attacked: the attacker may leave an image alone, so the others are lost
    already. Every attacked batch is audited; verdicts come from a fresh forward in full precision.

    Raises UserError on unusable arguments, AuditError on an attack outside its budget, RuntimeError on NaN logits.
    """
    attacks = list(attacks)
    labels = [_label(attack, threat) for attack, threat in attacks]
    cells = [(label, threat.eps_255) for label, (_, threat) in zip(labels, attacks, strict=True)]
    if len(data) == 0 or batch_size < 1:
        raise UserError(f"expected images and batch_size >= 1, got {len(data)} images and batch_size {batch_size}")
    if len(set(cells)) < len(cells):
        raise UserError(f"expected each attack once per ε, got {cells}; give variants different names")
    surface = model if surface is None else surface
    hashes = {"weights_sha256": weights_sha256(model), "data_sha256": data.sha256}
    attacker = "" if surface is model else weights_sha256(surface)
    key = {"method": method, "dataset": data.name, "seed": seed, "n": len(data), "fingerprint": fingerprint}
    key |= hashes | {"surface": attacker}

    total = len(data) * (1 + len(attacks))
    bar = tqdm(total=total, unit="image", leave=False, disable=not progress)
    with eval_mode(model), bar:
        run = _Run(model, surface, data, method, seed, batch_size, bar)
        clean = _finished(store, key | {"attack": "none", "eps_255": 0.0}, bar, run.clean)
        rows = [_row(clean, "clean_acc", "none", 0.0, hashes, {"seed": seed})]
        for label, (attack, threat) in zip(labels, attacks, strict=True):
            described = {"seed": seed, "norm": threat.norm, "source": attack.source, **attack.params}
            described |= {"n_steps": attack.n_steps, "step_255": attack.step_255(threat)}
            cell = _finished(
                store,
                key | described | {"attack": label, "eps_255": threat.eps_255},
                bar,
                lambda attack=attack, threat=threat, label=label: run.attacked(clean.records, attack, threat, label),
            )
            for metric in ("robust_acc", "robust_acc_8bit"):
                rows.append(_row(cell, metric, label, threat.eps_255, hashes, described))
    return rows


def worst_case(rows: Iterable[Row]) -> Row:
    """The accuracy that is left when each image meets the attack that hurts it most.

    rows: of one method, data set, ε and seed; the robust_acc rows among them are combined with AND per image. For a
    deterministic model only: one with random verdicts needs fresh draws for the score.
    """
    rows = [row for row in rows if row.metric == "robust_acc"]
    where = {(row.method, row.dataset, row.eps_255, row.extra["seed"]) for row in rows}
    if len(where) != 1:
        raise UserError(f"expected robust_acc rows of one method, data set, ε and seed, got {sorted(where) or 'none'}")
    tables = [row.records for row in rows]
    margins = np.stack([column(table, "margin") for table in tables])
    hardest = margins.argmin(axis=0)
    picked = {
        name: np.choose(hardest, [column(table, name) for table in tables])
        for name in ("prediction", "margin", "prediction_8bit", "linf_255")
    }
    correct = {name: _all(column(table, name) for table in tables) for name in ("correct", "correct_8bit")}
    same = {name: column(tables[0], name) for name in ("method", "dataset", "eps_255", "seed", "index", "label")}
    records = records_table(n=rows[0].n, attack="worst", **same, **picked, **correct)
    cost = Cell(
        records,
        sum(row.seconds for row in rows),
        sum(row.image_forwards for row in rows),
        sum(row.image_backwards for row in rows),
    )
    hashes = {"weights_sha256": rows[0].weights_sha256, "data_sha256": rows[0].data_sha256}
    extra = {"seed": rows[0].extra["seed"], "attacks": [row.attack for row in rows]}
    return _row(cost, "robust_acc_worst", "worst", rows[0].eps_255, hashes, extra)


def paired(records_a, records_b, *, seed: int = 0) -> tuple[float, float, float]:
    """`(diff, lo, hi)` of accuracy a - accuracy b over the same images, from the records of two rows."""
    a, b = records_a.sort_by("index"), records_b.sort_by("index")
    for name in ("index", "label"):
        if not np.array_equal(column(a, name), column(b, name)):
            raise UserError(f"expected the same images on both sides, got {len(a)} and {len(b)} with unequal {name}")
    return paired_bootstrap(column(a, "correct"), column(b, "correct"), seed=seed)


def weights_sha256(model: nn.Module) -> str:
    """Hash of all parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def eval_mode(model: nn.Module):
    """Every module in eval mode inside the block, each in its own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


class PassCounter:
    """Counts images sent through a model: `forwards`, and `backwards` of a gradient through its logits."""

    def __init__(self, model: nn.Module):
        self.model, self.forwards, self.backwards = model, 0, 0

    def __enter__(self):
        self._handle = self.model.register_forward_hook(self._count)
        return self

    def __exit__(self, *error):
        self._handle.remove()

    def _count(self, _model, _inputs, logits):
        self.forwards += len(logits)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)

    def _count_backward(self, gradient):
        self.backwards += len(gradient)


@dataclass
class _Run:
    """What stays the same over the cells of one call."""

    model: nn.Module
    surface: nn.Module
    data: ImageSet
    method: str
    seed: int
    batch_size: int
    bar: tqdm

    def clean(self) -> Cell:
        """Classify every image as it is."""
        started = time.perf_counter()
        self._announce("clean")
        prediction, margin = np.empty(len(self.data), dtype=np.int64), np.empty(len(self.data), dtype=np.float32)
        for index in self._batches(np.arange(len(self.data))):
            prediction[index], margin[index] = self._verdict(*self._pixels(index), index)
        with_8bit = {"prediction_8bit": prediction, "linf_255": 0.0}  # the images are 8-bit to begin with
        records = self._records("none", 0.0, prediction=prediction, margin=margin, **with_8bit)
        return Cell(records, time.perf_counter() - started, len(self.data), 0)

    def attacked(self, clean, attack, threat, label: str) -> Cell:
        """Attack the images that are still correct; the others keep their clean, wrong verdict."""
        started = time.perf_counter()
        self._announce(label)
        names = ("prediction", "margin", "prediction_8bit", "linf_255")
        out = {name: column(clean, name).copy() for name in names}
        todo = np.flatnonzero(column(clean, "correct"))
        self.bar.update(len(self.data) - len(todo))
        counter = PassCounter(self.surface)
        for index in self._batches(todo):
            x, y = self._pixels(index)
            # Keyed by image: neither batch size nor what else is attacked changes an image's random start.
            keys = [(self.seed, self.data.name, attack.name, threat.eps_255, int(i)) for i in index]
            with counter:
                x_adv = attack.run(self.surface, x, y, threat, keys)
            audit(x, x_adv, threat)
            out["prediction"][index], out["margin"][index] = self._verdict(x_adv, y, index)
            out["prediction_8bit"][index] = self._verdict(to_8bit(x_adv, x, threat), y, index)[0]
            out["linf_255"][index] = 255 * (x_adv - x).abs().amax(dim=(1, 2, 3)).cpu().numpy()
        records = self._records(label, threat.eps_255, **out)
        return Cell(records, time.perf_counter() - started, counter.forwards, counter.backwards)

    def _announce(self, attack: str):
        self._cell = f"{self.method} · {self.data.name} · {attack}"
        self.bar.set_description(self._cell)

    def _batches(self, index: np.ndarray):
        for start in range(0, len(index), self.batch_size):
            batch = index[start : start + self.batch_size]
            yield batch
            self.bar.update(len(batch))

    def _pixels(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        index = torch.from_numpy(index)
        return self.data.pixels(index).to(device), self.data.labels[index].to(device)

    @torch.no_grad()
    def _verdict(self, x: torch.Tensor, y: torch.Tensor, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.autocast(x.device.type, enabled=False):
            logits = self.model(x)
        if not torch.isfinite(logits).all():
            batch = f"the batch of images {index[0]} to {index[-1]}"
            raise RuntimeError(f"{self._cell}: logits are NaN or infinite on {batch}; check the weights")
        others = logits.scatter(1, y[:, None], -torch.inf)
        margin = logits.gather(1, y[:, None])[:, 0] - others.amax(dim=1)
        return logits.argmax(dim=1).cpu().numpy(), margin.float().cpu().numpy()

    def _records(self, attack: str, eps_255: float, **columns):
        n, label = len(self.data), self.data.labels.numpy()
        columns["correct"] = columns["prediction"] == label
        columns["correct_8bit"] = columns["prediction_8bit"] == label
        cell = {"method": self.method, "dataset": self.data.name, "attack": attack, "eps_255": eps_255}
        return records_table(n=n, **cell, seed=self.seed, index=np.arange(n), label=label, **columns)


def _label(attack, threat) -> str:
    return attack.name if threat.norm == "linf" else f"{threat.norm}-{attack.name}"


def _finished(store: Store | None, key: dict, bar: tqdm, compute) -> Cell:
    cell = store.get(key) if store else None
    if cell:
        bar.update(key["n"])
        return cell
    cell = compute()
    if store:
        store.put(key, cell)
    return cell


def _row(cell: Cell, metric: str, attack: str, eps_255: float, hashes: dict, extra: dict) -> Row:
    correct = column(cell.records, "correct_8bit" if metric == "robust_acc_8bit" else "correct")
    n, hits = len(correct), int(correct.sum())
    method, dataset = (cell.records[name][0].as_py() for name in ("method", "dataset"))
    cost = (cell.seconds, cell.image_forwards, cell.image_backwards)
    number = (metric, n, hits / n, wilson(hits, n))
    return Row(method, dataset, attack, eps_255, *number, *cost, extra=extra, records=cell.records, **hashes)


def _all(verdicts) -> np.ndarray:
    return np.logical_and.reduce(list(verdicts))
