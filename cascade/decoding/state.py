"""Operations on search states: NamedTuples of tensors, nested or not, whose first dimension is the stream.

Streams that join, leave or change places are an index_select or a concatenation of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def map_state(state: NamedTuple, function: Callable[[Tensor], Tensor]) -> NamedTuple:
    """Apply `function` to every tensor of a state."""
    values = (function(value) if isinstance(value, Tensor) else map_state(value, function) for value in state)
    return type(state)(*values)


def select_streams(state: NamedTuple, streams: Tensor) -> NamedTuple:
    """The state of the given streams (N',) int64, in that order."""
    return map_state(state, lambda tensor: tensor.index_select(0, streams))


def join_streams(states: list[NamedTuple]) -> NamedTuple:
    """One batch of several states, in their order; histories of unequal length are padded to the longest."""
    if hasattr(states[0], "history"):
        width = max(state.history.shape[-1] for state in states)
        states = [state._replace(history=grow_history(state.history, width)) for state in states]
    values = (
        torch.cat(fields) if isinstance(fields[0], Tensor) else join_streams(list(fields))
        for fields in zip(*states, strict=True)
    )
    return type(states[0])(*values)


def grow_history(history: Tensor, num_tokens: int) -> Tensor:
    """Make room for `num_tokens` tokens: (..., 3, U) -> (..., 3, max(U, num_tokens)), zeros after the old ones."""
    missing = num_tokens - history.shape[-1]
    return torch.nn.functional.pad(history, (0, missing)) if missing > 0 else history
