"""The front end: 10 ms feature frames to 40 ms encoder frames, looking left only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade.models.dropout import Dropout
from cascade.models.state import slide

PAST_FRAMES = 3
"""Feature frames the two kernel-3, stride-2 convolutions need from the past: output t sees 4t-3 .. 4t+3 of its input
with three frames in front, that is, nothing beyond the four frames it stands for."""


class ConvSubsampling(nn.Module):
    """Two stride-2 convolutions over time and frequency, then a linear layer to d_model and a LayerNorm, so that
    the encoder's input has unit size at any level of the features.

    The zero state of a new stream equals three frames of zeros in front, so T feature frames give floor(T / 4)
    encoder frames, whole or in chunks of a multiple of four frames.
    """

    def __init__(self, num_mel_bins: int, channels: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.num_mel_bins = num_mel_bins
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, stride=2, padding=(0, 1))
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=(0, 1))
        self.out = nn.Linear(channels * (((num_mel_bins + 1) // 2 + 1) // 2), d_model)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def initial_state(self, batch_size: int) -> Tensor:
        """(N, 3, F) zeros: normalised silence before the first frame."""
        return self.conv1.weight.new_zeros(batch_size, PAST_FRAMES, self.num_mel_bins)

    def forward(self, features: Tensor) -> Tensor:
        """(N, T, F) normalised features -> (N, T // 4, C)."""
        return self.forward_chunk(features, self.initial_state(features.shape[0]))[0]

    def forward_chunk(self, features: Tensor, past: Tensor, lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of one chunk behind the last three frames.

        Args:
          features: (N, T, F) normalised; T a multiple of 4 except in a stream's last chunk.
          past: (N, 3, F) the state.
          lens: (N,) valid frames of the chunk; None = all.
        Returns:
          (N, T // 4, C) and the new (N, 3, F) state.
        """
        x, past = slide(past, features, lens)
        if features.shape[1] < 4:
            return features.new_zeros(features.shape[0], 0, self.out.out_features), past
        x = torch.nn.functional.silu(self.conv1(x.unsqueeze(1)))  # (N, C, T', F')
        x = torch.nn.functional.silu(self.conv2(x))
        x = x.transpose(1, 2).flatten(2)  # (N, C, T'', F'') -> (N, T'', C * F'')
        x = self.norm(self.out(x)).to(features.dtype)  # what layers add up is float32 in bfloat16 training too
        return self.dropout(x), past
