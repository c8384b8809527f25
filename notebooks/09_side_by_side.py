# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Side by side: every CLIP defense of the book, one model, one set of images
#
# *Each chapter asked one paper's question on that paper's terms. This page asks one question of all of them: what is left when
# the attacker knows the defense, and what does an answer cost?*
#
# [Colab](https://colab.research.google.com/github/robustvlm-lite/robustvlm_lite/blob/main/notebooks/09_side_by_side.ipynb) ·
# [source](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/notebooks/09_side_by_side.py) ·
# [paper](https://arxiv.org/abs/1902.06705) ·
# [result card](https://github.com/robustvlm-lite/robustvlm_lite/tree/main/book/cards) ·
# CPU: 3 minutes (tiny)

# %% [markdown]
# ## At a glance
#
# | | |
# |---|---|
# | Question | which defense leaves most in the worst case, at what price, and do defenses add up? |
# | Model and images | one bundled CLIP, {glue:text}`n` images of {glue:text}`task`, the same for everybody |
# | Budget | ε = {glue:text}`eps`/255, ℓ∞, every attacked image on the 8-bit grid |
# | Candidates | {glue:text}`count` of chapters [04](04_tga_zsr.py) to [07](07_a_tpt.py), and {glue:text}`mixed` combinations that no paper tried |
# | Attackers | one who knows CLIP alone; one who knows that there is a robust tower; those who go through the defense itself |
# | Found on this page | the oblivious attack leaves CLIP {glue:text}`oblivious-CLIP:.0f` percent and {glue:text}`oblivious-best` {glue:text}`oblivious-most:.0f`; in the worst case {glue:text}`worst-best` leads with {glue:text}`worst-most:.0f`; of the pairs that either order tells apart, {glue:text}`order:.0f` percent keep their order |

# %% tags=["parameters"]
profile: str = "tiny"  # "tiny": laptop, 3 minutes | "small": real image packs
seed: int = 0  # test images, views and attack starts derive from it
eps_255: float = 0.0  # budget of the attacks in steps of 1/255; 0 takes the profile's
n: int = 0  # test images; 0 takes the profile's number
device: str = ""  # "" chooses; "cuda" without a GPU is an error
data_root: str = ""  # folder of the image packs (small)

# %%
import importlib.util
import math
import subprocess
import sys

import torch

