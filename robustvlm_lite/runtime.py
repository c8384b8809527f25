"""What every room needs first: errors that teach, seeded randomness, evaluation mode, the device, profiles and the version stamp."""

import hashlib
import platform
import subprocess
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml

PACKAGE = Path(__file__).resolve().parent
PROFILES = ("tiny", "small", "paper")


class UserError(ValueError):
    """Bad input. Its text is one line: what was expected, what came, what to do."""


def near_miss(name: str, known) -> str:
    """`; did you mean 'x'?` for the closest of `known`, else the list of what is known."""
    from difflib import get_close_matches

    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def generator(*key) -> torch.Generator:
    """A CPU generator that depends on `key` alone, e.g. `generator(seed, "photos/caltech", "pgd", 17)`.

    Randomness keyed by image instead of drawn from one stream makes results independent of batch size and order.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def eval_mode(model: torch.nn.Module):
    """Every module in eval mode inside the block, each in its own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def resolve_device(name: str = "") -> torch.device:
    """Empty: cuda where there is one, else cpu. A device that is asked for and absent is an error, never a fallback."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"expected a torch device such as 'cpu' or 'cuda', got {name!r}; leave it empty to choose"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for but torch sees none; leave the device empty or use 'cpu'")
    return device


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether the hardware does so: a GPU since Ampere, a CPU with AMX or AVX-512 BF16. Not known counts as no."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # which an older torch lacks
    return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def asset(*parts: str) -> Path:
    """Path of a file that ships with the package."""
    return PACKAGE.joinpath("assets", *parts)


def sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def chapters() -> dict[str, dict]:
    """The chapters of the book with their profiles, as `assets/profiles.yml` states them."""
    return yaml.safe_load(asset("profiles.yml").read_text())


def profile(chapter: str, name: str) -> SimpleNamespace:
    """Models, datasets and sizes of one chapter under one profile (the only things that a profile chooses)."""
    known = chapters()
    if chapter not in known:
        raise UserError(f"unknown chapter {chapter!r}; {near_miss(chapter, known)}")
    if name not in known[chapter]["profiles"]:
        raise UserError(f"unknown profile {name!r}; {near_miss(name, known[chapter]['profiles'])}")
    return SimpleNamespace(**known[chapter]["profiles"][name])


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash of all parameters and buffers of a model with their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what can change a number."""
    names = ("robustvlm_lite", "torch", "torchvision", "open_clip_torch", "torchattacks", "transformers", "numpy", "pyarrow")
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in names}


def git_commit() -> tuple[str, bool]:
    """(commit, dirty) of the checkout that this package runs from; ("", False) for an installed copy."""

    def git(*args):
        return subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *args], capture_output=True, text=True, check=True
        ).stdout

    if not (PACKAGE.parent / ".git").exists():
        return "", False
    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout without a commit
        return "", False
