"""Does sherpa-onnx, given the exported files, find the tokens and times that our own searches find?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.audio.fbank import compute_fbank
from cascade.config.options import ENCODER_FRAME_MS, FRAME_SHIFT_MS, SUBSAMPLING, FeatureConfig
from cascade.export.onnx import DECODER, FULL, JOINER, MODES
from cascade.export.wrappers import Geometry
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.models.transducer import CascadedTransducer
from cascade.search.methods import METHODS, DecodingOptions, build_search
from cascade.text.tokens import WORD_MARK, Tokenizer

BEAM = 4


@dataclass(frozen=True)
class SherpaReport:
    """Agreement of sherpa-onnx and PyTorch."""

    version: str
    num_recordings: int
    num_tokens: dict[str, dict[str, int]]
    """Encoder file -> search -> tokens of all recordings together."""


def compare_with_sherpa(
    folder: Path, model: CascadedTransducer, features: FeatureConfig, tokenizer: Tokenizer, geometry: Geometry,
    recordings: dict[str, np.ndarray], blank_penalty: float = 0.0,
) -> SherpaReport | None:  # fmt: skip
    """Decode the same audio, with the same tail of zeros, by both; all recordings in one batch.

    Args:
      recordings: name -> (num_samples,) float32 samples in [-1, 1].
      blank_penalty: of our search; in the files it is part of the joiner.
    Returns:
      None if sherpa-onnx is not installed.
    Raises:
      ValueError: a token or a timestamp differs.
    """
    try:
        import sherpa_onnx
    except ImportError:
        return None
    # An online recogniser drops what does not fill a step and the frame after it.
    num_zeros = (SUBSAMPLING * geometry.block_frames + 1) * FRAME_SHIFT_MS * features.sampling_rate // 1000
    tail = np.zeros(num_zeros, dtype=np.float32)
    samples = [np.concatenate((recording, tail)) for recording in recordings.values()]
    frames = [torch.from_numpy(compute_fbank(waveform, features)) for waveform in samples]
    num_tokens: dict[str, dict[str, int]] = {file: {} for file in MODES}
    for file, method in product(MODES, METHODS):
        files = {
            "encoder": str(folder / file), "decoder": str(folder / DECODER), "joiner": str(folder / JOINER),
            "tokens": str(folder / "tokens.txt"), "num_threads": 1, "sample_rate": features.sampling_rate,
            "feature_dim": features.num_mel_bins, "decoding_method": method, "max_active_paths": BEAM,
        }
        if file == FULL:
            recogniser, used = sherpa_onnx.OfflineRecognizer.from_transducer(**files), frames
            theirs = _decode_offline(recogniser, samples, features.sampling_rate)
        else:
            recogniser = sherpa_onnx.OnlineRecognizer.from_transducer(**files)
            theirs = _decode_online(recogniser, samples, features.sampling_rate)
            step = geometry.step_frames(MODES[file])
            used = [waveform[: (waveform.shape[0] - 1) // step * step] for waveform in frames]
        options = DecodingOptions(MODES[file], method, BEAM, *geometry.to_ms(), blank_penalty)
        ours = _decode(model, used, tokenizer, options)
        for name, left, right in zip(recordings, ours, theirs, strict=True):
            if left != right:
                raise ValueError(
                    f"{file}, {method}: sherpa-onnx and PyTorch differ on {name}, {_first_difference(left, right)}"
                )
        num_tokens[file][method] = sum(len(waveform) for waveform in ours)
    return SherpaReport(sherpa_onnx.__version__, len(recordings), num_tokens)


def synthetic_recordings(seconds: tuple[float, ...], sampling_rate: int, seed: int) -> dict[str, np.ndarray]:
    """Name -> tones in noise, another pitch and loudness every 100 ms: where there is no speech, something varied."""
    generator = np.random.default_rng(seed)
    recordings = {}
    for duration in seconds:
        time = np.arange(int(duration * sampling_rate)) / sampling_rate
        tone = (time * 10).astype(int)
        pitch = generator.uniform(100, sampling_rate / 2.5, tone[-1] + 1)[tone]  # Hz
        loudness = generator.choice([0.003, 0.05, 0.5], tone[-1] + 1)[tone]
        noise = 0.003 * generator.standard_normal(time.size)
        recordings[f"{duration} s of tones"] = (loudness * np.sin(2 * np.pi * pitch * time) + noise).astype(np.float32)
    return recordings


def _decode(
    model: CascadedTransducer, features: list[Tensor], tokenizer: Tokenizer, options: DecodingOptions
) -> list[list[tuple[str, int]]]:
    """(token, encoder frame) pairs by our search, tokens spelled as sherpa-onnx spells them."""
    lens = torch.tensor([len(frames) for frames in features])
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    search = build_search(TorchEngine(model), options, tokenizer.unk_id)
    return [
        [
            (_spelling(tokenizer.id_to_symbol(token)), frame)
            for token, frame in zip(hypothesis.tokens, hypothesis.timestamps, strict=True)
        ]
        for hypothesis in decode_batch(model, search, padded, lens, options)
    ]


def _spelling(symbol: str) -> str:
    """sherpa-onnx shows a space for the word mark, and the character for a byte token that is printable ASCII."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", symbol)
    if byte and 0x20 <= int(byte[1], 16) <= 0x7E:
        return chr(int(byte[1], 16))
    return symbol.replace(WORD_MARK, " ")


def _results(results: list[Any]) -> list[list[tuple[str, int]]]:
    seconds = ENCODER_FRAME_MS / 1000
    return [
        [(token, round(time / seconds)) for token, time in zip(result.tokens, result.timestamps, strict=True)]
        for result in results
    ]


def _decode_offline(recogniser: Any, samples: list[np.ndarray], sampling_rate: int) -> list[list[tuple[str, int]]]:
    streams = [recogniser.create_stream() for _ in samples]
    for stream, waveform in zip(streams, samples, strict=True):
        stream.accept_waveform(sampling_rate, waveform)
    recogniser.decode_streams(streams)
    return _results([stream.result for stream in streams])


def _decode_online(recogniser: Any, samples: list[np.ndarray], sampling_rate: int) -> list[list[tuple[str, int]]]:
    streams = [recogniser.create_stream() for _ in samples]
    for stream, waveform in zip(streams, samples, strict=True):
        stream.accept_waveform(sampling_rate, waveform)
        stream.input_finished()
    while ready := [stream for stream in streams if recogniser.is_ready(stream)]:
        recogniser.decode_streams(ready)
    return _results([recogniser.get_result_all(stream) for stream in streams])


def _first_difference(ours: list[tuple[str, int]], theirs: list[tuple[str, int]]) -> str:
    for index, (left, right) in enumerate(zip(ours, theirs, strict=False)):
        if left != right:
            return f"token {index}: {right} (token, frame) against {left}"
    return f"{len(theirs)} tokens against {len(ours)}"
