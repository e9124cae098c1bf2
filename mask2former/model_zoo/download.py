"""Downloads that go on where they were cut, and get their name when their hash is checked."""

import hashlib
import http.client
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..errors import UserError

__all__ = ["TIMEOUT", "TRIES", "download"]

TIMEOUT = 15.0  # seconds
TRIES = 4
PAUSE = 1.0  # seconds before the second try, and twice as many before each further one
CHUNK = 1 << 16  # bytes
TOO_MANY_REQUESTS = 429
NOTHING_BEYOND = 416  # the file has no bytes from there on

logger = logging.getLogger(__name__)


class _ConnectionFailed(Exception):
    """It could not be made, or was cut: another try may help."""


def download(url: str, path: Path, md5_prefix: str, *, timeout: float = TIMEOUT, tries: int = TRIES) -> None:
    """Download a file to ``path``, which is there when it is whole and checked, unless it is there already.

    What came before a cut connection or Ctrl-C stays in ``<path>.part``, and the next try or the next call asks for
    the rest. Processes that want the same file wait for the first of them.

    Args:
        url: http or https; proxies are those of the environment.
        md5_prefix: the first digits, hexadecimal, of the file's MD5 hash.
        timeout: seconds to wait for an answer, and for each next bytes.
        tries: how many tries in a row may bring nothing new.

    Raises:
        UserError: if it can't be downloaded or written, or its hash is another; then it is removed.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"expected an address that starts with http:// or https://, got {url}")
    part = path.with_name(f"{path.name}.part")
    try:
        with file_lock(str(path)):
            if path.is_file():
                return
            logger.info("downloading %s to %s", url, path)
            _download_checked(url, part, md5_prefix, timeout, tries)
            part.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error}): set FVCORE_CACHE to a folder with space") from error


def _download_checked(url: str, part: Path, md5_prefix: str, timeout: float, tries: int) -> None:
    continued = _size(part) > 0
    _download_rest(url, part, timeout, tries)
    found = _md5(part)
    if found.startswith(md5_prefix):
        return
    part.unlink()
    if continued:
        logger.warning("%s does not fit to its beginning, which came earlier: downloading all of it again", url)
        return _download_checked(url, part, md5_prefix, timeout, tries)
    raise UserError(
        f"expected an MD5 hash that starts with {md5_prefix} of what {url} gives, got {found}: it is another file, "
        "or was damaged on its way, and was removed. Try again, or download it by hand"
    )


def _download_rest(url: str, part: Path, timeout: float, tries: int) -> None:
    """Ask for what is missing until all is there."""
    most, in_vain = _size(part), 0
    while True:
        try:
            return _receive(url, part, timeout)
        except _ConnectionFailed as error:
            in_vain = 0 if _size(part) > most else in_vain + 1
            most = max(most, _size(part))
            if in_vain >= tries:
                kept = f"; {most:,} bytes are kept, the next call goes on from there" if most else ""
                raise UserError(f"{url} can't be downloaded: {error}{kept}") from error
            logger.warning("%s: %s; trying again", url, error)
            time.sleep(PAUSE * 2 ** max(in_vain - 1, 0))


def _receive(url: str, part: Path, timeout: float) -> None:
    """Append what is missing to ``part``; all, if the server doesn't send parts of files."""
    beginning = _size(part)
    try:
        response = _open(url, beginning, timeout)
    except HTTPError as error:
        with error:
            if error.code == NOTHING_BEYOND and beginning:
                return
            if error.code == TOO_MANY_REQUESTS or error.code >= 500:
                raise _ConnectionFailed(f"the server answers {error.code} {error.reason}") from error
            raise UserError(f"{url} can't be downloaded: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionFailed(_reason(error)) from error
    with response:
        beginning, total = _extent(response, beginning)
        progress = tqdm(
            total=total,
            initial=beginning,
            desc=part.stem,
            unit="B",
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file gets few lines
        )
        with progress, open(part, "ab" if beginning else "wb") as file:
            for chunk in _chunks(response):
                file.write(chunk)
                progress.update(len(chunk))
    if total is not None and _size(part) < total:
        raise _ConnectionFailed(f"the connection was cut after {_size(part):,} of {total:,} bytes")


def _open(url: str, beginning: int, timeout: float) -> http.client.HTTPResponse:
    """Ask for a file's bytes from ``beginning`` on, over http and https alone wherever the server sends us."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    headers = {"User-Agent": "mask2former"}  # some servers refuse urllib's own
    if beginning:
        headers["Range"] = f"bytes={beginning}-"
    return opener.open(request.Request(url, headers=headers), timeout=timeout)


def _extent(response: http.client.HTTPResponse, beginning: int) -> tuple[int, int | None]:
    """Where the bytes that will come belong in the file, and the file's size, if the server says it."""
    length = response.headers.get("Content-Length")
    if response.status != http.client.PARTIAL_CONTENT:
        return 0, int(length) if length else None
    extent = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if extent is None or int(extent[1]) not in (0, beginning):
        raise _ConnectionFailed("the server sends another part of the file than asked for")
    return int(extent[1]), None if extent[2] == "*" else int(extent[2])


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _ConnectionFailed(f"the connection was cut ({_reason(error)})") from error
        if not chunk:
            return
        yield chunk


def _reason(error: Exception) -> str:
    """What happened, in words: urllib wraps it."""
    cause = getattr(error, "reason", error)
    return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).lower()


def _size(path: Path) -> int:
    return os.path.getsize(path) if path.is_file() else 0


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
