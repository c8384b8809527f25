"""Fine-tuning of captioners: a toy against the same steps written out in plain PyTorch, a real one to the bit."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustvlm_lite.captioner import Captioner, cross_entropy, new_captioner
from robustvlm_lite.defenses.caption_tuning import TextData, finetune, learned, load_tuned, save_tuned
from robustvlm_lite.defenses.prsl import PrslConfig
from robustvlm_lite.defenses.token_losses import LabelSmoothing
from robustvlm_lite.defenses.training import Training
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.scenes.duo import sample_duos

SHORT = Training(steps=20, batch=4, optimizer="adamw", lr=1e-2, warmup=2, precision=None)
N = 64


class Toy(Captioner):
    """Writes numbers: each digit from the same logits, a frozen layer and dropout below the head that is trained."""

    def __init__(self):
        layers = {"tower": nn.Linear(12, 8), "drop": nn.Dropout(0.5), "head": nn.Linear(8, 10)}
        super().__init__(nn.ModuleDict(layers), None, 2, (0.5,) * 3, (0.25,) * 3, 4, "toy", "0" * 64)
        for p in self.model.parameters():
            p.data = torch.randn(p.shape, generator=generator("toy", *p.shape))

    def trainable(self):
        return list(self.model["head"].parameters())

    def logits(self, x, targets, prompt=None):
        labels = torch.tensor([[int(c) for c in text] for text in targets])
        hidden = self.model["drop"](torch.tanh(self.model["tower"](self.normalize(x).flatten(1))))
        return self.model["head"](hidden)[:, None].expand(-1, labels.shape[1], -1), labels


@pytest.fixture
def toy():
    return Toy().train()  # as it comes: nothing frozen, dropout on


@pytest.fixture(scope="module")
def numbers():
    """Image i has i as its first pixel, its text and its question."""
    images = torch.randint(256, (N, 3, 2, 2), generator=generator("numbers"), dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(N)
    return TextData(images, [f"{i:02d}" for i in range(N)], [f"{i} ?" for i in range(N)])


class Seen:
    """An attack that keeps what it is given and inverts the images, or leaves them."""

    def __init__(self, inverts=False):
        self.inverts, self.batches = inverts, []

    def __call__(self, model, x, texts, prompt, drawn):
        self.batches.append((x.clone(), list(texts), prompt, torch.rand(1, generator=drawn).item()))
        return 1 - x if self.inverts else x

    def texts(self):
        return [texts for _, texts, _, _ in self.batches]


def by_hand(toy, batches, training, loss):
    """The head after AdamW without decay, gradients of norm 1 at most, a linear rise and half a cosine; and each step's loss."""
    tower, head = (copy.deepcopy(toy.model[k]).requires_grad_(k == "head") for k in ("tower", "head"))
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in head.parameters()}
    history = []
    for k, (x, texts, *_) in enumerate(batches):
        w, rest = training.warmup, training.steps - training.warmup
        lr = training.lr * (1 / w + (1 - 1 / w) * k / w if k < w else (1 + math.cos(math.pi * (k - w) / rest)) / 2)
        z = head(torch.tanh(tower(((x - 0.5) / 0.25).flatten(1))))
        value = loss(z, torch.tensor([[int(c) for c in text] for text in texts]))
        grads = torch.autograd.grad(value, list(head.parameters()))
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        for p, g in zip(head.parameters(), grads, strict=True):
            g = g / max(1, norm)
            m, v = moments[p]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.data -= lr * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        history.append(value.item())
    return head, history


@pytest.mark.parametrize("inverts", [False, True], ids=["clean", "attacked"])
def test_training_is_the_steps_written_out(toy, numbers, inverts):
    seen = Seen(inverts)
    tuned, history = finetune(toy, numbers, cross_entropy, SHORT, attack=seen, progress=False)
    met = [(1 - x if inverts else x, *rest) for x, *rest in seen.batches]

    def each_digit(z, labels):
        return (F.cross_entropy(z, labels[:, 0]) + F.cross_entropy(z, labels[:, 1])) / 2

    head, expected = by_hand(toy, met, SHORT, each_digit)
    assert history == pytest.approx(expected, rel=1e-4) and len(history) == SHORT.steps
    for p, q in zip(tuned.model["head"].parameters(), head.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4) and not p.requires_grad


def test_only_what_the_captioner_names_moves_and_the_base_stays(toy, numbers):
    before = {k: v.clone() for k, v in toy.model.state_dict().items()}
    tuned, _ = finetune(toy, numbers, cross_entropy, SHORT, progress=False)
    moved = {k for k, v in tuned.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"head.weight", "head.bias"} == set(learned(tuned))
    assert all(torch.equal(v, before[k]) for k, v in toy.model.state_dict().items())
    assert toy.training and toy.model["tower"].weight.requires_grad and not tuned.training


