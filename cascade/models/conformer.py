"""Conformer blocks (2005.08100) and the encoder made of them, whole-utterance or chunk by chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cascade.config.options import EncoderConfig
from cascade.models.attention import RotarySelfAttention, Rotation, rotary_angles
from cascade.models.convolution import ConvolutionModule
from cascade.models.dropout import Dropout
from cascade.models.masks import block_attention_mask, chunk_attention_mask, padding_mask
from cascade.models.state import StateTensor


class LayerState(NamedTuple):
    """Memory of one layer for a stream."""

    keys: Tensor
    """(N, H, L, d) keys before rotation."""
    values: Tensor
    """(N, H, L, d)"""
    convolution: Tensor
    """(N, C, K - 1), or (N, C, (K - 1) / 2) for a centred convolution."""


class EncoderState(NamedTuple):
    layers: tuple[LayerState, ...]
    processed_lens: Tensor
    """(N,) int64 encoder frames each stream has been through."""


class FeedForward(nn.Sequential):
    def __init__(self, d_model: int, hidden_dim: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(d_model), nn.Linear(d_model, hidden_dim), nn.SiLU(), Dropout(dropout),
            nn.Linear(hidden_dim, d_model), Dropout(dropout),
        )

    @property
    def output(self) -> nn.Linear:
        return self[-2]


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, each behind its own norm, added to what comes in.

    Without the conformer's LayerNorm after every block: what was heard reaches the top of a deep stack undamped, and
    six layers start to learn as early as three.
    """

    def __init__(self, d_model: int, config: EncoderConfig) -> None:
        super().__init__()
        self.feedforward1 = FeedForward(d_model, config.feedforward_dim, config.dropout)
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = RotarySelfAttention(d_model, config.num_heads)
        self.convolution_norm = nn.LayerNorm(d_model)
        self.convolution = ConvolutionModule(d_model, config.kernel_size, config.convolution == "centred")
        self.feedforward2 = FeedForward(d_model, config.feedforward_dim, config.dropout)
        self.dropout = Dropout(config.dropout)

    def branch_outputs(self) -> tuple[nn.Linear, ...]:
        """The linear layers whose outputs are added to the residual stream."""
        return (
            self.feedforward1.output, self.attention.out_proj, self.convolution.pointwise2, self.feedforward2.output
        )

    def forward(self, x: Tensor, mask: Tensor, rotation: Rotation, padding: Tensor, block: int | None) -> Tensor:
        """(N, T, C) -> (N, T, C); mask (N, 1, T, T) True = may attend; padding (N, T) True = padded."""
        x = x + 0.5 * self.feedforward1(x)
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, rotation))
        x = x + self.dropout(self.convolution(self.convolution_norm(x), padding, block))
        return x + 0.5 * self.feedforward2(x)

    def forward_chunk(
        self, x: Tensor, state: LayerState, mask: Tensor, rotation: Rotation, lens: Tensor | None,
        padding: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """(N, C, d_model) behind its state; mask (N, 1, C, L + C) True = may attend."""
        x = x + 0.5 * self.feedforward1(x)
        y, keys, values = self.attention.forward_chunk(
            self.attention_norm(x), mask, rotation, state.keys, state.values, lens
        )
        x = x + y
        y, past = self.convolution.forward_chunk(self.convolution_norm(x), state.convolution, lens, padding)
        x = x + y
        return x + 0.5 * self.feedforward2(x), LayerState(keys, values, past)


class ConformerEncoder(nn.Module):
    """A stack of conformer layers under the one mask rule (`masks`), and one LayerNorm at the end."""

    def __init__(self, d_model: int, config: EncoderConfig) -> None:
        super().__init__()
        self.d_model = d_model
        self.layers = nn.ModuleList(ConformerLayer(d_model, config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d_model)
        with torch.no_grad():  # the branches of a deep stack add up to what those of one layer would
            for linear in (output for layer in self.layers for output in layer.branch_outputs()):
                linear.weight *= (2 * config.num_layers) ** -0.5

    def forward(self, x: Tensor, lens: Tensor, block: int | None, left: int | None) -> Tensor:
        """See `encoder.Encoder`."""
        if x.shape[1] == 0:
            return x
        mask = block_attention_mask(lens, x.shape[1], block, left)
        rotation = self._rotation(x.shape[1])
        padding = padding_mask(lens, x.shape[1])
        for layer in self.layers:
            x = layer(x, mask, rotation, padding, block)
        return self.norm(x)

    def _rotation(self, num_positions: int) -> Rotation:
        return rotary_angles(num_positions, self.layers[0].attention.head_dim, self.norm.weight)

    def initial_state(self, batch_size: int, left: int) -> EncoderState:
        """The state of `batch_size` new streams with a left context of `left` frames: zeros."""
        *zeros, age = (self.norm.weight.new_zeros(batch_size, *part.shape) for part in self.state_layout(left))
        return EncoderState(tuple(map(LayerState, zeros[0::3], zeros[1::3], zeros[2::3])), age.long())

    def state_layout(self, left: int) -> list[StateTensor]:
        """Each layer's keys, values and past of the convolution, then the streams' age."""
        layout = []
        for index, layer in enumerate(self.layers):
            cache = (layer.attention.num_heads, left, layer.attention.head_dim)
            shapes = {"key": cache, "value": cache, "convolution": (self.d_model, layer.convolution.num_past)}
            layout += [StateTensor(name, shape, index) for name, shape in shapes.items()]
        return [*layout, StateTensor("processed_lens", ())]

    def forward_chunk(
        self, x: Tensor, state: EncoderState, lens: Tensor | None = None, chunk: int | None = None
    ) -> tuple[Tensor, EncoderState]:
        """See `encoder.Encoder`; `chunk` works with left convolutions only."""
        num_frames, left = x.shape[1], state.layers[0].keys.shape[2]
        if num_frames == 0:
            return x, state
        chunk_lens = torch.full_like(state.processed_lens, num_frames) if lens is None else lens
        mask = chunk_attention_mask(state.processed_lens, chunk_lens, num_frames, left, chunk)
        rotation = self._rotation(left + num_frames)
        padding = None if lens is None else padding_mask(lens, num_frames)
        layers = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x, layer_state = layer.forward_chunk(x, layer_state, mask, rotation, lens, padding)
            layers.append(layer_state)
        return self.norm(x), EncoderState(tuple(layers), state.processed_lens + chunk_lens)
