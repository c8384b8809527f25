"""Clean and robust accuracy with per-example records, worst cases and paired differences."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .data.imageset import ImageSet
from .records import Cell, Row, Store, column, records_table
from .runtime import UserError, eval_mode, weights_sha256
from .stats import paired_shares, wilson
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

    model: pixels `[B,3,H,W]` in [0,1] -> logits `[B,K]`, kept in eval mode during the call. One that draws random numbers
    for each image gets the same for the clean and the attacked image, and an attacker others (`for_images`).
    attacks: pairs (Attack, ThreatModel); an l2 attack appears as "l2-" and its name.
    surface: what the attacker queries and differentiates, where that is not the model itself.
    store: keeps finished cells. fingerprint: names what the weights do not show (templates, test-time settings).

    Returns a clean_acc row, then robust_acc and robust_acc_8bit rows for each attack, with their records. Only images
    that are classified correctly when clean are attacked: an attacker may leave an image alone, so the others are lost
    already. Every attacked batch is audited; verdicts come from a fresh forward without autocast.

    Raises UserError on unusable arguments and on NaN logits, AuditError on an attack outside its budget.
    """
    surface = model if surface is None else surface
    plan = [(_label(attack, threat), attack, threat) for attack, threat in attacks]
    _check(data, batch_size, [(label, threat.eps_255) for label, _, threat in plan])
    hashes = {"weights_sha256": weights_sha256(model), "data_sha256": data.sha256}
    key = {"method": method, "dataset": data.name, "n": len(data), "seed": seed, "fingerprint": fingerprint} | hashes
    if surface is not model:
        key["surface_sha256"] = weights_sha256(surface)
    key |= {name: m.settings for name, m in (("model", model), ("surface", surface)) if hasattr(m, "settings")}

    bar = tqdm(total=len(data) * (1 + len(plan)), unit="image", leave=False, disable=not progress)
    with eval_mode(model), bar:
        run = _Run(model, surface, data, method, seed, batch_size, bar)
        clean = run.finish("none", 0.0, store, key, run.clean)
        rows = [_row(clean, "clean_acc", hashes, {"seed": seed})]
        for label, attack, threat in plan:
            steps = {"n_steps": attack.n_steps, "step_255": attack.step_255(threat)}
            extra = {"seed": seed, "norm": threat.norm, "source": attack.source, **attack.params, **steps}
            attacked = partial(run.attacked, clean.records, label, attack, threat)
            cell = run.finish(label, threat.eps_255, store, key | {"settings": extra}, attacked)
            rows += [_row(cell, metric, hashes, extra) for metric in ("robust_acc", "robust_acc_8bit")]
    return rows


def for_images(model: nn.Module, data: ImageSet, index: Iterable[int], seed: int) -> nn.Module:
    """A model that draws random numbers at test time, with its draws fixed by seed, data set and the images' indices.

    So an answer is the same in every batch, and against every attack, whose draws have other keys. Other models as they are.
    """
    if not hasattr(model, "keyed"):
        return model
    return model.keyed([(seed, data.name, "views", int(i)) for i in index])


def clean_row(logits: torch.Tensor, data: ImageSet, *, method: str, seed: int = 0, weights_sha256: str = "") -> Row:
    """The clean_acc row of logits [N, C] of all images of `data`, in their order.

    For what `evaluate` would compute again and again: many lists of classes read the same image features.
    """
    place = {"method": method, "attack": "none", "eps_255": 0.0, "seed": seed}
    return _row_of_logits(logits, data, "clean_acc", weights_sha256, linf_255=0.0, **place)


