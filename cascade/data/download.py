"""Fetch an archive once, resuming after an interruption, and unpack it safely."""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cascade.log import progress

_BLOCK_BYTES = 1 << 20
_ATTEMPTS = 3
_TIMEOUT_SECONDS = 30

log = logging.getLogger(__name__)


def download_archive(url: str, download_dir: str | Path, name: str, instead: str) -> Path:
    """Download a tar archive and unpack it to `download_dir`/`name`, unless that folder is there already.

    Args:
      name: the folder that the archive's contents become (a single top folder inside the archive is left out).
      instead: what the user can do without a connection, for the error ("--corpus-dir DIR").
    Returns:
      The folder.
    Raises:
      OSError: no connection, or no space.
      ValueError: not a tar archive, or one with unsafe members.
    """
    download_dir = Path(download_dir)
    folder = download_dir / name
    if folder.is_dir():
        return folder
    archive = download_dir / f"{name}.tar"
    if not archive.is_file():
        try:
            download(url, archive)
        except OSError as error:
            raise OSError(f"could not download {url} ({error}): connect and run again, or use {instead}") from error
    unpack(archive, folder)
    return folder


def download(url: str, path: str | Path) -> None:
    """Fetch `url` to `path`; what an earlier call left in PATH.part is kept and continued where the server allows it.

    Raises:
      OSError: no connection after three attempts, or a short answer.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s", url)
    for attempt in range(_ATTEMPTS):
        try:
            _fetch(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part was whole already, or is of another file
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise
            if attempt == _ATTEMPTS - 1:
                raise
        except OSError:
            if attempt == _ATTEMPTS - 1:
                raise
        time.sleep(2**attempt)
    part.replace(path)


def _fetch(url: str, part: Path) -> None:
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
        if have and answer.status != 206:
            have = 0  # the server sends the whole file again
        length = answer.headers.get("Content-Length")
        num_blocks = None if length is None else -(-int(length) // _BLOCK_BYTES)
        received = 0
        with open(part, "ab" if have else "wb") as file:
            blocks = iter(lambda: answer.read(_BLOCK_BYTES), b"")
            for block in progress(blocks, f"downloading {part.stem}", total=num_blocks):
                file.write(block)
                received += len(block)
    if length is not None and received != int(length):
        raise OSError(f"the connection ended after {received} of {length} bytes")


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
      ValueError: not a whole tar archive, or an unsafe one; the archive is deleted so that it is fetched again.
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
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk is no fault of the archive
        archive.unlink(missing_ok=True)
        raise ValueError(f"{archive} is not a whole, safe tar archive ({error}): run again to fetch it anew") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
