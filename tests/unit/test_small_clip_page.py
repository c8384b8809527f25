"""The functions that chapter 10 writes out for the reader compute what the training script computes."""

import ast
from pathlib import Path

import contrastive
import pytest
import torch
import torch.nn.functional as F
from muon import Muon

PAGE = Path(__file__).resolve().parents[2] / "notebooks" / "10_small_clip.py"
WANTED = ("my_loss", "my_positions", "orthogonalize", "muon_step", "pieces", "follow")


@pytest.fixture(scope="module")
def page():
    """The chapter's functions by name, without a run of the chapter."""
    tree = ast.parse(PAGE.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in WANTED]
    known = {"torch": torch, "F": F}
    exec(compile(tree, str(PAGE), "exec"), known)
    return {name: known[name] for name in WANTED}


def test_the_loss_of_a_batch(page, random_clip):
    g = torch.Generator().manual_seed(0)
    x, captions = torch.rand(5, 3, 64, 64, generator=g), ["a cat", "a dog", "a red shape", "a blue shape", "a star"]
    groups = [(torch.tensor([0, 3]), torch.tensor([1, 0]), torch.tensor([0, 1]))]
    groups += [(torch.tensor([1, 2, 4]), torch.tensor([2, 0, 0]), torch.tensor([2, 3, 4]))]
    with torch.no_grad():
        want = contrastive.contrastive_loss(
            random_clip.model, random_clip.tokenizer, (x, captions, groups), torch.device("cpu")
        )
        text, scale = random_clip.encode_text(captions), random_clip.logit_scale
        got = page["my_loss"](random_clip.image_features(x), F.normalize(text, dim=1), scale, groups)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [32, 48, 64])
def test_the_positions_of_an_image_side(page, random_clip, side):
    got, want = page["my_positions"](random_clip.visual, side), contrastive.positions(random_clip.visual, side)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32), (96, 32)])
def test_two_steps_of_muon(page, shape):
    """The script iterates in bfloat16, which keeps about two digits."""
    g = torch.Generator().manual_seed(1)
    start, gradients = torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(2)]
    script = torch.nn.Parameter(start.clone())
    optimizer = Muon([("attn.in_proj_weight" if shape == (96, 32) else "mlp.weight", script)], lr=0.1, weight_decay=0.5)
    own, momentum = start.clone(), torch.zeros(shape)
    for gradient in gradients:
        script.grad = gradient.clone()
        optimizer.step()
        for part in zip(page["pieces"](own), page["pieces"](gradient), page["pieces"](momentum), strict=True):
            page["muon_step"](*part, lr=0.1, decay=0.5)
    moved = (script.detach() - start).norm()
    assert moved > 1 and (own - script.detach()).norm() < 0.03 * moved


def test_the_average_follows_as_the_scripts_does(page):
    average, weights = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    page["follow"]([average], [weights], 0.75)
    torch.testing.assert_close(average, torch.tensor([1.5, 1.5]))
