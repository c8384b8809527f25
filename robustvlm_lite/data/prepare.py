"""Fetch a registered data set and unpack it below a data root: whole, or not there at all."""

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ..runtime import UserError, sha256
from .download import fetch
from .registry import Dataset, find
from .sources import lacking, read_listing

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)


def prepare(name: str, root: str) -> Path:
    """Download data set `name` into ROOT/full/NAME and return that folder.

    Archives are fetched into a hidden folder beside it, which a second call goes on from, unpacked there, and moved to
    their place only when all of them are whole. A set that is there already is left as it is. Raises UserError for a set
    that no program may fetch, for what the download or an archive refuses, and for files that are in the way.
    """
    dataset = find(name)
    folder = dataset.folder(root)
    if not dataset.downloads:
        raise UserError(
            f"{dataset.title} cannot be fetched by a program; obtain it: {dataset.obtain}; put it into {folder}"
        )
    if _is_there(dataset, root):
        return folder
    work = folder.with_name(f".{dataset.name}.unfinished")
    try:
        _fetch_all(dataset, work / "files")
        unpacked = _unpack_all(dataset, work)
        _move(unpacked, folder)
        shutil.rmtree(work)
    except OSError as error:
        raise UserError(f"cannot write below {root}: {error.strerror or error}; choose another --root") from None
    return folder


def _is_there(dataset: Dataset, root: str) -> bool:
    folder = dataset.folder(root)
    if dataset.uses:  # which may want more than one file each, such as a list of CoOp's
        return not all(lacking(dataset, use, root) for use in dataset.uses.values())
    return folder.is_dir() and any(folder.iterdir())


def _unpack_all(dataset: Dataset, work: Path) -> Path:
    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a call that was killed
    for download in dataset.downloads:
        target = unpacked / download.get("into", "")
        unpack(work / "files" / _file_name(download), target)
        for inner in download.get("inner", ()):
            unpack(target / inner, target)
            (target / inner).unlink()
    return unpacked


def _move(unpacked: Path, folder: Path) -> None:
    """Move what was unpacked into `folder`, which may hold other files already, such as a list of CoOp's."""
    if not folder.is_dir():
        unpacked.replace(folder)
        return
    if clash := [path.name for path in unpacked.iterdir() if (folder / path.name).exists()]:
        raise UserError(f"expected no {clash[0]} in {folder}, found one; move it away and run the same again")
    for path in list(unpacked.iterdir()):
        path.replace(folder / path.name)


def _file_name(download: dict) -> str:
    return download["url"].rpartition("/")[2]


def _fetch_all(dataset: Dataset, folder: Path) -> None:
    for download in dataset.downloads:
        path = folder / _file_name(download)
        if path.is_file():  # whole: its checksum was compared before it got this name
            continue
        fetch(download["url"], path, download.get("md5", ""))
        if "md5" not in download:
            print(f"{path.name}: no checksum is published; SHA-256 of what came: {sha256(path)}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar into `folder`; a file of another kind is moved there.

    Raises UserError for an archive that is damaged, or that holds a path or a link that leads out of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not archive.name.endswith(ARCHIVES):
        archive.replace(folder / archive.name)
        return
    if not hasattr(tarfile, "data_filter"):
        raise UserError("expected Python 3.11.4 or later, which unpacks archives safely; make the environment with it")
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as stored:
                for member in stored.infolist():
                    _check_member(member, archive)
                stored.extractall(folder)
        else:
            with tarfile.open(archive) as stored:
                stored.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"expected an archive of plain files, {archive.name} holds an unsafe one: {error}") from None
    except DAMAGED as error:
        archive.unlink()
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise UserError(
            f"expected a whole archive, {archive.name} is damaged ({reason}); removed it: run again"
        ) from None


def _check_member(member: zipfile.ZipInfo, archive: Path) -> None:
    """zipfile would silently drop the leading / or .. of a path: whoever wrote such an archive is not to be trusted."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    linked = stat.S_ISLNK(member.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or linked:
        raise UserError(f"expected an archive of plain files, {archive.name} holds an unsafe one: {member.filename!r}")


def report(dataset: Dataset, root: str) -> tuple[list[str], bool]:
    """One line a use: the images of each split as they are listed now, or what is still wanting; and whether one is whole."""
    lines, whole = [], not dataset.uses
    for group, use in dataset.uses.items():
        try:
            counts = {split: len(read_listing(dataset, use, split, root).labels) for split in use.splits}
            lines.append(f"{group}/{dataset.name}: " + ", ".join(f"{n} {split}" for split, n in counts.items()))
            whole = True
        except UserError as error:
            lines.append(f"{group}/{dataset.name}: {error}")
    return lines, whole
