# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CLIP from pixels to logits, and how a few gray levels break it
#
# *An image becomes one vector, a sentence becomes one vector, and the nearest sentence is the answer. This page writes
# each step out, measures what the model knows, and takes it away again with a few gray levels.*
#
# [Colab](https://colab.research.google.com/github/robustvlm-lite/robustvlm_lite/blob/main/notebooks/01_clip.ipynb) ·
# [source](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/notebooks/01_clip.py) ·
# [paper](https://arxiv.org/abs/2103.00020) ·
# [result card](https://github.com/robustvlm-lite/robustvlm_lite/tree/main/book/cards) ·
# CPU: 1 minute (tiny) · GPU: minutes (paper)

# %% [markdown]
# ## At a glance
#
# | | |
# |---|---|
# | Model | CLIP {cite}`radford2021clip`: an image tower and a text tower, trained so that an image lies near its caption |
# | Zero-shot | the classes are given as words at test time; no image of a class is needed to ask for it |
# | What is attacked | the pixels, ℓ∞, white box: no channel of a pixel moves by more than ε/255 |
# | Gradients usable? deterministic? | yes, and yes: logits are a smooth function of pixels |
# | `paper` profile | OpenAI's CLIP, on 64-pixel photographs enlarged to 224 |
# | Cost | one pass of the image tower for an image; texts are encoded once for a list of classes |
# | Found on this page | of {glue:text}`n-attacked` photographs of {glue:text}`first-name`, {glue:text}`clean-left:.0f` percent are named correctly; noise of ε = {glue:text}`eps`/255 leaves {glue:text}`noise-left:.0f`, an attack of the same size {glue:text}`pgd-left:.0f` |

# %% tags=["parameters"]
profile: str = "tiny"  # "tiny": laptop, 1 minute | "small": real image packs | "paper": OpenAI's CLIP, GPU
seed: int = 0  # image subsets and attack starts derive from it
eps_255: float = 0.0  # main attack budget in steps of 1/255; 0 takes the profile's
n: int = 0  # images per accuracy; 0 takes the profile's numbers
device: str = ""  # "" chooses; "cuda" without a GPU is an error
data_root: str = ""  # folder of the image packs (small, paper)
pretrained: str = ""  # weights file of the backbone (paper), or a model by name, such as fare2-vit-l-14

# %%
import importlib.util
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

from robustvlm_lite import attacks, attention, book, evaluate, plots, scenes, stats, transformer
from robustvlm_lite.book import exercises
from robustvlm_lite.defenses import Defense
from robustvlm_lite.runtime import generator
from robustvlm_lite.threat import ThreatModel

run = book.start("01_clip", profile=profile, seed=seed, device=device, data_root=data_root, pretrained=pretrained,
                 eps_255=eps_255, n=n)  # fmt: skip
eps_255 = run.parameters["eps_255"]
clip, sizes, threat = run.load_clip(), run.sizes, ThreatModel(eps_255)
visual, same = clip.visual, torch.testing.assert_close

# %% [markdown]
# ## Before you start
#
# You need to know what a matrix product, a softmax and a gradient are. You will be able to compute CLIP's logits from
# pixels without a library, to spot three kinds of mistake that cost accuracy without an error message, and to say how far
# noise and an attack of the same size differ. Reading takes about 30 minutes.
#
# ## See it first
#
# The seed drew these photographs; none was in the training of the bundled model ([chapter 10](10_small_clip.py) tells how it
# was made).
#
# On the left is what the model says to them. On the right it sees
# the same photographs after a few steps of projected gradient descent (PGD), an attack that moves no channel of a pixel by
# more than the budget.
#
# Shown are the first of the subset that are right when clean and wrong when attacked. The caption says how many are.

# %%
photos, far = (book.images(run, s) for s in sizes.photos)
model = clip.classifier(photos.class_names, photos.templates)
x, y = photos.pixels(slice(32)).to(run.device), photos.labels[:32].to(run.device)
pgd = attacks.get_attack(sizes.pgd)
x_adv = pgd.run(model.fast(), x, y, threat, [(seed, photos.name, "first", i) for i in range(len(x))])
with torch.no_grad():
    before, after = model(x).softmax(1), model(x_adv).softmax(1)

# %%
good, fooled = before.argmax(1) == y, after.argmax(1) != y
chosen = (2 * (good & fooled) + good.int()).argsort(descending=True, stable=True)[:3]  # else others that are right
panels = {"clean": (x, before), f"attacked, ε = {eps_255:g}/255": (x_adv, after)}
figs = [plots.guesses(i[chosen], p[chosen], photos.class_names, y[chosen], title=t) for t, (i, p) in panels.items()]
book.show(figs, "first", alt="Three photographs with the five classes that the model finds most probable, clean on the left and attacked on the right, where the photographs look the same",
          caption=f"Photographs {', '.join(map(str, chosen.tolist()))} of {photos.name}, clean and under {pgd.label}; ✓ marks the true class. Of the first {len(x)}, {int(good.sum())} are right when clean and {int((good & ~fooled).sum())} of those when attacked.")  # fmt: skip

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape | name in code |
# |---|---|---|---|
# | $x$ | images, pixels in [0, 1] | `[B, 3, H, W]` | `x` |
# | $\mu$, $\sigma$ | mean and standard deviation of each channel, over CLIP's training images | `[3]` | `clip.mean`, `clip.std` |
# | $p$, $N$ | side of a patch in pixels, number of patches | | `p` |
# | $h$ | tokens: one of the image (CLS), one of each patch | `[B, 1 + N, E]` | `tokens` |
# | $q$, $k$, $v$, $d$ | query, key and value of a token in one head, each a matrix times the token; their width | `[B, heads, 1 + N, d]` | `q`, `k`, `v` |
# | $f(x)$ | image feature, unit length | `[B, D]` | `image_features` |
# | $t_c$ | text feature of class $c$, unit length | `[C, D]` for all | `text_features` |
# | $s$ | logit scale | scalar | `clip.logit_scale` |
# | $z$ | logits | `[B, C]` | `logits` |
#
# ## From pixels to patches
#
# A network wants numbers around zero. So each channel is shifted and scaled, with the two constants that belong to the
# weights:
#
# $$\tilde x = \frac{x - \mu}{\sigma}$$
#
# In this book the step lives *inside* the model. Outside, an image is always pixels in [0, 1], and a budget is a number
# of gray levels.


