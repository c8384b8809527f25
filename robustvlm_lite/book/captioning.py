"""What chapter 08 measures: captions and answers, clean and attacked, as records with the text that was said."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..captioner import Captioner
from ..evaluate import worst_case
from ..records import Cell, Row, column, records_table
from ..runtime import generator, weights_sha256
from ..scenes.duo import KINDS, DuoScenes, ask, sample_duos, slots_right
from ..stats import paired_bootstrap, wilson
from ..text_metrics import CaptionMetrics, Consistency, consistency, paired_corrected
from ..threat import ThreatModel, audit, to_8bit

BATCH = 64

Judge = Callable[[Sequence[str], Sequence[int]], Tensor]  # texts about the images of these indices -> which slots are right [n, k]
Craft = Callable[[Captioner, Tensor, list[str], list[str] | None, list[int]], Tensor]  # model, x, truth, prompt, index -> x_adv


@dataclass(frozen=True)
class TextTask:
    """Images [N, 3, S, S] in [0, 1], the text that is right for each, the question if there is one, and who judges."""

    name: str
    pixels: Tensor
    truth: tuple[str, ...]
    judge: Judge
    prompt: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.truth)

    def batch(self, index: Sequence[int]) -> tuple[Tensor, list[str], list[str] | None]:
        """(pixels, truth, prompt) of some images."""
        return self.pixels[index], [self.truth[i] for i in index], self.prompt and [self.prompt[i] for i in index]


def caption_task(scenes: DuoScenes) -> TextTask:
    """Caption two objects: right if all seven slots are."""

    def judge(texts, index):
        return slots_right(list(texts), [scenes.duos[i] for i in index])

    return TextTask("scenes/duo:captions", scenes.pixels(), tuple(scenes.captions()), judge)


def answer_task(scenes: DuoScenes, seed: int) -> TextTask:
    """Answer one question a scene, half of them yes or no."""
    kinds = [KINDS[i % len(KINDS)] for i in range(len(scenes))]
    questions, answers = zip(*ask(scenes.duos, kinds, generator(seed, "questions")), strict=True)

    def judge(texts, index):
        return torch.tensor([[text == answers[i]] for text, i in zip(texts, index, strict=True)])

    return TextTask("scenes/duo:answers", scenes.pixels(), answers, judge, questions)


def test_scenes(run, n: int) -> DuoScenes:
    """Scenes that nothing was trained or tuned on; the run's seed draws them."""
    return sample_duos(n, generator(run.seed, "chapter 08"))


def measure_texts(run, model: Captioner, task: TextTask, method: str, seed: int, *, attack: str = "none", eps_255: float = 0.0,
                  craft: Craft | None = None, settings: Mapping | None = None) -> Row:  # fmt: skip
    """What `model` says about every image, attacked by `craft` if given; finished cells come from the run's store.

    The row's accuracy is the share of texts that are right in every slot; its records hold the text too. Adversarial
    images are audited, and judged again after rounding to 8 bits. seed: of the training. settings: all that the attack
    depends on.
    """
    extra = {"seed": seed} | dict(settings or {})
    key = {"method": method, "dataset": task.name, "attack": attack, "eps_255": eps_255, "n": len(task), "settings": extra}
    key |= {"weights_sha256": weights_sha256(model), "pixels": float(task.pixels.sum(dtype=torch.float64))}
    cell = run.store.get(key)
    if cell is None:
        cell = _measured(model, task, method, attack, ThreatModel(eps_255) if craft else None, craft, seed)
        run.store.put(key, cell)
    correct = column(cell.records, "correct")
    hits, metric = int(correct.sum()), "clean_acc" if attack == "none" else "robust_acc"
    row = Row(method, task.name, attack, eps_255, metric, len(task), hits / len(task), wilson(hits, len(task)),
              **vars(cell), extra=extra, weights_sha256=key["weights_sha256"])  # fmt: skip
    run.card.add(row)
    return row


