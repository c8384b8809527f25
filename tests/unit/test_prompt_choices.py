"""Choices of prompt tuning that cannot be served are refused in one line."""

import pytest
import torch
from toy_prompts import NAMES, toy_clip
from toy_tuning import photos

from robustvlm_lite.defenses import build_prompts
from robustvlm_lite.defenses.capt import Choices
from robustvlm_lite.defenses.prompt_tuning import Weight
from robustvlm_lite.prompts import PromptSpec
from robustvlm_lite.runtime import UserError


@pytest.fixture(scope="module")
def clip(register):
    return toy_clip(register, "toy-tuning")


def test_bad_choices_are_one_clear_line(clip, register):
    other = toy_clip(register, "toy-tuning-wide")
    other.model.text_projection = torch.nn.Parameter(torch.zeros(16, 24).double())
    cases = {
        "CAPT: expected lambda >= 0, got -1": lambda: Choices(weight=-1.0),
        "CAPT: expected lambda >= 0, got nan": lambda: Choices(weight=float("nan")),
        "unknown reading of alpha 'A8'; known: A1, A2, A3, A4, A5, A7": lambda: Choices(alpha="A8"),
        "expected a constant alpha in [0, 1], got 1.5": lambda: Choices(alpha=1.5),
        "unknown direction 'forward'; known": lambda: Choices(direction="forward"),
        "unknown inner 'KL'; ": lambda: Choices(inner="KL"),
        "expected a weight (lambda, beta) >= 0, got -0.5": lambda: Weight(-0.5),
        "expected a teacher of embedding width 16, that of toy-tuning, got 24 of toy-tuning-wide": (
            lambda: build_prompts("CAPT", clip, teacher=other)),
        "unknown prompt-tuned defense 'CAP'; did you mean 'CAPT'": lambda: build_prompts("CAP", clip),
        "PAFT: expected the class names that its head is for": lambda: build_prompts("PAFT", clip),
        "PAFT: expected the 4 classes of its head, got 2 others": lambda: build_prompts("PAFT", clip, NAMES).classifier(("a", "b")),
        "expected the 4 classes of the class-specific contexts, got 2 others": (
            lambda: build_prompts("APT (class-specific)", clip, NAMES).classifier(("a", "b"))),
        "depth_text: expected at most 3, the blocks of toy-tuning, got 4": (
            lambda: build_prompts("CAPT", clip, spec=PromptSpec(2, 4, 2, 4))),
        "coupling 'fap': expected prompts in at most 3 blocks, because toy-tuning has 3 text and 4 image blocks": (
            lambda: build_prompts("FAP", clip, spec=PromptSpec(2, 4, 2, 4, coupling="fap"))),
        "FAP trains on adversarial images: expected attack=..., got None": lambda: build_prompts("FAP", clip).fit(photos()),
        "AdvPT makes its bank of attacked features: expected attack=..., got None": lambda: build_prompts("AdvPT", clip).fit(photos()),
    }  # fmt: skip
    for line, call in cases.items():
        with pytest.raises(UserError) as error:
            call()
        assert line in str(error.value) and "\n" not in str(error.value), error.value