# %%
def my_normalize(x, mean, std):
    """Pixels [B, 3, H, W] in [0, 1] -> about zero mean and unit spread in each channel."""
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


few = x[:8]
same(my_normalize(few, clip.mean, clip.std), clip.normalize(few))

# %% [markdown]
# Next the image is cut into squares of $p \times p$ pixels. Each square, laid out as one long row of numbers, is
# multiplied with the same matrix: one column for each of $E$ filters. That is what a convolution with stride $p$ does.


# %%
def squares(x, p):
    """[B, 3, H, W] -> [B, N, 3, p, p], row by row."""
    cut = x.unfold(2, p, p).unfold(3, p, p)  # [B, 3, H/p, W/p, p, p]
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def my_patches(x, filters):
    """Normalized images and filters [E, 3, p, p] -> one vector for each patch, [B, N, E]."""
    return squares(x, filters.shape[-1]).flatten(2) @ filters.flatten(1).T


# %%
with torch.no_grad():
    patches = my_patches(clip.normalize(few), visual.conv1.weight)
    same(patches, visual.conv1(clip.normalize(few)).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)

# %%
p, strongest = visual.conv1.weight.shape[-1], visual.conv1.weight.flatten(1).norm(dim=1).argsort(descending=True)
tiles = {f"an image as {clip.grid**2} patches": squares(few[:1], p)[0],
         "the 64 strongest filters": plots.stretched(visual.conv1.weight[strongest[:64]])}  # fmt: skip
book.show(plots.mosaics(tiles), "patches", alt="Left, a photograph cut into a grid of square patches. Right, learned filters of the size of a patch: edges, stripes, spots and colors",
          caption=f"Left: the first photograph as the model receives it, {clip.grid} × {clip.grid} patches of {p} × {p} pixels. Right: the filters that each patch is compared with, each stretched about gray.")  # fmt: skip

# %% [markdown]
# Everything that the model will ever know of a patch is how much it resembles these filters: for each, a weighted sum of
# all its pixels.
#
# An attacker who moves every pixel by one gray level, up where the weight is positive and down where it
# is negative, moves the sum by one level times the sum of the weights' sizes. Nothing cancels.
#
# ## From patches to one vector
#
# A learned token, CLS, is put in front; it will collect what the image is. Each token gets a learned position added,
# for the patches carry none of their own.


# %%
def my_tokens(patches, visual):
    """[B, N, E] -> [B, 1 + N, E]: CLS in front, a position added to each token, layer norm."""
    cls = visual.class_embedding.expand(len(patches), 1, -1)
    return visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding)


with torch.no_grad():
    tokens, stages = my_tokens(patches, visual), transformer.image_stages(visual, clip.normalize(few))
    same(tokens, stages[0], rtol=1e-4, atol=1e-4)

# %% [markdown]
# Now the tokens look at each other. In each block every token asks a question (query $q$), is asked (key $k$) and has
# something to give (value $v$); it takes from all tokens by how well its query matches their keys:
#
# $$\text{attention}(h) = \operatorname{softmax}\!\big(q k^\top / \sqrt{d}\,\big)\, v$$
#
# Several heads of width $d$ do so side by side. A small network then works on each token by itself, and both results
# are *added* to the token.


# %%
def my_attention(attn, h, mask=0.0):
    """Self-attention of tokens h [B, N, E]; `mask` is added to the matches."""
    b, n_tokens, e = h.shape
    qkv = torch.nn.functional.linear(h, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=2)
    q, k, v = (part.view(b, n_tokens, attn.num_heads, -1).transpose(1, 2) for part in qkv)  # [B, heads, N, d]
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + mask).softmax(dim=3)
    return attn.out_proj((weights @ v).transpose(1, 2).reshape(b, n_tokens, e))


# %%
def my_tower(blocks, h, mask=0.0):
    """All blocks, one after the other."""
    for block in blocks:
        h = h + my_attention(block.attn, block.ln_1(h), mask)
        h = h + block.mlp(block.ln_2(h))
    return h


with torch.no_grad():
    last = my_tower(visual.transformer.resblocks, tokens)
    same(last, stages[-1], rtol=1e-3, atol=1e-3)

# %% [markdown]
# At the end only CLS is read. A matrix takes it into the space that images and texts share, and it is divided by its
# length: the feature is a direction.


