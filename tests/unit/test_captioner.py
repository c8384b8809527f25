"""Captioners against transformers' own classes: losses, generation, gradients by pixel, and every input that would fool them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustvlm_lite import captioner as room
from robustvlm_lite.captioner import IGNORED, load_captioner, loading, new_captioner
from robustvlm_lite.captioner.words import Words
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.scenes.duo import sample_duos

KINDS = ("tiny-vit-gpt2", "tiny-blip2")
QUESTIONS = ["what color is the left thing ?", "is there a star ?", "what size is the below thing ?"]
TEXTS = {"tiny-vit-gpt2": ["a small red circle above a big blue star", "a big", "a"], "tiny-blip2": ["red", "yes", "a small"]}


def asked(model):
    return QUESTIONS if model.name == "tiny-blip2" else None


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return new_captioner(request.param, seed=3).eval()


@pytest.fixture(scope="module")
def x():
    return sample_duos(3, generator("captioner")).pixels()


def own_loss(model, x, texts):
    """The loss that transformers' class computes from `labels`."""
    token = model.tokenizer
    pixels, rows = (x - model.mean) / model.std, [[*token.encode(t), token.eos] for t in texts]
    if model.name == "tiny-vit-gpt2":
        labels = torch.full((len(rows), max(map(len, rows))), IGNORED)
        for label, row in zip(labels, rows, strict=True):
            label[: len(row)] = torch.tensor(row)
        model.model.config.pad_token_id, model.model.config.decoder_start_token_id = token.pad, token.start
        return model.model(pixel_values=pixels, labels=labels).loss
    image = token.ids["pink"]  # a word that these texts do not hold stands for the image
    model.model.config.image_token_id = image
    given = [[image] * 8 + [token.start, *token.encode(q)] for q in QUESTIONS]
    width = max(len(a) + len(b) for a, b in zip(given, rows, strict=True))
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    for k, (before, row) in enumerate(zip(given, rows, strict=True)):
        ids[k, : len(before) + len(row)] = torch.tensor(before + row)
        labels[k, len(before) : len(before) + len(row)] = torch.tensor(row)
    return model.model(pixel_values=pixels, input_ids=ids, labels=labels).loss


def test_the_token_loss_is_that_of_the_class(model, x):
    texts = TEXTS[model.name]
    assert torch.allclose(model.token_loss(x, texts, asked(model)), own_loss(model, x, texts), atol=1e-5)


def test_losses_of_single_images_do_not_depend_on_their_neighbours(model, x):
    texts, questions = TEXTS[model.name], asked(model)
    together = model.token_loss(x, texts, questions, reduction="none")
    alone = [model.token_loss(x[i : i + 1], texts[i : i + 1], questions and questions[i : i + 1]) for i in range(3)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_logits_of_a_greedy_text_are_the_scores_that_wrote_it(model, x, monkeypatch):
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    token = model.tokenizer
    options |= {"bos_token_id": token.start, "pad_token_id": token.pad, "eos_token_id": None}  # it goes on to the sixth token
    for i in range(3):
        one, question = x[i : i + 1], asked(model) and QUESTIONS[i : i + 1]
        if model.name == "tiny-vit-gpt2":
            out = model.model.generate(pixel_values=(one - model.mean) / model.std, decoder_start_token_id=token.start, **options)
            ids = out.sequences[0, 1:]
        else:
            embeds = torch.cat([model.seen(one), model.model.get_input_embeddings()(torch.tensor(model.given(question, 1)))], dim=1)
            out = model.model.language_model.generate(inputs_embeds=embeds, **options)
            ids = out.sequences[0]
        monkeypatch.setattr(model, "labels", lambda texts, n, ids=ids: [ids.tolist()])  # also ids that are no word
        logits, _ = model.logits(one, ["it"], question)
        assert torch.allclose(logits[0, -6:], torch.cat(out.scores), atol=1e-4)


def test_generation_of_a_batch_is_that_of_single_images(model, x):
    """Questions of other lengths stand left of the answer; their padding must change nothing."""
    questions = asked(model)
    alone = [model.generate(x[i : i + 1], questions and questions[i : i + 1], max_new_tokens=5)[0] for i in range(3)]
    assert model.generate(x, questions, max_new_tokens=5) == alone


def test_pixel_gradients_are_central_differences(model, x):
    exact = new_captioner(model.name, seed=3).double().eval()
    pixels, step = (0.1 + 0.8 * x.double()).requires_grad_(), 1e-5
    texts, questions = TEXTS[model.name], asked(model)
    exact.token_loss(pixels, texts, questions).backward()
    for place in torch.randint(pixels.numel(), (10,), generator=generator("pixels")):
        moved = [pixels.detach().clone() for _ in range(2)]
        moved[0].view(-1)[place] += step
        moved[1].view(-1)[place] -= step
        up, down = (exact.token_loss(m, texts, questions).item() for m in moved)
        assert pixels.grad.view(-1)[place].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-9)


