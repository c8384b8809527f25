# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The bundled CLIP: how it was made, what it knows, and where it fails
#
# *Every other page attacks or defends a small model that this project trained from scratch. This page shows what it was
# trained on and how, reads its learning curve, and looks for its weak spots.*
#
# [Colab](https://colab.research.google.com/github/robustvlm-lite/robustvlm_lite/blob/main/notebooks/10_small_clip.ipynb) ·
# [source](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/notebooks/10_small_clip.py) ·
# [training script](https://github.com/robustvlm-lite/robustvlm_lite/blob/main/data_scripts/pretrain_clip.py) ·
# [result card](https://github.com/robustvlm-lite/robustvlm_lite/tree/main/book/cards) ·
# CPU: 2 minutes (tiny) · GPU: minutes (paper)

# %% [markdown]
# ## At a glance
#
# | | |
# |---|---|
# | Model | `nano`: an image and a text transformer, {glue:text}`parameters` parameters in all, images of 64 pixels |
# | Architecture | CLIP's {cite}`radford2021clip` |
# | Loss | CLIP's in one direction, from image to text, and with one label set an image: who is a wrong answer for whom |
# | Trained on | {glue:text}`train-images` photographs whose captions were written from class names, and scenes drawn by code |
# | Took | {glue:text}`hours-least:.1f` hours on {glue:text}`machine` at the pace of its fastest stretches ({glue:text}`hours:.1f` elapsed, beside other work); {glue:text}`images-seen:.1f` million images seen |
# | Stands in for | OpenAI's CLIP, which cannot be fetched everywhere; `paper` profiles take that one, on 64-pixel photographs enlarged to 224 |
# | Does not know | what no caption named: it has read a few hundred class names, and no web page |
# | Found on this page | of {glue:text}`n-broken` photographs of {glue:text}`first-name` it names {glue:text}`clean-first:.1f` percent, and {glue:text}`left-first:.1f` percent under an attack of ε = {glue:text}`eps`/255; a few steps of adversarial fine-tuning raise that to {glue:text}`left-TeCoA:.1f` |

# %% tags=["parameters"]
profile: str = "tiny"  # "tiny": laptop, 2 minutes | "small": every image pack | "paper": OpenAI's CLIP, GPU
seed: int = 0  # image subsets, attack starts and the live training derive from it
eps_255: float = 0.0  # budget that should leave nothing, in steps of 1/255; 0 takes the profile's
n: int = 0  # images per accuracy; 0 takes the profile's numbers
steps: int = 0  # training steps of every live run; 0 takes the profile's numbers
device: str = ""  # "" chooses; "cuda" without a GPU is an error
data_root: str = ""  # folder of the image packs (small, paper)
pretrained: str = ""  # weights file: of the backbone (paper), or a `nano` of your own

# %%
import copy
import importlib.util
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from IPython.display import display

