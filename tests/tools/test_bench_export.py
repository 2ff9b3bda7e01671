import json

import pytest

from tests.export.conftest import TINY
from tools import bench_export


@pytest.mark.slow
def test_a_row_for_each_runtime_and_precision_which_say_alike(tmp_path, monkeypatch):
    pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    config = tmp_path / "student.yaml"
    config.write_text("tokens: {vocab_size: 40}\n")
    words = ["--config", config, *TINY, "model.noncausal.num_heads=2", "--num-chunks", 20, "--rounds", 1]
    monkeypatch.setattr("sys.argv", [bench_export.__file__, *map(str, words), "--json", str(tmp_path / "rows.json")])
    bench_export.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["engine"], row["precision"]) for row in rows] == [
        ("student", "torch", "float32"), ("student", "onnx", "float32"), ("student", "onnx", "int8"),
        ("student", "sherpa-onnx", "float32"), ("student", "sherpa-onnx", "int8"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["chunk_compute_ms_p50"] <= row["chunk_compute_ms_p99"] and row["rtf"] > 0
        assert row["num_chunks"] == 20 and 0 < row["peak_memory_mb"] < row["process_memory_mb"]
    assert len({row["symbols_per_second"] for row in rows if row["precision"] == "float32"}) == 1
