"""The one thread that runs the recogniser, for all clients together, and what passes between it and the event loop.

A client's audio waits in its `Session`, a few seconds of it at most: whoever sends faster waits, and its socket is not
read meanwhile. In every round the worker takes a chunk of audio from each session that has some, advances the
recogniser once, and hands the texts back. Nobody's hour of audio keeps others waiting longer than a chunk of it takes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from cascade.recognizer import Recognizer
from cascade.stream.decoder import Final, Partial, StreamingDecoder

QUEUE_SECONDS = 4.0
"""Audio of a client that may wait."""
MOST_RESULTS = 16
"""Texts that a client has not fetched: then its audio waits."""
OVERLOAD_SECONDS = 30.0
"""A client whose audio finds no room for so long is sent away."""
_END, _CLEAR = "end", "clear"


class Overloaded(Exception):
    """The server does not keep up."""


class Full(Exception):
    """There are as many sessions as there may be."""


class TooLong(Exception):
    """A client has sent as much audio as it may."""


@dataclass(frozen=True)
class Failure:
    """What stands in the place of a text. A fault of the client costs a packet, any other the stream so far."""

    message: str
    is_fault_of_client: bool
    duration: float = 0.0
    """Seconds of the stream that was lost."""


@dataclass(frozen=True)
class Cleared:
    """The answer to `Session.clear`: no text of what was heard before comes after it."""

    duration: float
    """Seconds of the stream that was forgotten."""


Result = Partial | Final | Failure | Cleared


class Session:
    """A client's audio on its way to the recogniser, and the texts on their way back.

    What says "in the worker" belongs to its thread, everything else to the event loop.

    Args:
      longest: seconds of audio that it may send altogether.
    """

    def __init__(self, worker: Worker, longest: float) -> None:
        self._worker, self._longest = worker, longest
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[str | tuple[np.ndarray, int]] = deque()
        self._outbox: deque[Result] = deque()
        self._has_room, self._has_results = asyncio.Event(), asyncio.Event()
        self._waiting = 0.0
        self._ends = 0  # that were asked for and not answered
        self._is_last = False
        self._stream: StreamingDecoder | None = None
        self._heard = self._decoded = 0.0
        self._ended = False
        self._hotwords: Sequence[str] = []
        self._silence: float | None = None
        self._preferred, self._ended_after = self._hotwords, self._silence  # by the stream
        self.seconds = 0.0
        """Audio that was sent."""

    async def push(self, samples: np.ndarray, rate: int) -> None:
        """Hand in samples as soon as there is room.

        Raises:
          Overloaded, TooLong: they are not taken.
        """
        seconds = samples.size / rate
        if self.seconds + seconds > self._longest:
            raise TooLong
        try:
            async with asyncio.timeout(OVERLOAD_SECONDS):
                while self._waiting >= QUEUE_SECONDS or len(self._outbox) >= MOST_RESULTS:
                    self._has_room.clear()
                    await self._has_room.wait()
        except TimeoutError:
            raise Overloaded from None
        self.seconds += seconds
        self._waiting += seconds
        self._put((samples, rate))

    @property
    def is_waiting(self) -> bool:
        """The recogniser has audio to hear or an end to answer."""
        return self._ends > 0 or self._waiting > 1e-6

    def end(self, is_last: bool = False) -> None:
        """The audio so far is a whole: decode it to its end at once; a Final (or a Failure) answers.

        Args:
          is_last: nothing comes after it, and `results` ends with the answer.
        """
        self._ends += 1
        self._is_last |= is_last
        self._put(_END)

    def clear(self) -> None:
        """Forget the audio since the last end; Cleared answers."""
        self._put(_CLEAR)

    def prefer(self, hotwords: Sequence[str]) -> None:
        """Prefer these phrases from the next audio on; `Recognizer.check_hotwords` has found no fault in them."""
        self._hotwords = hotwords

    def end_segments_after(self, silence: float | None) -> None:
        """Let so many seconds of silence end segments from the next audio on; None: as many as the recogniser's."""
        self._silence = silence

    async def results(self) -> AsyncIterator[Result]:
        """The texts as they come. Partials that nobody fetched in time are one, the newest."""
        while True:
            while self._outbox:
                yield self._outbox.popleft()
                self._has_room.set()
            if self._is_last and not self._ends:
                return
            self._has_results.clear()
            await self._has_results.wait()

    def _put(self, message: str | tuple[np.ndarray, int]) -> None:
        self._inbox.append(message)
        self._worker.wake()

    def _deliver(self, result: Result | None, seconds: float, answers_end: bool) -> None:
        """In the event loop: a result, and the audio that was taken for it."""
        self._waiting -= seconds
        self._has_room.set()
        self._ends -= answers_end
        if result is None:
            return
        last = self._outbox[-1] if self._outbox else None
        if isinstance(last, Partial) and isinstance(result, Partial):
            self._outbox[-1] = replace(result, segments=last.segments + result.segments)
        else:
            self._outbox.append(result)
        self._has_results.set()

    def feed(self, recognizer: Recognizer) -> bool:
        """In the worker: let the stream hear its next chunk; False if there was nothing to do."""
        if not self._inbox:
            return False
        wanted, taken = recognizer.chunk_seconds, 0.0
        while self._inbox and taken < wanted and not self._ended:
            message = self._inbox.popleft()
            if message == _CLEAR:
                self._post(Cleared(self.forget()))
            elif message == _END:
                self._ended = True
                self._open(recognizer).end()
            else:
                samples, rate = message
                count = max(1, round((wanted - taken) * rate))
                try:
                    self._open(recognizer).push(samples[:count], rate)
                except ValueError as error:  # the rest of the packet would do no better
                    count = samples.size
                    self._post(Failure(str(error), is_fault_of_client=True))
                if samples.size > count:
                    self._inbox.appendleft((samples[count:], rate))
                seconds = min(count, samples.size) / rate
                taken += seconds
                self._heard += seconds
        self._worker.audio_seconds += taken
        self._post(seconds=taken)
        return True

    def collect(self) -> None:
        """In the worker: what the stream says after the recogniser has advanced."""
        if self._ended:
            final, self._stream, self._ended = self._stream.final(), None, False
            self._post(final, answers_end=True)
        elif self._stream is not None:
            partial = self._stream.partial()
            if partial.segments or partial.decoded != self._decoded:
                self._decoded = partial.decoded
                self._post(partial)

    def fail(self, message: str) -> None:
        """In the worker: the stream is lost; the next audio begins a new one."""
        if self._stream is not None:
            answers_end = self._ended
            self._post(Failure(message, False, self.forget()), answers_end=answers_end)

    def forget(self) -> float:
        """In the worker: break the stream off; returns the seconds that it heard."""
        if self._stream is not None:
            self._stream.leave()
        heard = 0.0 if self._stream is None else self._heard
        self._stream, self._ended = None, False
        return heard

    def _open(self, recognizer: Recognizer) -> StreamingDecoder:
        hotwords, silence = self._hotwords, self._silence
        if self._stream is None:
            self._stream = recognizer.stream(hotwords, keep_segments=False)
            self._heard = self._decoded = 0.0
            self._ended_after = None
        elif hotwords is not self._preferred:
            self._stream.prefer(hotwords)
        if silence != self._ended_after:
            self._stream.end_segments_after(silence)
        self._preferred, self._ended_after = hotwords, silence
        return self._stream

    def _post(self, result: Result | None = None, seconds: float = 0.0, answers_end: bool = False) -> None:
        self._loop.call_soon_threadsafe(self._deliver, result, seconds, answers_end)


