"""What sherpa-onnx decodes from the exported files is what PyTorch decodes."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from cascade.export.onnx import FULL, LOOK_AHEAD, STREAMING
from cascade.export.sherpa import compare_with_sherpa, synthetic_recordings
from cascade.search.methods import METHODS
from tests.export.conftest import GEOMETRY

pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")


def compare(exported, model, *seconds, blank_penalty=0.0):
    samples = synthetic_recordings(seconds, 16000, seed=2)
    return compare_with_sherpa(
        exported.folder, model, exported.config.features, exported.tokenizer, GEOMETRY, samples, blank_penalty
    )


def test_sherpa_onnx_finds_our_tokens_and_timestamps(exported):
    """By greedy and beam search, online and offline, on frames that are narrower than the predictor's vectors."""
    assert exported.model.joiner.encoder_proj.in_features < exported.model.joiner.output.in_features
    report = compare(exported, exported.model, 1.613, 0.05, 2.2, 0.025)
    assert report.num_recordings == 4 and set(report.num_tokens) == {STREAMING, LOOK_AHEAD, FULL}
    num_frames = 25 * (1.613 + 0.05 + 2.2 + 0.025 + 4 * 0.17)  # with the tails of zeros
    for counts in report.num_tokens.values():
        assert set(counts) == set(METHODS) and all(4 < count < num_frames for count in counts.values()), report


def test_another_model_is_noticed(exported):
    other = copy.deepcopy(exported.model)
    other.joiner.output.bias.data[0] -= 2.0
    with pytest.raises(ValueError, match="encoder-streaming.onnx, greedy_search: .* differ on 1.6 s of tones, .*token"):
        compare(exported, other, 1.6)


def test_another_penalty_is_noticed(exported):
    with pytest.raises(ValueError, match="encoder-streaming.onnx, greedy_search: .* differ on 1.6 s of tones, .*token"):
        compare(exported, exported.model, 1.6, blank_penalty=2.0)


def test_other_times_are_noticed(exported, monkeypatch):
    from cascade.export import sherpa

    decode = sherpa.decode_batch

    def later(*args):
        return [
            dataclasses.replace(item, timestamps=tuple(time + 1 for time in item.timestamps)) for item in decode(*args)
        ]

    monkeypatch.setattr(sherpa, "decode_batch", later)
    with pytest.raises(ValueError, match="sherpa-onnx and PyTorch differ"):
        compare(exported, exported.model, 1.6)
