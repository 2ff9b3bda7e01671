"""KL from the full pass to the causal one, against its formula cell by cell."""

import itertools

import pytest
import torch

from cascade.config.load import load_config
from cascade.config.options import ConfigError
from cascade.losses.joiner_cells import JoinerInputs
from cascade.training.terms import Outputs, PassKL, PassOutput
from tests.training.test_objective import make_batch

N, T, U, R, V, D = 2, 6, 3, 2, 5, 4
LENS = torch.tensor([[0, 0, 3, 6], [0, 0, 2, 4]])


def outputs(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    predictor, weight, bias = draw(N, U + 1, D), draw(V, D), draw(V)
    passes = {}
    for name in ("causal", "noncausal"):
        leaves = [tensor.clone().requires_grad_() for tensor in (draw(N, T, D), predictor, weight, bias)]
        passes[name] = PassOutput(leaves[0], JoinerInputs(*leaves), leaves[0], leaves[1])
    first = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]])
    ranges = first[:, :, None] + torch.arange(R)
    occupancy = torch.rand(N, T, R, generator=generator, dtype=torch.float64)
    return Outputs(passes, {}, LENS, {"noncausal": ranges}, {"noncausal": occupancy})


def terms(made, kind, shift, step=10**6):
    config = load_config(overrides=[f"loss.pass_kl_kind={kind}", f"loss.pass_kl_shift={shift}",
                                    "loss.pass_kl_scale=0.3"]).loss
    batch = make_batch((3, 2), (24, 16))
    batch.tokens = torch.tensor([[1, 2, 3], [4, 1, 0]])
    assert PassKL(config)("causal", made, batch, step) == {}
    return PassKL(config)("noncausal", made, batch, step)["pass_kl"], batch.tokens


def log_probs(joiner):
    return (torch.tanh(joiner.encoder[:, :, None] + joiner.predictor[:, None]) @ joiner.weight.T + joiner.bias
            ).log_softmax(dim=-1)


def plain(made, tokens, kind, shift):
    """(sum of weight * KL, sum of weights), cell by cell: causal frame t against the full pass's t - shift."""
    full, causal = (log_probs(made.passes[name].joiner).exp() for name in ("noncausal", "causal"))
    total, weights = 0.0, 0.0
    for n, t, r in itertools.product(range(N), range(T - shift), range(R)):
        u, weight = int(made.ranges["noncausal"][n, t, r]), float(made.occupancy["noncausal"][n, t, r])
        if t + shift < int(LENS[n, 3]) and u <= int(LENS[n, 2]):
            groups = [[k] for k in range(V)]
            if kind == "collapsed":
                named = [0] if u == int(LENS[n, 2]) else [0, int(tokens[n, u])]
                groups = [[k] for k in named] + [[k for k in range(V) if k not in named]]
            for group in groups:
                p, q = full[n, t, u, group].sum().detach(), causal[n, t + shift, u, group].sum()
                total = total + weight * p * (p / q).log()
            weights += weight
    return total, weights


@pytest.mark.parametrize("kind", ["pruned", "collapsed"])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_pass_kl_and_its_gradient_equal_the_plain_formula(kind, shift):
    made = outputs()
    term, tokens = terms(made, kind, shift)
    total, weights = plain(made, tokens, kind, shift)
    assert float(term.total.detach()) == pytest.approx(float(total.detach()), rel=1e-9) and term.weight == 0.3
    assert term.count == pytest.approx(weights, rel=1e-9)
    leaves = made.passes["causal"].joiner
    ours, theirs = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (term.total, total))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9) and float(one.abs().max()) > 1e-3


def test_the_full_pass_does_not_feel_it_and_it_rises_with_the_pruned_loss():
    made = outputs()
    term, _ = terms(made, "pruned", 1, step=0)
    term.total.backward()
    assert all(leaf.grad is None for leaf in made.passes["noncausal"].joiner)
    assert term.weight == pytest.approx(0.03)


def test_options_that_leave_nothing_to_compare_are_refused():
    with pytest.raises(ConfigError, match="loss.pass_sampling computes one"):
        load_config(overrides=["loss.pass_kl_scale=0.3", "loss.pass_sampling=true"])
    with pytest.raises(ConfigError, match="model.causal.num_layers of at least 2"):
        load_config(overrides=["loss.intermediate_ctc_scale=0.3", "model.causal.num_layers=1"])