def test_image_text_and_question_stay_together(toy, numbers):
    seen = Seen()
    finetune(toy, numbers, cross_entropy, SHORT, attack=seen, progress=False)
    for x, texts, prompt, _ in seen.batches:
        rows = (255 * x[:, 0, 0, 0]).round().int().tolist()
        assert rows == [int(t) for t in texts] and prompt == [f"{i} ?" for i in rows]
    assert len({r for t in seen.texts() for r in t}) > N / 2
    finetune(toy, TextData(numbers.images, numbers.targets), cross_entropy, SHORT, attack=(alone := Seen()), progress=False)
    assert {prompt for _, _, prompt, _ in alone.batches} == {None}


def test_batches_hang_on_the_seed_alone(toy, numbers):
    runs = []
    for loss, inverts, seed in ((cross_entropy, False, 0), (PrslConfig(b=1e-2), True, 0), (LabelSmoothing(0.1), False, 1)):
        torch.manual_seed(len(runs))
        finetune(toy, numbers, loss, SHORT, attack=(seen := Seen(inverts)), seed=seed, progress=False)
        runs.append(seen)
    assert runs[0].texts() == runs[1].texts() != runs[2].texts()
    starts = [[start for *_, start in run.batches] for run in runs]
    assert starts[0] == starts[1] != starts[2] and len(set(starts[0])) == SHORT.steps


# --- a real captioner


@pytest.fixture(scope="module")
def captions():
    scenes = sample_duos(N, generator("tuning"))
    return TextData(scenes.images, scenes.captions())


def test_no_penalty_trains_to_the_same_weights(captions):
    base = new_captioner("tiny-vit-gpt2")
    losses = (cross_entropy, PrslConfig(b=0), PrslConfig(b=1e-3))
    plain, none, some = (finetune(base, captions, loss, SHORT, progress=False)[0].model.state_dict() for loss in losses)
    assert all(torch.equal(plain[k], none[k]) for k in plain)
    assert any(not torch.equal(plain[k], some[k]) for k in plain)


def test_the_released_penalty_evens_out_its_competitors(captions):
    base = new_captioner("tiny-vit-gpt2", seed=1)
    gentle = replace(SHORT, lr=1e-3)

    def apart(model):
        """By how much the penalty lies above its minimum ln N, and the cross-entropy."""
        with torch.no_grad():
            logits, labels = model.logits(captions.images.float() / 255, captions.targets)
        least = math.log(int((labels >= 0).sum()))
        return PrslConfig("token_axis_mean").penalty(logits, labels).item() - least, cross_entropy(logits, labels).item()

    untrained = apart(base)
    plain, even = (apart(finetune(base, captions, PrslConfig(b=b), gentle, progress=False)[0]) for b in (0, 1))
    assert even[0] < 0.3 * plain[0] and max(plain[1], even[1]) < untrained[1] - 0.5


# --- what cannot be trained


def test_a_change_comes_back_on_its_base_alone(toy, numbers, tmp_path):
    tuned, _ = finetune(toy, numbers, cross_entropy, SHORT, progress=False)
    save_tuned(tuned, toy, tmp_path / "toy.safetensors", seed=3)
    loaded, facts = load_tuned(toy, tmp_path / "toy.safetensors")
    change = max((p - q).abs().max() for p, q in zip(tuned.trainable(), toy.trainable(), strict=True))
    for p, q in zip(loaded.trainable(), tuned.trainable(), strict=True):
        assert (p - q).abs().max() <= change / 100  # 8 bits of the change
    assert facts["seed"] == 3
    other = Toy()
    other.weights_sha256 = "1" * 64
    with pytest.raises(UserError, match="on the weights it was trained from"):
        load_tuned(other, tmp_path / "toy.safetensors")


IMAGES = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((IMAGES, ["1"] * 2), "a text for each image, got 3 images and 2 texts"),
        ((IMAGES, ["1"] * 3, ["?"] * 2), "a question for each image, got 3 images and 2 questions"),
        ((IMAGES.float(), ["1"] * 3), "images as uint8, got torch.float32"),
    ],
)
def test_wrong_data_is_one_line(arguments, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        TextData(*arguments)
    assert "\n" not in str(caught.value)


class Frozen(Toy):
    def trainable(self):
        return []


@pytest.mark.parametrize(
    "model, loss, training, complaint",
    [
        (Toy, lambda z, labels, reduction: cross_entropy(z, labels) / 0, SHORT, "the loss is inf at step 0"),
        (Toy, cross_entropy, Training(steps=2, batch=4), "expected precision=None, got torch.bfloat16"),
        (Frozen, cross_entropy, SHORT, "something to train, got no parameters"),
    ],
)
def test_training_that_cannot_work_is_one_line(numbers, model, loss, training, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        finetune(model(), numbers, loss, training, progress=False)
    assert "\n" not in str(caught.value)
