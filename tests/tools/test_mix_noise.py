"""Recorded noise in a test set: at the asked ratio, the same for every ratio, for whoever reads manifests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cascade.audio.io import read_audio
from cascade.corpus.manifests import read_manifest
from tools.mix_noise import Noises

PROGRAM = Path(__file__).parents[2] / "tools" / "mix_noise.py"
RATE = 16000


@pytest.fixture
def corpus(tmp_path):
    """Two utterances with silence around them, three recordings of noise of which one is silent."""
    random = np.random.default_rng(1)
    for name, seconds in (("a", 1.5), ("b", 0.7)):
        samples = np.zeros(int(seconds * RATE))
        samples[2000:-2000] = 0.1 * random.standard_normal(len(samples) - 4000)
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE)
    (tmp_path / "noise" / "deep").mkdir(parents=True)
    soundfile.write(tmp_path / "noise" / "long.wav", 0.3 * random.standard_normal(3 * RATE), RATE)
    soundfile.write(tmp_path / "noise" / "deep" / "short.flac", 0.02 * random.standard_normal(RATE // 2), RATE)
    soundfile.write(tmp_path / "noise" / "silent.wav", np.zeros(RATE), RATE)
    lines = [{"id": "a", "path": "a.wav", "text": "one", "speaker": "s", "words": [[0.2, 1.1]]},
             {"id": "b", "path": "b.wav", "text": "two"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def mix(folder, *options):
    command = [sys.executable, PROGRAM, "--manifest", folder / "test.jsonl", "--noise-dir", folder / "noise",
               "--out", folder / "out", *options]  # fmt: skip
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def added(folder, name):
    """What was added to each utterance, and the utterance."""
    clean = list(read_manifest(folder / "test.jsonl"))
    noisy = list(read_manifest(folder / "out" / f"{name}.jsonl"))
    assert [(each.id, each.text, each.speaker, each.words) for each in noisy] == [
        ("a", "one", "s", [[0.2, 1.1]]), ("b", "two", None, None)
    ]
    for line, other in zip(clean, noisy, strict=True):
        samples = read_audio(line.path, RATE)[0]
        yield read_audio(other.path, RATE)[0] - samples, samples


def test_noise_has_the_asked_ratio_to_speech_and_is_the_same_at_every_ratio(corpus):
    result = mix(corpus, "--snr", "10", "0.5")
    assert result.returncode == 0, result.stderr
    for (high, samples), (low, _) in zip(added(corpus, "snr10"), added(corpus, "snr0.5"), strict=True):
        ratio = 10 * np.log10(np.mean(samples[2000:-2000] ** 2) / np.mean(high**2))
        assert ratio == pytest.approx(10, abs=0.2)
        assert np.corrcoef(high, low)[0, 1] > 0.99


def test_the_seed_draws_and_silence_is_never_drawn(corpus):
    noises = Noises(corpus / "noise", RATE)
    draws = [noises.stretch(RATE, seed) for seed in range(20)]
    assert all(np.mean(draw**2) == pytest.approx(1, rel=1e-3) for draw in draws)
    assert np.array_equal(draws[3], noises.stretch(RATE, 3)) and not np.array_equal(draws[3], draws[4])


@pytest.mark.parametrize("keep, message", [((), "hold no audio file"), (("silent.wav",), "holds silence and nothing")])
def test_a_folder_without_noise_is_one_sentence(corpus, keep, message):
    for path in list((corpus / "noise").rglob("*.*")):
        if path.name not in keep:
            path.unlink()
    result = mix(corpus)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("words, message", [
    (("--snr", "10", "nan"), "--snr must be numbers of dB, got 10.0 nan"),
    (("--sampling-rate", "0"), "--sampling-rate must be at least 1000, got 0"),
])
def test_a_wrong_option_is_one_sentence(corpus, words, message):
    result = mix(corpus, *words)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
