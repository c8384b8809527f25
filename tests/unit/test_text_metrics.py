"""Scores of texts against closed forms, hand-counted cases and the libraries' own recomputation."""

import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from robustvlm_lite import stats, text_metrics
from robustvlm_lite.runtime import UserError
from robustvlm_lite.scenes.duo import sample_duos
from robustvlm_lite.text_metrics import (
    METRICS,
    CaptionMetrics,
    consistency,
    corpus_values,
    derangement,
    diversity,
    vqa_accuracy,
    words,
)
from robustvlm_lite.text_metrics.captions import PROBE

PLAIN = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l")
SAID = ["a red circle left of a blue square", "a small dog on a couch"]
KNOWN = ["a small red circle left of a blue square", "a dog is on a couch"]


@pytest.fixture
def plain():
    return CaptionMetrics(PLAIN)


def spoiled(texts, share, seed=0):
    """The texts with a share of their words drawn anew from all of them."""
    rng, known = np.random.default_rng(seed), " ".join(texts).split()
    return [" ".join(str(rng.choice(known)) if rng.random() < share else word for word in text.split()) for text in texts]


@pytest.fixture(scope="module")
def captions():
    return sample_duos(60, torch.Generator().manual_seed(3), size=32).captions()


# ---- captions


def test_a_text_against_itself_and_against_nothing_of_it(plain, capsys):
    same = plain.score(KNOWN, KNOWN)
    assert [same.corpus[m] for m in PLAIN] == pytest.approx([1, 1, 1, 1, 10, 1], abs=1e-8)
    other = plain.score(["zebra runs fast now", "?! 42"], KNOWN)
    assert max(other.corpus.values()) < 1e-3 and other.hypotheses[1] == ""
    assert capsys.readouterr().out == "", "pycocoevalcap prints"


def test_the_known_pair_and_what_can_be_counted_by_hand(plain):
    scores = plain.score(SAID, KNOWN)
    assert scores.corpus["bleu_4"] == pytest.approx(0.6112, abs=5e-5)
    assert scores.corpus["rouge_l"] == pytest.approx(0.8823, abs=5e-5)
    # precision of words times the penalty for brevity
    n_said, n_known = 8 + 6, 9 + 6
    right = 8 + 5  # "small" is not in the second reference
    assert scores.corpus["bleu_1"] == pytest.approx(right / n_said * math.exp(1 - n_known / n_said))
    # longest common subsequences of 8 and 5 words; F with beta 1.2, the mean over both
    f = [(1 + 1.44) * p * r / (r + 1.44 * p) for p, r in ((8 / 8, 8 / 9), (5 / 6, 5 / 6))]
    assert scores.per_image["rouge_l"] == pytest.approx(f) and scores.corpus["rouge_l"] == pytest.approx(sum(f) / 2)


def test_cider_of_two_images_by_the_formula(plain):
    """Vedantam et al. (2015) with D's clipping, written out over dictionaries."""
    known = [["a dog runs", "the dog runs fast"], ["a cat sits on a mat"]]
    said = ["a dog runs runs", "a mat on a cat sits"]

    def grams(text, k):
        return Counter(zip(*(text.split()[i:] for i in range(k)), strict=False))

    expected = []
    for text, row in zip(said, known, strict=True):
        total = 0.0
        for k in range(1, 5):
            held = Counter(g for texts in known for g in set().union(*(grams(t, k) for t in texts)))
            idf = {g: math.log(2) - math.log(n) for g, n in held.items()}
            for reference in row:
                h, r = ({g: n * idf.get(g, math.log(2)) for g, n in grams(t, k).items()} for t in (text, reference))
                norms = math.sqrt(sum(v * v for v in h.values()) * sum(v * v for v in r.values()))
                cosine = sum(min(v, r.get(g, 0)) * r.get(g, 0) for g, v in h.items()) / norms if norms else 0
                apart = len(text.split()) - len(reference.split())
                total += cosine * math.exp(-(apart**2) / (2 * 6**2)) / len(row) / 4
        expected.append(10 * total)
    scores = plain.score(said, known)
    assert scores.per_image["cider"] == pytest.approx(expected) and scores.corpus["cider"] == pytest.approx(np.mean(expected))