if importlib.util.find_spec("robustvlm_lite") is None:  # on Colab
    subprocess.run(["git", "clone", "-q", "https://github.com/robustvlm-lite/robustvlm_lite"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--system", "-e", "."]
    subprocess.run(install, cwd="robustvlm_lite", check=True)
    sys.path.insert(0, "robustvlm_lite")

from robustvlm_lite import attacks, book, data, evaluate, plots, scenes, stats, transformer
from robustvlm_lite.book import exercises_small_clip as exercises
from robustvlm_lite.clip import autocast, random_clip
from robustvlm_lite.defenses import Defense
from robustvlm_lite.runtime import generator
from robustvlm_lite.threat import ThreatModel

run = book.start("10_small_clip", profile=profile, seed=seed, device=device, data_root=data_root,
                 pretrained=pretrained, eps_255=eps_255, n=n, steps=steps)  # fmt: skip
clip, sizes, eps_255 = run.load_clip(), run.sizes, run.parameters["eps_255"]
cards, same = book.model_cards(), torch.testing.assert_close
nano = cards["nano"]
recipe = nano["recipe"]

# %% [markdown]
# ## Before you start
#
# You need to know how CLIP goes from pixels to logits ([chapter 01](01_clip.py)) and what a training step is. You will be
# able to write the loss, the optimizer and the averaging that made the bundled model, to read its card, and to train your
# own. Reading takes about 30 minutes.
#
# Three kinds of numbers stand on this page. Those of a model's *card* were measured once, when it was made, on whole test
# splits. *Notes* of trials say why a setting was chosen. All others come from this run, on the images that its profile
# names.
#
# ## See it first: what it read
#
# CLIP was trained on pictures and captions from the web. Here nobody wrote a caption. Photographs get the name of their
# class in a sentence that the seed picks. A scene is drawn by code, and so its caption is known in every grain, from "two
# shapes" to the place of each.

# %%
photos = data.load("photos/caltech", "train")
drawn = scenes.sample(60, generator(seed, "sheet", "scenes"))
several, sketch = drawn.count > 1, drawn.style == scenes.STYLES.index("sketch")
nine = [i for kind, k in ((several, 4), (~several & ~sketch, 3), (sketch, 2)) for i in kind.nonzero()[:k, 0].tolist()]
told = [drawn.captions(i)[-1 - k % 3] for k, i in enumerate(nine)]  # the last caption is the finest


def sheet(images, n=9):
    """Pixels of n random images, and for each the name of its class in one of the set's templates."""
    g = generator(seed, "sheet", images.name)
    rows, picks = torch.randperm(len(images), generator=g)[:n], torch.randint(len(images.templates), (n,), generator=g)
    names = [images.class_names[c] for c in images.labels[rows]]
    return images.pixels(rows), [images.templates[t].format(name) for t, name in zip(picks.tolist(), names, strict=True)]


# %%
figs = [plots.captioned(*sheet(photos), title="photographs"), plots.captioned(drawn.images[nine] / 255, told, title="scenes")]
if data_root:  # one training image of every pack
    ones = [data.load(f"small/{name}", "train", data_root=data_root, n=1) for name in nano["validation_curve"][0]["validation"]]
    packs = [sheet(replace(one, templates=data.PHOTO), 1) for one in ones]  # a style that a template names may be another
    figs.append(plots.captioned(torch.cat([x for x, _ in packs]), [text for _, (text,) in packs], title="one of each pack"))
book.show(figs, "sheet", alt="Sheets of small training pictures, each with its caption below: photographs of objects, and rendered scenes of colored shapes",
          caption="Training images with captions as the model reads them. The photographs that ship with the book are one of its packs.")  # fmt: skip

# %% [markdown]
# A batch mixes packs, so that no large pack drowns a small one, and rendered scenes. The shares, the augmentations and the
# sentences stand in `data_scripts/mixture.py`.
#
# Three kinds of images stay out of training. A fiftieth of every pack's training rows is held back and gives the learning
# curve. Near copies of test images are left out. And ten pairs of color and shape are never drawn nor named, so that
# [chapter 01](01_clip.py) can ask whether words compose.
#
# ## Symbols
#
# | symbol | meaning | shape | name in code |
# |---|---|---|---|
# | $x_i$, $f_i$ | image of a batch, its feature of unit length | `[B, 3, H, W]`, `[B, D]` | `x`, `image` |
# | $t_c$ | feature of caption $c$, unit length | `[T, D]` | `text` |
# | $y_i$ | index of the right caption of image $i$ | `[B]` | `right` |
# | $S_i$ | captions of the label set that image $i$ comes from | | `groups` |
# | $s$ | logit scale, learned | scalar | `scale` |
# | $G$, $M$, $O$ | gradient of a matrix $\theta$, its momentum, the orthogonalized update | `[rows, cols]` | `gradient`, `momentum`, `update` |
# | $\beta$, $\eta$, $\lambda$ | share of the momentum that is kept, learning rate, weight decay | scalars | `beta`, `lr`, `decay` |
# | $\theta_k$, $\bar\theta_k$ | weights after step $k$, their moving average | | `net`, `average` |
# | $d$ | how much of the average is kept | scalar | `kept` |
#
# ## Who is a wrong answer for whom?
#
# CLIP's loss takes a batch of pairs. The caption of image $i$ is right for it, and every other caption of the batch is
# wrong:
#
# $$L_{\text{batch}} = -\frac{1}{2B}\sum_i \Big[\log\frac{e^{s f_i\cdot t_i}}{\sum_j e^{s f_i \cdot t_j}} + \log\frac{e^{s f_i\cdot t_i}}{\sum_j e^{s f_j\cdot t_i}}\Big]$$
#
# That suits the web, where two captions hardly ever say the same. Captions from class names repeat, in these words or
# those, and a repeated caption is right and counted as wrong: a *false negative*.


# %%
def in_batch_loss(z):
    """CLIP's loss for logits z [B, B] of a batch of pairs: the diagonal is right, all else is wrong."""
    diagonal = torch.arange(len(z))
    return (F.cross_entropy(z, diagonal) + F.cross_entropy(z.T, diagonal)) / 2


labels = photos.labels[torch.randperm(len(photos), generator=generator(seed, "pairs"))[: recipe["batch"]]]
equal = labels[:, None] == labels  # images whose caption is the same
floor = equal.sum(1).float().log().mean()
same(in_batch_loss(1000.0 * equal), floor)  # a model that is right about everything

# %%
false = equal.sum(1) - 1
book.glue("pairs", len(labels))
book.glue("false-all", int(false.sum()))
book.glue("false-images", 100 * (false > 0).float().mean())
book.glue("floor", floor)
print(f"false negatives: {int(false.sum())} of {len(labels) * (len(labels) - 1)}; lowest loss: {floor:.2f}")

# %% [markdown]
# In one batch of {glue:text}`pairs` of these photographs, {glue:text}`false-images:.0f` percent have a caption that stands
# in the batch again. A model that knows everything still pays {glue:text}`floor:.2f` (exercise 2 asks why).
#
# That costs less than it seems. Equal captions have equal features: the right one is still pulled, each rival weighs as
# often as it stands in the batch, and at the floor no gradient is left. What remains is a constant, the mean of log $n$, and
# noise between two *wordings* of one class, which push each other away.
#
# The recipe leaves both out. Each image meets every caption once, and only those of its own *label set* $S_i$: the classes of
# its pack, the superclasses of CIFAR-100, the domains of PACS, or one thing that can be asked of a scene.
#
# $$L = -\frac1B \sum_i \log \frac{e^{s f_i\cdot t_{y_i}}}{\sum_{c\in S_i} e^{s f_i\cdot t_c}}$$
#
# Captions of other sets are never wrong answers. One pack's "airplane" and another's "airliner" are not made enemies, and
# "a red shape" does not compete with "a star" for a red star.
#
# Two more things differ from $L_{\text{batch}}$. Only images ask: the term in which a caption looks for its image is gone. And
# in some batches of a pack a box of each image comes from another (CutMix); then $y_i$ is two captions, with the shares of
# the area. No run on this page compares the losses.


# %%
def my_loss(image, text, scale, groups):
    """Cross-entropy of each image over the captions of its own label set, mean over images.

    image [B, D], text [T, D], unit length; groups: (rows of images, their right captions, rows of the set's captions).
    """
    parts = [F.cross_entropy(scale * image[rows] @ text[texts].T, right.to(image.device), reduction="sum") for rows, right, texts in groups]
    return torch.stack(parts).sum() / len(image)


g = generator(seed, "loss")
image, text = (F.normalize(torch.randn(n_rows, 16, generator=g), dim=1) for n_rows in (6, 7))
groups = [(torch.arange(4), torch.tensor([0, 2, 2, 1]), torch.arange(3)), (torch.arange(4, 6), torch.tensor([3, 0]), torch.arange(3, 7))]
by_hand = torch.stack([-(10 * image[i] @ text[s].T).log_softmax(0)[y] for r, right, s in groups for i, y in zip(r, right, strict=True)])
same(my_loss(image, text, 10.0, groups), by_hand.mean())

# %%
def pull(texts):
    """What the loss does to each image: its gradient, [B, D]."""
    leaf = image.clone().requires_grad_()
    return torch.autograd.grad(my_loss(leaf, texts, 10.0, groups), leaf)[0]


moved = torch.cat([text[:3], text[3:].flip(1)])  # other captions for the second set
same(pull(moved)[:4], pull(text)[:4])  # the images of the first do not feel it
assert not torch.equal(pull(moved)[4:], pull(text)[4:])

# %% [markdown]
# A set can be large, and captions cost time. The script encodes those that occur in the batch and a random share of the
# others, all in the same step.
#
# Captions of the ten held-out pairs are left out even as wrong answers. As such they would be pushed away from every
# scene, and a test of composition would measure that.
#
# ## Short tokens first
#
# A vision transformer pays for its tokens, and an image of half the side has a quarter of the patches. Early on, a model
# learns what small images show as well {cite}`li2023clipa`. The script therefore begins with small ones.
#
# Patches stay the same, so the weights do, too. Only the positions have to be resized, as a small picture is.


# %%
def my_positions(visual, side):
    """Position embeddings [1 + N, E] for images of another side: CLS keeps its own, the grid is resized."""
    own, grid, new = visual.positional_embedding, visual.grid_size[0], side // visual.patch_size[0]
    if new == grid:
        return own
    picture = own[1:].T.reshape(1, -1, grid, grid)
    resized = F.interpolate(picture, size=(new, new), mode="bilinear", antialias=True)
    return torch.cat([own[:1], resized.flatten(2)[0].T])


# %%
fresh = random_clip("nano", seed).to(run.device)
with torch.no_grad():
    ramp = torch.arange(8.0, device=run.device).repeat(8)[:, None].expand(64, 128)  # grows to the right
    fresh.visual.positional_embedding[1:] = ramp
    small = my_positions(fresh.visual, 32)[1:].view(4, 4, -1)
same(small, small[:1].expand_as(small))  # no change from row to row
assert small.shape == (4, 4, 128) and (small.diff(dim=1) > 1).all()

# %% [markdown]
# Now everything that a step needs: a batch of three label sets (classes of photographs, shapes and colors of scenes), and
# its loss on a network with the shapes of `nano` and random weights. The images that ship with the book are enough to
# watch the beginning.


# %%
def batch(sets, side, n_each, g):
    """n_each images of each set at the given side, one caption for each of its classes, and the groups of `my_loss`."""
    x, captions, groups = [], [], []
    for images in sets:
        rows = torch.randperm(len(images), generator=g)[:n_each]
        template = images.templates[int(torch.randint(len(images.templates), (), generator=g))]
        texts = torch.arange(len(images.class_names)) + len(captions)
        groups.append((torch.arange(len(rows)) + sum(map(len, x)), images.labels[rows], texts))
        x.append(F.interpolate(images.pixels(rows), size=(side, side), mode="bilinear", antialias=True))
        captions += [template.format(name) for name in images.class_names]
    return torch.cat(x).to(run.device), captions, groups


# %%
def step_loss(net, x, captions, groups):
    """The loss of one batch; the towers compute in bfloat16, cosines and loss in float32."""
    with autocast(run.device, torch.bfloat16):
        tokens = transformer.image_tokens(net.visual, (x - net.mean) / net.std, my_positions(net.visual, x.shape[-1]))
        text = net.encode_text(captions).float()
    return my_loss(F.normalize(tokens[:, 0].float(), dim=1), text, net.model.logit_scale.exp(), groups)


# %%
kept, held = photos.split_off(0.2)
learn = [kept, *(data.load(f"scenes/{task}", "train", n=1000) for task in ("shape", "color"))]
check = [held, *(data.load(f"scenes/{task}", "train", n=100, seed=1) for task in ("shape", "color"))]
fresh, n_each, smallest = random_clip("nano", seed).to(run.device), sizes.trial["each"], recipe["sizes"][0][0]
sides = {side: batch(learn, side, n_each, generator(seed, "cost")) for side, _ in recipe["sizes"]}
timed = book.measure_seconds(run, "photos and scenes", {f"{side} pixels": lambda b=b: step_loss(fresh, *b).backward() for side, b in sides.items()}, batch=3 * n_each)
seconds, shares = [row.value for row in timed], [share for _, share in recipe["sizes"]]
book.glue("side-ratio", seconds[-1] / seconds[0])
book.glue("schedule", sum(s * share for s, share in zip(seconds, shares, strict=True)) / seconds[-1])
# %%
lines = [{"image side": side, "tokens": 1 + (side // 8) ** 2, "ms a step": 1000 * row.value, "95 % interval": "{:.0f} to {:.0f}".format(*(1000 * v for v in row.ci95)),
          "share of the recipe's steps": f"{100 * share:.0f} %"} for row, (side, share) in zip(timed, recipe["sizes"], strict=True)]
book.table(lines, caption=f"Forward and backward of a batch of {3 * n_each} images with their captions, this machine, mean of {timed[0].n} rounds.", card_link=True)  # fmt: skip

# %% [markdown]
# The largest side costs {glue:text}`side-ratio:.1f` times the smallest. The captions cost the same at every side, one
# reason why the ratio is not that of the tokens. With the recipe's shares a mean step costs {glue:text}`schedule:.2f` of one at
# the full side.
#
# ## Muon
#
# The matrices of the transformer blocks are trained by Muon {cite}`jordan2024muon`. It takes the momentum $M$ of a matrix,
# and replaces it with the nearest matrix whose singular values are all one:
#
# $$M = U \Sigma V^\top \;\longrightarrow\; O = U V^\top$$
#
# Why? A gradient is dominated by few directions. Scaled to its loudest, a step hardly moves along the others. An
# orthogonal update moves along all of them equally far.
#
# No decomposition is needed. This iteration (Newton–Schulz) changes each singular value by one polynomial, and leaves $U$
# and $V$. It starts from $X = M / \lVert M\rVert$ and repeats
#
# $$X \leftarrow aX + \big(b\,XX^\top + c\,(XX^\top)^2\big)X$$
#
# with the authors' coefficients. After five rounds the values of an ordinary matrix lie near one, not at it.


# %%
def orthogonalize(m, rounds=5, a=3.4445, b=-4.7750, c=2.0315):
    """Nearly U Vᵀ of m = U S Vᵀ [rows, cols], rows <= cols, by Newton-Schulz iteration."""
    x = m / m.norm()
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


# %%
fresh.zero_grad()
step_loss(fresh, *sides[smallest]).backward()
gradient = fresh.visual.transformer.resblocks[0].mlp.c_proj.weight.grad.float().cpu()  # [128, 512]
before, after = torch.linalg.svdvals(gradient), torch.linalg.svdvals(orthogonalize(gradient))
u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
same((orthogonalize(gradient) * (u @ vh)).sum(), after.sum(), rtol=1e-3, atol=1e-3)  # along the same directions
ordinary = torch.linalg.svdvals(orthogonalize(torch.randn(gradient.shape, generator=generator(seed, "ordinary"))))
assert ordinary.min() > 0.5 and ordinary.max() < 1.35, "near one"

# %%
energy = (before[:8].square().sum() / before.square().sum()).item()
book.glue("energy", 100 * energy)
book.glue("lift", (after / after[0] / (before / before[0])).median())
curves = {"gradient": before / before[0], "orthogonalized": after, "random, orthog.": ordinary}
book.show(plots.convergence(curves, quantity="singular value", steps="rank"), "muon",
          alt="Singular values by rank: those of a gradient fall at once, those of its orthogonalized form slowly, those of an orthogonalized random matrix stay near one",
          caption=f"Singular values of one matrix's gradient in the first step, as shares of the largest, and after five rounds; for comparison those of a random matrix after five rounds. The first eight of {len(before)} hold {100 * energy:.1f} % of the squared length.")  # fmt: skip

# %% [markdown]
# The first eight directions hold {glue:text}`energy:.1f` percent of this gradient's squared length. Five rounds do not
# flatten so steep a curve, but they lift a middling direction against the first {glue:text}`lift:.0f`-fold.
#
# A whole step, with Nesterov's look ahead: $O$ is made from $(1-\beta)G + \beta M$, after $M$ was moved. Without the decay the
# matrices grow, and steps of one length shrink beside them.
#
# $$M \leftarrow \beta M + (1-\beta)G, \qquad \theta \leftarrow (1 - \eta\lambda)\,\theta - \eta\,\sqrt{\max(1, \text{rows}/\text{cols})}\;O$$
#
# The query, key and value parts of a block's input matrix are separate matrices, because that is what they are. Everything
# else (embeddings, norms, the logit scale) stays with AdamW.


# %%
def muon_step(weight, gradient, momentum, lr, decay=0.0, beta=0.95):
    """Nesterov momentum, orthogonalized, in place; a tall matrix is turned, and its step grows with its shape."""
    momentum.lerp_(gradient, 1 - beta)
    update = gradient.lerp(momentum, beta)
    rows, cols = weight.shape
    update = orthogonalize(update.T).T if rows > cols else orthogonalize(update)
    weight.mul_(1 - lr * decay).add_(update, alpha=-lr * max(1, rows / cols) ** 0.5)


def pieces(p):
    """A matrix, or the query, key and value parts of a block's input matrix."""
    return p.chunk(3) if p.shape[0] == 3 * p.shape[1] else (p,)


# %% [markdown]
# ## A moving average
#
# What ships is not the last weights but their moving average {cite}`polyak1992averaging`:
#
# $$\bar\theta_k = d\,\bar\theta_{k-1} + (1-d)\,\theta_k$$
#
# It averages the jitter of single batches away, and it comes late. If every step moved a weight by one, the average would
# be behind by
#
# $$k - \bar\theta_k = \frac{d}{1-d}\,(1-d^k)$$
#
# steps. The script also lets $d$ grow from a small value, so that the random start is soon forgotten.


# %%
def follow(average, weights, kept):
    """The average moves a little towards the weights, in place."""
    for a, w in zip(average, weights, strict=True):
        a.lerp_(w, 1 - kept)


d, lagging = recipe["ema"], torch.zeros(1, dtype=torch.float64)
for k in range(1, 1001):
    follow([lagging], [torch.full_like(lagging, k)], d)
same(1000 - lagging, torch.full_like(lagging, d / (1 - d) * (1 - d**1000)))
book.glue("lag", d / (1 - d))

# %% [markdown]
# With the recipe's $d$ the average is up to {glue:text}`lag:.0f` steps behind. So it belongs to a long run whose learning
# rate falls to zero, and would be a burden in a short one.
#
# ## A short training, live
#
# All parts together: the same random start, the same batches at the smallest side, the recipe's rates and decays. One run
# trains everything with AdamW, the other gives the blocks' matrices to Muon. Left out are what the script adds: the
# clipping of long gradients, its own random start, and that gains and biases do not decay.


# %%
def trial(with_muon, steps):
    """Loss of each step; every fourth step also the held-back loss of the weights and of their average."""
    net = random_clip("nano", seed).to(run.device)
    average, named = copy.deepcopy(net), dict(net.model.named_parameters())
    matrices = [p for name, p in named.items() if with_muon and "resblocks" in name and p.ndim == 2]
    taken, momenta = {id(p) for p in matrices}, [torch.zeros_like(p) for p in matrices]
    adamw = torch.optim.AdamW([p for p in named.values() if id(p) not in taken], betas=(0.9, 0.98), weight_decay=recipe["weight_decay"])
    losses, held_back = [], {"weights": [], "average": []}
    for k in range(steps):
        rate = min((k + 1) / 8, 1 - k / steps)  # warm-up, then down to zero
        adamw.param_groups[0]["lr"] = recipe["lr_adamw"] * rate
        loss = step_loss(net, *batch(learn, smallest, n_each, generator(seed, "trial", k)))
        net.zero_grad()
        loss.backward()
        losses.append(loss.item())
        adamw.step()
        with torch.no_grad():
            for p, m in zip(matrices, momenta, strict=True):
                for part in zip(pieces(p), pieces(p.grad), pieces(m), strict=True):
                    muon_step(*part, lr=recipe["lr_muon"] * rate, decay=recipe["weight_decay_muon"])
            follow(average.parameters(), net.parameters(), min(recipe["ema"], (k + 1) / (k + 10)))
            if k % 4 == 3 or k == steps - 1:
                for name, who in (("weights", net), ("average", average)):
                    held_back[name].append((k + 1, step_loss(who, *batch(check, smallest, 64, generator(seed, "check"))).item()))
    return losses, held_back


# %%
steps = steps or sizes.trial["steps"]
found = {name: trial(name == "Muon", steps) for name in ("AdamW", "Muon")}
losses = {name: torch.tensor(result[0]) for name, result in found.items()}
for name, values in losses.items():
    book.glue(f"loss-{name}", values[-max(1, steps // 4) :].mean())
    book.glue(f"held-{name}", found[name][1]["weights"][-1][1])
average_end, weights_end = (found["Muon"][1][name][-1][1] for name in ("average", "weights"))
book.glue("average-end", average_end)
book.glue("weights-end", weights_end)

# %%
held_curves = {name: tuple(zip(*points, strict=True)) for name, points in found["Muon"][1].items()}
figs = [plots.convergence({name: (range(1, steps + 1), values) for name, values in losses.items()}, quantity="training loss", steps="step"),
        plots.convergence(held_curves, quantity="held-back loss", steps="step (Muon)")]  # fmt: skip
book.show(figs, "trial", alt="Left, the training loss of AdamW and of Muon falling over the steps. Right, the loss on held-back images of the weights and of their moving average",
          caption=f"{steps} live steps of {3 * n_each} images. Left: both runs see the same batches. Right: {3 * 64} images that neither run was trained on.")  # fmt: skip

# %% [markdown]
# Over the last quarter of the steps the loss is {glue:text}`loss-Muon:.2f` with Muon and {glue:text}`loss-AdamW:.2f` with
# AdamW; on held-back images it ends at {glue:text}`held-Muon:.2f` and {glue:text}`held-AdamW:.2f`. One seed, one rate each, and a
# short run: no interval can be given, and the tables below hold longer trials.
#
# At the end of the run with Muon the held-back loss is {glue:text}`weights-end:.3f` for the weights and
# {glue:text}`average-end:.3f` for their average.
#
# ## The whole training
#
# Each bundled model has a card, `robustvlm_lite/assets/clip/NAME.card.json`, written by the script that installed it.
# Everything in this section is read from there, and a model that is added appears by itself.

# %%
for name, fact in (("parameters", f"{nano['parameters']:,}"), ("train-images", f"{nano['train_images']:,}"), ("machine", nano["machine"]),
                   ("hours", nano["wall_s"] / 3600), ("hours-least", book.least_seconds(nano) / 3600), ("images-seen", nano["images_seen"] / 1e6)):  # fmt: skip
    book.glue(name, fact)
photographs = nano["images_seen"] * (1 - recipe["rendered"])
passes = {name: photographs * pack["share"] / pack["train_images"] for name, pack in nano["packs"].items()}
fewest, most = min(passes, key=passes.get), max(passes, key=passes.get)
book.glue("passes", photographs / nano["train_images"])
book.glue("passes-fewest", f"{passes[fewest]:.0f} ({fewest})")
book.glue("passes-most", f"{passes[most]:.0f} ({most})")
book.making_table(cards)

# %% [markdown]
# `nano` saw each training photograph {glue:text}`passes:.0f` times on average, from {glue:text}`passes-fewest` to
# {glue:text}`passes-most`: packs are drawn by fixed shares. It saw no scene twice.
#
# The curves are accuracies on the training rows that were held back, with one template and the moving average. No test
# image enters them. *mean* leaves out the pets, of which too few rows are held back, and STL-10 stands on few.
#
# Held-back rows follow the frequencies of the training rows. On Caltech-101, where these are uneven, the curve ends higher
# than the accuracy on the test split below, whose classes are about even.

# %%
learned = {name: book.learning_curves(card) for name, card in cards.items()}
figs = [plots.convergence(curves, quantity=f"{name}: accuracy (%)", steps="images seen (millions)", percent=True) for name, curves in learned.items()]
book.show(figs, "learning", alt="Accuracy on held-back training rows against images seen, one curve a pack and their mean, one panel a model",
          caption="Learning curves on held-back training rows, at most 300 a pack, so single curves jitter by a few points.")  # fmt: skip

# %%
seen, mean = learned["nano"]["mean"]
half = min(range(len(seen)), key=lambda i: abs(seen[i] - seen[-1] / 2))
grown = [sum(share for _, share in recipe["sizes"][:k]) for k in range(1, len(recipe["sizes"]))]
book.glue("grown-at", " and ".join(f"{share * nano['images_seen'] / 1e6:.1f}" for share in grown))
book.glue("done-at", book.nearly_done((seen, mean)))
book.glue("half-seen", seen[half])
book.glue("half-mean", 100 * mean[half])
book.glue("end-mean", 100 * mean[-1])

# %% [markdown]
# Where does it flatten? The mean over packs comes within a point of its best at {glue:text}`done-at:.1f` million images: the later
# that is, the less the curve has flattened when the run ends.
# The second half of the run, from {glue:text}`half-seen:.1f` million images on, took it from
# {glue:text}`half-mean:.0f` to {glue:text}`end-mean:.0f` percent.
#
# The learning rate falls in a straight line and ends at zero, which would flatten the end of any curve. So a flat end would not mean
# "nothing more to learn", and one that still rises suggests that a longer run brings more. Only that run can say.
#
# The image side grew at {glue:text}`grown-at` million images. The curve is measured at 64 pixels throughout, so a stage of
# small images is also judged at a size that it never saw: a rise after such a point is in part that mismatch ending.
#
# ### What was tried
#
# These are the notes of the trials that decided the settings above (`robustvlm_lite/assets/clip/notes.yml`). They have one
# seed and no card. Read them as the reason for a choice, not as a result.

# %%
for tried in book.notes_tables("tried"):
    display(tried)

# %% [markdown]
# Muon gained most of what was kept, at fewer images. Words summed in place of a text transformer scored higher still and
# were not taken: such a model cannot tell word order.
#
# Short trials mislead: the weight decay that won the short run by a little lost the long one. That long run was an earlier,
# shorter training than the one that made these weights.
#
# And the first table was read on test images, which no choice should be. It decided the optimizer and the sides; what came
# after was judged on rows that were held back.
#
# ## What it knows
#
# The card's accuracies, on every whole test split, with all names of a set competing.

# %%
book.known_table(cards)

# %% [markdown]
# Compare a line with its chance before you compare two lines: a task of ten names is easier than one of two hundred.
# `photos/caltech` is a part of the Caltech pack, with its 25 best-filled classes. `photos/web` comes from no pack: these
# are photographs by other people, under names that other packs taught.
#
# ## What it confuses
#
# From here on everything is measured in this run. The pictures show the most frequent errors: left the photograph that
# was misnamed, right one of the class whose name it was given.

# %%
sets = [book.images(run, s) for s in sizes.photos]
features = {images.name: book.batched(run, clip.image_features, images) for images in sets}
logits = {images.name: book.logits_of(clip, features[images.name], images.class_names, images.templates) for images in sets}
answers = {name: z.argmax(1) for name, z in logits.items()}
known = [row for images in sets for row in book.measure_logits(run, images, {"CLIP": logits[images.name]})]
classes = {images.name: len(images.class_names) for images in sets}
book.sets_table(known, classes, caption=f"{clip.name} on the sets of this run.")


# %%
def confused(images, given, most=3):
    """The most frequent errors as (row of the first such image, row of an image of the answer's class, times)."""
    errors = Counter((c, a) for c, a in zip(images.labels.tolist(), given.tolist(), strict=True) if c != a)
    found = []
    for (c, a), times in errors.most_common():
        wrong, there = ((images.labels == c) & (given == a)).nonzero()[0], (images.labels == a).nonzero()
        found += [(int(wrong), int(there[0]), times)] if len(there) else []
    return found[:most] or [(0, 0, 0)]


def error_sheet(images, given):
    """Pairs of pictures: misnamed, and what it was named."""
    rows, texts, names = [], [], images.class_names
    for wrong, there, times in confused(images, given):
        c, a = images.labels[wrong], images.labels[there]
        rows += [wrong, there]
        texts += [f"{names[c]}, called {names[a]}: {times} of {int((images.labels == c).sum())}", names[a]]
    return plots.captioned(images.pixels(rows), texts, columns=2, title=images.name)


# %%
book.show([error_sheet(images, answers[images.name]) for images in sets[:2]], "confused",
          alt="Pairs of photographs: on the left one that was misnamed, with its class and the answer, on the right one of the class that was answered",
          caption="The most frequent errors of two sets, with how many images of the true class they touch.")  # fmt: skip


# %%
def weakest(images, given, most=5):
    """The classes with the fewest right answers."""
    lines = []
    for c in images.labels.unique().tolist():
        mine = given[images.labels == c].tolist()
        right, wrong = mine.count(c), Counter(a for a in mine if a != c).most_common(1)
        low, high = stats.wilson(right, len(mine))
        lines.append({"class": images.class_names[c], "images": len(mine), "right": right, "95 % interval": f"{100 * low:.0f} to {100 * high:.0f} %",
                      "most often taken for": "".join(f"{images.class_names[a]} ({times})" for a, times in wrong) or None})  # fmt: skip
    return sorted(lines, key=lambda line: line["right"] / line["images"])[:most]


lost = weakest(sets[0], answers[sets[0].name])
book.glue("first-name", sets[0].name)
book.glue("weak", ", ".join(line["class"] for line in lost))
book.table(lost, caption=f"{sets[0].name}: the classes that are recognized least.", card_link=True)

# %% [markdown]
# On {glue:text}`first-name` it does worst on {glue:text}`weak`. The intervals are wide: few test images stand behind a
# class, and the worst of many classes looks worse than it is.
#
# ## Does it know when it is wrong?
#
# The probability of the answer is a statement: of all answers given with it, that share should be right
# {cite}`guo2017calibration`. Sort the answers by it, cut them into five equal parts, and look.


# %%
def reliability(z, y, parts=5):
    """(mean confidence in percent, accuracy) of equal parts of the answers, from the least to the most confident."""
    sure, answer = z.softmax(1).max(1)
    cut = sure.argsort().chunk(parts)
    return [100 * sure[p].mean().item() for p in cut], [(answer[p] == y[p]).float().mean().item() for p in cut]


curves = {images.name: reliability(logits[images.name], images.labels) for images in sets[:4]}
gaps = {name: sum(abs(s / 100 - r) for s, r in zip(*curve, strict=True)) / len(curve[0]) for name, curve in curves.items()}
for key, name in zip(("first", "second"), gaps, strict=False):
    book.glue(f"gap-{key}", 100 * gaps[name])
    book.glue(f"{key}-set", name)
book.show(plots.convergence(curves | {"as sure as right": ([0, 100], [0, 1])}, quantity="accuracy (%)", steps="confidence (%)", percent=True), "reliability",
          alt="Accuracy against confidence for five equal parts of the answers of each set, beside the diagonal on which both agree",
          caption="Confidence and accuracy of the answers, from the least confident fifth to the most. Below the diagonal the model is too sure.")  # fmt: skip

# %% [markdown]
# Confidence and accuracy differ by {glue:text}`gap-first:.0f` points on {glue:text}`first-set` and by
# {glue:text}`gap-second:.0f` on {glue:text}`second-set`, as a mean over the five parts. Where a curve rises, confidence
# still tells good answers from bad ones, whatever its height; exercise 3 uses that.
#
# ## Is it a CLIP?
#
# A classifier with a fixed list would not care how its classes are called. A CLIP must. What templates and longer lists
# cost stands in [chapter 01](01_clip.py); here the names are replaced by numbers, and the image features stay.

# %%
first = sets[0]
numbers = [f"number {c}" for c in range(len(first.class_names))]
asked = {"names": logits[first.name], "numbers in place of names": book.logits_of(clip, features[first.name], numbers, first.templates)}
prompted = book.measure_logits(run, first, asked)
book.glue("numbers-left", 100 * prompted[-1].value)
book.glue("chance-first", 100 / len(numbers))
book.paired_table(prompted, prompted[0], caption=f"{first.name}: what the text side says.")

# %% [markdown]
# With numbers in place of names {glue:text}`numbers-left:.1f` percent are right, where guessing gives
# {glue:text}`chance-first:.1f`.
#
# Words also have to compose. The ten held-out pairs of color and shape compete with all others below.

# %%
composed = {}
for images in (book.images(run, s) for s in sizes.scenes):
    features[images.name] = book.batched(run, clip.image_features, images)
    z = book.logits_of(clip, features[images.name], images.class_names, images.templates)
    composed[images] = book.measure_logits(run, images, {"CLIP": z})[0]
classes = {images.name: len(images.class_names) for images in composed}
heldout = next(row for images, row in composed.items() if images.name == "scenes/pair-heldout")
book.glue("composed", 100 * heldout.value)
book.sets_table(list(composed.values()), classes, caption="Pairs of color and shape: those that training drew, and those that it never drew or named.")

# %% [markdown]
# {glue:text}`composed:.0f` percent of the scenes with a pair that no training image and no caption held are named. Where it
# looks is a question of its own: [chapter 01](01_clip.py) draws the maps and scores them.
#
# ## How fragile it is
#
# Projected gradient descent (PGD) {cite}`madry2018pgd` in pixels, on the first images of each set.

# %%
hit, undefended, cut = attacks.get_attack(sizes.pgd), Defense(clip), n or sizes.attacked
pairs = next(images for images in composed if images.name == "scenes/pair")
targets = [replace(s.take(range(min(cut, len(s)))), name=f"{s.name}[:{cut}]") for s in (*sets, pairs)]
shown = sorted({sizes.eps_weaker, eps_255})
grid = [(hit, ThreatModel(eps)) for eps in sorted({*sizes.eps_grid, *shown})]
broken = {images.name: book.measure(run, undefended, images, grid) for images in targets}

# %%
figs = [plots.accuracy_vs_eps(broken[images.name], chance=1 / len(images.class_names)) for images in targets]
book.show(figs, "fragile", alt="Accuracy falling as the budget of the attack grows, one panel a set of images, with the line of chance",
          caption=f"Accuracy under {hit.label} against ε, 95 % intervals.")  # fmt: skip

# %%
rows = [row for found in broken.values() for row in found if row.metric in ("clean_acc", "robust_acc") and row.eps_255 in (0, *shown)]
left = {row.dataset: row.value for row in rows if row.eps_255 == eps_255}
book.glue("eps", f"{eps_255:g}")
book.glue("n-broken", len(targets[0]))
book.glue("clean-first", 100 * broken[targets[0].name][0].value)
book.glue("left-first", 100 * left[targets[0].name])
classes = {images.name: len(images.class_names) for images in targets}
over = [row.dataset for row in rows if row.eps_255 == eps_255 and row.ci95[0] > 1 / classes[row.dataset]]
book.glue("left-more", ", ".join(over) or "none")
book.sets_table(rows, classes, caption="How much the attack leaves.")

# %% [markdown]
# Sets on which an attack of ε = {glue:text}`eps`/255 leaves more than guessing would, by the whole interval:
# {glue:text}`left-more`.
#
# OpenAI's CLIP
# fails in the same way, at smaller budgets {cite}`mao2023tecoa`; that is what makes a small model a fair subject for the
# defenses of this book.
#
# Does training against the attack help, and is it the attack that helps? Two short fine-tunings of the image tower start
# from the same weights and see the same images. *FT-clean* trains on them as they are, *TeCoA* {cite}`mao2023tecoa` on
# attacked ones.

# %%
train_sets = [book.images(run, s, "train") for s in sizes.train]
budget = sizes.eps_train
train_attack = partial(attacks.pgd, threat=ThreatModel(budget), n_steps=2, step_255=budget, keep="last")
tuned = {name: book.defended(run, name, train_sets, train_attack) for name in ("FT-clean", "TeCoA")}
target, strong = targets[0], [(hit, ThreatModel(eps)) for eps in shown]
results = [row for row in broken[target.name] if row.eps_255 in (0, *shown)]
for defense in tuned.values():
    results += book.measure(run, defense, target, strong)
at = {(row.method, row.eps_255): row for row in results if row.metric in ("clean_acc", "robust_acc")}

# %%
figs, ways = [], {}
for eps in shown:
    diffs = {name: evaluate.paired(at[name, eps].records, at["CLIP", eps].records) for name in tuned}
    ways |= {(name, eps): book.told(diff) for name, diff in diffs.items()}
    figs.append(plots.paired_bars(diffs, reference="CLIP", title=f"{target.name}, ε = {eps:g}/255"))
for place, eps in (("weak", shown[0]), ("strong", shown[-1])):
    book.glue(f"eps-{place}", f"{eps:g}")
    for name in tuned:
        book.glue(f"{name}-{place}", ways[name, eps])
book.glue("left-TeCoA", 100 * at["TeCoA", eps_255].value)
book.show(figs, "tuned", alt="Differences in robust accuracy to the undefended model with their intervals, one bar for fine-tuning on clean and one on attacked images, one panel a budget",
          caption=f"{hit.label} on n = {len(target)} images: difference to the undefended model on the same images, 95 % intervals. A filled dot: the interval excludes zero.")  # fmt: skip

# %%
columns = {"clean": {"metric": "clean_acc"}} | {f"PGD, ε {eps:g}": {"eps_255": eps, "metric": "robust_acc"} for eps in shown}
trained = f"{len(tuned['TeCoA'].history)} steps on {' and '.join(s.name for s in train_sets)}, attacked with ε = {budget:g}/255 for TeCoA."
book.accuracy_table(results, columns=columns, caption=f"{target.name} after {trained}")

# %% [markdown]
# Against the undefended model at ε = {glue:text}`eps-weak`/255: TeCoA {glue:text}`TeCoA-weak`; FT-clean
# {glue:text}`FT-clean-weak`. At ε = {glue:text}`eps-strong`/255: TeCoA {glue:text}`TeCoA-strong`; FT-clean
# {glue:text}`FT-clean-strong`. Where only TeCoA gains, it is the attack in training that helps, not the training. Where FT-clean gains
# too, that much needs no attack, and only what TeCoA has beyond it is the attack's.
#
# What is left of such a gain under stronger attacks is a question for [chapter 04](04_tga_zsr.py).
#
# ## Train your own
#
# Two commands, from a checkout with the image packs in `DATA`:
#
# ```bash
# .venv/bin/python data_scripts/pretrain_clip.py --model nano --data-root DATA --work WORK
# .venv/bin/python data_scripts/clip_card.py --model nano --data-root DATA --work WORK
# ```
#
# The first decodes the packs once, then shows a bar with steps, time left and loss. It writes `WORK/log.jsonl` (a line
# every 50 steps, with held-back accuracies every 1,000) and `WORK/state.pt`. After a kill, the same command goes on from
# there. It ends with `WORK/nano.safetensors` and `WORK/recipe.json`.
#
# The second measures these weights and puts them, with their card, in place of the bundled ones. Skip it if you only want
# to use yours:
#
# ```bash
# .venv/bin/robustvlm evaluate --model nano --pretrained WORK/nano.safetensors --data DIR
# .venv/bin/robustvlm run 10_small_clip -p pretrained WORK/nano.safetensors
# ```
#
# In Python, `load_clip("nano", pretrained="WORK/nano.safetensors")`. A file of other shapes is refused. `git checkout
# robustvlm_lite/assets/clip` brings the bundled weights back.
#
# A last line of the log, and what the card holds beside it:

# %%
print(nano["validation_curve"][-1])
for key, value in nano.items():
    print(f"{key:17s} {f'{len(value)} entries' if isinstance(value, dict | list) else value}")
for memory in book.notes_tables("memory"):
    display(memory)

# %% [markdown]
# The training of `nano` shared its machine ({glue:text}`machine`) with other work for a part of the time, which is why the
# table above names two durations.
#
# By default two processes of one
# thread each average their gradients, which is faster on two cores than one process of two threads. Both grow while they
# train. Where memory is short, stop them and give the command again.
#
# On a GPU pass `--procs 1 --device cuda` and twice the `--batch`, which keeps the images of a step. `make gpu-jobs` lists the
# trainings that wait for a GPU.
#
# Every option of the recipe is an option of the script (`--steps`, `--lr-muon`, `--rendered`, …). Change one thing at a
# time, judge by the held-back rows, and look at test images once.
#
# ## Exercises
#
# A solution is folded under each; the line at its end checks it, and yours.
#
# **1 (easy).** `my_loss` loops over label sets. Write it without a loop, `own_set_loss(z, y, image_set, text_set)`: all
# logits at once, and a mask that says which captions have a say.


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def own_set_loss(z, y, image_set, text_set):
    """z [B, T], y [B], label set of each image [B] and of each caption [T] -> mean over images."""
    own = image_set[:, None] == text_set
    return F.cross_entropy(z.masked_fill(~own, -torch.inf), y)


exercises.check_own_set_loss(own_set_loss)

# %% [markdown]
# **2 (maths).** In a batch in which class $c$ occurs $n_c$ times, equal captions have equal features. Show that CLIP's loss
# cannot fall below $\frac1B\sum_i \log n_{y_i}$, and write `loss_floor(labels)`. Why does a larger batch make it worse?


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def loss_floor(labels):
    """labels [B] -> the lowest loss. n equal captions share the probability, so each gets 1/n at best."""
    return labels.bincount()[labels].float().log().mean()


exercises.check_loss_floor(loss_floor)

# %% [markdown]
# **3 (open).** Suppose the model may refuse half of the images. Write `trust(z)`, which orders its answers from their logits
# alone. Can you beat the largest probability? (The folded one need not.) What would an attacker do to a system that refuses by such a score?


# %% tags=["hide-input"] jupyter={"source_hidden": true} cellView="form"
def trust(z):
    """Logits [N, C] -> [N]: the lead of the best over the second."""
    best = z.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


exercises.check_trust(trust, logits[first.name], first.labels)

# %% [markdown]
# ## Takeaways
#
# - The bundled model is a CLIP with captions made from class names. The loss asks each image about its own label set only;
#   repeated captions would add a constant to CLIP's own loss, and set the wordings of one class against each other.
# - Its training took {glue:text}`hours:.1f` hours beside other work, {glue:text}`hours-least:.1f` at the pace of its fastest stretches ({glue:text}`machine`). Small images first, Muon and
#   a moving average are what the recipe rests on.
# - It knows classes that it was told of, and composes colors with shapes ({glue:text}`composed:.0f` percent on pairs that it
#   never saw).
# - It is fragile: on {glue:text}`first-name` an attack of ε = {glue:text}`eps`/255 leaves {glue:text}`left-first:.1f` of {glue:text}`clean-first:.1f` percent.
#   Fine-tuning on attacked images changes that by {glue:text}`TeCoA-strong`, fine-tuning on clean ones by {glue:text}`FT-clean-strong`.
# - A verdict of this book that was reached with it says how a method behaves on such a model. It does not settle what a
#   large CLIP would do.
#
# Next: [chapter 01](01_clip.py) takes the model apart, and [chapter 02](02_attacks.py) attacks it.

# %%
book.footer(run)

# %% [markdown]
# ## References
#
# The works cited here stand on the [bibliography page](../book/bibliography.md).
