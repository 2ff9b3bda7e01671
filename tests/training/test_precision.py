"""training.precision=bfloat16: the same losses and gradients but for rounding, float32 wherever it is kept."""

import pytest
import torch

from cascade.checkpoint import load_file
from cascade.training.objective import Objective
from tests.training.test_objective import CONTEXT, TOKENIZER, make, make_batch, value
from tests.training.test_step import NO_DROPOUT, OBJECTIVES


def losses_and_gradients(precision, *options, training=True):
    options = [*NO_DROPOUT, f"training.precision={precision}", *options]
    model, config = make(*options)
    taught = make(*options, seed=1)[0] if "distillation.weight=2" in options else None
    losses = Objective(model.train(training), config, taught, TOKENIZER)(make_batch(), 100, CONTEXT)
    value(losses).backward()
    return {name: term.total.detach() for name, term in losses.terms.items()}, {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("predictor", ["lstm", "tied_reduced"])
@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_losses_and_gradients_differ_by_rounding_only(options, predictor):
    options = [*options, f"model.predictor.kind={predictor}"]
    exact, exact_gradients = losses_and_gradients("float32", *options)
    losses, gradients = losses_and_gradients("bfloat16", *options)
    assert losses.keys() == exact.keys() and gradients.keys() == exact_gradients.keys()
    different = 0
    for name, total in losses.items():
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, exact[name], rtol=0.05, atol=0.2)
        different += not torch.equal(total, exact[name])
    assert different
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    both = (torch.cat([each[name].flatten() for name in gradients]) for each in (gradients, exact_gradients))
    assert torch.cosine_similarity(*both, dim=0) > 0.98


def test_dev_losses_are_float32():
    assert losses_and_gradients("bfloat16", training=False)[0] == losses_and_gradients("float32", training=False)[0]


@pytest.mark.parametrize(("has", "expected"), [("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_auto_takes_bfloat16_where_the_processor_multiplies_it(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False, has: True})
    auto = losses_and_gradients("auto")[0]
    assert (auto == losses_and_gradients("bfloat16")[0]) == expected
    assert (auto == losses_and_gradients("float32")[0]) != expected


def test_training_says_that_bfloat16_is_slow_and_learns_all_the_same(train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512": True})
    train(tmp_path, "training.precision=bfloat16", "training.num_epochs=1")
    log = (tmp_path / "train.log").read_text()
    assert "1 thread, products in bfloat16" in log and "training.precision=float32 is faster here" in log
    weights = load_file(tmp_path / "averaged.pt")["model"].values()
    assert all(weight.dtype == torch.float32 for weight in weights if weight.is_floating_point())


def test_a_run_that_goes_on_with_another_precision_says_so(train, tmp_path):
    train(tmp_path, "training.precision=float32", "training.num_epochs=1")
    done = train(tmp_path, "training.precision=bfloat16")
    assert "products are in bfloat16 from here on, they were in float32 before" in done.stderr
    assert "products are in" not in train(tmp_path, "training.precision=bfloat16", "training.num_epochs=3").stderr
