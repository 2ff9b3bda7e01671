"""The model cut into the networks that sherpa-onnx runs: tensors in, tensors out, in the order it binds them.

Online encoders speak sherpa-onnx's `ebranchformer` interface. Inputs: features x, then for every layer key, value,
convolution and fusion state, last processed_lens; outputs: the encoder output, then the same states. Every layer's
states must have the same shapes, so that

  key, value   (N, H, L, d) keys before rotation; H and d are those of the causal encoder, another head count of the
               non-causal one is only another view
  convolution  (N, C, S), S = the largest need of all layers; a layer that needs fewer frames keeps them at the end
  fusion       (N, F, 3): of the first layer, the front end's three normalised feature frames; of the others, nothing

An application zero-fills them: so does `initial_state`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.config.options import ENCODER_FRAME_MS, SUBSAMPLING
from cascade.models.attention import Rotation, rotary_angles
from cascade.models.conformer import ConformerEncoder, ConformerLayer, LayerState
from cascade.models.masks import chunk_attention_mask
from cascade.models.predictor import ContextPredictor
from cascade.models.subsampling import PAST_FRAMES
from cascade.models.transducer import CascadedTransducer, Mode

STATES_PER_LAYER = ("key", "value", "convolution", "fusion")
FUSION = STATES_PER_LAYER.index("fusion")


@dataclass(frozen=True)
class Geometry:
    """What is constant inside the graphs, in 40 ms encoder frames."""

    chunk_frames: int
    """C, the causal chunk, in every graph."""
    block_frames: int
    """B, the look-ahead block, a multiple of C."""
    left_frames: int
    """L, what a chunk or block sees before its start; in the offline graph, of the causal encoder only."""

    @classmethod
    def from_ms(cls, chunk_ms: int, look_ahead_ms: int, left_context_ms: int) -> Geometry:
        return cls(*(value // ENCODER_FRAME_MS for value in (chunk_ms, look_ahead_ms, left_context_ms)))

    def step_frames(self, mode: Mode) -> int:
        """Feature frames of one online step, 4 P."""
        return SUBSAMPLING * (self.block_frames if mode == "look_ahead" else self.chunk_frames)


class OnlineEncoder(nn.Module):
    """One step of the streaming pass (P = C) or of the look-ahead pass (P = B).

    A look-ahead step runs the causal layers over its B frames under the mask of C, then the non-causal layers over the
    block: no frame is computed twice.
    """

    def __init__(self, model: CascadedTransducer, geometry: Geometry, mode: Mode) -> None:
        super().__init__()
        encoder = model.encoder
        self.encoder, self.joiner = encoder, model.joiner
        self.chunk_frames, self.left_frames = geometry.chunk_frames, geometry.left_frames
        self.step_frames = geometry.step_frames(mode)
        self.num_frames = self.step_frames // SUBSAMPLING  # P
        self.stacks = [encoder.causal, encoder.noncausal] if mode == "look_ahead" else [encoder.causal]
        self.num_layers = sum(len(stack.layers) for stack in self.stacks)
        self.num_heads = encoder.causal.layers[0].attention.num_heads
        self.head_dim = encoder.causal.layers[0].attention.head_dim
        self.past_frames = max(layer.convolution.num_past for stack in self.stacks for layer in stack.layers)

    @property
    def state_names(self) -> list[str]:
        """The states in their order."""
        names = [f"{name}_{layer}" for layer in range(self.num_layers) for name in STATES_PER_LAYER]
        return [*names, "processed_lens"]

    def metadata(self) -> dict[str, str | int]:
        """What sherpa-onnx reads to cut the features and to make zero states."""
        return {
            "model_type": "ebranchformer",
            "T": self.step_frames,
            "decode_chunk_len": self.step_frames,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.encoder.subsampling.num_mel_bins // 2,  # the fusion state has twice as many channels
            "intermediate_size": 2 * self.encoder.causal.d_model,  # the convolution state has half as many
            "csgu_kernel_size": self.past_frames + 1,
            "merge_conv_kernel": PAST_FRAMES + 1,
            "left_context_len": self.left_frames,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
        }

    def initial_state(self, batch_size: int) -> list[Tensor]:
        """The states of new streams, in the order of `state_names`: zeros."""
        cache = torch.zeros(batch_size, self.num_heads, self.left_frames, self.head_dim)
        convolution = torch.zeros(batch_size, self.encoder.causal.d_model, self.past_frames)
        fusion = torch.zeros(batch_size, self.encoder.subsampling.num_mel_bins, PAST_FRAMES)
        return [*((cache, cache, convolution, fusion) * self.num_layers), torch.zeros(batch_size, dtype=torch.int64)]

    def forward(self, x: Tensor, *states: Tensor) -> list[Tensor]:
        """(N, 4 P, F) features, not normalised, and the states -> (N, P, D) projected output and the new states."""
        processed_lens, new_states = states[-1], list(states)
        x = self.encoder.normalise(x)
        x, past = self.encoder.subsampling.forward_chunk(x, states[FUSION].transpose(1, 2))
        new_states[FUSION] = past.transpose(1, 2)
        chunk_lens = torch.full_like(processed_lens, self.num_frames)
        block_mask = chunk_attention_mask(processed_lens, chunk_lens, self.num_frames, self.left_frames)
        layers = [(stack, layer) for stack in self.stacks for layer in stack.layers]
        for index, (stack, layer) in enumerate(layers):
            mask = block_mask & self._chunks_of_block() if stack is self.encoder.causal else block_mask
            first = index * len(STATES_PER_LAYER)
            state = self._layer_state(layer, *states[first : first + FUSION])
            x, state = layer.forward_chunk(x, state, mask, self._rotation(stack), None, None)
            new_states[first : first + FUSION] = self._common_shapes(state)
            if layer is stack.layers[-1]:
                x = stack.norm(x)
        new_states[-1] = processed_lens + chunk_lens
        return [self.joiner.project_encoder(x), *new_states]

    def _chunks_of_block(self) -> Tensor:
        """(P, L + P) bool: with its chunk's start c = floor(i / C) C, frame i sees c <= j < c + L + C of the window,
        which begins L frames before the block."""
        start = (torch.arange(self.num_frames) // self.chunk_frames * self.chunk_frames).unsqueeze(1)
        window = torch.arange(self.left_frames + self.num_frames)
        return (window >= start) & (window < start + self.left_frames + self.chunk_frames)

    def _rotation(self, stack: ConformerEncoder) -> Rotation:
        like = stack.norm.weight
        return rotary_angles(self.left_frames + self.num_frames, stack.layers[0].attention.head_dim, like)

    def _layer_state(self, layer: ConformerLayer, keys: Tensor, values: Tensor, past: Tensor) -> LayerState:
        num_heads = layer.attention.num_heads
        past = past[:, :, self.past_frames - layer.convolution.num_past :]
        return LayerState(with_heads(keys, num_heads), with_heads(values, num_heads), past)

    def _common_shapes(self, state: LayerState) -> Sequence[Tensor]:
        past = functional.pad(state.convolution, (self.past_frames - state.convolution.shape[2], 0))
        return with_heads(state.keys, self.num_heads), with_heads(state.values, self.num_heads), past


def with_heads(cache: Tensor, num_heads: int) -> Tensor:
    """The cache (N, H', L, d') cut into another number of heads, (N, H, L, d)."""
    if cache.shape[1] == num_heads:
        return cache
    return cache.transpose(1, 2).flatten(2).unflatten(2, (num_heads, -1)).transpose(1, 2)


class OfflineEncoder(nn.Module):
    """Both encoders over whole utterances: the causal one under its chunk mask, the non-causal one over all."""

    def __init__(self, model: CascadedTransducer, geometry: Geometry) -> None:
        super().__init__()
        self.encoder, self.joiner = model.encoder, model.joiner
        self.chunk_frames, self.left_frames = geometry.chunk_frames, geometry.left_frames

    def metadata(self) -> dict[str, str | int]:
        return {"model_type": "conformer", "subsampling_factor": SUBSAMPLING}

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, F) features, not normalised, (N,) int64 lengths -> (N, T // 4 + 1, D) projected output, (N,) lengths.

        The last frame is always padding: with it, audio shorter than one encoder frame goes through the same graph.
        """
        x = functional.pad(x, (0, 0, 0, SUBSAMPLING))
        causal_out, lens = self.encoder.forward_causal(x, x_lens, self.chunk_frames, self.left_frames)
        return self.joiner.project_encoder(self.encoder.forward_noncausal(causal_out, lens, None, None)), lens


