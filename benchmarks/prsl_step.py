"""Price of PRSL's penalty: time of a training step against one with cross-entropy, and memory against a full sort.

    python benchmarks/prsl_step.py [--model tiny-vit-gpt2|full] [--batch 64] [--repeats 9]

Steps with and without the penalty run in turn, so that a busy machine slows both; the ratio is the median over the rounds.
Targets: at most 1.10 times a step, and no tensor of indices as large as positions times vocabulary. The released order sorts
every row of the vocabulary and builds two masks of its size; it is written here from the formula, for comparison.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from robustvlm_lite.captioner import load_captioner, new_captioner
from robustvlm_lite.captioner.contract import Captioner, TokenLoss, cross_entropy
from robustvlm_lite.captioner.loading import VIT_GPT2
from robustvlm_lite.defenses.prsl import PrslConfig
from robustvlm_lite.runtime import generator
from robustvlm_lite.scenes.duo import sample_duos

TARGET, POSITIONS, VOCABULARY = 1.10, 1024, 50257


class Made(TorchDispatchMode):
    """Bytes of all tensors that operations return, and of the largest one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.total, self.indices = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                size = tensor.numel() * tensor.element_size()
                self.total += size
                self.indices = max(self.indices, size if tensor.dtype == torch.int64 else 0)
        return out


def by_sorting(z: Tensor, t: Tensor, k: int = 4) -> Tensor:
    """R1 as a sort of all logits, a grid of ranks and a mask of the right word."""
    ordered, index = z.sort(dim=1, descending=True)
    wrong = index != t[:, None]
    ranks = wrong.cumsum(1)
    mu = ordered.masked_fill(~(wrong & (ranks <= k)), 0).sum(1) / k
    return -mu.log_softmax(0).sum()


def memory() -> None:
    z = torch.randn(POSITIONS, VOCABULARY, generator=generator("memory"))
    t = torch.randint(VOCABULARY, (POSITIONS,), generator=generator("labels"))
    ways = {"ours": lambda: PrslConfig().penalty(z[None], t[None]), "full sort": lambda: by_sorting(z, t)}
    values = {}
    for name, way in ways.items():
        started = time.perf_counter()
        with Made() as made:
            values[name] = way().item()
        grid = 8 * POSITIONS * VOCABULARY
        print(f"{name:10s} {made.total / 2**20:7.0f} MiB made, largest index tensor {made.indices / 2**20:6.1f} MiB "
              f"(a grid: {grid / 2**20:.0f}), {time.perf_counter() - started:.2f} s")  # fmt: skip
    assert abs(values["ours"] - values["full sort"]) < 1e-3 * abs(values["full sort"]), values


def seconds(model: Captioner, x: Tensor, texts: list[str], loss: TokenLoss) -> float:
    model.zero_grad()
    started = time.perf_counter()
    model.token_loss(x, texts, loss=loss).backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny-vit-gpt2", "full"), default="tiny-vit-gpt2", help="full: random ViT-GPT2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    memory()
    model = load_captioner(VIT_GPT2, weights="random") if args.model == "full" else new_captioner(args.model)
    model.requires_grad_(True)
    scenes = sample_duos(args.batch, generator("scenes"), size=model.image_size)
    x, texts = scenes.pixels(), scenes.captions()
    rounds = [[seconds(model, x, texts, loss) for loss in (cross_entropy, PrslConfig())] for _ in range(args.repeats + 1)][1:]
    ratio = statistics.median(b / a for a, b in rounds)
    plain = statistics.median(a for a, _ in rounds)
    print(f"{args.model}, batch {args.batch}, V = {model.vocab_size}: {plain:.3f} s a step")
    print(f"{ratio:.2f} times as long with the penalty; target at most {TARGET}")


if __name__ == "__main__":
    main()
