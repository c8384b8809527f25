"""Time of our PGD against torchattacks' PGD: same model, images, start rule, step size and number of steps.

CPU seconds of one thread, so that other work on the machine does not count; the runs of both are shuffled together and
their medians divided. Two such medians of the same function differ by up to 2.5 %. Target: at most 1.05.

    python benchmarks/pgd_overhead.py [--steps 10] [--batch 8] [--size 64] [--repeats 100]
"""

import argparse
import random
import statistics
import time

import torch
import torchattacks
from torch import nn

from robustvlm_lite.attacks import cross_entropy, pgd
from robustvlm_lite.runtime import generator
from robustvlm_lite.threat import ThreatModel

TARGET = 1.05


def small_network(n_classes: int = 25) -> nn.Module:
    """Four convolutions, about a quarter of the cost of the bundled nano CLIP, so that an overhead would show."""
    widths = (3, 32, 64, 128, 128)
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GELU())
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes)).eval()


def measure(steps: int, batch: int, size: int, repeats: int) -> tuple[float, float]:
    """Median CPU seconds of ours and of theirs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, threat = small_network(), ThreatModel(1)
    x = torch.rand(batch, 3, size, size, generator=generator("pgd_overhead"))
    y = torch.arange(batch) % 25
    objective, source = cross_entropy(model, y), generator("starts")
    reference = torchattacks.PGD(model, eps=threat.eps, alpha=threat.eps / 4, steps=steps)

    def ours():
        return pgd(objective, x, threat, n_steps=steps, keep="last", generators=source)

    def theirs():
        return reference(x, y)

    def seconds(function):
        began = time.process_time()
        function()
        return time.process_time() - began

    for warm_up in (ours, theirs):
        warm_up()
    runs = [ours, theirs] * repeats
    random.Random(0).shuffle(runs)  # a run finds the heap as the last one left it: no fixed neighbors
    times = {ours: [], theirs: []}
    for function in runs:
        times[function].append(seconds(function))
    return statistics.median(times[ours]), statistics.median(times[theirs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 10), ("batch", 8), ("size", 64), ("repeats", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    own, other = measure(**vars(args))
    ratio = own / other
    print(f"PGD-{args.steps}, {args.batch} images of {args.size} px, CPU time of one thread")
    print(f"own {1000 * own:.1f} ms, torchattacks {1000 * other:.1f} ms, medians of {args.repeats} runs each, in shuffled order")
    print(f"ratio {ratio:.3f} (target {TARGET}): {'reached' if ratio <= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
