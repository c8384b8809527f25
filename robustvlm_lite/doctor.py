"""What is installed, what is missing, and the mend: one line a check, and no check can crash.

Nothing here is imported before its own check asks for it, so that a broken torch is reported instead of raised.
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
NEEDED_GB = 2  # of free disk: a run's folder, the built book, caches
REINSTALL = f"{Path(sys.executable).parent / 'uv'} pip install --python {sys.executable} -r requirements.lock -e ."
BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # one engine under three names


class Problem(Exception):
    """What is wrong and the mend, in one line."""


def examine(data_root: str = "") -> int:
    """Print one line a check; 1 if something that the book needs is missing, else 0."""
    essential = [python, torch_pair, packages, device, weights, photographs, disk]
    optional = [browser, commit]
    if data_root:
        essential.append(lambda: packs(data_root))
    failed = 0
    for check in essential + optional:
        ok, text = outcome(check)
        failed += not ok and check in essential
        print("✓" if ok else "✗" if check in essential else "–", text)
    ok, lines = outcome(published_weights)
    for here, text in lines if ok else [(False, lines)]:
        print("✓" if here else "–", text)
    return 1 if failed else 0


def outcome(check: Callable) -> tuple[bool, Any]:
    """(True, what the check returns), or (False, a line): whatever a check raises becomes its line."""
    try:
        return True, check()
    except Problem as problem:
        return False, str(problem)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        return False, f"{getattr(check, '__name__', 'check')}: {type(error).__name__}: {reason}; reinstall: {REINSTALL}"


# ---- the checks


def python() -> str:
    """The interpreter's version against the package's own range."""
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = metadata.metadata("robustvlm_lite")["Requires-Python"]
    from packaging.specifiers import SpecifierSet

    if version not in SpecifierSet(wanted):
        raise Problem(f"Python {version}, expected {wanted}; make the environment with another Python")
    return f"Python {version}"


def torch_pair() -> str:
    """torch, and a torchvision that was built for it."""
    pair = " and ".join(f"{name} {_version(name) or 'absent'}" for name in ("torch", "torchvision"))
    try:
        importlib.import_module("torch")
        getattr(importlib.import_module("torchvision.ops"), "nms")  # noqa: B009 (only whether it is there)
    except Exception as error:  # ImportError, or RuntimeError "operator torchvision::nms does not exist"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "uninstall both, then " + REINSTALL
        raise Problem(f"{pair} do not fit together ({reason}); {mend}") from None
    return pair


def packages() -> str:
    """Every dependency that the package names, with its version inside the range."""
    from packaging.requirements import Requirement

    wrong, n = [], 0
    for text in metadata.requires("robustvlm_lite") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        n, have = n + 1, _version(requirement.name)
        if have is None or have not in requirement.specifier:
            wrong.append(f"{requirement.name} {have or 'absent'} (expected {requirement.specifier or 'any'})")
    if wrong:
        raise Problem(f"packages: {', '.join(wrong)}; {REINSTALL}")
    return f"{n} packages, each in its range"


def device() -> str:
    """Where torch will compute, and with how many threads."""
    import torch

    from .runtime import multiplies_bfloat16

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if torch.cuda.is_available():
        return f"device cuda ({torch.cuda.get_device_name(0)}), {threads}"
    slow = "" if multiplies_bfloat16("cpu") else ", no bfloat16 in hardware, attacks compute in float32"
    return f"device cpu, {threads}{slow}; no cuda device, which tiny and small do not need"


def weights() -> str:
    """Each bundled CLIP against the SHA-256 on its card. A config alone is an architecture that nobody has trained yet."""
    folder, names = PACKAGE / "assets" / "clip", []
    for config in sorted(p for p in folder.glob("*.json") if not p.name.endswith(".card.json")):
        card, file = config.with_suffix(".card.json"), config.with_suffix(".safetensors")
        if not (file.is_file() or card.is_file()):
            continue
        if not (file.is_file() and card.is_file()):
            missing = card.name if file.is_file() else file.name
            raise Problem(f"weights of {config.stem}: {missing} is missing in {folder}; check it out again")
        if _sha256(file) != json.loads(card.read_text(encoding="utf-8"))["weights_sha256"]:
            raise Problem(f"weights {file} differ from the checksum on their card; check the file out again")
        names.append(config.stem)
    if not names:
        raise Problem(f"no bundled CLIP in {folder}; check the repository out again")
    return f"bundled weights: {', '.join(names)}"


def published_weights() -> list[tuple[bool, str]]:
    """(is here, line) for every published weights that `load_clip` takes by name; the checksum is compared when one loads."""
    from .clip import registry

    lines = []
    for entry in registry.published().values():
        path, first = registry.on_machine(entry), "downloaded at the first use; without network, " if entry.hub else ""
        where = path or f"missing; {first}{registry.how_to_get(entry)}"
        lines.append((path is not None, f"weights {entry.name}: {where}"))
    return lines


def photographs() -> str:
    """The bundled photographs, against assets/SHA256SUMS where there is one."""
    folder, sums = PACKAGE / "assets" / "photos", PACKAGE / "assets" / "SHA256SUMS"
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise Problem(f"no bundled photographs in {folder}; check the repository out again")
    if sums.is_file():
        return f"bundled files: {_compare(sums)} checksums agree"
    return f"bundled photographs: {len(files)} files"


def packs(data_root: str) -> str:
    """The packs under the reader's data root, against its SHA256SUMS where there is one."""
    root = Path(data_root)
    if not root.is_dir():
        raise Problem(f"data root {root} is no folder; give the one that holds stl10/, cifar10/ …")
    found = sorted(p.parent.name for p in root.glob("*/classes.json"))
    found += sorted(f"full/{p.name}" for p in root.glob("full/[!.]*") if p.is_dir())
    if not found:
        raise Problem(f"data root {root} holds no pack (NAME/classes.json with Parquet beside it); check the path")
    sums = root / "SHA256SUMS"
    checked = f", {_compare(sums)} checksums agree" if sums.is_file() else ""
    return f"data root {root}: {', '.join(found)}{checked}"


def disk() -> str:
    """Free space where runs are written."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 1e9
    if free < NEEDED_GB:
        raise Problem(f"disk: {free:.1f} GB free in {here}, expected {NEEDED_GB}; free some or choose another --out")
    return f"disk: {free:.0f} GB free in {here}"


def browser() -> str:
    """Chromium, which only the book's own tests open."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        raise Problem("no chromium: the book's browser tests are skipped; apt-get install -y chromium")
    return f"browser for the book's tests: {path}"


def commit() -> str:
    """The commit that cards will name."""
    from .runtime import git_commit

    sha, dirty = git_commit()
    if not sha:
        raise Problem("no git commit: cards will not name the code's version; run from a clone")
    return f"commit {sha[:12]}" + (" with uncommitted changes, which cards will say" if dirty else "")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _sha256(path: Path) -> str:
    from .runtime import sha256

    return sha256(path)


def _compare(sums: Path) -> int:
    """How many files a `sha256sum` list names; Problem at the first that is absent or differs."""
    lines = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()]
    for expected, name in lines:
        file = sums.parent / name.lstrip("*")
        if not file.is_file():
            raise Problem(f"{file} is missing; check it out or fetch it again")
        if _sha256(file) != expected:
            raise Problem(f"{file} differs from its checksum in {sums.name}; check it out or fetch it again")
    return len(lines)
