"""Properties of k2's functions: enumeration of paths, begin offsets, edge cases, backends, half precision, errors."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from cascade.config.options import ConfigError
from cascade.losses import backends, rnnt
from tests.losses.choice import use_backend

TYPES = ("regular", "modified", "constrained")
BACKENDS = ("torch", "numba")


def make_lattice(seed=0, n=3, s=4, t=7, regular=True, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    px = torch.randn(n, s, t + regular, generator=gen, dtype=dtype)
    py = torch.randn(n, s + 1, t, generator=gen, dtype=dtype)
    return px, py


def make_logits(seed=0, n=2, t=6, s=3, v=5, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, t, s + 1, v, generator=gen, dtype=torch.float64).to(dtype)
    return logits, torch.randint(1, v, (n, s), generator=gen), torch.tensor([[0, 0, s, t], [0, 0, s - 1, t - 2]])


def all_paths_score(px, py, begin, end, regular):
    """log-sum over all paths of one lattice, by recursion over whole paths."""
    (s, t), (s_end, t_end) = begin, end
    if begin == end:
        return 0.0
    ways = []
    if t < t_end:
        ways.append(float(py[s, t]) + all_paths_score(px, py, (s, t + 1), end, regular))
    if s < s_end and (regular or t < t_end):
        onward = (s + 1, t if regular else t + 1)
        ways.append(float(px[s, t]) + all_paths_score(px, py, onward, end, regular))
    return float(torch.logsumexp(torch.tensor(ways, dtype=torch.float64), 0)) if ways else -float("inf")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regular", [True, False])
def test_recursion_equals_enumeration_of_paths_with_begin_offsets(regular, backend):
    px, py = make_lattice(regular=regular)
    boundary = torch.tensor([[0, 0, 4, 7], [1, 2, 3, 6], [2, 3, 2, 3]])
    with use_backend(backend):
        scores = rnnt.mutual_information_recursion(px, py, boundary)
    for n, (s_begin, t_begin, s_end, t_end) in enumerate(boundary.tolist()):
        expected = all_paths_score(px[n], py[n], (s_begin, t_begin), (s_end, t_end), regular)
        assert float(scores[n]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regular", [True, False])
def test_occupancies_are_the_gradient_of_the_score(regular, backend):
    px, py = (x.requires_grad_() for x in make_lattice(seed=1, regular=regular))
    boundary = torch.tensor([[0, 0, 4, 7], [1, 1, 4, 6], [0, 0, 0, 3]])
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x, y: rnnt.mutual_information_recursion(x, y, boundary), (px, py))
        scores, (px_grad, py_grad) = rnnt.mutual_information_recursion(px, py, boundary, return_grad=True)
    d_px, d_py = torch.autograd.grad(scores.sum(), (px, py))
    assert torch.equal(d_px, px_grad) and torch.equal(d_py, py_grad)


@pytest.mark.parametrize("scale", [1.0, 40.0, 3000.0, 1e6])
@pytest.mark.parametrize("regular", [True, False])
def test_backends_agree_over_the_whole_range_of_log_probs(regular, scale):
    px, py = (x * scale for x in make_lattice(seed=2, n=4, s=9, t=21, regular=regular))
    px[0, 3, 5] = py[1, 2, 4] = -float("inf")
    px[2] -= 5000.0
    boundary = torch.tensor([[0, 0, 9, 21], [0, 0, 9, 21], [1, 2, 8, 20], [0, 0, 9, 12]])
    results = []
    for backend in BACKENDS:
        with use_backend(backend):
            scores, grads = rnnt.mutual_information_recursion(px, py, boundary, return_grad=True)
            results.append((scores, *grads))
    for fast, reference in zip(*results, strict=True):  # a score of 1e7 is rounded to 1e-9
        torch.testing.assert_close(fast, reference, rtol=1e-12, atol=1e-12 * max(100.0, scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_lattices_do_not_underflow(backend):
    px, py = torch.full((1, 300, 901), -20.0), torch.full((1, 301, 900), -3.0)
    px.requires_grad_()
    with use_backend(backend):
        score = rnnt.mutual_information_recursion(px, py)
    # every path has the same weight; there are (1200 choose 300) of them
    ways = torch.lgamma(torch.tensor(1201.0, dtype=torch.float64)) - sum(
        torch.lgamma(torch.tensor(x, dtype=torch.float64)) for x in (901.0, 301.0)
    )
    assert float(score.detach()) == pytest.approx(float(ways) - 300 * 20 - 900 * 3, rel=1e-6)
    occupancy = torch.autograd.grad(score.sum(), px)[0]
    assert float(occupancy.sum()) == pytest.approx(300.0, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_steps_may_be_as_improbable_as_numbers_go(dtype, flush, backend):
    for log_prob in (-80.0, -95.0, -150.0, -300.0, -2000.0):
        px = torch.tensor([[[log_prob, -torch.inf]]], dtype=dtype)
        py = torch.tensor([[[log_prob], [log_prob]]], dtype=dtype)
        torch.set_flush_denormal(flush)
        try:
            with use_backend(backend):
                scores = backends.forward_backward(px, py, torch.tensor([[0, 0, 1, 1]])).scores
        finally:
            torch.set_flush_denormal(False)
        assert float(scores) == pytest.approx(2 * log_prob)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    px, py = make_lattice(seed=3)
    px[1, 2, 3] = float("nan")
    px[2] *= 1e4  # also where the parts differ in magnitude
    py[2, 1, 5] = float("nan")
    with use_backend(backend):
        scores = rnnt.mutual_information_recursion(px, py)
    assert torch.isnan(scores).tolist() == [False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_full_loss_gradient_equals_finite_differences(rnnt_type, backend):
    logits, symbols, boundary = make_logits()
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x: rnnt.rnnt_loss(x, symbols, 0, boundary, rnnt_type, 0.01, "none"), logits.requires_grad_()
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_simple_and_smoothed_gradients_equal_finite_differences(rnnt_type, backend):
    gen = torch.Generator().manual_seed(4)
    am = torch.randn(2, 6, 5, generator=gen, dtype=torch.float64, requires_grad=True)
    lm = torch.randn(2, 4, 5, generator=gen, dtype=torch.float64, requires_grad=True)
    _, symbols, boundary = make_logits()

    def losses(lm, am):
        simple = rnnt.rnnt_loss_simple(lm, am, symbols, 0, boundary, rnnt_type, reduction="none")
        smoothed = rnnt.rnnt_loss_smoothed(lm, am, symbols, 0, 0.2, 0.3, boundary, rnnt_type, reduction="none")
        return simple, smoothed

    with use_backend(backend):
        assert torch.autograd.gradcheck(losses, (lm, am))


def test_simple_loss_equals_full_loss_of_summed_logits():
    gen = torch.Generator().manual_seed(5)
    am = torch.randn(2, 6, 5, generator=gen, dtype=torch.float64)
    lm = torch.randn(2, 4, 5, generator=gen, dtype=torch.float64)
    _, symbols, boundary = make_logits()
    simple = rnnt.rnnt_loss_simple(lm, am, symbols, 0, boundary, reduction="none")
    full = rnnt.rnnt_loss(am[:, :, None] + lm[:, None], symbols, 0, boundary, reduction="none")
    torch.testing.assert_close(simple, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_pruned_api_equals_full_when_the_band_covers_all_symbols(rnnt_type):
    logits, symbols, boundary = make_logits(seed=6)
    ranges = torch.arange(4).expand(2, 6, 4).contiguous()
    pruned = rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, boundary, rnnt_type, 0.02, "none")
    full = rnnt.rnnt_loss(logits, symbols, 0, boundary, rnnt_type, 0.02, "none")
    torch.testing.assert_close(pruned, full, rtol=1e-12, atol=1e-12)


def test_numba_is_refused_on_a_gpu_instead_of_replaced_in_silence():
    with pytest.raises(ConfigError, match="loss.backend=numba computes on the CPU, not on cuda"):
        backends.set_backend("numba", torch.device("cuda"))
    px, boundary = torch.zeros(1, 2, 1, device="meta"), torch.tensor([[0, 0, 2, 2]], device="meta")
    with use_backend("numba"), pytest.raises(ConfigError, match="not on meta"):
        backends.forward_backward(px, px, boundary)
    assert backends._chosen == "auto"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_symbols_and_no_frames(backend):
    logits, symbols, _ = make_logits(n=4)
    boundary = torch.tensor([[0, 0, 0, 6], [0, 0, 0, 0], [0, 0, 3, 0], [0, 0, 3, 1]])
    with use_backend(backend):
        loss = rnnt.rnnt_loss(logits.requires_grad_(), symbols, 0, boundary, reduction="none")
    grad = torch.autograd.grad(loss.sum(), logits)[0]
    blanks = logits.detach()[0, :, 0].log_softmax(-1)[:, 0]
    assert float(loss[0].detach()) == pytest.approx(-float(blanks.sum()))
    assert float(loss[1].detach()) == 0.0  # nothing to say in no time
    assert torch.isinf(loss).tolist() == [False, False, True, False]
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rnnt_type", ["modified", "constrained"])
def test_more_symbols_than_frames_are_impossible_with_finite_gradients(rnnt_type, backend):
    logits, symbols, _ = make_logits()
    boundary = torch.tensor([[0, 0, 3, 2], [0, 0, 1, 2]])
    with use_backend(backend):
        loss = rnnt.rnnt_loss(logits.requires_grad_(), symbols, 0, boundary, rnnt_type, reduction="none")
    assert torch.isinf(loss).tolist() == [True, False]
    assert bool(torch.isfinite(torch.autograd.grad(loss.sum(), logits)[0]).all())


def test_joint_rows_sum_to_the_score_of_the_sums_and_split_its_gradient():
    parts = [make_lattice(seed=seed) for seed in (7, 8, 9)]
    px, py = ([part[i].requires_grad_() for part in parts] for i in (0, 1))
    boundary = torch.tensor([[0, 0, 4, 7], [1, 1, 4, 6], [0, 0, 2, 3]])
    rows = rnnt.joint_mutual_information_recursion(px, py, boundary)
    total = rnnt.mutual_information_recursion(sum(px), sum(py), boundary)
    torch.testing.assert_close(rows.sum(dim=0), total, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(total.sum(), px[0])[0]
    for i in range(3):
        torch.testing.assert_close(torch.autograd.grad(rows[i].sum(), px[i], retain_graph=True)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_work(dtype):
    logits, symbols, boundary = make_logits(dtype=dtype)
    loss = rnnt.rnnt_loss(logits.requires_grad_(), symbols, 0, boundary)
    wide = logits.detach().float().requires_grad_()
    reference = rnnt.rnnt_loss(wide, symbols, 0, boundary)
    torch.testing.assert_close(loss, reference)
    grad = torch.autograd.grad(loss, logits)[0]
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.float(), torch.autograd.grad(reference, wide)[0], rtol=1e-2, atol=1e-2)


def test_prune_ranges_start_at_zero_never_fall_and_touch():
    gen = torch.Generator().manual_seed(10)
    px, py = torch.rand(4, 9, 31, generator=gen), torch.rand(4, 10, 30, generator=gen)
    boundary = torch.tensor([[0, 0, 9, 30], [0, 0, 4, 20], [0, 0, 1, 30], [0, 0, 0, 1]])
    for s_range in (2, 3, 5, 20):
        first = rnnt.get_rnnt_prune_ranges(px, py, boundary, s_range)[:, :, 0]
        steps = first.diff(dim=1)
        assert int(first[:, 0].max()) == 0 and int(steps.min()) >= 0 and int(steps.max()) < s_range


def test_backends_are_chosen_by_name(monkeypatch):
    with pytest.raises(ValueError, match="loss backend must be one of"):
        backends.set_backend("fast")
    with pytest.raises(ValueError, match="needs the package k2"):
        backends.set_backend("k2")
    assert backends._chosen == "auto"
    monkeypatch.setattr(backends, "_numba_module", lambda: None)
    with pytest.raises(ValueError, match="pip install numba"):
        backends.set_backend("numba")
    px, py = make_lattice()
    expected = rnnt.mutual_information_recursion(px, py)  # auto falls back to torch
    with use_backend("torch"):
        assert torch.equal(rnnt.mutual_information_recursion(px, py), expected)


def test_the_k2_backend_calls_k2(monkeypatch):
    px, py = make_lattice(dtype=torch.float32)
    boundary = torch.tensor([[0, 0, 4, 7]] * 3)
    scores, grads = rnnt.mutual_information_recursion(px, py, boundary, return_grad=True)
    calls = []

    def recursion(px, py, boundary, return_grad):
        calls.append(return_grad)
        return scores + 1, grads  # a mark that no other backend leaves

    monkeypatch.setitem(sys.modules, "k2", types.SimpleNamespace(mutual_information_recursion=recursion))
    with use_backend("k2"):
        found, (px_grad, _) = rnnt.mutual_information_recursion(px, py, boundary, return_grad=True)
    assert calls == [True] and torch.equal(found, scores + 1) and torch.equal(px_grad, grads[0])


def test_without_numba_the_losses_use_torch():
    """In a fresh interpreter where numba cannot be imported: a warning, and the same numbers."""
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import logging, torch; logging.basicConfig()\n"
        "from cascade.losses import rnnt\n"
        "px, py = torch.zeros(1, 2, 4), torch.zeros(1, 3, 3)\n"
        "print(float(rnnt.mutual_information_recursion(px, py)))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(float(torch.tensor(10.0).log()), rel=1e-6)  # (5 choose 2) paths
    assert "numba is not installed" in done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: rnnt.mutual_information_recursion(x[0], y), "must have 3 dimensions"),
        (lambda x, y: rnnt.mutual_information_recursion(x, y[:, 1:]), "px must be"),
        (lambda x, y: rnnt.mutual_information_recursion(x, y.float()), "same floating point type"),
        (lambda x, y: rnnt.mutual_information_recursion(x, y, torch.zeros(3, 3).long()), "boundary must have shape"),
        (lambda x, y: rnnt.get_rnnt_prune_ranges(x, y, None, 1), "s_range must be at least 2"),
        (lambda x, y: rnnt.do_rnnt_pruning(y, y, torch.full((3, 5, 2), 9)), "ranges must be in"),
    ],
)
def test_bad_lattices_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make_lattice())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbols": torch.zeros(2, 3)}, "symbols must be int64"),
        ({"symbols": torch.full((2, 3), 5)}, "symbols must be in"),
        ({"symbols": torch.zeros(2, 4, dtype=torch.int64)}, "symbols must be"),
        ({"termination_symbol": 5}, "termination_symbol must be in"),
        ({"rnnt_type": "simple"}, "rnnt_type must be one of"),
        ({"reduction": "average"}, "reduction must be none, mean or sum"),
        ({"delay_penalty": -0.1}, "delay_penalty must be >= 0"),
        ({"boundary": torch.tensor([[0, 0, 4, 6], [0, 0, 2, 4]])}, "boundary of utterance 0"),
        ({"logits": torch.zeros(2, 6, 5)}, "logits must have shape"),
    ],
)
def test_bad_arguments_of_the_full_loss_are_named(change, message):
    logits, symbols, boundary = make_logits()
    arguments = {"logits": logits, "symbols": symbols, "termination_symbol": 0, "boundary": boundary}
    with pytest.raises(ValueError, match=message):
        rnnt.rnnt_loss(**arguments | change)


def test_batches_that_k2_refuses_are_refused_with_a_reason():
    logits, symbols, boundary = make_logits(t=3, s=4)
    with pytest.raises(ValueError, match="as many frames as symbols"):
        rnnt.rnnt_loss(logits, symbols, 0)
    logits, symbols, boundary = torch.zeros(2, 6, 1, 5), torch.zeros(2, 0, dtype=torch.int64), None
    with pytest.raises(ValueError, match="at least one column"):
        rnnt.rnnt_loss(logits, symbols, 0, boundary)