# %%
def my_feature(h, visual):
    """Tokens [B, 1 + N, E] -> unit image features [B, D], from CLS alone."""
    raw = visual.ln_post(h[:, 0]) @ visual.proj
    return raw / raw.norm(dim=1, keepdim=True)


with torch.no_grad():
    features = my_feature(last, visual)
    same(features, clip.image_features(few), rtol=1e-3, atol=1e-4)

# %% [markdown]
# The text goes the same way. A tokenizer cuts a sentence into pieces of words, a start in front and an end behind. Each
# token may look only at those before it, so the end has seen the whole sentence, and it is the one that is read.


# %%
def my_text_features(texts, clip):
    """Sentences -> unit text features [T, D], from the end token."""
    ids = clip.tokenizer(texts).to(clip.device)  # [T, L]; zeros behind the end
    length = ids.shape[1]
    later = torch.full((length, length), -torch.inf, device=ids.device).triu(1)
    h = clip.model.token_embedding(ids) + clip.model.positional_embedding
    h = clip.model.ln_final(my_tower(clip.model.transformer.resblocks, h, later))
    raw = h[torch.arange(len(ids)), ids.argmax(dim=1)] @ clip.model.text_projection
    return raw / raw.norm(dim=1, keepdim=True)


# %%
captions = [photos.templates[0].format(name) for name in photos.class_names]
with torch.no_grad():
    same(my_text_features(captions, clip), clip.encode_text(captions), rtol=1e-3, atol=1e-4)
pieces = [clip.tokenizer.decode([i]).strip() for i in clip.tokenizer.encode(captions[-1])]
print(" | ".join(pieces))

# %% [markdown]
# ## From two vectors to a probability
#
# Both are directions, so their product is a cosine. A logit is that cosine times the learned scale, and softmax makes
# probabilities of the logits of all classes:
#
# $$z_c = s\, f(x) \cdot t_c, \qquad P(c \mid x) = \frac{e^{z_c}}{\sum_k e^{z_k}} .$$


# %%
def my_probabilities(image_features, text_features, scale):
    """Unit features [B, D] and [C, D] -> probabilities [B, C]."""
    z = scale * image_features @ text_features.T
    e = (z - z.amax(dim=1, keepdim=True)).exp()  # softmax ignores a constant; without this, exp overflows
    return e / e.sum(dim=1, keepdim=True)


same(my_probabilities(features, model.text_features, clip.logit_scale), before[:8], rtol=1e-2, atol=1e-4)

# %%
everything = book.batched(run, clip.image_features, photos)
cosines, scale = everything @ model.text_features.cpu().T, float(clip.logit_scale)
right = cosines.argmax(1) == photos.labels
scales = sorted({2.0**k for k in range(9)} | {scale})
sure = [(s * cosines).softmax(1).amax(1).mean().item() for s in scales]
book.glue("scale", scale)
book.glue("sure", 100 * sure[scales.index(scale)])

# %%
some = y[:5].cpu().unique()
names = [photos.class_names[c] for c in some]
figs = [plots.similarities(x[:5], names, cosines[:5, some]),
        plots.convergence({"confidence": (scales, sure), "accuracy": (scales, [right.float().mean().item()] * len(scales))},
                          quantity="mean of the images (%)", steps="logit scale", percent=True, log=True)]  # fmt: skip
book.show(figs, "scale", alt="Left, a table of cosines between five photographs and their class names, the largest of each photograph framed. Right, mean confidence rising with the logit scale while accuracy stays a flat line",
          caption=f"Left: cosines of five photographs with the names of their classes; framed, the nearest. Right: what the scale does to them, over {len(photos)} photographs: mean probability of the answer (confidence), and accuracy.")  # fmt: skip

# %% [markdown]
# The scale decides how sure the model sounds, not what it says: the order of the cosines stays. At the learned scale of
# {glue:text}`scale:.1f` the answer has a mean probability of {glue:text}`sure:.0f` percent, and
# {glue:text}`know-first:.0f` percent of the answers are right. Where the curves meet, it is on average as often right as it is sure.
#
# For an attacker the scale matters in another way. Cross-entropy of a confident image is flat, and in half precision its
# gradient rounds to zero: [chapter 03](03_sound_evaluation.py) counts how many pixels then have none.
#
# ## Prompts
#
# A class is a name; what the text tower reads is a sentence made from it by a *template*. Several templates can be
# averaged: each feature at unit length, then the mean, then unit length again. CLIP's authors report that this helps
# {cite}`radford2021clip`. Whether it helps here is a question for paired intervals.
#
# The image features do not depend on the text. They were computed once, above, and every line below reads the same ones.

# %%
figs, both = [], {photos: everything, far: book.batched(run, clip.image_features, far)}
for key, (images, found) in zip(("first", "second"), both.items(), strict=True):
    listed = {"{}": ["{}"], "the set's templates": images.templates} | {t: [t] for t in sizes.templates}
    z = {name: book.logits_of(clip, found, images.class_names, templates) for name, templates in listed.items()}
    rows = {r.method: r for r in book.measure_logits(run, images, z)}
    diffs = {m: evaluate.paired(r.records, rows["{}"].records) for m, r in rows.items() if m != "{}"}
    figs.append(plots.paired_bars(diffs, reference="the bare name", quantity="accuracy", title=images.name))
    book.glue(f"ensemble-{key}", book.told(diffs["the set's templates"]))
    book.glue(f"not-{key}", book.told(diffs["not a {}"]))
    worst = min(diffs, key=lambda name: diffs[name][0])
    book.glue(f"worst-{key}", f"“{worst}”, {100 * diffs[worst][0]:.1f} points".replace("-", "−"))
    book.glue(f"{key}-name", images.name)

