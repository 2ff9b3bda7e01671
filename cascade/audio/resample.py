"""Changing the sampling rate, of whole recordings and of streams: the same samples to the bit."""

from __future__ import annotations

from math import gcd

import numpy as np

_FILTER_REACH = 10  # as scipy.signal.resample_poly: input or output samples on each side, whichever are wider
_KAISER_BETA = 5.0
_PACKET_SECONDS = 0.01
_BLOCK = 1 << 13  # outputs that are computed at once


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Change the sampling rate of (num_samples,) float32 samples by a polyphase filter (any pair of rates)."""
    resampler = StreamingResampler(rate, new_rate)
    return np.concatenate((resampler.accept(samples), resampler.finish()))


class StreamingResampler:
    """`resample`, packet by packet.

    With h a windowed sinc, a low-pass filter around its centre, y[m] = sum_n h[m * down - n * up] x[n]. A sample comes
    out as soon as the last input it needs is in; `finish` gives those that reach beyond the end, where x is 0.
    """

    def __init__(self, rate: int, new_rate: int) -> None:
        divisor = gcd(rate, new_rate)
        self._up, self._down = new_rate // divisor, rate // divisor
        if self._up == self._down:
            return
        widest = max(self._up, self._down)
        self._reach = _FILTER_REACH * widest
        places = np.arange(-self._reach, self._reach + 1)
        taps = np.sinc(places / widest) * np.kaiser(places.size, _KAISER_BETA)
        taps *= self._up / taps.sum()
        # Row k has, for each m modulo up, the tap of the k-th input that y[m] needs; 0 where it needs one less.
        num_inputs = 2 * self._reach // self._up + 1
        phases = np.arange(self._up)
        place = phases * self._down - self._first_input(phases) * self._up + self._reach
        padded = np.concatenate((np.zeros(self._up), taps)).astype(np.float32)
        self._taps = padded[place - np.arange(num_inputs)[:, None] * self._up + self._up]
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
        """The oldest n that y[m] needs, for each m."""
        return -((self._reach - outputs * self._down) // self._up)

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
