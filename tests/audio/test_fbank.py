import dataclasses
import os
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import Fbank, FbankConfig

from cascade.audio.fbank import StreamingFbank, compute_fbank, num_feature_frames
from cascade.audio.io import read_audio, read_audio_blocks
from cascade.config.options import FeatureConfig
from tests.odd_audio import wav, write_odd_files
from tests.synthetic import AN4, tone

CONFIG = FeatureConfig()
NEAR = {"atol": 2e-4, "rtol": 2e-4}


def stream(samples, config, cuts):
    fbank = StreamingFbank(config)
    frames = [fbank.accept(packet) for packet in np.split(samples, cuts)]
    return np.concatenate([*frames, fbank.finish()])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_samples=st.integers(400, 9000), rate=st.sampled_from([8000, 16000, 22050]), bins=st.sampled_from([23, 40, 80]),
    cuts=st.lists(st.integers(0, 9000), max_size=12), level=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_streamed_fbank_equals_whole_fbank(num_samples, rate, bins, cuts, level):
    samples = level * tone(1.2, rate)[:num_samples]
    num_samples = len(samples)
    config = FeatureConfig(sampling_rate=rate, num_mel_bins=bins)
    if num_samples < rate * 25 // 1000:
        return
    whole = compute_fbank(samples, config)
    streamed = stream(samples, config, sorted(cut for cut in cuts if cut <= num_samples))
    assert whole.shape == streamed.shape == (num_feature_frames(num_samples, rate), bins)
    np.testing.assert_array_equal(streamed, whole)


def test_streamed_fbank_equals_whole_fbank_from_packets_of_one_sample():
    samples = tone(0.1)
    streamed = stream(samples, CONFIG, range(1, len(samples)))
    np.testing.assert_array_equal(streamed, compute_fbank(samples, CONFIG))


@pytest.mark.skipif(not AN4.is_dir(), reason="no copy of AN4 in ../shared/corpora")
def test_streamed_fbank_equals_whole_fbank_on_real_speech():
    for path in sorted((AN4 / "wav/an4test_clstk").glob("*/*.flac"))[:20]:
        samples, _ = read_audio(path, 16000)
        streamed = stream(samples, CONFIG, range(777, len(samples), 777))
        np.testing.assert_array_equal(streamed, compute_fbank(samples, CONFIG))


def lhotse_fbank(samples, config):
    return Fbank(FbankConfig(
        sampling_rate=config.sampling_rate, num_filters=config.num_mel_bins, snip_edges=False, dither=0.0,
    )).extract(samples[None], config.sampling_rate)


def kaldifeat_fbank(samples, config):
    return compute_fbank(samples, dataclasses.replace(config, extractor="kaldifeat"))


@pytest.mark.parametrize("compute", [lhotse_fbank, kaldifeat_fbank])
def test_other_extractors_give_equal_features(compute):
    if compute is kaldifeat_fbank:
        pytest.importorskip("kaldifeat", reason="kaldifeat is not installed (tools/install_kaldifeat.sh builds it)")
    for rate, bins, num_samples in ((16000, 80, 16123), (8000, 23, 999), (16000, 80, 400)):
        samples, config = tone(1.2, rate)[:num_samples], FeatureConfig(rate, bins)
        np.testing.assert_allclose(compute_fbank(samples, config), compute(samples, config), **NEAR)


def test_a_missing_extractor_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldifeat", None)
    with pytest.raises(ImportError, match=r"features.extractor=kaldifeat .* run tools/install_kaldifeat.sh"):
        compute_fbank(tone(0.1), FeatureConfig(num_mel_bins=33, extractor="kaldifeat"))


def test_frames_come_as_soon_as_their_window_is_in():
    fbank = StreamingFbank(CONFIG)
    samples = tone(0.5)
    taken = 0
    for end in range(100, len(samples) + 1, 100):
        taken += len(fbank.accept(samples[end - 100 : end]))
        # Frame t is centred at (t + 1/2) 10 ms and reaches 12.5 ms further.
        assert taken == max(0, (end - 280) // 160 + 1)


def test_stream_shorter_than_a_window_has_no_mirrored_frames_and_a_whole_file_is_refused():
    fbank = StreamingFbank(CONFIG)
    assert fbank.accept(np.zeros(0, np.float32)).shape == (0, 80)
    assert fbank.accept(np.zeros(279, np.float32)).shape == (0, 80)
    assert fbank.finish().shape == (0, 80)
    assert fbank.finish().shape == (0, 80)
    with pytest.raises(ValueError, match="at least 400 samples"):
        compute_fbank(np.zeros(399, np.float32), CONFIG)


def test_read_audio_returns_what_was_written(tmp_path):
    samples = (tone(0.3) * 32768).round() / 32768
    for name in ("a.flac", "a.wav"):
        soundfile.write(tmp_path / name, samples, 16000)
        read, note = read_audio(tmp_path / name, 16000)
        assert note is None and read.dtype == np.float32
        np.testing.assert_array_equal(read, samples.astype(np.float32))
        part, _ = read_audio(tmp_path / name, 16000, 0.1, 0.2)
        np.testing.assert_array_equal(part, read[1600:3200])


def test_resampling_keeps_a_tone_and_its_length(tmp_path):
    for rate in (8000, 11025, 44100, 48000):
        wave = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) * 0.5
        soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
        samples, note = read_audio(tmp_path / "a.wav", 16000)
        expected = np.sin(2 * np.pi * 440 * np.arange(len(samples)) / 16000) * 0.5
        assert note == f"resampled from {rate} Hz" and abs(len(samples) - 16000) <= 1
        assert np.abs(samples - expected)[200:-200].max() < 2e-3


