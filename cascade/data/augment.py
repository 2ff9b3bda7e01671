"""SpecAugment (1904.08779, adaptive as in 1912.05533) and vocal tract length perturbation, functions of (seed, epoch,
utterance id) only."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from cascade.audio.fbank import HIGH_FREQUENCY, LOW_FREQUENCY
from cascade.config.options import AugmentConfig


def utterance_generator(seed: int, epoch: int, utterance_id: str, purpose: str = "") -> np.random.Generator:
    """The random generator of one utterance in one epoch, whatever worker or rank draws from it.

    Each purpose has its own, so that one augmentation's draws do not move another's; SpecAugment's has no name.
    """
    key = f"{seed}/{epoch}/{utterance_id}" + (f"\0{purpose}" if purpose else "")
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def spec_augment(
    features: np.ndarray, config: AugmentConfig, fill: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Warp time, then hide bands of frequency and stretches of time.

    The number of time masks follows the length, as many as the permitted share fills with masks of the longest kind:
    min(num_time_masks, ceil(share T / time_mask_frames)), each at most share T / number frames long.

    Args:
      features: (T, F) float32, not changed.
      fill: (F,) float32 values of hidden bins: the mean over train, which the model's normalisation turns into 0.
    Returns:
      (T, F) float32.
    """
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


def perturb_vocal_tract(
    features: np.ndarray, factors: tuple[float, float], sampling_rate: int, generator: np.random.Generator
) -> np.ndarray:
    """Scale the frequencies as another length of the vocal tract would (Jaitly and Hinton 2013): another speaker.

    What is heard at f was said at f / factor, up to f = min(4800 Hz, 0.6 times the highest frequency) * min(factor, 1);
    from there a line leads to the highest frequency.

    Args:
      features: (T, F) float32 log-mel energies between LOW_FREQUENCY and HIGH_FREQUENCY, not changed.
      factors: the least and the largest factor; one is drawn uniformly.
    Returns:
      (T, F) float32.
    """
    factor = generator.uniform(*factors)
    if factor == 1.0:
        return features
    top = sampling_rate / 2 + HIGH_FREQUENCY
    mels = np.linspace(_mel(LOW_FREQUENCY), _mel(top), features.shape[1] + 2)[1:-1]
    edge = min(4800.0, 0.6 * top) * min(factor, 1.0)
    heard_at = 700 * (np.exp(mels / 1127) - 1)
    said_at = np.interp(heard_at, (0.0, edge, top), (0.0, edge / factor, top))
    positions = np.interp(_mel(said_at), mels, np.arange(len(mels)))
    left = np.minimum(positions.astype(np.int64), len(mels) - 2)
    share = (positions - left).astype(np.float32)
    return (1 - share) * features[:, left] + share * features[:, left + 1]


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
    left = np.minimum(positions.astype(np.int64), num_frames - 2)
    share = (positions - left).astype(np.float32)[:, None]  # (T, 1)
    return (1 - share) * features[left] + share * features[left + 1]
