"""Compute of decoding: the first pass of one stream, timed chunk by chunk; every mode's steps and last step.

A chunk's compute is the causal encoder's `forward_chunk`, the projection to the joiner and the greedy search over the
chunk's frames; features are not in it. Models that are compared are timed in turns, chunk by chunk (the modes'
steps: utterance by utterance), so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.checkpoint import load_model
from cascade.config.load import load_config
from cascade.config.options import ENCODER_FRAME_MS, SUBSAMPLING, Config
from cascade.models.build import build_model
from cascade.models.torch_engine import TorchEngine
from cascade.models.transducer import CascadedTransducer
from cascade.search.greedy import GreedySearch
from cascade.search.methods import DecodingOptions
from cascade.stream.batch import StreamBatch
from cascade.text.tokens import Tokenizer

_FRAMES_PER_SYMBOL = 10
"""Pace of a model with random weights, whose own means nothing: 2.5 symbols a second, about English in BPE-500."""
_WARM_UP_CHUNKS = 10
NOISE_FRAMES = 3000


class _PacedSearch(GreedySearch):
    """Greedy search that says its best symbol at every 10th frame and nothing between, at the usual cost."""

    def choose(self, logits: np.ndarray, frames: np.ndarray) -> np.ndarray:
        return np.maximum(super().choose(logits, frames), 1) * (frames % _FRAMES_PER_SYMBOL == 0)


@dataclass(frozen=True)
class ModelSource:
    """The folder of a trained model, or a config, whose weights are then random."""

    folder: str | None = None
    files: Sequence[str] = ()
    overrides: Sequence[str] = ()
    blank_penalty: float | None = None
    """Instead of the model's own."""


@dataclass(frozen=True)
class Spoken:
    """One utterance: its reference's words and its (T, F) features."""

    id: str
    text: list[str]
    features: Tensor


@dataclass
class TimedModel:
    """One model under the clock; a tokenizer and a folder only has a trained one."""

    name: str
    model: CascadedTransducer
    config: Config
    blank_penalty: float
    features: Tensor
    """(T, F) unnormalised log-mel frames that the stream hears, again and again."""
    tokenizer: Tokenizer | None = None
    folder: Path | None = None
    speech: list[Spoken] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    num_symbols: int = 0


def open_model(source: ModelSource) -> TimedModel:
    """The model, and noise with the mean and spread of its training data for it to hear."""
    if source.folder is not None:
        folder, name = Path(source.folder), Path(source.folder).resolve().name
        model, config, tokenizer = load_model(folder)
    else:
        folder, name = None, Path(source.files[-1]).stem if source.files else "defaults"
        config, tokenizer = load_config(source.files, source.overrides), None
        torch.manual_seed(config.seed)
        model = build_model(config, config.tokens.vocab_size).eval()
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(NOISE_FRAMES, config.features.num_mel_bins, generator=generator)
    features = model.encoder.feature_mean + noise / model.encoder.feature_scale
    penalty = DecodingOptions.for_model(config, blank_penalty=source.blank_penalty).blank_penalty
    return TimedModel(name, model, config, penalty, features, tokenizer, folder)


