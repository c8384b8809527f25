# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Side by side: the CLIP defenses of the book, one model, one set of images
#
# *Each chapter asked one paper's question on that paper's terms. This page asks one question of many of them: what is left when
# the attacker knows the defense, and what does an answer cost?*
#
# [Colab](https://colab.research.google.com/github/robustvlm-lite/robustvlm_lite/blob/main/notebooks/09_side_by_side.ipynb) ·
# [source](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/notebooks/09_side_by_side.py) ·
# [paper](https://arxiv.org/abs/1902.06705) ·
# [result card](https://github.com/robustvlm-lite/robustvlm_lite/tree/main/book/cards) ·
# CPU: 4 minutes (tiny)

# %% [markdown]
# ## At a glance
#
# | | |
# |---|---|
# | Question | which defense leaves most in the worst case, at what price, and do defenses add up? |
# | Model and images | one bundled CLIP, {glue:text}`n` images of {glue:text}`task`, the same for everybody |
# | Budget | ε = {glue:text}`eps`/255, ℓ∞, every attacked image on the 8-bit grid |
# | Candidates | {glue:text}`count` of chapters [04](04_tga_zsr.py) to [07](07_a_tpt.py), and {glue:text}`mixed` combinations; left out for their cost: {glue:text}`left-out` |
# | Attackers | one who knows CLIP alone; one who knows that there is a robust tower; those who go through the defense itself |
# | Found on this page | the oblivious attack leaves CLIP {glue:text}`oblivious-CLIP:.0f` percent and {glue:text}`oblivious-best` {glue:text}`oblivious-most:.0f`; of the single methods {glue:text}`worst-best` keeps most in the worst case, {glue:text}`worst-most:.0f`, and of the combinations {glue:text}`mixed-best`, {glue:text}`mixed-most:.0f` |

# %% tags=["parameters"]
profile: str = "tiny"  # "tiny": laptop | "small": real image packs
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
from dataclasses import replace

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
from robustvlm_lite.plots import accuracy_vs_eps, comparison, paired_bars
from robustvlm_lite.runtime import chapters, generator
from robustvlm_lite.threat import ThreatModel, audit, to_8bit

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
settings = {name: getattr(sizes, name) for name in ("few", "specs", "long_steps", "short_steps", "short")} | {"n_views": sizes.views}
line = {"CLIP": side.static("CLIP", "undefended", defenses.Defense(clip), task, sizes.specs)}
for kind, names in (("control", sizes.controls), ("robust training", sizes.trained), ("prompt tuning", sizes.prompts)):
    line |= {m: side.static(m, kind, defenses.load_defense(m, clip), task, sizes.specs) for m in names}
line |= {m: side.at_test_time(m, "at test time", clip, m, task, **settings) for m in sizes.test_time}

# %%
ASKED = {"CLIP": sizes.specs[0], "View ensemble": "long", "TeCoA": sizes.specs[0]}  # who is shown, and the attack on it
copies = {"clean": task.pixels()} | {f"made on {m}": side.made_through(run, line[m], way, task, eps_255) for m, way in ASKED.items()}
with torch.no_grad():
    said = {(head, m): evaluate.for_images(line[m].model, task, range(len(task)), seed)(images.to(run.device)).argmax(1).cpu()
            for head, images in copies.items() for m in ASKED}  # fmt: skip
wrong = {key: answer != task.labels for key, answer in said.items()}
fits = sum((w == (head == f"made on {m}")).int() for (head, m), w in wrong.items())
first = int(fits.argmax())
answers = {head: {m: (task.class_names[said[head, m][first]], not wrong[head, m][first]) for m in ASKED} for head in copies}
fig = comparison.copies(torch.stack([images[first] for images in copies.values()]), answers)
lost = "; ".join(f"{head} " + ", ".join(f"{m} {int(wrong[head, m].sum())}" for m in ASKED) for head in copies)
book.show(fig, "problem", alt="One photograph clean and in three attacked copies that look alike, beside each the answers of CLIP, of a view ensemble and of TeCoA with a mark for right or wrong",
          caption=f"A {task.class_names[int(task.labels[first])]}: of {len(task)} images the one that comes nearest to this: each copy fools the model that it was made on, and no other; {int((fits == fits.max()).sum())} came as near. Wrong answers among all {len(task)}: {lost}. ε = {eps_255:g}/255.")  # fmt: skip