# %%
book.show(figs, "prompts", alt="Accuracy of several prompt templates minus that of the bare class name, with intervals, one panel a set of photographs",
          caption=f"Accuracy with each template minus that with the bare class name, on the same images, with paired 95 % intervals; n = {len(photos)} and {len(far)}. A filled dot: the interval excludes zero.")  # fmt: skip
plain, asked, negated = (clip.text_features(photos.class_names, [t]).cpu() for t in ("{}", photos.templates[0], "not a {}"))
book.glue("same-cosine", (plain * asked).sum(1).mean())
book.glue("not-cosine", (plain * negated).sum(1).mean())
book.glue("other-cosine", ((plain @ plain.T).sum() - len(plain)) / (len(plain) * (len(plain) - 1)))

# %% [markdown]
# The average of a set's own templates against the bare class name: on {glue:text}`first-name`
# {glue:text}`ensemble-first`; on {glue:text}`second-name` {glue:text}`ensemble-second`.
#
# A bundled model was trained with several of these sentences, drawn at random, so it had reason to read them alike: the bare name
# and the first template have a mean cosine of {glue:text}`same-cosine:.2f`. OpenAI's model read captions of every kind.
#
# A template can also cost. Most on the first set: {glue:text}`worst-first`; on the second: {glue:text}`worst-second`.
#
# One bar deserves a second look. "not a {}" says the opposite of what is wanted. Against the bare name it makes
# {glue:text}`not-first` on the first set, and {glue:text}`not-second` on the second.
#
# The feature of a name and that of its negation have a mean cosine of {glue:text}`not-cosine:.2f`; two different names have
# {glue:text}`other-cosine:.2f`. For a bundled model that says nothing about negation: no caption of its training held the
# word "not", and a word that was never read moves the feature little.
#
# Whether a CLIP that read it does better is a question for the `paper` profile.
#
# ## What it knows
#
# Accuracy on photographs and on rendered scenes, each under the templates of its set. All names of a set compete,
# and *chance* is one over their number. Intervals are Wilson's {cite}`wilson1927`.
#
# For a bundled model, no test image was in training, and the class names of the photographs were. Of OpenAI's training data
# nobody outside knows either.

# %%
rendered = {s[0]: book.images(run, s) for s in sizes.scenes}
drawn = {name: book.batched(run, clip.image_features, images) for name, images in rendered.items()}
known = []
for images, found in [*both.items(), *((rendered[name], drawn[name]) for name in rendered)]:
    known += book.measure_logits(run, images, {"CLIP": book.logits_of(clip, found, images.class_names, images.templates)})

# %%
for key, row in zip(("first", "second"), known, strict=False):
    book.glue(f"know-{key}", 100 * row.value)
for row in known[2:]:
    book.glue(f"know-{row.dataset.split('/')[1]}", 100 * row.value)
classes = {images.name: len(images.class_names) for images in (*both, *rendered.values())}
book.sets_table(known, classes, caption="What the model names correctly, zero-shot.")

# %% [markdown]
# The scenes ask for one thing at a time: the color of an object, its shape, its texture, how many objects there are, or
# color and shape together. Compare a line with its chance before you compare two lines: a task of eight names is easier than one of eighty.
#
# ## What it confuses
#
# An accuracy hides *which* errors. The left grid shows the photographs' classes that errors touch most, the right one how
# scenes are counted.

# %%
answers = {row.dataset: torch.from_numpy(evaluate.column(row.records, "prediction")) for row in known}
figs = []
for images in (photos, rendered["scenes/count"]):
    figs.append(plots.confusion_grid(images.labels, answers[images.name], images.class_names, title=images.name))
book.show(figs, "confusions", alt="Two grids of true classes against answers with numbers of images: the framed diagonal holds the right answers, the cells off it the errors",
          caption="Numbers of images: true class down, answer across; at most the ten classes with most errors. Frames: right answers.")  # fmt: skip

# %%
def near_misses(images, given):
    """Of each wrong answer: is its text in the nearest fifth of the others to the true class's? And would a random one be?"""
    text = clip.text_features(images.class_names, images.templates).cpu()
    rank = (-(text @ text.T)).argsort(1).argsort(1)  # 0 is the class itself
    k, wrong = max(1, round((len(text) - 1) / 5)), given != images.labels
    hits = rank[images.labels, given][wrong] <= k
    return torch.stack([hits.float(), torch.full_like(hits, k / (len(text) - 1), dtype=torch.float)])


def glue_share(name, hits, chance):
    """Share of hits [n] in percent, with its interval, n and that of wrong answers drawn at random."""
    low, high = stats.wilson(int(hits.sum()), len(hits)) if len(hits) else (0, 1)
    interval = f"95 % interval {100 * low:.0f} to {100 * high:.0f}, n = {len(hits)}"
    book.glue(name, f"{100 * hits.mean():.0f} percent ({interval}; drawn at random {100 * chance.mean():.0f})")


