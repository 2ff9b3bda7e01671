import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cascade.audio.fbank import compute_fbank
from cascade.bin.compute_features import compute_features
from cascade.config.options import AugmentConfig, FeatureConfig
from cascade.data import noise as noise_module
from cascade.data.augment import utterance_generator
from cascade.data.batches import TrainBatches
from cascade.data.noise import MixNoise, open_noise, remove_noise, store_noise
from cascade.text.tokens import Tokenizer
from cascade.training.run_inputs import RunPaths, describe_inputs
from tests.synthetic import small_config, tone

NOISES = Path(__file__).resolve().parents[2] / ".." / "shared" / "corpora" / "noise"
FEATURES = FeatureConfig(num_mel_bins=20)
ALWAYS = AugmentConfig(noise_share=1.0, noise_snr_db=(10.0, 20.0))


def hiss(seconds, rate=16000, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


def write_noises(folder):
    """Three recordings in two formats, three rates and two folders: 2.0, 0.3 and 1.0 s; and a licence."""
    (folder / "music" / "deep").mkdir(parents=True)
    soundfile.write(folder / "a.flac", hiss(2.0, seed=1), 16000)
    soundfile.write(folder / "music" / "b.WAV", np.stack([hiss(0.3, 44100, 2)] * 2, 1), 44100)
    soundfile.write(folder / "music" / "deep" / "c.wav", tone(1.0, 8000, 3), 8000)
    (folder / "music" / "LICENSE.txt").write_text("do as you like")
    (folder / "music" / "._b.wav").write_text("of another system's file manager")
    return folder


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    return write_noises(tmp_path_factory.mktemp("noises"))


@pytest.fixture(scope="module")
def noisy(exp, noises, tmp_path_factory):
    """EXP/fbank of the tiny corpus with noise."""
    out = tmp_path_factory.mktemp("noisy") / "fbank"
    compute_features(exp / "data", out, small_config(), 1, noise_dir=noises)
    return out


def batches(fbank, exp, augment=None, num_workers=0, seed=3, **options):
    config = small_config(seed=seed)
    augment = augment or dataclasses.replace(config.augment, noise_share=0.6)
    config = dataclasses.replace(
        config, augment=augment, data=dataclasses.replace(config.data, num_workers=num_workers)
    )
    made = TrainBatches(fbank / "train_cuts.jsonl.gz", Tokenizer.load(exp / "tokens"), config, **options)
    made.set_epoch(2)
    return made


def by_id(made):
    return {
        name: batch.features[row, : batch.feature_lens[row]] for batch in made for row, name in enumerate(batch.ids)
    }


def energy(features):
    return np.exp(np.asarray(features, dtype=np.float64)).mean()


def test_ratio_of_speech_to_noise_is_the_drawn_one(noisy):
    noise = open_noise(noisy, 20)
    speech = compute_fbank(tone(1.5), FEATURES)
    ratios = []
    for index in range(60):
        mixed = MixNoise(noise, ALWAYS)(speech, utterance_generator(1, 1, str(index)))
        assert mixed.shape == speech.shape and mixed.dtype == np.float32 and (mixed >= speech - 1e-5).all()
        ratios.append(10 * np.log10(energy(speech) / (energy(mixed) - energy(speech))))
    assert 9.99 < min(ratios) < 11.5 and 18.5 < max(ratios) < 20.01 and 14 < np.mean(ratios) < 16
    for snr_db in (-5.0, 0.0, 30.0):
        config = dataclasses.replace(ALWAYS, noise_snr_db=(snr_db, snr_db))
        mixed = MixNoise(noise, config)(speech, utterance_generator(1, 1, "a"))
        assert abs(10 * np.log10(energy(speech) / (energy(mixed) - energy(speech))) - snr_db) < 0.01


def test_adding_mel_energies_is_what_adding_samples_does(tmp_path):
    (tmp_path / "n").mkdir()
    soundfile.write(tmp_path / "n" / "n.wav", hiss(3.0), 16000)
    store_noise(tmp_path / "n", tmp_path, FeatureConfig(), 1)
    voice, other = tone(3.0, seed=5), hiss(3.0)  # as long as the noise: it can only be cut in one place
    speech, rest = (compute_fbank(samples, FeatureConfig()) for samples in (voice, other))
    for snr_db in (0.0, 10.0, 20.0):
        gain = np.sqrt(energy(speech) / energy(rest) * 10 ** (-snr_db / 10))
        expected = compute_fbank(voice + gain.astype(np.float32) * other, FeatureConfig())
        config = dataclasses.replace(ALWAYS, noise_snr_db=(snr_db, snr_db))
        mixed = MixNoise(open_noise(tmp_path, 80), config)(speech, utterance_generator(1, 1, "a"))
        # Bin by bin the product of both signals is there; it is small where one is louder, and zero on average.
        assert np.abs(mixed - expected).mean() < 0.6 * np.abs(speech - expected).mean()
        assert np.abs(mixed - expected).mean() < 0.5 and abs((mixed - expected).mean()) < 0.2
        assert abs(10 * np.log10(energy(mixed) / energy(expected))) < 0.1


def test_noise_changes_its_share_of_the_utterances_and_nothing_else(exp, noisy):
    plain, mixed = by_id(batches(exp / "fbank", exp)), by_id(batches(noisy, exp))
    changed = [name for name in plain if not torch.equal(plain[name], mixed[name])]
    assert 0.3 * len(plain) < len(changed) < 0.9 * len(plain)
    mean = torch.load(exp / "fbank" / "stats.pt", weights_only=True)["mean"]
    for name in changed:  # SpecAugment hides the same places, and hides the noise too
        assert torch.equal(plain[name] == mean, mixed[name] == mean) and (mixed[name] == mean).any()


def test_without_noise_the_batches_are_the_same_bits(exp, noisy):
    plain = by_id(batches(exp / "fbank", exp))
    off = by_id(batches(noisy, exp, dataclasses.replace(small_config().augment, noise_share=0.0)))
    none = by_id(batches(exp / "fbank", exp, dataclasses.replace(small_config().augment, noise_share=1.0)))
    for name in plain:
        assert torch.equal(plain[name], off[name]) and torch.equal(plain[name], none[name])


def test_noise_depends_on_seed_epoch_and_id_only(exp, noisy):
    reference = by_id(batches(noisy, exp))
    rest = batches(noisy, exp).iterate(skip=2)
    ranks = [by_id(batches(noisy, exp, rank=rank, world_size=3)) for rank in range(3)]
    workers = by_id(batches(noisy, exp, num_workers=2))
    for others in (by_id(rest), *ranks, workers):
        assert others and all(torch.equal(matrix, reference[name]) for name, matrix in others.items())
    epoch = batches(noisy, exp)
    epoch.set_epoch(3)
    for others in (by_id(epoch), by_id(batches(noisy, exp, seed=4))):
        assert sum(torch.equal(matrix, reference[name]) for name, matrix in others.items()) < len(others) / 2


def test_noise_is_cut_anywhere_and_repeated_where_it_is_shorter(tmp_path):
    (tmp_path / "n").mkdir()
    soundfile.write(tmp_path / "n" / "n.wav", hiss(0.5), 16000)
    store_noise(tmp_path / "n", tmp_path, FEATURES, 1)
    noise = open_noise(tmp_path, 20)
    stored = np.load(tmp_path / "noise" / "part-00000.npy").astype(np.float32)
    np.testing.assert_allclose(stored, compute_fbank(hiss(0.5), FEATURES), atol=0.02)
    assert len(stored) == 50 and noise.num_files == 1 and abs(noise.hours * 3600 - 0.5) < 1e-9
    starts = set()
    for index in range(300):
        piece = noise.cut(20, np.random.default_rng(index))
        start = int(np.abs(stored - piece[0]).sum(axis=1).argmin())
        np.testing.assert_array_equal(piece, stored[start : start + 20])
        starts.add(start)
        piece = noise.cut(120, np.random.default_rng(index))
        np.testing.assert_array_equal(piece[:70], piece[50:])
    assert starts == set(range(31))


def test_each_second_of_noise_is_as_likely(noisy):
    noise = open_noise(noisy, 20)
    arrays = np.load(noisy / "noise" / "part-00000.npy").astype(np.float32)
    owner = {row.tobytes(): 0 if index < 200 else 1 if index < 230 else 2 for index, row in enumerate(arrays)}
    drawn = [owner[noise.cut(1, np.random.default_rng(index)).tobytes()] for index in range(1500)]
    np.testing.assert_allclose(np.bincount(drawn) / 1500, [2.0 / 3.3, 0.3 / 3.3, 1.0 / 3.3], atol=0.04)


def test_silence_is_not_amplified(tmp_path):
    (tmp_path / "n").mkdir()
    soundfile.write(tmp_path / "n" / "n.wav", np.concatenate([np.zeros(16000), hiss(0.05)]), 16000)
    store_noise(tmp_path / "n", tmp_path, FEATURES, 1)
    speech = compute_fbank(tone(0.2), FEATURES)
    outcomes = [MixNoise(open_noise(tmp_path, 20), ALWAYS)(speech, np.random.default_rng(seed)) for seed in range(40)]
    assert all(np.array_equal(mixed, speech) or energy(mixed) > 1.005 * energy(speech) for mixed in outcomes)
    assert any(np.array_equal(mixed, speech) for mixed in outcomes)


def test_bad_files_are_named_and_the_others_used(noises, tmp_path, caplog):
    folder = write_noises(tmp_path / "n")
    (folder / "broken.flac").write_bytes(b"not audio")
    soundfile.write(folder / "silent.wav", np.zeros(8000), 16000)
    soundfile.write(folder / "short.wav", hiss(0.02), 16000)
    with caplog.at_level(logging.INFO):
        store_noise(folder, tmp_path / "with", FEATURES, 1)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    for line, name in zip(sorted(warnings), ("broken.flac", "short.wav", "silent.wav"), strict=True):
        assert line.startswith(f"--noise-dir: {name} is not used: ") and "\n" not in line
    assert f"3 of 6 files of {folder} are used" in caplog.text
    store_noise(noises, tmp_path / "without", FEATURES, 1)
    one, other = (np.load(tmp_path / name / "noise" / "part-00000.npy") for name in ("with", "without"))
    np.testing.assert_array_equal(one, other)


def test_a_folder_without_usable_noise_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="--noise-dir must be an existing folder, got .*nowhere"):
        store_noise(tmp_path / "nowhere", tmp_path, FEATURES, 1)
    (tmp_path / "n" / "music").mkdir(parents=True)
    (tmp_path / "n" / "README").write_text("none here")
    with pytest.raises(ValueError, match=r"--noise-dir .*/n and its sub-folders hold no audio file \(.*\.flac"):
        store_noise(tmp_path / "n", tmp_path, FEATURES, 1)
    (tmp_path / "n" / "music" / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 audio files can be used; music/a.wav: .*unreadable"):
        store_noise(tmp_path / "n", tmp_path, FEATURES, 1)
    with pytest.raises(ValueError, match="noise features in .* are unfinished; run stage 1 again"):
        open_noise(tmp_path, 20)


def test_long_recordings_are_read_in_blocks(noises, tmp_path, monkeypatch):
    store_noise(noises, tmp_path / "whole", FEATURES, 1)
    monkeypatch.setattr(noise_module, "BLOCK_SECONDS", 0.33)
    store_noise(noises, tmp_path / "blocks", FEATURES, 1)
    whole, blocks = (np.load(tmp_path / name / "noise" / "part-00000.npy") for name in ("whole", "blocks"))
    assert abs(len(whole) - len(blocks)) <= 4
    inner = np.abs(whole[:30].astype(np.float32) - blocks[:30]).max(axis=1)  # the edge of a block is mirrored
    assert (inner < 0.05).mean() > 0.9


def test_an_interrupted_run_goes_on_and_other_inputs_start_afresh(noises, tmp_path, monkeypatch):
    monkeypatch.setattr(noise_module, "PART_SIZE", 1)
    folder = write_noises(tmp_path / "n")
    compute_part, computed = noise_module._compute_part, []

    def interrupted(part):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(part.names[0])
        compute_part(part)

    monkeypatch.setattr(noise_module, "_compute_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store_noise(folder, tmp_path, FEATURES, 1)
    with pytest.raises(ValueError, match="unfinished"):
        open_noise(tmp_path, 20)

    def counted(part):
        computed.append(part.names[0])
        compute_part(part)

    monkeypatch.setattr(noise_module, "_compute_part", counted)
    store_noise(folder, tmp_path, FEATURES, 1)
    assert computed == ["a.flac", "music/b.WAV", "music/deep/c.wav"] and open_noise(tmp_path, 20).num_files == 3
    index = (tmp_path / "noise" / "index.json").read_bytes()
    store_noise(folder, tmp_path, FEATURES, 1)
    assert len(computed) == 3 and (tmp_path / "noise" / "index.json").read_bytes() == index
    os.utime(folder / "a.flac", ns=(1, 1))
    store_noise(folder, tmp_path, FEATURES, 1)
    assert len(computed) == 6 and (tmp_path / "noise" / "index.json").read_bytes() != index
    with pytest.raises(ValueError, match="has 20 mel bins, but features.num_mel_bins=80"):
        open_noise(tmp_path, 80)
    monkeypatch.setattr(noise_module, "_compute_part", compute_part)
    store_noise(folder, tmp_path, FeatureConfig(num_mel_bins=80), 2)
    assert open_noise(tmp_path, 80).num_files == 3


def test_features_computed_without_noise_forget_that_of_an_earlier_run(exp, noises, tmp_path):
    out = tmp_path / "fbank"
    compute_features(exp / "data", out, small_config(), 1, noise_dir=noises)
    assert open_noise(out, 20) is not None
    archives = {path: path.stat().st_mtime_ns for path in out.rglob("*.lca")}
    compute_features(exp / "data", out, small_config(), 1)
    assert open_noise(out, 20) is None and not list((out / "noise").iterdir())
    assert archives == {path: path.stat().st_mtime_ns for path in out.rglob("*.lca")}
    remove_noise(tmp_path)  # where there is none


def test_a_run_with_other_noise_is_another_run(exp, noisy, noises, tmp_path):
    def mark(fbank):
        return describe_inputs(small_config(), RunPaths(fbank, exp / "tokens", tmp_path))["noise"]

    for name in ("stats.pt", "train_cuts.jsonl.gz"):
        (tmp_path / name).write_bytes((noisy / name).read_bytes())
    marks = [mark(tmp_path)]
    for name in ("a.flac", "music/deep/c.wav"):
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        (folder / "n.flac").symlink_to(noises / name)
        store_noise(folder, tmp_path, FEATURES, 1)
        marks.append(mark(tmp_path))
    remove_noise(tmp_path)
    assert len(set(marks)) == 3 and mark(tmp_path) is marks[0] is None


@pytest.mark.skipif(not NOISES.is_dir(), reason="no copy of the noises in ../shared/corpora")
def test_real_noises_in_opus_are_read(tmp_path):
    (tmp_path / "n").mkdir()
    for index, path in enumerate(sorted(NOISES.rglob("*.opus"))[::100]):
        os.symlink(path.resolve(), tmp_path / "n" / f"{index}.opus")
    store_noise(tmp_path / "n", tmp_path, FEATURES, 1)
    noise = open_noise(tmp_path, 20)
    assert noise.num_files == 8 and np.isfinite(noise.cut(1000, np.random.default_rng(0))).all()