if importlib.util.find_spec("robustvlm_lite") is None:  # on Colab
    subprocess.run(["git", "clone", "-q", "https://github.com/robustvlm-lite/robustvlm_lite"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--system", "-e", "."]
    subprocess.run(install, cwd="robustvlm_lite", check=True)
    sys.path.insert(0, "robustvlm_lite")

from robustvlm_lite import attacks, book, defenses, evaluate
from robustvlm_lite.attacks import renamed
from robustvlm_lite.book import exercises_side_by_side as exercises
from robustvlm_lite.book import side_by_side as side
from robustvlm_lite.data import few_shot
from robustvlm_lite.plots import accuracy_vs_eps, captioned, comparison, paired_bars
from robustvlm_lite.runtime import generator
from robustvlm_lite.threat import ThreatModel, audit

run = book.start("09_side_by_side", profile=profile, seed=seed, device=device, data_root=data_root, eps_255=eps_255, n=n)
eps_255, sizes = run.parameters["eps_255"], run.sizes
clip, threat = run.load_clip(), ThreatModel(eps_255)

# %% [markdown]
# ## Before you start
#
# You need the idea of each defense, which its own chapter tells, and the difference between an attacker who knows a defense
# and one who does not ([chapter 03](03_sound_evaluation.py)). You will be able to compare defenses without favoring one, and to say
# what a cost buys. Reading takes about 20 minutes.
#
# ## See the problem first
#
# One photograph, four times. Each copy differs from the first by at most {glue:text}`eps` gray levels, and each was made
# to fool another model.

# %%
task = book.images(run, sizes.test)
settings = {"n_views": sizes.views, "few": sizes.few, "steps": sizes.eot_steps, "spec": sizes.specs[0]}
line = {"CLIP": side.static("CLIP", "undefended", defenses.Defense(clip), task, sizes.specs)}
for kind, names in (("robust training", sizes.trained), ("prompt tuning", sizes.prompts)):
    line |= {m: side.static(m, kind, defenses.load_defense(m, clip), task, sizes.specs) for m in names}
line |= {m: side.at_test_time(m, "at test time", clip, m, task, **settings) for m in sizes.test_time}

# %%
pgd, keys = attacks.get_attack(sizes.specs[0]), [(seed, task.name, "problem", i) for i in range(min(16, len(task)))]
x, y = task.pixels(slice(0, len(keys))).to(run.device), task.labels[: len(keys)].to(run.device)
SHOWN = {"made on CLIP": "CLIP", "made on the ensemble": "View ensemble", "made on TeCoA": "TeCoA"}
copies = {"clean": x}
for head, m in SHOWN.items():
    attack, surface = list(line[m].ways.values())[1 if m == "View ensemble" else 0]
    copies[head] = attack.run(surface.streaming(keys) if hasattr(surface, "streaming") else surface, x, y, threat, keys)
    audit(x, copies[head], threat)
with torch.no_grad():
    said = {(head, m): evaluate.for_images(line[m].model, task, range(len(x)), seed)(images).argmax(1)
            for head, images in copies.items() for m in SHOWN.values()}  # fmt: skip
telling = [sum(bool(said[head, m][i] != y[i]) == (SHOWN.get(head) == m) for head in copies for m in SHOWN.values()) for i in range(len(x))]
first = max(range(len(x)), key=telling.__getitem__)
texts = [f"{head}. " + " ".join(f"{m}: {task.class_names[said[head, m][first]]}." for m in SHOWN.values()) for head in copies]
fig = captioned(torch.stack([images[first].cpu() for images in copies.values()]), texts, columns=2)
book.show(fig, "problem", alt="One photograph clean and in three attacked copies that look alike, with the answers of CLIP, of a view ensemble and of TeCoA below each",
          caption=f"Image {first} of {task.name}, a {task.class_names[int(y[first])]}: what CLIP, the view ensemble and TeCoA say to each copy. ε = {eps_255:g}/255.")  # fmt: skip

# %% [markdown]
# An attack is made for one model. Whether another model falls for it too says little about how that other model would fare if it were the
# target. That is the whole difficulty of a fair comparison, and the reason why every candidate here meets attacks of its own.
#
# ## The candidates
#
# Four kinds stand in line. *Robust training* changes the image tower once, and answers with one pass. *Prompt tuning* leaves the
# tower and learns what stands beside the image or the words. Defenses *at test time* train nothing and pay at every image.
# *Combinations* put one of these on top of another.
#
# All come from the checkpoints that ship with the book. Nothing is tuned for this page but the prompts of the combinations, and those say so.
#
# Robust training took photographs and rendered scenes, attacked at 2/255. APT and CAPT sit on TeCoA's tower, as CAPT's protocol
# asks, and were tuned at 2/255. FAP and CBA-FAPT sit on the undefended tower and were tuned at 1/255, as theirs asks.
#
# That is not the same help for everybody, and no rule could make it so: what a method is allowed to change *is* the method. FT-clean is
# a control. It was trained on the same images as the robust towers, without an attack.

# %%
book.table([{"method": c.name, "kind": c.kind, "attacks of its own": ", ".join(c.ways)} for c in line.values()],
           caption=f"Who competes, and how each is attacked besides what everybody is shown. eot: {sizes.eot_steps} steps through {sizes.few} fresh views each.")  # fmt: skip

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape | name in code |
# |---|---|---|---|
# | $x$, $y$ | image, label | `[N, 3, S, S]`, `[N]` | `task` |
# | $f_d$ | the classifier of defense $d$ | | `candidate.model` |
# | $x^a_d$ | image that attack $a$ made through $d$ | `[N, 3, S, S]` | `crafted` |
# | $c_{a,i}$ | is image $i$ still right under attack $a$? | `[K, N]` | `correct` |
# | $w_d$ | accuracy in the worst case | scalar | `worst` |
#
# ## What everybody is shown
#
# Three sets of attacked images are made once and shown to all: PGD on undefended CLIP, which is the *oblivious* attack of most
# papers; PGD on TeCoA, by an attacker who guesses that some robust tower is behind the answer; and a long attack through the view ensemble,
# by one who guesses that views are.

# %%
shared = {f"{sizes.specs[0]} on {m}": side.crafted(run, pgd, line[m].ways[sizes.specs[0]][1], task, eps_255, f"shown, {m}") for m in ("CLIP", "TeCoA")}
through = attacks.expectation(sizes.long_steps)
shared["long, on views"] = side.crafted(run, through, line["View ensemble"].ways["eot"][1], task, eps_255, "shown, views")
levels = torch.stack([255 * images for images in shared.values()])
moved = max((images - task.pixels()).abs().max().item() for images in shared.values())
assert torch.allclose(levels, levels.round(), atol=1e-3) and 255 * moved <= eps_255 + 1e-3
print(f"every attacked value is one of 256 gray levels; none moved by more than {255 * moved:.2f} of them")

# %% [markdown]
# All attacked images on this page are stored as 8-bit images and judged as such. What floats can do and a picture file cannot does not
# count here. [Chapter 03](03_sound_evaluation.py) shows how rounding by truncation flatters a defense; here values are rounded to the
# nearest level inside the budget.
#
# An image that a model already gets wrong when clean counts as lost in the worst case, even where an attack happens to mend it: an
# attacker may do nothing.
#
# ## An attacker who knows
#
# Models that always answer alike are attacked straight through: cross-entropy (PGD), the margin to the best wrong class (CW), and
# AutoPGD {cite}`croce2020autoattack`, which chooses its own steps.
#
# A defense at test time draws new views for each question. The attacker draws views too, fresh ones in every step, and follows the
# mean gradient: expectation over transformations {cite}`athalye2018obfuscated`. The views of the verdict are drawn from other keys, so
# nobody can fit them. Written out:


# %%
def my_eot(model, x, y, n_steps, keys):
    """PGD with steps of ε/4 that sees other views in each step; the last iterate."""
    x_adv = x + threat.eps * torch.stack([2 * torch.rand(x.shape[1:], generator=generator(*k)) - 1 for k in keys]).to(x)
    for step in range(n_steps):
        x_adv = x_adv.clamp(0, 1).detach().requires_grad_()
        seen = model.keyed([(*k, "my step", step) for k in keys])
        loss = torch.nn.functional.cross_entropy(seen(x_adv), y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, x_adv)
        x_adv = x + (x_adv + threat.eps / 4 * slope.sign() - x).clamp(-threat.eps, threat.eps)
    return x_adv.clamp(0, 1).detach()


mine = my_eot(line["View ensemble"].ways["eot"][1], x, y, sizes.eot_steps, keys)
audit(x, mine, threat)
with torch.no_grad():
    left = [(evaluate.for_images(line["View ensemble"].model, task, range(len(x)), seed)(images).argmax(1) == y).sum().item() for images in (x, copies["made on CLIP"], mine)]
print(f"view ensemble, {len(x)} images: {left[0]} right when clean, {left[1]} under the attack on CLIP, {left[2]} under my_eot")

# %% [markdown]
# Where a prompt is tuned for each image, the step is a sign, whose gradient is zero. One more attack gives it a slope (`eot, step`);
# [chapter 07](07_a_tpt.py) shows why. And each of these defenses also meets a plain attack on the tower behind it.
#
# ## The worst case
#
# $$w_d = \frac{1}{N}\sum_i \prod_a c_{a,i}$$
#
# An image counts if it survives *every* attack. The attacker, after all, may choose anew for each image.
#
# The mean over attacks would reward a method for each weak attack in the list, and the strongest single attack still forgets that
# images differ.
#
# The price of the worst case is a bias: the more attacks a method meets, the lower it can fall. So the lists are of like length, and the
# [control](fair-draws) below asks what chance alone would take.

# %%
rows, worst = {}, {}
for m, candidate in line.items():
    rows[m], worst[m] = side.besieged(run, candidate, task, shared, eps_255)


def my_worst(found):
    """AND for each image over all that it was shown, itself included."""
    correct = torch.stack([torch.from_numpy(r.records.sort_by("index")["correct"].to_numpy(zero_copy_only=False)) for r in found])
    return correct.all(0).float().mean().item()


assert all(math.isclose(my_worst(rows[m]), worst[m].value, abs_tol=1e-6) for m in line)
print(f"{sum(len(r) - 2 for r in rows.values())} attacked accuracies, {len(task)} images each")

# %%
OBLIVIOUS = next(iter(shared))
stage = {m: {"clean": r[0], "attack on CLIP": next(row for row in r if row.attack == OBLIVIOUS), "worst case": worst[m]} for m, r in rows.items()}
points = {m: {head: (row.value, *row.ci95) for head, row in heads.items()} for m, heads in stage.items()}
kinds = {}
for m, candidate in line.items():
    kinds.setdefault(candidate.kind, []).append(m)
fig = comparison.stages(points, quantity="accuracy (%)", groups=kinds)
book.show(fig, "stages", alt="For every method three points: accuracy on clean images, under an attack on undefended CLIP, and in the worst case over all attacks",
          caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255, {sizes.views} views; chance {100 / len(task.class_names):.0f} %. Bars: 95 % intervals.")  # fmt: skip

# %%
strongest = {m: min((row for row in r if row.attack not in ("none", "unchanged")), key=lambda row: row.value) for m, r in rows.items()}
lines = [{"method": m} | {head: book.tables.with_interval(row.value, row.ci95) for head, row in heads.items()} | {"strongest alone": f"{strongest[m].attack}: {100 * strongest[m].value:.0f}"} for m, heads in stage.items()]
for m, heads in stage.items():
    for head, row in zip(("clean", "oblivious", "worst"), heads.values(), strict=True):
        book.glue(f"{head}-{m}", 100 * row.value)
for head, name in (("oblivious", "attack on CLIP"), ("worst", "worst case")):
    top = max(stage, key=lambda m: stage[m][name].value)
    book.glue(f"{head}-best", top)
    book.glue(f"{head}-most", 100 * stage[top][name].value)
for name, value in (("n", len(task)), ("task", task.name), ("eps", f"{eps_255:g}"), ("count", len(line)), ("mixed", len(sizes.stacked) + len(sizes.tuned_on))):
    book.glue(name, value)
book.table(lines, caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255: percent with 95 % intervals, and the single attack that leaves least.")

# %% [markdown]
# Read the gap between the middle and the last point. Where it is wide, the method's published kind of evaluation measures how badly an
# attack on CLIP carries over to it. The view ensemble falls from {glue:text}`oblivious-View ensemble:.0f` to
# {glue:text}`worst-View ensemble:.0f` percent, R-TPT from {glue:text}`oblivious-R-TPT:.0f` to {glue:text}`worst-R-TPT:.0f`, A-TPT as released from
# {glue:text}`oblivious-A-TPT (released):.0f` to {glue:text}`worst-A-TPT (released):.0f`; TeCoA from {glue:text}`oblivious-TeCoA:.0f` to
# {glue:text}`worst-TeCoA:.0f`.
#
# An oblivious attack on a robust tower is just as mild: it was made for other weights. The column is not wrong. It answers a question
# that an attacker does not ask.
#
# The last column of the table names the attack that does most by itself.
#
# Where a method at test time is hurt most by the plain
# attack on its tower, or by the long attack on other views, the short ones through itself have not converged: every step costs as much as
# many images. Such a figure can only come down, and no rank near the top is safe.
#
# ## Does the order survive?
#
# A ranking is what most readers take home. Take all pairs of methods that either ranking tells apart, and count how many stand
# the same way round in both.

# %%
ranked = {head: {m: heads[name].value for m, heads in stage.items()} for head, name in (("oblivious", "attack on CLIP"), ("worst", "worst case"))}
kept, pairs = side.order_kept(ranked["oblivious"], ranked["worst"])
book.glue("order", 100 * kept / pairs)
book.glue("pairs", pairs)
sure = sum(not d[1] <= 0 <= d[2] for d in (evaluate.paired(worst[a].records, worst[b].records) for a in line for b in line if a < b))
book.glue("sure-pairs", 100 * sure / math.comb(len(line), 2))
print(f"{kept} of {pairs} pairs keep their order; in the worst case the 95 % interval of {sure} of {math.comb(len(line), 2)} pairs excludes zero")

# %% [markdown]
# {glue:text}`order:.0f` percent of {glue:text}`pairs` pairs keep their order; a coin would keep half. And only {glue:text}`sure-pairs:.0f` percent of all
# pairs differ in the worst case by more than these images can blur. The rest is no ranking at all.
#
# So compare with one reference, in pairs, on the same images. TeCoA is the plainest robust tower:

# %%
others = [m for m in line if m not in ("CLIP", "TeCoA")]
versus = {m: evaluate.paired(worst[m].records, worst["TeCoA"].records) for m in others}
fig = paired_bars(versus, reference="TeCoA", quantity="worst case")
book.show(fig, "versus", alt="Paired differences in worst-case accuracy between each method and TeCoA, with intervals and a zero line",
          caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255: difference to TeCoA on the same images, 95 % paired interval.")  # fmt: skip
better = [m for m, d in versus.items() if d[1] > 0]
worse = [m for m, d in versus.items() if d[2] < 0]
book.glue("better", ", ".join(better) or "no method")
book.glue("worse", ", ".join(worse) or "no method")

# %% [markdown]
# Measurably above TeCoA: {glue:text}`better`. Measurably below: {glue:text}`worse`. Whoever is in neither list cannot be told from it with so few
# images, which is no proof of being alike.
#
# ## Larger budgets
#
# Every curve must fall to chance as the budget grows. One that stays up has not been attacked. Each method here meets the first attack
# of its own list that goes through it.

# %%
FEW = [m for m in ("CLIP", "View ensemble", "TeCoA", "TGA-ZSR") if m in line]
curve = []
for m in FEW:
    way = "eot" if "eot" in line[m].ways else sizes.specs[0]
    for eps in sizes.eps_grid:
        attack, surface = line[m].ways[way]
        images = side.crafted(run, renamed(attack, "own attack"), surface, task, eps, f"own, {m}")
        curve.append(book.measure_images(run, m, line[m].model, task, images, "own attack", eps))
    curve.append(rows[m][0])
fig = accuracy_vs_eps(curve, chance=1 / len(task.class_names), order=FEW)
book.show(fig, "budgets", alt="Accuracy of CLIP, the view ensemble, TeCoA and TGA-ZSR under an attack through each, against the budget, down to chance",
          caption=f"{task.name}, n = {len(task)}: one attack through each model, at growing budgets; bands are 95 % intervals.")  # fmt: skip

# %% [markdown]
# Robust training buys a shift of the curve to the right. It does not change where the curve ends.
#
# At the largest budget of this figure the picture is visibly spoiled, and the smallest one already fools the undefended model. What
# lies between is where a defense can matter. A method that was trained at one budget is not owed anything beyond it.
#
# ## What an answer costs
#
# Seconds were taken in turn, one batch of clean images a round. Memory is what tensors hold at once during an answer, weights
# apart, divided by the batch. Training costs once and stands in the chapters; what is here comes with every image for as long as the model
# is in use.

# %%
priced = side.prices(run, list(line.values()), task.take(range(min(8, len(task)))))
for m in ("CLIP", "TeCoA", "View ensemble", "A-TPT (released)"):
    book.glue(f"cost-{m}", priced[m].seconds[0] / priced["CLIP"].seconds[0])
side.price_table(priced, caption=f"Of one clean image, {len(task.class_names)} classes, {sizes.views} views. class texts: prompts through the text tower.")

# %%
HUES = {"undefended": "#000000", "robust training": "#0072B2", "prompt tuning": "#009E73", "at test time": "#D55E00", "combined": "#CC79A7"}
gain = {m: (1000 * priced[m].seconds[0], worst[m].value) for m in line}
best = side.front(gain)
scatter = {m: (cost, value, *worst[m].ci95) for m, (cost, value) in gain.items()}
fig = comparison.cost_front(scatter, best, cost="milliseconds an image", quantity="worst case (%)", hues={m: HUES[c.kind] for m, c in line.items()})
book.show(fig, "front", alt="Milliseconds an image on a logarithmic axis against worst-case accuracy, one point a method, the front drawn as steps",
          caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255, this machine. Filled and bold: no other method is cheaper and at least as robust.")  # fmt: skip
book.glue("front", ", ".join(best))

# %% [markdown]
# The ensemble costs {glue:text}`cost-View ensemble:.0f` times what CLIP costs, A-TPT as released {glue:text}`cost-A-TPT (released):.0f` times,
# TeCoA {glue:text}`cost-TeCoA:.1f` times. On the front stand {glue:text}`front`. Points with one pass differ in time by the machine's noise
# alone; read those next to each other as one cost.
#
# ## Do defenses add up?
#
# No paper put its defense on another's. Four questions, each with its parents beside it:
#
# - Do views help a robust tower? The ensemble and A-TPT stand in front of TeCoA and TGA-ZSR.
# - Does TGA-ZSR's tower carry prompts better than TeCoA's? APT is tuned live on both, shortened, with the same shots, steps and rate.
# - Do CBA-FAPT's maps hold on CAPT's tower? CBA-FAPT is tuned live on TeCoA, which is CAPT's tower and its teacher, shortened. One
#   loss with CAPT's consistency *and* CBA's maps would be a new method, and is not built here.

# %%
def on_tower(method, base):
    """A method of the line in front of the tower that `base` trained."""
    return side.at_test_time(f"{method} on {base}", "combined", defenses.load_defense(base, clip).clip, method, task, **settings)


def tuned_on(method, base):
    """Prompts tuned here, in few steps, on the tower that `base` trained."""
    carrier, shots = defenses.load_defense(base, clip).clip, few_shot(run.load(sizes.shots_of, "train"), sizes.shots, 1)
    defense = book.tune(run, method, carrier, shots, 1, label=f"{method} on {base}")
    return side.static(f"{method} on {base}", "combined", defense, task, sizes.specs)


mixed = [on_tower(*pair) for pair in sizes.stacked] + [tuned_on(*pair) for pair in sizes.tuned_on]
for candidate in mixed:
    rows[candidate.name], worst[candidate.name] = side.besieged(run, candidate, task, shared, eps_255)

# %%
parents = {c.name: c.name.split(" on ") for c in mixed}
lines = []
for name, pair in parents.items():
    diffs = [evaluate.paired(worst[name].records, worst[p].records) for p in pair]
    lines.append({"combination": name, "clean": 100 * rows[name][0].value, "worst case": book.tables.with_interval(worst[name].value, worst[name].ci95),
                  "to the method alone": book.tables.points(diffs[0]), "to its tower alone": book.tables.points(diffs[1])})  # fmt: skip
    book.glue(f"sum-{name}", book.compared(diffs[1]))
book.table(lines, formats={"clean": ".1f"}, caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255, all attacks of both parents' kinds; differences in points with 95 % paired intervals.")

# %%
shown = {name: {head: (row.value, *row.ci95) for head, row in (("clean", rows[name][0]), ("attack on CLIP", next(r for r in rows[name] if r.attack == OBLIVIOUS)), ("worst case", worst[name]))}
         for name in (*dict.fromkeys(p for pair in parents.values() for p in reversed(pair)), *parents)}  # fmt: skip
groups = {"alone": [m for m in shown if m not in parents], "combined": list(parents)}
book.show(comparison.stages(shown, quantity="accuracy (%)", groups=groups), "sums",
          alt="Three points for each combination and for what it is made of: clean, under the attack on CLIP, and in the worst case",
          caption=f"{task.name}, n = {len(task)}: combinations below what they are made of.")  # fmt: skip

# %% [markdown]
# The ensemble on TeCoA keeps {glue:text}`sum-View ensemble on TeCoA` TeCoA alone, A-TPT on TGA-ZSR {glue:text}`sum-A-TPT (released) on TGA-ZSR`
# TGA-ZSR alone, each in the worst case. APT on TGA-ZSR keeps {glue:text}`sum-APT on TGA-ZSR` its tower, APT on TeCoA
# {glue:text}`sum-APT on TeCoA`, CBA-FAPT on TeCoA {glue:text}`sum-CBA-FAPT on TeCoA`.
#
# What a combination adds to its *test-time* parent is the tower. What it adds to its tower is the question, and it has to pay for
# views at every image.
#
# A combination also gives the attacker more to choose from: everything that works against the tower alone is tried on it as well. That is why the
# attack on the tower stays in the list of each method at test time.
#
# The prompts of this section are shortened: they show whether the direction is worth a longer run, not what such a run would reach. Their
# parents in the table are the shipped files, tuned for as long as their chapters state.
#
# (fair-draws)=
# ## Is a random verdict fair?
#
# A random defense may fail by chance when asked often. Here each image has one draw for all verdicts, so attacks cannot add up
# chances. The control asks *clean* images as often as they were attacked, with fresh draws each time.

# %%
lines = []
for m in sizes.test_time:
    if hasattr(line[m].model, "keyed"):
        k = len(shared) + len(line[m].ways)
        lines.append({"method": m, "draws": k, "clean, one draw": 100 * rows[m][0].value, "clean, right in all": 100 * book.always_right(run, line[m].model, task, k), "worst case": 100 * worst[m].value})
book.table(lines, formats=dict.fromkeys(("clean, one draw", "clean, right in all", "worst case"), ".1f"), caption=f"{task.name}, n = {len(task)}: what chance alone would take, percent.")

# %% [markdown]
# Where the last column lies far below the one before it, the loss is the attack's doing and not chance.
#
# (verdict-sbs)=
# ## Our own claims
#
# Three statements that this page invites, decided by rules as the papers' are. A claim of ours that fails is shown like one of theirs.

# %%
book.claims_table("09_side_by_side", card=run.card)

# %% [markdown]
# ## What we would deploy, and when
#
# - *The attacker can see or guess the weights.* These images rank nothing for sure between robust towers and views; on the front stand
#   {glue:text}`front`. We would take a robust tower all the same: one pass, the same answer tomorrow, gradients that an honest test can
#   use. A figure that rests on views is only as good as affordable attacks.
# - *Few labeled images of the own task.* Tune prompts on a robust tower, and check that the worst case rises, not the oblivious column.
# - *Nobody can attack the model itself, but images come damaged or attacked for other models.* A plain view ensemble is the one to beat; a
#   tuned prompt has to earn its cost above it.
# - *Clean accuracy is all that counts.* Leave CLIP as it is, and say so.
#
# ## What nobody should conclude
#
# - That these orders hold for ViT-B/16 at 224 pixels: one small tower was measured, at one budget, with one training seed of each method.
# - That a method is robust because its bar is high here: {glue:text}`n` images and these attacks bound it from above, never from below.
# - That methods trained at other budgets, on other data, with more steps would stand in the same order.
# - That the papers are wrong: their claims are judged in their own chapters, under their own attack.
#
# Every row of every committed card, with filters for method, data set, attack and ε, stands on the [results page](../book/results.md).
#
# ## Exercises
#
# A solution is folded under each; the line at its end checks it, and yours.
#
# **1 (easy).** Write `survivors(correct)`: from verdicts `[K, N]` of K attacks on N images, the share that survives all.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def survivors(correct):
    """[K, N] -> a share."""
    return correct.all(dim=0).float().mean()


exercises.check_worst(survivors)

# %% [markdown]
# **2 (maths).** How many images does a 95 % interval of ± `half` about a share take? Write `needed(share, half)` with the normal
# approximation, and see what it says of this page's n.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def needed(share, half):
    """1.96 * sqrt(p (1 - p) / n) <= half, solved for n."""
    return math.ceil(share * (1 - share) * (1.96 / half) ** 2)


exercises.check_needed(needed)
print(f"half the width with {len(task)} images about one half: {98 * len(task) ** -0.5:.0f} points; one point would take {needed(0.5, 0.01)}")

# %% [markdown]
# **3 (open).** Write `undominated(points)`: names of (cost, gain) pairs that no other beats, cheapest first. Then add a method of
# your own to `line`, and see whether it reaches the front.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def undominated(points):
    """Cheapest first; a point stays if it gives more than all that cost no more."""
    kept, most = [], -math.inf
    for name in sorted(points, key=lambda m: (points[m][0], -points[m][1])):
        if points[name][1] > most:
            kept.append(name)
            most = points[name][1]
    return kept


exercises.check_front(undominated)

# %% [markdown]
# ## Takeaways
#
# - Under an attack on undefended CLIP {glue:text}`oblivious-best` keeps most; in the worst case {glue:text}`worst-best` does. Only
#   {glue:text}`order:.0f` percent of the pairs keep their order.
# - A robust tower costs one pass; an answer from views costs {glue:text}`cost-View ensemble:.0f` times as much and falls to
#   {glue:text}`worst-View ensemble:.0f` percent when the attacker draws views, too.
# - Count an image only if it survives every attack, on 8-bit pictures, with verdict draws that no attack has seen.
# - Say how many images: with {glue:text}`n`, {glue:text}`sure-pairs:.0f` percent of the pairs differ beyond doubt.
#
# On your own images: `robustvlm evaluate --data DIR --defense NAME --attack pgd --eps-255 2`.

# %%
book.footer(run)

# %% [markdown]
# ## References
#
# The works cited here stand on the [bibliography page](../book/bibliography.md).
