"""`from cascade import Recognizer`: a folder to text."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

from cascade import Recognizer
from cascade.audio.io import read_audio
from cascade.checkpoint import load_model
from cascade.config.options import ConfigError
from cascade.models.torch_engine import TorchEngine
from cascade.search.methods import STREAMING_MODES, DecodingOptions
from cascade.stream.decoder import StreamingDecoder
from cascade.stream.endpoint import EndpointOptions


def recordings(run_dir):
    return [read_audio(run_dir / f"{number}.wav", 16000)[0] for number in range(4)]


@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_it_says_what_the_decoder_says_whatever_the_packets(run_dir, mode):
    recognizer = Recognizer(run_dir / "student", mode=mode, left_context_ms=640)
    model, config, tokenizer = load_model(run_dir / "student")
    for samples in recordings(run_dir):
        options = DecodingOptions(mode, left_context_ms=640)
        decoder = StreamingDecoder(TorchEngine(model), config, tokenizer, options, EndpointOptions())
        decoder.accept(samples, 16000)
        expected = decoder.finish()
        stream = recognizer.stream()
        for packet in np.array_split(samples, 7):
            partial = stream.accept(packet, 16000)
            assert partial.text.startswith(partial.stable_text) and partial.decoded <= len(samples) / 16000
        final = stream.finish()
        assert final.text == expected.text != "" and final.text == stream.finish().text
        assert [word.word for word in final.words] == [word.word for word in expected.segments[0].words]


def test_streams_that_advance_together_say_what_each_says_alone(run_dir):
    recognizer = Recognizer(run_dir / "student")
    alone = []
    for samples in recordings(run_dir):
        stream = recognizer.stream()
        stream.accept(samples, 16000)
        alone.append(stream.finish().text)
    left = recognizer.stream()
    left.push(recordings(run_dir)[0], 16000)
    streams = [recognizer.stream() for _ in alone]
    for stream, samples in zip(streams, recordings(run_dir), strict=True):
        stream.push(samples, 16000)
        stream.end()
    left.leave()
    recognizer.advance()
    assert [stream.final().text for stream in streams] == alone
    assert all(stream.partial().decoded > 0 for stream in streams)


def test_streams_that_are_dropped_take_no_memory_and_change_nothing(run_dir):
    recognizer = Recognizer(run_dir / "student")
    alone = recognizer.stream()
    alone.push(recordings(run_dir)[0], 16000)
    expected = alone.finish().text
    kept, *dropped = (recognizer.stream() for _ in range(4))
    for number, stream in enumerate((kept, *dropped)):
        stream.push(recordings(run_dir)[number][: 9000 if number else None], 16000)
    recognizer.advance()
    dropped.clear()
    del stream
    recognizer.advance()
    assert len(kept.batch) == 1 and kept.finish().text == expected
    assert len(kept.batch) == 0


def test_integers_are_the_samples_that_a_file_of_them_has(run_dir, tmp_path):
    recognizer = Recognizer(run_dir / "student")
    for rate in (8000, 44100):
        samples = (recordings(run_dir)[0] * 32767).astype(np.int16)
        soundfile.write(tmp_path / "a.wav", samples, rate, subtype="PCM_16")
        texts = []
        for packet in (samples, soundfile.read(tmp_path / "a.wav", dtype="float32")[0]):
            stream = recognizer.stream()
            stream.accept(packet, rate)
            texts.append(stream.finish())
        assert texts[0].text == texts[1].text and texts[0].duration == len(samples) / rate


def test_what_a_user_gets_wrong_is_one_sentence(run_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        Recognizer(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="averaged.pt not found"):
        Recognizer(tmp_path)
    with pytest.raises(ConfigError, match="no option beams"):
        Recognizer(run_dir / "student", beams=3)
    with pytest.raises(ConfigError, match="--mode must be one of"):
        Recognizer(run_dir / "student", mode="fast")
    for options, message in (
        ({"hotwords": ["a"]}, "name of a file"), ({"device": "gpu"}, "device must be one of"),
        ({"beam": 2.5}, "--beam must be a whole number, got 2.5"),
        ({"threads": 0}, "threads must be at least 1"), ({"average": 3}, "average=3 needs an epoch"),
        ({"chunk_ms": "320"}, "--chunk-ms must be a whole number, got '320'"),
        ({"blank_penalty": "0.5"}, "--blank-penalty must be a number, got '0.5'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recognizer(run_dir / "student", **options)
    recognizer = Recognizer(run_dir / "student", endpoint=None, left_context_ms=None, beam=np.int64(2))
    with pytest.raises(ValueError, match="hotword 'cascade' has what the model's tokens cannot say"):
        recognizer.stream(hotwords=["cascade"])
    stream = recognizer.stream(hotwords=[])
    wrong = ((np.zeros(9, np.int32), 16000), (np.zeros((9, 2)), 16000), (np.zeros(9), 3), (np.zeros(9), "16000"))
    for samples, rate in wrong:
        with pytest.raises(ValueError, match="samples must be|sampling_rate must be"):
            stream.push(samples, rate)
    stream.finish()
    with pytest.raises(ValueError, match="the stream has ended"):
        stream.push(np.zeros(9), 16000)


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, cascade, cascade.files; print(*sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    with pytest.raises(ImportError):
        from cascade import Nothing  # noqa: F401
