import json

import torch
from torch.utils.flop_counter import FlopCounterMode

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


def test_attention_on_a_cpu_and_sums_of_gradients_count_as_the_same_products_elsewhere():
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    sums = torch.zeros(4, 6)
    with FlopCounterMode(display=False, custom_mapping=bench_train.NOT_COUNTED) as counter:
        mask = torch.ones(5, 5, dtype=torch.bool)
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
        sums.addmm_(torch.ones(4, 7), torch.ones(7, 6))
    product = 2 * 2 * 3 * 5 * 5 * 8
    assert counter.get_total_flops() == (2 + 5) * product + 2 * 4 * 7 * 6  # the backward pass makes one product again
