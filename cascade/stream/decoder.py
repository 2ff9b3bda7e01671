"""Decode speech while it comes in: packets of samples to words with times, in every mode of `modes`.

    decoder = StreamingDecoder(engine, config, tokenizer, endpoint=EndpointOptions())
    for samples in packets:
        partial = decoder.accept(samples, 16000)
    final = decoder.finish()

What comes out depends on the audio alone, not on its packets. Decoders that share a StreamBatch advance together:
`push` their packets, call `batch.run()` once, read every `partial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cascade.audio.fbank import num_feature_frames
from cascade.audio.packets import AudioInput
from cascade.config.options import FRAME_SHIFT_MS, SUBSAMPLING, Config
from cascade.search.hypothesis import Hypothesis
from cascade.search.methods import DecodingOptions
from cascade.stream.batch import StreamBatch
from cascade.stream.endpoint import EndpointOptions
from cascade.stream.engine import Engine
from cascade.stream.modes import EndedSegment
from cascade.stream.words import Word, frame_seconds, join_words, words_of
from cascade.text.normal import join_texts
from cascade.text.tokens import Tokenizer


@dataclass(frozen=True)
class Segment:
    """A stretch of audio between two endpoints and its final text; times in seconds from the stream's start."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...]
    first_frame: int
    """The 40 ms frame from which the hypotheses' timestamps count."""
    hypotheses: tuple[Hypothesis, ...]
    """Of the last pass, best first (greedy search has one); the text is the first one's."""
    rule: str
    """Rule that ended it: silence_after_speech | late_pause | longest_segment | silence_from_start | end_of_stream."""


@dataclass(frozen=True)
class Partial:
    """The text so far."""

    segments: tuple[Segment, ...]
    """Final, with this call; each is handed out once."""
    text: str
    """Of the open segment, so far; always empty in mode full."""
    stable_text: str
    """The beginning of `text` that only the full pass can still change; the last word of it may grow."""
    words: tuple[Word, ...]
    """Of `text`."""
    decoded: float = 0.0
    """Seconds of the stream that were decoded."""


@dataclass(frozen=True)
class Final:
    """The end of a stream."""

    segments: tuple[Segment, ...]
    """All of the stream; with keep_segments=False those that became final with this call."""
    text: str
    """Of these segments."""
    num_frames: int
    """40 ms encoder frames decoded; 0: the audio was too short to say anything."""
    duration: float
    """Seconds of audio."""
    num_changed_words: int
    """Words that were shown and then changed or taken back, by the same pass (beam search) or a later one: flicker."""

    @property
    def words(self) -> tuple[Word, ...]:
        """Of these segments."""
        return tuple(word for segment in self.segments for word in segment.words)


