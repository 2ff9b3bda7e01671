"""Reading recordings: every sample is decoded, damaged and truncated files are refused with a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from cascade.audio.containers import check_is_whole, check_mp3_length
from cascade.audio.resample import resample

MARGIN_SECONDS = 0.01  # a declared end may overshoot the file by a rounding error
LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Hz that recordings may have: what lies outside is a damaged header, and resampling it takes endless memory."""
LARGEST_SAMPLE = 1e12
"""Energies of larger samples overflow in float32."""
_BLOCK_SECONDS = 60.0  # a header may claim more samples than memory holds: never ask for all of them at once
_UNKNOWN_FRAMES = 1 << 40  # libsndfile reports a huge count where a header leaves the length open


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


def _decode(
    path: Path, start: float | None, end: float | None, seconds: float
) -> Iterator[tuple[np.ndarray, int, str | None]]:
    """Blocks of `seconds`: (t,) float32 samples at the file's own rate, that rate in Hz, a note on channels."""
    if not path.exists():
        raise FileNotFoundError(f"audio file not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path}: a directory or a device, not an audio file")
    check_is_whole(path)
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
            if file.format in ("MPEG", "MP3"):
                check_mp3_length(path, length)
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
        if detail.startswith(("File does not exist", "Format not")):  # the first where it finds no frame of MP3
            detail = "Format not recognised: WAV, FLAC, Ogg, MP3 and SPHERE are"
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
