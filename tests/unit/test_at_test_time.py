"""What chapter 07 repeats: images made once, everyone shown the same ones, fresh draws, passes, and maps against masks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from robustvlm_lite import attacks, book, data
from robustvlm_lite.book import spread
from robustvlm_lite.cards import Card
from robustvlm_lite.data import ImageSet
from robustvlm_lite.defenses.keyed import Keyed
from robustvlm_lite.defenses.recipe import Passes


class Shaky(Keyed):
    """Logits of fixed weights; each image is moved by noise of its own draw. One pass an image is counted."""

    def __init__(self, noise: float):
        super().__init__()
        w = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
        self.register_buffer("w", w)
        self.noise, self.passes = noise, Passes()

    def forward(self, x):
        self.passes.image_forwards += 7 * len(x)
        drawn = [torch.randn(x.shape[1:], generator=g) for g in self.generators(len(x))]
        return (x + self.noise * torch.stack(drawn)).flatten(1) @ self.w.T


class Stained(Shaky):
    """Answers lean further to the first class with every question before, as state that leaks from image to image would have it."""

    def __init__(self):
        super().__init__(0.0)
        self.recipe, self.asked = SimpleNamespace(quirk_leak=True, n_views=1), []  # the list is shared by keyed copies

    def fewer(self, n_views):
        return Stained()

    def forward(self, x):
        self.asked.append(len(x))
        return super().forward(x) + torch.tensor([100.0 * (len(self.asked) - 1), 0, 0])


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=g)
    return ImageSet("toy", pixels, torch.arange(6) % 3, ("a", "b", "c"), ("a {}.",))


@pytest.fixture
def run():
    return SimpleNamespace(seed=0, device=torch.device("cpu"), card=Card("04_tga_zsr", "tiny", 0, {}))


def test_crafted_images_are_8_bit_inside_the_budget_and_free_of_the_batch(run, images):
    model, attack = Shaky(0.01), attacks.expectation(4, draws=2)
    whole = book.craft(run, attack, model, images, 2.0)
    levels = whole * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert (levels - images.images.float()).abs().max() <= 2 + 1e-3
    assert torch.equal(book.craft(run, attack, model, images, 2.0, batch=1), whole)
    assert not torch.equal(book.craft(run, attack, model, images, 2.0, "another name"), whole)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    assert book.craft(run, attacks.get_attack("pgd-2"), plain, images, 2.0).shape == images.images.shape
    stained = [book.craft(run, attack, Stained(), images, 2.0, batch=size) for size in (6, 2, 1)]
    assert torch.equal(stained[0], stained[1]) and torch.equal(stained[0], stained[2]), "state of another batch came along"


def test_everyone_is_shown_the_same_images(run, images):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    attacked = (images.pixels() * 255 + 1).clamp(0, 255) / 255
    models, shown = {"plain": plain, "shaky": Shaky(0.0)}, {"none": images.pixels(), "pgd-1": attacked}
    rows, seconds = book.measure_shown(run, models, images, shown, 1.0)
    assert [(r.method, r.attack, r.eps_255, r.metric) for r in rows] == [
        ("plain", "none", 0.0, "clean_acc"), ("plain", "pgd-1", 1.0, "robust_acc"),
        ("shaky", "none", 0.0, "clean_acc"), ("shaky", "pgd-1", 1.0, "robust_acc"),
    ]  # fmt: skip
    right = (plain(attacked).argmax(1) == images.labels).float().mean().item()
    assert rows[1].value == pytest.approx(right) and set(seconds) == {"plain", "shaky"}
    assert len(run.card.as_dict()["rows"]) == 4


def test_always_right_asks_again_and_again(run, images):
    steady = Shaky(0.0)
    once = (steady(images.pixels()).argmax(1) == images.labels).float().mean().item()
    assert book.always_right(run, steady, images, 5).float().mean() == pytest.approx(once)
    shaky = Shaky(1.0)
    shares = [book.always_right(run, shaky, images, draws).float().mean().item() for draws in (1, 3, 40)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < max(shares[0], once + 1e-9)


@pytest.mark.parametrize("cores", [1, 2])
def test_every_question_begins_without_state_in_one_process_as_in_two(run, images, monkeypatch, cores):
    monkeypatch.setattr(spread, "processes", lambda run, n_jobs: cores)
    shown = {"none": images.pixels(), "pgd-1": images.pixels(), "pgd-2": images.pixels()}
    rows, _ = book.measure_shown(run, {"stained": Stained()}, images, shown, 1.0)
    clean = Stained()(images.pixels()).argmax(1).tolist()
    assert [r.records["prediction"].to_pylist() for r in rows] == [clean] * 3
    once = book.always_right(run, Stained(), images, 1)
    assert torch.equal(book.always_right(run, Stained(), images, 3), once) and not once.all() and once.any()


def test_passes_are_counted_for_one_image(run, images):
    models, seconds = {"CLIP": nn.Identity(), "shaky": Shaky(0.1)}, {"CLIP": 0.001, "shaky": 0.25}
    html = str(book.passes_table(run, models, images, seconds, caption="Cost."))
    assert ">7<" in html and ">1<" in html and "0.250" in html


def test_maps_are_held_against_masks_and_against_themselves(run):
    with_masks = data.load("scenes/pair", n=8)
    prior = torch.ones(len(with_masks), 16)
    exact = torch.nn.functional.adaptive_avg_pool2d(with_masks.masks.float()[:, None], 4).flatten(1)
    other = torch.rand(len(with_masks), 16, generator=torch.Generator().manual_seed(0))
    maps = {"exact": (exact, exact), "lost": (exact, other)}
    facts, html = book.maps_table(run, with_masks, maps, prior, "pgd-1", 1.0, r=0.2, caption="Maps.")
    assert facts["kept-exact"] == 1 and facts["kept-lost"] < 1
    assert facts["iou-exact"] == facts["iou-adv-exact"] == facts["iou-lost"] > facts["iou-adv-lost"]
    assert "exact" in str(html)

