import io
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from cascade.audio.io import read_audio
from cascade.bin import transcribe
from cascade.checkpoint import load_model
from cascade.config.options import ConfigError
from cascade.models.torch_engine import TorchEngine
from cascade.processes.exits import Interrupted
from cascade.search.methods import METHODS, STREAMING_MODES, DecodingOptions
from cascade.stream import inputs
from cascade.stream.batch import StreamBatch
from cascade.stream.decoder import Segment, StreamingDecoder
from cascade.stream.subtitles import format_srt, format_vtt
from cascade.stream.words import Word
from tests.odd_audio import write_odd_files
from tests.tiny_run import SECONDS


@pytest.fixture
def call(run_dir, monkeypatch, capsys):
    """Runs the program; returns the exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["transcribe", "--exp-dir", str(run_dir / "student"), *map(str, arguments)])
        threads, code = torch.get_num_threads(), 0
        try:
            transcribe.main()
        except SystemExit as error:
            code = error.code
        finally:
            torch.set_num_threads(threads)
        return (code, *capsys.readouterr())

    run.output = lambda: capsys.readouterr().out
    return run


def recordings(run_dir):
    return [run_dir / f"{number}.wav" for number in range(4)]


def pcm(path):
    return (soundfile.read(path)[0] * 32768).round().astype("<i2").tobytes()


def without_confidences(lines):
    return re.sub(r'"confidence": [0-9.e-]+', "", lines)


def pipe(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_json_has_one_object_per_file_with_exact_keys(run_dir, call):
    code, out, _ = call("--json", *recordings(run_dir))
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["path"] for line in lines] == [str(path) for path in recordings(run_dir)]
    for line, seconds in zip(lines, SECONDS, strict=True):
        assert list(line) == ["path", "mode", "text", "segments", "error"]
        assert line["mode"] == "two_pass" and line["error"] is None and line["text"]
        assert line["text"] == " ".join(segment["text"] for segment in line["segments"])
        for segment in line["segments"]:
            assert list(segment) == ["start", "end", "text", "words"]
            assert 0 <= segment["start"] < segment["end"] <= seconds + 1e-3
            assert segment["text"] == " ".join(word["word"] for word in segment["words"])
            for word in segment["words"]:
                assert list(word) == ["word", "start", "end", "confidence"]
                assert segment["start"] <= word["start"] < word["end"] <= segment["end"] and 0 < word["confidence"] <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", STREAMING_MODES)
def test_files_decoded_together_say_what_each_says_alone(run_dir, call, mode, method):
    options = ["--json", "--mode", mode, "--method", method, "--left-context-ms", 640]
    together = call(*options, *recordings(run_dir))[1]
    alone = call(*options, "--num-streams", 1, *recordings(run_dir))[1]
    assert without_confidences(alone) == without_confidences(together)  # float32 sums depend on the batch's size
    model, config, tokenizer = load_model(run_dir / "student")
    for path, line in zip(recordings(run_dir), together.splitlines(), strict=True):
        options = DecodingOptions(mode, method, left_context_ms=640)
        decoder = StreamingDecoder(TorchEngine(model), config, tokenizer, options)
        decoder.accept(read_audio(path, 16000)[0], 16000)
        assert json.loads(line)["text"] == decoder.finish().text


def test_a_bad_file_is_named_and_the_others_still_run(run_dir, call, tmp_path):
    good, *_ = recordings(run_dir)
    soundfile.write(tmp_path / "short.wav", np.zeros(300), 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    bad = [tmp_path / "none.wav", run_dir / "broken.wav", tmp_path / "empty.wav", tmp_path / "short.wav"]
    expected = call(good)[1]
    code, out, error = call(*bad, good)
    assert code == 1 and out == f"# {good}\n{expected}"
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 4 and all(str(path) in line for path, line in zip(bad, sentences, strict=True))
    assert sentences[0] == f"error: audio file not found: {bad[0]}"
    assert sentences[3] == f"error: {bad[3]}: 0.019 s of audio is too short, the shortest is 0.04 s"
    code, out, _ = call("--json", *bad, good)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [line["error"] is None for line in lines] == [False] * 4 + [True]
    assert [line["path"] for line in lines] == [str(path) for path in [*bad, good]]
    assert all(line["text"] == "" and line["segments"] == [] for line in lines[:4])


@pytest.mark.parametrize("num_streams", [1, 5])
def test_odd_files_end_nobody_elses_transcript(run_dir, call, tmp_path, num_streams):
    good, odd = recordings(run_dir)[0], write_odd_files(tmp_path / "odd")
    expected = json.loads(call("--json", good)[1])
    paths = [good, *odd, good]
    code, out, error = call("--json", "--num-streams", num_streams, *paths)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [line["path"] for line in lines] == [str(path) for path in paths]
    assert [without_confidences(json.dumps(lines[place])) for place in (0, -1)] == [
        without_confidences(json.dumps(expected))
    ] * 2
    for path, line in zip(odd, lines[1:-1], strict=True):
        assert line["text"] == "" and path.name in line["error"] and f"error: {line['error']}\n" in error
    assert "Traceback" not in error


def test_a_name_that_is_not_utf8_is_written_in_json_and_text(run_dir, call, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    path.write_bytes(recordings(run_dir)[1].read_bytes())
    code, out, _ = call("--json", path)
    assert code == 0 and json.loads(out)["path"] == str(path)
    assert call(path, recordings(run_dir)[0])[0] == 0
    assert call("--json", "--out", tmp_path / "out", path)[0] == 0


def test_what_fails_while_streams_are_decoded_together_is_the_fault_of_one(run_dir, call, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    good = recordings(run_dir)
    expected = call("--json", "--num-streams", 1, *good)[1]
    advance = StreamBatch._advance

    def fail(batch, streams):
        if any(stream.features.mean() < -15 for stream in streams):  # log of the smallest energy
            raise RuntimeError("no luck\nwith this one")
        advance(batch, streams)

    monkeypatch.setattr(StreamBatch, "_advance", fail)
    code, out, error = call("--json", *good[:2], tmp_path / "silent.wav", *good[2:])
    lines = out.splitlines(keepends=True)
    assert code == 1
    assert json.loads(lines.pop(2))["error"] == f"{tmp_path / 'silent.wav'}: RuntimeError: no luck with this one"
    assert without_confidences("".join(lines)) == without_confidences(expected) and "Traceback" not in error


def test_an_output_that_cannot_be_written_is_the_error_of_its_input(run_dir, call, tmp_path):
    (tmp_path / "1.srt").mkdir()
    code, _, error = call("--srt", "--out", tmp_path, *recordings(run_dir))
    assert code == 1 and "1.wav: its text cannot be written" in error and error.count("error: ") == 1
    assert all((tmp_path / f"{number}.srt").is_file() for number in (0, 2, 3))


def test_another_rate_and_channels_are_taken_with_a_note(run_dir, call, tmp_path, caplog):
    samples = 0.1 * np.random.default_rng(1).standard_normal((8000, 2))
    soundfile.write(tmp_path / "a.flac", samples, 8000)
    with caplog.at_level("INFO"):
        code, out, _ = call("--json", tmp_path / "a.flac")
    assert code == 0 and json.loads(out)["segments"][-1]["end"] == pytest.approx(1.0, abs=0.04)
    assert "a.flac: mixed down from 2 channels; resampled from 8000 Hz" in caplog.text


@pytest.mark.parametrize("rest", [b"", b"x"])
def test_a_pipe_says_what_its_file_says(run_dir, call, monkeypatch, rest):
    path = recordings(run_dir)[0]
    expected = json.loads(call("--json", path)[1])
    pipe(monkeypatch, pcm(path) + rest)
    code, out, _ = call("--json", "-")
    assert code == 0 and json.loads(out) == {**expected, "path": "-"}


def test_a_pipe_of_another_rate_is_resampled(run_dir, call, monkeypatch, tmp_path):
    samples = (0.1 * np.random.default_rng(2).standard_normal(8000) * 32768).astype("<i2")
    soundfile.write(tmp_path / "a.wav", samples, 8000)
    pipe(monkeypatch, samples.tobytes())
    expected = json.loads(call("--json", tmp_path / "a.wav")[1])
    assert json.loads(call("--json", "--sampling-rate", 8000, "-")[1])["text"] == expected["text"]


class SignalledPipe(io.BytesIO):
    """Raw samples; a signal comes while the reader waits for more than there is."""

    def __init__(self, data, number):
        super().__init__(data)
        self.number = number

    def read1(self, size=-1):
        data = super().read1(size)
        if not data:
            signal.raise_signal(self.number)
            raise AssertionError("the signal did not end the waiting")
        return data


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_signal_ends_a_pipe_with_its_last_words(run_dir, call, monkeypatch, number, options):
    path, before = recordings(run_dir)[2], signal.getsignal(number)
    expected = call(*options, path)[1].replace(str(path), "-")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SignalledPipe(pcm(path), number)))
    with pytest.raises(Interrupted, match="1 of 1 inputs were transcribed, standard input up to the signal"):
        call(*options, "-")
    assert call.output() == expected and expected.strip()
    assert signal.getsignal(number) == before


def test_a_signal_drops_recordings_that_are_not_finished(run_dir, call, monkeypatch):
    paths = recordings(run_dir)
    read = inputs.read_audio_blocks

    def interrupted(path, *rest):
        for place, block in enumerate(read(path, *rest)):
            if path == str(paths[2]) and place == 1:
                signal.raise_signal(signal.SIGTERM)
            yield block

    expected = call("--json", *paths)[1].splitlines()
    monkeypatch.setattr(inputs, "read_audio_blocks", interrupted)
    with pytest.raises(Interrupted, match="2 of 4 inputs were transcribed$"):
        call("--json", *paths)
    kept = without_confidences("\n".join([expected[1], expected[3]]))
    assert without_confidences(call.output().strip()) == kept


def test_what_is_in_the_pipe_when_a_signal_comes_is_still_heard():
    end, start = os.pipe()
    data = np.arange(-9000, 9000, dtype="<i2")
    with open(end, "rb") as pipe, open(start, "wb", buffering=0) as writer, inputs.PipeStop() as stop:
        writer.write(data.tobytes())
        signal.raise_signal(signal.SIGTERM)
        packets = [samples for samples, _ in inputs.pipe_packets(pipe, 16000, 16000, stop)]
    np.testing.assert_array_equal(np.concatenate(packets), data)


def test_a_reader_that_goes_away_is_an_interruption():
    program = "from cascade.bin.cli import run_program; run_program(lambda: [print('x' * 9999) for _ in range(999)])"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        error = process.stderr.read().decode()
    assert (process.returncode, error) == (75, "interrupted: nobody reads standard output any more\n")


def test_a_second_signal_ends_at_once():
    with inputs.PipeStop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked and stop.read(io.BytesIO(b"not a pipe"), 1) == b""
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_pipe_writes_segments_as_they_end(run_dir, call, monkeypatch):
    shown = []

    class Slow(io.BytesIO):
        def read1(self, size=-1):
            shown.append(call.output())
            return super().read1(size)

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Slow(pcm(recordings(run_dir)[2]))))
    code, out, _ = call("--longest-segment", 0.8, "-")
    written = [text for text in shown if text]
    assert code == 0 and len(written) >= 2 and "".join(written) + out == call(
        "--longest-segment", 0.8, recordings(run_dir)[2]
    )[1]


def test_an_empty_pipe_is_an_error(call, monkeypatch):
    pipe(monkeypatch, b"")
    code, out, error = call("-")
    assert (code, out) == (1, "") and "error: standard input: 0.000 s of audio is too short" in error


def test_text_appears_while_it_is_decoded_on_a_terminal_only(run_dir, call, monkeypatch):
    paths = recordings(run_dir)[:2]
    plain = call(*paths)[1]
    assert "\r" not in plain and len(re.findall(r"^00:00:00\.000 - 00:00:0\d\.\d{3}  \w", plain, re.M)) == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    live = call(*paths)[1]
    assert "\r" in live
    for line in plain.splitlines():
        assert line.startswith("#") or line in live
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\r" not in call("--json", *paths)[1]


def test_files_of_an_output_folder(run_dir, call, tmp_path):
    paths = recordings(run_dir)
    code, out, _ = call("--vtt", "--out", tmp_path / "subtitles", *paths)
    assert (code, out) == (0, "")
    assert sorted(path.name for path in (tmp_path / "subtitles").iterdir()) == [f"{number}.vtt" for number in range(4)]
    text = (tmp_path / "subtitles" / "0.vtt").read_text()
    assert text == call("--vtt", paths[0])[1] and text.startswith("WEBVTT\n\n00:00:00.")
    assert call("--srt", paths[0])[1].startswith("1\n00:00:00,")


def test_subtitles_are_cut_at_pauses_and_lengths():
    words = [Word("A&B", 0.4, 0.6, 1.0), Word("is", 0.8, 1.0, 1.0), Word("late", 3599.0, 3600.5, 1.0)]
    segment = Segment(0.0, 3601.0, "A&B is late", tuple(words), 0, (), "end_of_stream")
    assert format_srt([segment]) == (
        "1\n00:00:00,400 --> 00:00:01,400\nA&B is\n\n2\n00:59:59,000 --> 01:00:00,500\nlate\n"
    )
    assert format_vtt([segment]) == (
        "WEBVTT\n\n00:00:00.400 --> 00:00:01.400\nA&amp;B is\n\n00:59:59.000 --> 01:00:00.500\nlate\n"
    )
    many = [Word("word", 0.1 * number, 0.1 * number + 0.08, 1.0) for number in range(40)]
    texts = format_srt([Segment(0.0, 4.0, "", tuple(many), 0, (), "end_of_stream")]).split("\n")[2::4]
    assert sum(text.count("word") for text in texts) == 40 and max(map(len, texts)) == 79
    assert format_srt([]) == "" and format_vtt([]) == "WEBVTT\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--chunk-ms", 50, "a.wav"], "--chunk-ms must be a positive multiple of 40 ms, got 50"),
    (["--look-ahead-ms", 480, "a.wav"], r"--look-ahead-ms must be a multiple of --chunk-ms \(320\), got 480"),
    (["--num-streams", 0, "a.wav"], "--num-streams must be at least 1, got 0"),
    (["--longest-segment", 60, "a.wav"], "longest_segment must lie between"),
    (["--srt", "a.wav", "b.wav"], "--srt of several files needs --out DIR"),
    (["--out", "x", "a.wav", "b/a.flac"], "inputs of different names, got a more than once"),
    (["--sampling-rate", 8000, "a.wav"], r"--sampling-rate is that of the pipe \(-\)"),
    (["-", "-"], "standard input can be read once"),
    (["--avg", 2, "a.wav"], "--avg 2 needs --epoch N"),
])  # fmt: skip
def test_wrong_options_are_usage_errors_that_name_them(call, arguments, message):
    with pytest.raises(ConfigError, match=message):
        call(*arguments)


def test_a_standard_input_that_is_closed_is_told(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="standard input, and it is closed"):
        call("-")
