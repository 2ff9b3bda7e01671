"""Muon and the split of a model between the optimizers."""

from functools import partial

import pytest
import torch

from cascade.config.load import load_config
from cascade.models.build import build_model
from cascade.training.optim import Muon, build_optimizer, orthogonalise
from tests.training.conftest import OPTIONS


def plain_muon(weight, gradients, rate, decay, momentum=0.95):
    """The formula on one matrix, in its plainest form."""
    average = torch.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        x = (1 - momentum) * gradient + momentum * average
        wide = x.shape[0] <= x.shape[1]
        x = x if wide else x.T
        x = x / (x.square().sum().sqrt() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        rows, columns = weight.shape
        weight = weight * (1 - rate * decay) - rate * max(1, rows / columns) ** 0.5 * (x if wide else x.T)
    return weight


def add_all(shares, flat):
    for share in shares:
        flat += share


SHAPES = [(6, 4), (4, 6), (4, 6), (5, 5), (3, 9)]


@pytest.mark.parametrize("shape", [(144, 576), (144, 288), (144, 144)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-6])
def test_bfloat16_orthogonalises_nearly_as_float64_whatever_the_scales(shape, smallest):
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    scales = torch.logspace(0, torch.log10(torch.tensor(smallest)), shape[0]) * 1e-3
    matrix = u * scales @ v
    exact, low = orthogonalise(matrix.double()), orthogonalise(matrix.bfloat16()).double()
    assert torch.linalg.svdvals(low).max() < 1.25
    assert torch.cosine_similarity(exact.flatten(), low.flatten(), dim=0) > 0.98


def test_muon_in_bfloat16_leaves_weights_and_momentum_in_float32():
    torch.manual_seed(2)
    updates = []
    for dtype in (None, torch.bfloat16):
        weight = torch.nn.Parameter(torch.zeros(16, 48))
        weight.grad = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
        optimizer = Muon([weight], 1.0, 0.0, dtype=dtype)
        optimizer.step()
        assert weight.dtype == optimizer.state[weight]["momentum"].dtype == torch.float32
        updates.append(weight.detach())
    assert not torch.equal(*updates) and torch.allclose(*updates, atol=0.02)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_matrices_of_all_shapes_follow_the_formula_however_many_processes_share_them(world_size):
    torch.manual_seed(3)
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    gradients = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(3)]
    ranks = []
    for rank in range(world_size):
        parameters = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        ranks.append(Muon(parameters, 0.1, 0.3, rank=rank, world_size=world_size))
    for step in gradients:
        shares = []
        for rank in reversed(range(world_size)):  # what the others have computed arrives in add_up of rank 0
            optimizer = ranks[rank]
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], step, strict=True):
                parameter.grad = gradient.clone()
            optimizer._add_up = shares.append if rank else partial(add_all, shares)
            optimizer.step()
    expected = [plain_muon(*pair, 0.1, 0.3) for pair in zip(start, zip(*gradients, strict=True), strict=True)]
    for parameter, matrix in zip(ranks[0].param_groups[0]["params"], expected, strict=True):
        assert torch.allclose(parameter, matrix, rtol=0, atol=1e-12)


def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales():
    torch.manual_seed(0)
    matrix = torch.randn(1, 20, 50, dtype=torch.float64) * 1e-4
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diagonal(u.transpose(1, 2) @ orthogonalise(matrix) @ v.transpose(1, 2), dim1=1, dim2=2)
    assert bool((values > 0.6).all()) and bool((values < 1.3).all())
    for columns in (4, 9):
        assert not torch.isnan(orthogonalise(torch.zeros(1, 3, columns))).any()


@pytest.mark.parametrize("shape", [(12, 12), (12, 23), (12, 24), (12, 60), (1, 7)])
def test_every_shape_goes_through_the_same_polynomials(shape):
    torch.manual_seed(0)
    matrix = torch.randn(3, *shape, dtype=torch.float64)
    x = matrix / matrix.flatten(1).norm(dim=1)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
    assert torch.allclose(orthogonalise(matrix), x, rtol=0, atol=1e-6)  # 1e-7 beside the norm is the difference
    rank_one = (matrix[:, :, :1] @ matrix[:, :1, :]).float()  # what rounding has of A's small values must not grow
    assert torch.allclose(orthogonalise(rank_one), orthogonalise(rank_one.double()).float(), rtol=0, atol=2e-3)


def test_a_parameter_without_a_gradient_is_left_alone():
    parameters = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    parameters[0].grad = torch.randn(2, 3)
    optimizer = Muon(parameters, 0.1, 0.5)
    optimizer.step()
    assert torch.equal(parameters[1], torch.ones(2, 3)) and parameters[1] not in optimizer.state
    assert not torch.equal(parameters[0], torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_is_trained_once_and_muon_has_the_encoders_matrices(kind):
    config = load_config(overrides=[*OPTIONS, f"training.optimizer={kind}"])
    model = build_model(config, 9)
    optimizer = build_optimizer(model, config.training)
    trained = [id(parameter) for group in optimizer.groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in model.parameters())
    muon = {id(p) for part in optimizer.parts if isinstance(part, Muon) for p in part.param_groups[0]["params"]}
    wanted = {
        id(parameter) for name, parameter in model.named_parameters()
        if name.startswith("encoder.") and parameter.ndim == 2 and kind == "muon"
    }
    assert muon == wanted and bool(wanted) == (kind == "muon")


def test_the_schedule_scales_both_peaks_and_a_saved_optimizer_goes_on_exactly():
    config = load_config(overrides=[*OPTIONS, "training.optimizer=muon", "training.muon_learning_rate=0.5"])
    models = []
    for stop in (False, True):
        torch.manual_seed(0)
        model = build_model(config, 9)
        optimizer = build_optimizer(model, config.training)
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            if stop and step == 2:
                saved = optimizer.state_dict()
                optimizer = build_optimizer(model, config.training)
                optimizer.load_state_dict(saved)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step(0.25)
        assert {group["lr"] for group in optimizer.groups} == {0.25 * config.training.learning_rate, 0.125}
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
