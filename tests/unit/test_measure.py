"""What a chapter measures inside a run: which images, which checkpoints, what a training step costs."""

import json
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from robustvlm_lite import attention, book, defenses
from robustvlm_lite.attacks import cross_entropy, get_attack, pgd
from robustvlm_lite.book.measure import map_facts
from robustvlm_lite.cards import Card
from robustvlm_lite.clip import load_clip
from robustvlm_lite.data import ImageSet, load
from robustvlm_lite.defenses import Defense
from robustvlm_lite.runtime import UserError
from robustvlm_lite.threat import ThreatModel

ATTACK = partial(pgd, threat=ThreatModel(2), n_steps=2, step_255=2.0, keep="last")
TINY_PLAN = {"steps": 2, "batch": 4, "optimizer": "adamw", "lr": 1e-3, "warmup": 1, "precision": None}


def photos(n=8) -> ImageSet:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=g)
    return ImageSet("toy", images, torch.arange(n) % 3, ("cat", "dog", "star"), ("a {}.",))


def toy_run(clip, tmp_path, **sizes):
    sizes = {"training": TINY_PLAN, "tga": {}, "eps_train": 2.0, "train_live": []} | sizes
    card = Card("04_tga_zsr", "tiny", 0, {})
    parts = {"parameters": {}, "seed": 0, "out": tmp_path, "card": card, "load_clip": lambda: clip}
    return SimpleNamespace(sizes=SimpleNamespace(**sizes), **parts)


@pytest.mark.parametrize(
    "name, split, expected",
    [("photos/web", "test", 5), ("small/cifar10", "train", 5), ("photos/caltech", "train", 60), ("scenes/pair", "train", 60)],
)  # fmt: skip
def test_the_parameter_n_cuts_everything_but_bundled_training_images(name, split, expected):
    asked = []
    run = SimpleNamespace(parameters={"n": 5}, load=lambda *a, **k: asked.append((*a, k["n"])))
    book.images(run, [name, 60], split)
    assert asked == [(name, split, expected)]


@pytest.mark.parametrize("changed", ["data_sha256", "eps_255"])
def test_a_checkpoint_of_another_training_is_refused_by_name(changed, random_clip, tmp_path, monkeypatch):
    images = photos()
    facts = {"data_sha256": [images.sha256], "eps_255": 2.0}

    def bundled(name, clip):
        defense = Defense(clip)
        defense.name, defense.facts = name, facts
        return defense

    monkeypatch.setattr(defenses, "load_defense", bundled)
    run = toy_run(random_clip, tmp_path)
    assert book.defended(run, "TeCoA", [images], ATTACK).name == "TeCoA"
    facts[changed] = "another"
    with pytest.raises(UserError, match=f"TeCoA was trained with another {changed} than this profile's"):
        book.defended(run, "TeCoA", [images], ATTACK)


def test_bundled_checkpoints_fit_the_tiny_profile():
    from robustvlm_lite.runtime import profile

    sizes, clip = profile("04_tga_zsr", "tiny"), load_clip("nano")
    hashes = [load(name, "train", n=n).sha256 for name, n in sizes.train]
    plan = defenses.Training(**sizes.training)
    plan = json.loads(json.dumps({**asdict(plan), "precision": str(plan.precision)}))
    for name in defenses.METHODS:
        facts = defenses.read_facts(defenses.checkpoint(name, clip.name))
        assert facts["data_sha256"] == hashes and facts["eps_255"] == sizes.eps_train, name
        assert facts["base_sha256"] == clip.weights_sha256 and facts["training"] == plan, name
    assert sizes.tga.items() <= defenses.read_facts(defenses.checkpoint("TGA-ZSR", clip.name))["config"].items()
    assert defenses.search_results(clip.name)["base_sha256"] == clip.weights_sha256, "the search was on other weights"


def test_training_cost_times_every_method_and_keeps_nothing(random_clip, tmp_path):
    run = toy_run(random_clip, tmp_path)
    before = {k: v.clone() for k, v in random_clip.state_dict().items()}
    rows = book.training_cost(run, ["FT-clean", "TeCoA"], [photos()], ATTACK, steps=3)
    assert [(r.method, r.metric, r.n) for r in rows] == [("FT-clean", "train_s", 2), ("TeCoA", "train_s", 2)]
    assert all(r.ci95[0] <= r.value <= r.ci95[1] and r.value > 0 for r in rows)
    # Two images a step. The last iterate of a two-step attack takes two passes each way, the training step one more.
    assert [(r.image_forwards, r.image_backwards) for r in rows] == [(2, 2), (6, 6)]
    assert all(torch.equal(v, before[k]) for k, v in random_clip.state_dict().items())
    assert len(run.card.as_dict()["rows"]) == 2 and not any(tmp_path.iterdir())


