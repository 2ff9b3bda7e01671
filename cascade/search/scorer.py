"""Scores from outside the transducer that enter a search before it chooses its best continuations.

With scorers whose blank weights sum to c, a label's log-probability gets the sum of their scores plus
c log(1 - P_blank), and the blank's is multiplied by 1 + c: a label and a blank stay comparable. `Rescoring` adds the
scores alone, to the hypotheses that a search has found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cascade.search.ngram import NgramModel
from cascade.text.tokens import UNKNOWN_ID


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


class Rescoring:
    """A scorer that stays outside of the search: it scores the whole token sequences of a segment that has ended."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def __call__(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """(rows,) scores of the sequences of token ids, their ends included."""
        scorer, lens = self._scorer, np.array(list(map(len, sequences)))
        state, totals = scorer.initial(len(sequences)), np.zeros(len(sequences))
        for place in range(max(lens, default=0)):
            rows = np.flatnonzero(lens > place)
            tokens = np.array([sequences[row][place] for row in rows])
            own = np.arange(len(rows))
            totals[rows] += scorer.score(state[rows])[own, tokens]
            state[rows] = scorer.advance(state[rows], own, tokens)
        return totals + scorer.final(state)


class NgramScorer:
    """An n-gram model times a weight: above 0 for shallow fusion, below 0 for LODR.

    LODR (low-order density ratio, 2203.16776) subtracts a bigram of the training transcripts, which stands in for the
    transducer's own language model.
    """

    def __init__(self, model: NgramModel, weight: float) -> None:
        self._model = model
        self.weight = self.blank_weight = weight

    def initial(self, n: int) -> np.ndarray:
        return np.full(n, self._model.start, np.int64)

    def score(self, state: np.ndarray) -> np.ndarray:
        return self._model.scores(state, self.weight)

    def advance(self, state: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self._model.advance(state[parents], tokens, UNKNOWN_ID)

    def final(self, state: np.ndarray) -> np.ndarray:
        return self._model.final(state) * np.float32(self.weight)
