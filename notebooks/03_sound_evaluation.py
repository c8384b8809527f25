# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sound evaluation: how a robust accuracy fools its author
#
# *An attack can be written correctly and its number still be wrong. Each mistake on this page stands in released code of the
# five papers or of a work that they build on, or is what a habit of that code does to another kind of model ("toy"). Here
# each is made on purpose, measured, and mended.*
#
# [Colab](https://colab.research.google.com/github/robustvlm-lite/robustvlm_lite/blob/main/notebooks/03_sound_evaluation.ipynb) ·
# [source](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/notebooks/03_sound_evaluation.py) ·
# [paper](https://arxiv.org/abs/1902.06705) ·
# [result card](https://github.com/robustvlm-lite/robustvlm_lite/tree/main/book/cards) ·
# CPU: 2 minutes (tiny) · GPU: minutes (paper)

# %% [markdown]
# ## At a glance
#
# | | |
# |---|---|
# | Question | when does a robust accuracy mean what it says? {cite}`carlini2019evaluating` |
# | Method | one photograph set, one undefended model: evaluated as the released code does, then soundly |
# | Attack | {glue:text}`attack`, ε = {glue:text}`eps`/255, ℓ∞, {glue:text}`n` photographs, unless a section says otherwise |
# | Gradients usable? deterministic? | yes and yes: whatever looks robust here is a mistake |
# | `paper` profile | OpenAI's CLIP on 64-pixel photographs enlarged to 224; trained models stay `nano`'s, on shrunk ones |
# | Found on this page | the sound evaluation leaves {glue:text}`sound:.0f` percent; {glue:text}`mistakes` mistakes; of {glue:text}`compared` paired comparisons {glue:text}`flattering` report measurably more than the sound evaluation, {glue:text}`harsh` measurably less; the largest difference is {glue:text}`largest` |

# %% tags=["parameters"]
profile: str = "tiny"  # "tiny": laptop, 2 minutes | "small": real image packs | "paper": OpenAI's CLIP, GPU
seed: int = 0  # image subsets, attack starts and random defenses derive from it
eps_255: float = 0.0  # main attack budget in steps of 1/255; 0 takes the profile's
n: int = 0  # images per accuracy; 0 takes the profile's numbers
device: str = ""  # "" chooses; "cuda" without a GPU is an error
data_root: str = ""  # folder of the image packs (small, paper)
pretrained: str = ""  # weights file of the backbone (paper), or a model by name, such as fare2-vit-l-14

# %%
import importlib.util
import math
import subprocess
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

