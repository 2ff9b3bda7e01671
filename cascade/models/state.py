"""Streaming states are nested NamedTuples of tensors with the streams on the first axis: no module hides any."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


class StateTensor(NamedTuple):
    """One tensor of a state."""

    name: str
    """Content: key, value, convolution, processed_lens, ..."""
    shape: tuple[int, ...]
    """Behind the streams' axis."""
    layer: int = 0
    """Index of its layer, where layers have their own."""


def map_state(function: Callable[..., Tensor], *states: State) -> State:
    """Apply `function` to the tensors that stand at the same place in every state."""
    first: Any = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    parts = (map_state(function, *items) for items in zip(*states, strict=True))
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def state_tensors(state: Any) -> list[Tensor]:
    """The tensors in order, as ONNX inputs list them."""
    return [state] if isinstance(state, Tensor) else [tensor for part in state for tensor in state_tensors(part)]


def fill_state(like: State, tensors: Iterable[Tensor]) -> State:
    """The inverse of `state_tensors`: a state of the same kind as `like` with these tensors in order."""
    values = iter(tensors)
    return map_state(lambda _: next(values), like)


def slide(cache: Tensor, frames: Tensor, lens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Append a chunk to a cache of the S last frames.

    Args:
      cache: (N, S, ...) the last frames, oldest first.
      frames: (N, C, ...) new frames.
      lens: (N,) how many of them are valid; None = all C.
    Returns:
      (N, S + C, ...) both, and the new (N, S, ...) cache, which ends with each stream's last valid frame: a stream
      with length 0 keeps its cache.
    """
    size = cache.shape[1]
    both = torch.cat((cache, frames), dim=1)
    if lens is None:
        return both, both.narrow(1, frames.shape[1], size)
    index = lens.unsqueeze(1) + torch.arange(size, device=lens.device)  # (N, S)
    index = index.reshape(index.shape + (1,) * (both.ndim - 2)).expand(-1, -1, *both.shape[2:])
    return both, both.gather(1, index)
