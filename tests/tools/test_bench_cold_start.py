"""tools/bench_cold_start.py starts fresh processes and says which engine they had."""

import json
import sys

import pytest
import soundfile

from cascade.checkpoint import load_model
from cascade.export.onnx import build_graphs, write_files
from cascade.export.sherpa import synthetic_recordings
from tests.export.conftest import GEOMETRY, make_model_dir
from tests.test_packaging_light import ABOUT
from tests.tiny_run import call
from tools import bench_cold_start


def test_rows_tell_the_engines_apart(tmp_path, monkeypatch):
    exp_dir, onnx_dir, wav = make_model_dir(tmp_path / "model", "lstm"), tmp_path / "onnx", tmp_path / "a.wav"
    onnx_dir.mkdir()
    write_files(build_graphs(load_model(exp_dir)[0], GEOMETRY), exp_dir / "tokens", onnx_dir, {"chunk_ms": 80})
    (onnx_dir / "export.json").write_text(json.dumps(ABOUT))
    soundfile.write(wav, synthetic_recordings((1.1,), 16000, seed=1).popitem()[1], 16000)
    words = ["--onnx-dir", onnx_dir, "--exp-dir", exp_dir, "--recording", wav, "--repeats", 1]
    call(monkeypatch, bench_cold_start, *words, "--json", tmp_path / "rows.json")
    onnx, torch = json.loads((tmp_path / "rows.json").read_text())
    assert (onnx["engine"], onnx["has_torch"], torch["engine"], torch["has_torch"]) == ("onnx", 0, "torch", 1)
    assert onnx["cpu_seconds"] < torch["cpu_seconds"] and onnx["seconds"] > 0
    assert 0 < onnx["rss_first_partial_mb"] < torch["rss_first_partial_mb"]
    assert onnx["packages_mb"] == torch["packages_mb"] > 100 and "bench_cold_start.py" in onnx["command"]
    with pytest.raises(ValueError, match=r"with .*none: .*no such model directory"):
        bench_cold_start.start_once(sys.executable, tmp_path / "none", wav)
    soundfile.write(wav, [0.0] * 100, 16000)
    with pytest.raises(ValueError, match="a.wav is shorter than a chunk"):
        bench_cold_start.start_once(sys.executable, onnx_dir, wav)