if importlib.util.find_spec("robustvlm_lite") is None:  # on Colab
    subprocess.run(["git", "clone", "-q", "https://github.com/robustvlm-lite/robustvlm_lite"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--system", "-e", "."]
    subprocess.run(install, cwd="robustvlm_lite", check=True)
    sys.path.insert(0, "robustvlm_lite")

from robustvlm_lite import attacks, book, evaluate, plots, sanity, stats
from robustvlm_lite.book import attack_exercises as exercises
from robustvlm_lite.defenses import Defense
from robustvlm_lite.runtime import generator, multiplies_bfloat16
from robustvlm_lite.threat import AuditError, ThreatModel, audit, to_8bit

run = book.start("03_sound_evaluation", profile=profile, seed=seed, device=device, data_root=data_root, pretrained=pretrained,
                 eps_255=eps_255, n=n)  # fmt: skip
eps_255 = run.parameters["eps_255"]
clip, sizes, threat = run.load_clip(), run.sizes, ThreatModel(eps_255)

# %% [markdown]
# ## Before you start
#
# You need PGD and the words budget, step and iterate ([chapter 02](02_attacks.py)). You will be able to name a dozen ways in which
# an evaluation goes wrong, and to test your own for them. Reading takes about 30 minutes.
#
# ## See it first
#
# One undefended model, the same photographs, two evaluations from the same starts. The careless one makes two mistakes of
# this page: it counts ε on normalized tensors, and it cuts pixels to 8 bits by truncation.
#
# Cutting swallows every upward change below one gray level, and makes a whole level of every downward one. So the careless
# curve is flat as long as ε times σ stays below a level. Nothing was defended.

# %%
photos = book.images(run, sizes.photos)
model = clip.classifier(photos.class_names, photos.templates)
surface = model.fast()  # the same model for gradients, in bfloat16
x, y = photos.pixels().to(run.device), photos.labels.to(run.device)
pgd, keys = attacks.get_attack(sizes.pgd), [(seed, photos.name, i) for i in range(len(photos))]


def judged(name, x_adv, attack=pgd.name, eps=eps_255, judge=model, data=photos, batch=128):
    """The row of images that were made elsewhere, kept in the card."""
    return book.measure_images(run, name, judge, data, x_adv, attack, eps, batch=batch)


# %%
def pgd_in(units, x, y, eps, n_steps, clamp=True):
    """`pgd` whose budget counts in `units` of a pixel (a number or [3, 1, 1]): x_adv = x + units * delta, |delta| <= eps."""
    limits, best, highest = (0, 1) if clamp else (-torch.inf, torch.inf), x, torch.full((len(x),), -torch.inf).to(x)
    delta = eps * torch.stack([2 * torch.rand(x.shape[1:], generator=generator(*k)) - 1 for k in keys[: len(x)]]).to(x)
    for _ in range(n_steps + 1):
        x_adv = (x + units * delta).clamp(*limits)
        value, grad = attacks.value_and_grad(attacks.cross_entropy(surface, y), x_adv)
        best = torch.where((value >= highest)[:, None, None, None], x_adv, best)  # the best iterate of each image
        highest = torch.maximum(value, highest)
        delta = ((x_adv - x) / units + eps / 4 * grad.sign()).clamp(-eps, eps)
    return best


def truncated(x_adv):
    """8-bit copy as ToPILImage makes it: what lies between two levels falls to the lower (float32 noise does not)."""
    return (255 * x_adv + 1e-4).floor() / 255


# %%
clean = judged("CLIP", x, "none", 0.0)
rows = [clean]
for e in sizes.eps_grid:
    careless = truncated(pgd_in(clip.std, x, y, e / 255, pgd.n_steps))
    rows += [judged("CLIP", pgd.run(surface, x, y, ThreatModel(e), keys), eps=e), judged("CLIP", careless, "careless", e)]
fig = plots.accuracy_vs_eps(rows, chance=1 / len(photos.class_names))
book.show(fig, "first", alt="Accuracy against the budget: a sound evaluation falls steeply, a careless one of the same model and photographs stays far above it",
          caption=f"One undefended model under {pgd.label}, evaluated soundly and carelessly, 95 % intervals.")  # fmt: skip

# %% [markdown]
# ## Whose code
#
# | paper | what was read | commit |
# |---|---|---|
# | TGA-ZSR {cite}`yu2024tgazsr`, Comp-TGA {cite}`yu2026comptga` | `zhyblue424/TGA-ZSR` | 663fe57; the 2024 version 5f2b31c |
# | A-TPT {cite}`hai2026atpt`, on R-TPT {cite}`sheng2025rtpt` | `SEU-VIPGroup/A-TPT`, `TomSheng21/R-TPT` | 4bf06c9, e085f13 |
# | PRSL {cite}`wang2024prsl` | `karlieswift/Mattack` | 9f587d1 |
# | CAPT {cite}`yang2024capt` | no code found; nearest relative APT {cite}`li2024apt`: `TreeLLi/APT` | c2e99e0 |
# | CBA-FAPT | no code found; it builds on FAP {cite}`zhou2024fap`: `lionel-w2/FAP` | 761a895 |
#
# A mistake in a repository does not prove that a table was made with it, and a mistake need not change a number. So each is
# measured here, on one small model, and some will turn out harmless. The page says which.


# %%
ledger = []


def enter(key, mistake, code, wrong, sound, diff=None, there="as released", paired=True):
    """Keep a pair of evaluations, two rows or two shares with their difference, for the table at the end.

    there: how far the mistake is theirs. paired: is `diff` a difference on the same images?
    """
    if diff is None:
        right = [evaluate.column(row.records, "correct") for row in (wrong, sound)]
        wrong, sound, diff = wrong.value, sound.value, stats.paired_shares(*right)
    ledger.append({"mistake": mistake, "code": code, "there": there, "wrong": wrong, "sound": sound, "diff": diff, "paired": paired})
    for name, value in {"wrong": 100 * wrong, "sound": 100 * sound, "points": book.points(diff)}.items():
        book.glue(f"{key}-{name}", value)


# %%
sound_adv = pgd.run(surface, x, y, threat, keys)
sound = judged("sound", sound_adv)
enter("never", "the attack never runs", "APT: `test()`", clean, sound)

# %% [markdown]
# The first entry needs no demonstration: in APT's `test()` the line with the attack is commented out, and the accuracy that
# it prints, {glue:text}`never-wrong:.0f` percent here, is the clean one. A user found the line and asked which accuracy it is
# (issue 8 of its repository). A control catches it: an undefended model must fall.
#
# ## In which unit is ε counted?
#
# CLIP's input is normalized, and attack code often works behind that step. There one unit is σ of a pixel, another for
# each channel. PRSL's attack does (`attack_vaq.py`, `adv_vitgpt2.py`): step 0.3 and ε 1.0 for BLIP-2, on tensors
# normalized like CLIP's; step 0.02 and ε 1 for the captioner, where σ is one half.

# %%
wrong_unit = judged("ε on normalized tensors", pgd_in(clip.std, x, y, threat.eps, pgd.n_steps))
right_unit = judged("ε in pixels", pgd_in(1, x, y, threat.eps, pgd.n_steps))
enter("unit", "ε on normalized tensors", "PRSL: `attack_vaq.py`", wrong_unit, right_unit, there="their unit; their ε is larger and errs the other way")
std = clip.std.flatten().tolist()
stated = {f"{eps_255:g}/255, taken behind the normalization": (threat.eps, std), "PRSL, BLIP-2: step 0.3": (0.3, std),
          "PRSL, BLIP-2: ε 1": (1.0, std), "PRSL, captioner: step 0.02": (0.02, [0.5] * 3), "PRSL, captioner: ε 1": (1.0, [0.5] * 3)}  # fmt: skip
book.table([{"as written": name} | {c: 255 * value * s for c, s in zip(("red", "green", "blue"), sigma, strict=True)} for name, (value, sigma) in stated.items()],
           caption="What a number on normalized tensors is in pixels, in 1/255.", formats=dict.fromkeys(("red", "green", "blue"), ".1f"))  # fmt: skip

# %%
one, label = x[:1], y[:1]
shown = {"clean": one, f"{eps_255:g}/255 in pixels": sound_adv[:1]}
_, grad = attacks.value_and_grad(attacks.cross_entropy(surface, label), one)
shown[f"{eps_255:g}/255 normalized"] = pgd_in(clip.std, one, label, threat.eps, pgd.n_steps)
shown["PRSL: 0.3"] = (one + 0.3 * clip.std.view(3, 1, 1) * grad.sign()).clamp(0, 1)
shown["PRSL: 1.0"] = pgd_in(clip.std, one, label, 1.0, pgd.n_steps)
fig = plots.picture_rows({"picture": torch.cat(list(shown.values()))}, list(shown))
book.show(fig, "units", alt="One photograph clean and attacked: with the budget in pixels and behind the normalization it looks unchanged, after PRSL's step it is visibly spoiled, with PRSL's budget hardly recognizable",
          caption="The first photograph of the subset under budgets as written. The last two show one step of PRSL's size and PRSL's whole budget, cut to valid pixels.")  # fmt: skip

# %% [markdown]
# Behind the normalization the same {glue:text}`eps`/255 leaves {glue:text}`unit-wrong:.0f` percent, in pixels
# {glue:text}`unit-sound:.0f`. PRSL errs to the other side: its ε is more than a quarter of the pixel range, and the captioner's one half,
# never reached. Either way the number says one thing and the attack does another.
#
# The cure is a place: keep the normalization inside the model, and write ε in 1/255.
#
# ## Is it still an image?
#
# PRSL's attack on BLIP-2 never clamps (`attack_vaq.py`): pixels leave [0, 1]. No file can hold such a picture. The book
# audits every attacked batch, and stops.

# %%
off_range = pgd_in(1, x, y, threat.eps, pgd.n_steps, clamp=False)
enter("range", "pixels outside [0, 1]", "PRSL: `attack_vaq.py`", judged("no clamp", off_range), judged("no clamp, saved", off_range.clamp(0, 1)), there="their habit, at our budget")
book.glue("outside", 100 * ((off_range < 0) | (off_range > 1)).float().mean())
try:
    audit(x, off_range, threat)
except AuditError as error:
    print(error)

# %% [markdown]
# {glue:text}`outside:.1f` percent of the values lie outside. Saved as an image, the batch leaves {glue:text}`range-sound:.0f`
# percent instead of {glue:text}`range-wrong:.0f`. White and black areas feed the difference; where the attack leaves nothing anyway, it cannot show.
#
# ## Is there a gradient?
#
# TGA-ZSR's attack runs under float16, takes the *mean* loss of a batch of 256 and does not scale it (`TGA-ZSR.py:313, 418`).
# float16 has nothing between zero and about 6e-8. A confident image's share of a mean falls below, and its gradient is
# zero in every pixel.
#
# The attack leaves such an image at its random start. FAP and PRSL attack models in half precision as well.
#
# This is also a leak between images: whether one is attacked depends on how many others are in its batch.

# %%
cut = min(sizes.half, len(photos))
few = replace(photos.take(range(cut)), name=f"{photos.name}[:{cut}]")
fx, fy, fkeys = x[: len(few)], y[: len(few)], keys[: len(few)]


def half_precision(mean_over):
    """Cross-entropy as released, for a batch of `mean_over`."""
    return attacks.cross_entropy(model, fy, quirk_fp16_mean=True, mean_over=mean_over)


# %%
zero = {f"float16, mean over {b}": attacks.zero_gradient_share(half_precision(b), fx) for b in (1, 32, 256)}
wide = "bfloat16" if multiplies_bfloat16(run.device.type) else "float32"  # what `surface` computes in
zero[f"{wide}, no mean"] = attacks.zero_gradient_share(attacks.cross_entropy(surface, fy), fx)
for name, share in zero.items():
    book.glue(f"dead-{name.split()[-1]}", int((share > 0.99).sum()))
    book.glue(f"zeros-{name.split()[-1]}", 100 * share.mean())
book.glue("wide", wide)
with torch.no_grad():
    rank = model(fx).softmax(1).gather(1, fy[:, None])[:, 0].argsort()
fig = plots.convergence({name: share[rank].tolist() for name, share in zero.items()}, quantity="values without gradient (%)", steps="photographs, least to most certain", percent=True)
book.show(fig, "zeros", alt="Share of pixel values without a gradient against certainty of the answer: with float16 and a mean over 256 it jumps to all values for the most certain photographs, without half precision it stays at zero",
          caption=f"Values whose gradient is exactly zero, for each of {len(few)} photographs in the order of the true class's probability.")  # fmt: skip

# %%
halves = {}
for name, objective in {"float16 mean over 256": half_precision(256), wide: attacks.cross_entropy(surface, fy)}.items():
    starts = [generator(*k) for k in fkeys]
    x_adv = attacks.pgd(objective, fx, threat, n_steps=sizes.half_steps, generators=starts)
    halves[name] = judged(name, x_adv, f"pgd-{sizes.half_steps}", data=few)
enter("half", "float16 gradient of a batch mean", "TGA-ZSR: `TGA-ZSR.py:313, 418`", *halves.values())

# %% [markdown]
# Of {glue:text}`n-half` photographs {glue:text}`dead-256` have no gradient at all when the mean runs over 256 images,
# {glue:text}`dead-32` over 32, and {glue:text}`dead-1` over one. In {glue:text}`wide` the share of values
# without one is {glue:text}`zeros-mean:.1f` percent. The images without a gradient are those that the model is surest of.
#
# With the mean over 256 the attack leaves {glue:text}`half-wrong:.0f` percent right, in {glue:text}`wide`, from the same starts,
# {glue:text}`half-sound:.0f`.
#
# The published tables show what such a gap looks like: the first line of the table below. It fits this cause and does not
# prove it.
#
# Use the sum over images, and float32 or bfloat16. Count zero gradients before you believe an accuracy.
#
# ## Step = ε, last iterate
#
# TGA-ZSR evaluates with 100 steps of size ε and takes the last iterate (`TGA-ZSR.py:48–50`, `attacks.py:63–103`); FAP does the
# same. Such a step jumps between corners, and the last corner need not be the worst that was visited.

# %%
coarse = attacks.get_attack(f"{pgd.name}-paper")
names = {"CLIP": (model, surface)} | {name: book.nano_checkpoint(run, name, photos) for name in sizes.candidates[:1]}
for name, (judge, source) in names.items():
    made = {"step ε, last iterate": coarse, "step ε/4, best iterate": pgd}
    pair = [judged(f"{name}, {how}", a.run(source, x, y, threat, keys), a.name, judge=judge) for how, a in made.items()]
    mistake = f"step ε, last iterate ({name})"
    enter(f"step-{name}", mistake, "TGA-ZSR: `attacks.py:63–103`; FAP", *pair)
book.published_table("03_sound_evaluation")

# %% [markdown]
# On the undefended model {glue:text}`step-CLIP-wrong:.0f` percent stay right under the coarse attack and {glue:text}`step-CLIP-sound:.0f`
# under the fine one; on a trained model {glue:text}`step-TeCoA-wrong:.0f` and {glue:text}`step-TeCoA-sound:.0f`.
#
# Where the loss is bent it matters: the rippled model of [chapter 02](02_attacks.py), whose ripple is as long as such a step, looks
# robust under it.
#
# FAP's own appendix {cite}`zhou2024fap` has the gap of the second line; its two attacks differ in loss and step rule as well.
# A step of ε/4 and the best iterate cost one pass more.
#
# ## Into 8 bits
#
# A-TPT turns attacked tensors into pictures before it augments them, with a conversion that cuts instead of rounding
# (`atpt.py:692`); PRSL writes each iterate to a `.jpg`. Cutting moves a value that lies between two levels down to the
# lower, which may be out of the budget.
#
# At a whole budget an attack that has converged stands on whole levels, and cutting has nothing to cut. So the table has a
# budget off the grid, too.

# %%
off_grid, saved, facts = ThreatModel(1.5), {}, []
for t, made in ((threat, sound_adv), (off_grid, pgd.run(surface, x, y, off_grid, keys))):
    copies = {"cut": truncated(made), "rounded": (255 * made).round() / 255, "to_8bit": to_8bit(made, x, t)}
    for name, copy in copies.items():
        saved[name] = judged(f"8 bits: {name}", copy, eps=t.eps_255)
        beyond = ((copy - x).abs() > t.eps + 1e-6).float().mean().item()
        facts.append({"ε (1/255)": f"{t.eps_255:g}", "copy": name, "values beyond ε (%)": 100 * beyond, "mean shift (1/255)": 255 * (copy - made).mean().item(), "left (%)": 100 * saved[name].value})
enter("cut", f"truncation to 8 bits (ε = {off_grid.eps_255:g}/255)", "A-TPT: `atpt.py:692`", saved["cut"], saved["to_8bit"], there="their cut; their budgets are whole, see its section")
book.glue("beyond-whole", facts[0]["values beyond ε (%)"])
book.glue("beyond", facts[3]["values beyond ε (%)"])
formats = {"values beyond ε (%)": ".2f", "mean shift (1/255)": "+.2f", "left (%)": ".1f"}
book.table(facts, caption=f"The sound attack as an 8-bit file, n = {len(x)}.", formats=formats, card_link=True)

# %% [markdown]
# At the whole budget cutting puts {glue:text}`beyond-whole:.2f` percent of the values beyond ε, off the grid
# {glue:text}`beyond:.0f`, and the audit would refuse that batch. There it leaves {glue:text}`cut-wrong:.0f` percent right, the copy that
# keeps the budget {glue:text}`cut-sound:.0f`. The book reports accuracy on the `to_8bit` copy beside the other.
#
# ## A random defense
#
# A-TPT answers from randomly cropped and mixed views of an image. Its evaluation attacks the plain model, which has no views
# (`atpt.py:691`): the attack does not know the defense. The toy below has the same kind of randomness. It averages the logits
# of four randomly shifted and mirrored copies.


# %%
class Views(nn.Module):
    """A random defense: mean logits of shifted, mirrored copies. fixed: the same draw at every call of one batch size."""

    def __init__(self, model, *key, fixed=False, n_views=4):
        super().__init__()
        self.model, self.key, self.fixed, self.n_views = model, key, fixed, n_views
        self.draws = generator(*key)

    def forward(self, x):
        g = generator(*self.key) if self.fixed else self.draws
        return sum(self.model(shifted(x, x.shape[-1] // 10, g)) for _ in range(self.n_views)) / self.n_views


# %%
def shifted(x, reach, g):
    """[B, 3, H, W], each image moved by up to `reach` pixels either way and perhaps mirrored; the border is repeated."""
    top, left, mirror = (torch.randint(high, (len(x),), generator=g).tolist() for high in (2 * reach + 1, 2 * reach + 1, 2))
    padded, (height, width) = F.pad(x, [reach] * 4, mode="replicate"), x.shape[-2:]
    views = [p[:, i : i + height, j : j + width] for p, i, j in zip(padded, top, left, strict=True)]
    return torch.stack([v.flip(-1) if m else v for v, m in zip(views, mirror, strict=True)])


# %% [markdown]
# An attacker who knows the defense lets the gradient pass through the views, and draws new ones at every step: expectation over
# transformation, EOT {cite}`athalye2018eot`. The defense cannot choose its dice after the attack. So the verdict uses
# *fresh* draws, which no attack has seen.

# %%
def through(defense):
    """PGD on a random model; the last iterate, since the best would be the luckiest draw."""
    starts = [generator(*k, "views") for k in keys]
    return attacks.pgd(attacks.cross_entropy(defense, y), x, threat, n_steps=pgd.n_steps, keep="last", generators=starts)


# %%
views = Views(model, seed, "verdict")
eot_adv = through(Views(surface, seed, "attack"))
frozen = through(Views(surface, seed, "frozen", fixed=True))
same_draw = judged("views, one draw for all", frozen, "pgd-frozen", judge=Views(model, seed, "frozen", fixed=True), batch=len(x))  # one call, as the attack had
fresh_draw = judged("views, frozen attack, fresh draw", frozen, "pgd-frozen", judge=views)

# %%
batches = {"clean": x, "blind attack": sound_adv, "through views": eot_adv}
with torch.no_grad():
    right = {name: torch.stack([views(v).argmax(1) == y for _ in range(sizes.draws)]).float().cpu() for name, v in batches.items()}
blind, seen = (right[name].mean(0).numpy() for name in ("blind attack", "through views"))  # share of draws that are right, [N]
enter("blind", "random defense, attack without it", "A-TPT: `atpt.py:691`; R-TPT", blind.mean(), seen.mean(), stats.paired_bootstrap(blind, seen), there="their order, a toy defense")
book.glue("mean-clean", 100 * right["clean"].mean())
book.glue("all-clean", 100 * right["clean"].cumprod(0)[-1].mean())
judged("views, blind attack, fresh draw", sound_adv, "pgd-blind", judge=views)
enter("draw", "attack and verdict on one draw", "Comp-TGA: `Comp-TGA.py:484–486` (its seeding)", same_draw, judged("views, EOT, fresh draw", eot_adv, "pgd-eot", judge=views), there="toy: no random defense there")
book.glue("draw-fresh", 100 * fresh_draw.value)

# %%
ks = range(1, sizes.draws + 1)
curves = {name: (ks, r.cumprod(0).mean(1).tolist()) for name, r in right.items()}
book.show(plots.convergence(curves, quantity="right in all k draws (%)", steps="draws k", percent=True), "draws",
          alt="Three falling curves over the number of draws: the share of images that are right in every draw, clean, under the attack without views and under the attack through views",
          caption=f"A random defense asked k times, right only if right every time; n = {len(x)}. The clean curve falls, too.")  # fmt: skip

# %% [markdown]
# Attacked as released, the toy keeps {glue:text}`blind-wrong:.0f` percent, mean of {glue:text}`draws` fresh draws. Attacked through its views it
# keeps {glue:text}`blind-sound:.0f`.
#
# Comp-TGA sets the random seed anew inside its loss, so that every call draws the same numbers (`Comp-TGA.py:484–486`). It has no random
# defense; in a program with one, attack and verdict would share a draw.
#
# Here that leaves {glue:text}`draw-wrong:.0f` percent, and on a fresh draw the same images leave {glue:text}`draw-fresh:.0f`. EOT, on a
# fresh draw, leaves {glue:text}`draw-sound:.0f`. A defense that must show its dice looks worse than it is.
#
# The figure shows a third trap: ask k times and count an image as lost at the first wrong answer. Without any attack that leaves
# {glue:text}`all-clean:.0f` percent where a single draw leaves {glue:text}`mean-clean:.0f`. Print the mean over fresh draws, and the clean control at the same
# k.
#
# ## Images of one batch
#
# An image's verdict must not depend on its neighbors. PRSL's penalty takes a log-softmax over the *positions of the
# whole batch* (`lossfunctions.py:62–69`), so each value depends on the other images.
#
# TGA-ZSR leaves its model in training mode while it makes its training images. Its transformer has nothing that minds; a batch norm would, and
# A-TPT also runs a ResNet. So the second toy is CLIP with a batch norm in place of its normalization. In evaluation mode it is the same model.


# %%
def penalty(z, y, k=4):
    """PRSL's penalty on class logits z [B, C]: mean of the k best wrong logits, log-softmax over the batch. [B]."""
    wrong = z.scatter(1, y[:, None], -torch.inf)
    return -wrong.topk(k, dim=1).values.mean(1).log_softmax(dim=0)


def neighbors(loss):
    """Of the squared length of the gradient of the first image's value, the share on the pixels of the others."""
    pixels = fx[:8].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(model(pixels), fy[:8])[0], pixels)
    return float(grad[1:].square().sum() / grad.square().sum())


leaks = {"cross-entropy": neighbors(lambda z, y: F.cross_entropy(z, y, reduction="none")), "PRSL's penalty": neighbors(penalty)}
book.glue("leak", 100 * leaks["PRSL's penalty"])
print("; ".join(f"{name}: {100 * share:.1f} % on the neighbors" for name, share in leaks.items()))


# %%
class BatchNormed(nn.Module):
    """CLIP whose input normalization is a batch norm: in evaluation mode the same model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.norm = model, nn.BatchNorm2d(3, affine=False, eps=1e-12).to(run.device)
        self.norm.running_mean.copy_(clip.mean.flatten())
        self.norm.running_var.copy_(clip.std.flatten() ** 2)

    def forward(self, x):
        return self.model(self.norm(x) * clip.std + clip.mean)


# %%
training = BatchNormed(surface).train()
starts = [generator(*k) for k in keys]
trained_on = attacks.pgd(attacks.cross_entropy(training, y), x, threat, n_steps=pgd.n_steps, generators=starts)
enter("mode", "batch norm in training mode", "TGA-ZSR: `attacks.py:63–103`", judged("attacked in training mode", trained_on), sound, there="toy: harmless there, no batch norm")

# %%
leaky, order = BatchNormed(model), y.argsort(stable=True)
torch.testing.assert_close(leaky.eval()(x), model(x), rtol=1e-3, atol=1e-3)
with torch.no_grad():
    alone, sorted_ = torch.empty_like(y), torch.empty_like(y)
    for part in order.split(8):
        alone[part], sorted_[part] = model(x[part]).argmax(1), leaky.train()(x[part]).argmax(1)
book.glue("turned", int((alone != sorted_).sum()))

# %% [markdown]
# Of the squared length of the gradient of the first image's penalty {glue:text}`leak:.0f` percent lie on the pixels of its neighbors.
#
# With a batch norm in training mode, {glue:text}`turned` of {glue:text}`n` clean answers change when the photographs come in batches of eight, sorted by class
# as a folder lists them. An attack in that mode leaves {glue:text}`mode-wrong:.0f` percent, in evaluation mode
# {glue:text}`mode-sound:.0f`. It also moves the running statistics, so the attack changes the model.
#
# ## Before the reset
#
# A test-time defense tunes itself on each image and is reset. In A-TPT, as in R-TPT, the attack on image $i$ comes *before* that reset
# (`atpt.py:691, 733`; `rtpt.py:217, 238`): it meets a model that was tuned on image $i - 1$. The verdict then meets another.
#
# The toy adds a bias to the logits and tunes it on each image: one sign step that makes a few views surer, as one step of AdamW from a fresh
# state is. Several images run side by side, each in a lane of its own, as on several GPUs.


# %%
def tuned(x_adv, strength):
    """A bias for each image [B, C]: one sign step down the mean entropy of three views."""
    with torch.no_grad():
        z = torch.stack([model(v) for v in (x_adv, x_adv.flip(-1), x_adv.roll(2, -1))])  # [V, B, C]
    bias = torch.zeros_like(z[0], requires_grad=True)
    log_p = (z + bias).log_softmax(-1)
    (grad,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), bias)
    return -strength * grad.sign()


# %%
def stream(order, lanes, reset_first, strength=2.0):
    """Logits [N, C] and attacked images of the defense, image after image in each lane."""
    made, z = x.clone(), torch.zeros(len(x), len(photos.class_names), device=run.device)
    bias = torch.zeros(lanes, z.shape[1], device=run.device)
    for part in order.split(lanes):
        old = torch.zeros_like(bias[: len(part)]) if reset_first else bias[: len(part)].clone()
        objective = attacks.cross_entropy(lambda v, old=old: surface(v) + old, y[part])
        made[part] = attacks.pgd(objective, x[part], threat, n_steps=pgd.n_steps, generators=[generator(*keys[i]) for i in part.tolist()])
        bias[: len(part)] = tuned(made[part], strength)  # the defense itself always begins at zero
        with torch.no_grad():
            z[part] = model(made[part]) + bias[: len(part)]
    return z, made


# %%
flows = {"reset first": (20, True), "attack first": (20, False), "attack first, fewer lanes": (4, False)}
streams = {}
for name, (lanes, reset_first) in flows.items():
    z, made_here = stream(order, lanes, reset_first)
    known = {"method": f"tuned bias, {name}", "attack": pgd.name, "eps_255": eps_255, "seed": seed}
    streams[name] = evaluate.images_row(z, made_here, photos, **known)
run.card.add(streams.values())
enter("reset", "attack before the reset", "A-TPT: `atpt.py:691, 733`; R-TPT", streams["attack first"], streams["reset first"], there="their order, a toy defense")
by_lane = [evaluate.column(streams[name].records, "prediction") for name in ("attack first", "attack first, fewer lanes")]
book.glue("lanes", int((by_lane[0] != by_lane[1]).sum()))
book.glue("fewer", 100 * streams["attack first, fewer lanes"].value)

# %% [markdown]
# Attacked before the reset the toy keeps {glue:text}`reset-wrong:.0f` percent, after it {glue:text}`reset-sound:.0f`. And the number of lanes
# decides: with 4 in place of 20, {glue:text}`lanes` of {glue:text}`n` answers differ ({glue:text}`fewer:.0f` percent stay right). A result that
# depends on the number of GPUs belongs to no method.
#
# Reset first; then attack, tune and judge. An attack that knows the defense would also differentiate through the tuning.
#
# ## Chosen after the fact
#
# PRSL scores an attacked caption against the model's *own* clean caption (`adv_vitgpt2.py`). For a classifier that means to count answers that
# stayed, right or wrong. A model that gives one answer to everything is perfect by that count.
#
# The 2024 version of TGA-ZSR keeps the checkpoint with the best robust accuracy on the 16 *test* sets (`TGA-ZSR.py:245–260`).

# %%
with torch.no_grad():
    own = replace(photos, labels=model(x).argmax(1).cpu(), name=f"{photos.name} (own answers)")
weak = attacks.get_attack(f"pgd-{sizes.half_steps}")
at_pool = ThreatModel(sizes.eps_pool)
mild = weak.run(surface, x, y, at_pool, keys)
facts = [judged("CLIP", mild, weak.name, sizes.eps_pool, data=data) for data in (own, photos)]
enter("own", f"counted against its own answers (ε = {sizes.eps_pool:g}/255)", "PRSL: `adv_vitgpt2.py`", *facts, there="toy: captions there, classes here")

# %%
known = {}
for name in sizes.candidates:
    judge, source = book.nano_checkpoint(run, name, photos)
    known[name] = judged(name, weak.run(source, x, y, threat, keys), weak.name, judge=judge)
table = torch.stack([torch.from_numpy(evaluate.column(row.records, "correct")) for row in known.values()]).float()  # [K, N]

# %%
picked, half = [], max(1, len(x) // 2)
for s in range(500):
    mixed = torch.randperm(len(x), generator=generator(seed, "split", s))
    first, second = mixed[:half], mixed[-half:]
    best = table[:, first].mean(1).argmax()
    picked.append([table[best, first].mean().item(), table[best, second].mean().item()])
there, elsewhere = (sum(column) / len(picked) for column in zip(*picked, strict=True))
gaps = sorted(a - b for a, b in picked)
enter("pick", "checkpoint chosen on the test images", "TGA-ZSR (2024): `TGA-ZSR.py:245–260`", there, elsewhere, (there - elsewhere, gaps[12], gaps[-13]), paired=False)

# %% [markdown]
# Under a mild attack {glue:text}`own-wrong:.0f` percent of the answers stay what they were, and {glue:text}`own-sound:.0f` percent are right.
#
# For the second, {glue:text}`candidates` trained checkpoints are compared on one half of the photographs, and the best is reported on that half:
# {glue:text}`pick-wrong:.1f` percent, mean of {glue:text}`splits` random halves. On the other half it keeps {glue:text}`pick-sound:.1f`. The nearer the candidates lie and the
# fewer the images, the more the winner was lucky.
#
# Fix images, counts and checkpoints before the attack. Pictures that are shown as examples are chosen, too: say by which rule.
#
# ## How many images, and how sure?
#
# An accuracy is a share of few answers. Wilson's interval {cite}`wilson1927` says how few. PRSL's README shows single pictures, and A-TPT prints
# running means of one pass with one seed.

# %%
pool = book.images(run, sizes.pool)
pool = replace(pool, name=f"{pool.name}, {len(pool)} images")
pool_row = book.measure(run, Defense(clip), pool, [(weak, at_pool)])[1]
hits = torch.from_numpy(evaluate.column(pool_row.records, "correct")).float()
counts = sorted({max(1, round(len(hits) * 2.0**-k)) for k in range(6)})
so_far = [hits[:k].mean().item() for k in counts]
bands = list(zip(*(stats.wilson(int(hits[:k].sum()), k) for k in counts), strict=True))

# %%
p = hits.mean().item()
enter("few", f"the first {counts[0]} images", "PRSL; A-TPT (one pass)", so_far[0], p, tuple(v - p for v in (so_far[0], bands[0][0], bands[1][0])), there="toy: a habit", paired=False)
book.glue("needed", f"{math.ceil(p * (1 - p) * (1.96 / 0.01) ** 2):,}")
curves = {"upper end": (counts, bands[1]), "first n images": (counts, so_far), "lower end": (counts, bands[0])}
number_fig = plots.convergence(curves, quantity="left (%)", steps="number of images n", percent=True, log=True)

# %%
a, b = known["TGA-ZSR"], known["TeCoA"]
paired_diff = evaluate.paired(a.records, b.records)
arms = [(r.value, *r.ci95) for r in (a, b)]
spread = [math.hypot(arms[0][0] - arms[0][1 + i], arms[1][0] - arms[1][2 - i]) for i in (0, 1)]
apart = (a.value - b.value, a.value - b.value - spread[0], a.value - b.value + spread[1])
p_value = stats.mcnemar(*(evaluate.column(r.records, "correct") for r in (a, b)))
ratio = (apart[2] - apart[1]) / max(paired_diff[2] - paired_diff[1], 1e-9)
for name, value in {"narrower": ratio, "mcnemar": p_value, "verdict": book.told(paired_diff)}.items():
    book.glue(name, value)

# %%
pair_fig = plots.paired_bars({"same images": paired_diff, "as if others": apart}, reference="TeCoA", title="TGA-ZSR")
book.show([number_fig, pair_fig], "numbers", alt="Left, the accuracy of the first n images and the two ends of its interval, which close in as n grows. Right, one difference with two intervals: the paired one is narrower than the unpaired one",
          caption=f"Left: accuracy of the first n images of {pool.name} with Wilson's 95 % interval ({weak.label}, ε = {sizes.eps_pool:g}/255). Right: two trained models on the same {len(x)} images at ε = {eps_255:g}/255, the difference read as paired and as if the images had been others.")  # fmt: skip

# %% [markdown]
# The first {glue:text}`few-n` images say {glue:text}`few-wrong:.0f` percent, all of them {glue:text}`few-sound:.0f`. For an interval of one point to either side
# {glue:text}`needed` images are needed.
#
# Compare two methods on the *same* images, image by image: what both find easy cancels. Here the unpaired interval
# {cite}`newcombe1998` is {glue:text}`narrower:.1f` times as wide as the paired one {cite}`newcombe1998paired`. TGA-ZSR against TeCoA:
# {glue:text}`verdict`; McNemar's exact test {cite}`mcnemar1947` gives p = {glue:text}`mcnemar:.2f`.
#
# A-TPT's log keeps running means and no record by image, so nobody can pair its numbers afterward.
#
# ## Seeds
#
# FAP seeds under `if args.seed:`, so that seed 0, the one of its README, seeds nothing. Comp-TGA draws the same start for every
# batch. Restarted, such an attack is one attack, repeated.


# %%
def drawn(seed, always):
    """A number after seeding as released (`if seed:`) or always."""
    if seed or always:
        torch.manual_seed(seed)
    return torch.rand(()).item()


with torch.random.fork_rng():
    repeats = {f"seed {s}, {'always' if always else 'as released'}": drawn(s, always) == drawn(s, always) for s in (0, 1) for always in (False, True)}
print("; ".join(f"{name}: {'repeats' if same else 'does not repeat'}" for name, same in repeats.items()))

# %%
quick = {"n_steps": 2, "step_255": eps_255 / 8}
tries = [attacks.pgd(attacks.cross_entropy(surface, y), x, at_pool, generators=[generator(*k, r) for k in keys], **quick) for r in range(5)]
with torch.no_grad():
    stood = torch.stack([model(v).argmax(1) == y for v in tries])
worst_adv = torch.stack(tries)[stood.long().argmin(0), torch.arange(len(x))]
rows = [judged("five restarts", v, name, sizes.eps_pool) for v, name in ((tries[0], "pgd-2, one start"), (worst_adv, "pgd-2x5"))]
enter("restart", "five restarts from one start", "Comp-TGA: `attention_map.py:33–35`", *rows, there="toy: it does not restart")
parts = torch.stack([hits[torch.randperm(len(hits), generator=generator(seed, "part", s))[: max(1, len(hits) // 8)]].mean() for s in range(20)])
book.glue("low-part", 100 * parts.min())
book.glue("high-part", 100 * parts.max())

# %% [markdown]
# Five restarts from one start leave {glue:text}`restart-wrong:.0f` percent, from five starts {glue:text}`restart-sound:.0f`, with two steps each.
#
# A seed also chooses images. Twenty seeded subsets of {glue:text}`part-n` images of one pool, one model, one attack: from {glue:text}`low-part:.0f` to
# {glue:text}`high-part:.0f` percent. Where training is random, seeds of the training come on top. State which seed does what, and key
# randomness by image, so that neither batch nor order nor machine matters.
#
# ## All mistakes in one table

# %%
lines = [{"mistake": e["mistake"], "as reported": f"{100 * e['wrong']:.1f}", "sound": f"{100 * e['sound']:.1f}",
          "points (95 %)": book.points(e["diff"]) + ("" if e["paired"] else " *"), "in released code": e["code"].replace("`", ""), "there": e["there"]} for e in ledger]  # fmt: skip
caption = f"Accuracy in percent as the mistake reports it and as a sound evaluation does; {photos.name}, {pgd.label} at ε = {eps_255:g}/255 unless the line or its section says otherwise. Points: paired difference with its 95 % interval. * is no paired difference: for the chosen checkpoint the spread over splits, which is no interval of the mean; for the first images Wilson's interval, which covers their own pool by design."
book.table(lines, caption=caption, card_link=True)

# %%
pairs, kinds = [e for e in ledger if e["paired"]], {e["mistake"].split(" (")[0] for e in ledger}
flattering, harsh = ([e for e in pairs if ok(e["diff"])] for ok in (lambda d: d[1] > 0, lambda d: d[2] < 0))
largest = max(pairs, key=lambda e: abs(e["diff"][0]))
facts = {"sound": 100 * sound.value, "attack": pgd.label, "eps": f"{eps_255:g}", "n": len(x), "draws": sizes.draws, "mistakes": len(kinds), "compared": len(pairs), "n-half": len(few), "splits": len(picked),
         "flattering": len(flattering), "harsh": len(harsh), "largest": f"{book.points(largest['diff'])} points: {largest['mistake']}", "few-n": counts[0],
         "candidates": len(known), "part-n": max(1, len(hits) // 8), "harsh-names": "; ".join(e["mistake"] for e in harsh) or "none here", "quiet": "; ".join(e["mistake"] for e in pairs if e["diff"][1] <= 0 <= e["diff"][2]) or "none"}  # fmt: skip
for name, value in facts.items():
    book.glue(name, value)

# %%
diffs = {e["mistake"].split(" (")[0] + (" (trained)" if "TeCoA" in e["mistake"] else ""): e["diff"] for e in pairs}
fig = plots.paired_bars(diffs, reference="the sound one", quantity="reported accuracy")
book.show(fig, "ledger", alt="One bar for each paired comparison: the reported accuracy minus the sound one, with its interval",
          caption="What each mistake adds to the reported accuracy. A filled dot: the interval excludes zero.")  # fmt: skip

# %% [markdown]
# Most flattering mistakes weaken the attack. Those that report too little ({glue:text}`harsh-names`) are no better: a number that is
# wrong downward hides a defense that works.
#
# Here these cannot be told from none: {glue:text}`quiet`. The sound attack leaves only {glue:text}`sound:.0f` percent, so a weakened
# attack that still wins looks the same. On a larger model, at another budget or with more images they may. A
# test for them is cheap.
#
# ## A battery of checks
#
# `sanity.battery` asks what a sound evaluation must satisfy. Its checks follow {cite}`carlini2019evaluating` and {cite}`athalye2018obfuscated`. Here it
# meets an honest model and four that fool an attack:
#
# - *quantized*: pixels are rounded to eight levels first, a step without a gradient, like the 8-bit pictures inside A-TPT;
# - *saturated*: logits times 40, so that softmax has no slope left, like float16 above;
# - *random*: the views of this page;
# - *batch norm*: left in training mode.


# %%
class Quantized(nn.Module):
    """Rounds pixels to a few levels before the model: no gradient passes."""

    def __init__(self, model, levels=8):
        super().__init__()
        self.model, self.steps = model, levels - 1

    def forward(self, x):
        return self.model((x * self.steps).round() / self.steps)


class Saturated(nn.Module):
    """Large logits: the same answers, no slope."""

    def __init__(self, model, factor=40.0):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x)


# %%
def pair_of(wrapped, **options):
    """A front end around the model, and around what the attacker differentiates."""
    return wrapped(model, **options), wrapped(surface, **options)


specimens = {"honest": (model, surface), "quantized": pair_of(Quantized), "saturated": pair_of(Saturated)}
specimens["random"] = Views(model, seed, "checked"), Views(surface, seed, "checking")
specimens["batch norm"] = tuple(m.train() for m in pair_of(BatchNormed))

# %%
settings = {"eps_255": eps_255, "n_steps": sizes.checked_steps, "n": sizes.checked, "seed": seed, "undefended": model}
checked = {name: sanity.battery(judge, photos, surface=source, transfer_from=surface, **settings) for name, (judge, source) in specimens.items()}
asked = list(dict.fromkeys(check.name for checks in checked.values() for check in checks))
marks = {name: {check.name: check.mark for check in checks} for name, checks in checked.items()}
for name, found in marks.items():
    book.glue(f"fails-{name.replace(' ', '-')}", "; ".join(check for check, mark in found.items() if mark == "✗") or "none")
book.table([{"check": check} | {name: found.get(check, "–") for name, found in marks.items()} for check in asked],
           caption=f"The battery on five models, {photos.name}, n = {min(sizes.checked, len(photos))}, PGD-{sizes.checked_steps}, ε = {eps_255:g}/255. ✗: the check fails.", card_link=True)  # fmt: skip

# %%
book.sanity_table(checked["saturated"])

# %% [markdown]
# Checks that fail: honest, {glue:text}`fails-honest`; quantized, {glue:text}`fails-quantized`; saturated, {glue:text}`fails-saturated`; random,
# {glue:text}`fails-random`; batch norm, {glue:text}`fails-batch-norm`.
#
# The honest model may fail one, too: if twice the steps still help, the attack was too short, and the check is about the attack.
#
# No single check finds them all. A masked gradient shows in zeros, in a budget that should win and does not, and in images
# from another model that do better. Randomness and leaks show without any attack.
#
# A failed check does not say that a model is weak. It says that its number means nothing yet. A passed battery does not prove the
# reverse: every chapter on a defense runs it *and* an attack made for that defense.
#
# In your own code, with an `ImageSet` of images and labels (`data.load`, or a folder of your own):
# `sanity.battery(model, images, eps_255=4, undefended=plain)`. Each entry has a name, a mark, a number and a reason.
#
# ## Exercises
#
# A solution is folded under each; the line at its end checks it, and yours.
#
# **1 (easy).** Write `worst_case(right)`: from verdicts of several attacks on the same images, the accuracy that is left.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def worst_case(right):
    """right [A, N] (bool): A attacks, N images -> share of images that no attack turns."""
    return right.all(dim=0).float().mean()


exercises.check_worst_case(worst_case)

# %% [markdown]
# **2 (maths).** For verdicts $a_i$, $b_i$ on the same images show that the variance of $\bar a - \bar b$ is
# $\big(\mathrm{var}(a) + \mathrm{var}(b) - 2\,\mathrm{cov}(a, b)\big)/n$. Write its root, `paired_error(a, b)`. When is pairing of no
# use?


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def paired_error(a, b):
    """a, b [N] (bool) -> standard error of mean(a) - mean(b)."""
    d = a.double() - b.double()
    return d.std() / len(d) ** 0.5


exercises.check_paired_error(paired_error)

# %% [markdown]
# **3 (open).** Break the quantized model. Write `unmasked(masked)`, a module for the attacker to differentiate in its place: the
# forward pass may stay as it is, the backward pass must find a way (BPDA {cite}`athalye2018obfuscated`). Can a defender quantize
# so that yours fails?


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
class StraightThrough(nn.Module):
    """Rounds on the way forward, and is the identity on the way back."""

    def __init__(self, masked):
        super().__init__()
        self.masked = masked

    def forward(self, x):
        steps = self.masked.steps
        rounded = (x * steps).round() / steps
        return self.masked.model(x + (rounded - x).detach())


exercises.check_unmasked(StraightThrough, specimens["quantized"][0], few, eps_255=eps_255)

# %% [markdown]
# ## Takeaways
#
# - The same undefended model: {glue:text}`sound:.0f` percent soundly, {glue:text}`unit-wrong:.0f` with ε behind the normalization,
#   {glue:text}`never-wrong:.0f` without an attack. None of them raised an error.
# - Keep ε in pixels, gradients out of float16, the best iterate, and the audit on.
# - Attack a random or adapting defense through what it does, and judge it on fresh draws and after a reset.
# - Print n, an interval and a paired difference. Choose before you look.
# - Run the battery. It costs less than one wrong table.
#
# Next: [chapter 04](04_tga_zsr.py) evaluates a trained defense by these rules.

# %%
book.footer(run)

# %% [markdown]
# ## References
#
# The works cited here stand on the [bibliography page](../book/bibliography.md).
