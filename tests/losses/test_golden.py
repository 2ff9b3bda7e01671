"""The losses against recorded outputs of the real k2 (golden/README.md): every case, every key."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from cascade.losses import rnnt
from tests.losses.choice import use_backend
from tests.losses.golden.record import Case, is_input, load, make_inputs, rewrite

HERE = Path(__file__).resolve().parent / "golden"
MORE = Path(os.environ.get("CASCADE_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")
CASES = {path.stem: path for folder in (MORE, HERE) for path in sorted(folder.glob("case*.npz"))}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def assert_equal(key, value, expected, tolerance):
    assert value.shape == expected.shape, (key, value.shape, expected.shape)
    assert value.dtype == expected.dtype, (key, value.dtype)
    if not expected.dtype.is_floating_point:
        assert torch.equal(value, expected), key
        return
    finite = torch.isfinite(expected)
    assert torch.equal(value[~finite], expected[~finite]), key
    error = (value[finite] - expected[finite]).abs() / expected[finite].abs().clamp(min=1.0)
    assert error.numel() == 0 or float(error.max()) <= tolerance, (key, float(error.max()))


def check(meta, arrays, device="cpu"):
    recorded = {key: torch.from_numpy(array) for key, array in arrays.items() if not is_input(key)}
    grads = recorded["smoothed_px_grad"].to(device), recorded["smoothed_py_grad"].to(device)
    results = Case(rnnt, meta, arrays, grads, device).compute()
    assert recorded.keys() <= results.keys(), sorted(recorded.keys() - results.keys())
    for key, expected in recorded.items():
        assert_equal(key, results[key].cpu(), expected, TOLERANCE[meta["dtype"]])


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_own_loss_equals_k2_loss(name, backend):
    with use_backend(backend):
        check(*load(CASES[name]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("name", sorted(CASES))
def test_own_loss_on_a_gpu_equals_k2_loss(name):
    check(*load(CASES[name]), "cuda")


@pytest.mark.parametrize("name", ["case00_tiny_regular", "case12_T_eq_S_modified"])
def test_no_boundary_is_the_boundary_of_whole_utterances(name):
    meta, arrays = load(HERE / f"{name}.npz")
    assert meta["boundary_mode"] == "full" and meta["boundary_passed"]
    check({**meta, "boundary_passed": False}, arrays)


def test_the_cases_beside_the_tests_cover_what_the_losses_offer():
    metas = [load(path)[0] for path in sorted(HERE.glob("case*.npz"))]
    assert {meta["rnnt_type"] for meta in metas} == {"regular", "modified", "constrained"}
    assert {meta["boundary_mode"] for meta in metas} == {"full", "ragged", "none", "edge"}
    assert {meta["dtype"] for meta in metas} == {"float32", "float64"}
    assert any(meta["delay_penalty"] and meta["boundary_mode"] == "ragged" for meta in metas)
    assert any(meta["termination_symbol"] for meta in metas)
    assert all(meta["k2"] == "1.23.4" for meta in metas)


def test_a_file_recorded_anew_holds_the_same_keys_and_values(tmp_path):
    source, copy = HERE / "case00_tiny_regular.npz", tmp_path / "case00_tiny_regular.npz"
    shutil.copy(source, copy)
    rewrite(rnnt, copy)  # the functions have k2's names
    (meta, before), (again, after) = load(source), load(copy)
    assert meta == again and before.keys() == after.keys()
    for key, array in before.items():
        assert_equal(key, torch.from_numpy(after[key]), torch.from_numpy(array), 1e-4)


def test_new_cases_can_be_recorded_and_a_wrong_value_among_them_is_found(tmp_path):
    make_inputs(tmp_path, 6, seed=1)
    for path in tmp_path.iterdir():
        rewrite(rnnt, path)
        meta, arrays = load(path)
        check(meta, arrays)
        with pytest.raises(AssertionError, match="logits"):
            check(meta, {**arrays, "in_W": 1.1 * arrays["in_W"]})
