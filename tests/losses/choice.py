"""The backend of the losses for the length of a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from cascade.losses import backends


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    before = backends._chosen
    backends.set_backend(name)
    try:
        yield
    finally:
        backends.set_backend(before)
