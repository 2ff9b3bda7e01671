"""Multi-head self-attention with rotary positions and a key cache that never ages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from cascade.models.state import slide


class Rotation(NamedTuple):
    """cos and sin, each (positions, head_dim / 2), of rotary positions 0, 1, ... (2104.09864)."""

    cos: Tensor
    sin: Tensor


def rotary_angles(num_positions: int, head_dim: int, like: Tensor) -> Rotation:
    """The rotation of a window in `like`'s type; all layers of an encoder share it.

    The frequencies are Python numbers and the rest is in one type, so that every ONNX runtime can trace it.
    """
    frequencies = [10000.0 ** (-index / head_dim) for index in range(0, head_dim, 2)]
    frequency = torch.tensor(frequencies, dtype=like.dtype, device=like.device)
    angle = torch.arange(num_positions, dtype=like.dtype, device=like.device).unsqueeze(1) * frequency
    return Rotation(angle.cos(), angle.sin())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + dim/2}) of (N, H, T, dim) by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    if query.is_cpu and torch.is_autocast_enabled("cpu"):  # its backward pass takes four times longer in bfloat16
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


class RotarySelfAttention(nn.Module):
    """Self-attention; keys are cached BEFORE rotation and placed by their index inside the window, so that a stream's
    age never enters float32 arithmetic."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))  # (N, T, C) -> (N, T, H, C / H)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rotation: Rotation, first: int = 0
    ) -> Tensor:
        """query (N, T, H, d) begins at the frame `first` of key, value (N, S, H, d); mask (N, 1, T, S), True = may
        attend."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        cos, sin = rotation
        query, key = rotate(query, cos[first:], sin[first:]), rotate(key, cos, sin)
        out = _attention(query, key, value, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor, rotation: Rotation) -> Tensor:
        """(N, T, C), mask (N, 1, T, T) True = may attend, rotation of T positions -> (N, T, C)."""
        query, key, value = self.in_proj(x).chunk(3, dim=-1)
        return self._attend(self._heads(query), self._heads(key), self._heads(value), mask, rotation)

    def forward_chunk(
        self, x: Tensor, mask: Tensor, rotation: Rotation, keys: Tensor, values: Tensor, lens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One chunk behind its cache.

        Args:
          x: (N, C, d_model).
          mask: (N, 1, C, L + C), True = may attend.
          rotation: of L + C positions.
          keys, values: (N, H, L, d) caches, keys unrotated.
          lens: (N,) valid frames of x; None = all.
        Returns:
          (N, C, d_model) and the new caches.
        """
        first = keys.shape[2]
        query, key, value = (self._heads(part) for part in self.in_proj(x).chunk(3, dim=-1))
        key, keys = slide(keys.transpose(1, 2), key, lens)
        value, values = slide(values.transpose(1, 2), value, lens)
        out = self._attend(query, key, value, mask, rotation, first)
        return out, keys.transpose(1, 2), values.transpose(1, 2)