def test_seconds_are_taken_in_turns_and_the_first_round_does_not_count(random_clip, tmp_path, monkeypatch):
    run, clock, calls = toy_run(random_clip, tmp_path), [0.0], []
    run.device = torch.device("cpu")
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        calls.append(name)
        clock[0] += seconds if len(calls) > 2 else 100.0

    functions = {"fast": lambda: work("fast", 1.0), "slow": lambda: work("slow", 3.0)}
    rows = book.measure_seconds(run, "toy", functions, rounds=2, batch=8)
    assert calls == ["fast", "slow"] * 3
    assert [(r.method, r.metric, r.n, r.value, r.extra["batch"]) for r in rows] == [
        ("fast", "train_s", 2, 1.0, 8), ("slow", "train_s", 2, 3.0, 8)]  # fmt: skip
    assert len(run.card.as_dict()["rows"]) == 2


def test_map_facts_against_explicit_upsampling(random_clip, tmp_path):
    images = load("scenes/pair", n=6)
    x_adv = (images.pixels() + 0.02).clamp(0, 1)
    original, defense = random_clip, defenses.build("TeCoA", random_clip)
    with torch.no_grad():
        for p in defense.clip.visual.parameters():
            p.mul_(1.1)
    text = original.text_features(images.class_names, images.templates)[images.labels]

    def picture(clip, x):
        return attention.upsample(attention.text_map(clip.tokens(x), text), 224).flatten(1)

    facts = map_facts(defense, original, images, x_adv)
    attacked = picture(defense.clip, x_adv)
    for name, clip in (("from own clean map", defense.clip), ("from original's map", original)):
        home = picture(clip, images.pixels())
        share = (attacked - home).norm(dim=1) / home.norm(dim=1)
        torch.testing.assert_close(facts[name], share.detach(), rtol=1e-4, atol=1e-6)
    assert set(facts["accuracy"].tolist()) <= {0.0, 1.0} and 0 <= facts["map IoU"].min() <= facts["map IoU"].max() <= 1
    run = toy_run(original, tmp_path)
    rows = book.measure_map_facts(run, "TeCoA", defense, images, x_adv, "noise", 5.0)
    assert {fact: row.value for fact, row in rows.items()} == {fact: pytest.approx(each.mean().item()) for fact, each in facts.items()}
    assert [(r["method"], r["n"]) for r in run.card.as_dict()["rows"]] == [(f"TeCoA: {fact}", 6) for fact in facts]
    same = map_facts(Defense(original), original, replace(images), images.pixels())
    assert not same["from own clean map"].any() and not same["from original's map"].any()


def test_one_pass_of_the_image_tower_serves_every_text(random_clip, tmp_path):
    images, run = photos(), toy_run(random_clip, tmp_path)
    run.device = torch.device("cpu")
    with torch.no_grad():
        whole = random_clip.image_features(images.pixels())
    features = book.batched(run, random_clip.image_features, images, size=3)
    assert torch.allclose(features, whole, atol=1e-5) and not features.requires_grad
    text = random_clip.text_features(images.class_names, images.templates)
    rows = book.measure_logits(run, images, {"a": features @ text.T, "b": features @ text.roll(1, 0).T})
    assert [r.method for r in rows] == ["a", "b"] and rows[0].records is not None
    card = run.card.as_dict()
    assert [r["metric"] for r in card["rows"]] == ["clean_acc"] * 2 and len(run.card.examples) == 2 * len(images)


def test_maps_are_compared_scene_by_scene(random_clip, tmp_path):
    scenes, run = load("scenes/pair", n=12), toy_run(random_clip, tmp_path)
    maps = {"prior": attention.center_prior(8, 12), "limit": attention.mask_map(scenes.masks, 8)}
    prior, limit = book.measure_maps(run, "CLIP", scenes, maps, "none", 0.0, against="prior")
    assert prior.extra["over"] == [0, 0, 0]
    diff, low, high = limit.extra["over"]
    assert diff == pytest.approx(limit.value - prior.value) and 0 < low < diff < high
    run.card.write(tmp_path)
    plain = book.measure_maps(toy_run(random_clip, tmp_path), "CLIP", scenes, maps, "none", 0.0)
    assert all("over" not in r.extra for r in plain)


