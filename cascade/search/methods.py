"""How to decode: the pass, its contexts, the search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cascade.config.options import ENCODER_FRAME_MS, MODES, Config, ConfigError, Mode
from cascade.search.beam import ModifiedBeamSearch
from cascade.search.greedy import GreedySearch
from cascade.search.rows import Networks
from cascade.search.scorer import Scorer

STREAMING_MODES = (*MODES, "two_pass")
"""Modes of a stream; two_pass shows the streaming pass, then the look-ahead pass, and ends with the full one."""
METHODS = ("greedy_search", "modified_beam_search")
DEFAULT_CHUNK_MS = 320
DEFAULT_LOOK_AHEAD_MS = 640
DEFAULT_LEFT_CHUNKS = 16


@dataclass(frozen=True)
class DecodingOptions:
    """One way to decode.

    Raises:
      ConfigError: an unknown mode or method; a context that is not a positive multiple of 40 ms, a look-ahead that is
        not a multiple of the chunk, a beam below 1, a penalty that is not finite.
    """

    mode: Mode | Literal["two_pass"] = "full"
    """streaming | look_ahead | full; two_pass for streams only."""
    method: str = "greedy_search"
    """greedy_search | modified_beam_search."""
    beam: int = 4
    """Hypotheses of modified_beam_search."""
    chunk_ms: int = DEFAULT_CHUNK_MS
    """The causal chunk, in every mode."""
    look_ahead_ms: int = DEFAULT_LOOK_AHEAD_MS
    """The block of modes look_ahead and two_pass."""
    left_context_ms: int = DEFAULT_CHUNK_MS * DEFAULT_LEFT_CHUNKS
    """What a chunk or block sees before its start."""
    blank_penalty: float = 0.0
    """Subtracted from the blank's logit."""

    @classmethod
    def for_model(cls, config: Config, *, blank_penalty: float | None = None, **options: Any) -> DecodingOptions:
        """Options for a model: what is None or not given of its decoding section is as `config.decoding` has it."""
        own = config.decoding
        return cls(blank_penalty=own.blank_penalty if blank_penalty is None else blank_penalty, **options)

    def __post_init__(self) -> None:
        for option, value, choices in (("mode", self.mode, STREAMING_MODES), ("method", self.method, METHODS)):
            if value not in choices:
                raise ConfigError(f"--{option} must be one of {' | '.join(choices)}, got {value!r}")
        for name in ("chunk_ms", "look_ahead_ms", "left_context_ms"):
            value = getattr(self, name)
            if value <= 0 or value % ENCODER_FRAME_MS:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} must be a positive multiple of {ENCODER_FRAME_MS} ms, got {value}")
        if self.mode in ("look_ahead", "two_pass") and self.look_ahead_ms % self.chunk_ms:
            raise ConfigError(
                f"--look-ahead-ms must be a multiple of --chunk-ms ({self.chunk_ms}), got {self.look_ahead_ms}"
            )
        if self.beam < 1:
            raise ConfigError(f"--beam must be at least 1, got {self.beam}")
        if not math.isfinite(self.blank_penalty):
            raise ConfigError(f"--blank-penalty must be a finite number, got {self.blank_penalty}")


def default_left_context_ms(config: Config, chunk_ms: int) -> int:
    """The longest finite left context the model was trained with, for this chunk; 16 chunks if it knows only 'all'."""
    finite = [chunks for chunks in config.context.left_chunks if chunks > 0]
    return chunk_ms * max(finite, default=DEFAULT_LEFT_CHUNKS)


def build_search(
    networks: Networks, options: DecodingOptions, unk_id: int | None, scorers: Sequence[Scorer] = ()
) -> GreedySearch | ModifiedBeamSearch:
    """The search that `options.method` names."""
    if options.method == "greedy_search":
        return GreedySearch(networks, options.blank_penalty, unk_id, scorers)
    return ModifiedBeamSearch(networks, options.beam, options.blank_penalty, unk_id, scorers)