glue_share("near", *torch.cat([near_misses(images, answers[images.name]) for images in both], dim=1))

# %% [markdown]
# Are these errors near misses in words? Rank, for every true class, the other classes by the cosine of their *text* features.
# Of the errors on both sets of photographs, {glue:text}`near` go to the nearest fifth of the texts.
#
# In part that is geometry. A wrong answer is the text nearest to an image feature, and that feature lies near the true text;
# so even errors made by noise would prefer neighbors of the true text. Answers drawn at random are therefore a low bar.
#
# Does an attacker go the same short way? The last section counts again.
#
# ## Words compose
#
# CLIP is not a classifier with a fixed list. A caption can name what no training image showed. The rendered world tests
# that: ten pairs of color and shape, framed below, were never drawn in the training of a bundled model, and no caption of them was
# ever read. Each of their words was, in other pairs.

# %%
pairs, held = rendered["scenes/pair"], rendered["scenes/pair-heldout"]
rows = {row.dataset: row for row in known if row.dataset in ("scenes/pair", "scenes/pair-heldout")}
correct = {images.name: answers[images.name] == images.labels for images in (pairs, held)}
split = {name: tuple(name.split()) for name in pairs.class_names}
cells = {}
for label, name in enumerate(pairs.class_names):
    hits = torch.cat([correct[images.name][images.labels == label] for images in (pairs, held)])
    if len(hits):
        cells[split[name]] = hits.float().mean().item()

# %%
cells = {pair: cells[pair] for pair in split.values() if pair in cells}
marked = [split[name] for name in scenes.HELD_OUT_PAIRS if split[name] in cells]
book.show(plots.pair_grid(cells, marked=marked), "pairs", alt="A grid of colors down and shapes across with the accuracy of each pair; the pairs that training never showed are framed",
          caption=f"Accuracy in percent of each pair among all {len(pairs.class_names)} names, n = {len(pairs)} seen and {len(held)} held-out scenes in all. Framed: held out.")  # fmt: skip

# %% [markdown]
# A cell holds few scenes: the grid is for looking, the table below for measuring. Two controls in it say what kind of
# composition this is. *Words swapped* asks for "circle cyan". *Color + shape* never writes
# a pair at all; it adds the feature of "the cyan shape" to that of "the circle" and takes the sum's direction.

# %%
colors = clip.text_features(scenes.COLORS, scenes.TASKS["color"][1]).cpu()
shapes = clip.text_features(scenes.SHAPES, scenes.TASKS["shape"][1]).cpu()
added = torch.stack([colors[scenes.COLORS.index(c)] + shapes[scenes.SHAPES.index(s)] for c, s in split.values()])
swapped = clip.text_features([f"{s} {c}" for c, s in split.values()], pairs.templates).cpu()
texts = {"words swapped": swapped, "color + shape": torch.nn.functional.normalize(added, dim=1)}

# %%
pair_rows = list(rows.values())
for images in (pairs, held):
    pair_rows += book.measure_logits(run, images, {m: scale * drawn[images.name] @ t.T for m, t in texts.items()})
