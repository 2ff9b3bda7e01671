"""Properties of the distillation loss: plain formula and autograd, best path by enumeration, cells, errors."""

import itertools

import pytest
import torch

from cascade.losses.best_path import one_best_cells
from cascade.losses.distillation import KINDS, distillation_loss
from cascade.losses.joiner_cells import JoinerInputs

N, T, U, V = 3, 9, 4, 6
BOUNDARY = torch.tensor([[0, 0, 4, 9], [0, 0, 2, 5], [0, 0, 3, 0]])


def make_joiner(seed, dim, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    shapes = (N, T, dim), (N, U + 1, dim), (V, dim), (V,)
    return JoinerInputs(*(torch.randn(*shape, generator=gen, dtype=dtype).requires_grad_() for shape in shapes))


def make_cells(seed=0, r=3):
    gen = torch.Generator().manual_seed(seed)
    symbols = torch.randint(1, V, (N, U), generator=gen)
    first = torch.randint(0, U + 2 - r, (N, T), generator=gen).sort(dim=1).values
    ranges = first[:, :, None] + torch.arange(r)
    return symbols, ranges, torch.rand(N, T, r, generator=gen, dtype=torch.float64)


def joint_log_probs(joiner, temperature):
    hidden = torch.tanh(joiner.encoder[:, :, None] + joiner.predictor[:, None])
    return ((hidden @ joiner.weight.T + joiner.bias) / temperature).log_softmax(dim=-1)  # (N, T, U+1, V)


def plain_loss(student, teacher, symbols, cells, kind, temperature):
    """Sum of weight * KL by utterance, cell by cell with probabilities; cells: (n, t, u, weight)."""
    p, q = joint_log_probs(teacher, temperature).exp().detach(), joint_log_probs(student, temperature).exp()
    sums = [p.new_zeros(()) for _ in range(N)]
    for n, t, u, weight in cells:
        groups = [[k] for k in range(V)]
        if kind == "collapsed":
            named = [0] if u == int(BOUNDARY[n, 2]) else [0, int(symbols[n, u])]
            groups = [[k] for k in named] + [[k for k in range(V) if k not in named]]
        for group in groups:
            mass, student_mass = p[n, t, u, group].sum(), q[n, t, u, group].sum()
            sums[n] = sums[n] + weight * mass * (mass / student_mass).log()
    return torch.stack(sums)


def valid_cells(ranges, weights):
    for n, t, r in itertools.product(range(N), range(T), range(ranges.shape[2])):
        u = int(ranges[n, t, r])
        if t < int(BOUNDARY[n, 3]) and u <= int(BOUNDARY[n, 2]):
            yield n, t, u, float(weights[n, t, r])


def enumerate_best_path(joiner, symbols, n, rnnt_type="regular"):
    """Score every order of blanks and symbols; the cells of the best one."""
    u_len, t_len = int(BOUNDARY[n, 2]), int(BOUNDARY[n, 3])
    log_probs = joint_log_probs(joiner, 1.0).detach()
    best, best_cells = -float("inf"), None
    num_steps = t_len + u_len if rnnt_type == "regular" else t_len
    for places in itertools.combinations(range(num_steps - (rnnt_type == "regular")), u_len):  # a blank comes last
        t = u = 0
        score, cells = 0.0, []
        for step in range(num_steps):
            cells.append((n, t, u))
            if step in places:
                score, u = score + float(log_probs[n, t, u, symbols[n, u]]), u + 1
                if rnnt_type == "constrained":
                    score += float(log_probs[n, t, u, 0])
                t += rnnt_type != "regular"
            else:
                score, t = score + float(log_probs[n, t, u, 0]), t + 1
        if score > best:
            best, best_cells = score, cells
    return best_cells


@pytest.mark.parametrize("budget", [64.0, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_distillation_equals_the_plain_formula(kind, temperature, budget):
    student, teacher = make_joiner(1, 5), make_joiner(2, 7)
    symbols, ranges, weights = make_cells()
    sums, counts = distillation_loss(
        student, teacher, symbols, BOUNDARY, ranges, kind=kind, temperature=temperature, cell_weights=weights,
        logits_budget_mb=budget,
    )
    if kind == "one_best":
        cells = [(*cell, 1.0) for n in (0, 1) for cell in enumerate_best_path(teacher, symbols, n)]
    else:
        cells = list(valid_cells(ranges, weights))
    expected = plain_loss(student, teacher, symbols, cells, kind, temperature)
    torch.testing.assert_close(sums, expected, rtol=1e-10, atol=1e-12)
    totals = [sum(weight for n, _, _, weight in cells if n == row) for row in range(N)]
    torch.testing.assert_close(counts, torch.tensor(totals, dtype=torch.float64))
    scales = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    found = torch.autograd.grad((sums * scales).sum(), student)
    for value, reference in zip(found, torch.autograd.grad((expected * scales).sum(), student), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("rnnt_type", "count"), [
    ("regular", (9 + 4) + (5 + 2)), ("modified", 9 + 5), ("constrained", 9 + 5),
])
def test_one_best_cells_are_the_best_of_all_paths(rnnt_type, count):
    joiner = make_joiner(3, 4)
    symbols, _, _ = make_cells(1)
    cells = one_best_cells(joiner, symbols, BOUNDARY, rnnt_type)
    found = list(zip(*(x.tolist() for x in cells), strict=True))
    assert found == [cell for n in (0, 1) for cell in enumerate_best_path(joiner, symbols, n, rnnt_type)]
    assert len(found) == count


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(kind):
    student = make_joiner(4, 5, torch.float32)
    symbols, ranges, _ = make_cells(2)
    sums, counts = distillation_loss(student, student, symbols, BOUNDARY, ranges, kind=kind, temperature=1.0)
    assert float(sums.detach().abs().max()) < 1e-5 and float(counts[0]) > 0 and float(counts[2]) == 0
    assert max(float(x.abs().max()) for x in torch.autograd.grad(sums.sum(), student)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_very_sure_distributions_stay_finite(kind):
    student, teacher = (JoinerInputs(*(50.0 * x.detach() for x in make_joiner(s, 5, torch.float32))) for s in (5, 6))
    student = JoinerInputs(*(x.requires_grad_() for x in student))
    symbols, ranges, _ = make_cells(3)
    sums, _ = distillation_loss(student, teacher, symbols, BOUNDARY, ranges, kind=kind, temperature=1.0)
    assert bool(torch.isfinite(sums).all())
    assert all(bool(torch.isfinite(x).all()) for x in torch.autograd.grad(sums.sum(), student))


def test_the_teacher_gets_no_gradient():
    student, teacher = make_joiner(1, 5), make_joiner(2, 7)
    symbols, ranges, _ = make_cells()
    sums, _ = distillation_loss(student, teacher, symbols, BOUNDARY, ranges, kind="pruned", temperature=1.0)
    sums.sum().backward()
    assert all(x.grad is None for x in teacher) and all(x.grad is not None for x in student)


def test_cells_of_weight_zero_cost_and_change_nothing():
    student, teacher = make_joiner(1, 5), make_joiner(2, 7)
    symbols, ranges, weights = make_cells()
    sparse = weights * (weights > 0.5)
    options = {"kind": "pruned", "temperature": 1.0}
    sums, counts = distillation_loss(student, teacher, symbols, BOUNDARY, ranges, cell_weights=sparse, **options)
    cells = [cell for cell in valid_cells(ranges, sparse) if cell[3] > 0]
    torch.testing.assert_close(sums, plain_loss(student, teacher, symbols, cells, "pruned", 1.0))
    assert float(counts[0]) == pytest.approx(sum(cell[3] for cell in cells if cell[0] == 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell_weights": torch.ones(2)}, "cell_weights must be"),
        ({"ranges": torch.full((N, T, 2), U + 1)}, "ranges must be in"),
    ],
)
def test_bad_options_are_named(change, message):
    symbols, ranges, _ = make_cells()
    arguments = {"ranges": ranges, "kind": "pruned", "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        distillation_loss(make_joiner(1, 5), make_joiner(2, 7), symbols, BOUNDARY, **arguments)


def test_teacher_and_student_must_share_vocabulary_and_frames():
    student, teacher = make_joiner(1, 5), make_joiner(2, 7)
    symbols, ranges, _ = make_cells()
    other = teacher._replace(weight=torch.zeros(V + 1, 7), bias=torch.zeros(V + 1))
    with pytest.raises(ValueError, match="same vocabulary"):
        distillation_loss(student, other, symbols, BOUNDARY, ranges, kind="pruned", temperature=1.0)
    other = teacher._replace(encoder=teacher.encoder[:, 1:])
    with pytest.raises(ValueError, match="same frames"):
        distillation_loss(student, other, symbols, BOUNDARY, ranges, kind="pruned", temperature=1.0)
