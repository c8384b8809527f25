"""torchattacks 3.5.1 in pixel space, with its traps closed.

A fresh attack object serves one call, the model is wrapped (`_Victim`), and random numbers come from keys
(`_KeyedRandom`). APGD, APGD-T and Square are entered through `attack_single_run`: their outer loops re-seed the global
generator, try every wrong class instead of AutoAttack's nine, and hide what a failed attack found.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..runtime import UserError, generator
from ..threat import ThreatModel

N_TARGETS = 9  # wrong classes that APGD-T and FAB-T try, as in AutoAttack's "standard" version
NORM_NAMES = {"linf": "Linf", "l2": "L2"}


class _KeyedRandom(TorchFunctionMode):
    """Gives the random draws of torchattacks to keys, so that a result depends on neither batch nor order.

    A draw of four dimensions holds one row per image and takes row i from `rows[i]`. Every other draw (where Square
    puts its next square) is shared by the images of a run, whose keys differ in their last entry only.
    """

    def __init__(self, keys):
        super().__init__()
        self.rows = [generator(*key) for key in keys]
        self.shared = generator(*keys[0][:-1], "shared")
        self.paused = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if self.paused or name not in ("rand", "randn", "uniform_", "normal_"):
            return func(*args, **(kwargs or {}))
        if name in ("uniform_", "normal_"):
            for row, g in zip(args[0], self.rows, strict=True):
                row.copy_(getattr(torch.empty(row.shape), name)(*args[1:], generator=g))
            return args[0]
        shape = tuple(args[0])
        if len(shape) != 4:
            return func(shape, generator=self.shared)
        if shape[0] != len(self.rows):
            raise RuntimeError(f"torchattacks drew for {shape[0]} images where {len(self.rows)} are attacked")
        return torch.stack([func(shape[1:], generator=g) for g in self.rows])


class _Victim(nn.Module):
    """The model as torchattacks needs it: a module with a parameter on the right device, float32 logits.

    It raises on NaN: torch.sign(NaN) is 0, so attacks would stand still and a broken model look robust.
    shift: logits start at 0, which changes no margin; CW compares with 0 where it means "any other class".
    """

    def __init__(self, model: nn.Module, device: torch.device, random: _KeyedRandom, shift: bool = False):
        super().__init__()
        self.model, self.random, self.shift = model, random, shift
        self.where = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.random.paused = True  # a randomized model draws its own noise
        try:
            z = self.model(x).float()
        finally:
            self.random.paused = False
        self._require_finite(z)
        if x.requires_grad:
            x.register_hook(self._require_finite)
        return z - z.detach().amin(1, keepdim=True) if self.shift else z

    @staticmethod
    def _require_finite(t: torch.Tensor) -> None:
        if not t.isfinite().all():
            raise RuntimeError("the model's logits or their gradient are NaN or infinite under attack")


def _fgsm(ta, victim, x, y, threat, **_):
    return ta.FGSM(victim, eps=threat.eps)(x, y)


def _fixed_step(cls_name: str):
    def attack(ta, victim, x, y, threat, n_steps, step_share, **_):
        cls = getattr(ta, cls_name + ("L2" if threat.norm == "l2" else ""))
        return cls(victim, eps=threat.eps, alpha=step_share * threat.eps, steps=n_steps)(x, y)

    return attack


def _found(best: torch.Tensor, still_correct: torch.Tensor, adv: torch.Tensor) -> torch.Tensor:
    """The adversarial image where APGD found one, else the iterate with the highest loss."""
    return torch.where(still_correct.bool()[:, None, None, None], best, adv).detach()


def _apgd(loss: str):
    def attack(ta, victim, x, y, threat, n_steps, **_):
        apgd = ta.APGD(victim, norm=NORM_NAMES[threat.norm], eps=threat.eps, steps=n_steps, loss=loss)
        best, still_correct, _, adv = apgd.attack_single_run(x, y)
        return _found(best, still_correct, adv)

    return attack


def _apgd_t(ta, victim, x, y, threat, n_steps, n_classes, **_):
    apgd = ta.APGDT(victim, norm=NORM_NAMES[threat.norm], eps=threat.eps, steps=n_steps, n_classes=n_classes)
    x_adv, left, rows = x.clone(), torch.arange(len(x), device=x.device), victim.random.rows
    for rank in range(2, 2 + min(N_TARGETS, n_classes - 1)):  # the class with the rank-th highest logit
        apgd.target_class = rank
        victim.random.rows = [rows[i] for i in left.tolist()]
        best, still_correct, _, adv = apgd.attack_single_run(x[left], y[left])
        x_adv[left] = _found(best if rank == 2 else x_adv[left], still_correct, adv)
        left = left[still_correct.bool()]
        if not len(left):
            break
    return x_adv


def _fab_t(ta, victim, x, y, threat, n_steps, n_classes, **_):
    n_classes = 1 + min(N_TARGETS, n_classes - 1)
    options = {"multi_targeted": True, "steps": n_steps, "n_classes": n_classes}
    fab = ta.FAB(victim, norm=NORM_NAMES[threat.norm], eps=threat.eps, **options)
    return fab(x, y)  # the clean image where its smallest perturbation exceeds the budget


def _square(ta, victim, x, y, threat, n_steps, **_):
    square = ta.Square(victim, norm=NORM_NAMES[threat.norm], eps=threat.eps, n_queries=n_steps)
    square.init_hyperparam(x)
    _, x_adv = square.attack_single_run(x, y)
    return x_adv


def _cw_l2(ta, victim, x, y, threat, n_steps, **_):
    victim.shift = True
    return threat.project(ta.CW(victim, steps=n_steps)(x, y), x)  # CW minimizes the distance and knows no budget


class Method(NamedTuple):
    attack: Callable
    norms: tuple[str, ...]
    least_classes: int = 2
    adaptive: bool = True  # attacks only what is still classified correctly
    alone: tuple[str, ...] = ()  # norms under which the images of a batch would influence each other


BOTH = ("linf", "l2")
METHODS = {
    "fgsm": Method(_fgsm, ("linf",), adaptive=False),
    "bim": Method(_fixed_step("BIM"), ("linf",), adaptive=False),
    "mifgsm": Method(_fixed_step("MIFGSM"), ("linf",), adaptive=False),
    "ta-pgd": Method(_fixed_step("PGD"), BOTH, adaptive=False),
    "cw-l2": Method(_cw_l2, ("l2",), alone=("l2",)),  # stops by the batch's total cost
    "apgd-ce": Method(_apgd("ce"), BOTH),
    "apgd-dlr": Method(_apgd("dlr"), BOTH, least_classes=3),
    "apgd-t": Method(_apgd_t, BOTH, least_classes=4, alone=("l2",)),  # steps all by the first image's step size
    "fab-t": Method(_fab_t, BOTH),
    "square": Method(_square, BOTH, alone=("l2",)),  # draws for a shrinking batch
}


def run(name: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel, keys, **options):
    """Attack `x` [B, 3, H, W] (float32, [0, 1]) with labels `y` [B] by a torchattacks method; x_adv, detached.

    Adaptive methods leave images that are already misclassified as they are. Raises UserError for a dtype, norm or
    number of classes that the method cannot take, RuntimeError if the model returns NaN.
    """
    method = METHODS[name]
    if x.dtype != torch.float32:
        raise UserError(f"{name}: expected float32 images, as torchattacks computes, got {x.dtype}; pass x.float()")
    if threat.norm not in method.norms:
        known = " or ".join(method.norms)
        raise UserError(f"{name}: expected norm {known}, got {threat.norm}; 'pgd' and 'apgd-ce' attack in both norms")
    with torch.no_grad():
        z = model(x)
    n_classes = z.shape[1]
    if n_classes < method.least_classes:
        mend = "'apgd-ce' and 'square' work with two"
        raise UserError(f"{name}: expected at least {method.least_classes} classes, got {n_classes}; {mend}")

    import torchattacks  # slow to import: only where it attacks

    rows = (z.argmax(1) == y).nonzero()[:, 0] if method.adaptive else torch.arange(len(x), device=x.device)
    x_adv = x.clone()
    for group in rows.split(1 if threat.norm in method.alone else max(len(rows), 1)):
        if not len(group):
            continue
        random = _KeyedRandom([keys[i] for i in group.tolist()])
        victim = _Victim(model, x.device, random)
        with random:
            found = method.attack(torchattacks, victim, x[group], y[group], threat, n_classes=n_classes, **options)
        x_adv[group] = found.detach()
    return x_adv
