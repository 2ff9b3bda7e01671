"""One training at a time in an --exp-dir: a second one would move the folder away under the first."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: set[int] = set()


def _leave_to_the_parent() -> None:
    """A loader process that outlives the training for a moment must not keep its lock."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


@contextmanager
def only_training_in(exp_dir: Path) -> Iterator[None]:
    """Hold a lock on exp_dir, in a file beside it because the folder itself may be renamed.

    It ends with the process, however that ends; the file goes at a normal end. Where nothing can be written beside the
    folder, which then cannot be renamed either, the file is in it.

    Raises:
      OSError: another training has it, or no file can be written there.
    """
    exp_dir.parent.mkdir(parents=True, exist_ok=True)
    beside = os.access(exp_dir.parent, os.W_OK | os.X_OK) or not exp_dir.is_dir()
    path = (exp_dir.parent if beside else exp_dir) / f".{exp_dir.name}.lock"
    handle = _lock(path, exp_dir)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(handle)
        os.close(handle)


def _lock(path: Path, exp_dir: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            number = os.read(handle, 20).decode(errors="replace").strip()
            os.close(handle)
            who = f" (process {number})" if number else ""
            raise OSError(f"a training is running in {exp_dir}{who}: wait for it or end it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(handle)
                raise
            logging.warning("%s cannot be locked (%s): start no second training in it", exp_dir, error.strerror)
        try:
            is_current = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            is_current = False
        if is_current:
            break
        os.close(handle)  # the training before ended, and took its file away, in between
    _held.add(handle)
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    return handle
