"""Audio samples and their log-mel fbank: lhotse's (or kaldifeat's) for whole files, kaldi-native-fbank for streams.

All are Kaldi's fbank: 25 ms Povey window every 10 ms, 20 Hz to 400 Hz below half the sampling rate, no dither,
snip_edges=False (the edges are mirrored, so that T = round(num_samples / hop)), power spectrum, natural log, float32.
They agree within 2e-4 (1 + |value|). What differs is how the FFTs round in float32: on speech 99.99 % of the values are
closer than 2e-4; in bins near the floor of a loud frame each differs by up to 7e-4 from the others, and by as much from
the same computation in float64.
Samples lie in [-1, 1]. Normalisation is part of the model, not of the features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from cascade.config import FRAME_SHIFT_MS, FeatureConfig

WINDOW_MS = 25
LOW_FREQUENCY, HIGH_FREQUENCY = 20.0, -400.0
MARGIN_SECONDS = 0.01  # a declared end may overshoot the file by a rounding error
LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Hz that recordings may have: what lies outside is a damaged header, and resampling it takes endless memory."""
LARGEST_SAMPLE = 1e12
"""Energies of larger samples overflow in float32."""
_BLOCK_SECONDS = 60.0  # a header may claim more samples than memory holds: never ask for all of them at once
_UNKNOWN_FRAMES = 1 << 40  # libsndfile reports a huge count where a header leaves the length open
_LARGEST_OGG_PAGE = 65307
_UNKNOWN_WAV_BYTES = 0x7FFF0000  # pipes write sizes from here on (or 0) for "unknown"


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

    def accept(self, samples: Tensor | np.ndarray) -> Tensor:
        """Take (num_samples,) float32 samples in [-1, 1], return the (t, F) float32 frames they complete, t >= 0."""
        assert not self._finished, "accept() after finish()"
        samples = np.ascontiguousarray(np.asarray(samples, dtype=np.float32))
        assert samples.ndim == 1, samples.shape
        if samples.size:
            self._num_samples += samples.size
            self._fbank.accept_waveform(self._config.sampling_rate, samples)
        return self._take()

    def finish(self) -> Tensor:
        """Return the last (t, F) float32 frames; none for a stream shorter than one window."""
        if not self._finished:
            self._finished = True
            if self._num_samples >= self._config.sampling_rate * WINDOW_MS // 1000:
                self._fbank.input_finished()
        return self._take()

    def _take(self) -> Tensor:
        ready = self._fbank.num_frames_ready
        frames = [self._fbank.get_frame(index) for index in range(self._num_taken, ready)]
        if not frames:
            return torch.zeros(0, self._config.num_mel_bins)
        taken = torch.from_numpy(np.stack(frames))  # a copy: pop frees what get_frame shows
        self._fbank.pop(ready - self._num_taken)
        self._num_taken = ready
        return taken


def read_audio(
    path: str | Path, sampling_rate: int, start: float | None = None, end: float | None = None
) -> tuple[np.ndarray, str | None]:
    """Read a recording, or the part of it between `start` and `end`, really decoding every sample of it.

    Args:
      path: any file libsndfile reads (WAV, FLAC, OGG, MP3, SPHERE).
      sampling_rate: Hz of the result; another rate is resampled, channels are averaged.
      start, end: seconds; None is the file's own start and end.
    Returns:
      (num_samples,) float32 samples, and a note on what was changed ("resampled from 8000 Hz"), or None.
    Raises:
      FileNotFoundError: no such file.
      ValueError: unreadable, truncated or empty audio, a start or end outside the file, no possible sampling rate,
        samples that are no numbers.
    """
    blocks = list(_decode(Path(path), start, end, _BLOCK_SECONDS))
    if not blocks:
        raise ValueError(f"{path}: no sample lies between start {start} s and end {end} s")
    _, rate, note = blocks[0]
    mono = np.concatenate([samples for samples, _, _ in blocks])
    if rate != sampling_rate:
        mono = resample(mono, rate, sampling_rate)
    return mono, _note(note, rate, sampling_rate)