def test_channels_are_averaged(tmp_path):
    left, right = tone(0.2, seed=1), tone(0.2, seed=2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    samples, note = read_audio(tmp_path / "a.wav", 16000)
    assert note == "mixed down from 2 channels"
    np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.ogg", "a.mp3"])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_truncated_audio_is_an_error(tmp_path, name, share):
    soundfile.write(tmp_path / "whole.tmp", tone(3.0), 16000, format=name[2:].upper())
    content = (tmp_path / "whole.tmp").read_bytes()
    (tmp_path / name).write_bytes(content)
    assert len(read_audio(tmp_path / name, 16000)[0]) == 48000
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="truncated audio"):
        read_audio(tmp_path / name, 16000)


def lose_the_middle(flac):
    flac[len(flac) // 2 : len(flac) // 2 + 200] = bytes(200)


def lose_the_length(flac):
    flac[21] &= 0xF0  # STREAMINFO's 36 bits of total samples
    flac[22:26] = bytes(4)


@pytest.mark.parametrize(("damage", "message"), [
    (lose_the_middle, "a.flac: unreadable or truncated audio"), (lose_the_length, "encode it again"),
])
def test_damaged_flac_is_an_error_with_its_remedy(tmp_path, damage, message):
    soundfile.write(tmp_path / "a.flac", tone(1.0), 16000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    damage(content)
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_audio(tmp_path / "a.flac", 16000)


def test_wav_of_unknown_length_is_read_to_its_end(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    size = content.index(b"data") + 4
    content[size : size + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "a.wav", 16000)[0]) == 8000


def test_what_is_no_audio_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.wav"):
        read_audio(tmp_path / "none.wav", 16000)
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(ValueError, match="text.wav: unreadable"):
        read_audio(tmp_path / "text.wav", 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.wav: unreadable"):
        read_audio(tmp_path / "empty.wav", 16000)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(ValueError, match="none.wav"):
        read_audio(tmp_path / "none.wav", 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="no numbers, or far beyond any sound"):
        read_audio(tmp_path / "nan.wav", 16000)


def test_odd_files_are_refused_in_one_sentence_that_names_them(tmp_path):
    def refused(path, read):
        with pytest.raises((ValueError, OSError)) as caught:
            read(path)
        assert not isinstance(caught.value, UnicodeError) and path.name in str(caught.value)
        return str(caught.value)

    said = {}
    for path in write_odd_files(tmp_path):
        said[path.name] = refused(path, lambda path: read_audio(path, 16000))
        assert said[path.name] == refused(path, lambda path: list(read_audio_blocks(path, 16000, 1.0)))
    assert said["no_data.wav"].endswith("no_data.wav: the file holds no samples")
    assert said["rate_1.wav"].endswith("its header says a sampling rate of 1 Hz, recordings have 1000 to 768000 Hz")
    assert said["folder.wav"].endswith("a directory or a device, not an audio file")


def test_a_name_that_is_not_utf8_and_64_channels_are_read(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    path.write_bytes(wav(np.zeros(64 * 100, "<i2").tobytes(), channels=64))
    samples, note = read_audio(path, 16000)
    assert len(samples) == 100 and note == "mixed down from 64 channels"


@pytest.mark.parametrize("start, end", [(-0.1, 0.2), (0.3, 0.2), (0.2, 0.2), (0.0, 0.6), (0.6, None)])
def test_a_part_outside_the_file_is_an_error(tmp_path, start, end):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    with pytest.raises(ValueError, match="a.wav: start"):
        read_audio(tmp_path / "a.wav", 16000, start, end)


@pytest.mark.parametrize(("name", "rate", "channels"), [("a.wav", 16000, 1), ("a.flac", 44100, 2), ("a.ogg", 8000, 1)])
def test_a_recording_read_in_blocks_is_the_recording(tmp_path, name, rate, channels):
    samples = np.random.default_rng(3).uniform(-0.5, 0.5, (rate // 3 + 7, channels))
    soundfile.write(tmp_path / name, samples, rate)
    whole, note = read_audio(tmp_path / name, rate)
    blocks = list(read_audio_blocks(tmp_path / name, 16000, seconds=0.1))
    assert {block[1] for block in blocks} == {rate} and len(blocks) == 4
    np.testing.assert_array_equal(np.concatenate([block[0] for block in blocks]), whole)
    assert blocks[0][2] == read_audio(tmp_path / name, 16000)[1]
    assert (note is None) == (channels == 1)


def test_a_damaged_recording_in_blocks_says_the_same_as_whole(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(4).uniform(-0.5, 0.5, 30000), 16000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    for name in ("cut.flac", "empty.wav", "none.wav"):
        with pytest.raises((ValueError, OSError)) as whole:
            read_audio(tmp_path / name, 16000)
        with pytest.raises((ValueError, OSError)) as parts:
            list(read_audio_blocks(tmp_path / name, 16000, seconds=0.1))
        assert parts.type is whole.type and str(parts.value).split("(")[0] == str(whole.value).split("(")[0]
