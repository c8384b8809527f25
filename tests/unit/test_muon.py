"""Muon against the singular values that it promises."""

import pytest
import torch
from muon import Muon, orthogonalize


@pytest.mark.parametrize("rows, cols", [(32, 32), (32, 128), (128, 384)])
def test_orthogonalize_brings_singular_values_near_one(rows, cols):
    g = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1.0, 1e3]).view(
        3, 1, 1
    )
    before, after = torch.linalg.svdvals(g), torch.linalg.svdvals(orthogonalize(g))
    kept = before > 0.05 * before.amax(1, keepdim=True)  # five iterations cannot lift what is nearly zero
    assert kept.float().mean() > 0.8
    assert after[kept].min() > 0.5 and after.max() < 1.35
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    aligned = (orthogonalize(g) * (u @ vh)).sum((1, 2)) / rows
    assert (aligned > 0.7).all(), "the nearest orthogonal matrix keeps the singular vectors"


def test_muon_steps_have_one_size_for_every_shape_and_follow_the_gradient():
    shapes = {"wide.weight": (16, 64), "tall.weight": (64, 16), "attn.in_proj_weight": (48, 16)}
    params = [(n, torch.nn.Parameter(torch.zeros(s))) for n, s in shapes.items()]
    optimizer = Muon(params, lr=0.1)
    g = torch.Generator().manual_seed(0)
    for _, p in params:
        p.grad = torch.randn(p.shape, generator=g)
    optimizer.step()
    for name, p in params:
        assert (p * p.grad).sum() < 0, "downhill"
        scale = {"wide.weight": 1, "tall.weight": 2, "attn.in_proj_weight": 1}[name]  # sqrt(rows / cols) where tall
        for part in p.detach().chunk(3 if "in_proj" in name else 1):
            assert 0.5 * 0.1 * scale < torch.linalg.svdvals(part).median() < 1.35 * 0.1 * scale, name


def test_muon_splits_in_proj_into_query_key_and_value():
    """A loud value part must not drown the query's update, as it would in one matrix."""
    p = torch.nn.Parameter(torch.zeros(24, 8))
    p.grad = (
        torch.randn(24, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3] * 8 + [1.0] * 16)[:, None]
    )
    Muon([("block.attn.in_proj_weight", p)], lr=1.0).step()
    norms = [part.detach().norm().item() for part in p.chunk(3)]
    assert max(norms) < 1.5 * min(norms)


def test_muon_keeps_momentum():
    p = torch.nn.Parameter(torch.eye(8))
    optimizer = Muon([("w", p)], lr=0.1)
    p.grad = torch.eye(8)
    optimizer.step()
    moved = p.detach().clone()
    p.grad = torch.zeros(8, 8)
    optimizer.step()
    assert (p - moved).norm() > 0.1, "a zero gradient still moves"


def test_muon_weight_decay_shrinks_a_matrix_by_rate_times_decay():
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    decayed, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    for p, decay in ((decayed, 0.5), (plain, 0.0)):
        p.grad = torch.ones(8, 8)
        Muon([("mlp.weight", p)], lr=0.1, weight_decay=decay).step()
    torch.testing.assert_close(decayed.detach(), plain.detach() - 0.05 * start)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_a_kernel_as_the_matrix_of_what_a_channel_sees(layout):
    start = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    kernel = torch.nn.Parameter(start.clone(memory_format=layout))
    matrix = torch.nn.Parameter(start.reshape(8, 36).clone())
    kernel.grad, matrix.grad = gradient.clone(memory_format=layout), gradient.reshape(8, 36).clone()
    for p in (kernel, matrix):
        Muon([("layer.weight", p)], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(kernel.detach().reshape(8, 36), matrix.detach())
    assert torch.linalg.svdvals(matrix.detach() - 0.99 * start.reshape(8, 36)).median() > 0.05
    assert kernel.is_contiguous(memory_format=layout)
