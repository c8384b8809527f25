# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attacks: look for the worst picture within the budget
#
# *A robust accuracy is a claim about all pictures near a picture. An attack looks for one that refutes it. This page
# builds attacks from one line to an ensemble, and measures what each part buys.*
#
# [Colab](https://colab.research.google.com/github/robustvlm-lite/robustvlm_lite/blob/main/notebooks/02_attacks.ipynb) ·
# [source](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/notebooks/02_attacks.py) ·
# [paper](https://arxiv.org/abs/1706.06083) ·
# [result card](https://github.com/robustvlm-lite/robustvlm_lite/tree/main/book/cards) ·
# CPU: 2 minutes (tiny) · GPU: minutes (paper)

# %% [markdown]
# ## At a glance
#
# | | |
# |---|---|
# | Question | is there a picture within ε that the model names wrongly? |
# | The attacker knows | weights and gradients (white box), scores of the classes alone (queries), or another model (transfer) |
# | Tools | FGSM, PGD {cite}`madry2018pgd`, margin and targeted losses, momentum, AutoAttack {cite}`croce2020autoattack`, Square |
# | `paper` profile | OpenAI's CLIP on 64-pixel photographs enlarged to 224; trained models stay `nano`'s, on shrunk ones |
# | Cost | a step is one forward and one backward pass for each image |
# | Found on this page | of {glue:text}`n` photographs the undefended model names {glue:text}`clean:.0f` percent; at ε = {glue:text}`eps`/255 noise leaves {glue:text}`left-noise:.0f`, one step {glue:text}`left-fgsm:.0f`, {glue:text}`pgd-name` {glue:text}`left-pgd:.0f`. A model trained against attacks keeps {glue:text}`hard-pgd:.0f` under {glue:text}`pgd-name` at twice that budget, {glue:text}`hard-worst:.0f` under all attacks together |

# %% tags=["parameters"]
profile: str = "tiny"  # "tiny": laptop, 2 minutes | "small": real image packs | "paper": OpenAI's CLIP, GPU
seed: int = 0  # image subsets and attack starts derive from it
eps_255: float = 0.0  # main attack budget in steps of 1/255; 0 takes the profile's
n: int = 0  # images; 0 takes the profile's number
device: str = ""  # "" chooses; "cuda" without a GPU is an error
data_root: str = ""  # folder of the image packs (small, paper)
pretrained: str = ""  # weights file of the backbone (paper), or a model by name, such as fare2-vit-l-14

# %%
import importlib.util
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn

