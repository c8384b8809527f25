"""Chapter 08's question whether its attacks are what they seem: gradients, losses over steps, noise, large budgets, precision."""

import copy

import torch

from ..attacks import pgd
from ..attacks.captions import on_texts
from ..attacks.objectives import value_and_grad
from ..captioner import Captioner
from ..runtime import generator
from ..sanity import Check
from ..threat import ThreatModel
from .captioning import TextTask

LARGE_255, SIGNS_MIN, ZERO_MAX, LEFT_MAX = 16.0, 0.95, 0.1, 0.05
FLAT = 0.95  # of the loss at step 5: what later steps may give back, since sign steps bounce at the edge of the ball


def masking_checks(model: Captioner, task: TextTask, eps_255: float, *, n: int = 32, n_steps: int = 20) -> list[Check]:
    """What a masked gradient would fail, on the first n images with the cross-entropy of the truth (specification 3.3, 7)."""
    index = list(range(min(n, len(task))))
    x, truth, prompt = task.batch(index)
    objective, threat = on_texts(model, truth, prompt), ThreatModel(eps_255)

    def right(images) -> float:
        return task.judge(model.generate(images, prompt), index).all(1).float().mean().item()

    def attacked(steps: int, threat=threat, **options) -> torch.Tensor:
        return pgd(objective, x, threat, n_steps=steps, generators=[generator("check", i) for i in index], **options)

    gradient = value_and_grad(objective, x)[1]
    zero = (gradient == 0).float().mean().item()
    exact = copy.deepcopy(model).double()
    wide = value_and_grad(on_texts(exact, truth, prompt), x.double())[1]
    strong = wide.abs() > wide.abs().flatten(1).median(1).values.view(-1, 1, 1, 1)  # by float64: what float32 lost is 0 there
    agree = (wide.sign() == gradient.sign())[strong].float().mean().item()
    # The best iterate of more steps is never worse: only the last one shows whether the attack climbs.
    losses = [objective(v).mean().item() for v in (x, *(attacked(k, start="zero", keep="last") for k in (1, 5, n_steps)))]
    rising = losses[0] < losses[1] < losses[2] and losses[3] >= FLAT * losses[2]
    full = attacked(1, start="zero", step_255=eps_255, keep="last")
    noise, one, many = right(attacked(0, start="corner")), right(full), right(attacked(n_steps))
    large = right(attacked(n_steps, ThreatModel(LARGE_255)))
    shares = {name: f"{100 * value:.0f} %" for name, value in (("noise", noise), ("one", one), ("many", many), ("large", large))}
    rows = (
        ("a gradient reaches the image", zero <= ZERO_MAX, f"{100 * zero:.1f} % of pixels have none; mean size {gradient.abs().mean():.1e}",
         "Where many pixels have an exactly zero gradient, sign steps stand still."),
        ("float32 is exact enough", agree >= SIGNS_MIN, f"{100 * agree:.1f} % of the larger half of signs agree with float64",
         "A sign that rounding decides is no direction."),
        ("more steps, more loss", rising, "loss at steps 0, 1, 5, last: " + ", ".join(f"{v:.2f}" for v in losses),
         "An objective that does not rise was not attacked."),
        ("noise is weaker", noise > many, f"right: {shares['noise']} under random signs, {shares['many']} under PGD-{n_steps}",
         "An attack that random signs equal has found nothing."),
        ("one step is weaker", one >= many, f"right: {shares['one']} after one step of ε, {shares['many']} after {n_steps}",
         "Where one step does more than many, the gradient misleads."),
        ("a large budget wins", large <= LEFT_MAX, f"right at {LARGE_255:g}/255: {shares['large']}",
         "Text that survives this was not attacked."),
    )  # fmt: skip
    return [Check(*row) for row in rows]
