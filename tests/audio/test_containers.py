"""Files that are not one whole recording are refused; libsndfile would read a part of them without a word."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from cascade.audio.io import read_audio
from tests.odd_audio import TONE, wav

PCM = (TONE * 32767).astype("<i2").tobytes()
NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, 48000).astype(np.float32)


def encoded(samples=NOISE, rate=16000, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def read(tmp_path, content):
    path = tmp_path / "a.audio"
    path.write_bytes(content)
    return read_audio(path, 16000)[0]


@pytest.mark.parametrize(("kind", "options"), [
    ("AIFF", {}), ("AU", {}), ("AU", {"endian": "LITTLE"}), ("RF64", {}), ("W64", {}), ("NIST", {}), ("WAV", {}),
    ("WAVEX", {}), ("WAV", {"subtype": "FLOAT"}), ("AIFF", {"subtype": "ULAW"}),
])
def test_a_file_cut_short_is_refused_and_a_whole_one_is_not(tmp_path, kind, options):
    content = encoded(format=kind, **options)
    assert len(read(tmp_path, content)) == 48000
    for size in (len(content) // 2, len(content) - 400):
        with pytest.raises(ValueError, match=r"a\.audio: truncated audio, \d+ of the \d+ bytes"):
            read(tmp_path, content[:size])


def test_a_wav_whose_header_says_nothing_of_what_follows_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="declares no samples, but 16000 bytes follow.*encode it again"):
        read(tmp_path, wav(PCM, claimed=0))
    with pytest.raises(ValueError, match="holds no samples"):
        read(tmp_path, wav(b""))


@pytest.mark.parametrize("options", [
    {"format": "FLAC"}, {"format": "OGG", "subtype": "OPUS"}, {"format": "OGG", "subtype": "VORBIS"}, {"format": "MP3"},
    {"format": "WAV"}, {"format": "AU"}, {"format": "RF64"}, {"format": "W64"}, {"format": "NIST"},
])
def test_several_recordings_in_one_file_are_refused(tmp_path, options):
    first, second = encoded(**options), encoded(NOISE[::-1].repeat(2), **options)
    assert len(read(tmp_path, first)) == 48000 and len(read(tmp_path, second)) == 96000
    with pytest.raises(ValueError, match=r"a\.audio: .*several .* encode it again"):
        read(tmp_path, first + second)


def test_samples_behind_those_that_a_wav_declares_are_told_and_tags_are_not(tmp_path):
    with pytest.raises(ValueError, match="header declares 6000 bytes of samples, and 10000 more follow"):
        read(tmp_path, wav(PCM, claimed=6000))
    whole = wav(PCM)
    for tag in (b"LIST" + (20000).to_bytes(4, "little") + bytes(20000), bytes(5), bytes(9000), b"ID3 RIFF" * 100):
        assert len(read(tmp_path, whole + tag)) == 8000


def speech_like(loud_first):
    """Ten seconds of which one half is quiet: an MP3 of variable bit rate spends few bytes on it."""
    parts = [np.tile(NOISE, 2)[:80000], np.zeros(80000, np.float32)]
    return np.concatenate(parts if loud_first else parts[::-1])


@pytest.mark.parametrize("loud_first", [True, False])
def test_an_mp3_without_its_length_is_refused_unless_the_guess_is_right(tmp_path, loud_first):
    content = encoded(speech_like(loud_first), format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    assert len(read(tmp_path, content)) == 160000
    sync = content.index(b"\xff\xf3", 4)  # the first frame holds the length
    with pytest.raises(ValueError, match=r"without its length: its header says .* s, 10\.\d s are there"):
        read(tmp_path, content[sync:])
    constant = encoded(speech_like(loud_first), format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    assert abs(len(read(tmp_path, constant[constant.index(b"\xff\xf3", 4) :])) - 160000) < 2000


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
def test_mp3s_of_all_rates_with_tags_around_them_are_read_whole(tmp_path, rate, mode):
    channels = np.stack([np.tile(NOISE, 3), np.tile(NOISE[::-1], 3)], axis=1)
    content = encoded(channels, rate, format="MP3", bitrate_mode=mode, compression_level=0.5)
    picture = b"ID3\x04\x00\x00" + bytes([0, 0, 0x20, 0]) + b"\xff\xfb\x90\x64" * 1024  # looks like frames
    samples = read(tmp_path, picture + content + b"TAG".ljust(128, b"\xff"))
    assert abs(len(samples) - 144000 * 16000 / rate) <= 1
