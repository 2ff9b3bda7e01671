"""Hypotheses, which every search returns, and how they are ranked."""

from __future__ import annotations

from dataclasses import dataclass


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