def read_audio_blocks(
    path: str | Path, sampling_rate: int, seconds: float
) -> Iterator[tuple[np.ndarray, int, str | None]]:
    """Read a recording of any length in bounded memory: what `read_audio` reads, block by block, not resampled yet.

    Args:
      sampling_rate: Hz that the note is about.
      seconds: of each block but the last.
    Yields:
      (t,) float32 samples, channels averaged, at the file's own rate; that rate in Hz; the note of `read_audio`.
    Raises:
      As `read_audio`, each error when the block is asked for in which it lies.
    """
    for mono, rate, note in _decode(Path(path), None, None, seconds):
        yield mono, rate, _note(note, rate, sampling_rate)


def _note(mixed: str | None, rate: int, sampling_rate: int) -> str | None:
    resampled = f"resampled from {rate} Hz" if rate != sampling_rate else None
    return "; ".join(filter(None, (mixed, resampled))) or None


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Change the sampling rate of (num_samples,) float32 samples by a polyphase filter (any pair of rates)."""
    from scipy.signal import resample_poly

    divisor = gcd(rate, new_rate)
    return resample_poly(samples, new_rate // divisor, rate // divisor).astype(np.float32)


def _decode(
    path: Path, start: float | None, end: float | None, seconds: float
) -> Iterator[tuple[np.ndarray, int, str | None]]:
    """Blocks of `seconds`: (t,) float32 samples at the file's own rate, that rate in Hz, a note on channels."""
    if not path.exists():
        raise FileNotFoundError(f"audio file not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path}: a directory or a device, not an audio file")
    _check_container_is_whole(path)
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            rate, length = file.samplerate, file.frames
            if length >= _UNKNOWN_FRAMES:  # libsndfile cannot read these
                raise ValueError(f"{path}: the header does not say the length (written to a pipe?): encode it again")
            if length == 0:
                raise ValueError(f"{path}: the file holds no samples")
            if not LOWEST_RATE <= rate <= HIGHEST_RATE:
                raise ValueError(
                    f"{path}: its header says a sampling rate of {rate} Hz, recordings have {LOWEST_RATE} to "
                    f"{HIGHEST_RATE} Hz"
                )
            position, last = _sample_range(path, rate, length, start, end)
            if position:
                file.seek(position)
            note = f"mixed down from {file.channels} channels" if file.channels > 1 else None
            while position < last:
                size = min(last - position, round(seconds * rate))
                samples = file.read(size, dtype="float32", always_2d=True)  # (t, channels)
                position += len(samples)
                if len(samples) < size:
                    raise ValueError(
                        f"{path}: truncated audio, {position} of the {last} samples that its header declares"
                    )
                mono = samples.mean(axis=1, dtype=np.float32)
                if not (np.abs(mono) <= LARGEST_SAMPLE).all():
                    raise ValueError(f"{path}: the audio holds samples that are no numbers, or far beyond any sound")
                yield mono, rate, note
    except soundfile.SoundFileError as error:
        detail = str(error).split(": ")[-1].strip()
        if detail.startswith("File does not exist"):  # what libsndfile says where it finds no frame of MP3
            detail = "Format not recognised."
        raise ValueError(f"{path}: unreadable or truncated audio ({detail})") from error


def _sample_range(path: Path, rate: int, length: int, start: float | None, end: float | None) -> tuple[int, int]:
    duration = length / rate
    start = 0.0 if start is None else start
    end = duration if end is None else end
    if not 0 <= start < end:
        raise ValueError(f"{path}: start must be at least 0 and lie before end, got start {start} s and end {end:g} s")
    if start >= duration or end > duration + MARGIN_SECONDS:
        raise ValueError(f"{path}: start {start:g} s to end {end:g} s lies outside the file of {duration:.3f} s")
    return round(start * rate), min(round(end * rate), length)


def _check_container_is_whole(path: Path) -> None:
    """libsndfile takes a WAV or Ogg file cut short as a shorter one.

    A WAV's data chunk says how long it was meant to be; the last page of an Ogg file has the end-of-stream flag.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"OggS":
            file.seek(max(0, path.stat().st_size - _LARGEST_OGG_PAGE))
            tail = file.read()
            page = tail[max(0, tail.rfind(b"OggS")) :]  # 27 bytes, the number of segments last; their sizes; they
            is_last = len(page) > 27 and page[5] & 4 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
            if not is_last:
                raise ValueError(f"{path}: truncated audio, the Ogg stream has no whole last page")
            return
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        while len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                available = path.stat().st_size - file.tell()
                if available < size < _UNKNOWN_WAV_BYTES:
                    raise ValueError(f"{path}: truncated audio, {available} of the {size} bytes its header declares")
                return
            file.seek(size + size % 2, 1)
