import json

import pytest
import soundfile

from cascade import Recognizer
from cascade.bin import calibrate, decode
from cascade.checkpoint import load_model, update_decoding
from cascade.config.load import read_decoding
from cascade.search.hypothesis import Calibration
from tests import tiny_run
from tests.tiny_run import make_manifest, make_model_dir


def test_decoding_and_streams_take_the_map_that_calibrate_fits(tmp_path, monkeypatch, capsys):
    make_model_dir(tmp_path / "student")
    make_manifest(tmp_path)
    plain = Recognizer(tmp_path / "student", mode="full").stream()
    samples = soundfile.read(tmp_path / "2.wav", dtype="int16")[0]
    plain.accept(samples, 16000)
    plain = plain.finish()
    update_decoding(tmp_path / "student", blank_penalty=0.0)

    def hypotheses(name):
        tiny_run.call(monkeypatch, decode, "--exp-dir", tmp_path / "student", "--manifest", tmp_path / "test.jsonl",
                      "--mode", "full", "--method", "greedy_search", "--out", tmp_path / name)  # fmt: skip
        return (tmp_path / name / "hyps.jsonl").read_text()

    uncalibrated = hypotheses("before")
    tiny_run.call(monkeypatch, calibrate, "--exp-dir", tmp_path / "student", "--manifest", tmp_path / "test.jsonl")
    assert "words, " in (out := capsys.readouterr().out) and "ECE" in out
    values = read_decoding(tmp_path / "student" / "decoding.yaml")
    assert set(values) == {"blank_penalty", "confidence_slope", "confidence_offset"}
    calibration = Calibration(values["confidence_slope"], values["confidence_offset"])
    assert calibration == pytest.approx((load_model(tmp_path / "student")[1].decoding.confidence_slope, calibration[1]))
    stream = Recognizer(tmp_path / "student", mode="full").stream()
    stream.accept(samples, 16000)
    for before, after in zip(plain.words, stream.finish().words, strict=True):
        assert after.confidence == pytest.approx(float(calibration(before.confidence))) != before.confidence
    assert hypotheses("out") == uncalibrated
    row = json.loads((tmp_path / "out" / "result.json").read_text())
    assert 0 <= row["ece"] < row["ece_uncalibrated"] <= 1


def test_too_few_words_for_a_map_are_one_line_and_leave_confidences_alone(tmp_path, monkeypatch, capsys):
    make_model_dir(tmp_path / "student")
    make_manifest(tmp_path)
    update_decoding(tmp_path / "student", confidence_slope=3.0, confidence_offset=1.0)
    tiny_run.call(monkeypatch, calibrate, "--exp-dir", tmp_path / "student", "--manifest", tmp_path / "test.jsonl",
                  "--blank-penalty", -100)  # fmt: skip
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("0 words recognised, 20 are needed: confidences stay as they are")
    assert load_model(tmp_path / "student")[1].decoding.confidence_slope == 1.0
    assert read_decoding(tmp_path / "student" / "decoding.yaml") == {"confidence_slope": 1.0, "confidence_offset": 0.0}
