"""The loss of minimum word error rate training, against its formula written out."""

import pytest
import torch

from cascade.losses.mwer import mwer_loss

LENGTHS = torch.tensor([3, 1, 4])
ERRORS = torch.tensor([0, 2, 1, 5, 3, 0, 0, 1])


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (-20 * torch.rand(8, generator=generator, dtype=torch.float64)).requires_grad_()


def plain(log_likelihoods, errors):
    """sum_i P_i (W_i - mean W) and its derivatives P_i (W_i - sum_j P_j W_j), in Python numbers."""
    likelihoods = [float(value.exp()) for value in log_likelihoods.detach()]
    probs = [value / sum(likelihoods) for value in likelihoods]
    mean = sum(errors) / len(errors)
    expected = sum(prob * count for prob, count in zip(probs, errors, strict=True))
    return expected - mean, [prob * (count - expected) for prob, count in zip(probs, errors, strict=True)]


def test_loss_and_gradient_equal_the_formula_and_gradients_finite_differences():
    log_likelihoods = make()
    losses = mwer_loss(log_likelihoods, ERRORS, LENGTHS)
    (grad,) = torch.autograd.grad(losses.sum(), log_likelihoods)
    begin = 0
    for loss, length in zip(losses.tolist(), LENGTHS.tolist(), strict=True):
        part = slice(begin, begin + length)
        value, slopes = plain(log_likelihoods[part], ERRORS[part].tolist())
        assert loss == pytest.approx(value, rel=1e-12) and grad[part].tolist() == pytest.approx(slopes, rel=1e-9)
        begin += length
    assert torch.autograd.gradcheck(lambda x: mwer_loss(x, ERRORS, LENGTHS), (log_likelihoods,))


def test_one_hypothesis_and_equal_errors_leave_nothing_to_learn():
    log_likelihoods = make(1)
    losses = mwer_loss(log_likelihoods, torch.tensor([2, 2, 2, 7, 1, 1, 1, 1]), LENGTHS)
    (grad,) = torch.autograd.grad(losses.sum(), log_likelihoods)
    assert float(losses.detach().abs().max()) < 1e-12 and float(grad.abs().max()) < 1e-12


def test_only_the_differences_between_likelihoods_matter():
    """They are far below what a float can hold, and so is each utterance's factor."""
    log_likelihoods = make(2)
    losses = mwer_loss(log_likelihoods - 5000.0, ERRORS, LENGTHS)
    assert torch.allclose(losses, mwer_loss(log_likelihoods, ERRORS, LENGTHS), rtol=1e-9)