# %% [markdown]
# An attack is made for one model. Whether another model falls for it too says little about how that other model would fare if it were the
# target. That is why a fair comparison is hard, and why every candidate here meets attacks of its own.
#
# One picture is a story; the counts below it are what the rest of the images say.
#
# ## The candidates
#
# Five kinds stand in line. *Robust training* changes the image tower once, and answers with one pass. *Prompt tuning* leaves the
# tower and learns what stands beside the image or the words. Defenses *at test time* train nothing and pay at every image.
# *Combinations* put one of these on top of another.
#
# FT-clean is a *control*: trained on the images of the robust towers, without an attack.
#
# All come from the files that ship with the book. Nothing is tuned for this page but the prompts of the combinations, and those say so.
#
# Robust training took photographs and rendered scenes, attacked at 2/255. APT and CAPT sit on TeCoA's tower, as CAPT's protocol
# asks, and were tuned at 2/255. FAP and CBA-FAPT sit on the undefended tower and were tuned at 1/255, as theirs asks.
#
# CLIP and robust towers answer from the mean of the set's templates, defenses at test time and learned prompts from "a photo of a". A
# difference between a combination and its tower is one of both.
#
# They did not have the same help. The robust towers and FT-clean saw all training images of `photos/caltech`, prompts
# {glue:text}`shots` labeled shots of each of its classes; its test images are what `tiny` asks. Defenses at test time saw no label at all. No rule could make that equal: what a method is allowed to change *is* the method.
#
# A-TPT as released carries state: the class texts that one image leaves behind guide the views of the next. So its
# answer to an image depends on the image before. Here every measurement begins without state, and the attacker's copy never has any.
#
# Many names of the book are left out, because each one here meets several attacks of its own: {glue:text}`left-out`. Their chapters
# measure them.

# %%
SEEN = f"training images of {sizes.shots_of} and scenes"
HELP = {"control": SEEN, "robust training": SEEN, "prompt tuning": f"{sizes.shots} labeled shots a class of {sizes.shots_of}"}
table = [{"method": c.name, "kind": c.kind, "help": HELP.get(c.kind, "none"), "attacks of its own": ", ".join(c.ways)} for c in line.values()]
whole = {way.removesuffix(" on its tower"): attack.label for c in line.values() for way, (attack, _) in c.ways.items()}
book.table(table, caption=f"Who competes, with what help, and how each is attacked besides what everybody is shown. {'; '.join(f'{way}: {told}' for way, told in whole.items())}. long and the attacks after it go through {sizes.few} fresh views in each step; a verdict has {sizes.views} (TTC has noise in place of views).")

# %%
named = [m for m in defenses.names() if m.split(" (")[0] not in (*line, "none")]
left_out = [m for m in named if m not in line and (m.split(" (")[0] == m or m.split(" (")[0] not in named)]
for name, value in (("n", len(task)), ("task", task.name), ("eps", f"{eps_255:g}"), ("count", len(line)), ("mixed", len(sizes.stacked) + len(sizes.tuned_on)),
                    ("n-views", sizes.views), ("n-chosen", line["A-TPT (released)"].model.recipe.chosen)):
    book.glue(name, value)
