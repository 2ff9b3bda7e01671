"""Augmentation of stored features while training: a chain of random changes, each a function of (seed, epoch, utterance
id) only.

A new one is a class with a `purpose`, a field of AugmentConfig, and a line in `build_augmentations`.
"""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from typing import Protocol

import numpy as np

from cascade.audio.fbank import HIGH_FREQUENCY, LOW_FREQUENCY
from cascade.config.options import AugmentConfig, Config
from cascade.data.noise import MixNoise, open_noise


class Augmentation(Protocol):
    """A random change of one utterance's features."""

    purpose: str
    """Seeds the generator, so that one augmentation's draws do not move another's."""

    def __call__(self, features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """(T, F) float32 log-mel features, which stay as they are, to (T', F) float32."""


def build_augmentations(config: Config, fbank: Path, mean: np.ndarray) -> list[Augmentation]:
    """The chain that every training utterance goes through, in this order.

    Args:
      fbank: EXP/fbank, for the noise that stage 1 left there.
      mean: (F,) float32 features' mean over train, for what is hidden.
    Raises:
      ValueError: the noise is unfinished or has another number of mel bins.
    """
    augment = config.augment
    chain: list[Augmentation] = [VocalTract(augment.vtlp_factor, config.features.sampling_rate)]
    noise = open_noise(fbank, config.features.num_mel_bins) if augment.noise_share else None
    if noise is not None:
        logging.getLogger(__name__).info(
            "mixing %.2f hours of noise from %d files into %g %% of the utterances, at %g to %g dB",
            noise.hours, noise.num_files, 100 * augment.noise_share, *augment.noise_snr_db,
        )
        chain.append(MixNoise(noise, augment))
    return [*chain, SpecAugment(augment, mean)]


def utterance_generator(seed: int, epoch: int, utterance_id: str, purpose: str = "") -> np.random.Generator:
    """The random generator of one utterance in one epoch for one purpose, whatever worker or rank draws from it."""
    key = f"{seed}/{epoch}/{utterance_id}" + (f"\0{purpose}" if purpose else "")
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


class SpecAugment:
    """Warp time, then hide bands of frequency and stretches of time (1904.08779, adaptive as in 1912.05533).

    The number of time masks follows the length, as many as the permitted share fills with masks of the longest kind:
    min(num_time_masks, ceil(share T / time_mask_frames)), each at most share T / number frames long.
    """

    purpose = ""

    def __init__(self, config: AugmentConfig, fill: np.ndarray) -> None:
        """fill: (F,) float32 values of hidden bins: the mean over train, which the model's normalisation makes 0."""
        self.config, self.fill = config, fill

    def __call__(self, features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        config, fill = self.config, self.fill
        if generator.random() >= config.share:
            return features
        num_frames, num_bins = features.shape
        masked = _time_warp(features, config.time_warp_frames, generator)
        masked = masked.copy() if masked is features else masked
        for _ in range(config.num_freq_masks):
            width = int(generator.integers(0, min(config.freq_mask_bins, num_bins) + 1))
            first = int(generator.integers(0, num_bins - width + 1))
            masked[:, first : first + width] = fill[first : first + width]
        budget = config.max_time_mask_share * num_frames
        if config.num_time_masks and config.time_mask_frames and budget >= 1:
            num_masks = min(config.num_time_masks, math.ceil(budget / config.time_mask_frames))
            longest = min(config.time_mask_frames, int(budget / num_masks))
            for width in generator.integers(0, longest + 1, num_masks):
                first = int(generator.integers(0, num_frames - width + 1))
                masked[first : first + width] = fill
        return masked


class VocalTract:
    """Scale the frequencies as another length of the vocal tract would (Jaitly and Hinton 2013): another speaker.

    What is heard at f was said at f / factor, up to f = min(4800 Hz, 0.6 times the highest frequency) * min(factor, 1);
    from there a line leads to the highest frequency.
    """

    purpose = "vocal tract"

    def __init__(self, factors: tuple[float, float], sampling_rate: int) -> None:
        """factors: the least and the largest factor; one is drawn uniformly. sampling_rate: of the features' audio."""
        self.factors, self.sampling_rate = factors, sampling_rate

    def __call__(self, features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        factor = generator.uniform(*self.factors)
        if factor == 1.0:
            return features
        top = self.sampling_rate / 2 + HIGH_FREQUENCY
        mels = np.linspace(_mel(LOW_FREQUENCY), _mel(top), features.shape[1] + 2)[1:-1]
        edge = min(4800.0, 0.6 * top) * min(factor, 1.0)
        heard_at = 700 * (np.exp(mels / 1127) - 1)
        said_at = np.interp(heard_at, (0.0, edge, top), (0.0, edge / factor, top))
        positions = np.interp(_mel(said_at), mels, np.arange(len(mels)))
        return _between(features, positions)


def _mel(frequency: float | np.ndarray) -> float | np.ndarray:
    return 1127 * np.log1p(np.asarray(frequency) / 700)


def _time_warp(features: np.ndarray, max_shift: int, generator: np.random.Generator) -> np.ndarray:
    """Move one frame by up to max_shift frames, stretch what is before it and squeeze what is after, or vice versa."""
    num_frames = len(features)
    if max_shift < 1 or num_frames < 2 * max_shift + 3:
        return features
    source = int(generator.integers(max_shift + 1, num_frames - max_shift - 1))
    target = source + int(generator.integers(-max_shift, max_shift + 1))
    if target == source:
        return features
    positions = np.interp(np.arange(num_frames), (0, target, num_frames - 1), (0, source, num_frames - 1))
    return _between(features.T, positions).T


def _between(features: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(..., M) features interpolated along the last axis at `positions`, which lie in [0, M - 1]."""
    left = np.minimum(positions.astype(np.int64), features.shape[-1] - 2)
    share = (positions - left).astype(np.float32)
    return (1 - share) * features[..., left] + share * features[..., left + 1]
