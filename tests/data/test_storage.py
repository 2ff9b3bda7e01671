import dataclasses
import gzip
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from cascade.audio.fbank import compute_fbank, equal_features
from cascade.bin.compute_features import compute_features
from cascade.config.options import DataConfig, FeatureConfig
from cascade.corpus.cuts import load_samples, read_cuts
from cascade.data import storage
from cascade.data.storage import read_features, read_stats, stored
from tests.synthetic import small_config


def lines(path):
    with gzip.open(path) as file:
        return file.read().splitlines()


def test_stored_features_equal_computed_ones_to_the_storage_step(exp):
    config = small_config()
    for split, step in (("train", 2**-5), ("dev", 2**-8)):
        for cut in read_cuts(exp / "fbank" / f"{split}_cuts.jsonl.gz"):
            expected = compute_fbank(load_samples(cut, 16000), config.features)
            assert np.abs(read_features(stored(cut.features)) - expected).max() <= 0.51 * step
            assert cut.num_frames == len(expected)


def test_train_has_each_speed_and_the_other_splits_one(exp):
    ids = [cut.id for cut in read_cuts(exp / "fbank" / "train_cuts.jsonl.gz")]
    assert ids == [f"train{index}{suffix}" for index in range(13) for suffix in ("_sp0.9", "")]
    assert len(list(read_cuts(exp / "fbank" / "dev_cuts.jsonl.gz"))) == 5
    plain = {cut.id: cut for cut in read_cuts(exp / "fbank" / "train_cuts.jsonl.gz")}
    for index in range(13):
        slow, normal = plain[f"train{index}_sp0.9"], plain[f"train{index}"]
        assert abs(slow.duration - normal.duration / 0.9) < 1e-3
        assert slow.supervisions[0].text == normal.supervisions[0].text
        assert slow.custom["utterance"] == normal.id


def test_speed_changes_tempo_and_pitch_together(tmp_path):
    import soundfile

    from cascade.corpus.cuts import at_speed, validate
    from cascade.corpus.manifests import Utterance

    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000), 16000)
    cut, _ = validate(Utterance("a", tmp_path / "a.wav", "A"), "train", small_config())
    for factor in (0.9, 1.1, 0.97):
        copy, samples = at_speed(cut, load_samples(cut, 16000), factor)
        assert len(samples) == copy.num_samples and abs(len(samples) * factor - 16000) <= 2
        peak = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * 16000 / len(samples)
        assert abs(peak - 500 * factor) < 2


