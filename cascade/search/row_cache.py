"""Dense rows of scores by state, kept: most hypotheses are in a few states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CACHE_BYTES = 64_000_000


class RowCache:
    """Rows (width,) float32 that `compute` makes for states (rows,); when no more fit, all are forgotten."""

    def __init__(self, num_states: int, width: int, compute: Callable[[np.ndarray], np.ndarray]) -> None:
        self._compute = compute
        self._slots = np.full(num_states, -1, np.int32)
        self._rows = np.empty((max(CACHE_BYTES // 4 // width, 64), width), np.float32)
        self._num_rows = 0

    def forget(self) -> None:
        """Begin without rows."""
        self._slots[:], self._num_rows = -1, 0

    def __getitem__(self, states: np.ndarray) -> np.ndarray:
        """(rows,) states -> (rows, width)."""
        slots = self._slots[states]
        if (slots < 0).any():
            new = np.unique(states[slots < 0])
            values = self._compute(new)  # it may ask for other rows
            if self._num_rows + len(new) > len(self._rows):
                self.forget()
            if len(new) <= len(self._rows):
                rows = np.arange(self._num_rows, self._num_rows + len(new))
                self._rows[rows], self._slots[new] = values, rows
                self._num_rows += len(new)
            slots = self._slots[states]
            if (slots < 0).any():  # there is no room for all of them
                different, places = np.unique(states, return_inverse=True)
                return self._compute(different)[places]
        return self._rows[slots]
