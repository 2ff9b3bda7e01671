"""The state of one encoder for many streams, a row each, in the arrays or tensors of whichever library runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

State = Sequence[Any]
"""Arrays or tensors with the streams on the first axis."""


class EncoderRows:
    """Streams join, wait and leave by their number.

    Args:
      initial: gives the state of n new streams.
      step: takes (N, T, C) frames, their (N,) lengths and the state of N streams; gives the output and the new state.
    """

    def __init__(
        self, initial: Callable[[int], State],
        step: Callable[[np.ndarray, np.ndarray, State], tuple[np.ndarray, State]],
    ) -> None:  # fmt: skip
        self._initial, self._step = initial, step
        self._streams: list[int] = []  # numbers, row by row
        self._state = initial(0)
        self._next = 0

    def join(self) -> int:
        """The number of a stream that has heard nothing."""
        self._keep(self._streams, 1)
        self._streams.append(self._next)
        self._next += 1
        return self._next - 1

    def leave(self, stream: int) -> None:
        """Forget a stream."""
        kept = [other for other in self._streams if other != stream]
        self._keep(kept, 0)
        self._streams = kept

    def advance(self, streams: Sequence[int], frames: np.ndarray, lens: np.ndarray) -> np.ndarray:
        """Let these streams hear (N, T, C) frames, (N,) of them valid; the others wait untouched. Gives the output."""
        rows = self._rows(streams)
        everyone = rows == list(range(len(self._streams)))
        state = self._state if everyone else [whole[rows] for whole in self._state]
        out, new = self._step(frames, lens, state)
        if everyone:
            self._state = new
        else:
            for whole, part in zip(self._state, new, strict=True):
                whole[rows] = part
        return out

    def _keep(self, streams: Sequence[int], num_new: int) -> None:
        rows = self._rows(streams)
        state = self._initial(len(rows) + num_new)
        for new, old in zip(state, self._state, strict=True):
            new[: len(rows)] = old[rows]
        self._state = state

    def _rows(self, streams: Sequence[int]) -> list[int]:
        return [self._streams.index(stream) for stream in streams]
