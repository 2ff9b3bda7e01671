"""tools/bench_chunk.py: the parts of a chunk's time are told apart, and add up."""

from __future__ import annotations

import numpy as np
import pytest

from cascade.models.torch_engine import TorchEngine, TorchPredictor
from cascade.search.methods import METHODS, STREAMING_MODES, DecodingOptions
from tests.tiny_run import make_model_dir
from tools import bench_chunk


@pytest.fixture
def clock(monkeypatch):
    """Time passes in the predictor alone."""
    now = [0]
    monkeypatch.setattr(bench_chunk.time, "perf_counter_ns", lambda: now[0])
    step = TorchPredictor.step

    def slow_step(*arguments):
        now[0] += 1_000_000
        return step(*arguments)

    monkeypatch.setattr(TorchPredictor, "step", slow_step)
    monkeypatch.setattr(bench_chunk, "WARM_UP_CHUNKS", 1)
    return now


@pytest.mark.parametrize("kind", ["stateless", "tied_reduced"])
def test_time_in_the_predictor_is_the_predictors_and_counts_once(tmp_path, clock, kind):
    from cascade.checkpoint import load_model

    make_model_dir(tmp_path / "model", overrides=[f"model.predictor.kind={kind}"])
    model, config, tokenizer = load_model(tmp_path / "model")
    samples = np.random.default_rng(1).standard_normal(6 * 16000).astype(np.float32) * 0.1
    for mode in STREAMING_MODES:
        for method in METHODS:
            options = DecodingOptions(mode=mode, method=method, chunk_ms=320, look_ahead_ms=640, left_context_ms=640)
            row = bench_chunk.measure(TorchEngine(model), config, tokenizer, options, samples, streams=1)
            assert row["predictor_ms"] == row["chunk_ms"] and row["rest_ms"] == 0, (mode, method, row)
