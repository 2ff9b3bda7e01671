"""Inputs of streams: recordings block by block, raw samples from a pipe until it ends or a signal comes."""

from __future__ import annotations

import logging
import select
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from cascade.audio.io import read_audio_blocks
from cascade.processes.signals import StopRequest

_BLOCK_SECONDS = 1.0
_PIPE_SECONDS = 0.1
_PIPE_BYTES = 1 << 16
"""A pipe holds so much that its reader has not taken."""


class _Stopped(KeyboardInterrupt):
    """A signal came while a pipe was waited for."""


class PipeStop(StopRequest):
    """While it is entered, a signal ends the pipe and not the program, so that its last words are decoded."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting = False
        self._num_left = _PIPE_BYTES

    def take(self, number: int) -> None:
        super().take(number)
        if self._waiting:
            raise _Stopped

    def read(self, pipe: BinaryIO, size: int) -> bytes:
        """Up to `size` bytes as soon as there are any; after a signal what the pipe still holds, then nothing."""
        if not self.asked:
            try:
                self._waiting = True
                if not self.asked:
                    return pipe.read1(size)
            except _Stopped:
                pass
            finally:
                self._waiting = False
        try:
            ready = self._num_left > 0 and select.select([pipe.fileno()], [], [], 0)[0]
        except OSError:  # not a real pipe
            return b""
        data = pipe.read1(min(size, self._num_left)) if ready else b""
        self._num_left -= len(data)
        return data


def file_packets(path: str, sampling_rate: int) -> Iterator[tuple[np.ndarray, int]]:
    """(samples, their rate in Hz) of a recording, a second at a time; it is opened when the first one is asked for."""
    first = True
    for samples, rate, note in read_audio_blocks(path, sampling_rate, _BLOCK_SECONDS):
        if first and note:
            logging.info("%s: %s", path, note)
        first = False
        yield samples, rate


def pipe_packets(pipe: BinaryIO, rate: int, sampling_rate: int, stop: PipeStop) -> Iterator[tuple[np.ndarray, int]]:
    """(samples, `rate`) of raw 16-bit samples as they come in; `sampling_rate` is the model's."""
    if rate != sampling_rate:
        logging.info("standard input: resampled from %d Hz", rate)
    size, rest = 2 * round(_PIPE_SECONDS * rate), b""
    while data := stop.read(pipe, size):
        data = rest + data
        whole = len(data) // 2 * 2
        rest = data[whole:]
        yield np.frombuffer(data[:whole], dtype="<i2").astype(np.int16, copy=False), rate
    if rest and not stop.asked:
        logging.warning("standard input ends within a sample: its last byte is left out")
