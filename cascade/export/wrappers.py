"""The model cut into the networks that sherpa-onnx runs: tensors in, tensors out, in the order it binds them.

Online encoders speak sherpa-onnx's `ebranchformer` interface. Inputs: features x, then for every layer key, value,
convolution and fusion state, last processed_lens; outputs: the encoder output, then the same states. Every layer's
states must have the same shapes, so that

  key, value   (N, H, L, d); H and d are those of the first layer that has them, another layer's head count is only
               another view
  convolution  (N, C, S), S = the largest need of all layers; a layer that needs fewer frames keeps them at the end
  fusion       (N, F, 3): of the first layer, the front end's three normalised feature frames; of the others, nothing

What a layer does not keep (its encoder's `state_layout` says it) passes through.
An application zero-fills them: so does `initial_state`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.config.options import ENCODER_FRAME_MS, SUBSAMPLING, ConfigError
from cascade.models.encoder import Encoder
from cascade.models.predictor import LstmState
from cascade.models.state import StateTensor, fill_state, state_tensors
from cascade.models.subsampling import PAST_FRAMES
from cascade.models.transducer import CascadedTransducer, Mode

STATES_PER_LAYER = ("key", "value", "convolution", "fusion")
FUSION = STATES_PER_LAYER.index("fusion")
AGE = "processed_lens"


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

    def to_ms(self) -> tuple[int, int, int]:
        """The inverse of `from_ms`."""
        frames = (self.chunk_frames, self.block_frames, self.left_frames)
        return tuple(ENCODER_FRAME_MS * count for count in frames)

    def step_frames(self, mode: Mode) -> int:
        """Feature frames of one online step, 4 P."""
        return SUBSAMPLING * (self.block_frames if mode == "look_ahead" else self.chunk_frames)


class OnlineEncoder(nn.Module):
    """One step of the streaming pass (P = C) or of the look-ahead pass (P = B).

    A look-ahead step runs the causal encoder over its B frames under the mask of C, then the non-causal one over the
    block: no frame is computed twice.

    Raises:
      ConfigError: an encoder keeps what sherpa-onnx has no place for.
    """

    def __init__(self, model: CascadedTransducer, geometry: Geometry, mode: Mode) -> None:
        super().__init__()
        encoder = model.encoder
        self.encoder = encoder
        self.chunk_frames, self.left_frames = geometry.chunk_frames, geometry.left_frames
        self.step_frames = geometry.step_frames(mode)
        stacks = [encoder.causal, encoder.noncausal] if mode == "look_ahead" else [encoder.causal]
        layouts = [stack.state_layout(self.left_frames) for stack in stacks]
        self.shapes = common_shapes([part for layout in layouts for part in layout], self.left_frames)
        self.shapes["fusion"] = (encoder.subsampling.num_mel_bins, PAST_FRAMES)
        self.stacks: list[tuple[Encoder, dict[int, StateTensor]]] = []
        """Each encoder, and where each tensor of its state stands among the graph's states."""
        self.num_layers = 0
        for stack, layout in zip(stacks, layouts, strict=True):
            places = {place_of(part, self.num_layers): part for part in layout}
            assert len(places) == len(layout), layout
            self.stacks.append((stack, places))
            self.num_layers += len(stack.layers)

    @property
    def state_names(self) -> list[str]:
        """The states in their order."""
        names = [f"{name}_{layer}" for layer in range(self.num_layers) for name in STATES_PER_LAYER]
        return [*names, AGE]

    def metadata(self) -> dict[str, str | int]:
        """What sherpa-onnx reads to cut the features and to make zero states."""
        num_heads, _, head_dim = self.shapes["key"]
        num_channels, past_frames = self.shapes["convolution"]
        return {
            "model_type": "ebranchformer",
            "T": self.step_frames,
            "decode_chunk_len": self.step_frames,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.shapes["fusion"][0] // 2,  # the fusion state has twice as many channels
            "intermediate_size": 2 * num_channels,  # the convolution state has half as many
            "csgu_kernel_size": past_frames + 1,
            "merge_conv_kernel": PAST_FRAMES + 1,
            "left_context_len": self.left_frames,
            "num_heads": num_heads,
            "head_dim": head_dim,
        }

    def initial_state(self, batch_size: int) -> list[Tensor]:
        """The states of new streams, in the order of `state_names`: zeros."""
        states = [torch.zeros(batch_size, *self.shapes[name]) for name in STATES_PER_LAYER]
        return [*(states * self.num_layers), torch.zeros(batch_size, dtype=torch.int64)]

    def forward(self, x: Tensor, *states: Tensor) -> list[Tensor]:
        """(N, 4 P, F) features, not normalised, and the states -> (N, P, C) output and the new states."""
        new_states = list(states)
        x = self.encoder.normalise(x)
        x, past = self.encoder.subsampling.forward_chunk(x, states[FUSION].transpose(1, 2))
        new_states[FUSION] = past.transpose(1, 2)
        for stack, places in self.stacks:
            own = [reshape_state(states[place], part.shape) for place, part in places.items()]
            state = fill_state(stack.initial_state(1, self.left_frames), own)
            chunk = self.chunk_frames if stack is self.encoder.causal else None
            x, state = stack.forward_chunk(x, state, chunk=chunk)
            for (place, part), tensor in zip(places.items(), state_tensors(state), strict=True):
                new_states[place] = reshape_state(tensor, self.shapes.get(part.name, part.shape))
        new_states[-1] = states[-1] + self.step_frames // SUBSAMPLING
        return [x, *new_states]


def place_of(part: StateTensor, first_layer: int) -> int:
    """Index of an encoder's state among those of a graph, where its layers begin with `first_layer`."""
    if part.name == AGE:
        return -1
    return (first_layer + part.layer) * len(STATES_PER_LAYER) + STATES_PER_LAYER.index(part.name)


