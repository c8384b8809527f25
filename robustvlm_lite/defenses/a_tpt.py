"""A-TPT: attention-guided test-time prompt tuning (arXiv 2605.19956), as its paper is reported and as its code was released.

Both mix each view with AugMix, less where the view's own token-gradient attention is high, tune the context by the mean
entropy of the surest views, and weigh views in the answer. They differ in every part of that; no result
names "A-TPT" alone. What a method costs: `TestTimeClassifier.passes`.
"""

from dataclasses import replace

from .recipe import Recipe

PAPER = Recipe(base="flip_center", mixing="guided", loss="pointwise", answer="tv")
RELEASED = Recipe(
    mixing="guided", loss="pointwise", answer="neighbors", as_logits=True, guide="released",
    quirk_leak=True, quirk_quantile=True, quirk_self=True, quirk_truncate=True,
)  # fmt: skip
METHODS = {"A-TPT (as reported)": PAPER, "A-TPT (released)": RELEASED}

# The word that the released code puts into "a {} photo of a", by data set (A-TPT specification, section 1.4).
WORDS = {
    "caltech101": "object", "dtd": "texture", "fgvc_aircraft": "aircraft", "flowers102": "flower", "ucf101": "action",
    "stanford_cars": "car", "eurosat": "satellite-map", "oxford_pets": "pet",
}  # fmt: skip


def with_word(recipe: Recipe, dataset: str) -> Recipe:
    """`recipe` with the data set's word in its template, where the released code has one: a quirk, off by default.

    dataset: a name of the registry, "small/flowers102" or "coop/dtd".
    """
    word = WORDS.get(dataset.split(":")[0].split("/")[-1])
    return replace(recipe, template=f"a {word} photo of a {{}}.") if word else recipe
