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
# *What is known of CAPT, and the text of CBA-FAPT, leave parts of both methods open. Whoever rebuilds them has to choose. This page
# turns one choice at a time and measures what it changes.*
#
# [Colab](https://colab.research.google.com/github/robustvlm-lite/robustvlm_lite/blob/main/notebooks/11_prompt_choices.ipynb) ·
# [source](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/notebooks/11_prompt_choices.py) ·
# [result card](https://github.com/robustvlm-lite/robustvlm_lite/tree/main/book/cards) ·
# CPU: 3 minutes (tiny)

# %% [markdown]
# ## At a glance
#
# | | |
# |---|---|
# | Question | Would another reading of the paper have given another result? |
# | Methods | CAPT {cite}`yang2024capt` in the protocol of [chapter 5](05_capt.py), CBA-FAPT {cite}`feng2026cba` in that of [chapter 6](06_cba_fapt.py), and the rivals that those pages leave out |
# | One line of a table | one choice changed, everything else as in the chapter: tower, shots, order of batches, starts, attack, learning rate |
# | In the chapters' own ablations | the readings of CAPT's weight α and its frozen model; CBA's fusions, base loss, score × 100 and the class that is explained |
# | Tried nowhere | other numbers of prompts and other depths than those below, more steps of the training attack, the frozen model's template, maps of unit L1 length, matching plain features instead of maps |
# | Found on this page | of {glue:text}`n-capt` changes to CAPT's loss {glue:text}`sure-capt` change accuracy under attack measurably, of {glue:text}`n-place` changes to its prompts {glue:text}`sure-place`, of {glue:text}`n-cba` changes to CBA-FAPT {glue:text}`sure-cba`; of as many intervals one or two would exclude zero by luck |

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
from functools import partial

import torch
from IPython.display import display

