"""Scenes in words: captions of several grains, and questions with answers."""

from collections import Counter
from itertools import product
from typing import NamedTuple

NUMBERS = ("zero", "one", "two", "three", "four")
LARGE, SMALL = 0.36, 0.28  # radius, as a fraction of the image side, from which and up to which we say so


class Thing(NamedTuple):
    """One object; color and texture are "" in a sketch, x and radius are fractions of the image side."""

    shape: str
    color: str
    texture: str
    x: float
    radius: float


def a(phrase: str) -> str:
    """With its indefinite article: a("orange star") -> "an orange star"."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def enumeration(nouns: list[str]) -> str:
    """Equal nouns are counted: ["star", "ring", "star"] -> "two stars and a ring"."""
    phrases = [a(noun) if times == 1 else f"{NUMBERS[times]} {plural(noun)}" for noun, times in Counter(nouns).items()]
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def split(text: str) -> list[str]:
    """Words of a text, punctuation dropped."""
    return text.translate(str.maketrans("", "", ",:?")).split()


def captions(things: list[Thing], style: str) -> list[str]:
    """Paraphrases from coarse to fine.  For every task the first template, filled with the label, is one of them."""
    if style == "sketch":
        return captions_of_sketch(things[0])
    return captions_of_one(things[0]) if len(things) == 1 else captions_of_several(things)


def captions_of_one(thing: Thing) -> list[str]:
    shape, pair, texture = thing.shape, f"{thing.color} {thing.shape}", thing.texture
    size = "large " if thing.radius >= LARGE else "small " if thing.radius <= SMALL else ""
    return [
        "one object",
        "a photo of one object",
        "this is a painting",
        "a painting of one object",
        a(shape),
        f"the {shape}",
        f"{a(thing.color)} shape",
        f"the {thing.color} shape",
        f"a photo of the {thing.color} object",
        f"{a(texture)} shape",
        f"the {texture} shape",
        f"a picture of the {texture} object",
        a(pair),
        f"the {pair}",
        f"one {pair}",
        f"a photo of {a(pair)}",
        f"a picture of the {pair}",
        f"a painting of {a(pair)}",
        f"a {texture} {shape}",
        f"a {texture} {pair}",
        f"a photo of {a(f'{size}{texture} {pair}')}",
    ]


def captions_of_sketch(thing: Thing) -> list[str]:
    shape = thing.shape
    return [
        "this is a sketch",
        "a sketch of one object",
        f"a sketch of {a(shape)}",
        f"a sketch of the {shape}",
        f"a pencil drawing of {a(shape)}",
        f"the outline of {a(shape)}",
        f"the {shape}",
    ]


def captions_of_several(things: list[Thing]) -> list[str]:
    number, pairs = NUMBERS[len(things)], [f"{thing.color} {thing.shape}" for thing in things]
    listed = enumeration(pairs)
    texts = [
        f"{number} objects",
        f"{number} shapes",
        f"a photo of {number} objects",
        f"a picture of {number} objects",
        enumeration([thing.shape for thing in things]),
        listed,
        f"{number} objects: {listed}",
        f"a photo of {listed}",
    ]
    for color, times in Counter(thing.color for thing in things).items():
        if times > 1:
            texts.append(f"{NUMBERS[times]} {color} shapes")
    if len(things) == 2 and pairs[0] != pairs[1] and abs(things[0].x - things[1].x) > 0.25:
        left, right = sorted(range(2), key=lambda k: things[k].x)
        texts += [f"{a(pairs[left])} left of {a(pairs[right])}", f"{a(pairs[right])} right of {a(pairs[left])}"]
    return texts


def questions(things: list[Thing], style: str, shapes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Questions with one-word answers.  One object is asked about only where the question names it uniquely."""
    by_shape, by_color = Counter(t.shape for t in things), Counter(t.color for t in things)
    following = shapes[shapes.index(things[0].shape) :] + shapes  # so that the absent shape asked about varies
    absent = next(shape for shape in following if shape not in by_shape)
    asked = [
        ("how many objects are there?", NUMBERS[len(things)]),
        ("is this a painting or a sketch?", style),
        (f"is there {a(things[0].shape)}?", "yes"),
        (f"is there {a(absent)}?", "no"),
    ]
    if len(things) == 1:
        asked.append(("what shape is the object?", things[0].shape))
    for thing in things:
        if thing.color and by_shape[thing.shape] == 1:
            asked.append((f"what color is the {thing.shape}?", thing.color))
            asked.append((f"is the {thing.shape} solid, striped or dotted?", thing.texture))
        if thing.color and by_color[thing.color] == 1:
            asked.append((f"what shape is the {thing.color} object?", thing.shape))
    asked += [
        (f"how many {plural(shape)} are there?", NUMBERS[times]) for shape, times in by_shape.items() if times > 1
    ]
    return asked


def all_texts(
    shapes: tuple[str, ...], colors: tuple[str, ...], textures: tuple[str, ...], styles: tuple[str, ...]
) -> list[str]:
    """A sample-independent list of texts in which every word that the functions above can write occurs."""
    texts = [*NUMBERS[1:], *styles]
    for shape, color, texture, radius in product(shapes, colors, textures, (SMALL, LARGE)):
        thing = Thing(shape, color, texture, 0.2, radius)
        scenes = [([thing], "painting"), ([Thing(shape, "", "", 0.5, radius)], "sketch")]
        scenes += [([thing] * number, "painting") for number in (2, 3, 4)]
        scenes += [([thing, Thing(shapes[0], colors[0], texture, 0.8, radius)], "painting")]
        for things, style in scenes:
            texts += captions(things, style)
            texts += [text for pair in questions(things, style, shapes) for text in pair]
    return texts
