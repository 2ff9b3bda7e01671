"""Signals that ask a program to stop: Ctrl-C, a polite kill, a terminal that closes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def catching(handle: Callable[[int], None], numbers: Sequence[int] = STOP_SIGNALS) -> Iterator[None]:
    """Call `handle` with the number of every signal that comes; afterwards the handlers from before are back.

    A closed terminal asks for the same as a polite kill: SIGHUP counts as SIGTERM, and nohup's wish to ignore it holds.
    Only the main thread can catch signals; in others this does nothing.
    """

    def call(number: int, frame: FrameType | None) -> None:
        handle(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, call)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int) -> None:
    """End the program as Ctrl-C does, wherever it is."""
    raise KeyboardInterrupt


def ignore_signals() -> None:
    """Leave the decision to the parent, which a signal to the whole group reaches too."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """While it is entered, the first signal is only noted; a second one meets the handlers from before."""

    def __init__(self) -> None:
        self.name = ""
        """Of the signal that came."""
        self._handlers = ExitStack()

    @property
    def asked(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> StopRequest:
        self._handlers.enter_context(catching(self.take))
        return self

    def __exit__(self, *error: object) -> None:
        self._handlers.close()

    def take(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self._handlers.close()