class Decoder(nn.Module):
    """The predictor as a function of the last labels, which is all that sherpa-onnx's transducers know.

    Raises:
      ValueError: the predictor is recurrent.
    """

    def __init__(self, model: CascadedTransducer) -> None:
        super().__init__()
        if not isinstance(model.predictor, ContextPredictor):
            raise ValueError(
                "model.predictor.kind lstm cannot be exported: sherpa-onnx's transducer decoders see the last labels "
                "and keep no state; export a model with a tied_reduced or stateless predictor"
            )
        self.predictor = model.predictor
        self.output = model.joiner.output  # a tied predictor reads its weight: E is stored in this graph too
        self.vocab_size = model.vocab_size

    def metadata(self) -> dict[str, str | int]:
        return {"vocab_size": self.vocab_size, "context_size": self.predictor.context_size}

    def forward(self, labels: Tensor) -> Tensor:
        """(N, context_size) int64 labels, oldest first, -1 and 0 where nothing was said -> (N, D)."""
        return self.predictor.forward_context(labels)


class JoinerNetwork(nn.Module):
    """(N, D) projected encoder frames and (N, D) predictor vectors -> (N, V) logits; the blank's penalty is in them."""

    def __init__(self, model: CascadedTransducer, blank_penalty: float = 0.0) -> None:
        super().__init__()
        self.joiner = copy.deepcopy(model.joiner)
        with torch.no_grad():
            self.joiner.output.bias[0] -= blank_penalty

    def metadata(self) -> dict[str, str | int]:
        return {"joiner_dim": self.joiner.output_weight.shape[1]}

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.joiner(encoder_out, decoder_out)
