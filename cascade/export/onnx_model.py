"""The exported files in the place of a model: streams and searches run on them, by onnxruntime, without PyTorch's.

`OnnxModel` has what `StreamBatch` and the searches ask a CascadedTransducer for. The graphs know neither causal output
nor shorter chunks, so

- a frame carries its encoder output and its own four feature frames, (N, T, D + 4 F): the look-ahead graph and the full
  graph start from these features again;
- audio must end with zeros that fill the last step (`OnnxDecoder` hears them), or its end would be lost;
- the full graph hears its segment by itself, where PyTorch's causal encoder still knows the segment before; in mode
  two_pass the look-ahead graph does so too, but at its end nothing depends on that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.config.options import ENCODER_FRAME_MS, FRAME_SHIFT_MS, SUBSAMPLING, Config, DecodingConfig, FeatureConfig
from cascade.export.onnx import DECODER, FULL, JOINER, LOOK_AHEAD, STREAMING
from cascade.export.parity import OnlineSession, onnx_session, run_session
from cascade.models.predictor import ContextState
from cascade.stream.decoder import StreamingDecoder
from cascade.text.tokens import Tokenizer

ABOUT = "export.json"
_SATURATED = 30.0
"""Its float32 tanh is 1."""


class OnnxPredictor:
    """decoder.onnx with the interface of a predictor."""

    def __init__(self, path: Path) -> None:
        self._session = onnx_session(path)
        self.context_size = int(self._session.get_modelmeta().custom_metadata_map["context_size"])

    def initial_state(self, batch_size: int) -> ContextState:
        return ContextState(torch.zeros(batch_size, self.context_size, dtype=torch.int64))

    def step(self, labels: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        """(N,) labels -> (N, D) and the new state."""
        context = torch.cat((state.labels[:, 1:], labels.unsqueeze(1)), dim=1)
        return run_session(self._session, context)[0], ContextState(context)


class OnnxJoiner:
    """joiner.onnx, logits = W tanh(encoder_out + decoder_out) + b, with W and b read out of it by unit vectors: a
    search then multiplies all its frames at once instead of calling the graph for each. The blank penalty that was
    taken off b is put back, because a search takes off the one in force."""

    def __init__(self, path: Path, blank_penalty: float = 0.0) -> None:
        session = onnx_session(path)
        self._dim = int(session.get_modelmeta().custom_metadata_map["joiner_dim"])
        units = torch.cat((torch.zeros(1, self._dim), _SATURATED * torch.eye(self._dim)))
        (logits,) = run_session(session, units, torch.zeros_like(units))
        self.output_bias = logits[0].clone()
        self.output_bias[0] += blank_penalty
        self.output_weight = (logits[1:] - logits[0]).T.contiguous()  # (V, D)

    def project_encoder(self, frames: Tensor) -> Tensor:
        """The part of (N, T, D + 4 F) frames that is encoder output, which the graphs have projected."""
        return frames[..., : self._dim]


class OnnxEncoder:
    """The three encoder graphs with the interface of a CascadedEncoder, for steps that are full."""

    def __init__(self, folder: Path, features: FeatureConfig, dim: int) -> None:
        self._streaming, self._look_ahead = (OnlineSession(folder / name) for name in (STREAMING, LOOK_AHEAD))
        self._full = onnx_session(folder / FULL)
        self._dim, self._left = dim, int(self._look_ahead.metadata["left_context_len"])
        self.feature_mean = torch.zeros(features.num_mel_bins)  # type and size of features; the graphs normalise

    def initial_state(self, batch_size: int, left: int) -> list[Tensor]:
        return _initial_state(self._streaming, batch_size, left)

    def initial_block_state(self, batch_size: int, left: int) -> list[Tensor]:
        return _initial_state(self._look_ahead, batch_size, left)

    def forward_chunk(
        self, features: Tensor, state: list[Tensor], lens: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """(N, 4 C, F) -> (N, C, D + 4 F) and the new state."""
        assert lens is None and features.shape[1] == self._streaming.step_frames, features.shape
        out, state = self._streaming.step(features, state)
        return torch.cat((out, features.unflatten(1, (-1, SUBSAMPLING)).flatten(2)), dim=2), state

    def forward_block(
        self, frames: Tensor, state: list[Tensor], lens: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The look-ahead pass over (N, B, D + 4 F) -> (N, B, D) and the new state.

        A shorter block ends a segment of mode two_pass, where nobody asks for its output: the next segment's look-ahead
        pass starts with a new state.
        """
        if SUBSAMPLING * frames.shape[1] < self._look_ahead.step_frames:
            return torch.zeros_like(frames[..., : self._dim]), self.initial_block_state(frames.shape[0], self._left)
        assert lens is None, lens
        return self._look_ahead.step(self._features(frames), state)

    def forward_noncausal(self, frames: Tensor, lens: Tensor, block: None, left: None) -> Tensor:
        """The full pass over segments (N, T, D + 4 F) -> (N, T, D)."""
        out, _ = run_session(self._full, self._features(frames), SUBSAMPLING * lens)
        return out[:, : frames.shape[1]]

    def _features(self, frames: Tensor) -> Tensor:
        """(N, T, D + 4 F) -> (N, 4 T, F)."""
        return frames[..., self._dim :].unflatten(2, (SUBSAMPLING, -1)).flatten(1, 2)