book.glue("chance-pair", 100 / len(split))
told, true = answers[held.name], held.labels  # a label is color · shapes + shape
book.glue("held-color", 100 * (told // len(scenes.SHAPES) == true // len(scenes.SHAPES)).float().mean())
book.glue("held-shape", 100 * (told % len(scenes.SHAPES) == true % len(scenes.SHAPES)).float().mean())
columns = {"seen pairs": {"dataset": pairs.name}, "held-out pairs": {"dataset": held.name}}
book.accuracy_table(pair_rows, columns=columns, caption=f"Three ways to write {len(split)} pairs; all of them compete.")

# %% [markdown]
# On held-out pairs the model is right on {glue:text}`know-pair-heldout:.0f` percent, where guessing gives
# {glue:text}`chance-pair:.1f` and a model that knew only the pairs it saw would score nothing. The color alone is right on {glue:text}`held-color:.0f` percent, the shape alone on
# {glue:text}`held-shape:.0f`.
#
# Read the other two lines as a warning, too. A model that does nearly as well with swapped words or with a sum of
# features has understood *which* words occur. That is enough here, where a scene holds one object, and not enough to
# tell "a red star left of a blue ring" from its mirror image.
#
# ## Three kinds of mistake, live
#
# None of these raises an error. The first line is the intended use. The others change one thing: the prompt, the list of
# classes, or what happens to the pixels before the model normalizes them.

# %%
intended, others = model.text_features.cpu(), [name for name in far.class_names if name not in photos.class_names]
read = {
    "as intended": intended,
    "prompt: a sketch of a {}.": clip.text_features(photos.class_names, ["a sketch of a {}."]).cpu(),
    "prompt: {} never filled in": clip.encode_text([photos.templates[0]] * len(intended)).detach().cpu(),
    "classes: shifted by one": intended.roll(1, 0),
}
logits = {name: scale * everything @ text.T for name, text in read.items()}
# %%
imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=run.device).view(2, 3, 1, 1)
pixels = {
    "pixels: normalized twice": clip.normalize,
    "pixels: not normalized": lambda x: x * clip.std + clip.mean,  # the model's own step then cancels
    "pixels: ImageNet's mean and std": lambda x: (x - imagenet[0]) / imagenet[1] * clip.std + clip.mean,
    "pixels: 0 to 255": lambda x: 255 * x,
    "pixels: blue and red swapped": lambda x: x.flip(1),
}
for name, change in pixels.items():
    wrong = book.batched(run, lambda x, change=change: clip.image_features(change(x)), photos)
    logits[name] = scale * wrong @ intended.T

# %%
mistakes = sorted(book.measure_logits(run, photos, logits), key=lambda row: row.value)
right_use = next(row for row in mistakes if row.method == "as intended")
longer = {f"{len(others)} more names": book.logits_of(clip, everything, [*photos.class_names, *others], photos.templates)}
(among_more,) = book.measure_logits(run, photos, longer)
book.glue("more-names", len(others))
book.glue("among-more", book.told(evaluate.paired(among_more.records, right_use.records)))
book.glue("loud", "; ".join(r.method for r in mistakes if r.ci95[0] <= 1 / len(photos.class_names)) or "none")
book.paired_table(mistakes, right_use, caption=f"{photos.name}: one thing changed at a time, the costliest first.")

# %% [markdown]
# Only these do no better than guessing, and somebody will look for them: {glue:text}`loud`. Of the others some cost much and some
# nothing that a reader would notice, and their table goes to print.
#
# A published accuracy of the same weights on the same images would show it; where there is none, write the pipeline out
# once, as above, and compare tensors. "A sketch of a {}." is a mistake of its own kind: a bundled model learned the word, as
# a style that these photographs do not have.
#
# A longer class list is no mistake in itself, but a harder task: with {glue:text}`more-names` more names the same model makes
# {glue:text}`among-more`. Two accuracies under different lists cannot be compared, however alike the names of the data sets.
#
# ## Where does it look?
#
# CLIP has no attention between image and text. But every patch token can be taken into the joint space as CLS is, and
# its product with a caption's feature makes a *text-guided map*.
#
# [Chapter 04](04_tga_zsr.py) is about a defense that is built on one. "Eq. 5" is that paper's; drawn here is its cosine form,
# which divides each token by its own length.
#
# Rendered scenes have exact masks. Each map marks as many pixels as the object has, those where it is highest, and is
# scored by intersection over union (IoU) with the mask.
#
# Two more maps follow the attention through all blocks. *Rollout* multiplies the blocks' matrices and knows no text
# {cite}`abnar2020rollout`. *Gradient rollout* counts an attention by how much it raises the cosine with a caption
# {cite}`chefer2021generic`; it is drawn for the scene's own caption and, as a control, for one that shares neither its color
# nor its shape.
#
# Three references frame the scores: *random* maps, a *center prior* that looks at the middle, and the mask itself seen
# through the grid of patches, about the best that a map of this size can do.

# %%
look = rendered["scenes/pair"].take(range(min(sizes.maps, len(pairs))))
x_maps, own = look.pixels().to(run.device), clip.text_features(look.class_names, look.templates)
references = {"random": attention.random_map(clip.grid, len(look), generator(seed, "random map")),
              "center prior": attention.center_prior(clip.grid, len(look))}  # fmt: skip
named = attention.named_maps(clip, x_maps, own[look.labels], own.mean(0))
limit = {"mask on the patch grid": attention.mask_map(look.masks, clip.grid)}

# %%
flows = {"rollout (no text)": attention.attention_rollout(clip, x_maps)}
caption, (n_colors, n_shapes) = own - own.mean(0), (len(scenes.COLORS), len(scenes.SHAPES))
color, shape = look.labels // n_shapes, look.labels % n_shapes
neither = (color + n_colors // 2) % n_colors * n_shapes + (shape + n_shapes // 2) % n_shapes  # another color and shape
for name, label in (("gradient rollout", look.labels), ("gradient rollout, wrong text", neither)):
    flows[name] = attention.gradient_rollout(clip, x_maps, caption[label])

# %%
named |= flows
found = book.measure_maps(run, "CLIP", look, references | named | limit, "none", 0.0, against="center prior")
over = {r.extra["map"]: r for r in found}
maps = [name for name in named if "wrong text" not in name]  # a control is no map to recommend
beats = [name for name in maps if over[name].extra["over"][1] > 0]
right_text, wrong_text = (attention.map_iou(named[f"gradient rollout{kind}"].cpu(), look.masks) for kind in ("", ", wrong text"))
low_high = "{:+.3f} ({:+.3f} to {:+.3f})".format(*stats.paired_bootstrap(wrong_text.numpy(), right_text.numpy()))
book.glue("wrong-text", low_high.replace("-", "−"))
book.glue("beats", "; ".join(beats) or "none of them")
book.glue("fails", "; ".join(name for name in maps if name not in beats) or "none of them")
book.table([{"map": name, "IoU": f"{r.value:.3f}", "95 % interval": f"{r.ci95[0]:.3f} to {r.ci95[1]:.3f}",
             "over center prior": "–" if name == "center prior" else "{:+.3f} ({:+.3f} to {:+.3f})".format(*r.extra["over"]).replace("-", "−")} for name, r in over.items()],
           caption=f"Overlap of maps with exact object masks, n = {len(look)} scenes; last column: paired difference with its 95 % interval.", card_link=True)  # fmt: skip

# %%
columns = ("text-guided (Eq. 5)", "value path − mean", "CLS attention (no text)", "rollout (no text)", "gradient rollout")
shown = {name: named[name][:3] for name in columns}
fig = plots.map_strip(x_maps[:3], shown, look.masks[:3])
book.show(fig, "maps", alt="Three rendered scenes, each with five maps drawn over it and the outline of its object",
          caption="The first three scenes of the subset. Outline: exact object mask.")  # fmt: skip

# %% [markdown]
# These maps lie on the object more than a look at the middle would: {glue:text}`beats`. These do not:
# {glue:text}`fails`.
#
# The control asks whether the words matter to the map. With the wrong caption the gradient rollout's overlap differs from
# that with the right one by {glue:text}`wrong-text`. In a scene of one object no caption has another place to point at, so
# a difference shows that words matter, and not that they would find their object among two.
#
# Where there is none, or the wrong caption does better, the map's overlap is no evidence that it follows the text.
#
# Nothing in training asks for such a map. The loss reads CLS alone; no patch token is ever compared with a text. In
# OpenAI's CLIP, too, the plain product can be high on the background and low on the object {cite}`li2023clipsurgery`.
#
# The others are repairs: flip the sign, or take only the *values* of the last block, which have not been mixed there
# {cite}`zhou2022maskclip`, and subtract what all captions share. A picture of "where the model looks" is a choice among
# them, so name the map, and print its references.
#
# ## A few gray levels
#
# How much change does it take? The attack is PGD {cite}`madry2018pgd`: follow the sign of the gradient of the loss, one small
# step at a time, and stay within ε of the image. The control is noise of the same size: every channel of every pixel moves by ε, up or down by
# a coin.

# %%
cut = sizes.attacked
first = {s.name: replace(s.take(range(min(cut, len(s)))), name=f"{s.name}[:{cut}]") for s in (photos, pairs)}
undefended, noise = Defense(clip), attacks.get_attack("noise-corner")
grid = [(attack, ThreatModel(eps)) for eps in sizes.eps_grid for attack in (pgd, noise)]
curves = {name: book.measure(run, undefended, images, grid) for name, images in first.items()}
figs = [plots.accuracy_vs_eps(rows, chance=1 / len(first[name].class_names)) for name, rows in curves.items()]
book.show(figs, "curves", alt="Two panels: accuracy under noise and under the attack against the budget, with the line of chance",
          caption=f"Accuracy against ε under {pgd.label} and under noise of the same size, 95 % intervals.")  # fmt: skip

# %% [markdown]
# The same budget as a table, at ε = {glue:text}`eps`/255. Two columns guard against wrong readings. *8 bits* rounds the attacked image to whole
# gray levels, as a file would. *ε after normalizing* is the misplaced normalization once more: an attack
# that takes its ε on normalized tensors changes pixels by about σ times as much.

# %%
book.glue("eps", f"{eps_255:g}")
small = ThreatModel(round(eps_255 * float(clip.std.mean()), 3))
main = first[photos.name]
book.glue("n-attacked", len(main))
rows = book.measure(run, undefended, main, [(pgd, threat), (noise, threat), (pgd, small)])
at = {(r.attack, r.eps_255, r.metric): r for r in rows}
clean, noisy, hit = rows[0], at[noise.name, eps_255, "robust_acc"], at[pgd.name, eps_255, "robust_acc"]
half = {name: [r.eps_255 for r in found if r.attack == pgd.name and r.value < found[0].value / 2] for name, found in curves.items()}
for name, value in {"noise-left": noisy.value, "pgd-left": hit.value, "clean-left": clean.value,
                    "pgd-weak": at[pgd.name, small.eps_255, "robust_acc"].value}.items():  # fmt: skip
    book.glue(name, 100 * value)
turned = torch.from_numpy(evaluate.column(hit.records, "prediction"))
turned = torch.where(torch.from_numpy(evaluate.column(clean.records, "correct")), turned, main.labels)  # right when clean
glue_share("near-attacked", *near_misses(main, turned))
book.glue("noise-words", book.told(evaluate.paired(noisy.records, clean.records)))
book.glue("half", f"{min(half[photos.name]):g}/255" if half[photos.name] else "more than the largest of these")

# %%
columns = {"clean": {"metric": "clean_acc"}, "noise": {"attack": noise.name, "metric": "robust_acc"},
           "PGD": {"attack": pgd.name, "eps_255": eps_255, "metric": "robust_acc"},
           "PGD, 8 bits": {"attack": pgd.name, "eps_255": eps_255, "metric": "robust_acc_8bit"},
           "PGD, ε after normalizing": {"attack": pgd.name, "eps_255": small.eps_255, "metric": "robust_acc"}}  # fmt: skip
book.accuracy_table(rows, columns=columns, caption=f"{main.name}, undefended.")

# %% [markdown]
# Noise changes the accuracy by {glue:text}`noise-words`. The attack, which changes no pixel by more, leaves {glue:text}`pgd-left:.0f` of
# {glue:text}`clean-left:.0f` percent. The smallest budget of the grid that takes more than half is {glue:text}`half`.
#
# Where does the attack arrive? Of the answers that it turned, {glue:text}`near-attacked` lie in the nearest fifth of the texts.
# It only asked to leave the true class.
#
# Taken on normalized tensors, the "same" ε leaves {glue:text}`pgd-weak:.0f` percent. Nothing was defended; the attack
# was weaker than its caption says. Ask of every robust accuracy in which unit its budget was counted.
#
# Where does the difference between noise and attack come from? Both start with a change of the same size. Follow it
# through the tower: the change of all tokens after each block, as a share of their length.

# %%
def change_by_depth(x, moved):
    """Length of the change over length, mean over images: pixels, tokens, then each block, and last the feature."""
    pairs = [(x, moved), *zip(*(transformer.image_stages(visual, clip.normalize(i)) for i in (x, moved)), strict=True)]
    pairs.append((clip.image_features(x), clip.image_features(moved)))
    return [((b - a).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)).mean().item() for a, b in pairs]


# %%
keys = [generator(seed, "depth", i) for i in range(len(x))]
with torch.no_grad():
    depth = {"attack": change_by_depth(x, x_adv), "noise": change_by_depth(x, x + threat.random_start(x, keys, corner=True))}
for name, curve in depth.items():
    book.glue(f"pixels-{name}", curve[0])
    book.glue(f"blocks-{name}", curve[-2] / max(curve[0], 1e-9))
    book.glue(f"feature-{name}", curve[-1])
book.glue("growth", depth["attack"][-1] / max(depth["noise"][-1], 1e-9))

# %%
names = ["pixels", "tokens", *(f"block {k + 1}" for k in range(len(depth["attack"]) - 3)), "feature"]
book.show(plots.convergence(depth, quantity="change, share of length", steps="", names=names), "depth",
          alt="Two curves over the depth of the image tower, from pixels to the feature: the change that noise makes and the change that the attack makes",
          caption=f"How a change of at most ε = {eps_255:g}/255 travels through the image tower, mean of {len(x)} photographs. Up to the last block all tokens count; the feature reads CLS alone.")  # fmt: skip

# %% [markdown]
# At the pixels the attack's change is {glue:text}`pixels-attack:.3f` of the image's length and the noise's
# {glue:text}`pixels-noise:.3f`. At the feature they are {glue:text}`feature-attack:.2f` and
# {glue:text}`feature-noise:.2f`: the attack has turned the feature {glue:text}`growth:.1f` times as far.
#
# Noise grows, too: its share of all tokens after the last block is {glue:text}`blocks-noise:.1f` times that of the pixels, the
# attack's {glue:text}`blocks-attack:.0f` times. Noise has no direction, and a part of it cancels in every sum. The attack gives
# each pixel the sign that lets the sums add up: the linear explanation of adversarial examples {cite}`goodfellow2015fgsm`,
# carried on through the blocks.
#
# The chapters that follow ask what can be done about it: attack properly first, then train, prompt or adapt against
# attacks.
#
# ## Exercises
#
# A solution is folded under each; the line at its end checks it, and yours.
#
# **1 (easy).** Write the ensemble, `ensemble(raw)`: raw text features of several templates, none of unit length, become
# one unit feature for each class. Each template counts the same.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def ensemble(raw):
    """raw [T, C, D] -> [C, D], unit length."""
    mean = torch.nn.functional.normalize(raw, dim=2).mean(dim=0)
    return torch.nn.functional.normalize(mean, dim=1)


exercises.check_ensemble(ensemble)

# %% [markdown]
# **2 (maths).** Normalization is linear, and so are the filters. Show that
# $\sum_i w_i (x_i - \mu)/\sigma = \sum_i (w_i/\sigma)\, x_i - \sum_i w_i \mu / \sigma$, and write `folded(weight, mean, std)`,
# which gives filters and a bias for plain pixels. With them no normalization is left that one could misplace.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def folded(weight, mean, std):
    """weight [E, 3, p, p], mean, std [3] -> (weight, bias [E]) for pixels in [0, 1]."""
    weight = weight / std.view(3, 1, 1)
    return weight, -(weight * mean.view(3, 1, 1)).sum(dim=(1, 2, 3))


exercises.check_folded(folded, clip)

# %% [markdown]
# **3 (open).** Find templates that beat the bare class name. Choose them on `tried`; `held` is shown with `final=True`, once,
# when you have chosen. What does it mean if you gain on the first and not on the second, and how many lists did you try?

# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
order = torch.randperm(len(photos), generator=generator(seed, "exercise split"))
tried, held_back = (replace(photos.take(part), split=name) for part, name in zip(order.chunk(2), ("tried", "held"), strict=True))
exercises.check_templates(["a photo of a {}.", "a picture of the {}.", "{}"], clip, tried, held_back, final=True)

# %% [markdown]
# ## Takeaways
#
# - A logit is the cosine of an image's direction with a sentence's, times a scale. Normalization belongs to the model,
#   and a budget to the pixels.
# - Prompts are part of the classifier. On this page the set's templates against the bare class name make
#   {glue:text}`ensemble-first`; the class list and the template stand beside every accuracy for that reason.
# - Words compose: pairs that training never showed are named on {glue:text}`know-pair-heldout:.0f` percent of the scenes, among
#   all pairs.
# - A map of "where the model looks" needs a name and references. Above the center prior here: {glue:text}`beats`.
# - Noise of ε = {glue:text}`eps`/255 leaves {glue:text}`noise-left:.0f` percent, an attack of that size {glue:text}`pgd-left:.0f`. The model is not
#   sensitive to change, but to direction.
#
# Next: [chapter 02](02_attacks.py) builds the attack, and others beside it.

# %%
book.footer(run)

# %% [markdown]
# ## References
#
# The works cited here stand on the [bibliography page](../book/bibliography.md).
