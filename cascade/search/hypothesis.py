"""Hypotheses, which every search returns, and how they are ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cascade.models.state import join_streams

SearchState = TypeVar("SearchState")
TOKEN, FRAME, LOG_PROB = 0, 1, 2
"""Rows of a search's history tensor (..., 3, U): what was said, when, how surely."""


@dataclass(frozen=True)
class Hypothesis:
    """One token sequence a search found.

    `timestamps` are encoder frames (40 ms) since the state was made; `token_log_probs` are natural logs of each
    token's probability at its frame; `log_prob` is the log-probability of the whole sequence, blanks included.
    """

    tokens: tuple[int, ...]
    timestamps: tuple[int, ...]
    token_log_probs: tuple[float, ...]
    log_prob: float
    context_size: int = 1

    @property
    def score(self) -> float:
        """log_prob / (tokens + context_size): what ranks final hypotheses, as sherpa-onnx does.

        The context counts because sherpa-onnx stores it as blanks in front of the tokens. An LSTM predictor has no
        fixed context and counts as 1.
        """
        return self.log_prob / (len(self.tokens) + self.context_size)


def hypothesis_from_history(history: Tensor, num_tokens: int, log_prob: float, context_size: int) -> Hypothesis:
    """Read one row (3, U) of a history tensor; see TOKEN, FRAME, LOG_PROB."""
    tokens, frames, log_probs = history[:, :num_tokens].tolist()
    return Hypothesis(
        tokens=tuple(int(token) for token in tokens),
        timestamps=tuple(int(frame) for frame in frames),
        token_log_probs=tuple(log_probs),
        log_prob=log_prob,
        context_size=context_size,
    )


def predictor_context_size(model: torch.nn.Module) -> int:
    """Labels the predictor sees: its `context_size`; 1 for a recurrent predictor, which has none."""
    return int(getattr(model.predictor, "context_size", None) or 1)


def check_encoder_out(encoder_out: Tensor, encoder_out_lens: Tensor, batch_size: int) -> None:
    """Assert (N, T, D) frames and (N,) lengths that fit each other and a state of `batch_size` streams."""
    assert encoder_out.ndim == 3, encoder_out.shape
    assert encoder_out.shape[0] == batch_size, (encoder_out.shape, batch_size)
    assert encoder_out_lens.shape == (batch_size,), (encoder_out_lens.shape, batch_size)
    assert batch_size == 0 or int(encoder_out_lens.max()) <= encoder_out.shape[1], (encoder_out_lens, encoder_out.shape)


def tanh_of_sum(first: Tensor, second: Tensor) -> Tensor:
    """tanh(a + b) from a doubled `first` = 2 a and `second` = b, which broadcast.

    tanh(x) = 2 sigmoid(2 x) - 1 equals torch's tanh to a unit of float32; on CPUs torch's sigmoid is five times faster.
    """
    return torch.add(first, second, alpha=2.0).sigmoid_().mul_(2.0).sub_(1.0)


def grow_history(history: Tensor, num_tokens: int) -> Tensor:
    """Make room for `num_tokens` tokens: (..., 3, U) -> (..., 3, max(U, num_tokens)), zeros after the old ones."""
    missing = num_tokens - history.shape[-1]
    return torch.nn.functional.pad(history, (0, missing)) if missing > 0 else history


def join_search_states(*states: SearchState) -> SearchState:
    """One batch out of several states of one search, in their order; short histories are padded.

    Streams leave or change places by `cascade.models.state.select_streams`.
    """
    width = max(state.history.shape[-1] for state in states)
    return join_streams(*(state._replace(history=grow_history(state.history, width)) for state in states))
