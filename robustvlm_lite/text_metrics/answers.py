"""Is an answer right? Exact match for rendered questions, and VQAv2's rule over ten people's answers.

The rule is that of the official evaluation (visualqa.org/evaluation.html): an answer is as right as people gave it, up to three of
them, averaged over the ten sets of nine. What its code does beyond its page is kept and said at its place.
"""

import re
from collections.abc import Sequence

import numpy as np

from ..runtime import UserError

N_PEOPLE = 10
ENOUGH = 3  # matching people that make an answer right
DIGITS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophe and colon stay
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # one before a digit is a decimal point

# What an apostrophe is put back into. "im", "ive", "lets" and "shes" are not among the official ones.
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he'd he's how'd how'll
how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _with_one_apostrophe_lost(text: str) -> dict[str, str]:
    return {text[:i] + text[i + 1 :]: text for i, letter in enumerate(text) if letter == "'"}


CONTRACTIONS = {lost: text for text in _WITH_APOSTROPHES.split() for lost, text in _with_one_apostrophe_lost(text).items()}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the one that the official list turns round


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """1.0 where an answer is the truth but for case and space around it, else 0.0; float64 [N]."""
    _same_length(answers, truths)
    return np.array([float(a.strip().lower() == t.strip().lower()) for a, t in zip(answers, truths, strict=True)])


def vqa_accuracy(answers: Sequence[str], people: Sequence[Sequence[str]]) -> np.ndarray:
    """VQAv2's accuracy of each answer against the ten of its question, float64 [N] in [0, 1].

    People's answers are published normalized: of theirs only punctuation is treated, and only where they differ. Raises
    UserError unless every question has ten.
    """
    _same_length(answers, people)
    if (i := next((i for i, given in enumerate(people) if len(given) != N_PEOPLE), None)) is not None:
        raise UserError(f"expected {N_PEOPLE} people's answers to question {i}, got {len(people[i])}; VQAv2's rule needs all of them")
    return np.array([_agreement(normalize_answer(a), given) for a, given in zip(answers, people, strict=True)])


def normalize_answer(text: str) -> str:
    """A model's answer as the rule compares it: no articles, digits for number words, apostrophes put back, punctuation dropped."""
    split = [DIGITS.get(word, word) for word in _without_punctuation(" ".join(text.split())).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in split if word not in ARTICLES)


def _agreement(answer: str, given: Sequence[str]) -> float:
    if len(set(given)) > 1:
        given = [_without_punctuation(text) for text in given]
    matching = sum(text == answer for text in given)
    # Of the ten sets of nine, those that leave a matching person out hold one match less.
    left_out, kept = min(1.0, (matching - 1) / ENOUGH), min(1.0, matching / ENOUGH)
    return (matching * left_out + (N_PEOPLE - matching) * kept) / N_PEOPLE


def _without_punctuation(text: str) -> str:
    """Each sign becomes a space; it vanishes where it stands beside a space, or where a comma stands between digits anywhere."""
    number = _DIGIT_COMMA.search(text)
    out = text
    for sign in PUNCTUATION:
        out = out.replace(sign, "" if number or f"{sign} " in text or f" {sign}" in text else " ")
    return _PERIOD.sub("", out)


def _same_length(answers: Sequence, truths: Sequence) -> None:
    if len(answers) != len(truths) or not len(answers):
        raise UserError(f"expected one truth an answer, got {len(answers)} answers and {len(truths)} truths")
