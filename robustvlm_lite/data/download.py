"""A file from an address: resumed where it broke off, checked for size and checksum, whole or not there at all."""

import hashlib
import http.client
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ..runtime import UserError

TIMEOUT_S = 30  # without a byte: the server stalls
TRIES = 4  # in a row without a new byte
WAIT_S = 2.0  # before the second try, doubled before each further one
BLOCK = 1 << 18
BROKEN = (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)


def fetch(url: str, path: Path, md5: str = "") -> None:
    """Download `url` to `path`; what came before an interruption stays in `path`.part and is gone on from.

    Raises UserError for an address that answers with an error or a web page, for a server that cannot be reached or
    breaks off too often, for a full disk, and for a checksum that differs (what came is then removed).
    """
    part = path.with_name(path.name + ".part")
    tries, whole = 0, False
    while not whole:
        before = _size(part)
        try:
            whole = _stream(url, part, resumable=bool(md5))
            reason = f"it broke off after {_size(part)} bytes"
        except urllib.error.HTTPError as error:  # an overloaded server; `_answered` has sorted out the others
            reason = f"HTTP {error.code} {error.reason}"
        except urllib.error.URLError as error:
            why = getattr(error.reason, "strerror", None) or error.reason
            raise UserError(f"cannot reach {url}: {why}; check the network and run the same again") from None
        except BROKEN as error:
            reason = str(error) or type(error).__name__
        except OSError as error:
            raise UserError(f"cannot write {part}: {error.strerror}; free some space and run the same again") from None
        tries = 1 if _size(part) > before else tries + 1
        if not whole and tries >= TRIES:
            raise UserError(f"cannot fetch {url}: {reason}; run the same again later, which goes on from there")
        if not whole:
            time.sleep(WAIT_S * 2 ** (tries - 1))
    if md5 and (got := _md5(part)) != md5:
        _forget(part)
        raise UserError(f"expected MD5 {md5} of {url}, got {got}; removed it: fetch again, or the address has changed")
    part.replace(path)
    _forget(part)


def _stream(url: str, part: Path, resumable: bool) -> bool:
    """Append what the server still has to `part`; True once it is whole.

    A half file is gone on from only if the server's ETag says that it is the same file, or a checksum will tell.
    """
    have, tag = _size(part), _tag(part).read_text() if _tag(part).is_file() else ""
    if have and not (tag or resumable):
        have = 0
    headers = {"User-Agent": "robustvlm_lite", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        return _answered(error, url, part, have)
    with response:
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"expected a file at {url}, got a web page; it has moved or wants a log-in: look there")
        if response.status != 206:  # the whole file comes, from the start
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            _forget(part)
            raise http.client.HTTPException("the server answered with another part of the file")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        tag = response.headers.get("ETag") or ""
        part.parent.mkdir(parents=True, exist_ok=True)
        _tag(part).write_text("" if tag.startswith("W/") else tag)  # a weak tag does not promise the same bytes
        with (
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
            open(part, "ab" if have else "wb") as file,
        ):
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    return total is None or _size(part) == total


def _answered(error: urllib.error.HTTPError, url: str, part: Path, have: int) -> bool:
    """What an error answer means: the file is whole already (True), try again (raise it), or give up (UserError)."""
    if error.code == 416 and have:  # nothing lies behind what we have
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return True
        _forget(part)
        raise error
    if error.code in (408, 429) or error.code >= 500:
        raise error
    raise UserError(f"expected a file at {url}, got HTTP {error.code} {error.reason}; it has moved or wants a log-in")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _tag(part: Path) -> Path:
    """Where the ETag of a half file is kept."""
    return part.with_name(part.name + ".etag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
