"""The exported files in the place of a model: streams and searches run on them, by onnxruntime, without PyTorch's.

`OnnxModel` has what `StreamBatch` and the searches ask a CascadedTransducer for. Every frame goes once through each
encoder: encoder-streaming.onnx puts out the causal output, which encoder-noncausal.onnx reads, blocks and segments. The
causal graph knows full chunks only: audio ends with the zeros that fill the last one (`OnnxDecoder` hears them).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cascade.config.options import ENCODER_FRAME_MS, FRAME_SHIFT_MS, SUBSAMPLING, Config, DecodingConfig, FeatureConfig
from cascade.export.onnx import DECODER, JOINER, NONCAUSAL, STREAMING
from cascade.export.sessions import (
    NoncausalSession,
    OnlineSession,
    onnx_session,
    read_weights,
    run_session,
    zero_inputs,
)
from cascade.models.predictor import ContextState, LstmState
from cascade.stream.decoder import StreamingDecoder
from cascade.text.tokens import Tokenizer

ABOUT = "export.json"


class OnnxPredictor:
    """decoder.onnx with the interface of a predictor."""

    def __init__(self, path: Path) -> None:
        self._session = onnx_session(path)
        self.context_size = int(self._session.get_modelmeta().custom_metadata_map["context_size"])

        self._is_recurrent = len(self._session.get_inputs()) > 1

    def initial_state(self, batch_size: int) -> ContextState | LstmState:
        if self._is_recurrent:
            return LstmState(*_tensors(zero_inputs(self._session, 1, batch_size, 0)))
        return ContextState(torch.zeros(batch_size, self.context_size, dtype=torch.int64))

    def step(self, labels: Tensor, state: ContextState | LstmState) -> tuple[Tensor, ContextState | LstmState]:
        """(N,) labels -> (N, D) and the new state."""
        if self._is_recurrent:
            out, *states = _tensors(run_session(self._session, labels.numpy(), *_arrays(state)))
            return out, LstmState(*states)
        context = torch.cat((state.labels[:, 1:], labels.unsqueeze(1)), dim=1)
        return torch.from_numpy(run_session(self._session, context.numpy())[0]), ContextState(context)


class OnnxJoiner:
    """The weights of joiner.onnx: a search multiplies all its frames at once instead of calling the graph for each.

    Args:
      blank_penalty: what the file takes off the blank's bias; it is put back, because a search takes off the one in
        force.
    Raises:
      ValueError: the file has other weights.
    """

    def __init__(self, path: Path, blank_penalty: float = 0.0) -> None:
        names = [f"joiner.{layer}.{part}" for layer in ("encoder_proj", "output") for part in ("weight", "bias")]
        weights = read_weights(path)
        if missing := [name for name in names if name not in weights]:
            raise ValueError(f"{path} has no {missing[0]}: an earlier version wrote it, run export_onnx again")
        parts = [torch.from_numpy(weights[name].copy()) for name in names]
        self._weight, self._bias, self.output_weight, self.output_bias = parts
        self.output_bias[0] += blank_penalty

    def project_encoder(self, frames: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, D)."""
        return functional.linear(frames, self._weight, self._bias)


class OnnxEncoder:
    """The encoders with the interface of a CascadedEncoder, for chunks that are full."""

    def __init__(self, folder: Path, features: FeatureConfig) -> None:
        self._streaming, self._noncausal = OnlineSession(folder / STREAMING), NoncausalSession(folder / NONCAUSAL)
        self.feature_mean = torch.zeros(features.num_mel_bins)  # type and size of features; the graphs normalise

    def initial_state(self, batch_size: int, left: int) -> list[Tensor]:
        assert left == int(self._streaming.metadata["left_context_len"]), left
        return _tensors(self._streaming.initial_state(batch_size))

    def initial_block_state(self, batch_size: int, left: int) -> list[Tensor]:
        assert left == self._noncausal.left_frames, left
        return _tensors(self._noncausal.initial_state(batch_size))

    def forward_chunk(
        self, features: Tensor, state: list[Tensor], lens: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """(N, 4 C, F) -> (N, C, d_model) and the new state."""
        assert lens is None and features.shape[1] == self._streaming.step_frames, features.shape
        out, state = self._streaming.step(features.numpy(), _arrays(state))
        return torch.from_numpy(out), _tensors(state)

    def forward_block(
        self, causal_out: Tensor, state: list[Tensor], lens: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The look-ahead pass over (N, B, d_model) -> as much and the new state."""
        valid = np.full(len(causal_out), causal_out.shape[1]) if lens is None else lens.numpy()
        out, state = self._noncausal.step(causal_out.numpy(), valid, _arrays(state))
        return torch.from_numpy(out), _tensors(state)

    def forward_noncausal(self, causal_out: Tensor, lens: Tensor, block: None, left: None) -> Tensor:
        """The full pass over segments (N, T, d_model) -> as much."""
        return torch.from_numpy(self._noncausal.whole(causal_out.numpy(), lens.numpy()))


def _tensors(state: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in state]


def _arrays(state: list[Tensor]) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in state]


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
        for name in (ABOUT, STREAMING, NONCAUSAL, DECODER, JOINER, "tokens.txt"):
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
        self.encoder = OnnxEncoder(folder, features)
        self.vocab_size = self.joiner.output_weight.shape[0]


class OnnxDecoder(StreamingDecoder):
    """A stream on the exported files: silence behind its audio fills the last chunk."""

    def __init__(self, model: OnnxModel, *arguments: Any, **options: Any) -> None:
        self._step = SUBSAMPLING * model.times["chunk_ms"] // ENCODER_FRAME_MS
        super().__init__(model, *arguments, **options)

    def _last_features(self) -> Tensor:
        # One chunk, and the frame that the rounding of a length may cost.
        frames = self._audio.finish((self._step + 1) * FRAME_SHIFT_MS / 1000)
        heard = SUBSAMPLING * (self._stream.first_frame + self._stream.num_frames) + self._stream.num_waiting
        return frames[: (heard + len(frames)) // self._step * self._step - heard]
