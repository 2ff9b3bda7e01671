"""A tiny model learns: with a wrong sign in any term of the objective something here fails."""

import functools
import json

import pytest
import torch
from torch.nn.functional import log_softmax

from cascade.training.objective import PASSES, Context, Objective
from tests.training.test_objective import make, make_batch, value

CONTEXT = Context(4, 8, None)
PLAIN = ["loss.warmup_steps=100", "loss.simple_scale=1", "loss.ctc_scale=0.3", "distillation.weight=1"]
STEP = 1e-3


@functools.cache
def config_of(*options):
    return make(*PLAIN, *options)[1]


def terms(model, teacher, options, step, passes):
    """(what is minimised, {name: mean}) of one batch."""
    losses = Objective(model, config_of(*options), teacher)(make_batch(), step, CONTEXT, passes)
    return value(losses), {name: float(term.total.detach()) / term.count for name, term in losses.terms.items()}


# How a term is singled out: two settings of the objective that differ in the weight of this term alone.
SETTINGS = {
    "simple": (([], 100), (["loss.simple_scale=0"], 100)),
    "pruned": (([], 100), ([], 0)),  # the warm-up leaves simple at 1 and takes pruned from 0.1 to 1
    "ctc": (([], 0), (["loss.ctc_scale=0.1"], 0)),
    "kd": (([], 0), (["distillation.weight=0.1"], 0)),
}
TERMS = [(name, term) for name in PASSES for term in SETTINGS]


@pytest.mark.parametrize(("name", "term"), TERMS)
def test_a_step_down_the_gradient_of_a_term_lowers_it_as_much_as_the_gradient_says(term, name):
    model, teacher = make(*PLAIN)[0], make(*PLAIN, seed=1)[0]
    (more, more_step), (less, less_step) = SETTINGS[term]
    with_term, before = terms(model, teacher, more, more_step, (name,))
    difference = with_term - terms(model, teacher, less, less_step, (name,))[0]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(difference, parameters, allow_unused=True)
    norm = torch.sqrt(sum(grad.square().sum() for grad in grads if grad is not None))
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter -= STEP * grad / norm
    with torch.no_grad():
        after = terms(model, teacher, more, more_step, (name,))[1]
    key = f"{name}_{term}"
    assert before[key] > 0
    # the share of this term in the difference of both totals, to turn the total's slope into the term's
    share = float(difference.detach()) / before[key]
    predicted = STEP * float(norm) / share
    assert share > 0 and predicted > 1e-5
    assert before[key] - after[key] == pytest.approx(predicted, rel=0.2)


def posteriors(model, name, kind):
    """(N, T, U + 1, V) label distributions of one pass on the whole lattice; collapsed: of blank or not alone."""
    batch, mode = make_batch(), "streaming" if name == "causal" else "full"
    out, _ = model.encode(batch.features, batch.feature_lens, mode, CONTEXT.chunk, CONTEXT.left)
    probs = log_softmax(model.joiner(out[:, :, None], model.predictor(batch.tokens)[:, None]), dim=-1).exp()
    return probs[..., :1] if kind == "collapsed" else probs


@pytest.mark.parametrize("kind", ["pruned", "collapsed", "one_best"])
@pytest.mark.parametrize("name", PASSES)
def test_distillation_moves_the_posteriors_of_a_student_to_those_of_its_teacher(name, kind):
    options = "distillation.weight=1e4", f"distillation.kind={kind}", "distillation.cell_weight=uniform"
    (model, config), (teacher, _) = make(*PLAIN, *options), make(*PLAIN, seed=1)
    objective, batch = Objective(model, config, teacher), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    valid = torch.ones(2, 15, 4, 1)
    valid[1, 11:], valid[1, :, 3:] = 0.0, 0.0  # the second utterance has 11 frames and 2 tokens

    @torch.no_grad()
    def distance():
        gap = posteriors(model, name, kind) - posteriors(teacher, name, kind)
        return float((valid * gap.abs()).sum() / valid.sum())

    start = distance()
    for _ in range(6):
        optimizer.zero_grad()
        (value(objective(batch, 0, CONTEXT, (name,))) / 1e4).backward()
        optimizer.step()
    assert distance() < 0.85 * start


def test_training_lowers_every_logged_term(trained, train, tmp_path):
    train(tmp_path / "student", "training.num_epochs=8", "training.learning_rate=1e-2", "training.log_every_steps=4",
          "training.validate_every_epochs=8", "loss.warmup_steps=0", "augment.share=0", "--teacher", trained,
          "distillation.weight=20", "distillation.init_from_teacher=false", "seed=5",
          *(f"model.{part}.dropout=0" for part in ("causal", "noncausal", "predictor")))
    lines = (tmp_path / "student" / "losses.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
    for key in (f"{name}_{term}" for name, term in TERMS):
        assert 0 <= rows[-1][key] < 0.9 * rows[0][key], (key, rows[0][key], rows[-1][key])