def _initial_state(session: OnlineSession, batch_size: int, left: int) -> list[Tensor]:
    assert left == int(session.metadata["left_context_len"]), left
    return [tensor.clone() for tensor in session.initial_state(batch_size)]


class OnnxModel:
    """A folder that `export_onnx` wrote.

    `config` is as far filled in as decoding needs it (features, decoding); `times` are chunk_ms, look_ahead_ms,
    left_context_ms, which are constants of the graphs.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: export.json or the tokens are not what this version writes.
      ImportError: onnxruntime is missing.
    """

    def __init__(self, folder: Path) -> None:
        for name in (ABOUT, STREAMING, LOOK_AHEAD, FULL, DECODER, JOINER, "tokens.txt"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} not found: --onnx-dir is a folder that export_onnx wrote")
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json: an earlier version wrote it, run export_onnx again")
        try:
            metadata = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            self.times = {name: int(metadata[name]) for name in ("chunk_ms", "look_ahead_ms", "left_context_ms")}
            features = FeatureConfig(int(metadata["sampling_rate"]), int(metadata["num_mel_bins"]))
            decoding = DecodingConfig(float(metadata["decoding"]["blank_penalty"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / ABOUT} is not what export_onnx writes ({error}): export again") from error
        self.config = Config(features=features, decoding=decoding)
        self.tokenizer = Tokenizer.load(folder)
        self.predictor = OnnxPredictor(folder / DECODER)
        self.joiner = OnnxJoiner(folder / JOINER, decoding.blank_penalty)
        self.encoder = OnnxEncoder(folder, features, self.joiner.output_weight.shape[1])
        self.vocab_size = self.joiner.output_weight.shape[0]


class OnnxDecoder(StreamingDecoder):
    """A stream on the exported files: silence behind its audio fills the last step of every graph."""

    def __init__(self, model: OnnxModel, *arguments: Any, **options: Any) -> None:
        # One step of the slowest graph, and the frame that the rounding of a length may cost.
        self._step = SUBSAMPLING * model.times["look_ahead_ms"] // ENCODER_FRAME_MS
        super().__init__(model, *arguments, **options)

    def _last_features(self) -> Tensor:
        frames = self._audio.finish((self._step + 1) * FRAME_SHIFT_MS / 1000)
        heard = SUBSAMPLING * (self._stream.first_frame + self._stream.num_frames) + self._stream.num_waiting
        return frames[: (heard + len(frames)) // self._step * self._step - heard]
