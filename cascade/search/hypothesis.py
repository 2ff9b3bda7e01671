"""Hypotheses, which every search returns, how they are ranked, and how probabilities become confidences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Hypothesis:
    """One token sequence of a search.

    `timestamps` are encoder frames (40 ms) since the search was started; `token_log_probs` are natural logs of each
    token's probability at its frame; `log_prob` is the log-probability of the whole sequence, blanks included. All
    three are the transducer's own; what scorers add to log_prob is `external_score`.
    """

    tokens: tuple[int, ...]
    timestamps: tuple[int, ...]
    token_log_probs: tuple[float, ...]
    log_prob: float
    context_size: int = 1
    external_score: float = 0.0

    @property
    def score(self) -> float:
        """(log_prob + external_score) / (tokens + context_size): what ranks final hypotheses, as sherpa-onnx does.

        The context counts because sherpa-onnx stores it as blanks in front of the tokens. An LSTM predictor has no
        fixed context and counts as 1.
        """
        return (self.log_prob + self.external_score) / (len(self.tokens) + self.context_size)


class Calibration(NamedTuple):
    """A monotone map of confidences, which `measure.calibration` fits; the default one changes nothing."""

    slope: float = 1.0
    offset: float = 0.0

    @staticmethod
    def logit(confidences: np.ndarray) -> np.ndarray:
        """log(c / (1 - c)), c kept away from 0 and 1."""
        kept = np.clip(confidences, 1e-6, 1 - 1e-6)
        return np.log(kept / (1 - kept))

    def __call__(self, confidences: np.ndarray) -> np.ndarray:
        if self == (1.0, 0.0):
            return confidences
        return 1 / (1 + np.exp(-(self.slope * self.logit(confidences) + self.offset)))


UNCALIBRATED = Calibration()
