"""Recordings and a pipe, decoded together: what becomes of each input, whatever goes wrong with one of them."""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cascade.stream.decoder import Segment, StreamingDecoder
from cascade.stream.inputs import PipeStop, file_packets, pipe_packets
from cascade.text.normal import join_texts

PIPE = "-"
"""The name of standard input."""


@dataclass
class Transcript:
    """One input's text, or what was wrong with it."""

    path: str
    segments: list[Segment] = field(default_factory=list)
    error: str | None = None

    @property
    def name(self) -> str:
        return "standard input" if self.path == PIPE else self.path

    def as_json(self, mode: str) -> dict[str, Any]:
        return {
            "path": self.path,
            "mode": mode,
            "text": join_texts(segment.text for segment in self.segments),
            "segments": [
                {
                    "start": round(segment.start, 3),
                    "end": round(segment.end, 3),
                    "text": segment.text,
                    "words": [
                        {
                            "word": word.word, "start": round(word.start, 3), "end": round(word.end, 3),
                            "confidence": round(word.confidence, 4),
                        }
                        for word in segment.words
                    ],
                }
                for segment in self.segments
            ],
            "error": self.error,
        }  # fmt: skip


@dataclass
class Job:
    """An input under way."""

    place: int
    transcript: Transcript
    packets: Iterator[tuple[np.ndarray, int]]
    decoder: StreamingDecoder


def transcribe(
    paths: list[str], model_rate: int, new_decoder: Callable[[], StreamingDecoder], num_streams: int,
    pipe_rate: int | None, watch: Callable[[Job], None], stop: PipeStop,
) -> Iterator[Transcript]:  # fmt: skip
    """Decode all inputs, `num_streams` of them together, and yield them in their order.

    Args:
      model_rate: Hz that the model hears, `pipe_rate` those of the pipe where they differ.
      new_decoder: makes decoders of one batch.
      watch: called with every job after each run of the batch.
      stop: when it is asked for, the pipe's text still comes; recordings that are not finished are dropped.
    """
    waiting, active, done, following = deque(enumerate(paths)), [], {}, 0
    while waiting or active:
        if stop.asked:
            waiting.clear()
            for job in [job for job in active if job.transcript.path != PIPE]:
                job.decoder.leave()
                active.remove(job)
            if not active:
                break
        while waiting and len(active) < num_streams:
            place, path = waiting.popleft()
            packets = (
                pipe_packets(sys.stdin.buffer, pipe_rate or model_rate, model_rate, stop)
                if path == PIPE else file_packets(path, model_rate)
            )
            active.append(Job(place, Transcript(path), packets, new_decoder()))
        ended = [job for job in active if not _feed(job)]
        try:
            active[0].decoder.batch.run()
        except Exception as error:  # whose audio it was is not known: each is decoded again, alone; a pipe cannot be
            again = [job for job in active if len(active) > 1 and job.transcript.path != PIPE]
            for job in active:
                job.decoder.leave() if job in again else _fail(job, error)
            waiting.extendleft((job.place, job.transcript.path) for job in reversed(again) if not job.transcript.error)
            ended = [job for job in active if job.transcript.error]
            active, num_streams = ended.copy(), 1
        for job in active:
            if job.transcript.error is None:
                watch(job)
        for job in ended:
            _conclude(job)
            done[job.place] = job.transcript
            active.remove(job)
        while following in done:
            yield done.pop(following)
            following += 1
    for place in sorted(done):  # behind one that was dropped
        yield done[place]


def _feed(job: Job) -> bool:
    """Let a job's decoder hear its next packet; False at the end or at an error."""
    try:
        packet = next(job.packets, None)
        if packet is None:
            job.decoder.end()
        else:
            job.decoder.push(*packet)
    except Exception as error:
        _fail(job, error)
        return False
    return packet is not None


def _fail(job: Job, error: Exception) -> None:
    """Note what went wrong with this input, and break its stream off: the others go on."""
    if os.environ.get("CASCADE_DEBUG"):
        traceback.print_exception(error)
    message, name = " ".join(str(error).split()), job.transcript.name
    if not isinstance(error, (ValueError, OSError)):
        message = f"{type(error).__name__}: {message}"
    job.transcript.error = message if name in message else f"{name}: {message}"
    job.decoder.leave()


def _conclude(job: Job) -> None:
    if job.transcript.error is not None:
        return
    try:
        final = job.decoder.final()
    except Exception as error:
        _fail(job, error)
        return
    job.transcript.segments = list(final.segments)
    if final.num_frames == 0:
        job.transcript.error = (
            f"{job.transcript.name}: {final.duration:.3f} s of audio is too short, the shortest is 0.04 s"
        )
