"""From packets of samples, of any size and sampling rate, to feature frames."""

from __future__ import annotations

import numpy as np

from cascade.audio.fbank import StreamingFbank
from cascade.audio.io import HIGHEST_RATE, LARGEST_SAMPLE, LOWEST_RATE
from cascade.audio.resample import StreamingResampler
from cascade.config.options import FeatureConfig


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

    def accept(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        """Take one packet.

        Args:
          samples: (num_samples,) int16 samples, or floating-point ones in [-1, 1].
          sampling_rate: Hz, the same in every packet of a stream.
        Returns:
          (t, F) float32 frames that are complete now, t >= 0.
        Raises:
          ValueError: not one-dimensional, another type, no numbers or huge ones; another rate, or no rate.
        """
        samples = np.asarray(samples)
        if samples.ndim == 1 and samples.dtype == np.int16:
            samples = samples.astype(np.float32) / 32768
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(
                "samples must be one-dimensional, int16 or floating-point numbers in [-1, 1] (mix channels down), got "
                f"{samples.dtype} of shape {samples.shape}"
            )
        with np.errstate(over="ignore"):  # then it is inf, which is said below
            samples = samples.astype(np.float32, copy=True)
        if not (np.abs(samples) <= LARGEST_SAMPLE).all():
            raise ValueError(f"samples must be numbers of a size up to {LARGEST_SAMPLE:g}, got others, nan or inf")
        self._check_rate(sampling_rate)
        self._num_samples += samples.size
        return self._fbank.accept(self._resampler.accept(samples))

    def finish(self, silence: float = 0.0) -> np.ndarray:
        """The last (t, F) frames, as if `silence` seconds of zeros, which `duration` does not count, came last."""
        if self._resampler is None:
            return self._fbank.finish()
        zeros = np.zeros(round(silence * self.sampling_rate), np.float32)
        parts = [self._fbank.accept(part) for part in (self._resampler.accept(zeros), self._resampler.finish())]
        return np.concatenate((*parts, self._fbank.finish()))

    def _check_rate(self, sampling_rate: int) -> None:
        if self.sampling_rate is None:
            is_number = isinstance(sampling_rate, (int, float, np.number))
            if not (is_number and LOWEST_RATE <= sampling_rate <= HIGHEST_RATE and sampling_rate == int(sampling_rate)):
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