def test_punctuation_case_and_digits_do_not_count(plain):
    assert words("It's A dog-house, 2 floors!") == ["it's", "a", "dog", "house", "floors"]
    noisy = plain.score([f"{text.upper()} ." for text in SAID], [[f"{text}!", text] for text in KNOWN])
    assert noisy.corpus == pytest.approx(plain.score(SAID, [[text, text] for text in KNOWN]).corpus)


def test_the_report_names_every_metric_that_did_not_run(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    metrics = CaptionMetrics()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("meteor skipped: METEOR needs Java") and lines[1].startswith("bertscore skipped: ")
    scores = metrics.score(SAID, KNOWN)
    assert set(scores.corpus) | set(scores.skipped) == set(METRICS) and not set(scores.corpus) & set(scores.skipped)
    assert CaptionMetrics(("rouge_l",)).skipped == {name: "not asked for" for name in METRICS if name != "rouge_l"}
    assert metrics.settings["tokenizer"] == "lower case, [a-z']+" and metrics.settings["pycocoevalcap"]


def test_diversity_by_hand():
    rows = diversity(["a dog and a dog", "A dog and a dog!", "a cat", "bird"])
    # bigrams: 4 + 4 + 1 + 0; "a dog" comes twice in each of the first two
    assert rows == pytest.approx({"distinct": 3 / 4, "n_words": (5 + 5 + 2 + 1) / 4, "repeated_bigrams": 2 / 9})
    assert diversity(["one"] * 4) == {"distinct": 1 / 4, "n_words": 1, "repeated_bigrams": 0}


# ---- METEOR and BERTScore


def java(tmp_path, monkeypatch, script):
    path = tmp_path / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_meteor_speaks_with_one_java_program(tmp_path, monkeypatch):
    """A stand-in that answers as METEOR does: a line for SCORE; for EVAL one an image and one of the set."""
    log = tmp_path / "started"
    answers = 'while read -r line; do case "$line" in EVAL*) echo 0.25; echo 0.5; echo 0.4;; *) echo 1 2 3;; esac; done'
    java(tmp_path, monkeypatch, f"echo started >> {log}\n{answers}")
    metrics = CaptionMetrics(("meteor",))
    for _ in range(2):
        scores = metrics.score(SAID, KNOWN)
        assert scores.corpus == {"meteor": 0.4} and scores.per_image["meteor"].tolist() == [0.25, 0.5]
    assert log.read_text().split() == ["started"]


def test_a_java_that_dies_is_one_line_and_no_hang(tmp_path, monkeypatch):
    java(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(UserError, match="expected scores from METEOR's Java program, got .+; check java, or leave meteor out"):
        CaptionMetrics(("meteor",)).score(SAID, KNOWN)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")
def test_meteor_of_the_known_pair():
    metrics = CaptionMetrics(("meteor",))
    assert metrics.score(SAID, KNOWN).corpus["meteor"] == pytest.approx(0.4414, abs=5e-5)
    assert metrics.score(KNOWN, KNOWN).corpus["meteor"] == pytest.approx(1)


def bert(folder, known):
    """A tiny random BERT with a tokenizer that knows these words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known])}
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(ids), initializer_range=1.0, **size)).eval()
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=ids).save_pretrained(folder)
    return model, ids


def test_bertscore_is_the_greedy_matching_of_the_last_layer(tmp_path):
    known = sorted(set(" ".join([*SAID, *KNOWN, *PROBE]).split()))
    model, ids = bert(tmp_path, known)

    def rows(text):  # unit vectors of the words, without [CLS] and [SEP], which weigh nothing
        tokens = torch.tensor([[ids["[CLS]"], *(ids[w] for w in text.split()), ids["[SEP]"]]])
        with torch.no_grad():
            hidden = model(tokens).last_hidden_state[0, 1:-1]
        return hidden / hidden.norm(dim=-1, keepdim=True)

    def f1(said, reference):
        cosine = rows(said) @ rows(reference).T
        p, r = cosine.amax(1).mean().item(), cosine.amax(0).mean().item()
        return 2 * p * r / (p + r)

    metrics = CaptionMetrics(("bertscore",), bert_folder=str(tmp_path))
    pairs = [[KNOWN[0]], [KNOWN[1], SAID[0]]]
    scores = metrics.score(SAID, pairs)
    expected = [max(f1(said, text) for text in row) for said, row in zip(SAID, pairs, strict=True)]
    assert scores.per_image["bertscore"] == pytest.approx(expected, abs=1e-5)
    assert scores.corpus["bertscore"] == pytest.approx(np.mean(expected), abs=1e-5) and max(expected) < 0.999
    assert metrics.score(KNOWN, KNOWN).corpus["bertscore"] == pytest.approx(1, abs=1e-5)
    assert metrics.score(["", KNOWN[1]], KNOWN).per_image["bertscore"] == pytest.approx([0, 1], abs=1e-5)
    assert metrics.settings["bertscore_model"] == tmp_path.name


def test_a_tokenizer_without_words_is_found_out(tmp_path):
    _, _ = bert(tmp_path, [])  # every word is [UNK]; the probe's texts have as many words
    assert len(PROBE[0].split()) == len(PROBE[1].split())
    with pytest.raises(UserError, match="expected BERTScore below 1 for two different sentences, got 1.0"):
        CaptionMetrics(("bertscore",), bert_folder=str(tmp_path))


# ---- resampled images


@pytest.mark.parametrize("metric", PLAIN)
def test_a_resample_scores_what_the_library_scores_on_the_drawn_images(metric, plain, captions):
    n = len(captions)
    said = spoiled(captions, 0.3)
    said[0], said[1] = "", said[1] + " and a small red circle"
    known = [[text, captions[(7 * i + 1) % n]][: 1 + i % 2] for i, text in enumerate(captions)]
    scores = plain.score(said, known)
    values = corpus_values(scores, metric)
    assert values(np.ones((1, n)))[0] == pytest.approx(scores.corpus[metric], abs=1e-9)
    rng = np.random.default_rng(5)
    rows = rng.integers(0, n, (3, n))
    gts = [{k: [" ".join(words(t)) for t in known[i]] for k, i in enumerate(row)} for row in rows]
    res = [{k: [" ".join(words(said[i]))] for k, i in enumerate(row)} for row in rows]
    if metric.startswith("bleu"):
        expected = [Bleu(4).compute_score(g, r, verbose=0)[0][int(metric[-1]) - 1] for g, r in zip(gts, res, strict=True)]
    elif metric == "cider":
        expected = [Cider().compute_score(g, r)[0] for g, r in zip(gts, res, strict=True)]
    else:
        expected = [scores.per_image[metric][row].mean() for row in rows]
    counts = np.stack([np.bincount(row, minlength=n) for row in rows]).astype(float)
    assert values(counts) == pytest.approx(expected, abs=1e-9)
    assert np.ptp(expected) > 1e-3


def test_paired_intervals(plain, captions):
    little, much = (plain.score(spoiled(captions, share), captions) for share in (0.15, 0.5))
    for metric in PLAIN:
        assert text_metrics.paired_corpus_bootstrap(little, little, metric) == (0, 0, 0)
        diff, lo, hi = text_metrics.paired_corpus_bootstrap(little, much, metric, n_resamples=300)
        assert diff == pytest.approx(little.corpus[metric] - much.corpus[metric], abs=1e-9) and 0 < lo < diff < hi
        assert text_metrics.paired_corpus_bootstrap(much, little, metric, n_resamples=300) == pytest.approx((-diff, -hi, -lo))
    means = stats.paired_bootstrap(little.per_image["rouge_l"], much.per_image["rouge_l"])
    ours = text_metrics.paired_corpus_bootstrap(little, much, "rouge_l", n_resamples=10_000, seed=1)
    assert ours == pytest.approx(means, abs=0.005)


# ---- consistency


def test_a_constant_captioner_is_undefined(plain):
    always = consistency(plain, ["a photo of a thing"] * 5, ["a photo of a thing"] * 5)
    for metric in ("rouge_l", "bleu_4"):
        row = always.row(metric)
        assert row["score"] == pytest.approx(1) and row["floor"] == pytest.approx(1) and row["corrected"] == "undefined"
        diff, lo, hi = text_metrics.paired_corrected(always, always, metric, n_resamples=20)
        assert math.isnan(lo) and math.isnan(hi) and not diff > 0 and not lo > 0
    assert always.row("cider")["corrected"] == 0


def test_the_floor_is_the_score_against_another_image(plain, captions):
    other = derangement(len(captions), 4)
    attacked = spoiled(captions, 0.2)
    kept = consistency(plain, attacked, captions, seed=4)
    for metric in PLAIN:
        row, floor = kept.row(metric), plain.score(attacked, [captions[i] for i in other]).corpus[metric]
        assert row["floor"] == pytest.approx(floor) and 0 < row["floor"] < row["score"]
        corrected = row["score"] - floor if metric == "cider" else (row["score"] - floor) / (1 - floor)
        assert row["corrected"] == pytest.approx(corrected)
    assert consistency(plain, captions, captions).row("rouge_l")["corrected"] == pytest.approx(1)
    swapped = consistency(plain, [captions[i] for i in other], captions, seed=4)  # says what another image shows
    assert swapped.floors.corpus["rouge_l"] == pytest.approx(1) and swapped.row("rouge_l")["corrected"] == "undefined"


def test_sameness_raises_the_score_and_not_the_corrected_one(plain, captions):
    """Two captioners lose half of their captions to those of other images; one of them knows but four sentences."""
    few = [captions[i % 4] for i in range(len(captions))]
    hit = range(0, len(captions), 2)
    kept = []
    for clean in (captions, few):
        other = derangement(len(clean), 11)
        attacked = [clean[other[i]] if i in hit else text for i, text in enumerate(clean)]
        kept.append(consistency(plain, attacked, clean))
    varied, same = (c.row("rouge_l") for c in kept)
    assert same["score"] > varied["score"] and same["floor"] > varied["floor"]
    diff, lo, hi = text_metrics.paired_corrected(*kept, "rouge_l", n_resamples=300)
    assert diff == pytest.approx(varied["corrected"] - same["corrected"], abs=1e-9) and lo < 0 < hi


@pytest.mark.parametrize("n", [2, 3, 50])
def test_no_image_meets_its_own_caption(n):
    orders = {tuple(derangement(n, seed)) for seed in range(6)}
    assert all(sorted(order) == list(range(n)) and all(i != j for i, j in enumerate(order)) for order in orders)
    assert len(orders) == {2: 1, 3: 2}.get(n, 6)


# ---- bad input


def scored(*args, metrics=("rouge_l",)):
    return CaptionMetrics(metrics).score(*args)


def kept(attacked, clean):
    return consistency(CaptionMetrics(("rouge_l",)), attacked, clean)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: CaptionMetrics(("rouge",)), "unknown metric 'rouge'; did you mean 'rouge_l'"),
        (lambda: CaptionMetrics(()), "expected at least one metric of bleu_1"),
        (lambda: CaptionMetrics(("meteor",)), "METEOR needs Java; put java on the PATH"),
        (lambda: CaptionMetrics(("bertscore",)), "BERTScore needs a model; pass bert_folder"),
        (lambda: CaptionMetrics(("bertscore",), bert_folder="/nowhere"), "found no config.json in /nowhere"),
        (lambda: scored(["a dog"], ["a dog"], metrics=PLAIN), "expected at least 2 images for CIDEr, got 1"),
        (lambda: scored([], []), "expected references for each caption, got 0 captions"),
        (lambda: scored(["a"], ["a", "b"]), "got 1 captions and 2 references"),
        (lambda: scored(["a", "b"], ["a", "12"]), "expected references with words for image 1"),
        (lambda: scored(["a"], [[]]), "expected references with words for image 0"),
        (lambda: corpus_values(scored(["a"], ["a"]), "cider"), "expected a metric that was scored, got 'cider'"),
        (lambda: kept(["a"], ["a"]), "expected at least 2 images for a floor, got 1"),
        (lambda: kept(["a", "b"], ["a"]), "expected captions of the same images, got 2 attacked and 1"),
        (lambda: diversity([]), "expected at least one text"),
        (lambda: vqa_accuracy(["red"], [["red"] * 9]), "expected 10 people's answers to question 0, got 9"),
        (lambda: vqa_accuracy([], []), "expected one truth an answer, got 0 answers"),
        (lambda: text_metrics.exact_match(["a"], []), "got 1 answers and 0 truths"),
    ],
)
def test_bad_input_is_one_line(call, match, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_scores_of_other_images_are_not_compared(plain, captions):
    a, b = plain.score(captions[:4], captions[:4]), plain.score(captions[:5], captions[:5])
    with pytest.raises(UserError, match="expected scores of the same images, got 4 and 5"):
        text_metrics.paired_corpus_bootstrap(a, b, "rouge_l")
    with pytest.raises(UserError, match="expected at least 2 images and 1 resample"):
        text_metrics.bootstrap_values(lambda counts: counts[:, 0], 1)
