"""From packets of samples, of any size and sampling rate, to feature frames."""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
from torch import Tensor

from cascade.config import FeatureConfig
from cascade.features import HIGHEST_RATE, LARGEST_SAMPLE, LOWEST_RATE, StreamingFbank

_FILTER_REACH = 10  # of scipy.signal.resample_poly: input or output samples on each side, whichever are wider
_KAISER_BETA = 5.0
_PACKET_SECONDS = 0.01


class StreamingResampler:
    """`cascade.features.resample`, packet by packet: the same filter and, sample by sample, the same sums.

    With h the low-pass filter around its centre, y[m] = sum_n h[m * down - n * up] x[n]. A sample comes out as soon
    as the last input it needs is in; `finish` gives those that reach beyond the end, where x is 0.
    """

    def __init__(self, rate: int, new_rate: int) -> None:
        divisor = gcd(rate, new_rate)
        self._up, self._down = new_rate // divisor, rate // divisor
        if self._up == self._down:
            return
        from scipy.signal import firwin, upfirdn  # slow to import, and most audio has the model's rate

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


class AudioInput:
    """The audio of one stream: checked, resampled where its rate is not the model's, turned into feature frames."""

    def __init__(self, config: FeatureConfig) -> None:
        self._config = config
        self._fbank = StreamingFbank(config)
        self._resampler: StreamingResampler | None = None
        self._num_samples = 0
        self.sampling_rate: int | None = None

    @property
    def duration(self) -> float:
        """Seconds of audio so far."""
        return self._num_samples / self.sampling_rate if self.sampling_rate else 0.0

    def accept(self, samples: np.ndarray | Tensor, sampling_rate: int) -> Tensor:
        """Take one packet.

        Args:
          samples: (num_samples,) floating-point samples in [-1, 1].
          sampling_rate: Hz, the same in every packet of a stream.
        Returns:
          (t, F) float32 frames that are complete now, t >= 0.
        Raises:
          ValueError: not one-dimensional, not floating point, no numbers or huge ones; another rate, or no rate.
        """
        samples = np.asarray(samples)
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(
                "samples must be one-dimensional floating-point numbers in [-1, 1] (mix channels down, divide 16-bit "
                f"integers by 32768), got {samples.dtype} of shape {samples.shape}"
            )
        if not (np.abs(samples) <= LARGEST_SAMPLE).all():
            raise ValueError(f"samples must be numbers of a size up to {LARGEST_SAMPLE:g}, got others, nan or inf")
        self._check_rate(sampling_rate)
        self._num_samples += samples.size
        return self._fbank.accept(self._resampler.accept(samples.astype(np.float32, copy=True)))

    def finish(self, silence: float = 0.0) -> Tensor:
        """The last (t, F) frames, as if `silence` seconds of zeros, which `duration` does not count, came last."""
        if self._resampler is None:
            return self._fbank.finish()
        zeros = np.zeros(round(silence * self.sampling_rate), np.float32)
        parts = [self._fbank.accept(part) for part in (self._resampler.accept(zeros), self._resampler.finish())]
        return torch.cat((*parts, self._fbank.finish()))

    def _check_rate(self, sampling_rate: int) -> None:
        if self.sampling_rate is None:
            if not (LOWEST_RATE <= sampling_rate <= HIGHEST_RATE and sampling_rate == int(sampling_rate)):
                raise ValueError(
                    f"sampling_rate must be a whole number from {LOWEST_RATE} to {HIGHEST_RATE} Hz, got {sampling_rate}"
                )
            self.sampling_rate = int(sampling_rate)
            self._resampler = StreamingResampler(self.sampling_rate, self._config.sampling_rate)
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate must stay {self.sampling_rate} Hz within a stream, got {sampling_rate}; "
                "reset() starts a new stream"
            )
