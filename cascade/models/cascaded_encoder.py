"""The cascade (2010.14606, 2312.09842): a deep causal encoder, and a shallow non-causal one that reads its output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cascade.config.options import ModelConfig
from cascade.models.encoder import build_encoders
from cascade.models.subsampling import ConvSubsampling


class CausalState(NamedTuple):
    features: Tensor
    """(N, 3, F) the last normalised feature frames."""
    encoder: Any
    """The causal encoder's own."""


class CascadedEncoder(nn.Module):
    """log-mel fbank -> normalise -> subsample -> causal encoder -> non-causal encoder.

    Feature normalisation is part of the model (two buffers), so that no export needs statistics from outside.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: ModelConfig, num_mel_bins: int) -> None:
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(num_mel_bins))
        self.register_buffer("feature_scale", torch.ones(num_mel_bins))
        self.subsampling = ConvSubsampling(
            num_mel_bins, config.subsampling_channels, config.d_model, config.causal.dropout
        )
        self.causal, self.noncausal = build_encoders(config)

    def set_feature_stats(self, mean: Tensor, std: Tensor) -> None:
        """mean, std: (F,) over the training frames."""
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_(std.clamp(min=1e-3).reciprocal())

    def normalise(self, features: Tensor) -> Tensor:
        return (features - self.feature_mean) * self.feature_scale

    def forward_causal(
        self, features: Tensor, lens: Tensor, chunk: int | None, left: int | None
    ) -> tuple[Tensor, Tensor]:
        """The streaming pass over whole utterances.

        Args:
          features: (N, T, F) log-mel fbank, not normalised.
          lens: (N,) valid feature frames.
          chunk, left: C and L in encoder frames; None = all.
        Returns:
          (N, T // 4, C) and its (N,) lengths.
        """
        out_lens = lens // 4
        return self.causal(self.subsampling(self.normalise(features)), out_lens, chunk, left), out_lens

    def forward_noncausal(self, causal_out: Tensor, lens: Tensor, block: int | None, left: int | None) -> Tensor:
        """The look-ahead pass (block B in frames) or the full pass (None) over the causal output (N, T, C)."""
        return self.noncausal(causal_out, lens, block, left if block is not None else None)

    def initial_state(self, batch_size: int, left: int) -> CausalState:
        """New streams with a left context of `left` encoder frames."""
        return CausalState(self.subsampling.initial_state(batch_size), self.causal.initial_state(batch_size, left))

    def forward_chunk(
        self, features: Tensor, state: CausalState, lens: Tensor | None = None
    ) -> tuple[Tensor, CausalState]:
        """The streaming pass over one chunk of every stream.

        Args:
          features: (N, 4 C, F) not normalised; fewer frames only in a stream's last chunk.
          state: what `initial_state` or the last call returned.
          lens: (N,) valid feature frames; None = all.
        Returns:
          (N, C, d_model), valid for lens // 4 frames, and the new state.
        """
        x, past = self.subsampling.forward_chunk(self.normalise(features), state.features, lens)
        x, encoder = self.causal.forward_chunk(x, state.encoder, None if lens is None else lens // 4)
        return x, CausalState(past, encoder)

    def initial_block_state(self, batch_size: int, left: int) -> Any:
        """New streams of the look-ahead pass."""
        return self.noncausal.initial_state(batch_size, left)

    def forward_block(self, causal_out: Tensor, state: Any, lens: Tensor | None = None) -> tuple[Tensor, Any]:
        """The look-ahead pass over one block (N, B, C) of causal output that is already there."""
        return self.noncausal.forward_chunk(causal_out, state, lens)
