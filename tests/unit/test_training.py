"""The loop that fine-tuning defenses share, and the small files in which their towers are kept."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from robustvlm_lite.attacks import pgd
from robustvlm_lite.clip import random_clip as another_clip
from robustvlm_lite.data import ImageSet
from robustvlm_lite.defenses import (
    METHODS,
    FineTuning,
    Training,
    build,
    load_change,
    load_defense,
    read_facts,
    save_change,
)
from robustvlm_lite.defenses.training import collapsed_at
from robustvlm_lite.runtime import UserError
from robustvlm_lite.threat import ThreatModel

NAMES, TEMPLATES = ("cat", "dog", "red star"), ("a photo of a {}.",)
ATTACK = partial(pgd, threat=ThreatModel(2), n_steps=2, step_255=2.0, keep="last")
SHORT = Training(steps=2, batch=4, lr=1e-2, warmup=1, precision=None)


def photos(n=8, name="toy", seed=0) -> ImageSet:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=g)
    return ImageSet(name, images, torch.arange(n) % 3, NAMES, TEMPLATES)


def fit(name, clip, data=None, training=SHORT, attack=ATTACK, **options):
    return build(name, clip).fit(data or photos(), attack=attack, training=training, progress=False, **options)


def weights(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_training_changes_the_image_tower_of_a_copy_and_nothing_else(name, random_clip):
    before = weights(random_clip)
    defense = fit(name, random_clip)
    after = weights(defense.clip)
    assert all(torch.equal(v, before[k]) for k, v in weights(random_clip).items()), "the base is not touched"
    assert all(p.grad is None for p in random_clip.parameters())
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed and all(k.startswith("model.visual.") for k in changed)
    last = {
        k for k in before if "visual" in k and not k.endswith("in_proj_bias")
    }  # keys' bias has no effect on softmax
    assert last <= changed | {"model.visual.proj"} if name == "Vision-guided" else last <= changed
    assert len(defense.history) == 2 and all(math.isfinite(v) for terms in defense.history for v in terms.values())
    assert not defense.clip.training and not any(p.requires_grad for p in defense.clip.parameters())
    assert defense.name == name and min(defense.step_seconds) > 0


def test_methods_that_are_compared_meet_the_same_images_and_starts(random_clip):
    """Without its two terms TGA-ZSR is TeCoA to the last bit; FARE, another method altogether, sees the same batches."""
    seen = {}

    def watched(name, objective, x, **options):
        seen.setdefault(name, []).append(x)
        return ATTACK(objective, x, **options)

    trained = {}
    for name, options in {"TeCoA": {}, "TGA-ZSR": {"alpha": 0.0, "beta": 0.0}, "FARE": {}}.items():
        trained[name] = build(name, random_clip, **options)
        trained[name].fit([photos(), photos(12, "other", 1)], attack=partial(watched, name), training=SHORT, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(seen["TeCoA"], seen["FARE"], strict=True))
    pairs = zip(trained["TeCoA"].clip.parameters(), trained["TGA-ZSR"].clip.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["TGA-ZSR", "TGA-ZSR (released)", "FARE"])
def test_the_training_attack_leaves_parameter_gradients_alone(name, random_clip):
    """The released attack adds to them: without loss scaling its cross-entropy counts three times."""
    defense, seen = build(name, random_clip), []

    def watched(objective, x, **options):
        before = [None if p.grad is None else p.grad.clone() for p in defense.clip.parameters()]
        x_adv = ATTACK(objective, x, **options)
        for p, old in zip(defense.clip.parameters(), before, strict=True):
            assert (p.grad is None) == (old is None) and (old is None or torch.equal(p.grad, old))
        seen.append((sum(old is not None for old in before), (x_adv - x).abs().max().item(), x_adv.requires_grad))
        return x_adv

    defense.fit(photos(), attack=watched, training=SHORT, progress=False)
    assert len(seen) == 2 and seen[0][0] == 0 and not seen[0][2]
    assert all(1 / 255 < distance <= 2 / 255 + 1e-6 for _, distance, _ in seen), "it is an attack"


def test_weights_follow_the_seed_bit_for_bit(random_clip):
    torch.manual_seed(1)
    first = fit("TGA-ZSR", random_clip)
    torch.manual_seed(2)
    again, other = fit("TGA-ZSR", random_clip), fit("TGA-ZSR", random_clip, seed=1)
    own = weights(first.clip)
    assert all(torch.equal(v, own[k]) for k, v in weights(again.clip).items()) and first.history == again.history
    assert not torch.equal(other.clip.visual.conv1.weight, first.clip.visual.conv1.weight)


def test_each_step_attacks_from_a_start_of_its_own(random_clip):
    """The released successor seeds anew inside the loss, so that every batch gets the same start."""
    starts = []

    def watched(objective, x, generators):
        starts.append(torch.rand(4, generator=generators).tolist())
        return x

    for name, seed in (("TeCoA", 0), ("TeCoA", 1), ("FT-adv", 0)):
        fit(name, random_clip, attack=watched, seed=seed)
    assert len({tuple(s) for s in starts}) == 4 and starts[4:] == starts[:2], "by step and seed, not by method"


def test_a_clean_fine_tune_learns(random_clip):
    training = Training(steps=30, batch=6, optimizer="adamw", lr=1e-3, warmup=1, precision=torch.bfloat16)
    defense = fit("FT-clean", random_clip, photos(6), training, attack=None)
    history = [terms["contrastive"] for terms in defense.history]
    assert sum(history[-3:]) < 0.8 * sum(history[:3])


class Probe(FineTuning):
    """A loss whose gradient is 1 in every element of one parameter, so that AdamW moves it by the learning rate."""

    name, attacks_in_training = "probe", False

    def losses(self, batch):
        self.values = [*getattr(self, "values", []), self.clip.visual.class_embedding[0].item()]
        self.batches = [*getattr(self, "batches", []), (batch.task.data.name, tuple(batch.index.tolist()))]
        assert torch.equal(batch.x, batch.task.data.pixels(batch.index)) and batch.x_adv is batch.x
        assert torch.equal(batch.y, batch.task.data.labels[batch.index])
        return {"sum": self.clip.visual.class_embedding.sum()}


def test_learning_rate_warms_up_and_falls_as_a_cosine(random_clip):
    training = Training(steps=60, batch=2, optimizer="adamw", lr=1e-3, warmup=5, precision=None)
    probe = Probe(random_clip).fit(photos(), training=training, progress=False)
    moved = -torch.tensor(probe.values).diff()
    expected = [1e-3 * (1 / 5 + (1 - 1 / 5) * t / 5) for t in range(5)]
    expected += [1e-3 * (1 + math.cos(math.pi * t / 55)) / 2 for t in range(54)]
    assert torch.allclose(moved, torch.tensor(expected), rtol=0.02, atol=2e-6)


def test_sgd_has_momentum(random_clip):
    probe = Probe(random_clip).fit(photos(), training=Training(steps=40, batch=2, lr=1e-3, warmup=1), progress=False)
    moved = -torch.tensor(probe.values).diff()
    assert moved[1] == pytest.approx(1.9e-3, rel=0.02) and moved[2] == pytest.approx(2.71e-3, rel=0.02)


def test_each_epoch_is_a_new_order_and_no_image_comes_twice_in_a_batch(random_clip):
    training = Training(steps=8, batch=4, precision=None)
    probe = Probe(random_clip).fit(photos(), training=training, progress=False)
    epochs = [probe.batches[i][1] + probe.batches[i + 1][1] for i in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and len(set(epochs)) == 4


def test_several_sets_take_turns(random_clip):
    training = Training(steps=4, batch=6, precision=None)
    probe = Probe(random_clip).fit([photos(), photos(4, "few", seed=1)], training=training, progress=False)
    assert [name for name, _ in probe.batches] == ["toy", "few", "toy", "few"]
    assert [len(rows) for _, rows in probe.batches] == [6, 4, 6, 4], "a small set gives what it has"


@pytest.mark.parametrize("name", ["FT-clean", "TeCoA", "FARE", "TGA-ZSR"])
@pytest.mark.parametrize("lr", [1e10, 1e30])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(name, lr, random_clip):
    training = Training(steps=6, batch=4, lr=lr, warmup=1, precision=torch.bfloat16)
    with pytest.raises(UserError, match=f"^{name}: the loss is (nan|inf) at step [1-5]; lower the learning rate$"):
        fit(name, random_clip, training=training)


def test_a_missing_attack_is_refused(random_clip):
    with pytest.raises(UserError, match="^TeCoA trains on adversarial images: expected attack=..., got None"):
        fit("TeCoA", random_clip, attack=None)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"optimizer": "adam"}, "'sgd' or 'adamw', got 'adam'"),
        ({"steps": 0}, "steps >= 1"),
        ({"batch": 1}, "batch >= 2"),
    ]
    + [({"lr": lr}, "lr > 0") for lr in (0, -1, math.nan)],
)
def test_impossible_trainings_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        Training(**options)


# --- checkpoints


@pytest.fixture(scope="module")
def trained(random_clip):
    return fit("TeCoA", random_clip, training=Training(steps=3, batch=4, lr=1e-3, warmup=1, precision=None))


@torch.no_grad()
def test_a_checkpoint_brings_the_tower_back(trained, random_clip, tmp_path):
    path = tmp_path / "deep" / "tecoa.safetensors"
    save_change(trained, random_clip, path, eps_255=2.0, seed=0)
    facts = read_facts(path)
    assert facts | {"method": "TeCoA", "base": "nano", "base_sha256": "random-0", "eps_255": 2.0, "seed": 0} == facts
    loaded = load_defense(str(path), random_clip)
    assert loaded.name == "TeCoA" and loaded.clip is not random_clip
    x = photos().pixels()
    clean, ours, kept = (
        d.classifier(NAMES, TEMPLATES)(x) for d in (load_defense("none", random_clip), trained, loaded)
    )
    assert (ours - clean).abs().max() > 1e-3, "else nothing was stored"
    assert (kept - ours).abs().max() < 0.02 * (ours - clean).abs().max()
    error, half = 0.0, 0.0
    for own, back in zip(trained.clip.visual.parameters(), loaded.clip.visual.parameters(), strict=True):
        error += (back - own).square().sum()
        half += (own.half().float() - own).square().sum()
    assert error < half, "more exact than half precision"
    assert path.stat().st_size < 0.6 * 2 * sum(p.numel() for p in trained.clip.visual.parameters())


def test_a_checkpoint_of_an_untrained_defense_is_its_base(random_clip, tmp_path):
    save_change(build("FARE", random_clip), random_clip, tmp_path / "f.safetensors")
    loaded = load_defense(str(tmp_path / "f.safetensors"), random_clip)
    assert all(torch.equal(a, b) for a, b in zip(loaded.clip.parameters(), random_clip.parameters(), strict=True))


def test_another_base_is_refused(trained, random_clip, tmp_path):
    save_change(trained, random_clip, tmp_path / "t.safetensors")
    with pytest.raises(
        UserError, match=r"expected t.safetensors on the weights it was trained from \(nano\), got nano"
    ):
        load_defense(str(tmp_path / "t.safetensors"), another_clip("nano", seed=1))


@pytest.mark.parametrize("tensor", ["", ".scale"])
@pytest.mark.parametrize("harm", ["none", "longer"])
def test_a_checkpoint_with_a_bad_tensor_is_refused_and_no_weight_moves(tensor, harm, trained, random_clip, tmp_path):
    path = tmp_path / "t.safetensors"
    save_change(trained, random_clip, path)
    tensors, facts = load_file(path), {"facts": json.dumps(read_facts(path))}
    name = list(random_clip.visual.state_dict())[-1] + tensor
    whole = tensors.pop(name)
    if harm == "longer":
        tensors[name] = torch.cat([whole, whole[:1]])
    save_file(tensors, path, metadata=facts)
    defense = build("TeCoA", random_clip)
    wanted = rf"expected in t.safetensors a tensor {name} of shape .*, got {'none' if harm == 'none' else '.*'}; make"
    with pytest.raises(UserError, match=wanted):
        load_change(defense, path)
    before = zip(defense.clip.visual.parameters(), random_clip.visual.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in before)


def test_broken_and_foreign_files_are_refused(trained, random_clip, tmp_path):
    save_change(trained, random_clip, tmp_path / "whole.safetensors")
    raw = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "t.safetensors"
    for content in (b"", b"hello", raw[:100], raw[: len(raw) // 2], raw[:-1]):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match="^expected a defense checkpoint at .+, got a file that does not load[^\n]+$"
        ):
            load_defense(str(path), random_clip)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="expected a defense checkpoint"):
        load_defense(str(path), random_clip)
    with pytest.raises(UserError, match="found none; check the path"):
        load_defense(str(tmp_path / "nowhere.safetensors"), random_clip)


def test_a_method_without_a_checkpoint_for_these_weights_is_refused(random_clip):
    base = copy.copy(random_clip)
    base.name = "mine"
    with pytest.raises(UserError, match="no bundled checkpoint of 'TeCoA' for mine"):
        load_defense("TeCoA", base)


def test_a_defense_is_attacked_through_itself(trained):
    surface = trained.attack_surface(trained.classifier(NAMES, TEMPLATES))
    x = photos(2).pixels().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(surface(x), torch.tensor([0, 1])), x)
    assert surface.clip is trained.clip and grad.abs().sum() > 0


CHANCE = math.log(10)  # of ten classes: 2.30
COLLAPSE = {  # (clean cross-entropy, adversarial term) of each step, window -> the step by which it has collapsed
    "EuroSAT, as reported": ([(2.0, 0.3)] * 5 + [(2.28, 0.0)] * 60, 50, 54),
    "one step short": ([(2.28, 0.0)] * 49, 50, None),
    "interrupted": ([(2.28, 0.0)] * 30 + [(2.28, 2e-3)] + [(2.28, 0.0)] * 49, 50, None),
    "at chance, but attacks still change it": ([(CHANCE, 1e-3)] * 60, 50, None),
    "nothing to attack, but it has learned": ([(0.94 * CHANCE, 0.0)] * 60, 50, None),
    "worse than chance": ([(1.06 * CHANCE, 0.0)] * 60, 50, None),
    "edges of the band": ([(0.951 * CHANCE, 0.0), (1.049 * CHANCE, 9e-4)], 2, 1),
    "not a number": ([(math.nan, 0.0)] * 60, 50, None),
    "no steps": ([], 50, None),
}


@pytest.mark.parametrize("name", COLLAPSE)
def test_a_collapsed_run_is_noticed(name):
    steps, window, expected = COLLAPSE[name]
    natural, adversarial = [s[0] for s in steps], [s[1] for s in steps]
    assert collapsed_at(natural, adversarial, 10, window) == expected


@pytest.mark.parametrize("arguments", [([1.0], [], 10), ([], [], 1), ([], [], 10, 0)])
def test_terms_that_cannot_tell_a_collapse_are_refused(arguments):
    with pytest.raises(UserError, match="^expected two terms of equally many steps[^\n]+$"):
        collapsed_at(*arguments)