def test_normalization_is_inside(model, x):
    outside = ((x - model.mean) / model.std).requires_grad_()
    inside = x.clone().requires_grad_()
    own_loss_of = own_loss(model, outside * model.std + model.mean, TEXTS[model.name])
    own_loss_of.backward()
    model.token_loss(inside, TEXTS[model.name], asked(model)).backward()
    assert torch.allclose(inside.grad, outside.grad / model.std, rtol=1e-3, atol=1e-6)


def test_the_answer_depends_on_the_image(model, x):
    texts, questions = TEXTS[model.name], asked(model)
    seen, black = (model.logits(p, texts, questions)[0] for p in (x, torch.zeros_like(x)))
    assert (seen - black).abs().max() > 1e-3


def test_queries_of_a_new_blip2_differ():
    """transformers starts them at zero, where all outputs are alike and stay so."""
    model = new_captioner("tiny-blip2", seed=0)
    assert model.seen(torch.rand(1, 3, 64, 64)).std(dim=1).min() > 1e-4


def test_blip2_fine_tunes_what_the_release_does():
    model = new_captioner("tiny-blip2")
    names = {id(p): n for n, p in model.model.named_parameters()}
    roots = {names[id(p)].split(".")[0] for p in model.trainable()}
    assert roots == {"query_tokens", "qformer", "language_projection", "vision_model"}
    assert {names[id(p)] for p in model.trainable() if names[id(p)].startswith("vision")} == {
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
    }