class Worker:
    """Owns the recogniser: its thread makes it and alone touches it.

    Args:
      make_recognizer: called in the thread.
      max_streams: sessions at a time; None: as many as a measurement at the start says.
      longest: seconds of audio that a session may send.
    """

    def __init__(
        self, make_recognizer: Callable[[], Recognizer], max_streams: int | None = None, longest: float = 3600.0
    ) -> None:
        self._make_recognizer, self.max_streams, self._longest = make_recognizer, max_streams, longest
        self._wake = threading.Event()
        self._stopped = False
        self._sessions: list[Session] = []
        self._leaving: deque[Session] = deque()
        self._thread = threading.Thread(target=self._run, name="recogniser", daemon=True)
        self.audio_seconds = self.compute_seconds = 0.0
        self.num_rounds = self.num_failures = 0

    async def start(self) -> Recognizer:
        """Wait until the recogniser is made, and return it, to be asked for its name and rate only."""
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Future[Recognizer] = self._loop.create_future()
        self._thread.start()
        return await self._made

    def stop(self) -> None:
        """End the thread after its round."""
        self._stopped = True
        self.wake()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def wake(self) -> None:
        self._wake.set()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session, which leaves at the end whatever happens.

        Raises:
          Full: there are max_streams.
        """
        if len(self._sessions) >= self.max_streams:
            raise Full
        session = Session(self, self._longest)
        self._sessions = [*self._sessions, session]  # a new list: the thread may be walking through the old one
        try:
            yield session
        finally:
            self._sessions = [other for other in self._sessions if other is not session]
            self._leaving.append(session)
            self.wake()

    def _run(self) -> None:
        try:
            recognizer = self._make_recognizer()
            capacity = measure_capacity(recognizer)  # in any case: what is loaded late is loaded now
            self.max_streams = self.max_streams or capacity
        except Exception as error:
            self._loop.call_soon_threadsafe(self._made.set_exception, error)
            return
        self._loop.call_soon_threadsafe(self._made.set_result, recognizer)
        while not self._stopped:
            self._wake.wait()
            self._wake.clear()
            while not self._stopped and self._round(recognizer):
                pass

    def _round(self, recognizer: Recognizer) -> bool:
        """A chunk of every session that has one; False if none had."""
        start = time.perf_counter()
        while self._leaving:
            self._leaving.popleft().forget()
        sessions = self._sessions
        try:
            busy = [session for session in sessions if session.feed(recognizer)]
            if not busy:
                return False
            recognizer.advance()
            for session in busy:
                session.collect()
        except Exception:  # whose audio it was is not known, and the batch may be half advanced: all begin anew
            logging.exception("decoding failed, %d streams begin anew", len(sessions))
            self.num_failures += 1
            for session in sessions:
                session.fail("decoding failed, this stream begins anew")
        self.compute_seconds += time.perf_counter() - start
        self.num_rounds += 1
        return True


def measure_capacity(recognizer: Recognizer, num_streams: int = 4, seconds: float = 2.0) -> int:
    """How many streams of speech this machine follows in real time, half of its time kept free for bursts.

    Streams of noise, at a browser's rate, are decoded together to their end; the best of three trials counts, the first
    one warms up.
    """
    rate = 3 * recognizer.sampling_rate
    noise = np.random.default_rng(0).normal(0.0, 0.1, (num_streams, round(seconds * rate))).astype(np.float32)
    step = round(recognizer.chunk_seconds * rate)
    elapsed = []
    for _ in range(3):
        start = time.perf_counter()
        streams = [recognizer.stream() for _ in range(num_streams)]
        for begin in range(0, noise.shape[1], step):
            for stream, samples in zip(streams, noise, strict=True):
                stream.push(samples[begin : begin + step], rate)
            recognizer.advance()
        for stream in streams:
            stream.end()
        recognizer.advance()
        elapsed.append(time.perf_counter() - start)
    return max(1, int(0.5 * num_streams * seconds / min(elapsed)))
