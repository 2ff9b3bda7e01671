"""Rooms: impulse responses of a folder, convolved with copies of training utterances when features are computed."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from cascade.audio.io import read_audio
from cascade.config.options import Config
from cascade.data.audio_folder import describe, find_audio, report
from cascade.data.augment import utterance_generator

MAX_SECONDS = 10.0  # what is longer is no room response but a recording
OPTION = "--rir-dir"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rooms:
    """The usable responses of a folder, and who gets one: a function of (seed, utterance id, speed) only."""

    folder: Path
    names: tuple[str, ...]
    share: float
    seed: int
    digest: str
    """Changes with any of these and with the files."""

    def draw(self, utterance_id: str, speed: float) -> str | None:
        """The response, by its name below the folder, for one copy of an utterance; None for 1 - share of them."""
        generator = utterance_generator(self.seed, 0, f"{utterance_id}/{speed}", "room")
        if generator.random() >= self.share:
            return None
        return self.names[int(generator.integers(len(self.names)))]


def read_rooms(folder: Path, config: Config) -> Rooms:
    """Read every response once; bad ones are named in warnings and left out.

    Raises:
      ValueError: no such folder, no audio in it, or none that can be used.
    """
    names = find_audio(folder, OPTION)
    problems = []
    for name in names:
        try:
            read_response(folder / name, config.features.sampling_rate)
        except (ValueError, OSError) as error:
            problems.append((name, " ".join(str(error).split())))
    report(OPTION, folder, len(names), problems, log)
    bad = {name for name, _ in problems}
    good = tuple(name for name in names if name not in bad)
    facts = [describe(folder, list(good)), config.augment.rir_share, config.seed]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Rooms(folder, good, config.augment.rir_share, config.seed, digest)


@lru_cache(maxsize=64)
def read_response(path: Path, sampling_rate: int) -> tuple[np.ndarray, int]:
    """(num_taps,) float32 response at `sampling_rate`, and the index of its direct path.

    That is the first sample within 6 dB of the largest one: a reflection may be the louder.

    Raises:
      ValueError, OSError: unreadable, silent, or longer than a room answers.
    """
    response, _ = read_audio(path, sampling_rate)
    if len(response) > MAX_SECONDS * sampling_rate:
        seconds = len(response) / sampling_rate
        raise ValueError(f"{path} is no room response: {seconds:.1f} s is longer than {MAX_SECONDS:g} s")
    level = np.abs(response)
    if level.max() == 0:
        raise ValueError(f"{path} is silent")
    return response, int((level >= 0.5 * level.max()).argmax())


def reverberate(samples: np.ndarray, response: np.ndarray, direct: int) -> np.ndarray:
    """Convolve speech with a room: the response's direct path leaves every sound where it was, and the power stays.

    Args:
      samples: (num_samples,) float32.
      response: (num_taps,) float32.
      direct: index of the direct path in it.
    Returns:
      (num_samples,) float32; what rings on after the end is cut off.
    """
    from scipy.signal import fftconvolve

    wet = fftconvolve(samples, response)[direct : direct + len(samples)]
    power, wet_power = np.mean(samples**2, dtype=np.float64), np.mean(wet**2, dtype=np.float64)
    return (wet * np.sqrt(power / wet_power)).astype(np.float32) if wet_power > 0 else samples
