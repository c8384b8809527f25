"""Every named attack keeps its promises, and torchattacks' traps stay closed."""

import pytest
import torch
import torchattacks
from toy_net import L2, LINF, Net, batch, keys, predicted

from robustvlm_lite.attacks import get_attack, margin
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.threat import ThreatModel, audit

LINF_ATTACKS = [
    "noise",
    "noise-corner",
    "fgsm",
    "bim-5",
    "mifgsm-5",
    "ta-pgd-5",
    "pgd-5",
    "pgd-5x2",
    "pgd-5-paper",
    "pgd-5-released",
    "cw-5",
    "cw-5-paper",
    "apgd-ce-8",
    "apgd-dlr-8",
    "apgd-t-8",
    "fab-t-8",
    "square-40",
    "autoattack-5",
    "autoattack-5-released",
    "pgd-2+apgd-ce-5",
]
L2_ATTACKS = ["noise", "pgd-5", "ta-pgd-5", "cw-l2-5", "apgd-ce-8", "apgd-t-8", "fab-t-8", "square-40", "autoattack-5"]


@pytest.mark.parametrize("spec, threat", [(s, LINF) for s in LINF_ATTACKS] + [(s, L2) for s in L2_ATTACKS])
def test_every_attack_stays_in_the_budget_and_leaves_the_model_as_it_was(spec, threat):
    model, x = Net(), batch()
    y = predicted(model, x)
    model.train()
    model.norm.eval()  # torchattacks would switch it to train mode
    model.head.bias.grad = torch.ones(6)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stream = torch.random.get_rng_state()
    with torch.no_grad():
        x_adv = get_attack(spec).run(model, x, y, threat, keys(5))
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert model.training and model.drop.training and not model.norm.training
    assert torch.equal(model.head.bias.grad, torch.ones(6)) and model.conv.weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not x_adv.requires_grad and x_adv.dtype == x.dtype
    audit(x, x_adv, threat)
    model.eval()
    objective = margin(model, y)
    changed = (x_adv != x).flatten(1).any(1)
    if spec.startswith("noise"):
        assert changed.all()
    else:
        assert (objective(x_adv) > objective(x)).sum() >= 4 and changed.sum() >= 4


@pytest.mark.parametrize(
    "spec, threat",
    [
        *((spec, ThreatModel(1)) for spec in ("apgd-ce-6", "apgd-t-6", "square-30", "ta-pgd-4", "autoattack-4")),
        *((spec, ThreatModel(20, "l2")) for spec in ("apgd-ce-6", "apgd-t-20", "square-30", "cw-l2-12")),
    ],
)
def test_torchattacks_examples_do_not_influence_each_other(spec, threat):
    """A weak budget keeps some images correct, so that the batch shrinks from component to component."""
    model, x = Net(seed=1), batch(5)
    model.conv.weight.data *= 20  # far from linear, so that the start matters
    y = predicted(model, x)
    attack = get_attack(spec)
    together = attack.run(model, x, y, threat, keys(5))
    alone = torch.cat([attack.run(model, x[i : i + 1], y[i : i + 1], threat, keys(5)[i : i + 1]) for i in range(5)])
    same = (together - alone).abs() < 1e-5
    assert same.float().mean() > 0.999  # a gradient of 1e-9 may change sign with the batch size
    torch.manual_seed(99)
    assert torch.equal(attack.run(model, x, y, threat, keys(5)), together)
    if spec != "cw-l2-12":  # the only one without a random start
        assert not torch.equal(attack.run(model, x, y, threat, keys(5, "other seed")), together)


def test_targeted_apgd_draws_for_the_images_that_are_left(monkeypatch):
    """A stand-in that returns its start and fools the first image at once, the second at the next class."""

    def attack_single_run(self, x, y):
        start = torch.rand(x.shape)
        still_correct = torch.ones(len(x), dtype=torch.bool)
        still_correct[0] = False
        return x, still_correct, None, start

    monkeypatch.setattr(torchattacks.APGDT, "attack_single_run", attack_single_run)
    model, x = Net(), batch(3)
    found = get_attack("apgd-t-2").run(model, x, predicted(model, x), LINF, keys(3))
    for i in range(3):
        g = generator(*keys(3)[i])
        draws = [torch.rand((3, 16, 16), generator=g) for _ in range(i + 1)]
        assert torch.equal(found[i], draws[-1])


def test_adapters_pass_their_settings_on():
    model, x = Net(), batch()
    y, threat = predicted(model, x), ThreatModel(2)
    eps = threat.eps
    theirs = {
        "fgsm": torchattacks.FGSM(model, eps=eps),
        "bim-5": torchattacks.BIM(model, eps=eps, alpha=eps / 4, steps=5),
        "mifgsm-5": torchattacks.MIFGSM(model, eps=eps, alpha=eps / 4, steps=5),
    }
    for spec, attack in theirs.items():
        ours = get_attack(spec).run(model, x, y, threat, keys(5))
        torch.testing.assert_close(ours, attack(x, y), rtol=0, atol=1e-6)
    assert get_attack("fgsm").step_255(threat) == 2 and get_attack("bim-5").step_255(threat) == 0.5


