"""Properties of the training loss: the fused computation, its backends, padding, impossible utterances."""

import pytest
import torch

from cascade.losses import rnnt
from cascade.losses.transducer import has_alignment, transducer_loss
from tests.losses.choice import use_backend

TYPES = ("regular", "modified", "constrained")
NAMES = ("am", "lm", "encoder", "predictor", "weight", "bias")


def make_inputs(seed=0, n=3, t=13, u=5, v=7, d=6, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {
        "am": randn(n, t, v), "lm": randn(n, u + 1, v), "encoder": randn(n, t, d), "predictor": randn(n, u + 1, d),
        "weight": randn(v, d), "bias": randn(v),
    }
    symbols = torch.randint(1, v, (n, u), generator=gen)
    boundary = torch.tensor([[0, 0, u, t], [0, 0, u - 2, t - 4], [0, 0, 1, 6], [0, 0, 0, 3]][:n])
    return tensors, symbols, boundary


def run(tensors, symbols, boundary, **options):
    options = {"prune_range": 3, "lm_scale": 0.25, "am_scale": 0.0, "rnnt_type": "regular"} | options
    return transducer_loss(**tensors, symbols=symbols, boundary=boundary, **options)


def gradients(out, tensors, weights=None):
    losses = torch.stack([out.simple, out.pruned])
    losses = losses.masked_fill(torch.isinf(losses), 0.0)
    total = losses.sum() if weights is None else (losses * weights).sum()
    return dict(zip(tensors, torch.autograd.grad(total, list(tensors.values())), strict=True))


def composed(tensors, symbols, boundary, ranges, rnnt_type, delay_penalty):
    """The same losses from k2's functions and autograd."""
    t = tensors
    simple = rnnt.rnnt_loss_smoothed(
        t["lm"], t["am"], symbols, 0, 0.25, 0.0, boundary, rnnt_type, delay_penalty, reduction="none"
    )
    am, lm = rnnt.do_rnnt_pruning(t["encoder"], t["predictor"], ranges)
    logits = torch.tanh(am + lm) @ t["weight"].T + t["bias"]
    return simple, rnnt.rnnt_loss_pruned(
        logits, symbols, ranges, 0, boundary, rnnt_type, delay_penalty=delay_penalty, reduction="none"
    )


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("budget", [64.0, 0.0])
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_fused_loss_equals_composed_loss(rnnt_type, budget, backend):
    tensors, symbols, boundary = make_inputs()
    with use_backend(backend):
        out = run(tensors, symbols, boundary, rnnt_type=rnnt_type, delay_penalty=0.01, logits_budget_mb=budget)
        weights = torch.tensor([[0.5, 1.0, 2.0], [1.0, 3.0, 0.7]], dtype=torch.float64)
        simple, pruned = composed(tensors, symbols, boundary, out.ranges, rnnt_type, 0.01)
        torch.testing.assert_close(out.simple, simple, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(out.pruned, pruned, rtol=1e-10, atol=1e-10)
        assert bool(torch.isfinite(out.pruned).all())
        expected = torch.autograd.grad((torch.stack([simple, pruned]) * weights).sum(), list(tensors.values()))
    for (name, value), reference in zip(gradients(out, tensors, weights).items(), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_pruned_equals_full_when_the_band_covers_all_symbols(rnnt_type):
    tensors, symbols, boundary = make_inputs(seed=1)
    out = run(tensors, symbols, boundary, rnnt_type=rnnt_type, prune_range=symbols.shape[1] + 1)
    hidden = torch.tanh(tensors["encoder"][:, :, None] + tensors["predictor"][:, None])
    logits = hidden @ tensors["weight"].T + tensors["bias"]
    full = rnnt.rnnt_loss(logits, symbols, 0, boundary, rnnt_type, reduction="none")
    torch.testing.assert_close(out.pruned, full, rtol=1e-12, atol=1e-12)
    names = ("encoder", "predictor", "weight", "bias")
    expected = torch.autograd.grad(full.sum(), [tensors[name] for name in names])
    found = torch.autograd.grad(out.pruned.sum(), [tensors[name] for name in names])
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_gradients_equal_finite_differences(rnnt_type):
    tensors, symbols, boundary = make_inputs(seed=2, n=2, t=5, u=3, v=4, d=3)
    boundary = torch.tensor([[0, 0, 3, 5], [0, 0, 1, 4]])
    ranges = run(tensors, symbols, boundary, rnnt_type=rnnt_type, prune_range=2).ranges

    def losses(*values):
        out = run(dict(zip(NAMES, values, strict=True)), symbols, boundary, rnnt_type=rnnt_type, ranges=ranges)
        return out.simple, out.pruned

    assert torch.autograd.gradcheck(losses, tuple(tensors.values()), eps=1e-6, atol=1e-7)


def test_padding_and_batch_order_do_not_change_loss_or_gradient():
    tensors, symbols, boundary = make_inputs(seed=3)
    out = run(tensors, symbols, boundary)
    grads = gradients(out, tensors)
    order = torch.tensor([2, 0, 1])
    padded = {}
    for name, value in tensors.items():
        value = value.detach()
        if value.ndim == 3:  # 3 more steps of rubbish
            value = torch.cat([value, torch.full_like(value[:, :3], 5.0)], dim=1)[order]
        padded[name] = value.requires_grad_()
    more = torch.nn.functional.pad(symbols, (0, 3))[order]
    again = run(padded, more, boundary[order])
    torch.testing.assert_close(again.simple, out.simple[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.pruned, out.pruned[order], rtol=1e-12, atol=1e-12)
    for name, value in gradients(again, padded).items():
        if value.ndim == 3:
            kept = value[:, :-3]
            assert float(value[:, -3:].abs().max()) == 0.0, name
            torch.testing.assert_close(kept, grads[name][order], rtol=1e-10, atol=1e-12)
        else:
            torch.testing.assert_close(value, grads[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_impossible_utterance_has_infinite_loss_and_zero_gradients(rnnt_type, backend):
    tensors, symbols, _ = make_inputs(seed=4, n=4)
    # too few frames for the band (regular: 2 per frame), no frame at all, and good ones around them
    boundary = torch.tensor([[0, 0, 5, 13], [0, 0, 5, 2], [0, 0, 5, 0], [0, 0, 0, 1]])
    with use_backend(backend):
        out = run(tensors, symbols, boundary, rnnt_type=rnnt_type, prune_range=2)
    # the simple lattice of the regular type allows several symbols in a frame
    assert torch.isinf(out.simple).tolist() == [False, rnnt_type != "regular", True, False]
    assert torch.isinf(out.pruned).tolist() == [False, True, True, False]
    assert float(out.occupancy[1:3].abs().max()) == 0.0
    total = (out.simple + out.pruned).sum()
    grads = dict(zip(tensors, torch.autograd.grad(total, list(tensors.values())), strict=True))
    assert all(bool(torch.isfinite(value).all()) for value in grads.values())
    assert float(grads["encoder"][1:3].abs().max()) == 0.0 and float(grads["predictor"][1:3].abs().max()) == 0.0
    assert float(grads["am"][2].abs().max()) == 0.0 and float(grads["encoder"][0].abs().max()) > 0.0


@pytest.mark.parametrize("prune_range", [2, 3, 9])
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_lengths_alone_say_whether_an_alignment_exists(rnnt_type, prune_range):
    lengths = torch.cartesian_prod(torch.arange(6), torch.arange(8))  # (48, 2) symbols, frames
    tensors, symbols, _ = make_inputs(n=len(lengths), t=7)
    boundary = torch.cat((torch.zeros_like(lengths), lengths), dim=1)
    out = run(tensors, symbols, boundary, rnnt_type=rnnt_type, prune_range=prune_range)
    possible = has_alignment(boundary, rnnt_type, prune_range)
    assert torch.equal(possible, torch.isfinite(out.pruned)) and 0 < int(possible.sum()) < len(lengths)
    assert not bool((possible & torch.isinf(out.simple)).any())


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_batches_without_symbols_or_with_fewer_frames_than_symbols_work(backend):
    tensors, symbols, _ = make_inputs(seed=11, n=2, t=3, u=5)
    with use_backend(backend):
        out = run(tensors, symbols, torch.tensor([[0, 0, 5, 3], [0, 0, 1, 2]]), rnnt_type="modified")
        assert torch.isinf(out.pruned).tolist() == torch.isinf(out.simple).tolist() == [True, False]
        tensors, _, _ = make_inputs(seed=12, n=2, t=4, u=0)
        out = run(tensors, torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[0, 0, 0, 4], [0, 0, 0, 0]]))
    assert out.ranges.shape == (2, 4, 1) and bool(torch.isfinite(out.simple + out.pruned).all())
    assert all(bool(torch.isfinite(value).all()) for value in gradients(out, tensors).values())


def test_occupancy_of_the_band_sums_to_the_path_lengths():
    tensors, symbols, boundary = make_inputs(seed=5)
    regular = run(tensors, symbols, boundary).occupancy.sum(dim=(1, 2))
    torch.testing.assert_close(regular, (boundary[:, 2] + boundary[:, 3]).double())
    modified = run(tensors, symbols, boundary, rnnt_type="modified").occupancy.sum(dim=(1, 2))
    torch.testing.assert_close(modified, boundary[:, 3].double())


def test_delay_penalty_moves_symbols_to_earlier_frames():
    tensors, symbols, boundary = make_inputs(seed=7)

    def mean_frame(penalty):
        out = run(tensors, symbols, boundary, delay_penalty=penalty, prune_range=6)
        frames = torch.arange(13)[None, :, None]
        said = out.occupancy * (out.ranges > 0)
        return float((said * frames).sum() / said.sum())

    assert mean_frame(0.5) < mean_frame(0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_float32_losses_and_gradients_of_their_type(dtype):
    tensors, symbols, boundary = make_inputs(seed=8, dtype=dtype)
    out = run(tensors, symbols, boundary)
    wide = {name: value.detach().float().requires_grad_() for name, value in tensors.items()}
    reference = run(wide, symbols, boundary, ranges=out.ranges)
    assert out.simple.dtype == out.pruned.dtype == torch.float32
    torch.testing.assert_close(out.pruned, reference.pruned)
    torch.testing.assert_close(out.simple, reference.simple)
    expected = gradients(reference, wide)
    for name, value in gradients(out, tensors).items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.float(), expected[name], rtol=2e-2, atol=2e-2)


def test_autocast_does_not_change_the_loss():
    tensors, symbols, boundary = make_inputs(seed=9, dtype=torch.float32)
    plain = run(tensors, symbols, boundary)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(tensors, symbols, boundary)
    assert torch.equal(plain.pruned, cast.pruned) and torch.equal(plain.simple, cast.simple)


def test_float32_gradient_stays_within_1e_6_of_float64():
    tensors, symbols, boundary = make_inputs(seed=10, n=3, t=60, u=20, v=12, dtype=torch.float32)
    boundary = torch.tensor([[0, 0, 20, 60], [0, 0, 15, 50], [0, 0, 7, 41]])
    double = {name: value.detach().double().requires_grad_() for name, value in tensors.items()}
    reference = run(double, symbols, boundary, prune_range=5)
    out = run(tensors, symbols, boundary, prune_range=5, ranges=reference.ranges)
    px = torch.randn(3, 20, 61)
    py = torch.randn(3, 21, 60)
    single = rnnt.mutual_information_recursion(px, py, boundary, return_grad=True)[1]
    exact = rnnt.mutual_information_recursion(px.double(), py.double(), boundary, return_grad=True)[1]
    assert max(float((a - b).abs().max()) for a, b in zip(single, exact, strict=True)) < 1e-6
    torch.testing.assert_close(out.occupancy.double(), reference.occupancy, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnnt_type": "other"}, "rnnt_type must be one of"),
        ({"prune_range": 1}, "s_range must be at least 2"),
        ({"delay_penalty": -1.0}, "delay_penalty must be >= 0"),
        ({"lm_scale": 0.9, "am_scale": 0.2}, "sum of at most 1"),
        ({"ranges": torch.zeros(3, 2, 2, dtype=torch.int64)}, "ranges must be int64 of shape"),
    ],
)
def test_bad_options_are_named(change, message):
    tensors, symbols, boundary = make_inputs()
    with pytest.raises(ValueError, match=message):
        run(tensors, symbols, boundary, **change)


def test_bad_boundaries_and_symbols_are_named():
    tensors, symbols, boundary = make_inputs()
    with pytest.raises(ValueError, match="boundary of utterance 1 is"):
        run(tensors, symbols, boundary + torch.tensor([[0, 0, 0, 0], [0, 0, 0, 9], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="boundary must be int64"):
        run(tensors, symbols, boundary.int())
    with pytest.raises(ValueError, match="symbols must be in"):
        run(tensors, symbols + 7, boundary)
