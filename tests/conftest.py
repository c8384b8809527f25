"""What every test shares: no network, threads that do not fight, a CLIP of random weights, where image packs lie."""

import json
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub client
if "PYTEST_XDIST_WORKER" in os.environ:  # kernels and the book's build inherit it: two of them share two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests are small: a second thread costs more than it brings, and sums come out the same on every machine."""
    if "torch" in sys.modules:  # a session of book tests alone never imports it
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def few() -> dict[str, int]:
    """Parameters of a chapter as a reader in a hurry would set them: what every page runs with in a test."""
    return {"n": 8, "steps": 2, "views": 4}


@pytest.fixture(scope="session")
def random_clip():
    """The nano shapes with random weights. Shared: copy it before changing it."""
    from robustvlm_lite.clip import random_clip

    return random_clip("nano", seed=0)


@pytest.fixture(scope="session")
def register(tmp_path_factory):
    """register(name, ...) makes a tiny architecture known to open_clip, through a file as a reader would write one."""
    import open_clip

    folder = tmp_path_factory.mktemp("architectures")

    def add(name, *, quick_gelu=False, image_size=32, context_length=16, text_layers=2, **vision) -> str:
        config = {
            "embed_dim": 16,
            "quick_gelu": quick_gelu,
            "vision_cfg": {"image_size": image_size, "patch_size": 8, "layers": 2, "width": 32, "head_width": 8},
            "text_cfg": {"context_length": context_length, "vocab_size": 49408, "width": 16, "heads": 2},
        }
        config["text_cfg"]["layers"] = text_layers
        config["vision_cfg"] |= vision
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        return name

    return add


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the image packs: ROBUSTVLM_DATA_ROOT, or data/ in the checkout, which git ignores."""
    path = Path(os.environ.get("ROBUSTVLM_DATA_ROOT") or ROOT / "data")
    if not (path / "cifar10" / "classes.json").is_file():
        pytest.skip(f"no image packs at {path}: set ROBUSTVLM_DATA_ROOT to the folder that holds cifar10/, pacs/, …")
    return path