def test_stats_are_the_mean_and_deviation_of_train_frames(exp):
    config = small_config()
    frames = torch.cat([
        torch.from_numpy(compute_fbank(load_samples(cut, 16000), config.features))
        for cut in read_cuts(exp / "fbank" / "train_cuts.jsonl.gz")
    ])
    stats = read_stats(exp / "fbank" / "stats.pt")
    torch.testing.assert_close(stats["mean"], frames.mean(0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(stats["std"], frames.std(0, correction=0), atol=1e-4, rtol=1e-4)
    assert stats["mean"].dtype == stats["std"].dtype == torch.float32


def test_an_interrupted_run_goes_on_where_it_stopped_and_gives_the_same_files(exp, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART_SIZE", 4)
    config = small_config()
    compute_features(exp / "data", tmp_path / "whole", config, num_jobs=1)
    computed = []
    compute_part = storage._compute_part

    def interrupted(part):
        if len(computed) == 4:
            raise KeyboardInterrupt
        computed.append(part.stem.name)
        compute_part(part)

    monkeypatch.setattr(storage, "_compute_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute_features(exp / "data", tmp_path / "again", config, num_jobs=1)
    assert not (tmp_path / "again" / "train_cuts.jsonl.gz").exists()
    (tmp_path / "again" / "train" / ".123-part-00002.lca").write_bytes(b"of a killed process")
    monkeypatch.setattr(storage, "_compute_part", lambda part: (computed.append(part.stem.name), compute_part(part)))
    compute_features(exp / "data", tmp_path / "again", config, num_jobs=1)
    assert sorted(computed) == sorted([f"part-{n:05d}" for n in range(2)] + [f"part-{n:05d}" for n in range(4)])
    for name in ("train/part-00000.lca", "train/part-00003.lca", "dev/part-00001.lca"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole = [line.replace(b"/whole/", b"/again/") for line in lines(tmp_path / "whole" / "train_cuts.jsonl.gz")]
    assert lines(tmp_path / "again" / "train_cuts.jsonl.gz") == whole
    assert not list((tmp_path / "again" / "train").glob(".*"))


def test_other_inputs_start_afresh_and_touch_nothing_else(exp, tmp_path):
    out = tmp_path / "fbank"
    (out / "train").mkdir(parents=True)
    (out / "train" / "notes.txt").write_text("mine")
    compute_features(exp / "data", out, small_config(), num_jobs=1)
    changed = small_config(features=FeatureConfig(num_mel_bins=23), data=DataConfig(speed_factors=(1.0, 1.0)))
    compute_features(exp / "data", out, changed, num_jobs=1)
    cuts = list(read_cuts(out / "train_cuts.jsonl.gz"))
    assert len(cuts) == 13 and {cut.features.num_features for cut in cuts} == {23}
    assert (out / "train" / "notes.txt").read_text() == "mine"


def test_another_extractor_or_number_of_processes_computes_nothing_again(exp, tmp_path):
    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("part-*")}

    noises = tmp_path / "noises"
    noises.mkdir()
    soundfile.write(noises / "hiss.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 16000)
    compute_features(exp / "data", tmp_path, small_config(), 1, noise_dir=noises)
    before, index = times(), (tmp_path / "noise" / "index.json").read_bytes()
    other = dataclasses.replace(small_config().features, extractor="kaldifeat")
    compute_features(exp / "data", tmp_path, small_config(features=other), 2, noise_dir=noises)
    assert before and times() == before
    assert (tmp_path / "noise" / "index.json").read_bytes() == index


def test_an_option_that_is_newer_than_stored_features_does_not_count_until_it_is_set():
    Newer = dataclasses.make_dataclass("Newer", [("newer", int, 1)], bases=(FeatureConfig,), frozen=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cascade.audio.fbank.FeatureConfig", Newer)
        assert equal_features(Newer()) == equal_features(FeatureConfig())
        assert equal_features(Newer(newer=2))[0] == dataclasses.asdict(FeatureConfig()) | {"newer": 2}


def test_features_of_a_moved_folder_are_computed_again(exp, tmp_path):
    compute_features(exp / "data", tmp_path / "a", small_config(), num_jobs=1)
    (tmp_path / "a").rename(tmp_path / "b")
    cut = next(read_cuts(tmp_path / "b" / "dev_cuts.jsonl.gz"))
    with pytest.raises(ValueError, match="run stage 1 again"):
        read_features(stored(cut.features))
    compute_features(exp / "data", tmp_path / "b", small_config(), num_jobs=1)
    assert len(read_features(stored(next(read_cuts(tmp_path / "b" / "dev_cuts.jsonl.gz")).features)))


def test_processes_do_not_change_the_features(exp, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART_SIZE", 5)
    for num_jobs in (1, 2):
        compute_features(exp / "data", tmp_path / f"jobs{num_jobs}", small_config(), num_jobs)
    archives = sorted(path.relative_to(tmp_path / "jobs1") for path in (tmp_path / "jobs1").glob("*/*.lca"))
    assert len(archives) == 4
    for name in archives:
        assert (tmp_path / "jobs2" / name).read_bytes() == (tmp_path / "jobs1" / name).read_bytes()


def test_sigterm_exits_with_75_and_the_next_run_finishes(exp, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for attempt in range(5):  # on a busy machine the signal may come when all is done
        out = tmp_path / f"fbank-{attempt}"
        command = [
            sys.executable, "-m", "cascade.bin.compute_features", "--data", str(exp / "data"), "--out", str(out),
            "--num-jobs", "2", "--config", "features.num_mel_bins=20", "data.speed_factors=[0.9,1.0]",
        ]
        first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (out / "dev" / "fingerprint").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        first.send_signal(signal.SIGTERM)
        message = first.communicate()[1]
        if first.returncode != 0:
            break
    assert first.returncode == 75 and "interrupted" in message, message
    compute_features(exp / "data", out, small_config(), num_jobs=1)
    for split in ("train", "dev"):
        name = f"{split}/part-00000.lca"
        assert (out / name).read_bytes() == (exp / "fbank" / name).read_bytes()
