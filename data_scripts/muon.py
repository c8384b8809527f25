"""Muon: momentum whose update is made orthogonal, for the matrices of a network's inner layers (Jordan et al. 2024).

Matrices of one shape are stacked and orthogonalized together, which is what makes it cheap on a CPU. A convolution's
kernel counts as the matrix of its output channels by all that they see.
"""

import torch
from torch import Tensor


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices of g [M, rows, cols], rows <= cols."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; `in_proj` matrices are split into their query, key and value parts."""

    def __init__(self, named_params, lr: float = 0.015, momentum: float = 0.95, weight_decay: float = 0.0):
        self.parts = {id(p): 3 if "in_proj" in name else 1 for name, p in named_params}
        super().__init__([p for _, p in named_params], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes: dict[tuple, list] = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                p.mul_(
                    1 - group["lr"] * group["weight_decay"]
                )  # else the matrices grow and the steps shrink beside them
                for whole, piece in zip(p.chunk(self.parts[id(p)]), update.chunk(self.parts[id(p)]), strict=True):
                    piece = piece.flatten(1)
                    tall = piece.shape[0] > piece.shape[1]
                    shapes.setdefault(tuple(sorted(piece.shape)), []).append((whole, piece.mT if tall else piece, tall))
            for (rows, cols), pieces in shapes.items():
                done = orthogonalize(torch.stack([piece for _, piece, _ in pieces]))
                for (whole, _, tall), o in zip(pieces, done, strict=True):
                    scale = (cols / rows) ** 0.5 if tall else 1.0
                    whole.add_((o.mT if tall else o).reshape(whole.shape), alpha=-group["lr"] * scale)
