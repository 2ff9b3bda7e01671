"""Encoders: the protocol, the known kinds, and the one that a config asks for.

A new encoder is a file beside this one and a line in ENCODERS; `model.causal.kind` or `model.noncausal.kind` chooses
it. Training, streams, exporter, planner and the start from a teacher know no more of it than what stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from cascade.config.options import ConfigError, EncoderConfig, ModelConfig
from cascade.models.conformer import ConformerEncoder
from cascade.models.state import StateTensor


class Encoder(Protocol):
    """An nn.Module from (N, T, d_model) frames to as many, under the mask rule of `masks`: chunk by chunk, or block by
    block, it gives what it gives for the whole utterance."""

    layers: nn.ModuleList
    """From input to output; a student starts from some of its teacher's. Nobody looks inside."""

    def __call__(self, x: Tensor, lens: Tensor, block: int | None, left: int | None) -> Tensor:
        """Whole utterances.

        Args:
          x: (N, T, d_model).
          lens: (N,) valid frames; what follows them must not matter.
          block: P, the causal chunk or look-ahead block, in frames; None = all.
          left: L, the frames that a block sees before its start; None = all.
        Returns:
          (N, T, d_model); what stands at padded frames means nothing.
        """

    def initial_state(self, batch_size: int, left: int) -> Any:
        """The state of `batch_size` new streams with a left context of `left` frames: zeros in nested NamedTuples."""

    def state_layout(self, left: int) -> list[StateTensor]:
        """The tensors of a state, in the order of `state_tensors`, which is that of the ONNX inputs.

        An encoder can be exported if it keeps what sherpa-onnx has a place for: in each layer at most a `key` and a
        `value` (H, L, d) and a `convolution` (C, S); for the stream at most `processed_lens`.
        """

    def forward_chunk(
        self, x: Tensor, state: Any, lens: Tensor | None = None, chunk: int | None = None
    ) -> tuple[Tensor, Any]:
        """One chunk (or look-ahead block) of every stream.

        Args:
          x: (N, P, d_model).
          state: what `initial_state` or the last call returned.
          lens: (N,) valid frames: P, fewer in a stream's last chunk, 0 for a stream that waits; None = P for all.
          chunk: C of a causal encoder where x holds several chunks; None = x is one.
        Returns:
          (N, P, d_model) and the new state; equal to a call on the whole utterance with the state's left context and
          block = chunk, or P.
        """


ENCODERS: dict[str, Callable[[int, EncoderConfig], Encoder]] = {"conformer": ConformerEncoder}
"""Encoders by `kind`, each built from d_model and its config."""


def check_encoders(config: ModelConfig) -> None:
    """Refuse a kind of encoder that does not exist.

    Raises:
      ConfigError: it names the kinds that exist.
    """
    for name in ("causal", "noncausal"):
        kind = getattr(config, name).kind
        if kind not in ENCODERS:
            raise ConfigError(f"model.{name}.kind must be one of {' | '.join(ENCODERS)}, got {kind!r}")


def build_encoders(config: ModelConfig) -> tuple[Encoder, Encoder]:
    """The causal and the non-causal encoder of a config, in this order, with random weights.

    Raises:
      ConfigError: a kind of encoder that does not exist.
    """
    check_encoders(config)
    causal, noncausal = (ENCODERS[part.kind](config.d_model, part) for part in (config.causal, config.noncausal))
    return causal, noncausal
