"""The joiner both passes share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Joiner(nn.Module):
    """logits = E tanh(encoder + predictor) + bias, after each encoder's output went through one shared projection."""

    def __init__(self, d_model: int, joiner_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_proj = nn.Linear(d_model, joiner_dim)
        self.output = nn.Linear(joiner_dim, vocab_size)
        nn.init.normal_(self.output.weight, std=joiner_dim**-0.5)
        nn.init.zeros_(self.output.bias)

    @property
    def output_weight(self) -> Tensor:
        """(V, D)"""
        return self.output.weight

    @property
    def output_bias(self) -> Tensor:
        """(V,)"""
        return self.output.bias

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, D), once per frame instead of once per lattice cell."""
        return self.encoder_proj(encoder_out)

    def forward(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """Combine what was heard with what was said.

        Args:
          encoder_out: (..., D) projected frames.
          predictor_out: (..., D) predictor vectors; both broadcast.
        Returns:
          (..., V) float32 logits, not normalised.
        """
        return self.output(torch.tanh(encoder_out + predictor_out)).float()
