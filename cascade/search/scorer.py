"""Scores from outside the transducer that enter a search before it chooses its best continuations.

With scorers whose blank weights sum to c, a label's log-probability gets the sum of their scores plus
c log(1 - P_blank), and the blank's is multiplied by 1 + c: a label and a blank stay comparable.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """A score for each continuation of each hypothesis; a state is an array with a row per hypothesis."""

    blank_weight: float
    """c of the module's text; 0 leaves blanks as they are."""

    def initial(self, n: int) -> np.ndarray:
        """The states of `n` hypotheses without tokens."""

    def score(self, state: np.ndarray) -> np.ndarray:
        """(rows, V) float32 added to the labels' log-probabilities; blank's column means nothing."""

    def advance(self, state: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The states of new hypotheses.

        Args:
          parents: (hypotheses,) rows of `state`.
          tokens: (hypotheses,) what each adds to its parent; blank and <unk> add nothing.
        """

    def final(self, state: np.ndarray) -> np.ndarray:
        """(rows,) float32 for hypotheses that end here."""
