import json

from tests.training.conftest import OPTIONS, corpus  # noqa: F401
from tools import bench_train


def test_a_row_for_each_optimizer_precision_and_number_of_processes(corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sys.argv", [bench_train.__file__, *map(str, (
        *OPTIONS, "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--num-steps", 3, "--json",
        tmp_path / "rows.json"))])
    bench_train.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["optimizer"], row["precision"], row["processes"]) for row in rows] == [
        (optimizer, precision, processes)
        for processes in (1, 2) for precision in ("float32", "bfloat16") for optimizer in ("adamw", "muon")
    ]
    for row in rows:
        assert row["speech_per_second"] > 0 and row["speech_per_cpu_second"] > 0
        assert 0 < row["share_of_peak"] < 1 and row["peak_gflops"] > 0.1
