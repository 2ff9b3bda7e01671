"""Tiny corpora of tones, written as real audio files with real manifests."""

import json
from pathlib import Path

import numpy as np
import soundfile

from cascade.config.options import AugmentConfig, Config, DataConfig, FeatureConfig, TokenConfig

AN4 = Path(__file__).resolve().parents[1] / ".." / "shared" / "corpora" / "an4"
WORDS = ("RED", "GREEN", "BLUE", "LEFT", "RIGHT")


def tone(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """(num_samples,) float32: three drifting tones in noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * f * time * (1 + 0.1 * time)) for f in generator.uniform(150, 3000, 3))
    return (0.2 * tones + 0.02 * generator.standard_normal(len(time))).astype(np.float32)


def small_config(**changes) -> Config:
    """16 kHz, 20 mel bins, word units, two speeds, batches of at most 6 seconds."""
    values = {
        "seed": 3,
        "features": FeatureConfig(num_mel_bins=20),
        "tokens": TokenConfig(kind="word", vocab_size=50),
        "data": DataConfig(speed_factors=(0.9, 1.0), batch_duration=6.0, num_buckets=3, max_quarantine_share=0.5),
        "augment": AugmentConfig(num_time_masks=2, time_mask_frames=10, freq_mask_bins=5, share=1.0),
    }
    return Config(**{**values, **changes})


def write_lines(path: Path, lines: list) -> Path:
    """A manifest of dicts (as JSON) and strings (as they are)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def write_corpus(root: Path, num_train: int = 13, num_dev: int = 5) -> Path:
    """A good corpus of 0.5 to 1.6 s; returns its folder of manifests."""
    generator = np.random.default_rng(7)
    for split, count in (("train", num_train), ("dev", num_dev)):
        lines = []
        for index in range(count):
            name = f"{split}{index}"
            path = root / "wav" / f"{name}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(generator.uniform(0.5, 1.6), seed=index), 16000)
            text = " ".join(generator.choice(WORDS, generator.integers(1, 4)))
            lines.append({"id": name, "path": f"../wav/{name}.flac", "text": text, "speaker": f"s{index % 3}"})
        write_lines(root / "manifests" / f"{split}.jsonl", lines)
    return root / "manifests"
