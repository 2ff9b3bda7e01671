"""What sherpa-onnx decodes from the exported files is what PyTorch decodes."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from cascade.export.onnx import FULL, LOOK_AHEAD, STREAMING
from cascade.export.sherpa import compare_with_sherpa, synthetic_recordings
from tests.export.conftest import GEOMETRY

pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")


def compare(exported, model, *seconds, blank_penalty=0.0):
    samples = synthetic_recordings(seconds, 16000, seed=2)
    return compare_with_sherpa(
        exported.folder, model, exported.config.features, exported.tokenizer, GEOMETRY, samples, blank_penalty
    )


def test_sherpa_onnx_finds_our_tokens_and_timestamps(exported):
    report = compare(exported, exported.model, 1.613, 0.05, 2.2, 0.025)
    assert report.num_recordings == 4 and set(report.num_tokens) == {STREAMING, LOOK_AHEAD, FULL}
    num_frames = 25 * (1.6 + 2.2)
    assert all(4 < count < num_frames for count in report.num_tokens.values()), report


def test_another_model_is_noticed(exported):
    other = copy.deepcopy(exported.model)
    other.joiner.output.bias.data[0] -= 2.0
    with pytest.raises(ValueError, match="encoder-streaming.onnx: .* differ on 1.6 s of tones, .*token"):
        compare(exported, other, 1.6)


def test_another_penalty_is_noticed(exported):
    with pytest.raises(ValueError, match="encoder-streaming.onnx: .* differ on 1.6 s of tones, .*token"):
        compare(exported, exported.model, 1.6, blank_penalty=2.0)


def test_other_times_are_noticed(exported, monkeypatch):
    from cascade.export import sherpa

    decode = sherpa.GreedySearch.decode

    def later(*args):
        return [
            [dataclasses.replace(hypothesis, timestamps=tuple(time + 1 for time in hypothesis.timestamps))]
            for (hypothesis,) in decode(*args)
        ]

    monkeypatch.setattr(sherpa.GreedySearch, "decode", later)
    with pytest.raises(ValueError, match="sherpa-onnx and PyTorch differ"):
        compare(exported, exported.model, 1.6)
