"""The exported files as an engine: streams and searches run on them, by onnxruntime and numpy, without PyTorch.

Every frame goes once through each encoder: encoder-streaming.onnx puts out the causal output, which
encoder-noncausal.onnx reads, blocks and segments. The causal graph knows full chunks only: zeros behind a stream's
audio fill the last one.
"""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from cascade.config.options import Config, DecodingConfig, FeatureConfig
from cascade.export.sessions import (
    DECODER,
    JOINER,
    NONCAUSAL,
    STREAMING,
    NoncausalSession,
    OnlineSession,
    onnx_session,
    read_weights,
    run_session,
    zero_inputs,
)
from cascade.models.encoder_rows import EncoderRows
from cascade.provenance import instruction_sets
from cascade.text.tokens import Tokenizer

ABOUT = "export.json"

State = tuple[np.ndarray, ...]


class OnnxPredictor:
    """decoder.onnx with the interface of a predictor; without inputs for states, its state is the last labels."""

    def __init__(self, path: Path) -> None:
        self._session = onnx_session(path)
        self.context_size = int(self._session.get_modelmeta().custom_metadata_map["context_size"])
        self._is_recurrent = len(self._session.get_inputs()) > 1

    def initial(self, n: int) -> tuple[np.ndarray, State]:
        nothing = np.zeros((n, self.context_size), np.int64)
        states = zero_inputs(self._session, 1, n, 0) if self._is_recurrent else [nothing]
        return self.step(nothing[:, 0], tuple(states))

    def step(self, labels: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        if self._is_recurrent:
            out, *states = run_session(self._session, labels, *state)
            return out, tuple(states)
        context = np.concatenate((state[0][:, 1:], labels[:, None]), axis=1)
        return run_session(self._session, context)[0], (context,)

    def with_product(self, product: Any) -> OnnxPredictor:
        """onnxruntime multiplies."""
        return self


def read_joiner(path: Path) -> list[np.ndarray]:
    """Weight and bias of joiner.onnx's encoder projection, then of its output: a search multiplies all its frames at
    once instead of calling the graph for each.

    Raises:
      ValueError: the file has other weights.
    """
    names = [f"joiner.{layer}.{part}" for layer in ("encoder_proj", "output") for part in ("weight", "bias")]
    try:
        weights = read_weights(path)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run export_onnx again") from error
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"{path} has no {missing[0]}: an earlier version wrote it, run export_onnx again")
    return [weights[name] for name in names]


class OnnxEngine:
    """A folder that `export_onnx` wrote, as searches and streams see it (`stream.engine.Engine`).

    `config` is as far filled in as decoding needs it (features, decoding); `times` are chunk_ms, look_ahead_ms,
    left_context_ms, which are constants of the graphs. The blank penalty that the file took off the blank's bias is put
    back, because a search takes off the one in force.

    Args:
      int8: run the encoders in 8 bits where the export found that they lose no words.
    Raises:
      FileNotFoundError: a file is missing.
      ValueError: export.json, the tokens or the joiner are not what this version writes; no int8 files.
      ImportError: onnxruntime is missing.
    """

    whole_chunks = True

    def __init__(self, folder: Path, int8: bool = False) -> None:
        for name in (ABOUT, STREAMING, NONCAUSAL, DECODER, JOINER, "tokens.txt"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} not found: --onnx-dir is a folder that export_onnx wrote")
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json: an earlier version wrote it, run export_onnx again")
        try:
            metadata = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            self.times = {name: int(metadata[name]) for name in ("chunk_ms", "look_ahead_ms", "left_context_ms")}
            features = FeatureConfig(int(metadata["sampling_rate"]), int(metadata["num_mel_bins"]))
            decoding = read_section(metadata["decoding"]).beside(folder)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / ABOUT} is not what export_onnx writes ({error}): export again") from error
        files = int8_files(metadata, folder) if int8 else {}
        self.config = Config(features=features, decoding=decoding)
        self.tokenizer = Tokenizer.load(folder)
        self.num_mel_bins = features.num_mel_bins
        try:
            self._streaming = OnlineSession(folder / files.get(STREAMING, STREAMING))
            self._noncausal = NoncausalSession(folder / files.get(NONCAUSAL, NONCAUSAL))
            self.predictor = OnnxPredictor(folder / DECODER)
        except KeyError as error:
            raise ValueError(f"{folder} has a graph that lacks {error}, it is another: export again") from error
        self._projection, self._projection_bias, self.weight, bias = read_joiner(folder / JOINER)
        self.bias = bias.copy()
        self.bias[0] += decoding.blank_penalty

    def causal_rows(self, left: int) -> EncoderRows:
        assert left == int(self._streaming.metadata["left_context_len"]), left

        def step(
            features: np.ndarray, lens: np.ndarray, state: list[np.ndarray]
        ) -> tuple[np.ndarray, list[np.ndarray]]:
            assert (lens == self._streaming.step_frames).all(), lens
            return self._streaming.step(features, state)

        return EncoderRows(self._streaming.initial_state, step)

    def block_rows(self, left: int) -> EncoderRows:
        assert left == self._noncausal.left_frames, left
        return EncoderRows(self._noncausal.initial_state, self._noncausal.step)

    def full(self, causal_out: np.ndarray, lens: np.ndarray) -> np.ndarray:
        return self._noncausal.whole(causal_out, lens)

    def project(self, encoder_out: np.ndarray) -> np.ndarray:
        return encoder_out @ self._projection.T + self._projection_bias


def read_section(section: dict[str, Any]) -> DecodingConfig:
    """The decoding section of export.json; what it leaves out, except the blank penalty, is not in force.

    Raises:
      KeyError, TypeError, ValueError: it is none.
    """
    kinds = {field.name: float if isinstance(field.default, float) else str for field in fields(DecodingConfig)}
    given = {name: kind(section[name]) for name, kind in kinds.items() if name in section}
    return DecodingConfig(**given | {"blank_penalty": float(section["blank_penalty"])})


def int8_files(metadata: dict[str, Any], folder: Path) -> dict[str, str]:
    """Float32 file -> the int8 file that export.json puts in its place.

    Raises:
      ValueError: the export has none.
    """
    if not metadata.get("int8"):
        raise ValueError(f"{folder} has no int8 files: export it with export_onnx --int8")
    known = instruction_sets()
    if metadata["int8"]["weight_bits"] == 8 and "AVX2" in known and "VNNI" not in known:
        logging.warning(
            "this processor has no VNNI: sums of its 8-bit products can overflow; files that export_onnx --int8 writes "
            "on such a machine have 7-bit weights"
        )
    return metadata["int8"]["files"]
