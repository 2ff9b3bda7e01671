"""The training loss at the size it is used at (500 symbols, 40 s of frames) in float32, against float64.

Tolerances, relative to float64 on the same band of the lattice: 1e-6 for the loss of every utterance, 2e-5 for the norm
of the difference of gradients.
"""

import pytest
import torch

from cascade.losses.distillation import distillation_loss
from cascade.losses.joiner_cells import JoinerInputs
from cascade.losses.transducer import transducer_loss
from tests.losses.choice import use_backend

N, T, U, V, D = 3, 1000, 100, 500, 64
BOUNDARY = torch.tensor([[0, 0, U, T], [0, 0, U - 17, T - 130], [0, 0, U // 2, T // 2 + 1]])


def make_inputs(seed=0):
    """am, lm, encoder, predictor, weight, bias in float64, and symbols."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [randn(N, T, V), randn(N, U + 1, V), randn(N, T, D), randn(N, U + 1, D), randn(V, D) / D**0.5, randn(V)]
    return tensors, torch.randint(1, V, (N, U), generator=generator)


def run(tensors, symbols, dtype, rnnt_type, ranges=None):
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    loss = transducer_loss(*leaves, symbols, BOUNDARY, prune_range=5, lm_scale=0.25, am_scale=0.0,
                           rnnt_type=rnnt_type, delay_penalty=0.005, ranges=ranges)
    return loss, torch.autograd.grad((loss.simple + loss.pruned).sum(), leaves)


def relative(values, reference):
    """Norm of the difference by the norm of the reference."""
    return float((values.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("rnnt_type", ["regular", "modified", "constrained"])
def test_float32_equals_float64_at_real_size(rnnt_type):
    tensors, symbols = make_inputs()
    with use_backend("torch"):
        exact, exact_grads = run(tensors, symbols, torch.float64, rnnt_type)
    found, grads = run(tensors, symbols, torch.float32, rnnt_type, exact.ranges)
    assert bool(torch.isfinite(exact.pruned).all()) and float(exact.pruned.detach().min()) > 1000
    for part in ("simple", "pruned"):
        torch.testing.assert_close(getattr(found, part).double(), getattr(exact, part), rtol=1e-6, atol=0)
    for name, value, reference in zip(("am", "lm", "encoder", "predictor", "weight", "bias"), grads, exact_grads,
                                      strict=True):
        assert relative(value, reference) < 2e-5, name


def test_distillation_in_float32_equals_float64_at_real_size():
    tensors, symbols = make_inputs()
    teacher = JoinerInputs(*make_inputs(seed=1)[0][2:])
    exact, _ = run(tensors, symbols, torch.float64, "regular")
    sums, grads = {}, {}
    for dtype in (torch.float64, torch.float32):
        student = JoinerInputs(*(tensor.to(dtype).requires_grad_() for tensor in tensors[2:]))
        sums[dtype], _ = distillation_loss(
            student, JoinerInputs(*(x.to(dtype) for x in teacher)), symbols, BOUNDARY, exact.ranges, kind="pruned",
            temperature=1.0, cell_weights=exact.occupancy.to(dtype),
        )
        grads[dtype] = torch.autograd.grad(sums[dtype].sum(), student)
    torch.testing.assert_close(sums[torch.float32].double(), sums[torch.float64], rtol=1e-6, atol=0)
    for value, reference in zip(grads[torch.float32], grads[torch.float64], strict=True):
        assert relative(value, reference) < 2e-5