book.glue("left-out", side.listed(left_out))
book.glue("shots", sizes.shots)
book.glue("long", sizes.long_steps)

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape | name in code |
# |---|---|---|---|
# | $x$, $y$ | image, label | `[N, 3, S, S]`, `[N]` | `task` |
# | $f_d$ | the classifier of defense $d$ | | `candidate.model` |
# | $x^a_d$ | image that attack $a$ made through $d$ | `[N, 3, S, S]` | `made_through(...)` |
# | $c_{a,i}$ | is image $i$ still right under attack $a$? | `[K, N]` | `correct` |
# | $w_d$ | accuracy in the worst case | scalar | `worst` |
#
# ## What everybody is shown
#
# Three sets of attacked images are shown to all, the copies from above: PGD on undefended CLIP, the *oblivious* attack by which
# papers on defenses at test time report; PGD on TeCoA, by an attacker who guesses that some robust tower is behind the answer; and a long attack through the view ensemble,
# by one who guesses that views are.
#
# Whoever is their target does not meet them twice.

# %%
OBLIVIOUS = f"{sizes.specs[0]} on CLIP"
shared = {OBLIVIOUS: copies["made on CLIP"], f"{sizes.specs[0]} on TeCoA": copies["made on TeCoA"], "long, on views": copies["made on View ensemble"]}
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


keys = [(seed, task.name, "my_eot", i) for i in range(min(16, len(task)))]
x, y = task.pixels(slice(0, len(keys))).to(run.device), task.labels[: len(keys)].to(run.device)
mine = to_8bit(my_eot(line["View ensemble"].ways["long"][1], x, y, sizes.short_steps, keys), x, threat)
audit(x, mine, threat)
seen = {"clean": x, "under the attack on CLIP": copies["made on CLIP"][: len(x)].to(run.device), "under my_eot": mine}
with torch.no_grad():
    judge = evaluate.for_images(line["View ensemble"].model, task, range(len(x)), seed)
    left = {head: (judge(images).argmax(1) == y).sum().item() for head, images in seen.items()}
print(f"view ensemble, {len(x)} images, right: " + ", ".join(f"{k} {head}" for head, k in left.items()))

# %% [markdown]
# Where a prompt is tuned for each image, the step is a sign, whose gradient is zero. One more attack gives it a slope (`step`);
# [chapter 07](07_a_tpt.py) shows why. And each of these defenses also meets the plain attacks on the tower behind it.
#
# The attack called `long` takes {glue:text}`long` steps through the defense itself: the ensemble, R-TPT, TTC and A-TPT alike, alone or in front of a robust tower.
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
# The price of the worst case is a bias: the more attacks a method meets, the lower it can fall, and the counts are not equal.
#
# All meet the same three sets. A model that always answers alike meets three attacks through itself. A defense at test time meets those three on the
# tower behind it, `long` through itself (`small`: `margin` too), and `step` where a prompt is tuned.
#
# So R-TPT and A-TPT meet two more than the ensemble, whose own `long` everybody is shown. In `tiny` only the cross-entropy is raised
# through a defense, from one start, and TTC's switch between counterattack and noise is not attacked. The [control](fair-draws) below
# asks what chance alone would take.

# %%
rows, worst = side.besieged_each(run, list(line.values()), task, shared, eps_255)


def my_worst(found):
    """AND for each image over all that it was shown, itself included."""
    correct = torch.stack([torch.from_numpy(r.records.sort_by("index")["correct"].to_numpy(zero_copy_only=False)) for r in found])
    return correct.all(0).float().mean().item()


assert all(math.isclose(my_worst(rows[m]), worst[m].value, abs_tol=1e-6) for m in line)
print(f"{sum(len(r) - 2 for r in rows.values())} attacked accuracies, {len(task)} images each")

# %%
stage = {m: side.stages(r, worst[m], OBLIVIOUS) for m, r in rows.items()}
kinds = {}
for m, candidate in line.items():
    kinds.setdefault(candidate.kind, []).append(m)
