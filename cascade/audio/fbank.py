"""Log-mel fbank by kaldi-native-fbank: of whole files and of streams, packet by packet, the same frames to the bit.

It is Kaldi's fbank: 25 ms Povey window every 10 ms, 20 Hz to 400 Hz below half the sampling rate, no dither,
snip_edges=False (the edges are mirrored, so that T = round(num_samples / hop)), power spectrum, natural log, float32.
kaldifeat, an option of training, agrees within 2e-4 (1 + |value|), as lhotse's Fbank does. What differs is how the FFTs
round in float32: on speech 99.99 % of the values are closer than 2e-4; in bins near the floor of a loud frame each
differs by up to 7e-4 from the others, and by as much from the same computation in float64.
Samples lie in [-1, 1]. Normalisation is part of the model, not of the features.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from cascade.config.options import FRAME_SHIFT_MS, FeatureConfig

WINDOW_MS = 25
LOW_FREQUENCY, HIGH_FREQUENCY = 20.0, -400.0


def num_feature_frames(num_samples: int, sampling_rate: int) -> int:
    """Frames T of the fbank of `num_samples` samples (snip_edges=False)."""
    hop = sampling_rate * FRAME_SHIFT_MS // 1000
    return (num_samples + hop // 2) // hop


def equal_features(config: FeatureConfig) -> list[dict[str, Any]]:
    """Descriptions under which stored features equal this config's, its own first: extractors do not differ.

    An option that is newer than some stored features is left out where it has its default. lhotse's Fbank is what
    earlier versions took.
    """
    first = ("sampling_rate", "num_mel_bins", "extractor")
    defaults = asdict(FeatureConfig())
    own = {name: value for name, value in asdict(config).items() if name in first or value != defaults[name]}
    extractors = ("kaldi-native-fbank", "kaldifeat", "lhotse")
    return [own, *(own | {"extractor": name} for name in extractors if name != config.extractor)]


def compute_fbank(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """The fbank of a whole utterance.

    Args:
      samples: (num_samples,) float32 in [-1, 1] at config.sampling_rate.
    Returns:
      (T, F) float32.
    Raises:
      ValueError: fewer samples than one window.
      ImportError: config.extractor is not installed.
    """
    window = config.sampling_rate * WINDOW_MS // 1000
    if samples.size < window:
        raise ValueError(f"audio must have at least {window} samples ({WINDOW_MS} ms), got {samples.size}")
    if config.extractor == "kaldifeat":
        return _kaldifeat_fbank(samples, config)
    fbank = StreamingFbank(config)
    return np.concatenate((fbank.accept(samples), fbank.finish()))


def _kaldifeat_fbank(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    try:
        import kaldifeat
        import torch
    except ImportError as error:
        raise ImportError(
            f"features.extractor=kaldifeat cannot be loaded ({' '.join(str(error).split())}): run "
            "tools/install_kaldifeat.sh, or leave the option out: the features are the same"
        ) from error
    options = _set_fbank_options(kaldifeat.FbankOptions(), config)
    return kaldifeat.Fbank(options)(torch.as_tensor(samples, dtype=torch.float32)).numpy()


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
    """The fbank of a stream, from packets of any size, one sample and more.

    A frame comes out as soon as the last sample of its window is in; the mirrored ones at the end come from `finish`.
    """

    def __init__(self, config: FeatureConfig) -> None:
        try:
            import kaldi_native_fbank as knf
        except ImportError as error:
            raise ImportError("features need the package kaldi-native-fbank: pip install kaldi-native-fbank") from error
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