def test_equal_force_gains_belong_to_the_bundled_nano():
    """`benchmarks/metric_force.py` measures them; here once more, on maps upsampled to pictures."""
    clip, images = load_clip("nano"), load("photos/caltech", "train", n=256)
    model, x, y = clip.classifier(images.class_names, images.templates), images.pixels(), images.labels
    threat, steps = ThreatModel(2.0), {"n_steps": 2, "step_255": 2.0, "start": "zero", "keep": "last"}
    x_adv = pgd(cross_entropy(model, y), x, threat, **steps)
    with torch.no_grad():
        clean, own = (attention.text_map(clip.tokens(v), model.text_features[y]).view(-1, 1, 8, 8) for v in (x, x_adv))

    def pull(distance):
        moved = own.clone().requires_grad_()
        pictures = (F.interpolate(m, size=(224, 224), mode="bilinear").flatten(1) for m in (moved, clean))
        return torch.autograd.grad(distance(*pictures).sum(), moved)[0].flatten(1).norm(dim=1).mean().item()

    l2 = pull(lambda a, b: (a - b).norm(dim=1))
    assert l2 / pull(lambda a, b: (a - b).abs().mean(1)) == pytest.approx(defenses.GAIN_L1, rel=0.01)
    cosine = pull(lambda a, b: 1 - F.cosine_similarity(a, b))
    assert l2 / cosine == pytest.approx(defenses.GAIN_COSINE, rel=0.01)


def test_images_made_elsewhere_become_a_row_of_the_card(random_clip, tmp_path):
    data, run = photos(), toy_run(random_clip, tmp_path)
    run.device = torch.device("cpu")
    model = random_clip.classifier(data.class_names, data.templates)
    x_adv = (data.pixels() + 0.01).clamp(0, 1)
    row = book.measure_images(run, "toy ← other", model, data, x_adv, "pgd-20", 2.0)
    with torch.no_grad():
        right = model(x_adv).argmax(1) == data.labels
    assert row.value == pytest.approx(right.float().mean().item()) and row.metric == "robust_acc"
    assert [r["method"] for r in run.card.as_dict()["rows"]] == ["toy ← other"]
    assert row.records["linf_255"].to_numpy() == pytest.approx([2.55] * len(data), abs=0.01)


def test_all_images_made_elsewhere_can_meet_one_draw(random_clip, tmp_path):
    """A model that draws at each call must see all images at once where attack and verdict share the draw."""
    run, data, sizes = toy_run(random_clip, tmp_path), photos(200), []

    class Counting(torch.nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return F.one_hot(torch.zeros(len(x), dtype=torch.int64), 3).float()

    run.device = torch.device("cpu")
    for batch in ({}, {"batch": 200}):
        row = book.measure_images(run, f"counting {batch}", Counting(), data, data.pixels(), "pgd-2", 2.0, **batch)
        assert row.n == 200 and row.value == pytest.approx((data.labels == 0).float().mean().item())
    assert sizes == [128, 72, 200]


def test_a_model_by_itself_is_measured_as_its_defense_is(random_clip, tmp_path):
    """The verdict is the model's, the gradient that of the surface: a surface that points the other way does nothing."""
    data = photos()
    model = random_clip.classifier(data.class_names, data.templates)
    data = replace(data, labels=model(data.pixels()).argmax(1))  # every image is right at first
    plan, runs = [(get_attack("pgd-2"), ThreatModel(8))], [toy_run(random_clip, tmp_path) for _ in range(3)]
    for run in runs:
        run.store = None
    whole = book.measure(runs[0], Defense(random_clip), data, plan)
    alone = book.measure_model(runs[1], "toy", model, model.fast(), data, plan)
    misled = book.measure_model(runs[2], "toy", model, torch.nn.Sequential(model, Negated()), data, plan)
    assert [r.value for r in alone] == [r.value for r in whole] and alone[0].value == 1
    assert misled[1].value == 1 > alone[1].value
    assert [r["method"] for r in runs[1].card.as_dict()["rows"]] == ["toy"] * 3


class Negated(torch.nn.Module):
    def forward(self, logits):
        return -logits


def test_a_committed_checkpoint_judges_images_of_its_size_and_larger_ones():
    data, run = photos(), SimpleNamespace(device=torch.device("cpu"))
    judge, surface = book.nano_checkpoint(run, "TeCoA", data)
    classifier = defenses.load_defense("TeCoA", load_clip("nano")).classifier(data.class_names, data.templates)
    x = data.pixels()
    large = F.interpolate(x, scale_factor=3, mode="nearest")
    with torch.no_grad():
        assert torch.equal(judge(x), classifier(x))
        blocks = large.unfold(2, 3, 3).unfold(3, 3, 3).mean((-1, -2))  # nearest up, mean down: the image again
        assert torch.allclose(blocks, x, atol=1e-6)
        soft = F.interpolate(large, size=(64, 64), mode="bilinear", antialias=True)
        assert torch.allclose(judge(large), classifier(soft), atol=1e-4)
    wide = large.requires_grad_()
    (grad,) = torch.autograd.grad(surface(wide).sum(), wide)
    assert grad.shape == large.shape and grad.abs().sum() > 0, "an attacker's gradient passes through the shrinking"
