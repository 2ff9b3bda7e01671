"""A recogniser without a model, for tests of the server: what a chunk of audio says is its first sample.

A chunk is 100 ms. Sample value n says the word "wn"; 0 is silence, and three silent chunks end a segment. The stable
text lacks the last word. REVISED says "maybe", and the full pass "surely". BROKEN makes decoding fail.
"""

from __future__ import annotations

import time

import numpy as np

from cascade.stream.decoder import Final, Partial, Segment
from cascade.stream.endpoint import EndpointOptions
from cascade.stream.words import Word, join_words

RATE = 1000
CHUNK = 100
REVISED, BROKEN = 999, 998


def speech(*values: int) -> np.ndarray:
    """(num_samples,) int16 samples that say these words, a chunk each."""
    return np.repeat(np.array(values, np.int16), CHUNK)


class FakeRecognizer:
    """As Recognizer. seconds: what a round of decoding takes."""

    name, sampling_rate, chunk_seconds, endpoint = "fake", RATE, CHUNK / RATE, EndpointOptions()

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.streams, self.most_streams = seconds, [], 0

    def stream(self, hotwords=None, *, keep_segments=True) -> FakeStream:
        self.streams.append(FakeStream(self))
        self.streams[-1].prefer(hotwords or [])
        return self.streams[-1]

    def check_hotwords(self, hotwords) -> None:
        for phrase in hotwords:
            if "?" in phrase:
                raise ValueError(f"hotword {phrase!r} has what the model's tokens cannot say: ?")
            if "!" in phrase:
                raise ImportError("turning text into bpe tokens needs the package sentencepiece")

    def advance(self) -> None:
        time.sleep(self.seconds)
        self.most_streams = max(self.most_streams, len(self.streams))
        for stream in [*self.streams]:
            stream.decode()


class FakeStream:
    def __init__(self, recognizer: FakeRecognizer) -> None:
        self._recognizer = recognizer
        self._waiting = np.zeros(0, np.int16)
        self._values: list[int] = []
        self._num_silent = 0
        self._first = self._num_heard = 0
        self._segments: list[Segment] = []
        self.is_ended, self.most_silent = False, 3

    def end_segments_after(self, silence) -> None:
        self.most_silent = 3 if silence is None else round(1000 * silence / CHUNK)

    def prefer(self, hotwords) -> None:
        self.hotwords = list(hotwords)

    def push(self, samples: np.ndarray, rate: int) -> None:
        if rate == 3 * RATE:  # the measurement at the start
            samples = np.zeros(len(samples) // 3, np.int16)
        elif rate != RATE:
            raise ValueError(f"sampling_rate must be {RATE}, got {rate}")
        if samples.dtype != np.int16:
            samples = np.round(samples).astype(np.int16)
        self._waiting = np.concatenate((self._waiting, samples))

    def end(self) -> None:
        self.is_ended = True

    def decode(self) -> None:
        while len(self._waiting) >= CHUNK or (self.is_ended and len(self._waiting)):
            value, self._waiting = int(self._waiting[0]), self._waiting[CHUNK:]
            if value == BROKEN:
                raise RuntimeError("broken")
            self._values.append(value)
            self._num_heard += 1
            self._num_silent = 0 if value else self._num_silent + 1
            if self._num_silent >= self.most_silent:
                self._end_segment()
        if self.is_ended:
            self._end_segment()
            self._recognizer.streams.remove(self)

    def _words(self, is_final: bool) -> tuple[Word, ...]:
        revised = "surely" if is_final else "maybe"
        return tuple(
            Word(revised if value == REVISED else f"w{value}", (self._first + place) / 10,
                 (self._first + place + 1) / 10, 0.9)
            for place, value in enumerate(self._values) if value
        )  # fmt: skip

    def _end_segment(self) -> None:
        words = self._words(is_final=True)
        if words:
            start, end = self._first / 10, self._num_heard / 10
            self._segments.append(Segment(start, end, join_words(words), words, 0, (), "silence_after_speech"))
        self._values, self._first, self._num_silent = [], self._num_heard, 0

    def _fetch(self) -> tuple[Segment, ...]:
        segments, self._segments = tuple(self._segments), []
        return segments

    def partial(self) -> Partial:
        words = self._words(is_final=False)
        return Partial(self._fetch(), join_words(words), join_words(words[:-1]), words, self._num_heard / 10)

    def final(self) -> Final:
        segments = self._fetch()
        text = " ".join(segment.text for segment in segments)
        return Final(segments, text, self._num_heard, self._num_heard / 10, 0)

    def leave(self) -> None:
        if self in self._recognizer.streams:
            self._recognizer.streams.remove(self)