fig = comparison.stages({m: side.intervals(heads) for m, heads in stage.items()}, quantity="accuracy (%)", groups=kinds)
book.show(fig, "stages", alt="For every method three points: accuracy on clean images, under an attack on undefended CLIP, and in the worst case over all attacks",
          caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255, {sizes.views} views; chance {100 / len(task.class_names):.0f} %. Bars: 95 % intervals.")  # fmt: skip

# %%
attacked = {m: [row for row in r if row.attack not in ("none", "unchanged")] for m, r in rows.items()}
hardest = {m: side.listed([row.attack for row in r if row.value == min(other.value for other in r)]) for m, r in attacked.items()}
least = {m: min(row.value for row in r) for m, r in attacked.items()}
lines = [{"method": m} | {head: book.tables.with_interval(row.value, row.ci95) for head, row in heads.items()} | {"strongest alone": f"{100 * least[m]:.0f}: {hardest[m]}"} for m, heads in stage.items()]
book.table(lines, caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255: percent with 95 % intervals, and the single attack or attacks that leave least.")

# %%
values = {head: {m: heads[name].value for m, heads in stage.items()} for head, name in (("clean", "clean"), ("oblivious", "attack on CLIP"), ("worst", "worst case"))}
for head, found in values.items():
    for m, value in found.items():
        book.glue(f"{head}-{m}", 100 * value)
    book.glue(f"{head}-best", side.listed(side.leaders(found)))
    book.glue(f"{head}-most", 100 * max(found.values()))
lead = side.leaders(values["worst"])
near = [m for m in line if m not in lead and evaluate.paired(worst[lead[0]].records, worst[m].records)[1] <= 0]
longest = [m for m in sizes.test_time if any(row.attack.startswith("long") and row.value == least[m] for row in attacked[m])]
book.glue("near", side.listed(near, "nobody"))
book.glue("long-strongest", side.listed(longest, "none of them"))

# %% [markdown]
# Read the gap between the middle and the last point: so badly does an attack on CLIP carry over to that method. For defenses at test time
# the middle point is the published kind of evaluation. Papers of chapters 04 to 06 attack the defended model; to theirs it is foreign.
#
# The view ensemble falls from {glue:text}`oblivious-View ensemble:.0f` to
# {glue:text}`worst-View ensemble:.0f` percent, R-TPT from {glue:text}`oblivious-R-TPT:.0f` to {glue:text}`worst-R-TPT:.0f`, A-TPT as released from
# {glue:text}`oblivious-A-TPT (released):.0f` to {glue:text}`worst-A-TPT (released):.0f`; TeCoA from {glue:text}`oblivious-TeCoA:.0f` to
# {glue:text}`worst-TeCoA:.0f`.
#
# An oblivious attack on a robust tower is just as mild: it was made for other weights. The column is not wrong. It answers a question
# that an attacker does not ask.
#
# In the worst case {glue:text}`worst-best` leads. Not told apart from the lead by these images: {glue:text}`near`.
#
# The last column of the table names the attack that does most by itself. Among defenses at test time it is, alone or in a tie, a long attack through the
# defense itself or through the ensemble for {glue:text}`long-strongest`.
#
# There neither the steps nor the number of views has been shown to suffice. The attacker averages fewer views than the verdict, so the image
# itself weighs more in his mean. A longer attack, or one with more views, may take more. Such a figure can only come
# down, and no rank near the top is safe.
#
# ## Does the order survive?
#
# A ranking is what most readers take home. Take all pairs of methods that either ranking tells apart. Count how many stand
# the same way round in both, how many are tied in one of the two, and how many are reversed.

# %%
kept, tied, turned = side.order_kept(values["oblivious"], values["worst"])
pairs = math.comb(len(line), 2)
sure = sum(not d[1] <= 0 <= d[2] for d in (evaluate.paired(worst[a].records, worst[b].records) for a in line for b in line if a < b))
for name, value in (("kept", kept), ("tied", tied), ("turned", turned), ("pairs", kept + tied + turned), ("sure-pairs", sure), ("all-pairs", pairs)):
    book.glue(name, value)
print(f"{kept} pairs keep their order, {tied} are tied in one ranking, {turned} are reversed; in the worst case {sure} of {pairs} intervals exclude zero")

# %% [markdown]
# Of {glue:text}`pairs` pairs {glue:text}`kept` keep their order, {glue:text}`tied` are tied in one ranking and {glue:text}`turned` are reversed. In the
# worst case the 95 % interval of {glue:text}`sure-pairs` of all {glue:text}`all-pairs` pairs excludes zero, uncorrected for the number of
# pairs. The rest is no ranking at all.
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
# Every curve must fall to chance or below as the budget grows. One that stays up has not been attacked. Each method here meets one attack
# that goes through it.

# %%
FEW = [m for m in ("CLIP", "View ensemble", "TeCoA", "TGA-ZSR") if m in line]
curve = []
for m in FEW:
    attack, surface = list(line[m].ways.values())[0] if m != "View ensemble" else (attacks.expectation(sizes.short_steps), line[m].ways["long"][1])
    for eps in sizes.eps_grid:
        images = side.crafted(run, renamed(attack, "own attack"), surface, task, eps, f"own, {m}")
        curve.append(book.measure_images(run, m, line[m].model, task, images, "own attack", eps))
    curve.append(rows[m][0])
fig = accuracy_vs_eps(curve, chance=1 / len(task.class_names), order=FEW)
book.show(fig, "budgets", alt="Accuracy of CLIP, the view ensemble, TeCoA and TGA-ZSR under an attack through each, against the budget, down to chance or below",
          caption=f"{task.name}, n = {len(task)}: {sizes.specs[0]} through each tower, {sizes.short_steps} steps through {sizes.few} views of the ensemble; bands are 95 % intervals.")  # fmt: skip

# %%
middle = sizes.eps_grid[len(sizes.eps_grid) // 2]
at_middle = {row.method: row.value for row in curve if row.eps_255 == middle}
for name, value in (("middle", f"{middle:g}"), ("furthest", side.listed(side.leaders(at_middle))), ("short", sizes.short_steps)):
    book.glue(name, value)
for m in ("View ensemble", "TeCoA"):
    book.glue(f"middle-{m}", 100 * at_middle[m])

# %% [markdown]
# Robust training buys a shift of the curve to the right. It does not change where the curve ends.
#
# At ε = {glue:text}`middle`/255 {glue:text}`furthest` stands furthest right: the ensemble keeps {glue:text}`middle-View ensemble:.0f` percent, TeCoA
# {glue:text}`middle-TeCoA:.0f`. Do not trust the ensemble's curve. Its attack takes {glue:text}`short` steps, each with a noisy gradient, and a longer one
# could only pull it to the left. A tower's gradient has no noise.
#
# At the largest budget of this figure the picture is visibly spoiled. Between it and the smallest one that fools the undefended model is where
# a defense can matter. A method that was trained at one budget is not owed anything beyond it.
#
# ## Do defenses add up?
#
# Papers do put prompts and views on a TeCoA tower, mostly under an attack that does not know of the views. Three questions, each with its
# parents beside it:
#
# - Do views help a robust tower? The ensemble stands in front of TeCoA, A-TPT in front of TGA-ZSR: one pairing each.
# - Does TGA-ZSR's tower carry prompts better than TeCoA's? APT is tuned here on TGA-ZSR's tower. The shipped APT, its parent in the
#   table, sits on TeCoA's.
# - Do CBA-FAPT's maps hold on CAPT's tower? CBA-FAPT is tuned here on TeCoA, which is CAPT's tower and its teacher. One
#   loss with CAPT's consistency *and* CBA's maps would be a new method, and is not built here.

# %%
def on_tower(method, base):
    """A method of the line in front of `base`'s tower; as its parent does, it also meets the long attack through plain views of its tower."""
    tower, name = defenses.load_defense(base, clip).clip, f"{method} on {base}"
    found, plain = (side.at_test_time(name, "combined", tower, m, task, **settings) for m in (method, "View ensemble"))
    return found if method == "View ensemble" else replace(found, ways=found.ways | {"long, plain views": plain.ways["long"]})


def tuned_on(method, base):
    """Prompts tuned here on the tower that `base` trained."""
    carrier, shots = defenses.load_defense(base, clip).clip, few_shot(run.load(sizes.shots_of, "train"), sizes.shots, 1)
    defense = book.tune(run, method, carrier, shots, 1, label=f"{method} on {base}")
    return side.static(f"{method} on {base}", "combined", defense, task, sizes.specs)


mixed = [on_tower(*pair) for pair in sizes.stacked] + [tuned_on(*pair) for pair in sizes.tuned_on]
for target, found in zip((rows, worst), side.besieged_each(run, mixed, task, shared, eps_255), strict=True):
    target |= found
for candidate in mixed:
    stage[candidate.name] = side.stages(rows[candidate.name], worst[candidate.name], OBLIVIOUS)
    book.glue(f"worst-{candidate.name}", 100 * worst[candidate.name].value)

# %%
parents, lines = {c.name: c.name.split(" on ") for c in mixed}, []
for name, pair in parents.items():
    diffs = [evaluate.paired(worst[name].records, worst[p].records) for p in pair]
    lines.append({"combination": name, "clean": 100 * rows[name][0].value, "worst case": book.tables.with_interval(worst[name].value, worst[name].ci95),
                  "to the method as shipped": book.points(diffs[0]), "to its tower alone": book.points(diffs[1])})  # fmt: skip
    for which, diff in zip(("method", "tower"), diffs, strict=True):
        book.glue(f"{which}-{name}", book.compared(diff))
TOWERS = {"APT": "TeCoA", "CAPT": "TeCoA"} | {f"{m} on {base}": base for m, base in sizes.tuned_on}
book.glue("prompts-better", side.listed([m for m, base in TOWERS.items() if evaluate.paired(worst[m].records, worst[base].records)[1] > 0], "none"))
book.glue("clean-better", side.listed([m for m in line if evaluate.paired(rows[m][0].records, rows["CLIP"][0].records)[1] > 0], "none"))
best_mixed = side.leaders({name: worst[name].value for name in parents})
book.glue("mixed-best", side.listed(best_mixed))
book.glue("mixed-most", 100 * worst[best_mixed[0]].value)
book.table(lines, formats={"clean": ".1f"}, caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255: each combination meets the kinds of attack that its parents meet, on its own tower; differences in points with 95 % paired intervals.")

# %%
alone = list(dict.fromkeys(p for pair in parents.values() for p in reversed(pair)))
shown = {name: side.intervals(stage[name]) for name in (*alone, *parents)}
fig = comparison.stages(shown, quantity="accuracy (%)", groups={"alone": alone, "combined": list(parents)})
book.show(fig, "sums", alt="Three points for each combination and for what it is made of: clean, under the attack on CLIP, and in the worst case",
          caption=f"{task.name}, n = {len(task)}: combinations below what they are made of.")  # fmt: skip

# %%
LENGTH = {"APT": "05_capt", "CBA-FAPT": "06_cba_fapt"}  # whose `tiny` profile the shipped prompts were tuned by
lengths = {m: chapters()[chapter]["profiles"]["tiny"]["tuning"] for m, chapter in LENGTH.items()}
book.glue("steps-here", sizes.tuning["steps"])
book.glue("steps-shipped", side.listed([f"{m} {t['steps']}" for m, t in lengths.items()]))

# %% [markdown]
# In the worst case the ensemble on TeCoA keeps {glue:text}`tower-View ensemble on TeCoA` TeCoA alone, and {glue:text}`method-View ensemble on TeCoA` the
# ensemble alone. A-TPT on TGA-ZSR keeps {glue:text}`tower-A-TPT (released) on TGA-ZSR` TGA-ZSR alone, and
# {glue:text}`method-A-TPT (released) on TGA-ZSR` A-TPT alone.
#
# APT on TGA-ZSR keeps {glue:text}`method-APT on TGA-ZSR` the shipped APT, which sits on TeCoA. CBA-FAPT on TeCoA keeps
# {glue:text}`tower-CBA-FAPT on TeCoA` TeCoA alone, and {glue:text}`method-CBA-FAPT on TeCoA` the shipped CBA-FAPT, which sits on the undefended tower.
#
# Most in the worst case of the combinations: {glue:text}`mixed-best`, with {glue:text}`mixed-most:.0f` percent.
#
# What a combination adds to its *test-time* parent is the tower. What it adds to its tower is the question, and it has to pay for
# views at every image.
#
# A combination also gives the attacker more to choose from. One with views meets the attacks on its tower, the long attack through its own
# views, and the one through plain views of its tower.
#
# One with prompts is attacked straight through, as its parents are. A
# combination that met a shorter list than its parents would win by that alone.
#
# The prompts of this section took {glue:text}`steps-here` steps, at the budget of this page; the shipped ones:
# {glue:text}`steps-shipped`. CBA-FAPT's shipped file was tuned at 1/255.
#
# ## What an answer costs
#
# Seconds were taken in turn, one batch of clean images a round. Memory is what tensors hold at once during the answer to one image, asked
# alone, weights apart. Training costs once and stands in the chapters; what is here comes with every image for as long as the model
# is in use.

# %%
everyone = line | {c.name: c for c in mixed}
priced = side.prices(run, list(everyone.values()), task.take(range(min(8, len(task)))))
for m in ("View ensemble", "A-TPT (released)"):
    book.glue(f"cost-{m}", priced[m].seconds[0] / priced["CLIP"].seconds[0])
side.price_table(priced, caption=f"Of one clean image, {len(task.class_names)} classes, {sizes.views} views. class texts: prompts through the text tower.")

# %%
HUES = {"undefended": "#000000", "control": "#767676", "robust training": "#0072B2", "prompt tuning": "#009E73", "at test time": "#D55E00", "combined": "#CC79A7"}
gain = {m: (1000 * priced[m].seconds[0], worst[m].value) for m in everyone}
best = side.front(gain)
scatter = {m: (cost, value, *worst[m].ci95) for m, (cost, value) in gain.items()}
fig = comparison.cost_front(scatter, best, cost="milliseconds an image", quantity="worst case (%)", kinds={m: c.kind for m, c in everyone.items()}, hues=HUES)
book.show(fig, "front", alt="Milliseconds an image on a logarithmic axis against worst-case accuracy, one point a method, the front drawn as steps",
          caption=f"{task.name}, n = {len(task)}, ε = {eps_255:g}/255, this machine. Filled and bold: no other method is cheaper and at least as robust.")  # fmt: skip
book.glue("front", side.listed(best))

# %% [markdown]
# The ensemble makes {glue:text}`n-views` passes where CLIP and every robust tower make one. In this run it took
# {glue:text}`cost-View ensemble:.0f` times as long as CLIP, A-TPT as released {glue:text}`cost-A-TPT (released):.0f` times; that one carries
# state, so it is asked one image at a time.
#
# On the front stand {glue:text}`front`. The combinations stand beside the
# rest: a tower below views costs nothing more. Points with one pass differ in time by the machine's noise
# alone; read those next to each other as one cost.
#
# (fair-draws)=
# ## Is a random verdict fair?
#
# A random defense may fail by chance when asked often. Here each image has one frozen draw for all verdicts, so no image is lost to a new
# draw between the clean column and the worst case.
#
# A-TPT as released is the exception: its draw is frozen, its state is not. What the
# attacked image before left behind differs between attacks, and may cost an image too.
#
# The control asks another question: what would somebody win who changes nothing and asks as often, with a fresh draw each time?

# %%
chances = side.chances_alone(run, list(everyone.values()), task, rows, worst)
heads = ("clean, one draw", "clean, right in all", "worst case")
by_chance = [m for m, (_, diff) in chances.items() if diff[2] >= 0]
book.glue("at-control", side.listed([m for m, (_, diff) in chances.items() if diff[0] >= 0]))
book.glue("by-chance", side.listed(by_chance))
book.glue("beyond-chance", side.listed([m for m in chances if m not in by_chance]))
book.table([found for found, _ in chances.values()], formats=dict.fromkeys(heads, ".1f"), caption=f"{task.name}, n = {len(task)}: what chance alone would take, percent; last, the paired difference in points with its 95 % interval.")

# %% [markdown]
# At or above the control: {glue:text}`at-control`; asking often costs them as much as all attacks together. Not measurably below it:
# {glue:text}`by-chance`; these images cannot say which of the two costs more. Measurably below it: {glue:text}`beyond-chance`.
#
# A real attacker has both, attacked images *and* fresh draws. [Chapter 07](07_a_tpt.py)'s ladder counts that way, and this page's worst
# case is kinder.
#
# (verdict-sbs)=
# ## Our own claims
#
# Three statements that this page invites, decided by rules as the papers' are. A claim of ours that fails is shown like one of theirs.
# Where an interval covers zero, read "not shown", not "refuted". The rules resample images; figures and tables use score intervals,
# which are wider where n is small.

# %%
book.claims_table("09_side_by_side", card=run.card)

# %% [markdown]
# ## What we would deploy, and when
#
# - *The attacker can see or guess the weights.* Measurably above TeCoA, the plainest robust tower, in the worst case: {glue:text}`better`;
#   measurably below: {glue:text}`worse`. On the front stand {glue:text}`front`.
# - *Which of them, then?* Where no method with views is measurably above it, we take the
#   robust tower: one pass, the same answer tomorrow, gradients that an honest test can
#   use. A figure that rests on views is only as good as affordable attacks.
# - *Few labeled images of the own task.* Tune prompts on a robust tower only if they beat it on held-out images, in the worst case and not
#   in the oblivious column. Measurably above the tower alone here: {glue:text}`prompts-better`.
# - *Only attacks made for other models.* Compare a robust tower first: one pass, and its middle point. A view ensemble has to earn its cost
#   above it, a tuned prompt above both. Damaged images were not measured.
# - *Clean accuracy is all that counts.* Fine-tune without an attack if you have images of the task, else leave CLIP as it is. Measurably
#   above CLIP on clean images here: {glue:text}`clean-better`.
#
# ## What nobody should conclude
#
# - That R-TPT and A-TPT at full size would stand here: the papers take 64 views, six of them for the step, this page
#   {glue:text}`n-views` and {glue:text}`n-chosen`. Nor that these worst cases continue those of [chapter 07](07_a_tpt.py), which has another
#   budget, other views and fresh draws.
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
# - Most under an attack on undefended CLIP: {glue:text}`oblivious-best`; most in the worst case: {glue:text}`worst-best`,
#   not told apart from {glue:text}`near`. The best combination is {glue:text}`mixed-best`.
# - When attacked by somebody who knows them, TeCoA falls to {glue:text}`worst-TeCoA:.0f` percent, and the view ensemble to
#   {glue:text}`worst-View ensemble:.0f`. TeCoA answers with one pass; the ensemble takes {glue:text}`n-views`.
# - Count an image only if it survives every attack, on 8-bit pictures, with verdict draws that no attack has seen.
# - Say how many images: with {glue:text}`n`, {glue:text}`sure-pairs` of {glue:text}`all-pairs` intervals exclude zero, uncorrected for the number of pairs.
#
# On your own images: `robustvlm evaluate --data DIR --defense NAME --attack pgd --eps-255 2`.

# %%
book.footer(run)

# %% [markdown]
# ## References
#
# The works cited here stand on the [bibliography page](../book/bibliography.md).
