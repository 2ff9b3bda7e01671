"""Noise that is computed, for corpora that are synthesised: the same seed gives the same samples."""

from __future__ import annotations

import numpy as np
from scipy import fft

KINDS = ("white", "pink", "brown", "hum", "fan", "babble")
_EXPONENTS = {"white": 0.0, "pink": 1.0, "brown": 2.0, "fan": 1.5, "babble": 1.0}  # power falls as 1 / f^exponent


def make_noise(kind: str, num_samples: int, sampling_rate: int, generator: np.random.Generator) -> np.ndarray:
    """Noise of mean power 1.

    Args:
      kind: white, pink and brown: power density 1, 1/f, 1/f^2; hum: mains at 50 or 60 Hz with overtones; fan: 1/f^1.5
        that swells a few times a second; babble: noise in the band of speech that swells like syllables of six voices.
    Returns:
      (num_samples,) float32.
    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"noise kind must be one of {', '.join(KINDS)}, got {kind!r}")
    seconds = np.arange(num_samples) / sampling_rate
    if kind == "hum":
        mains = generator.choice([50.0, 60.0])
        noise = sum(
            np.sin(2 * np.pi * mains * order * seconds + generator.uniform(0, 2 * np.pi)) / order
            for order in range(1, 9)
        )
        noise = noise + 0.1 * generator.standard_normal(num_samples)
    elif kind == "babble":
        noise = sum(
            _coloured(1.0, num_samples, sampling_rate, generator, band=(150.0, 4000.0))
            * _swell(seconds, generator.uniform(2.5, 5.5), 0.9, generator) for _ in range(6)
        )
    else:
        noise = _coloured(_EXPONENTS[kind], num_samples, sampling_rate, generator)
        if kind == "fan":
            noise = noise * _swell(seconds, generator.uniform(0.5, 6.0), 0.4, generator)
    return (noise / np.sqrt(np.mean(noise**2) + 1e-20)).astype(np.float32)


def add_noise(samples: np.ndarray, kind: str, snr_db: float, sampling_rate: int, seed: int) -> np.ndarray:
    """`mix_noise` with noise of this kind."""
    return mix_noise(samples, make_noise(kind, len(samples), sampling_rate, np.random.default_rng(seed)), snr_db)


def mix_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise `snr_db` below the speech, whose power is measured where there is any (the silence around it is not).

    Args:
      samples: (num_samples,) float32; noise: as many, of mean power 1.
    Returns:
      (num_samples,) float32; it may leave [-1, 1].
    """
    spoken = samples[np.abs(samples) > 0.01 * np.abs(samples).max()]
    power = float(np.mean(spoken.astype(np.float64) ** 2)) if spoken.size else 0.0
    return samples + np.float32(np.sqrt(power * 10 ** (-snr_db / 10))) * noise


def _coloured(
    exponent: float, num_samples: int, sampling_rate: int, generator: np.random.Generator,
    band: tuple[float, float] | None = None,
) -> np.ndarray:
    length = fft.next_fast_len(num_samples, real=True)
    spectrum = fft.rfft(generator.standard_normal(length))
    hertz = fft.rfftfreq(length, 1 / sampling_rate)
    low, high = band or (20.0, sampling_rate / 2)
    spectrum *= np.maximum(hertz, 20.0) ** (-exponent / 2) * ((hertz >= low) & (hertz <= high))
    noise = fft.irfft(spectrum, length)[:num_samples]
    return noise / (np.std(noise) + 1e-20)


def _swell(seconds: np.ndarray, hertz: float, depth: float, generator: np.random.Generator) -> np.ndarray:
    return 1 + depth * np.sin(2 * np.pi * hertz * seconds + generator.uniform(0, 2 * np.pi))
