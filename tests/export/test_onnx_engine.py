"""Streams on the exported files say what PyTorch says on the audio and the same zeros."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from cascade import Recognizer
from cascade.audio.fbank import StreamingFbank
from cascade.bin import transcribe
from cascade.config.options import ENCODER_FRAME_MS, ConfigError
from cascade.export.onnx_engine import OnnxEngine, read_joiner
from cascade.export.sherpa import synthetic_recordings
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.search.methods import METHODS, STREAMING_MODES, DecodingOptions, build_search
from cascade.stream.batch import StreamBatch
from cascade.stream.decoder import StreamingDecoder
from cascade.stream.endpoint import EndpointOptions
from tests.export.conftest import GEOMETRY

TIMES = {
    "chunk_ms": GEOMETRY.chunk_frames * ENCODER_FRAME_MS, "look_ahead_ms": GEOMETRY.block_frames * ENCODER_FRAME_MS,
    "left_context_ms": GEOMETRY.left_frames * ENCODER_FRAME_MS,
}
ABOUT = TIMES | {"sampling_rate": 16000, "num_mel_bins": 80, "decoding": {"blank_penalty": 0.0}}


@pytest.fixture(scope="module")
def engine(exported):
    (exported.folder / "export.json").write_text(json.dumps(ABOUT))
    return OnnxEngine(exported.folder)


def test_the_joiners_matrix_is_read_out_of_its_graph(exported, engine):
    expected = TorchEngine(exported.model)
    np.testing.assert_array_equal(engine.weight, expected.weight)
    np.testing.assert_array_equal(engine.bias, expected.bias)


def whole_steps(samples, config):
    """Features of the audio and zeros, cut to whole chunks: what a stream on the files hears."""
    fbank, step = StreamingFbank(config.features), 4 * GEOMETRY.chunk_frames
    frames = np.concatenate((fbank.accept(np.concatenate((samples, np.zeros((step + 1) * 160)))), fbank.finish()))
    return torch.from_numpy(frames[: len(frames) // step * step])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_streams_on_the_files_say_what_pytorch_says(exported, engine, mode, method):
    options = DecodingOptions(mode=mode, method=method, **TIMES)
    batch = StreamBatch(engine, engine.tokenizer, options)
    rng = random.Random(1)
    recordings = [*synthetic_recordings((0.9, 2.03, 1.31), 16000, seed=3).values()]
    decoders = [StreamingDecoder(engine, engine.config, engine.tokenizer, batch=batch) for _ in recordings]
    parts = [np.array_split(samples, rng.randint(1, 9)) for samples in recordings]
    for step in range(10):
        for decoder, packets in zip(decoders, parts, strict=True):
            if step < len(packets):
                decoder.push(packets[step], 16000)
            elif step == len(packets):
                decoder.end()
        batch.run()
    whole = DecodingOptions(mode="full" if mode == "two_pass" else mode, method=method, **TIMES)
    search = build_search(TorchEngine(exported.model), whole, exported.tokenizer.unk_id)
    for decoder, samples in zip(decoders, recordings, strict=True):
        features = whole_steps(samples, exported.config)
        expected = decode_batch(exported.model, search, features[None], torch.tensor([len(features)]), whole)[0]
        final = decoder.final()
        assert expected.tokens
        assert final.segments[0].hypotheses[0].tokens == expected.tokens
        assert final.segments[0].hypotheses[0].timestamps == expected.timestamps
        assert final.duration == len(samples) / 16000 and final.num_frames == len(features) // 4
        assert all(word.end <= final.duration for word in final.segments[0].words)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_segments_on_the_files_are_those_of_pytorch(exported, engine, mode, method):
    """Every pass goes on behind an endpoint from the state that PyTorch has there."""
    endpoint = EndpointOptions(longest_segment=0.7, late_pause=0.2, silence_after_speech=0.3)
    chunk = TIMES["chunk_ms"] * 16
    samples = synthetic_recordings((3.3,), 16000, seed=4).popitem()[1]
    samples = np.concatenate((samples, np.zeros(-len(samples) % chunk + chunk, np.float32)))
    options = DecodingOptions(mode=mode, method=method, **TIMES)
    finals = []
    for each, tail in ((engine, 0), (TorchEngine(exported.model), chunk)):
        decoder = StreamingDecoder(each, exported.config, exported.tokenizer, options, endpoint)
        for packet in np.array_split(np.concatenate((samples, np.zeros(tail, np.float32))), 17):
            decoder.accept(packet, 16000)
        finals.append(decoder.finish())
    ours, theirs = (
        [(part.first_frame, part.rule, *part.hypotheses[0].tokens, part.hypotheses[0].timestamps) for part in segments]
        for segments in (final.segments for final in finals)
    )
    assert len(ours) > 3 and ours == theirs


@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_segments_on_the_files_cover_the_stream(engine, mode):
    endpoint = EndpointOptions(longest_segment=0.7, late_pause=0.2, silence_after_speech=0.3)
    samples = synthetic_recordings((3.3,), 16000, seed=4).popitem()[1]
    batch = StreamBatch(engine, engine.tokenizer, DecodingOptions(mode=mode, **TIMES), endpoint)
    decoder = StreamingDecoder(engine, engine.config, engine.tokenizer, batch=batch)
    for packet in np.array_split(samples, 17):
        decoder.accept(packet, 16000)
    final = decoder.finish()
    assert len(final.segments) > 3 and final.text
    assert final.num_frames % GEOMETRY.chunk_frames == 0 and final.num_frames * 0.04 >= final.duration
    for segment, following in zip(final.segments, final.segments[1:], strict=False):
        assert segment.end <= following.start


def test_transcribe_runs_on_the_files(exported, engine, tmp_path, monkeypatch, capsys):
    import soundfile

    samples = synthetic_recordings((1.7,), 8000, seed=5).popitem()[1]
    soundfile.write(tmp_path / "a.wav", samples, 8000)

    def call(*arguments):
        words = ["transcribe", "--onnx-dir", str(exported.folder), *map(str, arguments), str(tmp_path / "a.wav")]
        monkeypatch.setattr("sys.argv", words)
        transcribe.main()
        return capsys.readouterr().out

    for mode in STREAMING_MODES:
        line = json.loads(call("--json", "--mode", mode))
        assert line["error"] is None and line["text"] and line["segments"][-1]["end"] <= 1.7
    with pytest.raises(ConfigError, match="--chunk-ms 640 needs other files: .* was exported with 80"):
        call("--chunk-ms", 640)
    with pytest.raises(ConfigError, match="--epoch chooses weights of --exp-dir"):
        call("--epoch", 3)


def test_a_recogniser_opens_the_files(exported, engine):
    samples = synthetic_recordings((1.7,), 16000, seed=6).popitem()[1]
    recognizer = Recognizer(exported.folder)
    options = DecodingOptions(mode="two_pass", **TIMES)
    decoder = StreamingDecoder(engine, engine.config, engine.tokenizer, options, EndpointOptions())
    decoder.accept(samples, 16000)
    assert recognizer.chunk_seconds == 0.08
    stream = recognizer.stream()
    stream.accept(samples, 16000)
    assert stream.finish().text == decoder.finish().text != ""
    with pytest.raises(ConfigError, match="--chunk-ms 640 needs other files: .* was exported with 80"):
        Recognizer(exported.folder, chunk_ms=640)
    with pytest.raises(ConfigError, match="--device cuda cannot be: onnxruntime runs exported files on the CPU"):
        Recognizer(exported.folder, device="cuda")


def test_a_folder_that_is_no_export_is_named(exported, engine, tmp_path):
    with pytest.raises(FileNotFoundError, match="export.json not found: --onnx-dir is a folder that export_onnx wrote"):
        OnnxEngine(tmp_path)
    for file in exported.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="an earlier version wrote it, run export_onnx again"):
        OnnxEngine(tmp_path)


@pytest.mark.parametrize("num_samples", [0, 1, 160, 559])
def test_too_little_audio_has_no_frame_and_no_text(exported, engine, num_samples):
    stream = Recognizer(exported.folder).stream()
    stream.push(np.full(num_samples, 0.1, np.float32), 16000)
    final = stream.finish()
    assert (final.num_frames, final.text) == (0, "")
    stream = Recognizer(exported.folder).stream()
    stream.push(np.full(560, 0.1, np.float32), 16000)
    assert stream.finish().num_frames > 0


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_joiner_is_named(exported, content, tmp_path):
    path, whole = tmp_path / "joiner.onnx", (exported.folder / "joiner.onnx").read_bytes()
    weights, num_refused = read_joiner(exported.folder / "joiner.onnx"), 0
    for size in range(16, len(whole), len(whole) // 40) if content is None else (0,):
        path.write_bytes(whole[:size] if content is None else content)
        try:
            assert all(map(np.array_equal, read_joiner(path), weights))  # cut off behind the weights
        except ValueError as error:
            assert str(path) in str(error)
            num_refused += 1
    assert num_refused


def test_another_graph_under_a_name_is_told(exported, engine, tmp_path):
    for file in exported.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "decoder.onnx").unlink()
    (tmp_path / "decoder.onnx").symlink_to(exported.folder / "joiner.onnx")
    with pytest.raises(ValueError, match="a graph that lacks 'context_size'"):
        OnnxEngine(tmp_path)