def images_row(
    logits: torch.Tensor, x_adv: torch.Tensor, data: ImageSet, *, method: str, attack: str, eps_255: float, seed: int = 0,
    weights_sha256: str = "",
) -> Row:  # fmt: skip
    """The row of logits [N, C] that a model gave to `x_adv` [N, 3, H, W], copies of all images of `data`, in their order.

    For images that were made elsewhere: on another model, by another loop, or by an evaluation that a page takes
    apart. Nothing is audited and no budget enforced; the records say how far each image really moved. The metric is
    robust_acc, or clean_acc where `attack` is "none".
    """
    if x_adv.shape != data.images.shape:
        raise UserError(f"expected attacked images {list(data.images.shape)}, got {list(x_adv.shape)}; attack all of them")
    moved = 255 * (x_adv.cpu() - data.pixels()).abs().amax(dim=(1, 2, 3))
    place = {"method": method, "attack": attack, "eps_255": eps_255, "seed": seed}
    metric = "clean_acc" if attack == "none" else "robust_acc"
    return _row_of_logits(logits, data, metric, weights_sha256, linf_255=moved.numpy(), **place)


def _row_of_logits(logits: torch.Tensor, data: ImageSet, metric: str, weights_sha256: str, **columns) -> Row:
    if len(logits) != len(data) or logits.shape[1] <= int(data.labels.max()):
        got = f"{list(logits.shape)} for {len(data)} images with labels up to {int(data.labels.max())}"
        raise UserError(f"expected logits [N, C] of every image of {data.name}, got {got}")
    cell = f"{columns['method']} · {data.name}"
    prediction, margin = _answers(logits, data.labels.to(logits.device), cell, "the images")
    records = _table(
        data, dataset=data.name, prediction=prediction, margin=margin, prediction_8bit=prediction, **columns
    )
    hashes = {"weights_sha256": weights_sha256, "data_sha256": data.sha256}
    return _row(Cell(records, 0.0, len(data), 0), metric, hashes, {"seed": columns["seed"]})


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
    correct = {
        name: np.logical_and.reduce([column(table, name) for table in tables]) for name in ("correct", "correct_8bit")
    }
    same = {name: column(tables[0], name) for name in ("method", "dataset", "eps_255", "seed", "index", "label")}
    price = {name: sum(getattr(row, name) for row in rows) for name in ("seconds", "image_forwards", "image_backwards")}
    cell = Cell(records_table(n=rows[0].n, attack="worst", **same, **picked, **correct), **price)
    hashes = {"weights_sha256": rows[0].weights_sha256, "data_sha256": rows[0].data_sha256}
    extra = {"seed": rows[0].extra["seed"], "attacks": [row.attack for row in rows]}
    return _row(cell, "robust_acc_worst", hashes, extra)


