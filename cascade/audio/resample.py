"""Changing the sampling rate, of whole recordings and of streams: the same samples to the bit."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import numpy as np

_FILTER_REACH = 10  # as scipy.signal.resample_poly: input or output samples on each side, whichever are wider
_KAISER_BETA = 5.0
_PACKET_SECONDS = 0.01
_BLOCK = 1 << 13  # outputs that are computed at once
_LARGEST_TERM = 6000  # the filter has twenty times as many taps


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Change the sampling rate of (num_samples,) float32 samples by a polyphase filter (any pair of rates)."""
    resampler = StreamingResampler(rate, new_rate)
    return np.concatenate((resampler.accept(samples), resampler.finish()))


class StreamingResampler:
    """`resample`, packet by packet.

    With h a windowed sinc, a low-pass filter around its centre, y[m] = sum_n h[m * down - n * up] x[n]. A sample comes
    out as soon as the last input it needs is in; `finish` gives those that reach beyond the end, where x is 0.

    A ratio with a term above 6000 (44099 Hz) becomes the nearest one that has none: 0.3 s in an hour at most, and a
    filter of less than a megabyte. Without that one sample at 767999 Hz would cost seconds.
    """

    def __init__(self, rate: int, new_rate: int) -> None:
        self._up, self._down = _ratio(new_rate, rate)
        if self._up == self._down:
            return
        self._reach = _FILTER_REACH * max(self._up, self._down)
        self._taps = _taps(self._up, self._down)
        num_inputs = len(self._taps)
        self._least = max(1, round(rate * _PACKET_SECONDS))
        self._waiting: list[np.ndarray] = []
        self._kept = np.zeros(num_inputs, np.float32)
        self._num_dropped = -num_inputs  # inputs before `_kept`; x is 0 before the first one
        self._num_in = 0
        self._num_out = 0

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """(num_samples,) float32 at the old rate -> the (t,) float32 samples at the new one that are ready, t >= 0."""
        if self._up == self._down:
            return samples
        self._waiting.append(samples)
        self._num_in += samples.size
        if sum(packet.size for packet in self._waiting) < self._least:
            return np.zeros(0, np.float32)
        return self._emit(-(-(self._num_in * self._up - self._reach) // self._down))

    def finish(self) -> np.ndarray:
        """The rest: ceil(num_samples * new_rate / rate) samples came out altogether."""
        if self._up == self._down:
            return np.zeros(0, np.float32)
        return self._emit(-(-self._num_in * self._up // self._down))

    def _first_input(self, outputs: np.ndarray) -> np.ndarray:
        return _first_input(outputs, self._up, self._down)

    def _emit(self, end: int) -> np.ndarray:
        """Outputs up to `end`; inputs that no later one needs are dropped."""
        self._kept = np.concatenate((self._kept, *self._waiting))
        self._waiting.clear()
        if end <= self._num_out:
            return np.zeros(0, np.float32)
        padded = np.concatenate((self._kept, np.zeros(len(self._taps), np.float32)))
        out = np.zeros(end - self._num_out, np.float32)
        for begin in range(self._num_out, end, _BLOCK):
            outputs = np.arange(begin, min(begin + _BLOCK, end))
            first, phases = self._first_input(outputs) - self._num_dropped, outputs % self._up
            block = out[outputs[0] - self._num_out :][: outputs.size]
            for number, taps in enumerate(self._taps):  # the sums of an output do not depend on its neighbours
                if self._up == 1:  # a browser's 48 kHz: slices are several times faster than places
                    block += taps[0] * padded[first[0] + number : first[-1] + number + 1 : self._down]
                else:
                    block += taps[phases] * padded[first + number]
        self._num_out = end
        num_unneeded = int(self._first_input(np.array(end))) - self._num_dropped
        if num_unneeded > 0:
            self._kept = self._kept[num_unneeded:].copy()
            self._num_dropped += num_unneeded
        return out


def _ratio(new_rate: int, rate: int) -> tuple[int, int]:
    """The ratio of two rates, or the nearest one whose terms are at most `_LARGEST_TERM`."""
    least = Fraction(min(new_rate, rate), max(new_rate, rate)).limit_denominator(_LARGEST_TERM)
    terms = least.numerator, least.denominator
    return terms if new_rate <= rate else terms[::-1]


def _first_input(outputs: np.ndarray, up: int, down: int) -> np.ndarray:
    """The oldest n that y[m] needs, for each m."""
    return -((_FILTER_REACH * max(up, down) - outputs * down) // up)


@lru_cache(maxsize=16)
def _taps(up: int, down: int) -> np.ndarray:
    """(inputs of an output, up): row k has, for each m modulo up, the tap of the k-th input that y[m] needs; 0 where it
    needs one less."""
    widest = max(up, down)
    reach = _FILTER_REACH * widest
    places = np.arange(-reach, reach + 1)
    taps = np.sinc(places / widest) * np.kaiser(places.size, _KAISER_BETA)
    taps *= up / taps.sum()
    phases = np.arange(up)
    place = phases * down - _first_input(phases, up, down) * up + reach
    padded = np.concatenate((np.zeros(up), taps)).astype(np.float32)
    table = padded[place - np.arange(2 * reach // up + 1)[:, None] * up + up]
    table.flags.writeable = False  # all streams share it
    return table
