# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What the prompt papers leave open, and what each choice does
#
# *CAPT and CBA-FAPT describe their methods in words and a few formulas. Whoever rebuilds them has to choose the rest. This page
# turns one choice at a time and measures what it changes.*
#
# [Colab](https://colab.research.google.com/github/robustvlm-lite/robustvlm_lite/blob/main/notebooks/11_prompt_choices.ipynb) ·
# [source](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/notebooks/11_prompt_choices.py) ·
# [result card](https://github.com/robustvlm-lite/robustvlm_lite/tree/main/book/cards) ·
# CPU: 6 minutes (tiny)

# %% [markdown]
# ## At a glance
#
# | | |
# |---|---|
# | Question | Would another reading of the paper have given another result? |
# | Methods | CAPT {cite}`yang2024capt` in the protocol of [chapter 5](05_capt.py), CBA-FAPT {cite}`feng2026cba` in that of [chapter 6](06_cba_fapt.py), and the rivals that those pages leave out |
# | One line of a table | one choice changed, everything else as in the chapter: tower, shots, order of batches, starts, attack, learning rate |
# | Not asked here | the readings of CAPT's weight α and of CBA's fusions; they stand in the ablations of the two chapters |
# | Found on this page | of {glue:text}`n-capt` changes to CAPT's loss {glue:text}`sure-capt` change accuracy under attack measurably, of {glue:text}`n-place` changes to its prompts {glue:text}`sure-place`, of {glue:text}`n-cba` changes to CBA-FAPT {glue:text}`sure-cba` |

# %% tags=["parameters"]
profile: str = "tiny"  # "tiny": laptop | "small": real image packs
seed: int = 0  # test images derive from it; shots, prompts and their attack starts have the profile's seeds
n: int = 0  # test images per accuracy; 0 takes the profile's number
steps: int = 0  # steps of each tuning; 0 takes those of chapters 05 and 06
device: str = ""  # "" chooses; "cuda" without a GPU is an error
data_root: str = ""  # folder of the image packs (small)
pretrained: str = ""  # weights file of the backbone, a `nano` of your own

# %%
import importlib.util
import subprocess
import sys
from dataclasses import replace

import torch
from IPython.display import display