def test_training_on_padding_predicts_end_tokens_up_to_the_last_position(x):
    model = new_captioner("tiny-vit-gpt2")
    model.quirk_train_on_padding = True
    _, labels = model.logits(x, TEXTS["tiny-vit-gpt2"])
    assert labels.shape == (3, 32) and not (labels == IGNORED).any()
    assert (labels[2, 1:] == model.tokenizer.eos).all() and labels[2, 0] == model.tokenizer.ids["a"]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda x: x[:, :1], r"got \[3, 1, 64, 64\]; convert to RGB"),
        (lambda x: torch.cat([x, x[:, :1]], dim=1), r"got \[3, 4, 64, 64\]"),
        (lambda x: x[:, :, :32, :32], r"got \[3, 3, 32, 32\]"),
        (lambda x: x[0], r"got \[3, 64, 64\]"),
        (lambda x: (x * 255).to(torch.uint8), "divide by 255"),
        (lambda x: x * 255, r"pixels in \[0, 1\]"),
        (lambda x: x - 0.9, r"pixels in \[0, 1\]"),
        (lambda x: x / 0, r"pixels in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("call", ["logits", "generate"])
def test_wrong_images_are_refused(model, x, change, complaint, call):
    with pytest.raises(UserError, match=complaint) as caught:
        if call == "logits":
            model.logits(change(x), TEXTS[model.name], asked(model))
        else:
            model.generate(change(x), asked(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, texts, questions, complaint",
    [
        ("tiny-vit-gpt2", ["a", "", "a"], None, "got an empty one at 1"),
        ("tiny-vit-gpt2", ["a"], None, "one target an image, got 1 for 3"),
        ("tiny-vit-gpt2", ["a " * 40] * 3, None, "at most 32 tokens, got 41"),
        ("tiny-vit-gpt2", ["a zebra"] * 3, None, "unknown word 'zebra'"),
        ("tiny-vit-gpt2", ["a rde circle"] * 3, None, "did you mean 'red'"),
        ("tiny-vit-gpt2", ["a"] * 3, QUESTIONS, "only captions"),
        ("tiny-blip2", ["red", "yes", " "], QUESTIONS, "got an empty one at 2"),
        ("tiny-blip2", ["red"] * 3, QUESTIONS[:2], "one question an image, got 2 for 3"),
        ("tiny-blip2", ["red"] * 3, ["", *QUESTIONS[1:]], "a question for every image, got an empty one at 0"),
    ],
)
def test_wrong_texts_are_refused(x, name, texts, questions, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        new_captioner(name).logits(x, texts, questions)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_holds_a_word_once():
    with pytest.raises(UserError, match="got a word twice"):
        Words(["red", "blue", "red"])


# --- loading


def write(folder, model, monkeypatch):
    """The weights and facts of `model` as the package keeps them, in `folder` in place of the assets."""
    facts = json.loads(loading.config_file(model.name).read_text())
    path = folder / f"{model.name}.json"
    state = {k: v.contiguous() for k, v in model.model.state_dict().items() if not k.endswith("lm_head.weight")}
    save_file(state, path.with_suffix(".safetensors"))
    path.write_text(json.dumps(facts | {"weights_sha256": room.loading.sha256(path.with_suffix(".safetensors"))}))
    monkeypatch.setattr(loading, "config_file", lambda name: folder / f"{name}.json")
    return path.with_suffix(".safetensors")


def test_stored_weights_come_back(model, x, tmp_path, monkeypatch):
    write(tmp_path, model, monkeypatch)
    again = load_captioner(model.name)
    want, got = (m.logits(x, TEXTS[model.name], asked(model))[0] for m in (model, again))
    assert torch.equal(want, got)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


@pytest.mark.parametrize("fault, complaint", [("absent", "no such file"), ("changed", "SHA-256"), ("shape", "another shape")])
def test_broken_weights_are_refused(fault, complaint, tmp_path, monkeypatch):
    model = new_captioner("tiny-vit-gpt2")
    path, given = write(tmp_path, model, monkeypatch), ""
    if fault == "absent":
        path.unlink()
    elif fault == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
    else:
        state = load_file(path)
        state.pop(sorted(state)[0])
        save_file(state, tmp_path / "other.safetensors")
        given = str(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=complaint) as caught:
        load_captioner("tiny-vit-gpt2", weights=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, weights, complaint",
    [
        ("tiny-blip", "", "did you mean 'tiny-blip2'"),
        (loading.VIT_GPT2, "/nowhere/at/all", "expected a folder"),
    ],
)
def test_unknown_captioners_are_refused(name, weights, complaint):
    with pytest.raises(UserError, match=complaint):
        load_captioner(name, weights=weights)


def published_tokenizer(words):
    """A tokenizer file of the form that GPT-2's has in a local folder, over whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["</s>", *words, "\n"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("name, tiny", [(loading.VIT_GPT2, "tiny-vit-gpt2"), (loading.BLIP2, "tiny-blip2")])
def test_a_published_model_loads_from_a_local_folder(name, tiny, x, tmp_path):
    model = new_captioner(tiny)
    model.model.config.decoder_start_token_id = model.model.config.eos_token_id = 0
    model.model.save_pretrained(tmp_path)
    published_tokenizer(model.tokenizer.words[3:]).save_pretrained(tmp_path)
    loaded = load_captioner(name, weights=str(tmp_path))
    prompt = ["what color ?"] * 3 if tiny == "tiny-blip2" else None
    if prompt:
        loaded.asks = "{}"  # the words of the full prompt are not in this vocabulary
    logits, labels = loaded.logits(x, ["a red circle", "a blue star", "a star"], prompt)
    assert logits.shape[:2] == labels.shape and len(loaded.generate(x, prompt, max_new_tokens=3)) == 3
    assert loaded.weights_sha256 and loaded.weights_sha256 != "hub"


def test_the_published_shapes_run_with_random_weights():
    model = load_captioner(loading.VIT_GPT2, weights="random")
    vit = 197 * 768 + 768 + 768 * (768 + 1) + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    gpt2 = (50257 + 1024) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    cross = 12 * (4 * 768**2 + 4 * 768 + 2 * 768)
    assert sum(p.numel() for p in model.parameters()) == vit + gpt2 + cross
    photo = torch.rand(1, 3, 224, 224, generator=generator("photo")).requires_grad_()
    model.token_loss(photo, ["a dog"]).backward()
    assert photo.grad.abs().max() > 0 and len(model.generate(photo.detach(), max_new_tokens=2)) == 1
