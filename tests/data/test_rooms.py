import dataclasses
import logging
import os

import numpy as np
import pytest
import soundfile

from cascade.audio.fbank import compute_fbank
from cascade.bin.compute_features import compute_features
from cascade.config.options import AugmentConfig
from cascade.corpus.cuts import load_samples, read_cuts
from cascade.data.rooms import read_response, read_rooms, reverberate
from cascade.data.storage import read_features, stored
from tests.synthetic import small_config, tone


def decay(seconds=0.3, rate=16000, lead=0.01, seed=0):
    """A direct path `lead` seconds after the start, then noise that falls by 60 dB in `seconds`."""
    time = np.arange(round(seconds * rate)) / rate
    tail = 0.3 * np.random.default_rng(seed).standard_normal(len(time)) * 10 ** (-3 * time / seconds)
    response = np.concatenate([np.zeros(round(lead * rate)), tail])
    response[round(lead * rate)] = 1.0
    return (0.5 * response).astype(np.float32)


def write_rooms(folder):
    (folder / "small").mkdir(parents=True)
    for name, seed, rate in (("a.wav", 1, 16000), ("small/b.flac", 2, 16000), ("small/c.wav", 3, 48000)):
        soundfile.write(folder / name, decay(0.2 + 0.1 * seed, rate, seed=seed), rate)
    return folder


def config_with(share=0.5, **changes):
    return small_config(augment=AugmentConfig(rir_share=share), **changes)


def cuts_of(out, split="train"):
    return list(read_cuts(out / f"{split}_cuts.jsonl.gz"))


def rooms_of(out):
    return {cut.id: cut.custom.get("room") for cut in cuts_of(out)}


def test_a_room_keeps_length_power_and_timing():
    clicks = np.zeros(16000, np.float32)
    clicks[[2000, 9000]] = 0.8
    wet = reverberate(clicks, decay(), 160)
    assert wet.shape == clicks.shape and wet.dtype == np.float32
    assert sorted(np.argsort(-np.abs(wet))[:2]) == [2000, 9000]
    assert np.abs(wet[:2000]).max() < 1e-6 and np.abs(wet[2001:4000]).max() > 0.01
    speech = tone(1.0)
    wet = reverberate(speech, decay(), 160)
    np.testing.assert_allclose(np.mean(wet**2), np.mean(speech**2), rtol=1e-5)
    np.testing.assert_allclose(reverberate(speech, np.array([0.0, 0.0, -0.5, 0.0], np.float32), 2), -speech, atol=1e-6)
    np.testing.assert_array_equal(reverberate(np.zeros(500, np.float32), decay(), 160), np.zeros(500))


def test_the_direct_path_is_found_at_another_sampling_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", decay(rate=48000, lead=0.02), 48000)
    response, direct = read_response(tmp_path / "a.wav", 16000)
    assert abs(direct - 320) <= 1 and abs(len(response) - 0.32 * 16000) <= 1


def test_rooms_are_drawn_by_seed_id_and_speed_for_their_share(tmp_path):
    folder = write_rooms(tmp_path / "r")
    rooms = read_rooms(folder, config_with(0.3))
    drawn = {(index, speed): rooms.draw(f"u{index}", speed) for index in range(500) for speed in (0.9, 1.0)}
    share = sum(name is not None for name in drawn.values()) / len(drawn)
    assert 0.25 < share < 0.35 and set(drawn.values()) == {None, "a.wav", "small/b.flac", "small/c.wav"}
    assert any(drawn[index, 0.9] != drawn[index, 1.0] for index in range(500))
    again = read_rooms(folder, config_with(0.3))
    assert again == rooms and all(again.draw(f"u{index}", speed) == name for (index, speed), name in drawn.items())
    other = read_rooms(folder, config_with(0.3, seed=9))
    assert other.digest != rooms.digest and any(other.draw(f"u{n}", 1.0) != drawn[n, 1.0] for n in range(500))
    assert {read_rooms(folder, config_with(0.0)).draw(str(n), 1.0) for n in range(50)} == {None}
    assert None not in {read_rooms(folder, config_with(1.0)).draw(str(n), 1.0) for n in range(50)}