if importlib.util.find_spec("robustvlm_lite") is None:  # on Colab
    subprocess.run(["git", "clone", "-q", "https://github.com/robustvlm-lite/robustvlm_lite"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--system", "-e", "."]
    subprocess.run(install, cwd="robustvlm_lite", check=True)
    sys.path.insert(0, "robustvlm_lite")

from robustvlm_lite import attacks, book, evaluate, plots, stats
from robustvlm_lite.book import attack_exercises as exercises
from robustvlm_lite.defenses import Defense
from robustvlm_lite.runtime import generator
from robustvlm_lite.threat import ThreatModel, audit, to_8bit

run = book.start("02_attacks", profile=profile, seed=seed, device=device, data_root=data_root, pretrained=pretrained,
                 eps_255=eps_255, n=n)  # fmt: skip
eps_255 = run.parameters["eps_255"]
clip, sizes, threat = run.load_clip(), run.sizes, ThreatModel(eps_255)
same = torch.testing.assert_close

# %% [markdown]
# ## Before you start
#
# You need to know what CLIP's logits are ([chapter 01](01_clip.py)) and what a gradient is. You will be able to write PGD
# in ten lines, to say what a budget allows, and to choose an attack whose failure means something. Reading takes about 30
# minutes.
#
# ## See it first
#
# One photograph, attacked with growing budgets. The upper row is what you see. The lower row is the change alone, amplified by
# the same factor in every column. Below stands what the model says.
#
# Find the first column that you could tell from the original. Then find the first where the answer is wrong.

# %%
photos = book.images(run, sizes.photos)
model = clip.classifier(photos.class_names, photos.templates)
surface = model.fast()  # the same model for gradients, in bfloat16
x, y = photos.pixels().to(run.device), photos.labels.to(run.device)
pgd, keys = attacks.get_attack(sizes.pgd), [(seed, photos.name, i) for i in range(len(photos))]
with torch.no_grad():
    right = model(x).argmax(1) == y
shown = int(right.nonzero()[-1]) if right.any() else 0  # the last that is right

# %%
one, label, budgets = x[[shown]], y[[shown]], sizes.strip
strip = torch.cat([one] + [pgd.run(surface, one, label, ThreatModel(e), [keys[shown]]) for e in budgets])
with torch.no_grad():
    said, sure = model(strip).argmax(1).tolist(), model(strip).softmax(1).amax(1).tolist()
feet = [f"{'✓' if s == label else '✗'} {photos.class_names[s]}\n{100 * p:.0f} %" for s, p in zip(said, sure, strict=True)]
wrong = [e for e, s in zip(budgets, said[1:], strict=True) if s != label]
book.glue("first-wrong", f"ε = {wrong[0]:g}/255" if wrong else "a budget beyond the last")
factor = 0.45 * 255 / max(budgets)
rows = {"picture": strip, f"change × {factor:.0f}": (0.5 + factor * (strip - one)).clamp(0, 1)}
fig = plots.picture_rows(rows, ["clean"] + [f"ε = {e:g}/255" for e in budgets], feet=feet)
book.show(fig, "strip", alt="One photograph clean and attacked with growing budgets, the change drawn below each, and the model's answers",
          caption=f"Photograph {shown} of the subset, the last that the model names correctly; {pgd.label}. ✓ marks the true class.")  # fmt: skip

# %% [markdown]
# For this photograph the answer turns at {glue:text}`first-wrong`.
#
# The budget must be counted in pixels. A file stores 256 gray levels, so 1/255 is one level. The `to_8bit` copy keeps the
# budget on the grid of levels, so a budget below one level leaves an 8-bit picture as it was.

# %%
levels = {e: 255 * (to_8bit(x_adv[None], one, ThreatModel(e)) - one).abs() for e, x_adv in zip(budgets, strip[1:], strict=True)}
book.table([{"ε (1/255)": f"{e:g}", "values changed in the file": f"{100 * (v > 0.5).float().mean():.1f} %",
             "largest change (levels)": f"{v.max():.0f}", "length of the change (ℓ2, in 1/255)": f"{v.norm():.0f}"} for e, v in levels.items()],
           caption="The strip as 8-bit files.")  # fmt: skip

# %% [markdown]
# ## What the attacker may do
#
# A threat model answers three questions.
#
# *What may change?* On this page no channel of a pixel moves by more than ε, written $\|\delta\|_\infty \le \varepsilon$. Another common ball
# bounds the Euclidean length of the whole change (ℓ2). Stickers, rotations or other words are other threats, and nothing here speaks of them.
#
# *What counts as success?* Any wrong answer (untargeted), or one that the attacker chose (targeted).
#
# *What is known?* The white box has what all lines below it have. Queries and transfer cannot be compared: each has what the other lacks, and either
# may find more. Whoever sees labels without scores has less still.
#
# | attacker | has | tools on this page |
# |---|---|---|
# | white box, adaptive | the whole defense with its gradients, and what it does at test time | any objective of one's own |
# | white box | weights and gradients | FGSM, PGD, APGD, FAB; a universal change, one for all images |
# | queries | scores of the classes for pictures of one's choice | Square |
# | transfer | another model | images made there |
# | nothing | the photograph | noise |
#
# In all of them the attacker looks for
#
# $$\max_{\delta}\; L\big(f(x + \delta), y\big) \quad \text{with} \quad \|\delta\| \le \varepsilon, \quad x + \delta \in [0, 1]$$
#
# A robust accuracy is the share of images for which the search fails. So it is worth as much as the search: test a defense
# against the strongest attacker whom it claims to resist.
#
# | symbol | meaning | shape | name in code |
# |---|---|---|---|
# | $x$, $\delta$ | images, pixels in [0, 1]; perturbation | `[B, 3, H, W]` | `x`, `delta` |
# | $\varepsilon$, $\alpha$ | budget and step, written in 1/255 | scalars | `eps_255`, `step_255` |
# | $f(x)$, $z$ | model, its logits | `[B, C]` | `model`, `z` |
# | $L$ | what the attack maximizes, one value for each image | `[B]` | `objective` |
# | $g$ | gradient of $L$ with respect to the pixels | `[B, 3, H, W]` | `grad` |
# | $P$ | back into the budget and into [0, 1] | | `threat.project` |
#
# ## The loss along the gradient
#
# Near $x$ the loss is almost a plane: $L(x + \delta) \approx L(x) + g \cdot \delta$. Among all $\delta$ within
# $\|\delta\|_\infty \le \varepsilon$, the sign of the gradient raises that plane most, by $\varepsilon \|g\|_1$, because each
# pixel adds the size of its own slope. This is the argument of {cite}`goodfellow2015fgsm`.

# %%
objective = attacks.cross_entropy(model, y)
value, grad = attacks.value_and_grad(objective, x)
coins = torch.stack([torch.randint(2, x.shape[1:], generator=generator(*k)) for k in keys]).to(x) * 2 - 1
longest = (grad[0].numel() ** 0.5) * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)
directions = {"sign of the gradient": grad.sign(), "gradient, same length": longest, "random signs": coins}
distances = [sizes.landscape * k / 8 for k in range(9)]


def along(direction):
    """Mean loss over the images at each distance, in steps of 1/255 for each pixel."""
    with torch.no_grad():
        return [objective((x + t / 255 * direction).clamp(0, 1)).mean().item() for t in distances]


# %%
curves = {name: (distances, along(d)) for name, d in directions.items()}
home, slope = value.mean().item(), grad.flatten(1).abs().sum(1).mean().item() / 255
curves["the plane (sign)"] = (distances, [home + t * slope for t in distances])
for name, curve in zip(("rise", "rise-l2", "rise-noise", "rise-plane"), curves.values(), strict=True):
    book.glue(name, curve[1][-1] - home)
fig = plots.convergence(curves, quantity="mean cross-entropy", steps="distance (1/255 for each pixel)")
book.show(fig, "landscape", alt="Mean loss against distance along four curves: the sign of the gradient and the gradient rise steeply and bend, random signs stay flat, the plane rises straight",
          caption=f"Loss along fixed directions, mean of {len(x)} photographs. All directions have the same Euclidean length; the plane is what the slope at zero promises.")  # fmt: skip

# %% [markdown]
# Over {glue:text}`far` gray levels the sign of the gradient raises the loss by {glue:text}`rise:.1f`, random signs of the same size by
# {glue:text}`rise-noise:.2f`. That is the whole difference between an attack and noise.
#
# The plane promised {glue:text}`rise-plane:.1f`. Cross-entropy is flat where the model is sure, and steepens on the way; far
# out it bends. So the slope at $x$ says little of how far one gets: take small steps, and ask again at each.
#
# The gradient itself, stretched to the same Euclidean length, raises the loss by {glue:text}`rise-l2:.1f`. It may, because it
# breaks the budget of single pixels. Which direction is steepest depends on the ball.
#
# ## One step: FGSM


# %%
def my_fgsm(model, x, y, eps):
    """Fast gradient sign method: images [B, 3, H, W] and labels [B] -> x_adv."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)  # of the pixels alone, none for the weights
    return (x + eps * grad.sign()).clamp(0, 1).detach()


book.glue("far", f"{distances[-1]:g}")
few, few_y, few_keys = x[:8], y[:8], keys[:8]
fgsm, undefended = attacks.get_attack("fgsm"), Defense(clip)
reference = fgsm.run(model, few, few_y, threat, few_keys)  # torchattacks
same(my_fgsm(model, few, few_y, threat.eps), reference, rtol=0, atol=1e-6)
one_step = book.measure(run, undefended, photos, [(fgsm, threat)])[1]
book.glue("left-fgsm", 100 * one_step.value)

# %% [markdown]
# It equals torchattacks' FGSM {cite}`kim2020torchattacks`, and one step leaves {glue:text}`left-fgsm:.0f` percent.
#
# ## Many steps: PGD in ten lines
#
# Projected gradient descent {cite}`madry2018pgd` starts anywhere in the ball, steps along the sign, and projects back:
#
# $$x_0 = P(x + \text{start}), \qquad x_{k+1} = P\big(x_k + \alpha\, \mathrm{sign}\, \nabla L(x_k)\big)$$


# %%
def my_pgd(model, x, y, eps, step, n_steps, start):
    """x [B, 3, H, W] in [0, 1], labels y [B]; eps and step in pixel units; start: a perturbation like x."""
    x_adv = (x + start).clamp(0, 1)
    for _ in range(n_steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), y, reduction="sum")  # a sum: no image weakens another's gradient
        (grad,) = torch.autograd.grad(loss, x_adv)
        delta = (x_adv + step * grad.sign() - x).clamp(-eps, eps)
        x_adv = (x + delta).clamp(0, 1)
    return x_adv.detach()


# %%
start = threat.random_start(few, [generator(*k) for k in few_keys])
mine = my_pgd(model, few, few_y, threat.eps, threat.eps / 4, 10, start)
torchs = attacks.get_attack("ta-pgd-10").run(model, few, few_y, threat, few_keys)  # draws the same start from the keys
package = attacks.pgd(attacks.cross_entropy(model, few_y), few, threat, n_steps=10, start=start, keep="last")
differences = {name: float((mine - other).abs().max()) for name, other in {"torchattacks": torchs, "attacks.pgd": package}.items()}
for other in (torchs, package):
    same(mine, other, rtol=0, atol=1e-6)
book.glue("apart", f"{max(differences.values()):.1g}")
print("; ".join(f"{name}: {apart:.1e}" for name, apart in differences.items()))

# %% [markdown]
# Three loops, one result: from the same start the largest difference of any pixel is {glue:text}`apart`. The book's `attacks.pgd` adds
# what the ten lines lack: any objective, restarts, the best iterate, randomness keyed by image, and a stop at NaN.
#
# Every attack's output is then *audited*: an image out of range or budget stops the run.

# %%
print(audit(few, mine, threat))

# %% [markdown]
# ## Another ball: ℓ2
#
# In ℓ∞ every pixel has its own allowance, and an attacker spends all of them. In ℓ2 all share one, and it goes where it
# pays. The step is the gradient at unit length, and the projection shrinks the whole change.
#
# To compare the two, the ℓ2 radius is a share of the longest change that ℓ∞ allows, $\varepsilon \sqrt{3HW}$.

# %%
corner = eps_255 * x[0].numel() ** 0.5
balls = {f"{share:.0%} of the length": ThreatModel(share * corner, "l2") for share in sizes.l2_shares}
linf_rows = book.measure(run, undefended, photos, [(pgd, threat)])
l2_rows = {name: book.measure(run, undefended, photos, [(pgd, ball)])[1] for name, ball in balls.items()}
lines = [{"ball": f"ℓ∞, ε = {eps_255:g}/255", "radius (1/255)": f"{corner:.0f} (corner)", "left (%)": 100 * linf_rows[1].value}]
lines += [{"ball": f"ℓ2, {name}", "radius (1/255)": f"{balls[name].eps_255:.0f}", "left (%)": 100 * r.value} for name, r in l2_rows.items()]
book.table(lines, caption=f"{photos.name}, {pgd.label}, n = {len(photos)}.", formats={"left (%)": ".1f"}, card_link=True)

# %%
ball = balls[f"{sizes.l2_shares[-1]:.0%} of the length"]
pair = [pgd.run(surface, one, label, t, [keys[shown]]) - one for t in (threat, ball)]
drawn = [(0.5 + 0.45 * d / d.abs().max()).clamp(0, 1) for d in pair]
heads = ["image", f"ℓ∞, {eps_255:g}/255", f"ℓ2, {ball.eps_255:.0f}/255"]
book.glue("l2-peak", 255 * float(pair[1].abs().max()))
book.show(plots.picture_rows({"change, stretched": torch.cat([one, *drawn])}, heads), "balls",
          alt="A photograph and two perturbations: the one bounded in the maximum norm has full strength everywhere, the Euclidean one is strong in some places and absent in others",
          caption="The same photograph's change in either ball, each stretched to the same contrast. Gray: no change.")  # fmt: skip

# %% [markdown]
# The ℓ2 change reaches {glue:text}`l2-peak:.1f` levels in single pixels and leaves others alone. The five papers of this book
# use ℓ∞, and so does what follows.
#
# ## What steps and step size buy
#
# Two models answer. The *plain* one is CLIP. The *rippled* one adds a ripple to every pixel first: less than a gray level high, and
# zero at whole gray levels, so that an 8-bit picture passes unchanged, as the cell checks. It defends nothing. It only bends
# the loss, as defenses that hide their gradient do.
#
# It is made against one attack: the ripple is as long as the step ε (or a whole part of it), so such a step lands on
# the same phase, wherever the ball or the pixel range does not cut it short.


# %%
ripple = min(2, eps_255)


def rippled(model, period=ripple, height=2.0):
    """The model behind a ripple of `period` gray levels, 2 or a whole part of it; its slope turns gradients' signs in places."""
    w = 2 * torch.pi * 255 / period
    return lambda x: model(x - height * (w * x).sin() / w)


def right_by_step(source, step_255, n_steps, key="steps"):
    """Is the answer right at each iterate of PGD on `source`? bool [n_steps + 1, B]."""
    seen = []

    def watched(x):
        z = source(x)
        seen.append(z.detach().argmax(1) == y)
        return z

    starts = [generator(*k, key) for k in keys]
    attacks.pgd(attacks.cross_entropy(watched, y), x, threat, n_steps=n_steps, step_255=step_255, generators=starts)
    return torch.stack(seen)


# %%
with torch.no_grad():
    whole = to_8bit(pgd.run(surface, few, few_y, threat, few_keys), few, threat)
    if (2 / ripple).is_integer():  # else the ripple is not zero at every level
        same(rippled(model)(whole), model(whole), rtol=0, atol=0.01)
sources, shares, figs = {"plain": surface, "rippled": rippled(surface)}, {"ε": 1, "ε/4": 4, "ε/16": 16}, []
for kind, source in sources.items():
    by_step = {name: right_by_step(source, eps_255 / k, sizes.n_steps) for name, k in shares.items()}
    curves = {f"step {name}": seen.float().mean(1).tolist() for name, seen in by_step.items()}
    curves["step ε, so far"] = by_step["ε"].cumprod(0).float().mean(1).tolist()
    figs.append(plots.convergence(curves, quantity=f"{kind}: still right (%)", percent=True))
    for name, curve in curves.items():
        book.glue(f"{kind}-{name.removeprefix('step ').replace('/', '-').replace(', so far', '-best')}", 100 * curve[-1])
    book.glue(f"{kind}-returns", int((by_step["ε"][1:] & ~by_step["ε"][:-1]).sum()))

# %%
book.show(figs, "steps", alt="Accuracy falling over attack steps for three step sizes, one panel for the plain model and one for the rippled model, where a large step stays high",
          caption=f"Share of {len(x)} photographs still named correctly at each iterate, ε = {eps_255:g}/255. “So far”: an image is lost once any iterate was wrong.")  # fmt: skip

# %% [markdown]
# On the plain model a step of ε leaves {glue:text}`plain-ε:.0f` percent after {glue:text}`n-steps` steps, ε/4
# {glue:text}`plain-ε-4:.0f`, ε/16 {glue:text}`plain-ε-16:.0f`. A small step needs enough of them: ε/α to get from
# the middle of the ball to its surface.
#
# On the rippled model the three leave {glue:text}`rippled-ε:.0f`, {glue:text}`rippled-ε-4:.0f` and
# {glue:text}`rippled-ε-16:.0f`. What it keeps above the plain model is no robustness: to both, every 8-bit picture is the same.
#
# *The best iterate.* With a step of ε the rippled model returns from wrong to right {glue:text}`rippled-returns` times. The last iterate leaves
# {glue:text}`rippled-ε:.0f` percent, the worst so far {glue:text}`rippled-ε-best:.0f`. Keeping the best costs one more forward pass.
#
# Steps have paid for themselves where a curve has gone flat. A curve that still falls is an unfinished attack, and a number read off
# it is the attacker's patience.
#
# *Restarts* begin again from another random point. Here the same number of gradients is spent twice: as restarts of three steps,
# and as one long run.

# %%
short, figs = 3, []
spent = [short * (r + 1) for r in range(sizes.restarts)]
for kind, source in sources.items():
    tries = [right_by_step(source, eps_255 / 4, short, key=("restart", r)) for r in range(sizes.restarts)]
    kept = torch.stack([seen.all(0) for seen in tries]).cumprod(0).bool()
    long_run = right_by_step(source, eps_255 / 4, spent[-1]).cumprod(0).bool()
    restarted, single = kept.float().mean(1).tolist(), long_run.float().mean(1)[spent].tolist()
    for name, value in {"by-restarts": kept[-1], "by-steps": long_run[-1]}.items():
        book.glue(f"{kind}-{name}", book.told(stats.paired_shares(value.cpu(), kept[0].cpu())))
    curves = {"restarts of three": (spent, restarted), "one long run": (spent, single)}
    figs.append(plots.convergence(curves, quantity=f"{kind}: still right (%)", steps="gradient steps spent", percent=True))
    for name, value in {"first": restarted[0], "restarted": restarted[-1], "long": single[-1]}.items():
        book.glue(f"{kind}-{name}", 100 * value)

# %%
book.show(figs, "restarts", alt="Accuracy against the number of gradient steps spent, by restarts of three steps and by one long run, for the plain and for the rippled model",
          caption=f"The same number of gradients as restarts or as one run, an image lost at any iterate; step ε/4, ε = {eps_255:g}/255, n = {len(x)}.")  # fmt: skip

# %% [markdown]
# What {glue:text}`restarts` starts add to one of three steps: on the plain model {glue:text}`plain-by-restarts`, on the rippled one
# {glue:text}`rippled-by-restarts`. What the same gradients add in one run: {glue:text}`plain-by-steps` and
# {glue:text}`rippled-by-steps`.
#
# The three-step attack leaves {glue:text}`plain-first:.0f` and {glue:text}`rippled-first:.0f` percent, its restarts
# {glue:text}`plain-restarted:.0f` and {glue:text}`rippled-restarted:.0f`, the long run {glue:text}`plain-long:.0f` and
# {glue:text}`rippled-long:.0f`.
#
# Restarts guard against an unlucky start, not against an unfinished attack. So first take steps until the curve is flat, then
# restart. Where restarts keep winning, one start was not enough for a verdict; where they change nothing, spend the
# gradients on other losses.
#
# ## What to maximize
#
# Cross-entropy has a flat end. Where the model is sure of the right class, its softmax has hardly any slope left. PGD takes the sign and does not mind a
# small slope, until in float32 it ends in an exact zero. The *margin* $\max_{c \ne y} z_c - z_y$ has no softmax and no flat end; maximizing it is the core of
# {cite}`carlini2017cw`.
#
# How sure a CLIP is depends on its logit scale, which changes no answer. This model's is {glue:text}`scale:.0f`; OpenAI's is 100
# {cite}`radford2021clip`. So multiply the logits, and attack again.

# %%
factors, losses = (1, 4, 16, 64), {"cross-entropy": attacks.cross_entropy, "margin": attacks.margin}
by_scale = {name: [] for name in losses}
for name, loss in losses.items():
    for factor in factors:
        goal = loss(lambda v, factor=factor: factor * surface(v), y)
        x_adv = attacks.pgd(goal, x, threat, n_steps=10, generators=[generator(*k) for k in keys])
        by_scale[name].append(book.measure_images(run, f"logits × {factor}", model, photos, x_adv, f"{name}-10", eps_255).value)
for name, values in by_scale.items():
    book.glue(f"scaled-{name}", 100 * values[-1])

# %%
fig = plots.convergence({name: (factors, values) for name, values in by_scale.items()}, quantity="left (%)", steps="factor on the logits", percent=True, log=True)
book.show(fig, "scale", alt="Accuracy left by two attacks against a factor on the logits: under cross-entropy it rises with the factor, under the margin it stays low",
          caption=f"Ten PGD steps at ε = {eps_255:g}/255 on logits times a factor, judged by the same answers; n = {len(x)}.")  # fmt: skip

# %% [markdown]
# At {glue:text}`factor` times the scale cross-entropy leaves {glue:text}`scaled-cross-entropy:.0f` percent and the margin
# {glue:text}`scaled-margin:.0f`. The pictures that fool the model are the same; one loss no longer points to them.
#
# ## All attacks on a trained model
#
# What an evaluation asks about is a defended model, on which attacks differ in other ways than on an undefended one. TeCoA {cite}`mao2023tecoa` is a CLIP that was trained on
# attacked images ([chapter 04](04_tga_zsr.py)). The next table attacks it at twice the budget.
#
# `cw-10` is PGD on the margin, `bim-10` steps from the photograph itself, without a random start. A *targeted* attack raises one chosen class, here the one
# that was second. Momentum {cite}`dong2018mifgsm` averages gradients over steps. APGD {cite}`croce2020autoattack` halves its own step when the loss stops
# rising.


# %%
def runner_up(model, x, y):
    """Targeted [B]: log-probability of the best wrong class of the clean image."""
    with torch.no_grad():
        target = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    return lambda x_adv: -F.cross_entropy(model(x_adv), target, reduction="none")


targeted = attacks.attack_on(runner_up, f"targeted-{pgd.n_steps}", pgd.n_steps)

# %%
hard, (judge, source) = ThreatModel(2 * eps_255), book.nano_checkpoint(run, "TeCoA", photos)
plan = [pgd, *map(attacks.get_attack, sizes.attacks), targeted]
measured = book.measure_model(run, "TeCoA", judge, source, photos, [(attack, hard) for attack in plan])
clean, *found = [row for row in measured if row.metric != "robust_acc_8bit"]
at = {row.attack: row for row in found}
main, worst = at[pgd.name], evaluate.worst_case(found)
_ = run.card.add(worst)

# %%
passes = {"forwards": lambda r: f"{r.image_forwards / r.n:.1f}", "backwards": lambda r: f"{r.image_backwards / r.n:.1f}"}
caption = f"{photos.name}, TeCoA, ε = {hard.eps_255:g}/255, passes for each image; “none” are the clean images."
book.paired_table([clean, *found, worst], main, by="attack", more=passes, caption=caption)

# %% [markdown]
# Read the points: an interval that lies below zero marks an attack that is stronger than {glue:text}`pgd-name` on these
# photographs: {glue:text}`stronger`. Weaker: {glue:text}`weaker`. Of the rest these photographs cannot tell.
#
# Costs are means over all photographs. Those that the model names wrongly anyway are not attacked. APGD on cross-entropy takes all its steps for every
# other image; the targeted part drops an image between two target classes, Square after the query that turns it. So what a part costs
# also depends on how robust the model is.
#
# ## AutoAttack, part by part
#
# AutoAttack {cite}`croce2020autoattack` runs four attacks without settings to tune: APGD on cross-entropy; APGD on a
# targeted loss, class by class; FAB, which looks for the nearest boundary; and Square {cite}`andriushchenko2020square`.
#
# Square asks for scores only. It tries squares of ±ε and keeps what helps. It is far weaker for its price, and that is
# what makes it a control: where it beats a gradient attack, the gradient is at fault.
#
# The full AutoAttack has 100 steps a part and 5000 queries. The profile shortens it, and the names say to what; what it leaves is then an upper
# bound.

# %%
parts = [name for name in sizes.attacks if name.startswith(("apgd", "fab", "square"))]
margins = next(name for name in at if name.startswith("cw"))
order = ["fgsm", pgd.name, margins, targeted.name, *parts]
right_under = {name: torch.from_numpy(evaluate.column(at[name].records, "correct")) for name in order}
together = torch.stack(list(right_under.values())).cumprod(0).float().mean(1).tolist()
others = {name: torch.stack([v for k, v in right_under.items() if k != name]).all(0) for name in order}
only = {name: int((others[name] & ~right_under[name]).sum()) for name in order}
turned = "; ".join(f"{name} {k}" for name, k in only.items() if k)
nothing = "none. On a defense that masks its gradient that will differ"
book.glue("only", turned or nothing)
book.glue("worst-gain", book.told(evaluate.paired(worst.records, main.records)))

# %%
figs = [plots.convergence({"worst case so far": together}, quantity="left (%)", steps="", percent=True, names=order)]
points = {name: ((r.image_forwards + r.image_backwards) / r.n, r.value, *r.ci95) for name, r in at.items() if r.image_forwards}
figs.append(plots.cost_scatter(points, cost="passes for an image", quantity="left (%)", log=True))
book.show(figs, "worst", alt="Left, accuracy under the worst case of all attacks so far, as one after the other is added. Right, accuracy against the number of passes an attack spends",
          caption=f"Left: the worst case per image over an attack and all before it; what each leaves alone stands in the table above. Right: what an attack leaves against its forward and backward passes, 95 % intervals; noise asks no model and has no price. {photos.name}, TeCoA, ε = {hard.eps_255:g}/255.")  # fmt: skip

# %% [markdown]
# The worst case counts an image as lost if *any* attack turns it, and it is taken image by image. PGD on cross-entropy leaves
# {glue:text}`hard-pgd:.0f` percent, on the margin {glue:text}`hard-margin:.0f`, all attacks together {glue:text}`hard-worst:.0f`:
# against PGD alone {glue:text}`worst-gain`. The smallest accuracy of a table is the worst case only if one attack turns whatever the others turn.
#
# Photographs that one attack alone turned: {glue:text}`only`. Where the worst case is no lower than a single attack, that one would have been enough here, and
# only the others could show it. [Chapter 03](03_sound_evaluation.py) has defenses on which it is not.
#
# ## Three controls
#
# *Noise* of the same size has no direction. A *universal* perturbation is one δ for all images, found on training
# photographs {cite}`moosavi2017universal`; here by PGD on their mean loss, with the attacked model's own gradients. A
# *transferred* attack was made on another model. None may do more than an attack on the image and model themselves.


# %%
def universal(model, x, y, threat, n_steps):
    """One perturbation [1, 3, H, W] for all images: PGD on the mean loss."""
    delta = torch.zeros_like(x[:1])
    for _ in range(n_steps):
        _, grad = attacks.value_and_grad(attacks.cross_entropy(model, y), (x + delta).clamp(0, 1))
        delta = threat.step(delta, grad.mean(0, keepdim=True), threat.eps / 4).clamp(-threat.eps, threat.eps)
    return delta


train = book.images(run, sizes.universal, "train")
delta = universal(surface, train.pixels().to(run.device), train.labels.to(run.device), threat, pgd.n_steps)
everywhere = book.measure_images(run, "CLIP", model, photos, (x + delta).clamp(0, 1), "universal", eps_255)

# %%
noise, square = attacks.get_attack("noise-corner"), attacks.get_attack(sizes.square)
budgets = sorted({*sizes.eps_grid, eps_255})
grid = [(attack, ThreatModel(e)) for e in budgets for attack in (pgd, square, noise)]
curve = book.measure(run, undefended, photos, grid)
fig = plots.accuracy_vs_eps(curve, chance=1 / len(photos.class_names))
book.show(fig, "curves", alt="Accuracy of the undefended model against the budget under PGD, under Square and under noise, with the line of chance",
          caption="Undefended model against ε: with gradients, with queries alone, and with noise; 95 % intervals.")  # fmt: skip

# %% [markdown]
# At ε = {glue:text}`eps`/255 noise leaves {glue:text}`left-noise:.0f` percent, the universal change {glue:text}`left-universal:.0f`,
# and {glue:text}`pgd-name` {glue:text}`left-pgd:.0f`. A universal change that does no more than noise says little: its search here has few
# steps, few photographs and no best iterate.
#
# A sound curve falls with ε and ends at chance or below. Below, because an attacker also avoids the lucky guesses.
#
# ## Transfer
#
# Images made on one model are shown to another. The diagonal is the white box. Off it, the attacker did not know the
# model. TeCoA and TGA-ZSR are fine-tunings of the attacked model: close relatives.

# %%
models = {"CLIP": (model, surface)} | {name: book.nano_checkpoint(run, name, photos) for name in sizes.others}
made = {name: pgd.run(source, x, y, threat, keys) for name, (_, source) in models.items()}
transfer = {(f"on {source}", target): book.measure_images(run, f"{target} ← {source}", models[target][0], photos, x_adv, pgd.name, eps_255)
            for source, x_adv in made.items() for target in models}  # fmt: skip
cells = {("clean", t): book.measure_images(run, t, m, photos, x, "none", 0.0).value for t, (m, _) in models.items()}
cells |= {pair: row.value for pair, row in transfer.items()}
for target in models:
    sources = [transfer[f"on {s}", target].value for s in models if s != target]
    book.glue(f"transfer-{target}", 100 * min(sources))
    book.glue(f"white-{target}", 100 * transfer[f"on {target}", target].value)
book.show(plots.pair_grid(cells, marked=[(f"on {t}", t) for t in models]), "transfer", alt="A grid of accuracies: models that images were made on down, models that are asked across; the white-box diagonal is framed",
          caption=f"Accuracy in percent on the same {len(x)} photographs, made on the model of the row ({pgd.name.upper()}, ε = {eps_255:g}/255) and shown to the model of the column. Framed: white box.")  # fmt: skip

# %%
quiet = next(r for r in curve if (r.attack, r.eps_255, r.metric) == (noise.name, eps_255, "robust_acc"))
shares = {"left-pgd": linf_rows[1], "left-noise": quiet, "left-universal": everywhere, "hard-pgd": main, "hard-margin": at[margins], "hard-worst": worst}
for name, row in shares.items():
    book.glue(name, 100 * row.value)
against = {name: book.compared(evaluate.paired(r.records, main.records)) for name, r in at.items() if r is not main}
for word, sign in {"stronger": "less than", "weaker": "more than"}.items():
    book.glue(word, ", ".join(name for name, told in against.items() if told == sign) or "none")
known = {"n": len(photos), "clean": 100 * linf_rows[0].value, "eps": f"{eps_255:g}", "pgd-name": pgd.name.upper()}
known |= {"n-steps": sizes.n_steps, "restarts": sizes.restarts, "scale": clip.logit_scale, "factor": factors[-1]}
for name, value in known.items():
    book.glue(name, value)

# %% [markdown]
# Read down a column. The undefended model keeps {glue:text}`transfer-CLIP:.0f` percent under the better of the transferred
# attacks and {glue:text}`white-CLIP:.0f` under its own. A robust accuracy that was measured with transferred images alone is
# the first of these numbers under the name of the second.
#
# If a column's smallest number lies off the diagonal, suspect the gradients of that model: they lead worse than
# another's. [Chapter 03](03_sound_evaluation.py) turns that into a test.
#
# ## What a robust accuracy needs
#
# - A **budget** in pixels and a norm. Without ε the number means nothing.
# - **Steps** until the curve is flat, and more than one **step size**.
# - **Restarts**, until they stop winning.
# - The **best iterate**, not the last.
# - More than one **loss**, one of them without a softmax; one attack without gradients; and the **worst case per image** over all of them.
# - The **price**: passes for each image. An attack with few passes that fails has shown little.
# - **Controls**: noise and transfer below, a budget that must win above.
#
# It stays an upper bound on what stands: no list of attacks proves that none is missing.
#
# In your own code, for any module from pixels in [0, 1] to logits (`attacks.pgd(objective, x, threat, ...)` takes any
# objective of your own):

# %%
from robustvlm_lite import attacks  # noqa: E402
from robustvlm_lite.threat import ThreatModel, audit  # noqa: E402

images, answers, network = few, few_y, model  # yours: [B, 3, H, W] in [0, 1], int64 labels, a module
own_keys = [("my attack", i) for i in range(len(images))]  # one an image: all of its randomness comes from it
attacked = attacks.get_attack("pgd-20x2").run(network, images, answers, ThreatModel(eps_255), own_keys)
print(audit(images, attacked, ThreatModel(eps_255)))
with torch.no_grad():
    print(f"{int((network(attacked).argmax(1) == answers).sum())} of {len(images)} answers are left")

# %% [markdown]
# A run costs the passes of the table above, in time as in money; memory is that of one batch with its gradient.
#
# ## Exercises
#
# A solution is folded under each; the line at its end checks it, and yours.
#
# **1 (easy).** Write `project_l2(delta, eps)`: bring each image's perturbation into the Euclidean ball of radius `eps`. What
# lies inside must stay as it is.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def project_l2(delta, eps):
    """delta [B, 3, H, W] -> the nearest perturbation of length at most eps, image by image."""
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return delta * (eps / length.clamp_min(eps))


exercises.check_project_l2(project_l2)

# %% [markdown]
# **2 (maths).** On a plane the best gain within a ball is $\max_{\|\delta\| \le \varepsilon} g \cdot \delta = \varepsilon \|g\|_*$,
# with the *dual* norm $\|g\|_*$. Which is it for ℓ∞, which for ℓ2? Write `best_gain(g, eps, norm)`, the gain of each image, for
# both.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def best_gain(g, eps, norm):
    """g [B, 3, H, W] -> [B]: how much a perturbation in the ball can raise a linear loss."""
    dual = {"linf": 1, "l2": 2}[norm]
    return eps * torch.linalg.vector_norm(g, ord=dual, dim=(1, 2, 3))


exercises.check_best_gain(best_gain)

# %% [markdown]
# **3 (open).** Beat cross-entropy at ten steps on the logits times 16. Write `my_objective(model, y)`, which returns a function from images to
# one value each. Ideas: divide the logits by a temperature, sum the margins to several classes, or attack the features.
# What would show that a gain is not luck?
#
# (The solution's division by the spread changes no sign, so PGD steps as on the plain margin.)


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
class Times(nn.Module):
    """Logits times a factor: the same answers."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, z):
        return self.factor * z


def my_objective(model, y):
    """Logits relative to their spread: the margin in units that no scale of the model can flatten."""

    def values(x_adv):
        z = model(x_adv).float()
        true = F.one_hot(y, z.shape[1]).bool()
        gap = z.masked_fill(true, -torch.inf).amax(1) - z[true]
        return gap / z.detach().std(dim=1)

    return values


loud = nn.Sequential(surface, Times(16))
exercises.check_objective(my_objective, loud, photos.take(range(min(48, len(photos)))), eps_255=eps_255)

# %% [markdown]
# ## Takeaways
#
# - An attack is a search. One step leaves {glue:text}`left-fgsm:.0f` percent, {glue:text}`pgd-name` {glue:text}`left-pgd:.0f`; noise
#   of that size leaves {glue:text}`left-noise:.0f`.
# - Take the worst case image by image. A trained model keeps {glue:text}`hard-pgd:.0f` percent under {glue:text}`pgd-name` and
#   {glue:text}`hard-worst:.0f` in the worst case: {glue:text}`worst-gain`.
# - PGD is ten lines. What makes a verdict of it is around them: budget, steps, restarts, losses, worst case.
# - A bent loss or a large logit scale looks like robustness under the wrong attack: at {glue:text}`factor` times the scale cross-entropy leaves
#   {glue:text}`scaled-cross-entropy:.0f` percent, the margin {glue:text}`scaled-margin:.0f`.
# - Transferred images flatter: {glue:text}`transfer-CLIP:.0f` percent against {glue:text}`white-CLIP:.0f`.
#
# Next: [chapter 03](03_sound_evaluation.py) shows how an evaluation fools itself with attacks that are written correctly.

# %%
book.footer(run)

# %% [markdown]
# ## References
#
# The works cited here stand on the [bibliography page](../book/bibliography.md).
