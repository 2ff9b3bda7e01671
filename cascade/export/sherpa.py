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
from cascade.export.sessions import int8_name
from cascade.export.wrappers import Geometry
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.models.transducer import CascadedTransducer
from cascade.search.hypothesis import Hypothesis
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
        recogniser = open_recogniser(folder, file, features, decoding_method=method)
        if file == FULL:
            used, theirs = frames, decode_offline(recogniser, samples, features.sampling_rate)
        else:
            theirs = decode_online(recogniser, samples, features.sampling_rate)
            step = geometry.step_frames(MODES[file])
            used = [waveform[: (waveform.shape[0] - 1) // step * step] for waveform in frames]
        options = DecodingOptions(MODES[file], method, BEAM, *geometry.to_ms(), blank_penalty=blank_penalty)
        ours = _decode(model, used, tokenizer, options)
        for name, left, right in zip(recordings, ours, theirs, strict=True):
            if left != right:
                raise ValueError(
                    f"{file}, {method}: sherpa-onnx and PyTorch differ on {name}, {_first_difference(left, right)}"
                )
        num_tokens[file][method] = sum(len(waveform) for waveform in ours)
    return SherpaReport(sherpa_onnx.__version__, len(recordings), num_tokens)


def open_recogniser(folder: Path, file: str, features: FeatureConfig, **options: Any) -> Any:
    """sherpa-onnx's recogniser of an encoder file: an offline one for encoder-full.onnx and its int8 copy.

    Args:
      options: of `from_transducer`, as in joiner="joiner.int8.onnx"; files are those of the folder.
    """
    import sherpa_onnx

    files = {"encoder": file, "decoder": DECODER, "joiner": JOINER, "tokens": "tokens.txt"}
    files = {name: str(folder / options.pop(name, file)) for name, file in files.items()}
    is_offline = file in (FULL, int8_name(FULL))
    kind = sherpa_onnx.OfflineRecognizer if is_offline else sherpa_onnx.OnlineRecognizer
    return kind.from_transducer(
        **files, num_threads=1, sample_rate=features.sampling_rate, feature_dim=features.num_mel_bins,
        max_active_paths=BEAM, **options,
    )  # fmt: skip


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
    """What our search says, spelled."""
    lens = torch.tensor([len(frames) for frames in features])
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    search = build_search(TorchEngine(model), options, tokenizer.unk_id)
    return [spell(hypothesis, tokenizer) for hypothesis in decode_batch(model, search, padded, lens, options)]


def spell(hypothesis: Hypothesis, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """(token, encoder frame) pairs, tokens spelled as sherpa-onnx spells them."""
    symbols = map(tokenizer.id_to_symbol, hypothesis.tokens)
    return [(_spelling(symbol), frame) for symbol, frame in zip(symbols, hypothesis.timestamps, strict=True)]


def _spelling(symbol: str) -> str:
    """sherpa-onnx shows a space for the word mark, and the character for a byte token that is printable ASCII."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", symbol)
    if byte and 0x20 <= int(byte[1], 16) <= 0x7E:
        return chr(int(byte[1], 16))
    return symbol.replace(WORD_MARK, " ")


def read_results(results: list[Any]) -> list[list[tuple[str, int]]]:
    """(token, encoder frame) pairs of sherpa-onnx's results."""
    seconds = ENCODER_FRAME_MS / 1000
    return [
        [(token, round(time / seconds)) for token, time in zip(result.tokens, result.timestamps, strict=True)]
        for result in results
    ]


def decode_offline(recogniser: Any, samples: list[np.ndarray], sampling_rate: int) -> list[list[tuple[str, int]]]:
    streams = [recogniser.create_stream() for _ in samples]
    for stream, waveform in zip(streams, samples, strict=True):
        stream.accept_waveform(sampling_rate, waveform)
    recogniser.decode_streams(streams)
    return read_results([stream.result for stream in streams])


def decode_online(recogniser: Any, samples: list[np.ndarray], sampling_rate: int) -> list[list[tuple[str, int]]]:
    streams = [recogniser.create_stream() for _ in samples]
    for stream, waveform in zip(streams, samples, strict=True):
        stream.accept_waveform(sampling_rate, waveform)
        stream.input_finished()
    while ready := [stream for stream in streams if recogniser.is_ready(stream)]:
        recogniser.decode_streams(ready)
    return read_results([recogniser.get_result_all(stream) for stream in streams])


def _first_difference(ours: list[tuple[str, int]], theirs: list[tuple[str, int]]) -> str:
    for index, (left, right) in enumerate(zip(ours, theirs, strict=False)):
        if left != right:
            return f"token {index}: {right} (token, frame) against {left}"
    return f"{len(theirs)} tokens against {len(ours)}"