class StreamingDecoder:
    """One stream of audio.

    Args:
      engine: runs the model of this config and tokenizer, TorchEngine(model) for one.
      options: how to decode; the mode may be two_pass. None: in mode two_pass, as the model's decoding section says;
        `DecodingOptions.for_model(config, ...)` keeps that section with other options.
      endpoint: rules that end segments; None: the stream is one segment, decoded as `decode` decodes a whole utterance,
        and memory grows with it.
      batch: a StreamBatch to share; `options` and `endpoint` are then the batch's, and are not given.
      keep_segments: False for endless streams: every segment is handed out once, and forgotten.
      hotwords: see `StreamBatch.prefer`.
    """

    def __init__(
        self, engine: Engine, config: Config, tokenizer: Tokenizer, options: DecodingOptions | None = None,
        endpoint: EndpointOptions | None = None, *, batch: StreamBatch | None = None, keep_segments: bool = True,
        hotwords: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if batch is None:
            options = options or DecodingOptions.for_model(config, mode="two_pass")
            batch = StreamBatch(engine, tokenizer, options, endpoint)
        elif options is not None or endpoint is not None:
            raise ValueError("options and endpoint belong to the batch: give them to StreamBatch, not to its decoders")
        self.batch = batch
        self._tokenizer, self._features, self._keep = tokenizer, config.features, keep_segments
        self._hotwords, self._silence = hotwords, None
        self._start()

    def prefer(self, hotwords: Sequence[str]) -> None:
        """Other phrases of its own from now on: see `StreamBatch.prefer`."""
        if self._stream.finished:
            raise ValueError("the stream has ended: reset() starts a new one")
        self.batch.prefer(self._stream, hotwords)
        self._hotwords = hotwords

    def end_segments_after(self, silence: float | None) -> None:
        """Another silence ends segments from now on: see `StreamBatch.end_segments_after`."""
        self.batch.end_segments_after(self._stream, silence)
        self._silence = silence

    def accept(self, samples: np.ndarray, sampling_rate: int) -> Partial:
        """Hear (num_samples,) int16 samples, or floating-point ones in [-1, 1], and decode what is complete.

        Raises:
          ValueError: samples of another kind, a sampling rate that is none or changes, or the stream has ended.
        """
        self.push(samples, sampling_rate)
        self.batch.run()
        return self.partial()

    def finish(self) -> Final:
        """Decode what is left, to the last frame. Calling it again gives the same."""
        self.end()
        self.batch.run()
        return self.final()

    def push(self, samples: np.ndarray, sampling_rate: int) -> None:
        """Hear samples, decode nothing yet."""
        if self._stream.finished:
            raise ValueError("the stream has ended: reset() starts a new one")
        self.batch.accept(self._stream, self._audio.accept(samples, sampling_rate))

    def end(self) -> None:
        """No more audio will come; the batch's next run decodes the rest."""
        if not self._stream.finished:
            self.batch.accept(self._stream, self._last_features())
            self.batch.finish(self._stream)

    def partial(self) -> Partial:
        """The text so far, as far as the batch has run."""
        stream = self._stream
        new = self._fetch()
        if new or self._seen_steps != stream.num_steps:
            self._seen_steps = stream.num_steps
            words = words_of(
                stream.shown, self._tokenizer, stream.first_frame, self._audio.duration, complete=False,
                calibration=self.batch.options.calibration,
            )
            text, stable = join_words(words), self.batch.stable_tokens(stream)
            stable_text = text if stable == stream.shown.tokens else self._tokenizer.decode(stable, complete=False)
            decoded = frame_seconds(stream.first_frame + stream.num_frames)
            self._open = Partial((), text, stable_text, words, decoded)
        return replace(self._open, segments=new) if new else self._open

    def final(self) -> Final:
        """The whole stream, after `end` and a run of the batch."""
        if not self._stream.closed:
            raise ValueError("the stream is not decoded to its end: call finish(), or end() and the batch's run()")
        new = self._fetch()
        if not self._keep:
            self._last += new
        segments = tuple(self._segments) if self._keep else self._last
        return Final(
            segments, join_texts(segment.text for segment in segments), self._stream.first_frame, self._audio.duration,
            self._stream.num_changed_words,
        )  # fmt: skip

    def leave(self) -> None:
        """Break the stream off: it leaves the batch, what was not final is lost."""
        if not self._stream.closed:
            self._stream.finished = self._stream.closed = True
            self.batch.leave(self._stream)

    def __del__(self) -> None:
        """A stream that nobody holds any more, and that was not brought to its end, takes no further memory or time."""
        stream = getattr(self, "_stream", None)
        if stream is not None and not stream.closed:
            self.batch.give_up(stream)

    def reset(self) -> None:
        """Forget everything and start a new stream."""
        self.leave()
        self._start()

    def _last_features(self) -> np.ndarray:
        """(t, F) frames that end the stream; silence fills its last chunk where the engine knows full ones only."""
        if not self.batch.engine.whole_chunks:
            return self._audio.finish()
        size = self.batch.chunk_features
        frames = self._audio.finish((size + 1) * FRAME_SHIFT_MS / 1000)  # a frame may be lost in rounding a length
        rate = self._features.sampling_rate
        if num_feature_frames(round(self._audio.duration * rate), rate) < SUBSAMPLING:
            return frames[:0]  # too little to be a frame is not made one by silence
        heard = SUBSAMPLING * (self._stream.first_frame + self._stream.num_frames) + self._stream.num_waiting
        return frames[: (heard + len(frames)) // size * size - heard]

    def _start(self) -> None:
        self._audio = AudioInput(self._features)
        self._stream = self.batch.join()
        try:
            self.batch.prefer(self._stream, self._hotwords)
        except ValueError:
            self.leave()
            raise
        if self._silence is not None:
            self.batch.end_segments_after(self._stream, self._silence)
        self._segments: list[Segment] = []
        self._last: tuple[Segment, ...] = ()
        self._open = Partial((), "", "", ())
        self._seen_steps = 0

    def _fetch(self) -> tuple[Segment, ...]:
        """The segments that became final since the last call."""
        new = tuple(self._segment(ended) for ended in self._stream.segments)
        self._stream.segments.clear()
        if self._keep:
            self._segments.extend(new)
        return new

    def _segment(self, ended: EndedSegment) -> Segment:
        duration = self._audio.duration
        words = words_of(
            ended.hypotheses[0], self._tokenizer, ended.first_frame, duration,
            calibration=self.batch.options.calibration,
        )  # fmt: skip
        return Segment(
            start=frame_seconds(ended.first_frame),
            end=min(frame_seconds(ended.first_frame + ended.num_frames), duration),
            text=join_words(words),
            words=words,
            first_frame=ended.first_frame,
            hypotheses=ended.hypotheses,
            rule=ended.rule,
        )
