"""What is learned: sentences and places, counts, starts, seeds, files' worth of state, and what is refused."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_prompts import NAMES, SPECS, images, prompted, sentence, toy_clip

from robustvlm_lite.clip import random_clip as make_random_clip
from robustvlm_lite.prompts import PromptedCLIP, PromptLearner, PromptSpec
from robustvlm_lite.prompts.words import class_words
from robustvlm_lite.runtime import UserError


@pytest.fixture(scope="module")
def clip(register):
    return toy_clip(register, "toy-learner")


@pytest.fixture(scope="module")
def resnet(register):
    return toy_clip(register, "toy-learner-rn", image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)


@pytest.fixture(scope="module")
def vit_b32():
    return make_random_clip("ViT-B-32-quickgelu")


# --- sentences


@pytest.mark.parametrize("base", ["toy", "nano"])
@pytest.mark.parametrize("name", SPECS)
def test_every_sentence_is_whole_and_leaves_room_for_the_context(clip, random_clip, base, name):
    clip, spec = clip if base == "toy" else random_clip, SPECS[name]
    words, end = class_words(clip, spec, NAMES), clip.tokenizer.eot_token_id
    assert len(words) == len(NAMES) and words.ids.shape[1] == words.end.max() + 1, "cut to the longest"
    for c, label in enumerate(NAMES):
        ids, places = sentence(clip.tokenizer, spec, label)
        if spec.start == "normal":
            ids[torch.tensor(places)] = 0  # filler words against our zeros
        assert words.slots[c].tolist() == places
        assert words.ids[c].tolist() == ids[: words.ids.shape[1]].tolist() and not ids[words.ids.shape[1] :].any()
        assert words.end[c] == words.ids[c].argmax() == words.ids[c].tolist().index(end)
        content = words.ids[c, words.content[c]].tolist()
        assert content == words.ids[c, 1 : words.end[c]].tolist()
        kept = [i for p, i in enumerate(words.ids[c].tolist()) if p not in places and 0 < p < words.end[c]]
        assert clip.tokenizer.decode(kept).split().count(label.split()[-1]) == 1, "the class name is intact"
        braces = re.search(r"[{}]", clip.tokenizer.decode(content))
        assert bool(braces) == spec.quirk_literal_braces


def test_words_are_read_as_the_tokenizer_reads_the_sentence(clip):
    """A multi-token word, a name that ends in a point, a suffix: one whole sentence, tokenized once."""
    for template in ("a satellite-map photo of {}.", "a photo of a {}, a type of pet.", "{} texture.", "{}"):
        n = min(2, len(clip.tokenizer.encode(template.split("{}")[0])))
        names = ("abyssinian", "s.w.a.t.", "men's shirt")
        words = class_words(clip, PromptSpec(n_text=n, template=template), names)
        full = clip.tokenizer([template.format(name) for name in names])
        assert torch.equal(words.ids, full[:, : words.ids.shape[1]])


# --- counts and starts


def test_parameter_counts_at_vit_b32(vit_b32):
    """The table of section 3.0 and the sums of section 2.3 of the specification; AVP and MaPLe also print theirs."""
    both = {"n_text": 2, "depth_text": 9, "n_vision": 2, "depth_vision": 9}
    up, down = 512 * 768 + 768, 768 * 512 + 512
    counts = {
        PromptSpec(): 0,
        PromptSpec(n_text=16, start="normal"): 8_192,
        PromptSpec(n_text=32, start="normal"): 16_384,
        PromptSpec(n_vision=5, pixel_pad=30): 73_680,
        PromptSpec(n_vision=200, pixel_pad=40): 241_920,
        PromptSpec(**both): 23_040,
        PromptSpec(**both, coupling="text2vision"): 3_555_072,
        PromptSpec(**both, coupling="fap"): 3_557_120,
        PromptSpec(4, 9, 4, 9): 46_080,
        PromptSpec(**both, coupling="vision2text"): 9 * 2 * 768 + 9 * down,
        PromptSpec(**both, coupling="text2vision", share_projection=True): 9 * 2 * 512 + up,
        PromptSpec(**both, coupling="fap", share_projection=True): 2 * 512 + 8 * 2 * 768 + up + down,
    }
    for spec, count in counts.items():
        assert PromptLearner(vit_b32, spec).num_parameters() == count, spec
    specific = PromptSpec(n_text=16, start="normal", class_specific=True)
    assert PromptLearner(vit_b32, specific, ("a", "b", "c")).num_parameters() == 3 * 8_192


def test_starts_follow_the_seed_and_reset_returns_to_them(clip):
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    for name, spec in SPECS.items():
        names = NAMES if spec.class_specific else ()
        zero, again, one, two = (PromptLearner(clip, spec, names, seed=s).state() for s in (0, 0, 1, 2))
        random = {k for k in zero if not (k == "ctx" and spec.start == "words")}
        assert all(torch.equal(zero[k], again[k]) for k in zero)
        for a, b in ((zero, one), (one, two)):
            assert all(not torch.equal(a[k], b[k]) for k in random), name
        model = prompted(clip, spec)  # moved off its start
        assert not torch.equal(next(iter(model.learner.state().values())), next(iter(zero.values())))
        model.learner.reset()
        assert all(torch.equal(v, zero[k]) for k, v in model.learner.state().items())
    assert torch.equal(torch.rand(2), expected), "the global stream is left alone"


@torch.no_grad()
def test_starts_are_words_and_normal_draws(vit_b32):
    ids = vit_b32.tokenizer(["a photo of a"])[0, 1:5]
    words = PromptLearner(vit_b32, PromptSpec(n_text=4))
    assert torch.equal(words.ctx, vit_b32.model.token_embedding(ids))
    specific = PromptLearner(vit_b32, PromptSpec(n_text=4, class_specific=True), ("a", "b"))
    assert torch.equal(specific.ctx, words.ctx.expand(2, 4, 512))
    learner = PromptLearner(vit_b32, PromptSpec(2, 9, 2, 9, coupling="fap"))
    for values, spread in ((learner.vision_deep, 0.02), (PromptLearner(vit_b32, PromptSpec(pixel_pad=30)).frame, 1.0)):
        assert abs(values.std() / spread - 1) < 0.05 and abs(values.mean()) < 0.05 * spread
    bound = 768**-0.5  # torch's own start of a linear layer: uniform, 1 / sqrt(inputs)
    weight, bias = learner.to_text[0].weight, learner.to_text[0].bias
    assert 0.99 * bound < weight.abs().max() <= bound and abs(weight.std() * 3**0.5 / bound - 1) < 0.01
    assert 0.9 * bound < bias.abs().max() <= bound


@torch.no_grad()
def test_a_frame_covers_the_border_and_nothing_else(clip):
    learner = PromptLearner(clip, PromptSpec(pixel_pad=3))
    pixel = learner().pixel
    assert pixel.shape == (3, 32, 32) and (pixel[:, 3:-3, 3:-3] == 0).all()
    border = torch.ones(32, 32, dtype=torch.bool)
    border[3:-3, 3:-3] = False
    assert torch.equal(pixel[:, border], learner.frame) and (learner.frame != 0).all()


@torch.no_grad()
def test_couplings_are_the_papers_linear_maps(clip):
    """Each coupled prompt through its own map, written out."""
    for name, spec in SPECS.items():
        if spec.coupling == "none":
            continue
        learner = prompted(clip, spec).learner
        prompts, linear = learner(), torch.nn.functional.linear
        assert len(prompts.text) == spec.depth_text and len(prompts.vision) == spec.depth_vision, name
        for i, (t, v) in enumerate(zip(prompts.text, prompts.vision, strict=True)):
            text_leads = spec.coupling == "text2vision" or (spec.coupling == "fap" and i == 0)
            maps = learner.to_vision if text_leads else learner.to_text
            skipped = 1 if spec.coupling == "fap" and not text_leads else 0
            own = maps[0] if spec.share_projection else maps[i - skipped]
            source, target = (t, v) if text_leads else (v, t)
            assert torch.equal(target, linear(source, own.weight, own.bias)), (name, i)
            first, deep = (learner.ctx, learner.text_deep) if text_leads else (learner.vision, learner.vision_deep)
            assert torch.equal(source, first if i == 0 else deep[i - 1]), (name, i)


# --- state


@torch.no_grad()
@pytest.mark.parametrize("name", ["FAP", "AVP", "APT"])
def test_state_goes_through_a_file_and_knows_no_classes(clip, tmp_path, name):
    model, x = prompted(clip, SPECS[name]), images(2)
    save_file(model.learner.state(), tmp_path / "prompts.safetensors")
    other = PromptLearner(clip, SPECS[name], seed=7).load(load_file(tmp_path / "prompts.safetensors"))
    assert sum(v.numel() for v in model.learner.state().values()) == model.learner.num_parameters()
    for names in (NAMES, ("fish", "a far longer name of a bird")):
        assert torch.equal(PromptedCLIP(clip, other, names)(x), model.for_classes(names)(x))
    model.learner.state()["ctx" if name != "AVP" else "frame"].zero_()  # copies
    assert torch.equal(PromptedCLIP(clip, other, NAMES)(x), model(x))


def test_a_state_of_another_spec_is_refused_and_moves_nothing(clip):
    learner = PromptLearner(clip, PromptSpec(n_text=2, n_vision=2))
    before = learner.state()
    fitting = {k: v + 1 for k, v in before.items()}
    cases = {
        "ctx of shape (2, 16), got (3, 16)": fitting | {"ctx": torch.zeros(3, 16)},
        "vision of shape (2, 32), got none": {"ctx": fitting["ctx"]},
        "text_deep of shape none, got (1, 2, 16)": fitting | {"text_deep": torch.zeros(1, 2, 16)},
    }
    for text, state in cases.items():
        with pytest.raises(UserError, match=re.escape(text)):
            learner.load(state)
        assert all(torch.equal(v, before[k]) for k, v in learner.state().items())


# --- what is refused: what to do -> what the line says

WRONG_SPECS = {
    "n_text: expected a whole number of at least 0, got -1": {"n_text": -1},
    "n_vision: expected a whole number of at least 0, got 1.5": {"n_vision": 1.5},
    "depth_text: expected a whole number of at least 1, got 0": {"n_text": 2, "depth_text": 0},
    "pixel_pad: expected a whole number of at least 0, got True": {"pixel_pad": True},
    "unknown coupling 'txt2vision'; did you mean 'text2vision'?": {"coupling": "txt2vision"},
    "unknown class_position 'ende'; did you mean 'end'?": {"class_position": "ende"},
    "unknown start 'zeros'; known: normal, words": {"start": "zeros"},
    "expected a template with one {}, first or after a space, got 'a photo'": {"template": "a photo"},
    "expected a template with one {}, first or after a space, got '{} of {}'": {"template": "{} of {}"},
    "expected a template with one {}, first or after a space, got 'non{}'": {"template": "non{}"},
    "expected a template with one {}, first or after a space, got '{x} {}'": {"template": "{x} {}"},
    "expected prompt tokens for depth_vision=3, got n_vision=0": {"n_text": 2, "depth_vision": 3},
    "coupling 'fap' needs as many prompts in both towers": {"n_text": 2, "n_vision": 3, "coupling": "fap"},
    "got 2 x 3 text and 2 x 2 vision": SPECS["FAP"].__dict__ | {"depth_vision": 2},
    "got 0 x 1 text and 0 x 1 vision": {"coupling": "text2vision"},
    "share_projection: expected coupled prompts": {"n_text": 2, "share_projection": True},
    "class_specific: expected a context in the input alone, got n_text=2, depth_text=2": {
        "n_text": 2, "depth_text": 2, "class_specific": True,
    },
    "class_position 'front': expected depth_text=1, got 2": {"n_text": 2, "depth_text": 2, "class_position": "front"},
    "quirk_literal_braces: expected a start from words": {"n_text": 2, "start": "normal", "quirk_literal_braces": True},
}  # fmt: skip
WRONG_TOWERS = {
    "depth_text: expected at most 3, the blocks of toy-learner, got 4": PromptSpec(n_text=2, depth_text=4),
    "depth_vision: expected at most 4, the blocks of toy-learner, got 9": PromptSpec(n_vision=2, depth_vision=9),
    "expected prompts in at most 3 blocks, because toy-learner has 3 text and 4 image blocks, got 4": PromptSpec(
        2, 4, 2, 4, coupling="fap"
    ),
    "pixel_pad: expected less than half of the 32 pixels of toy-learner, got 16": PromptSpec(pixel_pad=16),
    "expected at least n_text=5 tokens to start from before the class name, got 4 in 'a photo of a '": PromptSpec(
        n_text=5
    ),
    "expected at least n_text=2 tokens to start from before the class name, got 0 in ''": PromptSpec(
        n_text=2, template="{} texture."
    ),
    "expected the class names of class-specific contexts, got 0 names": PromptSpec(n_text=2, class_specific=True),
}


@pytest.mark.parametrize("line", WRONG_SPECS)
def test_a_spec_that_means_nothing_is_refused(line):
    refused(line, lambda: PromptSpec(**WRONG_SPECS[line]))


@pytest.mark.parametrize("line", WRONG_TOWERS)
def test_prompts_that_do_not_fit_the_towers_are_refused(line, clip):
    refused(line, lambda: PromptLearner(clip, WRONG_TOWERS[line]))


def test_wrong_classes_images_and_towers_are_refused(clip, resnet):
    plain, text = PromptLearner(clip, PromptSpec(n_text=2)), PromptSpec(n_text=2)
    specific = PromptLearner(clip, PromptSpec(n_text=2, class_specific=True), NAMES)
    model, on_resnet = prompted(clip, text), PromptedCLIP(resnet, PromptLearner(resnet, text), NAMES)
    cases = {
        "expected no class names, got 4 names": lambda: PromptLearner(clip, text, NAMES),
        "expected a list of class names, got ()": lambda: PromptedCLIP(clip, plain, ()),
        "expected a list of class names, got ('cat', ' ')": lambda: PromptedCLIP(clip, plain, ("cat", " ")),
        "expected a list of class names, got 'cat'": lambda: PromptedCLIP(clip, plain, "cat"),
        "expected at most 20 tokens, start and end included, got 27 for class 'dog dog": lambda: PromptedCLIP(
            clip, plain, ("cat", "dog " * 20)
        ),
        "expected the 4 classes of the class-specific contexts, got 2 others": lambda: PromptedCLIP(
            clip, specific, NAMES[:2]
        ),
        "expected a vision transformer for visual prompts, got toy-learner-rn": lambda: PromptLearner(
            resnet, PromptSpec(n_vision=2)
        ),
        "expected a vision transformer for image tokens, got toy-learner-rn": lambda: on_resnet.image_tail(
            images(1, 64)
        ),
        "expected images of 32x32 pixels for toy-learner, got 64x64": lambda: model(images(1, 64)),
        "expected blocks of toy-learner from 0 to 3, got [4]": lambda: model.image_trace(images(1), [4]),
        "expected blocks of toy-learner from 0 to 3, got []": lambda: model.image_trace(images(1), []),
        "expected the text of 3 images, got that of 2": lambda: model.logits(
            images(3), prompts=model.learner.expand(2)
        ),
        "expected a batch of at least 1 image, got 0": lambda: model.learner.expand(0),
    }
    for line, make in cases.items():
        refused(line, make)


def refused(line, make):
    with pytest.raises(UserError) as error:
        make()
    assert line in str(error.value) and "\n" not in str(error.value), error.value
