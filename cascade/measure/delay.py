"""Delays of words: from the end of a spoken word to the moment a stream shows it, mode by mode.

All times are seconds of audio from the start of the stream; compute is measured apart, so that these numbers are the
same on every machine. For a word that was recognised correctly, with e its true end:

- emission delay, (f + 1) 40 ms - e: f is the frame in which the search said the word's last token. It may be negative.
- word delay, w - e: w is how much audio had come in when the word stood on the screen, as it stays in the final text:
  the end of the chunk (look-ahead block, utterance) that the decoder needed, and the half of the feature window that
  reaches beyond it; at most the end of the recording.
- final delay, g - e of the last true word: g is when the whole text is final. The streaming and the look-ahead pass
  never take a word back, their text is final when its last word comes. The full pass has its text when the stream is
  closed, here at the end of the recording.
- endpoint delay, the same when nobody closes the stream: silence goes on, and the endpoint rule ends the segment.

The algorithmic delay of a mode is what its chunks and blocks alone cost: a moment of audio waits for its chunk to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from cascade.audio.fbank import WINDOW_MS
from cascade.config.options import ENCODER_FRAME_MS, FRAME_SHIFT_MS, SUBSAMPLING
from cascade.measure.wer import align
from cascade.models.torch_engine import TorchEngine
from cascade.models.transducer import CascadedTransducer
from cascade.search.methods import DecodingOptions
from cascade.stream.batch import StreamBatch
from cascade.stream.endpoint import EndpointOptions, find_endpoint
from cascade.stream.modes import Stream
from cascade.stream.words import NOTHING, Word, words_of
from cascade.text.tokens import Tokenizer

FRONT_END_MS = (WINDOW_MS - FRAME_SHIFT_MS) / 2
"""Audio that a feature frame's window needs beyond the frame's own 10 ms; the subsampling looks left only."""
_STREAMS_AT_ONCE = 20
_QUANTILES = tuple(range(0, 101, 5))


class SpokenWord(Protocol):
    """A word of the reference and where it was spoken, in seconds."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Screen:
    """The words that a stream shows from a moment on."""

    time: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class Watched:
    """One utterance as its user saw it."""

    duration: float
    screens: tuple[Screen, ...]
    """After every chunk; the last one shows the final text."""
    words: tuple[Word, ...]
    """The final text, with the times of its pass."""
    last_frame: int | None
    """The frame of the last token that was shown before the end; None: nothing was."""
    num_changed: int
    """Words that were shown and then changed or taken back by a later pass: flicker."""
    num_changed_at_end: int
    """Those of them that the full pass changed, when the stream was closed."""


def algorithmic_delay(options: DecodingOptions) -> dict[str, float | None]:
    """Mean and longest wait, in ms, of a moment of audio for the chunk or block it lies in; None: for the utterance."""
    if options.mode == "full":
        return {"algorithmic_delay_ms_mean": None, "algorithmic_delay_ms_max": None}
    length = options.look_ahead_ms if options.mode == "look_ahead" else options.chunk_ms
    return {
        "algorithmic_delay_ms_mean": length / 2 + FRONT_END_MS, "algorithmic_delay_ms_max": length + FRONT_END_MS,
    }  # fmt: skip


def audio_needed(num_feature_frames: int, duration: float) -> float:
    """Seconds of audio until so many feature frames are complete, in a recording of `duration` seconds."""
    return min((num_feature_frames * FRAME_SHIFT_MS + FRONT_END_MS) / 1000, duration)


def watch_streams(
    model: CascadedTransducer, tokenizer: Tokenizer, options: DecodingOptions, features: Sequence[Tensor]
) -> list[Watched]:
    """Stream utterances, each (T, F) unnormalised log-mel frames, chunk by chunk, and note what is shown when."""
    batch, watched = StreamBatch(TorchEngine(model), tokenizer, options), []
    for begin in range(0, len(features), _STREAMS_AT_ONCE):
        watched += _watch_together(batch, tokenizer, features[begin : begin + _STREAMS_AT_ONCE])
    return watched


def _watch_together(batch: StreamBatch, tokenizer: Tokenizer, features: Sequence[Tensor]) -> list[Watched]:
    size = batch.options.chunk_ms // ENCODER_FRAME_MS * SUBSAMPLING
    streams = [batch.join() for _ in features]
    durations = [frames.shape[0] * FRAME_SHIFT_MS / 1000 for frames in features]
    screens: list[list[Screen]] = [[] for _ in features]
    watched: list[Watched | None] = [None] * len(features)
    last_frames: list[int | None] = [None] * len(features)
    for position in range(0, max(frames.shape[0] for frames in features) + 1, size):
        heard = [row for row in range(len(features)) if watched[row] is None]
        for row in heard:
            part = features[row][position : position + size]
            batch.accept(streams[row], part.numpy())
            if part.shape[0] < size:
                batch.finish(streams[row])
        changed = [stream.num_changed_words for stream in streams]
        batch.run()
        for row in heard:
            stream, duration = streams[row], durations[row]
            if stream.closed:
                last_frame = last_frames[row]
                watched[row] = _ended(stream, screens[row], duration, last_frame, changed[row], tokenizer)
            else:
                words = words_of(stream.shown, tokenizer, duration=duration, complete=False)
                time = audio_needed(position + size, duration)
                screens[row].append(Screen(time, tuple(word.word for word in words)))
                last_frames[row] = stream.shown.timestamps[-1] if stream.shown.timestamps else None
    return watched