def _measured(model, task, method, attack, threat, craft, seed) -> Cell:
    started, found = time.perf_counter(), []
    for part in torch.arange(len(task)).split(BATCH):
        index = part.tolist()
        x, truth, prompt = task.batch(index)
        x_adv, rounded, moved = x, x, torch.zeros(len(x))
        if craft:
            x_adv = craft(model, x, truth, prompt, index)
            audit(x, x_adv, threat)
            rounded, moved = to_8bit(x_adv, x, threat), 255 * (x_adv - x).abs().amax(dim=(1, 2, 3))
        texts = model.generate(x_adv, prompt)
        slots = task.judge(texts, index)
        slots_8bit = task.judge(model.generate(rounded, prompt), index) if craft else slots
        found.append((texts, slots.float().mean(1), slots.all(1), slots_8bit.all(1), moved))
    texts, share, right, right_8bit, moved = zip(*found, strict=True)
    share, right, right_8bit, moved = (torch.cat(v).numpy() for v in (share, right, right_8bit, moved))
    index = np.arange(len(task))
    columns = {"method": method, "dataset": task.name, "attack": attack, "eps_255": threat.eps_255 if threat else 0.0, "seed": seed}
    columns |= {"index": index, "label": index, "linf_255": moved, "correct": right, "correct_8bit": right_8bit}
    # No class is predicted: a right text counts as the image's own number, a wrong one as none, with the share of slots lost.
    columns |= {"prediction": np.where(right, index, -1), "prediction_8bit": np.where(right_8bit, index, -1)}
    records = records_table(n=len(task), margin=np.where(right, 1.0, share - 1.0), **columns)
    said = pa.array([text for part in texts for text in part], type=pa.string())
    return Cell(records.append_column("text", said), time.perf_counter() - started, len(task), 0)


def pooled_difference(a: Sequence[Row], b: Sequence[Row]) -> tuple[float, float, float]:
    """`(diff, lo, hi)` of two methods' shares of right texts, each averaged over training seeds, paired over the images."""
    scores = [np.mean([column(row.records.sort_by("index"), "correct") for row in rows], axis=0) for rows in (a, b)]
    return paired_bootstrap(*scores)


def texts_of(row: Row) -> list[str]:
    """What was said about each image, in the task's order."""
    return row.records["text"].to_pylist()


def worst_of(run, rows: Sequence[Row]) -> tuple[Row, list[str]]:
    """The worst case over attacks of one model and ε, put into the card, and per image the text with the fewest right slots."""
    worst = worst_case(rows)
    run.card.add(worst)
    hardest = np.stack([column(row.records, "margin") for row in rows]).argmin(axis=0)
    texts = [texts_of(row) for row in rows]
    return worst, [texts[k][i] for i, k in enumerate(hardest)]


def text_gains(run, metrics: CaptionMetrics, said: Mapping[str, tuple[list[str], list[str]]], *, base: str, attack: str,
               eps_255: float, dataset: str) -> dict[str, Consistency]:  # fmt: skip
    """Consistency of each method's attacked texts with its own clean ones, and paired gains over `base`, as rows.

    said: method -> (clean texts, attacked texts) of the same images. Rows: METRIC (corrected for the floor), METRIC_raw,
    METRIC_floor, and METRIC_gain, the paired difference of corrected scores to `base` with its bootstrap interval.
    """
    kept = {m: consistency(metrics, attacked, clean, seed=run.seed) for m, (clean, attacked) in said.items()}
    for method, found in kept.items():
        for metric in metrics.names:
            numbers, place = found.row(metric), (method, dataset, attack, eps_255)
            for suffix, value in (("", numbers["corrected"]), ("_raw", numbers["score"]), ("_floor", numbers["floor"])):
                if value != "undefined":
                    add_number(run, place, metric + suffix, value, n=len(found.scores))
            if method != base:
                gain, lo, hi = paired_corrected(found, kept[base], metric, seed=run.seed)
                if not np.isnan([gain, lo, hi]).any():
                    add_number(run, place, f"{metric}_gain", gain, n=len(found.scores), ci95=(min(lo, gain), max(hi, gain)))
    return kept


def add_number(run, place: tuple, metric: str, value: float, *, n: int, ci95=None, **extra) -> Row:
    """A row that is no accuracy: place = (method, data set, attack, ε in 1/255)."""
    value = float(value)
    row = Row(*place, metric, n, value, ci95 or (value, value), extra={"seed": run.seed} | extra)
    run.card.add(row)
    return row

