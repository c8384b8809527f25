"""Scores of captions against references: BLEU, CIDEr, ROUGE-L, METEOR and BERTScore, of a set and of each image.

The first four come from pycocoevalcap, as captioning papers report them; BERTScore from torchmetrics. A metric that cannot run
here says so in one line and stays in the report as skipped (specification of arXiv 2402.03627, section 4.1).
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from ..runtime import UserError, near_miss
from .words import TOKENIZER, words

BLEUS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
METRICS = (*BLEUS, "cider", "rouge_l", "meteor", "bertscore")
PROBE = ("a red circle left of a blue square", "two dogs sleep under an old wooden table")  # no model may call these the same


@dataclass(frozen=True)
class CaptionScores:
    """What the captions of one set of images score.

    corpus: {metric: score of the set}. per_image: {metric: float64 [N]}; CIDEr's with the word weights of the whole set.
    skipped: {metric: why}, of every metric of METRICS that is not in `corpus`.
    hypotheses [N] and references [N][R]: the words that were compared, joined by one space.
    """

    corpus: dict[str, float]
    per_image: dict[str, np.ndarray]
    skipped: dict[str, str]
    hypotheses: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.hypotheses)


class CaptionMetrics:
    """The metrics that run here, made ready once.

    metrics: names of METRICS; None takes all that run here and prints one line for each that does not. A metric that was
    asked for by name and cannot run is a UserError. bert_folder: local folder of a model and its tokenizer for BERTScore.
    """

    def __init__(self, metrics: Sequence[str] | None = None, *, bert_folder: str = "", device: str = "cpu"):
        if metrics is not None and not metrics:
            raise UserError(f"expected at least one metric of {', '.join(METRICS)}, got none")
        if unknown := [name for name in metrics or () if name not in METRICS]:
            raise UserError(f"unknown metric {unknown[0]!r}; {near_miss(unknown[0], METRICS)}")
        self.skipped = {} if metrics is None else {name: "not asked for" for name in METRICS if name not in metrics}
        self._bert_folder, self._device = bert_folder, device
        for name, why in (("meteor", _without_java()), ("bertscore", _without_folder(bert_folder))):
            if why and name not in self.skipped:
                if metrics is not None:
                    raise UserError(why)
                print(f"{name} skipped: {why}")
                self.skipped[name] = why
        self.names = tuple(name for name in METRICS if name not in self.skipped)
        if "bertscore" in self.names:
            self._check_bert()

    @property
    def settings(self) -> dict[str, str]:
        """What a card has to say about the scores: libraries, word split, and the model behind BERTScore."""
        stated = {"tokenizer": TOKENIZER, "pycocoevalcap": metadata.version("pycocoevalcap")}
        if "bertscore" in self.names:
            stated |= {"torchmetrics": metadata.version("torchmetrics"), "bertscore_model": Path(self._bert_folder).name}
        return stated

    def score(self, hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> CaptionScores:
        """Scores of one caption an image against one reference or several.

        Raises UserError for lists of different length, an image without a reference, a reference without a word, and for
        CIDEr on fewer than two images. A hypothesis without a word scores 0.
        """
        said, known = _compared(hypotheses, references)
        if "cider" in self.names and len(said) < 2:
            raise UserError("expected at least 2 images for CIDEr, got 1: no word is rarer than another; add images or leave cider out")
        corpus, per_image = {}, {}
        gts, res = dict(enumerate(map(list, known))), {i: [text] for i, text in enumerate(said)}
        for names, run in ((BLEUS, _bleu), (("cider",), _cider), (("rouge_l",), _rouge), (("meteor",), self._meteor)):
            if set(names) & set(self.names):
                for name, total, each in zip(names, *run(gts, res), strict=True):
                    corpus[name], per_image[name] = float(total), np.asarray(each, dtype=float)
        if "bertscore" in self.names:
            per_image["bertscore"] = self._bert_f1(said, known)
            corpus["bertscore"] = float(per_image["bertscore"].mean())
        kept = [name for name in METRICS if name in self.names]
        return CaptionScores({n: corpus[n] for n in kept}, {n: per_image[n] for n in kept}, dict(self.skipped), said, known)

    # ---- METEOR and BERTScore, which take seconds to make ready

    @cached_property
    def _java(self) -> Meteor:
        return Meteor()  # reads its dictionaries once, about 20 s

    def _meteor(self, gts: dict, res: dict):
        java = self._java
        try:
            total, each = java.compute_score(gts, res)
        except (OSError, ValueError) as error:
            with suppress(OSError):  # or its end would stumble over the broken pipe
                java.meteor_p.stdin.close()
            del self._java
            raise UserError(f"expected scores from METEOR's Java program, got {error}; check java, or leave meteor out") from None
        finally:
            if java.lock.locked():  # interrupted while it held the lock that its own end waits for
                java.lock.release()
        return [total], [each]

    @cached_property
    def _bert(self):
        from torchmetrics.text.bert import BERTScore  # a run without it shall not pay for these imports
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(self._bert_folder, local_files_only=True)
            return BERTScore(self._bert_folder, model=model, device=self._device, truncation=True, max_length=128)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"expected a model and its tokenizer in {self._bert_folder}, got: {reason}; check bert_folder") from None

    def _bert_f1(self, said: Sequence[str], known: Sequence[Sequence[str]]) -> np.ndarray:
        """F1 of each image, the best over its references; float64 [N]. A caption without a word scores 0."""
        return np.array([max(self._bert_pair(text, reference) for reference in row) for text, row in zip(said, known, strict=True)])

    def _bert_pair(self, text: str, reference: str) -> float:
        """One pair at a time: torchmetrics 1.9 sorts each list by length and sorts it again instead of back, which mixes pairs up."""
        if not text:
            return 0.0
        self._bert.reset()
        self._bert.update([text], [reference])
        return float(self._bert.compute()["f1"])

    def _check_bert(self) -> None:
        """A tokenizer that did not find its words makes every sentence the same row of [UNK], and every score 1."""
        if (score := self._bert_f1(PROBE[:1], [PROBE[1:]])[0]) >= 1 - 1e-4:
            raise UserError(
                f"expected BERTScore below 1 for two different sentences, got {score:.4f} with {self._bert_folder}; "
                "its tokenizer reads no words: load and save it again with its vocabulary"
            )


def _without_java() -> str:
    return "" if shutil.which("java") else "METEOR needs Java; put java on the PATH"


def _without_folder(folder: str) -> str:
    if not folder:
        return "BERTScore needs a model; pass bert_folder, a local folder of a model and its tokenizer"
    return "" if (Path(folder) / "config.json").is_file() else f"BERTScore needs a model, found no config.json in {folder}"


def _compared(hypotheses: Sequence[str], references: Sequence) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    if len(hypotheses) != len(references) or not len(hypotheses):
        raise UserError(f"expected references for each caption, got {len(hypotheses)} captions and {len(references)} references")
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    known = tuple(tuple(" ".join(words(text)) for text in row) for row in rows)
    if (i := next((i for i, row in enumerate(known) if not row or not all(row)), None)) is not None:
        raise UserError(f"expected references with words for image {i}, got {rows[i]}; drop that image")
    return tuple(" ".join(words(text)) for text in hypotheses), known


# ---- pycocoevalcap: each returns (scores of the set, scores of the images), one entry a metric


def _bleu(gts: dict, res: dict):
    return Bleu(4).compute_score(gts, res, verbose=0)


def _cider(gts: dict, res: dict):
    total, each = Cider().compute_score(gts, res)
    return [total], [each]


def _rouge(gts: dict, res: dict):
    total, each = Rouge().compute_score(gts, res)
    return [total], [each]
