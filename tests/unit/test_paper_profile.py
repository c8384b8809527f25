"""The profile `paper` of a chapter on a handful of images: random weights of OpenAI's shapes from a local file, sets on disk.

What is cut are numbers of images, sets, steps and rungs, and AutoAttack where two base classes are too few for it; model, methods
and code path are the profile's own.
"""

from pathlib import Path
from types import SimpleNamespace

import jupytext
import matplotlib
import pytest
import small_sets
from safetensors.torch import save_file

from robustvlm_lite import runtime
from robustvlm_lite.book import ladder
from robustvlm_lite.clip import random_clip

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PETS, LAND = "oxford_pets", "eurosat"  # three classes of two images each
CUT = {
    "05_capt": {
        "pgd": "pgd-1", "autoattack": "autoattack-1", "eps_grid": [8.0], "eps_255": 4.0, "shots": 1, "seeds": [1], "fewer": [],
        "train": [[f"coop/{PETS}", 0]], "tests": [[f"coop/{PETS}", 3]], "halves": [], "source": f"coop/{PETS}",
        "across": [[f"coop/{LAND}", 3]],
    },
    "06_cba_fapt": {
        "pgd": "pgd-1", "pgd_paper": "pgd-1-paper", "autoattack": "apgd-ce-1", "eps_grid": [8.0], "shots": 1, "seeds": [1],
        "fewer": [], "train": [[f"coop/{PETS}", 0]], "tests": [[f"coop/{PETS}", 3]], "across": [[f"coop/{LAND}", 3]],
        "scenes": ["scenes/pair", 3],
    },
    "07_a_tpt": {
        "pgd": "pgd-1", "oblivious": ["pgd-1", "pgd-2"], "transfer": ["cw-1"], "square": "square-1", "eps_grid": [8.0], "views": 4,
        "tests": [[f"coop/{PETS}", 2], [f"coop/{LAND}", 2]], "word": f"coop/{PETS}", "scenes": ["scenes/pair", 3], "checked": 2,
        "adaptive": {"n": 2, "steps": 1, "longer": [], "views": 2, "draws": 1},
        "resnet": {"model": "openai-rn50", "n": 2, "eps_255": 1.0},
    },
}  # fmt: skip


def write_weights(name: str, path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in random_clip(name).model.state_dict().items()}, path)
    return path


def run_page(chapter: str, asked: dict) -> dict:
    """The chapter's code cells in one namespace, as a kernel would run them, with the parameters asked for."""
    page = {}
    for cell in jupytext.read(NOTEBOOKS / f"{chapter}.py").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, chapter, "exec"), page)
            if "parameters" in cell.metadata.get("tags", []):
                page |= asked
    return page


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CUT)
def test_the_papers_models_run_from_a_local_file(chapter, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setenv("ROBUSTVLM_OUT", str(tmp_path / "out"))
    small_sets.coop_pets(tmp_path)
    small_sets.coop_eurosat(tmp_path)
    small_sets.shrink(monkeypatch, f"coop/{PETS}")
    small_sets.shrink(monkeypatch, f"coop/{LAND}", ["AnnualCrop", "River", "SeaLake"])
    whole = runtime.profile(chapter, "paper")
    assert set(CUT[chapter]) <= set(vars(whole))
    monkeypatch.setattr(runtime, "profile", lambda *_: SimpleNamespace(**vars(whole) | CUT[chapter]))
    monkeypatch.setattr(ladder, "load_clip", lambda name, device: random_clip("RN50-quickgelu").to(device))  # of a name, not a file
    weights = write_weights(whole.model, tmp_path / "weights.safetensors")
    page = run_page(chapter, {"profile": "paper", "data_root": str(tmp_path), "pretrained": str(weights), "steps": 2})
    card = page["run"].card.as_dict()
    assert card["profile"] == "paper" and card["provenance"]["weights_sha256"] == runtime.sha256(weights)
    methods = {row["method"] for row in card["rows"]}
    assert set(whole.methods) <= methods and (tmp_path / "out/card.json").is_file()
    assert page["run"].load_clip().image_size == 224
