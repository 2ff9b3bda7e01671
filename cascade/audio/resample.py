"""Changing the sampling rate, of whole recordings and of streams: the same filter, sample by sample the same sums."""

from __future__ import annotations

from math import gcd

import numpy as np

_FILTER_REACH = 10  # of scipy.signal.resample_poly: input or output samples on each side, whichever are wider
_KAISER_BETA = 5.0
_PACKET_SECONDS = 0.01


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Change the sampling rate of (num_samples,) float32 samples by a polyphase filter (any pair of rates)."""
    from scipy.signal import resample_poly  # slow to import, and most audio has the model's rate

    divisor = gcd(rate, new_rate)
    return resample_poly(samples, new_rate // divisor, rate // divisor).astype(np.float32)


class StreamingResampler:
    """`resample`, packet by packet: the same filter and, sample by sample, the same sums.

    With h the low-pass filter around its centre, y[m] = sum_n h[m * down - n * up] x[n]. A sample comes out as soon
    as the last input it needs is in; `finish` gives those that reach beyond the end, where x is 0.
    """

    def __init__(self, rate: int, new_rate: int) -> None:
        divisor = gcd(rate, new_rate)
        self._up, self._down = new_rate // divisor, rate // divisor
        if self._up == self._down:
            return
        from scipy.signal import firwin, upfirdn

        self._upfirdn = upfirdn
        widest = max(self._up, self._down)
        self._reach = _FILTER_REACH * widest
        taps = firwin(2 * self._reach + 1, 1.0 / widest, window=("kaiser", _KAISER_BETA)).astype(np.float32)
        padding = -self._reach % self._down  # so that output 0 stands on the grid of upfirdn
        self._filter = np.concatenate((np.zeros(padding, np.float32), taps * np.float32(self._up)))
        self._centre = (self._reach + padding) // self._down
        self._least = max(1, round(rate * _PACKET_SECONDS))
        self._waiting: list[np.ndarray] = []
        self._kept = np.zeros(0, np.float32)
        self._num_dropped = 0  # inputs before `_kept`, a multiple of `down`
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

    def _emit(self, end: int) -> np.ndarray:
        """Outputs up to `end`; inputs that no later one needs are dropped."""
        self._kept = np.concatenate((self._kept, *self._waiting))
        self._waiting.clear()
        if end <= self._num_out:
            return np.zeros(0, np.float32)
        shift = self._centre - self._num_dropped // self._down * self._up
        out = self._upfirdn(self._filter, self._kept, self._up, self._down)[self._num_out + shift : end + shift]
        assert out.size == end - self._num_out, (out.size, end, self._num_out)
        self._num_out = end
        first = max(0, -(-(end * self._down - self._reach) // self._up))  # the oldest input that output `end` needs
        drop = first // self._down * self._down - self._num_dropped
        if drop > 0:
            self._kept = self._kept[drop:].copy()
            self._num_dropped += drop
        return out
