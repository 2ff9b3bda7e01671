"""Log-mel fbank: lhotse's (or kaldifeat's) for whole files, kaldi-native-fbank for streams.

All are Kaldi's fbank: 25 ms Povey window every 10 ms, 20 Hz to 400 Hz below half the sampling rate, no dither,
snip_edges=False (the edges are mirrored, so that T = round(num_samples / hop)), power spectrum, natural log, float32.
They agree within 2e-4 (1 + |value|). What differs is how the FFTs round in float32: on speech 99.99 % of the values are
closer than 2e-4; in bins near the floor of a loud frame each differs by up to 7e-4 from the others, and by as much from
the same computation in float64.
Samples lie in [-1, 1]. Normalisation is part of the model, not of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.config.options import FRAME_SHIFT_MS, FeatureConfig

if TYPE_CHECKING:  # streams do without torch
    from torch import Tensor

WINDOW_MS = 25
LOW_FREQUENCY, HIGH_FREQUENCY = 20.0, -400.0


def num_feature_frames(num_samples: int, sampling_rate: int) -> int:
    """Frames T of the fbank of `num_samples` samples (snip_edges=False)."""
    hop = sampling_rate * FRAME_SHIFT_MS // 1000
    return (num_samples + hop // 2) // hop


def equal_features(config: FeatureConfig) -> list[dict[str, Any]]:
    """Descriptions under which stored features equal this config's, its own first: extractors do not differ.

    An option that is newer than some stored features is left out where it has its default.
    """
    first = ("sampling_rate", "num_mel_bins", "extractor")
    defaults = asdict(FeatureConfig())
    own = {name: value for name, value in asdict(config).items() if name in first or value != defaults[name]}
    return [own, *(own | {"extractor": name} for name in ("lhotse", "kaldifeat") if name != config.extractor)]


def compute_fbank(samples: Tensor | np.ndarray, config: FeatureConfig) -> Tensor:
    """The fbank of a whole utterance.

    Args:
      samples: (num_samples,) float32 in [-1, 1] at config.sampling_rate.
    Returns:
      (T, F) float32.
    Raises:
      ValueError: fewer samples than one window.
      ImportError: config.extractor is not installed.
    """
    import torch

    samples = torch.as_tensor(samples, dtype=torch.float32)
    assert samples.ndim == 1, samples.shape
    window = config.sampling_rate * WINDOW_MS // 1000
    if samples.numel() < window:
        raise ValueError(f"audio must have at least {window} samples ({WINDOW_MS} ms), got {samples.numel()}")
    return _extractor(config)(samples).reshape(-1, config.num_mel_bins)


@lru_cache(maxsize=4)
def _extractor(config: FeatureConfig) -> Callable[[Tensor], Tensor]:
    """(num_samples,) float32 samples -> (T, F) float32 features."""
    return {"lhotse": _lhotse_fbank, "kaldifeat": _kaldifeat_fbank}[config.extractor](config)


def _lhotse_fbank(config: FeatureConfig) -> Callable[[Tensor], Tensor]:
    import torch
    from lhotse import Fbank, FbankConfig

    fbank = Fbank(FbankConfig(
        sampling_rate=config.sampling_rate, num_filters=config.num_mel_bins, frame_length=WINDOW_MS / 1000,
        frame_shift=FRAME_SHIFT_MS / 1000, snip_edges=False, dither=0.0, window_type="povey",
        low_freq=LOW_FREQUENCY, high_freq=HIGH_FREQUENCY,
    ))
    return lambda samples: torch.as_tensor(fbank.extract(samples[None], config.sampling_rate))


def _kaldifeat_fbank(config: FeatureConfig) -> Callable[[Tensor], Tensor]:
    try:
        import kaldifeat
    except ImportError as error:
        raise ImportError(
            f"features.extractor=kaldifeat cannot be loaded ({' '.join(str(error).split())}): run "
            "tools/install_kaldifeat.sh, or set features.extractor=lhotse, which gives the same features"
        ) from error
    return kaldifeat.Fbank(_set_fbank_options(kaldifeat.FbankOptions(), config))


def _set_fbank_options(options: Any, config: FeatureConfig) -> Any:
    """Kaldi's options, as kaldifeat and kaldi-native-fbank name them alike; returns them."""
    options.frame_opts.samp_freq = config.sampling_rate
    options.frame_opts.frame_length_ms = WINDOW_MS
    options.frame_opts.frame_shift_ms = FRAME_SHIFT_MS
    options.frame_opts.dither = 0.0  # its default is not 0
    options.frame_opts.snip_edges = False
    options.frame_opts.window_type = "povey"
    options.mel_opts.num_bins = config.num_mel_bins
    options.mel_opts.low_freq = LOW_FREQUENCY
    options.mel_opts.high_freq = HIGH_FREQUENCY
    return options


class StreamingFbank:
    """The same fbank from packets of any size, one sample and more.

    A frame comes out as soon as the last sample of its window is in; the mirrored ones at the end come from `finish`.
    """

    def __init__(self, config: FeatureConfig) -> None:
        try:
            import kaldi_native_fbank as knf
        except ImportError as error:
            raise ImportError("streaming features need kaldi-native-fbank: pip install kaldi-native-fbank") from error
        self._config = config
        self._fbank = knf.OnlineFbank(_set_fbank_options(knf.FbankOptions(), config))
        self._num_taken = 0
        self._num_samples = 0
        self._finished = False

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """Take (num_samples,) float32 samples in [-1, 1], return the (t, F) float32 frames they complete, t >= 0."""
        assert not self._finished, "accept() after finish()"
        samples = np.ascontiguousarray(np.asarray(samples, dtype=np.float32))
        assert samples.ndim == 1, samples.shape
        if samples.size:
            self._num_samples += samples.size
            self._fbank.accept_waveform(self._config.sampling_rate, samples)
        return self._take()

    def finish(self) -> np.ndarray:
        """Return the last (t, F) float32 frames; none for a stream shorter than one window."""
        if not self._finished:
            self._finished = True
            if self._num_samples >= self._config.sampling_rate * WINDOW_MS // 1000:
                self._fbank.input_finished()
        return self._take()

    def _take(self) -> np.ndarray:
        ready = self._fbank.num_frames_ready
        frames = [self._fbank.get_frame(index) for index in range(self._num_taken, ready)]
        if not frames:
            return np.zeros((0, self._config.num_mel_bins), np.float32)
        taken = np.stack(frames)  # a copy: pop frees what get_frame shows
        self._fbank.pop(ready - self._num_taken)
        self._num_taken = ready
        return taken