if importlib.util.find_spec("robustvlm_lite") is None:  # on Colab
    subprocess.run(["git", "clone", "-q", "https://github.com/robustvlm-lite/robustvlm_lite"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--system", "-e", "."]
    subprocess.run(install, cwd="robustvlm_lite", check=True)
    sys.path.insert(0, "robustvlm_lite")

from robustvlm_lite import book, defenses, plots
from robustvlm_lite.book import choices
from robustvlm_lite.book import exercises_prompts as exercises
from robustvlm_lite.defenses import capt, cba_fapt
from robustvlm_lite.prompts import PromptSpec
from robustvlm_lite.threat import ThreatModel

run = book.start("11_prompt_choices", profile=profile, seed=seed, device=device, data_root=data_root, pretrained=pretrained, n=n, steps=steps)
sizes = run.sizes
seeds = f"tuning seeds {', '.join(map(str, sizes.seeds))}"
at_capt, at_cba = (choices.home(run, chapter, *of) for chapter, of in sizes.homes.items())
print("CAPT:", at_capt.asked())
print("CBA-FAPT:", at_cba.asked())

# %% [markdown]
# ## How to read it
#
# Both papers are rebuilt from reports and figures; no code of theirs was found. The specifications list dozens of places where
# a text allows two readings. Most authors never tell which of them matter, because a reader sees one number for the whole.
#
# The loop here is the chapters' own. A *home* is one of the two protocols. `tune` takes variants, each a method with a switch
# turned, and `measure` asks all of them about the same images.
#
# Each accuracy is compared with the default's in pairs: verdicts of an image are averaged over the seeds, then images are
# resampled. What such an interval leaves out is the luck of the tuning itself; `tiny` tunes once, `small` three times.
#
# With so many lines some intervals exclude zero by luck: of twenty, one. Read a single line as a hint, and a group of lines that
# point the same way as more.
#
# Learning rates are those that the chapters found for the default. A change that wants another rate is punished for it here;
# where that may be the reason, the text says so.
#
# ## CAPT: the loss
#
# $$L = \mathrm{CE}(f(x), y) + \lambda\,\big[(1-\alpha)\,\mathrm{KL}(f(x)\,\|\,f(x_{adv})) + \alpha\,\mathrm{KL}(g(x)\,\|\,f(x_{adv}))\big]$$
#
# with $f$ the tuned model, $g$ the frozen one, and $\alpha$ our default reading. What the sources leave open:
#
# | choice | our reading | alternatives | why |
# |---|---|---|---|
# | λ | 1.5 | 0.5, 3, 6 | not stated; FAP's value, TRADES takes 6 (published) |
# | direction of KL | from the target to the attacked answer | the other way round, the mean of both | one report writes it the other way round; code of this family computes ours |
# | the own clean answer | moves, as in TRADES {cite}`zhang2019trades` | held still | not stated |
# | the training attack | raises the cross-entropy | raises the own KL, or the whole bracket | not stated; APT's raises the cross-entropy |


# %%
def turned(name, kind, changes, **options):
    """Variants of one method: the default first, then one for each {label: fields of its choices}."""
    return [{"name": name}] + [{"name": name, "label": label, "config": kind(**fields), **options} for label, fields in changes.items()]


LOSS = {
    "λ = 0.5": {"weight": 0.5},
    "λ = 3": {"weight": 3.0},
    "λ = 6": {"weight": 6.0},
    "KL the other way": {"direction": "adv_target"},
    "KL both ways": {"direction": "sym"},
    "own answer held": {"detach_clean": True},
    "attack: own KL": {"inner": "kl"},
    "attack: bracket": {"inner": "consistency"},
}
tuned = at_capt.tune(turned("CAPT", capt.Choices, LOSS), sizes.seeds)
rows = at_capt.measure(tuned)
of_loss = choices.effects(at_capt, rows, "CAPT")
display(choices.effects_table(of_loss, rows, at_capt, "CAPT", caption=f"One choice of CAPT's loss changed; {seeds}."))

# %%
def bars(found, reference, part):
    """Two panels: what each choice changes on clean and on attacked images of one part."""
    return [plots.paired_bars({name: of[part, head] for name, of in found.items()}, reference=reference, quantity=f"{head} accuracy") for head in choices.METRICS]


book.show(bars(of_loss, "CAPT", "all"), "loss", alt="Paired differences to CAPT as read here, clean and attacked, one bar for each changed choice of the loss, zero line drawn",
          caption=f"CAPT's loss, one choice changed: difference to our reading, 95 % paired interval. {at_capt.asked()}.")  # fmt: skip

# %% [markdown]
# Measurable under attack: {glue:text}`which-capt`. On clean images: {glue:text}`which-capt-clean`.
#
# λ is meant as a dial between the two columns: more of it ties the attacked answer to the clean one, and takes weight from being
# right.
#
# Where both columns fall as λ grows, tuning has not come to the point at which one is traded for the other: few steps at a
# rate that was found for 1.5 learn the shots first.
#
# The direction of KL is not a matter of taste. Forward, the attacked answer must give probability to every class that the
# target allows. Backward, it may drop some of them, and near a confident target the two penalties differ most. Few steps on few shots
# seldom come so far.
#
# An attack on the divergence finds images on which the model disagrees with itself, rightly or wrongly; an attack on the
# cross-entropy those on which it is wrong. On images that the model names rightly these are nearly the same.
#
# ## CAPT: where the prompts sit
#
# The abstract says: prompts in both towers, deep, learned together. It does not say how many, how deep, or whether one tower's follow
# from the other's. "Multi-modal is better" is often shown against half as many parameters; so the last two lines have as many.

# %%
DEEP = defenses.PROMPT_METHODS["CAPT"].spec
PLACES = {
    "text alone": PromptSpec(n_text=2, depth_text=DEEP.depth_text),
    "image alone": PromptSpec(n_vision=2, depth_vision=DEEP.depth_vision),
    "inputs alone": PromptSpec(n_text=2, n_vision=2),
    "image from text": replace(DEEP, coupling="text2vision"),
    "text from image": replace(DEEP, coupling="vision2text"),
    "from noise": replace(DEEP, start="normal"),
    "text, as many": PromptSpec(n_text=4, depth_text=DEEP.depth_text),
    "image, as many": PromptSpec(n_vision=4, depth_vision=DEEP.depth_vision),
}
placed = [{"name": "CAPT"}] + [{"name": "CAPT", "label": k, "spec": defenses.scaled_spec(at_capt.carrier, spec)} for k, spec in PLACES.items()]
tuned_places = at_capt.tune(placed, sizes.seeds)
rows = at_capt.measure(tuned_places)
of_place = choices.effects(at_capt, rows, "CAPT")
display(choices.effects_table(of_place, rows, at_capt, "CAPT", caption=f"CAPT's loss over other prompts; {seeds}."))

# %%
counts = {d.name: sum(p.numel() for p in d.learner.parameters()) for d in tuned_places[sizes.seeds[0]]}
print("numbers learned:", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
book.show(bars(of_place, "CAPT", "all"), "places", alt="Paired differences to CAPT's deep prompts in both towers, clean and attacked, one bar for each other placement, zero line drawn",
          caption=f"Other prompts under CAPT's loss: difference to two tokens in each tower, independent and deep; 95 % paired interval. {at_capt.asked()}.")  # fmt: skip

# %% [markdown]
# Measurable under attack: {glue:text}`which-place`. On clean images: {glue:text}`which-place-clean`.
#
# Prompts in the text alone can only move the class vectors. Prompts in the image tower change what is compared with them, and
# they are what an attack has to go through. If *text, as many* does as well as both towers, the second tower is not what helps.
#
# Coupled prompts carry a linear map between the towers, so they learn far more numbers from the same shots; the line above the figure counts
# them. FAP reports that image prompts which follow from the text's are unstable under a loss of two terms (published {cite}`zhou2024fap`);
# that is one reason for our default, independent prompts.
#
# ## CBA-FAPT: the terms
#
# $$L = \mathrm{CE}(x) + a\,\mathrm{CE}(x_{adv}) + b\,\|A_v(x) - A_v(x_{adv})\|_2 + c\,\mathrm{KL}(A_t(x)\,\|\,A_t(x_{adv}))$$
#
# | choice | our reading | alternatives | why |
# |---|---|---|---|
# | $a$ | 5, as printed | 1 | how much is weight, how much the maps? |
# | $b$, $c$ | as printed | 100 times each, and both | our maps are small: as printed, their share of the gradient is tiny ([chapter 6](06_cba_fapt.py)) |
# | distribution over words | signed halves, then L1 (N1) | N2, N3, N5 | KL needs one; the text does not give it. N4 is left out: its force is nil |
# | length of $A_v$ | as it is | to unit length | "L2" may mean either |
# | clean maps | move | held still | not stated |
# | score | cosine of the true class | its log-probability | "logit-driven" may mean either |

# %%
FULL = vars(cba_fapt.FULL)
TERMS = {
    "a = 1": {"alpha": 1.0},
    "b × 100": {"beta": 100 * cba_fapt.FULL.beta},
    "c × 100": {"gamma": 100 * cba_fapt.FULL.gamma},
    "b, c × 100": {"beta": 100 * cba_fapt.FULL.beta, "gamma": 100 * cba_fapt.FULL.gamma},
    "N2": {"text_norm": "N2"},
    "N3": {"text_norm": "N3"},
    "N5": {"text_norm": "N5"},
    "unit length": {"length": "l2"},
    "clean maps held": {"stop_clean": True},
    "log-probability": {"score": "logprob"},
}
tuned_terms = at_cba.tune(turned("CBA-FAPT", lambda **fields: cba_fapt.Choices(**FULL | fields), TERMS), sizes.seeds)
rows = at_cba.measure(tuned_terms)
of_cba = choices.effects(at_cba, rows, "CBA-FAPT")
display(choices.effects_table(of_cba, rows, at_cba, "CBA-FAPT", caption=f"One choice of CBA-FAPT changed; {seeds}."))

# %%
figs = [plots.paired_bars({name: of[part, "attacked"] for name, of in of_cba.items()}, reference="CBA-FAPT", title=f"{part} classes") for part in ("base", "new")]
book.show(figs, "terms", alt="Paired differences in robust accuracy to CBA-FAPT as read here, on base and on new classes, one bar for each changed choice",
          caption=f"CBA-FAPT, one choice changed: difference to our reading under attack, 95 % paired interval. {at_cba.asked()}.")  # fmt: skip
for name, found in (("capt", of_loss), ("place", of_place), ("cba", of_cba)):
    book.glue(f"n-{name}", len(found))
    book.glue(f"sure-{name}", len(choices.sure(found, "attacked")))
    book.glue(f"which-{name}", ", ".join(choices.sure(found, "attacked")) or "none of them")
    book.glue(f"which-{name}-clean", ", ".join(choices.sure(found, "clean")) or "none of them")

# %% [markdown]
# Measurable under attack, on base or new classes: {glue:text}`which-cba`. On clean images: {glue:text}`which-cba-clean`.
#
# The lines N2 to N5, unit length and held maps change terms whose force is a thousandth of the loss. If they agree with the default image
# by image, that is no evidence that they are equivalent; it is what such a share predicts.
#
# The lines with a hundred times the weight give the terms a say. What *they* do is the test of the idea at this scale: a gain
# on new classes would speak for the maps, a loss against them.
#
# ## The rivals' forms
#
# FAP's text and its released code differ, and so do papers that repeat FAP's rivals. As *released*, FAP writes the class name
# behind the whole template and leaves its braces in the text, and its rival AdvMaPLe carries FAP's coupling. Each pair below
# shares one learning rate.

# %%
def as_in(method, other):
    """`method`, at its own learning rate, over the prompts of `other`."""
    return {"name": method, "label": other, "spec": defenses.scaled_spec(at_cba.carrier, defenses.PROMPT_METHODS[other].spec)}


forms = [{"name": "FAP"}, as_in("FAP", "FAP (released)"), as_in("FAP", "FAP (shared projection)"), {"name": "AdvMaPLe"}, as_in("AdvMaPLe", "AdvMaPLe (released)"), as_in("AdvMaPLe", "AdvVLP")]
main = sizes.seeds[0]
tuned_forms = at_cba.tune(forms, [main])
rows = at_cba.measure(tuned_forms)
of_forms = choices.effects(at_cba, rows, "FAP")
display(choices.effects_table(of_forms, rows, at_cba, "FAP", caption=f"FAP, AdvMaPLe and their forms, seed {main}; AdvVLP: AdvMaPLe's loss over prompts that are not coupled."))

# %% [markdown]
# In a tower with few blocks a shared projection has one deep block to serve, so it is the same method twice: that line is a control, and any
# difference in it would be an error of ours.
#
# Three rivals of the papers have no place in the chapters: a learned frame and tokens in the image (AVP), a text context against features that were
# attacked beforehand (AdvPT) {cite}`zhang2024advpt`, and APT with a context for each class. They are tuned in CAPT's protocol.
#
# Their learning rates were not searched: all three take one factor on their papers' rate, as the bundled prompt files do. APT beside
# them keeps its searched one.

# %%
apt = defenses.scaled_spec(at_capt.carrier, defenses.PROMPT_METHODS["APT"].spec)
tuned_apt = at_capt.tune([{"name": "APT"}, {"name": "APT", "label": "APT (class-specific)", "spec": replace(apt, class_specific=True)}], [main])
tuned_rest = at_capt.unsearched(sizes.factor).tune([{"name": "AdvPT"}, {"name": "AVP"}], [main])
rows = at_capt.measure({main: [*tuned_apt[main], *tuned_rest[main]]})
of_rest = choices.effects(at_capt, rows, "APT")
display(choices.effects_table(of_rest, rows, at_capt, "APT", caption=f"Rivals beside APT, seed {main}."))

# %% [markdown]
# A context for each class multiplies what must be learned by the number of classes, from the same shots. AdvPT never sees the
# image tower's gradient while it tunes: it moves text towards features that an attack has left, and another attack leaves others.
#
# ## Tuned at one budget, attacked at another
#
# The papers tune and test at one budget. Here every pair is tried, on the first seed; the diagonal is what they print.

# %%
budgets = sizes.budgets
grids, lines = {"APT": {}, "CAPT": {}}, []
pairs = [(at_capt.pgd, ThreatModel(eps)) for eps in budgets]
for eps in budgets:
    of_budget = at_capt.at(eps).tune([{"name": m, "label": f"{m}, ε {eps:g}"} for m in grids], [main])[main]
    asked = book.measure_each(run, of_budget, at_capt.scenario.tests["all"], pairs, seed=main)
    for m, defense in zip(grids, of_budget, strict=True):
        mine = [r for r in asked if r.method == defense.name]
        grids[m] |= {(eps, r.eps_255): r.value for r in mine if r.metric == "robust_acc"}
        lines.append({"method": m, "tuned at": f"{eps:g}/255", "clean": 100 * next(r.value for r in mine if r.metric == "clean_acc")})
book.table(lines, formats={"clean": ".1f"}, caption=f"Clean accuracy in percent by the budget of tuning, seed {main}. {at_capt.asked()}.")

# %%
figs = [plots.ablation_grid(grid, rows="tuned\nat ε", columns=f"attacked at ε ({m})") for m, grid in grids.items()]
book.show(figs, "budgets", alt="Two small heat tables of accuracy under attack, APT and CAPT, over the budget of tuning and the budget of the attack",
          caption=f"{at_capt.scenario.tests['all'].name}, {at_capt.pgd.label}, percent; budgets in 1/255, seed {main}, n = {len(at_capt.scenario.tests['all'])}.")  # fmt: skip
gain = {m: grid[budgets[-1], budgets[-1]] - grid[budgets[0], budgets[-1]] for m, grid in grids.items()}
for m, value in gain.items():
    book.glue(f"gain-{m}", 100 * value)

# %% [markdown]
# Down a column only the tuning changes. At the largest budget, tuning at it rather than at the smallest buys APT
# {glue:text}`gain-APT:+.0f` points and CAPT {glue:text}`gain-CAPT:+.0f`. The tower below is the same in all rows, made
# robust at one budget, and it bounds what prompts can add.
#
# ## Does an attack on one carry over to the others?
#
# All methods of chapter 5 sit on the same tower. Images made against one, shown to another, tell how much of an attack is about
# the tower and how much about the prompts.

# %%
NAMES = ["HEP", "PAFT", "APT", "TRADES", "CAPT"]
stand = dict(zip(NAMES, at_capt.tune([{"name": m} for m in NAMES], [main])[main], strict=True))
whole = at_capt.scenario.tests["all"]
models = {m: d.classifier(whole.class_names, whole.templates) for m, d in stand.items()}
made = {f"made on {m}": book.craft(run, at_capt.pgd, stand[m].attack_surface(models[m]), whole, at_capt.eps_255, f"{at_capt.pgd.name} on {m}") for m in NAMES}
found, _ = book.measure_shown(run, models, whole, made, at_capt.eps_255)
fig = plots.pair_grid({(r.attack, r.method): r.value for r in found}, marked=[(f"made on {m}", m) for m in NAMES])
book.show(fig, "transfer", alt="A heat table of accuracy: images attacked on each of five methods down, the method that answers across, the diagonal framed",
          caption=f"{whole.name}, n = {len(whole)}, {at_capt.pgd.label} at ε = {at_capt.eps_255:g}/255, seed {main}: percent right. Framed: the attack knows the method.")  # fmt: skip
own = sum(r.value for r in found if r.attack == f"made on {r.method}") / len(NAMES)
other = sum(r.value for r in found if r.attack != f"made on {r.method}") / (len(found) - len(NAMES))
book.glue("own-attack", 100 * own)
book.glue("other-attack", 100 * other)

# %% [markdown]
# On average the attack on a method itself leaves {glue:text}`own-attack:.0f` percent and attacks on its neighbors {glue:text}`other-attack:.0f`.
# The smaller that gap, the more of the attack is about the tower that all share, and the less a tuned prompt is a defense of its own.
#
# Where a neighbor's attack does *more* than its own, the method's gradient misleads its own attacker. The worst case over all rows is the
# number to keep; chapter 5 takes it over several attacks.
#
# ## Exercise
#
# The solution is folded; the line at its end checks it, and yours.
#
# **(maths).** Two verdicts of one image under two tunings are not two images. Write `paired(a, b)`: from verdicts `[seeds, images]` of two
# methods, the mean difference and its standard error over images, as a tensor of two numbers.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def paired(a, b):
    """[S, N] -> [2]: average the seeds of an image first, then treat images as the sample."""
    d = (a.double() - b.double()).mean(0)
    return torch.stack([d.mean(), d.std() / len(d) ** 0.5])


exercises.check_paired_over_seeds(paired)

# %% [markdown]
# ## Takeaways
#
# - Of the choices that the papers leave open, those named above change accuracy under attack measurably at this scale. For the others these
#   images cannot tell, which is not the same as no effect.
# - Compare placements at equal parameters, and methods at rates of their own, before crediting an idea.
# - A term whose share of the gradient is a thousandth cannot be tested by turning its details. Give it weight first.
# - Print the whole table of budgets: a method is not owed what it gains at the budget that it was tuned at.
#
# On your own images: `robustvlm evaluate --data DIR --defense CAPT`, or any other name on this page that has a bundled file.

# %%
book.footer(run)

# %% [markdown]
# ## References
#
# The works cited here stand on the [bibliography page](../book/bibliography.md).
