"""Print how many rendered scenes one thread draws in a second (target: at least 2,000)."""

import time

import torch

from robustvlm_lite import scenes


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    scenes.sample(256, generator)  # first calls pay for allocation
    for task in (None, "shape", "count"):
        rates = []
        for _ in range(5):
            start = time.perf_counter()
            scenes.sample(1024, generator, task=task)
            rates.append(1024 / (time.perf_counter() - start))
        print(
            f"{task or 'training mixture':>16}: {max(rates):6.0f} images/s (median {sorted(rates)[2]:.0f}) on one thread"
        )


if __name__ == "__main__":
    main()