def chunk_runner(timed: TimedModel, chunk_frames: int, left_frames: int) -> Callable[[], None]:
    """A function that decodes the stream's next chunk and notes its time."""
    engine = TorchEngine(timed.model)
    if timed.tokenizer is None:
        search = _PacedSearch(engine, timed.blank_penalty)
    else:
        search = GreedySearch(engine, timed.blank_penalty, timed.tokenizer.unk_id)
    encoder = engine.causal_rows(left_frames)
    stream, row, lens, num_tokens = encoder.join(), search.join(), np.array([chunk_frames]), 0
    size, position = chunk_frames * SUBSAMPLING, 0
    features = timed.features.repeat(1 + size // max(1, timed.features.shape[0]), 1).numpy()

    def run() -> None:
        nonlocal num_tokens, position
        if position + size > features.shape[0]:
            position = 0
        chunk = features[None, position : position + size]
        position += size
        start = time.perf_counter()
        encoder_out = encoder.advance([stream], chunk, SUBSAMPLING * lens)
        search.advance([row], engine.project(encoder_out), lens)
        timed.times_ms.append(1000 * (time.perf_counter() - start))
        before, num_tokens = num_tokens, int(search.places.num_tokens[row, 0])
        timed.num_symbols += num_tokens - before

    return run


def time_chunks(models: list[TimedModel], num_chunks: int, chunk_ms: int, left_context_ms: int) -> None:
    """Time `num_chunks` chunks of every model, in turns, after a warm-up; fills `times_ms` and `num_symbols`."""
    chunk_frames, left_frames = chunk_ms // ENCODER_FRAME_MS, left_context_ms // ENCODER_FRAME_MS
    runners = [chunk_runner(timed, chunk_frames, left_frames) for timed in models]
    for index in range(_WARM_UP_CHUNKS + num_chunks):
        if index == _WARM_UP_CHUNKS:
            for timed in models:
                timed.times_ms.clear()
                timed.num_symbols = 0
        for run in runners[index % len(runners) :] + runners[: index % len(runners)]:
            run()


def summarise(timed: TimedModel, chunk_ms: int, left_context_ms: int) -> dict[str, Any]:
    """The row of one model: milliseconds per chunk, and rtf = compute / audio."""
    p50, p95, p99 = np.percentile(timed.times_ms, [50, 95, 99])
    audio_ms = chunk_ms * len(timed.times_ms)
    return {
        "model": timed.name,
        "chunk_ms": chunk_ms,
        "left_context_ms": left_context_ms,
        "blank_penalty": timed.blank_penalty,
        "chunk_compute_ms_p50": round(float(p50), 3),
        "chunk_compute_ms_p95": round(float(p95), 3),
        "chunk_compute_ms_p99": round(float(p99), 3),
        "rtf": round(sum(timed.times_ms) / audio_ms, 5),
        "num_chunks": len(timed.times_ms),
        "symbols_per_second": round(1000 * timed.num_symbols / audio_ms, 2),
    }


@dataclass
class ModeTimes:
    """Milliseconds of compute of one stream at a time, in one mode."""

    steps: list[float] = field(default_factory=list)
    """Of every chunk that brought new text: in mode look_ahead those that complete a block, in mode full none."""
    last: list[float] = field(default_factory=list)
    """From the end of an utterance to its final text."""

    def row(self) -> dict[str, float | None]:
        """Median and 95th percentile of both."""
        row = {}
        for name, values in (("step", self.steps), ("final", self.last)):
            percentiles = np.percentile(values, [50, 95]).tolist() if values else [None, None]
            for percentile, value in zip(("p50", "p95"), percentiles, strict=True):
                row[f"{name}_compute_ms_{percentile}"] = None if value is None else round(value, 3)
        return row


def time_mode(
    models: Sequence[tuple[CascadedTransducer, Tokenizer, DecodingOptions, Sequence[Tensor]]],
) -> list[ModeTimes]:
    """Stream utterances one at a time, in turns through every model.

    Args:
      models: each with its tokenizer, its options of this mode and what it hears, (T, F) unnormalised log-mel frames
        of the same utterances.
    """
    batches = [StreamBatch(TorchEngine(model), tokenizer, options) for model, tokenizer, options, _ in models]
    times = [ModeTimes() for _ in models]
    for number in range(len(models[0][3])):
        for batch, mode_times, (_, _, _, features) in zip(batches, times, models, strict=True):
            if number == 0:
                _time_utterance(batch, features[0], ModeTimes())  # warms up
            _time_utterance(batch, features[number], mode_times)
    return times


def _time_utterance(batch: StreamBatch, frames: Tensor, times: ModeTimes) -> None:
    options, stream = batch.options, batch.join()
    size = options.chunk_ms // ENCODER_FRAME_MS * SUBSAMPLING
    for position in range(0, frames.shape[0] + 1, size):
        part = frames[position : position + size]
        batch.accept(stream, part.numpy())
        if part.shape[0] < size:
            batch.finish(stream)
        start = time.perf_counter()
        batch.run()
        spent = 1000 * (time.perf_counter() - start)
        if stream.closed:
            times.last.append(spent)
        elif options.mode != "full" and not (options.mode == "look_ahead" and stream.num_block_frames):
            times.steps.append(spent)