def paired(records_a, records_b) -> tuple[float, float, float]:
    """`(diff, lo, hi)` of accuracy a - accuracy b over the same images, from the records of two rows (`paired_shares`)."""
    a, b = records_a.sort_by("index"), records_b.sort_by("index")
    for name in ("index", "label"):
        if not np.array_equal(column(a, name), column(b, name)):
            raise UserError(f"expected the same images on both sides, got {len(a)} and {len(b)} with unequal {name}")
    return paired_shares(column(a, "correct"), column(b, "correct"))


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

    def finish(self, attack: str, eps_255: float, store: Store | None, key: dict, compute) -> Cell:
        """The finished cell from the store, or computed and kept there."""
        key = key | {"attack": attack, "eps_255": eps_255}
        self.cell = f"{self.method} · {self.data.name} · {'clean' if attack == 'none' else attack}"
        self.bar.set_description(self.cell)
        cell = store.get(key) if store else None
        if cell:
            self.bar.update(len(self.data))
            return cell
        cell = compute()
        if store:
            store.put(key, cell)
        return cell

    def clean(self) -> Cell:
        """Classify every image as it is."""
        started, n = time.perf_counter(), len(self.data)
        prediction, margin = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.float32)
        for index in self._batches(np.arange(n)):
            prediction[index], margin[index] = self._verdict(*self._pixels(index), index)
        with_8bit = {"prediction_8bit": prediction, "linf_255": 0.0}  # the images are 8-bit to begin with
        records = self._records("none", 0.0, prediction=prediction, margin=margin, **with_8bit)
        return Cell(records, time.perf_counter() - started, n, 0)

    def attacked(self, clean, label: str, attack, threat) -> Cell:
        """Attack the images that are still correct; the others keep their clean, wrong verdict."""
        started, counter = time.perf_counter(), PassCounter(self.surface)
        names = ("prediction", "margin", "prediction_8bit", "linf_255")
        out = {name: column(clean, name).copy() for name in names}
        todo = np.flatnonzero(column(clean, "correct"))
        self.bar.update(len(self.data) - len(todo))
        for index in self._batches(todo):
            x, y = self._pixels(index)
            # Keyed by image: neither batch size nor what else is attacked changes an image's random start.
            keys = [(self.seed, self.data.name, attack.name, threat.eps_255, int(i)) for i in index]
            surface = self.surface.streaming(keys) if hasattr(self.surface, "streaming") else self.surface
            with counter:
                x_adv = attack.run(surface, x, y, threat, keys)
            audit(x, x_adv, threat)
            out["prediction"][index], out["margin"][index] = self._verdict(x_adv, y, index)
            out["prediction_8bit"][index] = self._verdict(to_8bit(x_adv, x, threat), y, index)[0]
            out["linf_255"][index] = 255 * (x_adv - x).abs().amax(dim=(1, 2, 3)).cpu().numpy()
        records = self._records(label, threat.eps_255, **out)
        return Cell(records, time.perf_counter() - started, counter.forwards, counter.backwards)

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
            model = for_images(self.model, self.data, index, self.seed)
            return _answers(model(x), y, self.cell, f"the batch of images {index[0]} to {index[-1]}")

    def _records(self, attack: str, eps_255: float, **columns):
        cell = {"method": self.method, "dataset": self.data.name, "attack": attack, "eps_255": eps_255}
        return _table(self.data, **cell, seed=self.seed, **columns)


def _answers(logits: torch.Tensor, y: torch.Tensor, cell: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(prediction, margin) of each image."""
    if not torch.isfinite(logits).all():
        raise UserError(f"{cell}: expected finite logits, got NaN or infinity on {where}; check the weights")
    others = logits.scatter(1, y[:, None], -torch.inf)
    margin = logits.gather(1, y[:, None])[:, 0] - others.amax(dim=1)
    return logits.argmax(dim=1).cpu().numpy(), margin.float().cpu().numpy()


def _table(data: ImageSet, **columns):
    """Records of all images of a data set, with what follows from prediction and label."""
    n, label = len(data), data.labels.numpy()
    columns["correct"] = columns["prediction"] == label
    columns["correct_8bit"] = columns["prediction_8bit"] == label
    return records_table(n=n, index=np.arange(n), label=label, **columns)


def _label(attack, threat) -> str:
    return attack.name if threat.norm == "linf" else f"{threat.norm}-{attack.name}"


def _check(data: ImageSet, batch_size: int, cells: list[tuple[str, float]]) -> None:
    if len(data) == 0 or batch_size < 1:
        raise UserError(f"expected images and batch_size >= 1, got {len(data)} images and batch_size {batch_size}")
    if len(set(cells)) < len(cells):
        raise UserError(f"expected each attack once per ε, got {cells}; give variants different names")


def _row(cell: Cell, metric: str, hashes: dict, extra: dict) -> Row:
    correct = column(cell.records, "correct_8bit" if metric == "robust_acc_8bit" else "correct")
    n, hits = len(correct), int(correct.sum())
    place = {name: cell.records[name][0].as_py() for name in ("method", "dataset", "attack", "eps_255")}
    number = {"metric": metric, "n": n, "value": hits / n, "ci95": wilson(hits, n)}
    return Row(**place, **number, **vars(cell), extra=extra, **hashes)
