"""The losses against recorded outputs of the real k2: every case, every key."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade.losses import backends, rnnt

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
CASES = sorted(GOLDEN.glob("case*.npz"))
pytestmark = pytest.mark.skipif(not CASES, reason=f"golden values are not at {GOLDEN}")


class Case:
    """One file: inputs as fresh leaf tensors, expected values, and which keys were looked at."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self.arrays = {key: data[key] for key in data.files if key != "meta"}
            self.meta = json.loads(str(data["meta"]))
        self.seen = {key for key in self.arrays if key.startswith("in_")} | {"mi_px", "mi_py", "mi_w"}
        self.seen |= {"jmi_px2", "jmi_py2"}
        self.tolerance = 1e-9 if self.meta["dtype"] == "float64" else 1e-4
        self.boundary = self.tensor("in_boundary") if self.meta["boundary_passed"] else None
        self.symbols = self.tensor("in_symbols")
        self.blank = self.meta["termination_symbol"]

    def tensor(self, key: str, grad: bool = False) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key].copy()).requires_grad_(grad)

    def check(self, key: str, value: torch.Tensor) -> None:
        expected = torch.from_numpy(np.asarray(self.arrays[key]))
        self.seen.add(key)
        assert value.shape == expected.shape, (key, value.shape, expected.shape)
        assert value.dtype == expected.dtype, (key, value.dtype)
        if not expected.dtype.is_floating_point:
            assert torch.equal(value, expected), key
            return
        finite = torch.isfinite(expected)
        assert torch.equal(value.detach()[~finite], expected[~finite]), key
        error = (value.detach()[finite] - expected[finite]).abs()
        scale = expected[finite].abs().clamp(min=1.0)
        assert error.numel() == 0 or float((error / scale).max()) <= self.tolerance, (key, float((error / scale).max()))

    def check_if_recorded(self, key: str, value: torch.Tensor) -> None:
        if key in self.arrays:
            self.check(key, value)

    def check_losses(self, prefix: str, loss) -> None:
        for reduction in ("none", "mean", "sum"):
            self.check(f"{prefix}_loss_{reduction}", loss(reduction))


@pytest.fixture(params=CASES, ids=[path.stem for path in CASES])
def case(request) -> Case:
    return Case(request.param)


def check_simple(case: Case) -> None:
    meta = case.meta
    scales = {"lm_only_scale": meta["lm_only_scale"], "am_only_scale": meta["am_only_scale"]}
    options = {"boundary": case.boundary, "rnnt_type": meta["rnnt_type"]}
    for prefix, log_probs, loss, extra in (
        ("simple", rnnt.get_rnnt_logprobs, rnnt.rnnt_loss_simple, {}),
        ("smoothed", rnnt.get_rnnt_logprobs_smoothed, rnnt.rnnt_loss_smoothed, scales),
    ):
        lm, am = case.tensor("in_lm", grad=True), case.tensor("in_am", grad=True)
        px, py = log_probs(lm, am, case.symbols, case.blank, **extra, **options)
        case.check(f"{prefix}_px", px)
        case.check(f"{prefix}_py", py)

        def run(reduction, return_grad=False, loss=loss, lm=lm, am=am, extra=extra):
            return loss(lm, am, case.symbols, case.blank, delay_penalty=meta["delay_penalty"], reduction=reduction,
                        return_grad=return_grad, **extra, **options)

        case.check_losses(prefix, run)
        value, grads = run(meta["grad_reduction"], return_grad=True)
        case.check(f"{prefix}_px_grad", grads[0])
        case.check(f"{prefix}_py_grad", grads[1])
        d_am, d_lm = torch.autograd.grad(value.sum(), (am, lm))
        case.check(f"{prefix}_d_am", d_am)
        case.check(f"{prefix}_d_lm", d_lm)


def check_full(case: Case) -> None:
    logits = case.tensor("in_logits", grad=True)

    def run(reduction):
        return rnnt.rnnt_loss(logits, case.symbols, case.blank, case.boundary, case.meta["rnnt_type"],
                              case.meta["delay_penalty"], reduction)

    case.check_losses("full", run)
    case.check("full_d_logits", torch.autograd.grad(run(case.meta["grad_reduction"]).sum(), logits)[0])


def check_pruned(case: Case, s_range: int) -> None:
    # the recorded occupancies: where two windows tie, rounding decides between them
    grads = case.tensor("smoothed_px_grad"), case.tensor("smoothed_py_grad")
    prefix, meta = f"pruned{s_range}", case.meta
    ranges = rnnt.get_rnnt_prune_ranges(*grads, case.tensor("in_boundary"), s_range)
    case.check(f"{prefix}_ranges", ranges)
    am, lm = rnnt.do_rnnt_pruning(case.tensor("in_am_d"), case.tensor("in_lm_d"), ranges)
    case.check_if_recorded(f"{prefix}_am_pruned", am)
    case.check(f"{prefix}_lm_pruned", lm)
    logits = torch.tanh(am + lm) @ case.tensor("in_W")
    case.check(f"{prefix}_logits", logits)
    logits.requires_grad_()
    px, py = rnnt.get_rnnt_logprobs_pruned(
        logits, case.symbols, ranges, case.blank, case.boundary, meta["rnnt_type"]
    )
    case.check_if_recorded(f"{prefix}_px", px)
    case.check_if_recorded(f"{prefix}_py", py)

    def run(reduction):
        return rnnt.rnnt_loss_pruned(logits, case.symbols, ranges, case.blank, case.boundary, meta["rnnt_type"],
                                     meta["delay_penalty"], reduction)

    case.check_losses(prefix, run)
    case.check(f"{prefix}_d_logits", torch.autograd.grad(run(meta["grad_reduction"]).sum(), logits)[0])


def check_recursion(case: Case) -> None:
    px, py = case.tensor("mi_px", grad=True), case.tensor("mi_py", grad=True)
    scores, grads = rnnt.mutual_information_recursion(px, py, case.boundary, return_grad=True)
    case.check("mi_scores", scores)
    case.check("mi_px_grad", grads[0])
    case.check("mi_py_grad", grads[1])
    d_px, d_py = torch.autograd.grad((scores * case.tensor("mi_w")).sum(), (px, py))
    case.check("mi_d_px", d_px)
    case.check("mi_d_py", d_py)
    scores = rnnt.joint_mutual_information_recursion(
        [px, case.tensor("jmi_px2")], [py, case.tensor("jmi_py2")], case.boundary
    )
    case.check("jmi_scores", scores)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_own_loss_equals_k2_loss(case, backend):
    with backends.use_backend(backend):
        check_simple(case)
        check_full(case)
        for s_range in case.meta["s_ranges"]:
            check_pruned(case, s_range)
        check_recursion(case)
    assert case.seen == set(case.arrays), sorted(set(case.arrays) - case.seen)
