"""What runs the networks of streams: the protocol of engines. Arrays are numpy's, whatever the engine computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cascade.models.encoder_rows import EncoderRows
from cascade.search.rows import Networks


class Engine(Networks, Protocol):
    """The networks of a model; predictor and joiner, which searches run, are on the CPU.

    Several batches may share an engine: the states are the rows', which belong to one batch.
    """

    num_mel_bins: int
    whole_chunks: bool
    """Every chunk must be full: zeros behind a stream's audio fill the last one."""

    def causal_rows(self, left: int) -> EncoderRows:
        """The causal encoder with a left context in 40 ms frames: (N, 4 C, F) features, not normalised -> (N, C, D)."""

    def block_rows(self, left: int) -> EncoderRows:
        """The non-causal encoder over look-ahead blocks of causal output, (N, B, D) -> as much."""

    def full(self, causal_out: np.ndarray, lens: np.ndarray) -> np.ndarray:
        """The non-causal encoder over whole segments of causal output, (N, T, D) of (N,) lengths -> as much."""

    def project(self, encoder_out: np.ndarray) -> np.ndarray:
        """Encoder output (N, T, D) as searches take it."""


def pad(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """N parts (t, C) -> (N, T, C) with zeros behind the shorter ones, and their (N,) lengths."""
    lens = np.array([len(part) for part in parts], np.int64)
    if (lens == lens[0]).all():
        return np.stack(parts), lens
    padded = np.zeros((len(parts), lens.max(), parts[0].shape[1]), parts[0].dtype)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded, lens