if importlib.util.find_spec("robustvlm_lite") is None:  # on Colab
    subprocess.run(["git", "clone", "-q", "https://github.com/robustvlm-lite/robustvlm_lite"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--system", "-e", "."]
    subprocess.run(install, cwd="robustvlm_lite", check=True)
    sys.path.insert(0, "robustvlm_lite")

from robustvlm_lite import book, defenses, evaluate, plots
from robustvlm_lite.book import choices
from robustvlm_lite.book import exercises_prompts as exercises
from robustvlm_lite.defenses import capt, cba_fapt
from robustvlm_lite.prompts import PromptSpec
from robustvlm_lite.threat import ThreatModel

run = book.start("11_prompt_choices", profile=profile, seed=seed, device=device, data_root=data_root, pretrained=pretrained, n=n, steps=steps)
sizes = run.sizes
seeds = f"tuning seed{'s' * (len(sizes.seeds) > 1)} {', '.join(map(str, sizes.seeds))}"
at_capt, at_cba = (choices.home(run, chapter, *of) for chapter, of in sizes.homes.items())
print("CAPT:", at_capt.asked())
print("CBA-FAPT:", at_cba.asked())

# %% [markdown]
# ## How to read it
#
# CAPT is rebuilt from its abstract and from reports on it, CBA-FAPT from its text; no code of either was found. Both leave places where two
# readings are possible. Which of them matter is seldom told, because a reader sees one number for the whole.
#
# The loop here is the chapters' own. A *home* is one of the two protocols. `tune` takes variants, each a method with a switch
# turned, and `measure` asks all of them about the same images.
#
# Each accuracy is compared with the default's in pairs: verdicts of an image are averaged over the seeds, then images are
# resampled.
#
# What such an interval leaves out is the luck of the tuning itself, which the ± of [chapter 5](05_capt.py) shows to be as large as most
# lines here. `tiny` tunes once; `small` three times in the first three tables, once in the others.
#
# The page prints some hundred intervals, so a few exclude zero by luck. On few images they are coarse: at least four images must change,
# and if only four, all in one direction. One of no width means that no verdict changed, not that there is no effect.
#
# A change takes the learning rate that the chapters searched for its method: CAPT's, that of its prompts in the text alone, that of those in the image
# alone, and so on. No rate was searched for a single changed choice, so one that wants another rate is punished for it.
#
# ## CAPT: the loss
#
# $$L = \mathrm{CE}(f(x), y) + \lambda\,\big[(1-\alpha)\,\mathrm{KL}(f(x)\,\|\,f(x_{adv})) + \alpha\,\mathrm{KL}(g(x)\,\|\,f(x_{adv}))\big]$$
#
# with $f$ the tuned model, $g$ the frozen one, and $\alpha$ the larger, the more the frozen model and the less the tuned one is sure of its answer
# ([chapter 5](05_capt.py) has the formula and its rivals). What the sources leave open:
#
# | choice | our reading | alternatives | why |
# |---|---|---|---|
# | λ | 1.5 | 0.5, 3, 6 | not stated; FAP's value, TRADES takes 6 (published) |
# | direction of KL | from the target to the attacked answer | the other way round, the mean of both | one report writes it the other way round; code of this family computes ours |
# | the own clean answer | moves, as in TRADES {cite}`zhang2019trades` | held still | not stated |
# | the training attack | raises the cross-entropy | raises the own KL, or the whole bracket | not stated; APT's raises the cross-entropy |


# %%
def turned(name, kind, changes):
    """Variants of one method: the default first, then one for each {label: fields of its choices}."""
    return [{"name": name}] + [{"name": name, "label": label, "config": kind(**fields)} for label, fields in changes.items()]


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
# Where both columns fall as λ grows, two causes fit: too few steps at a rate that was found for 1.5, or the pull towards a frozen model that
# is weaker on this set than the tuned one. This table cannot tell them apart.
#
# The direction of KL is not a matter of taste. Forward, the attacked answer must give probability to every class that the
# target allows. Backward, it may drop some of them, and near a confident target the two penalties differ most.
#
# An attack on the divergence finds images on which the model disagrees with itself, rightly or wrongly; an attack on the
# cross-entropy those on which it is wrong. On images that the model names rightly and surely these are nearly the same.
#
# ## CAPT: where the prompts sit
#
# The sources say: prompts in both towers, deep, learned together. They do not say how many, how deep, or whether one tower's follow
# from the other's. "Multi-modal is better" is often shown against half as many parameters; so the last two lines have as many, on this tower, whose
# widths are equal.
#
# *Image from text* and *text from image* are coupled by a linear map. *From noise*: the context starts as a random draw and replaces all words of the
# template, not the first two alone.

# %%
DEEP = defenses.PROMPT_METHODS["CAPT"].spec
PLACES = {
    "inputs alone": PromptSpec(n_text=2, n_vision=2),
    "image from text": replace(DEEP, coupling="text2vision"),
    "text from image": replace(DEEP, coupling="vision2text"),
    "from noise": replace(DEEP, start="normal"),
}
AS_MANY = {"text": PromptSpec(n_text=4, depth_text=DEEP.depth_text), "image": PromptSpec(n_vision=4, depth_vision=DEEP.depth_vision)}
scaled = partial(defenses.scaled_spec, at_capt.carrier)
placed = [{"name": "CAPT"}] + [{"name": "CAPT", "label": k, "spec": scaled(spec)} for k, spec in PLACES.items()]
placed += [{"name": f"CAPT ({tower} only)", "label": f"{tower} alone"} for tower in AS_MANY]
placed += [{"name": f"CAPT ({tower} only)", "label": f"{tower}, as many", "spec": scaled(spec)} for tower, spec in AS_MANY.items()]
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
# These tunings stand on an undefended tower, as the paper's do. $A_v$ is the map over the patches, $A_t$ that over context and name.
#
# $$L = \mathrm{CE}(x) + a\,\mathrm{CE}(x_{adv}) + b\,\|A_v(x) - A_v(x_{adv})\|_2 + c\,\mathrm{KL}(A_t(x)\,\|\,A_t(x_{adv}))$$
#
# | choice | our reading | alternatives | why |
# |---|---|---|---|
# | $a$ | 5, as printed | 1 | how much is weight, how much the maps? |
# | $b$, $c$ | as printed | 100 times each, and both | as printed, the gradient of the image term is a ten-thousandth and that of the text term a hundredth of the whole, as orders of magnitude ([chapter 6](06_cba_fapt.py)) |
# | distribution over words | positive and negative parts, then L1 (N1) | N2 positive part, N3 size, N5 softmax of the standardized map | KL needs one; the text does not give it. N4, softmax of the raw map, is left out: its force is nil |
# | length of $A_v$ | as it is | to unit length | "L2" may name the distance alone or a normalization, too |
# | clean maps | move | held still | not stated |
# | score | cosine of the true class | its log-probability | the text says cosine; a log-probability lets classes compete, which is our alternative |

# %%
FULL = vars(cba_fapt.FULL)
TERMS = {
    "a = 1": {"alpha": 1.0},
    "b × 100": {"beta": 100 * cba_fapt.FULL.beta},
    "c × 100": {"gamma": 100 * cba_fapt.FULL.gamma},
    "b, c × 100": {"beta": 100 * cba_fapt.FULL.beta, "gamma": 100 * cba_fapt.FULL.gamma},
    **{f"{norm}, c × 100": {"gamma": 100 * cba_fapt.FULL.gamma, "text_norm": norm} for norm in ("N2", "N3", "N5")},
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

# %%
book.glue("n-all", len(of_loss) + len(of_place) + len(of_cba))
book.glue("sure-all", sum(len(choices.sure(found, "attacked")) for found in (of_loss, of_place, of_cba)))
for name, found in (("capt", of_loss), ("place", of_place), ("cba", of_cba)):
    book.glue(f"n-{name}", len(found))
    book.glue(f"sure-{name}", len(choices.sure(found, "attacked")))
    book.glue(f"which-{name}", ", ".join(choices.sure(found, "attacked")) or "none of them")
    book.glue(f"which-{name}-clean", ", ".join(choices.sure(found, "clean")) or "none of them")

# %% [markdown]
# Measurable under attack, on base or new classes: {glue:text}`which-cba`. On clean images: {glue:text}`which-cba-clean`.
#
# *Unit length* and *held* change terms of tiny force; where such a line agrees with
# the default image by image, that is no evidence of being equivalent.
#
# *Log-probability* raises the share of the image term many times over; that it changes no more than the others is no proof that the score is
# indifferent.
#
# A hundred times the weight gives the terms a say; *b × 100* is also the image term with scores that are a hundred times as large. The norms are compared at that weight,
# so read them against *c × 100*.
#
# A gain on new classes there would speak for the terms, not yet for the maps: the text term is linear in the image feature, and matching plain
# features was not tried. A difference of one image is none.
#
# ## The rivals' forms
#
# FAP's text and its released code differ, and so do papers that repeat FAP's rivals. As *released*, FAP writes the class name
# behind the whole template and leaves its braces in the text, and its rival AdvMaPLe carries FAP's coupling.
#
# AdvVLP has AdvMaPLe's loss over prompts
# that are not coupled. Each table shares one learning rate, that of its first line.

# %%
def as_in(method, other):
    """`method`, at its own learning rate, over the prompts of `other`."""
    return {"name": method, "label": other, "spec": defenses.scaled_spec(at_cba.carrier, defenses.PROMPT_METHODS[other].spec)}


forms = [{"name": "FAP"}, as_in("FAP", "FAP (released)"), as_in("FAP", "FAP (shared projection)"), {"name": "AdvMaPLe"}, as_in("AdvMaPLe", "AdvMaPLe (released)"), as_in("AdvMaPLe", "AdvVLP")]
main = sizes.seeds[0]
tuned_forms = at_cba.tune(forms, [main])
rows = at_cba.measure(tuned_forms)
for first, of in (("FAP", [r for r in rows if "FAP" in r.method]), ("AdvMaPLe", [r for r in rows if "FAP" not in r.method])):
    display(choices.effects_table(choices.effects(at_cba, of, first), of, at_cba, first, caption=f"{first} and its forms, tuning seed {main}."))

# %% [markdown]
# In a tower with few blocks FAP's shared projection has one deep block to serve, so it is the same method twice: that line is a control, and any
# difference in it would be an error of ours.
#
# Three rivals of the papers are not tuned under `tiny` in the chapters: AVP, the large form of chapter 5's AdvVP (many tokens and a wide frame in the image), a
# text context against features that were attacked beforehand (AdvPT) {cite}`zhang2024advpt`, and APT with a context for each class. They are
# tuned in CAPT's protocol.
#
# AVP and AdvPT were not searched: they take one factor on their papers' rate, as the bundled prompt files do. The context for each class takes APT's
# searched factor, which was found for one context.

# %%
apt, chance = scaled(defenses.PROMPT_METHODS["APT"].spec), 100 / len(at_capt.scenario.tests["all"].class_names)
tuned_apt = at_capt.tune([{"name": "APT"}, {"name": "HEP"}, {"name": "CAPT"}, {"name": "APT", "label": "APT (class-specific)", "spec": replace(apt, class_specific=True)}], [main])
tuned_rest = at_capt.unsearched(sizes.factor).tune([{"name": "AdvPT"}, {"name": "AVP"}], [main])
rows = at_capt.measure({main: [*tuned_apt[main], *tuned_rest[main]]})
of_rest = choices.effects(at_capt, rows, "APT")
display(choices.effects_table(of_rest, rows, at_capt, "APT", caption=f"Rivals, CAPT and hand-written prompts (HEP) beside APT, tuning seed {main}; chance is {chance:.0f} percent."))

# %% [markdown]
# A context for each class multiplies what must be learned by the number of classes, from the same shots. AdvPT never sees the
# image tower's gradient while it tunes: it moves text towards features that an attack has left, and another attack leaves others.
#
# CAPT stands here, too, because the first two tables lack this context: where CAPT itself can hardly be told from hand-written prompts, no choice inside
# it has much to lose.
#
# A line that ends below HEP and near chance was not trained by so few steps at this rate, and says nothing about its method.
#
# ## Tuned at one budget, attacked at another
#
# The papers tune and test at one budget. APT's code does so on a tower that was made robust at the same; for CAPT that is our reading, and FAP and CBA-FAPT
# take an undefended tower.
#
# Here every pair is tried on one tower, at the rate of the
# chapter's budget, with one tuning; so not even the diagonal is theirs.

# %%
budgets = sizes.budgets
grids, lines, answers = {"APT": {}, "CAPT": {}}, [], {}
pairs = [(at_capt.pgd, ThreatModel(eps)) for eps in budgets]
for eps in budgets:
    of_budget = at_capt.at(eps).tune([{"name": m, "label": f"{m}, ε {eps:g}"} for m in grids], [main])[main]
    asked = book.measure_each(run, of_budget, at_capt.scenario.tests["all"], pairs, seed=main)
    for m, defense in zip(grids, of_budget, strict=True):
        mine = [r for r in asked if r.method == defense.name]
        answers |= {(m, eps, r.eps_255): r.records for r in mine if r.metric == "robust_acc"}
        grids[m] |= {(eps, r.eps_255): r.value for r in mine if r.metric == "robust_acc"}
        lines.append({"method": m, "tuned at": f"{eps:g}/255", "clean": 100 * next(r.value for r in mine if r.metric == "clean_acc")})
whole = at_capt.scenario.tests["all"]
book.table(lines, formats={"clean": ".1f"}, caption=f"{whole.name}, n = {len(whole)}: clean accuracy in percent by the budget of tuning, tuning seed {main}; chance is {chance:.0f}.")

# %%
figs = [plots.ablation_grid(grid, rows="tuned\nat ε", columns=f"attacked at ε ({m})") for m, grid in grids.items()]
book.show(figs, "budgets", alt="Two small heat tables of accuracy under attack, APT and CAPT, over the budget of tuning and the budget of the attack",
          caption=f"{at_capt.scenario.tests['all'].name}, {at_capt.pgd.label}, percent; budgets in 1/255, seed {main}, n = {len(at_capt.scenario.tests['all'])}.")  # fmt: skip
middle = budgets[len(budgets) // 2]
book.glue("middle", f"{middle:g}")
for m in grids:
    book.glue(f"gain-{m}", book.told(evaluate.paired(*(answers[m, eps, middle] for eps in (middle, budgets[0])))))

# %% [markdown]
# Down a column only the tuning changes. Under attack at {glue:text}`middle`/255, tuning at it rather than at the smallest budget changes APT by
# {glue:text}`gain-APT`, and CAPT by {glue:text}`gain-CAPT`.
#
# The tower below is the same in all rows, made
# robust at one budget, and it bounds what prompts can add.
#
# Where a column is empty from top to bottom, nothing is left on this tower at that budget, and the column compares nothing. A row that also loses its
# clean accuracy was not tuned successfully at that budget and rate.
#
# ## Does an attack on one carry over to the others?
#
# Five methods of chapter 5, on the same tower. Images made against one and shown to another tell how much of an attack is about
# the tower, and how much about what stands on it.

# %%
NAMES = ["HEP", "PAFT", "APT", "TRADES", "CAPT"]
stand = dict(zip(NAMES, at_capt.tune([{"name": m} for m in NAMES], [main])[main], strict=True))
models = {m: d.classifier(whole.class_names, whole.templates) for m, d in stand.items()}
made = {"none": whole.pixels()} | {f"made on {m}": book.craft(run, at_capt.pgd, stand[m].attack_surface(models[m]), whole, at_capt.eps_255, f"{at_capt.pgd.name} on {m}") for m in NAMES}
found, _ = book.measure_shown(run, models, whole, made, at_capt.eps_255)
fig = plots.pair_grid({(r.attack.replace("none", "unchanged"), r.method): r.value for r in found}, marked=[(f"made on {m}", m) for m in NAMES])
book.show(fig, "transfer", alt="A heat table of accuracy: images attacked on each of five methods down, the method that answers across, the diagonal framed",
          caption=f"{whole.name}, n = {len(whole)}, {at_capt.pgd.label} at ε = {at_capt.eps_255:g}/255, tuning seed {main}: percent right. Framed: the attack knows the method.")  # fmt: skip
clean = {r.method: r.value for r in found if r.attack == "none"}
lost = {(r.attack, r.method): clean[r.method] - r.value for r in found if r.attack != "none"}
own = [value for (attack, m), value in lost.items() if attack == f"made on {m}"]
book.glue("own-attack", 100 * sum(own) / len(own))
book.glue("other-attack", 100 * (sum(lost.values()) - sum(own)) / (len(lost) - len(own)))

# %% [markdown]
# On average the attack on a method itself takes {glue:text}`own-attack:.0f` points of its clean accuracy, an attack on a neighbor
# {glue:text}`other-attack:.0f`; the mean hides neighbors whose attack does nothing. What carries over may be about the tower that all share, and the rest
# about the text, the head or the prompts; this grid cannot say.
#
# The diagonal differs a little from the tables above, because these attacks start elsewhere.
#
# Where a neighbor's attack did clearly *more* than a method's own, the own attack would be too weak or misled. The worst case over all rows is the
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
# - Of the {glue:text}`n-all` changes in the first three tables {glue:text}`sure-all` change accuracy under attack measurably here. For the others these images and
#   tunings cannot tell, which is not the same as no effect.
# - Compare placements at equal parameters, and methods at rates of their own, before crediting an idea.
# - A term with next to no share of the gradient cannot be tested by turning its details. Give it weight first.
#
# On your own images: `robustvlm evaluate --data DIR --defense CAPT`, or any other name on this page that has a bundled file.

# %%
book.footer(run)

# %% [markdown]
# ## References
#
# The works cited here stand on the [bibliography page](../book/bibliography.md).
