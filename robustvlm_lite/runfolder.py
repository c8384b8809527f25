"""The folder of one run: named by its settings, locked while it runs, and whole or empty at the end."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .runtime import UserError

LOCK, CARD = ".lock", "card.json"


@contextmanager
def run_folder(parent: Path, label: str, settings: dict, *, resume: bool) -> Iterator[Path]:
    """The folder of one run, locked; emptied first unless it is resumed.

    An error inside leaves no new card, and after a UserError nothing at all but finished cells: there is nothing to
    read. A card that was there before a resumed run stays, readable or not.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(parent) / f"{label}-{digest}"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from None
    with lock:
        _lock(lock, folder)
        if not resume:
            _empty(folder, keep=())
        fresh = not (folder / CARD).exists()
        try:
            yield folder
        except BaseException as error:
            if fresh:
                (folder / CARD).unlink(missing_ok=True)
            if fresh and isinstance(error, UserError):
                _empty(folder, keep=("cells",))
                _remove_empty([folder / "cells", *made], folder)
            raise


def finished(card: Path) -> bool:
    """Is there a card already? Says so, and whether other code made it."""
    if not card.exists():
        return False
    from .cards import is_stale, load_card

    stale = ", by other code than this: run without --resume to compute it again" if is_stale(load_card(card)) else ""
    print(f"This run had finished before{stale or '; nothing is computed again'}.")
    return True


def _lock(lock, folder: Path) -> None:
    """Lock an open file or raise UserError. The system drops the lock when its holder dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once are the reader's own care
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        pid = lock.read().strip()
        raise UserError(f"{folder} is in use by process {pid}; wait for it or choose another --out") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _empty(folder: Path, keep: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if path.name not in (LOCK, *keep):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove_empty(paths: list[Path], folder: Path) -> None:
    """Remove those of `paths` that are empty folders, innermost first; the lock goes with its folder."""
    for path in paths:
        if path == folder and [child.name for child in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
