"""Files that are whole or absent, and lines of packed files."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffixes); rename it to `path` at the end, delete it on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: str | Path) -> Iterator[bytes]:
    """Yield the lines of a plain, .gz or .xz file.

    Raises:
      ValueError: truncated or damaged, with the number of the last good line.
    """
    number = 0
    try:
        with {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)(path, "rb") as file:
            for line in file:
                yield line
                number += 1
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"{path} is truncated or damaged after line {number} ({error}): make it again") from error


def check_writable(folder: Path) -> None:
    """Make the folder where results will go, before they are computed.

    Raises:
      OSError: it cannot be, or nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"nothing can be written to {folder}: name another folder")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Name the folder when its disk is full: the system's own error for a write has no path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not error.filename:
            raise OSError(
                f"{folder} cannot be written ({error.strerror}): free some space, then run the same command again"
            ) from error
        raise