def test_copies_of_train_sound_as_in_their_room_and_dev_stays_dry(exp, tmp_path):
    config, folder = config_with(0.5), write_rooms(tmp_path / "r")
    compute_features(exp / "data", tmp_path / "fbank", config, 1, rir_dir=folder)
    drawn = rooms_of(tmp_path / "fbank")
    assert 5 < sum(name is not None for name in drawn.values()) < 21
    for cut in cuts_of(tmp_path / "fbank"):
        samples = load_samples(cut, 16000)
        if drawn[cut.id] is not None:
            samples = reverberate(samples, *read_response(folder / drawn[cut.id], 16000))
        expected = compute_fbank(samples, config.features)
        assert np.abs(read_features(stored(cut.features)) - expected).max() <= 0.51 * 2**-5
    name = "dev/part-00000.lca"
    assert (tmp_path / "fbank" / name).read_bytes() == (exp / "fbank" / name).read_bytes()


def test_processes_do_not_change_who_is_in_which_room(exp, tmp_path, monkeypatch):
    folder = write_rooms(tmp_path / "r")
    monkeypatch.setattr("cascade.data.storage.PART_SIZE", 5)
    for num_jobs in (1, 2):
        compute_features(exp / "data", tmp_path / f"jobs{num_jobs}", config_with(0.5), num_jobs, rir_dir=folder)
    assert rooms_of(tmp_path / "jobs1") == rooms_of(tmp_path / "jobs2")
    for path in sorted((tmp_path / "jobs1").glob("train/*.lca")):
        assert (tmp_path / "jobs2" / "train" / path.name).read_bytes() == path.read_bytes()


def test_changed_rooms_are_noticed_and_no_rooms_are_as_before(exp, tmp_path):
    config, folder, out = config_with(1.0), write_rooms(tmp_path / "r"), tmp_path / "fbank"
    compute_features(exp / "data", out, config, 1)
    archive = out / "train" / "part-00000.lca"
    assert archive.read_bytes() == (exp / "fbank" / "train" / "part-00000.lca").read_bytes()
    contents = [archive.read_bytes()]
    for options in ({"rir_dir": folder}, {}):
        compute_features(exp / "data", out, config, 1, **options)
        contents.append(archive.read_bytes())
    assert contents[0] == contents[2] != contents[1]
    fingerprints = set()
    for change in (lambda: None, lambda: os.utime(folder / "a.wav", ns=(1, 1)), (folder / "a.wav").unlink):
        change()
        fingerprints.add(read_rooms(folder, config).digest)
    fingerprints.add(read_rooms(folder, dataclasses.replace(config, augment=AugmentConfig(rir_share=0.2))).digest)
    assert len(fingerprints) == 4


def test_bad_responses_are_named_and_a_folder_of_them_is_one_clear_error(tmp_path, caplog):
    folder = write_rooms(tmp_path / "r")
    (folder / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "silent.wav", np.zeros(800), 16000)
    soundfile.write(folder / "song.flac", tone(11.0, 8000), 8000)
    with caplog.at_level(logging.INFO):
        rooms = read_rooms(folder, config_with())
    assert rooms.names == ("a.wav", "small/b.flac", "small/c.wav")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split()[1] for line in warnings] == ["broken.wav", "silent.wav", "song.flac"]
    assert "11.0 s is longer than 10 s" in warnings[2] and "3 of 6 files" in caplog.text
    for name in rooms.names:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="--rir-dir .*: none of its 3 audio files can be used; broken.wav: "):
        read_rooms(folder, config_with())
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="--rir-dir .*/none and its sub-folders hold no audio file"):
        read_rooms(tmp_path / "none", config_with())
