"""A second encoder, which only tests know: causal depthwise convolutions, no attention. With its line in ENCODERS it is
everything that an encoder needs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from cascade.config.options import EncoderConfig
from cascade.models.state import StateTensor, slide


class ConvolutionalState(NamedTuple):
    layers: tuple[Tensor, ...]
    """(N, C, K - 1) the last frames that each layer's convolution read."""


class ConvolutionalLayer(nn.Module):
    def __init__(self, d_model: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model)
        self.pointwise = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, past: Tensor, lens: Tensor | None) -> tuple[Tensor, Tensor]:
        """(N, T, C) behind its past (N, C, K - 1) -> (N, T, C) and the new past."""
        y, past = slide(past.transpose(1, 2), self.norm(x), lens)
        y = functional.silu(self.depthwise(y.transpose(1, 2))).transpose(1, 2)
        return x + self.pointwise(y), past.transpose(1, 2)


class ConvolutionalEncoder(nn.Module):
    """It looks left only, so that neither chunks nor blocks, left contexts or padding change what it says."""

    def __init__(self, d_model: int, config: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvolutionalLayer(d_model, config.kernel_size) for _ in range(config.num_layers))
        self.scale = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, lens: Tensor, block: int | None, left: int | None) -> Tensor:
        return self.forward_chunk(x, self.initial_state(x.shape[0], 0))[0]

    def state_layout(self, left: int) -> list[StateTensor]:
        shapes = [(layer.depthwise.in_channels, layer.depthwise.kernel_size[0] - 1) for layer in self.layers]
        return [StateTensor("convolution", shape, index) for index, shape in enumerate(shapes)]

    def initial_state(self, batch_size: int, left: int) -> ConvolutionalState:
        weight = self.scale.weight
        return ConvolutionalState(tuple(weight.new_zeros(batch_size, *part.shape) for part in self.state_layout(left)))

    def forward_chunk(
        self, x: Tensor, state: ConvolutionalState, lens: Tensor | None = None, chunk: int | None = None
    ) -> tuple[Tensor, ConvolutionalState]:
        if x.shape[1] == 0:
            return x, state
        pasts = []
        for layer, past in zip(self.layers, state.layers, strict=True):
            x, past = layer(x, past, lens)
            pasts.append(past)
        return self.scale(x), ConvolutionalState(tuple(pasts))