def _ended(
    stream: Stream, screens: list[Screen], duration: float, last_frame: int | None, num_changed: int,
    tokenizer: Tokenizer,
) -> Watched:  # fmt: skip
    final = stream.segments[0].hypotheses[0] if stream.segments else NOTHING
    words = words_of(final, tokenizer, duration=duration)
    if final.timestamps and last_frame is None:  # all of it came with the end
        last_frame = final.timestamps[-1]
    return Watched(
        duration, (*screens, Screen(duration, tuple(word.word for word in words))), words, last_frame,
        stream.num_changed_words, stream.num_changed_words - num_changed,
    )


def settle_times(watched: Watched) -> list[float]:
    """Times at which the words of the final text came to stand on the screen to stay."""
    *earlier, last = watched.screens
    times, standing = [last.time] * len(last.words), set(range(len(last.words)))
    for screen in reversed(earlier):
        standing &= _shown_places(last.words, screen.words)
        for place in standing:
            times[place] = screen.time
        if not standing:
            break
    return times


def _shown_places(final: Sequence[str], shown: Sequence[str]) -> set[int]:
    """Places of the final words that a screen shows: those of the common beginning, then those of the alignment."""
    pairs = zip(final, shown, strict=False)
    same = next((place for place, (word, other) in enumerate(pairs) if word != other), min(len(final), len(shown)))
    matches = correct_words(final[same:], shown[same:]) if len(shown) > same else []
    return set(range(same)) | {same + place for place, _ in matches}


def correct_words(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[int, int]]:
    """(place in the reference, place in the hypothesis) of the words that are the same in the best alignment."""
    i = j = 0
    places = []
    for word, other in align(reference, hypothesis):
        if word == other:
            places.append((i, j))
        i, j = i + (word is not None), j + (other is not None)
    return places


def usable_words(words: Sequence[SpokenWord], text: Sequence[str], tokenizer: Tokenizer) -> list[float] | None:
    """The end of every word of a normalised reference, from an alignment of its raw words; None if they differ."""
    pairs = [(tokenizer.normalize(word.word), word.end) for word in words]
    pairs = [(word, end) for word, end in pairs if word]
    return [end for _, end in pairs] if [word for word, _ in pairs] == list(text) else None


@dataclass
class Delays:
    """The delays of a mode's utterances, in seconds."""

    emission: list[float]
    word: list[float]
    final: list[float]
    endpoint: list[float]

    def row(self) -> dict[str, Any]:
        """Means and percentiles in ms."""
        row: dict[str, Any] = {"num_correct_words": len(self.word)}
        for name in ("emission", "word", "final", "endpoint"):
            row |= summary(f"{name}_delay_ms", [1000 * value for value in getattr(self, name)])
        for name in ("emission", "word"):
            values = getattr(self, name)
            quantiles = np.percentile(values, _QUANTILES).tolist() if values else []
            row[f"{name}_delay_ms_quantiles"] = [round(1000 * value, 1) for value in quantiles]
        return row


def summary(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """`name`_mean, _p50 and _p90; None without values."""
    if not len(values):
        return dict.fromkeys((f"{name}_mean", f"{name}_p50", f"{name}_p90"))
    p50, p90 = np.percentile(values, [50, 90])
    numbers = {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90)}
    return {f"{name}_{key}": round(value, 1) for key, value in numbers.items()}


def measure_delays(
    watched: Sequence[Watched], texts: Sequence[Sequence[str]], ends: Sequence[Sequence[float]],
    options: DecodingOptions, last_frames: Sequence[int | None],
) -> Delays:  # fmt: skip
    """The delays of one mode.

    Args:
      texts, ends: the reference's words of every utterance and where each one ends.
      last_frames: the frame of the last token of the pass that looks for endpoints.
    """
    delays = Delays([], [], [], [])
    for utterance, text, true_ends, last_frame in zip(watched, texts, ends, last_frames, strict=True):
        settled = settle_times(utterance)
        for place, said in correct_words(text, [word.word for word in utterance.words]):
            delays.emission.append(utterance.words[said].end - true_ends[place])
            delays.word.append(settled[said] - true_ends[place])
        if not utterance.words:
            continue
        final = max(settled) if options.mode in ("streaming", "look_ahead") else utterance.duration
        delays.final.append(final - true_ends[-1])
        if last_frame is not None:
            delays.endpoint.append(endpoint_time(last_frame, options) - true_ends[-1])
    return delays


def endpoint_time(last_frame: int, options: DecodingOptions) -> float:
    """The time at which the default rules end a segment with its last token in `last_frame`, if silence follows."""
    step = (options.look_ahead_ms if options.mode == "look_ahead" else options.chunk_ms) // ENCODER_FRAME_MS
    rules, num_frames = EndpointOptions(), (last_frame // step + 1) * step
    while find_endpoint(rules, num_frames, last_frame, step) is None:
        num_frames += step
    return (num_frames * ENCODER_FRAME_MS + FRONT_END_MS) / 1000


def flicker(watched: Sequence[Watched]) -> dict[str, Any]:
    """Counts of the words that later passes change after they were shown."""
    changed = sum(utterance.num_changed for utterance in watched)
    at_end = sum(utterance.num_changed_at_end for utterance in watched)
    words = sum(len(utterance.words) for utterance in watched)
    minutes = sum(utterance.duration for utterance in watched) / 60
    return {
        "num_words": words,
        "num_changed_words": changed,
        "changed_words_percent": round(100 * changed / words, 2) if words else None,
        "changed_by_look_ahead": changed - at_end,
        "changed_by_full": at_end,
        "flicker_per_minute": round(changed / minutes, 2) if minutes else None,
    }