def common_shapes(layout: Sequence[StateTensor], left_frames: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all layers' keys, values and convolutions: the first head count, the longest convolution.

    Raises:
      ConfigError: there is another state, or layers have different widths.
    """
    for part in layout:
        if part.name not in (*STATES_PER_LAYER[:FUSION], AGE):
            raise ConfigError(
                f"an encoder with a state {part.name!r} cannot be exported: sherpa-onnx keeps "
                f"{', '.join(STATES_PER_LAYER[:FUSION])} of a layer and {AGE}, nothing else"
            )
    caches = [part.shape for part in layout if part.name in ("key", "value")] or [(1, left_frames, 1)]
    pasts = [part.shape for part in layout if part.name == "convolution"] or [(1, 0)]
    if len({heads * dim for heads, _, dim in caches}) > 1 or len({channels for channels, _ in pasts}) > 1:
        raise ConfigError("encoders whose layers have different widths cannot be exported: sherpa-onnx knows one width")
    return {"key": caches[0], "value": caches[0], "convolution": (pasts[0][0], max(frames for _, frames in pasts))}


def reshape_state(state: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A state in the shape of another layer's: keys and values (N, H, L, d) cut into another number of heads, the past
    of a convolution (N, C, S) with its last frames only, or with zeros before them."""
    if len(shape) == 3 and state.shape[1] != shape[0]:
        return state.transpose(1, 2).flatten(2).unflatten(2, (shape[0], -1)).transpose(1, 2)
    missing = shape[1] - int(state.shape[2]) if len(shape) == 2 else 0
    return functional.pad(state, (missing, 0)) if missing > 0 else state[:, :, -missing:] if missing else state


class OfflineEncoder(nn.Module):
    """Both encoders over whole utterances: the causal one under its chunk mask, the non-causal one over all."""

    def __init__(self, model: CascadedTransducer, geometry: Geometry) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.chunk_frames, self.left_frames = geometry.chunk_frames, geometry.left_frames

    def metadata(self) -> dict[str, str | int]:
        return {"model_type": "conformer", "subsampling_factor": SUBSAMPLING}

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, F) features, not normalised, (N,) int64 lengths -> (N, T // 4 + 1, C) output, (N,) lengths.

        The last frame is always padding: with it, audio shorter than one encoder frame goes through the same graph.
        """
        x = functional.pad(x, (0, 0, 0, SUBSAMPLING))
        causal_out, lens = self.encoder.forward_causal(x, x_lens, self.chunk_frames, self.left_frames)
        return self.encoder.forward_noncausal(causal_out, lens, None, None), lens


class NoncausalEncoder(nn.Module):
    """The non-causal encoder on causal output that is there already: for our own runtime, one graph for blocks behind
    their left context and for whole segments, which are one block behind a new state."""

    def __init__(self, model: CascadedTransducer, geometry: Geometry) -> None:
        super().__init__()
        self.encoder, self.left_frames = model.encoder.noncausal, geometry.left_frames
        self.layout = self.encoder.state_layout(self.left_frames)

    @property
    def state_names(self) -> list[str]:
        """The states in their order."""
        return [part.name if part.name == AGE else f"{part.name}_{part.layer}" for part in self.layout]

    def initial_state(self, batch_size: int) -> list[Tensor]:
        """The states of new streams, in the order of `state_names`: zeros."""
        return state_tensors(self.encoder.initial_state(batch_size, self.left_frames))

    def metadata(self) -> dict[str, str | int]:
        return {"left_context_len": self.left_frames}

    def forward(self, x: Tensor, x_lens: Tensor, *states: Tensor) -> list[Tensor]:
        """(N, T, C) causal output, (N,) int64 valid frames and the states -> (N, T, C) output and the new states."""
        state = fill_state(self.encoder.initial_state(1, self.left_frames), states)
        x, state = self.encoder.forward_chunk(x, state, x_lens)
        return [x, *state_tensors(state)]


class Decoder(nn.Module):
    """The predictor as a function of the last labels, which is all that sherpa-onnx's transducers know."""

    def __init__(self, model: CascadedTransducer) -> None:
        super().__init__()
        self.predictor = model.predictor
        self.output = model.joiner.output  # a tied predictor reads its weight: E is stored in this graph too
        self.vocab_size = model.vocab_size

    def metadata(self) -> dict[str, str | int]:
        return {"vocab_size": self.vocab_size, "context_size": self.predictor.context_size}

    def forward(self, labels: Tensor) -> Tensor:
        """(N, context_size) int64 labels, oldest first, -1 and 0 where nothing was said -> (N, D)."""
        return self.predictor.forward_context(labels)


class RecurrentDecoder(Decoder):
    """An LSTM predictor, a label at a time. Our own runtime runs it; sherpa-onnx has no place for its state."""

    def forward(self, labels: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) int64 labels, the first one blank, and (N, layers, H) states -> (N, D) and the new states."""
        out, state = self.predictor.step(labels, LstmState(hidden, cell))
        return out, *state


class JoinerNetwork(nn.Module):
    """(N, C) frames of any of the encoders and (N, D) predictor vectors -> (N, V) logits; the blank's penalty is in
    them. The projection of the frames stands here, so that the encoders' output is what the next encoder reads."""

    def __init__(self, model: CascadedTransducer, blank_penalty: float = 0.0) -> None:
        super().__init__()
        self.joiner = copy.deepcopy(model.joiner)
        with torch.no_grad():
            self.joiner.output.bias[0] -= blank_penalty

    def metadata(self) -> dict[str, str | int]:
        return {"joiner_dim": self.joiner.output_weight.shape[1]}

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.joiner(self.joiner.project_encoder(encoder_out), decoder_out)