def test_targeted_apgd_tries_every_wrong_class_up_to_nine():
    counts = {}
    for n_classes in (4, 12):
        model, x = Net(n_classes, scale=0.01), batch(1)  # too flat to be fooled by a tiny budget
        model.head.bias.data[0] = 1e4
        forwards = []
        model.register_forward_hook(lambda *_, log=forwards: log.append(None))
        get_attack("apgd-t-3").run(model, x, torch.tensor([0]), ThreatModel(0.01), keys(1))
        counts[n_classes] = len(forwards) - 1  # one to see what is still correct
    assert counts == {4: 3 * 5, 12: 9 * 5}  # clean logits, start, three steps; for three and for nine targets


def test_apgd_returns_what_fools_and_else_its_best_iterate(monkeypatch):
    def attack_single_run(self, x, y):
        assert self.get_logits(x).dtype == torch.float32
        return torch.full_like(x, 0.25), torch.tensor([True, False, True]), None, torch.full_like(x, 0.75)

    class Half(Net):
        def forward(self, x):
            return super().forward(x).half()

    monkeypatch.setattr(torchattacks.APGD, "attack_single_run", attack_single_run)
    model, x = Half(), batch(3)
    found = get_attack("apgd-ce-2").run(model, x, predicted(model, x), LINF, keys(3))
    assert found[:, 0, 0, 0].tolist() == [0.25, 0.75, 0.25]


def test_cw_attacks_images_alone():
    """It stops when the total cost of its batch rises, so a batch would decide how long each image is attacked."""
    model, x = Net(), batch()
    y, sizes = predicted(model, x), []
    model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    get_attack("cw-l2-2").run(model, x, y, L2, keys(5))
    assert sizes[0] == 5 and sizes[1:] == [1] * 10


def test_cw_moves_a_model_whose_logits_are_negative():
    """torchattacks compares the true logit with max(other logits, 0), so negative logits look already fooled."""
    model, x = Net(), batch()
    y = predicted(model, x)
    model.head.bias.data -= 100
    x_adv = get_attack("cw-l2-20").run(model, x, y, ThreatModel(255, "l2"), keys(5))
    assert (predicted(model, x_adv) != y).any()


def test_too_few_classes_are_refused_with_a_mend():
    x = batch(2)
    for spec, n_classes in (("apgd-dlr-3", 2), ("apgd-t-3", 2), ("apgd-t-3", 3), ("autoattack-3-released", 2)):
        model = Net(n_classes)
        model.head.weight.data *= 0.01  # keeps the part before it from fooling everything
        with pytest.raises(UserError, match="expected at least [34] classes.*'apgd-ce' and 'square'"):
            get_attack(spec).run(model, x, predicted(model, x), ThreatModel(0.01), keys(2))
    model = Net(2)
    audit(x, get_attack("apgd-ce-3+square-5").run(model, x, predicted(model, x), LINF, keys(2)), LINF)


def test_adapter_refuses_other_dtypes_and_norms():
    model, x = Net(), batch()
    y = predicted(model, x)
    with pytest.raises(UserError, match="float32.*x.float"):
        get_attack("fgsm").run(model.double(), x.double(), y, LINF, keys(5))
    model.float()
    with pytest.raises(UserError, match="expected norm linf, got l2"):
        get_attack("fgsm").run(model, x, y, L2, keys(5))
    with pytest.raises(UserError, match="expected norm l2, got linf"):
        get_attack("cw-l2-5").run(model, x, y, LINF, keys(5))


class NanLogits(Net):
    """From the second call on: NaN logits for the last image."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        z = super().forward(x)
        return z if self.calls == 1 else torch.cat([z[:-1], z[-1:] * float("nan")])


class NanGradient(Net):
    """Finite logits whose gradient is infinite times zero."""

    def forward(self, x):
        return super().forward(x) + (x - x.detach()).abs().sqrt().mean()


@pytest.mark.parametrize("broken", [NanLogits, NanGradient])
@pytest.mark.parametrize("spec", ["pgd-3", "fgsm", "bim-3", "mifgsm-3", "apgd-ce-3", "apgd-t-3", "fab-t-3", "cw-l2-3"])
def test_a_model_that_returns_nan_does_not_look_robust(broken, spec):
    threat, x = (L2 if spec == "cw-l2-3" else LINF), batch()
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        get_attack(spec).run(broken(), x, predicted(Net(), x), threat, keys(5))


def test_nan_logits_are_noticed_by_an_attack_without_gradients():
    x = batch()
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        get_attack("square-3").run(NanLogits(), x, predicted(Net(), x), LINF, keys(5))


def test_a_random_model_keeps_its_own_noise_and_is_reproducible():
    class Noisy(Net):
        def forward(self, x):
            return super().forward(x + 0.01 * torch.randn(7, 3, 16, 16)[: len(x)] + 0 * torch.rand(1))

    model, x = Noisy(), batch()
    y, tiny = predicted(model, x), ThreatModel(0.1)
    assert (predicted(model, x) == y).any()  # something is left to attack
    for spec in ("pgd-2", "apgd-ce-3", "square-5"):
        torch.manual_seed(1)
        first = get_attack(spec).run(model, x, y, tiny, keys(5))
        torch.manual_seed(2)
        assert not torch.equal(first, x)
        assert torch.equal(get_attack(spec).run(model, x, y, tiny, keys(5)), first)
