"""A book of one small chapter in a folder of its own, for the tests of the runner."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from robustvlm_lite import runtime

CHAPTER = "99_toy"
PROFILES = f"""
{CHAPTER}:
  title: "A toy"
  reproduces: "nothing"
  parameters: {{eps_255: [0.0, 64.0]}}
  profiles:
    tiny: {{minutes: 1, where: "anywhere", model: nano}}
    small: {{minutes: 1, where: "anywhere", model: nano, train: [[small/stl10, 0]]}}
    paper: {{minutes: 1, where: "anywhere", model: ViT-B-32-quickgelu, weights: "the file X"}}
"""
# Ends badly for ε of 13 to 16. Else it keeps a finished cell, waits while a file `slow` lies beside the run, and ends.
NOTEBOOK = '''# %% [markdown]
# # A toy chapter

# %% tags=["parameters"]
profile = "tiny"  # sizes
seed = 0          # randomness
eps_255 = 1.0     # budget, in 1/255
n_images: int = 4
warm = False      # a switch
device = ""       # empty: found out
data_root = ""    # other packs
pretrained = ""   # other weights

# %%
import os

class UserError(ValueError):
    """As the book's own, without its imports."""

print(f"toy chapter, profile {profile}, seed {seed}")
if eps_255 == 13:
    raise UserError("expected another number than 13, got 13; choose 12")
if eps_255 == 14:
    raise ValueError("a bug\\nof two lines")
if eps_255 == 15:
    os._exit(9)

# %%
def measure():
    import time
    from pathlib import Path
    from robustvlm_lite.cards import Card
    from robustvlm_lite.records import Cell, Row, Store, records_table

    folder = Path(os.environ["ROBUSTVLM_OUT"])
    store, rows, computed = Store(folder / "cells"), [], []
    for attack, eps in (("none", 0.0), ("pgd-20", eps_255)):
        key = dict(method="CLIP", dataset="toy/gray", attack=attack, eps_255=eps, seed=seed, n=n_images)
        cell = store.get(key)
        if cell is None:
            right = [i % 2 == 0 or attack == "none" for i in range(n_images)]
            facts = dict(label=1, prediction=[int(r) for r in right], correct=right, margin=0.5, linf_255=eps)
            facts |= dict(prediction_8bit=facts["prediction"], correct_8bit=right, index=list(range(n_images)))
            cell = Cell(records_table(**key, **facts), 0.5, n_images, 0)
            store.put(key, cell)
            computed.append(attack)
        (folder.parent / "computed").write_text(" ".join(computed))
        while attack == "none" and (folder.parent / "slow").exists():
            time.sleep(0.05)
        metric = "clean_acc" if attack == "none" else "robust_acc"
        value = sum(cell.records["correct"].to_pylist()) / n_images
        rows.append(Row("CLIP", "toy/gray", attack, eps, metric, n_images, value, (0.0, 1.0), 0.5, extra={"seed": seed},
                        records=cell.records, weights_sha256="w", data_sha256="d"))
    parameters = {"eps_255": eps_255, "n_images": n_images}
    Card("99_toy", profile, seed, parameters, device="cpu").add(rows).write(folder)

# %%
if eps_255 != 16:
    measure()
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout with the toy chapter, which this process takes for the book; results go to its `runs`."""
    package = tmp_path / "checkout" / "robustvlm_lite"
    (package / "assets" / "clip").mkdir(parents=True)
    (package / "assets" / "profiles.yml").write_text(PROFILES)
    for name in ("clip/nano.json", "clip/models.yml", "datasets.yml"):
        shutil.copy(runtime.asset(name), package / "assets" / name)
    (package / "assets" / "clip" / "nano.safetensors").write_text("")
    notebooks = package.parent / "notebooks"
    notebooks.mkdir()
    (notebooks / f"{CHAPTER}.py").write_text(NOTEBOOK)
    monkeypatch.setattr(runtime, "PACKAGE", package)
    return package.parent


def start(checkout: Path, *argv: str) -> subprocess.Popen:
    """The command in a process and a process group of its own, with the toy book."""
    code = f"""
        import sys
        from pathlib import Path
        from robustvlm_lite import cli, runtime
        runtime.PACKAGE = Path({str(checkout / "robustvlm_lite")!r})
        sys.exit(cli.main({list(argv)!r}))
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env, start_new_session=True, **pipes)
