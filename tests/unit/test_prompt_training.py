"""How the papers train prompts: schedules, steps, and the shapes and counts of ViT-B/32."""

import math
from dataclasses import replace

import pytest
import torch
from toy_prompts import NAMES
from toy_tuning import ATTACK, SHORT, photos

from robustvlm_lite.clip import random_clip as another_clip
from robustvlm_lite.defenses import PROMPT_METHODS, PromptTraining, build_prompts
from robustvlm_lite.defenses.prompting import STYLES, scaled_spec


def test_coops_schedule_is_dassls():
    """An epoch at 1e-5, then a cosine that starts one epoch late; the logged rate of FAP in its third epoch."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer, schedule = PromptTraining(steps=50, batch=4, lr=0.0035, epoch=5).optimizer_of([parameter])
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([1e-5] * 5) and rates[5:10] == pytest.approx([0.0035] * 5)
    assert rates[10] == pytest.approx(3.4143e-3, abs=1e-7) and rates[-1] == pytest.approx(0.0035 / 2 * (1 + math.cos(0.8 * math.pi)))


def test_styles_count_steps_as_the_papers_do():
    """Batches of 16 shots, unfilled ones left out: the table of section 4.2, and APT's epochs by shots."""
    data = photos(4)
    for classes, steps in ((1000, 4000), (100, 400), (37, 148), (47, 188), (10, 40)):
        sixteen = replace(data, images=data.images[:1].expand(16 * classes, -1, -1, -1))
        plan = STYLES["maple"].training(sixteen)
        assert (plan.epoch, plan.steps, plan.batch, plan.lr) == (steps, 10 * steps, 4, 0.0035)
    apt = STYLES["apt"]
    assert [apt.training(sixteen, k).steps // apt.training(sixteen, k).epoch for k in (1, 2, 4, 8, 16, 0)] == [50, 100, 100, 200, 200, 200]
    assert apt.attack(4.0) == (4.0, {"n_steps": 3, "step_255": pytest.approx(8 / 3), "keep": "last"})
    assert STYLES["advpt"].attack(1.0) == (8.0, {"n_steps": 10, "step_255": 1.0, "keep": "last"})
    assert apt.training(data).batch == 4 and apt.training(data).augment and apt.attack_step == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def vit_b32():
    return another_clip("ViT-B-32-quickgelu")


@pytest.mark.parametrize("name", ["CAPT", "CBA-FAPT", "FAP"])
def test_the_papers_shapes_take_a_step(name, vit_b32):
    """Random weights of ViT-B/32, two images of 224 pixels, the paper's own prompts."""
    data, defense = photos(2, side=224), build_prompts(name, vit_b32, NAMES)
    defense.fit(data, attack=ATTACK, training=replace(SHORT, steps=1, batch=2), progress=False)
    assert all(math.isfinite(v) for v in defense.history[0].values())
    with torch.no_grad():
        assert defense.classifier(NAMES)(data.pixels()).isfinite().all()


def test_parameters_at_vit_b32_are_the_papers(vit_b32):
    clip = vit_b32
    counts = {"AVP": 241_920, "AdvVP": 73_680, "APT": 8_192, "AdvPT": 16_384, "AdvVLP": 23_040, "AdvMaPLe": 3_555_072,
              "FAP": 3_557_120, "FAP (shared projection)": 801_024, "CAPT": 23_040, "CBA-FAPT": 3_557_120}  # fmt: skip
    for name, count in counts.items():
        assert build_prompts(name, clip, NAMES).learner.num_parameters() == count, name
    assert build_prompts("APT (class-specific)", clip, NAMES).learner.num_parameters() == 4 * 8_192
    assert PROMPT_METHODS["CAPT"].spec == scaled_spec(clip, PROMPT_METHODS["CAPT"].spec)
