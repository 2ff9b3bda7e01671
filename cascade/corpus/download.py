"""Fetch an archive once, resuming after an interruption, check it and unpack it safely; nothing large is ever deleted.

What turns out to be damaged is renamed to NAME.damaged, where the next one takes its place.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import lzma
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

from cascade.log import progress

_BLOCK_BYTES = 1 << 20
_ATTEMPTS = 3
_TIMEOUT_SECONDS = 30

log = logging.getLogger(__name__)


def download_archive(url: str, download_dir: str | Path, name: str, instead: str, md5: str | None = None) -> Path:
    """Download a tar archive and unpack it to `download_dir`/`name`, unless that folder is there already.

    Args:
      name: the folder that the archive's contents become (a single top folder inside the archive is left out).
      instead: what the user can do without a connection, for the error ("--corpus-dir DIR").
      md5: the archive's MD5 sum in hexadecimal; None: it is checked by its size and by unpacking only.
    Returns:
      The folder.
    Raises:
      OSError: no connection, or no space.
      ValueError: another sum, not a tar archive, or one with unsafe members.
    """
    download_dir = Path(download_dir)
    folder = download_dir / name
    if folder.is_dir():
        return folder
    archive = download_dir / f"{name}.tar"
    if not archive.is_file():
        try:
            download(url, archive, md5)
        except OSError as error:
            raise OSError(f"could not download {url} ({error}): connect and run again, or use {instead}") from error
    unpack(archive, folder)
    return folder


def download(url: str, path: str | Path, md5: str | None = None) -> None:
    """Fetch `url` to `path`, which is there only when it is whole and has the sum `md5`, if one is given.

    What an earlier call left in PATH.part is kept and continued. A part that is longer than the file, or a file with
    another sum, becomes PATH.part.damaged or PATH.damaged.

    Raises:
      OSError: no connection after three attempts, or a short answer.
      ValueError: another sum.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s", url)
    for attempt in range(_ATTEMPTS):
        try:
            _fetch(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            is_final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if is_final or attempt == _ATTEMPTS - 1:
                raise error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}") from error
        time.sleep(2**attempt)
    if md5 is None:
        log.info("%s: no published sum is known, it is checked by its size and by unpacking only", path)
    else:
        _check_sum(part, path, md5)
    part.replace(path)


def _check_sum(part: Path, path: Path, md5: str) -> None:
    log.info("checking the MD5 sum of %s", path)
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != md5:
        kept = set_aside(part, path)
        raise ValueError(
            f"{path} was downloaded with the MD5 sum {digest} instead of {md5}: it is kept as {kept.name}, run again "
            "to fetch it anew"
        )


def set_aside(file: Path, path: Path) -> Path:
    """Rename a damaged file to PATH.damaged; returns that path."""
    return file.replace(path.with_name(path.name + ".damaged"))


def _fetch(url: str, part: Path) -> None:
    """Bring `part` to the whole file, from where it ends.

    Raises:
      OSError, HTTPException: it is not whole; what came is in it.
    """
    have = part.stat().st_size if part.is_file() else 0
    try:
        answer = _ask(url, have)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()  # the server has nothing behind the part
        size = _total(error.headers.get("Content-Range"))
        if size is None:
            with _ask(url, 0) as whole:
                size = _length(whole)
        if size == have:
            return
        log.warning("%s is no part of %s: kept as %s", part, url, set_aside(part, part).name)
        have, answer = 0, _ask(url, 0)
    with answer:
        _take(answer, part, have)


def _ask(url: str, first: int) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"Range": f"bytes={first}-"} if first else {})
    return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)


def _take(answer: http.client.HTTPResponse, part: Path, have: int) -> None:
    """Append to `part`, of `have` bytes, what an answer brings beyond them."""
    length = _length(answer)
    known = 0 if answer.status == 206 else have  # a server without ranges sends what is there once more
    total = None if length is None else length + have - known
    if total is not None and total < have:
        log.warning("%s is longer than what is to come: kept as %s", part, set_aside(part, part).name)
        have = known = 0
    elif total == have and known:
        return
    num_blocks = None if length is None else -(-length // _BLOCK_BYTES)
    received = 0
    with open(part, "ab") as file:
        blocks = iter(lambda: answer.read(_BLOCK_BYTES), b"")
        for block in progress(blocks, f"downloading {part.stem}", total=num_blocks):
            file.write(block[max(0, known - received) :])
            received += len(block)
    if length is not None and received != length:
        raise OSError(f"the connection ended after {received} of {length} bytes")
    if received < known:
        raise OSError(f"{received} bytes came, {part} has {known} already: if it is of another file, remove it")


def _length(answer: http.client.HTTPResponse) -> int | None:
    length = answer.headers.get("Content-Length")
    return None if length is None else int(length)


def _total(content_range: str | None) -> int | None:
    """The size of the file in `bytes */SIZE`; None where it is not said."""
    size = (content_range or "").rpartition("/")[2].strip()
    return int(size) if size.isdecimal() else None


def _plain_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Files and folders with their paths below the current folder, with this user as owner and usual modes.

    Raises:
      TarError: a link, a device, or a path that leaves the folder.
    """
    for member in tar:
        member.name = member.name.lstrip("/")
        if not (member.isfile() or member.isdir()) or ".." in Path(member.name).parts:
            raise tarfile.TarError(f"{member.name!r} is no plain file inside of the archive's folder")
        member.mode = 0o755 if member.isdir() else 0o644
        member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
        yield member


def unpack(archive: str | Path, folder: str | Path) -> None:
    """Unpack a tar archive (any compression) to `folder`, which is whole or absent afterwards.

    Members that point outside of the folder, devices and the like are refused (tarfile's filter "data").

    Raises:
      ValueError: not a whole tar archive, or an unsafe one; it becomes ARCHIVE.damaged, so that it is fetched again.
    """
    archive, folder = Path(archive), Path(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(temporary, filter="data")
            else:  # Python 3.11 before 3.11.4
                tar.extractall(temporary, _plain_members(tar))
        inside = list(temporary.iterdir())
        top = inside[0] if len(inside) == 1 and inside[0].is_dir() else temporary
        top.rename(folder)
        folder.chmod(0o755)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk is no fault of the archive
        kept = set_aside(archive, archive)
        raise ValueError(
            f"{archive} is not a whole, safe tar archive ({error}): it is kept as {kept.name}, run again to fetch it "
            "anew"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
