import copy
import io

import pytest
import torch
from torch.nn import functional

from cascade.models.build import count_params, params_by_part
from tests.models.test_encoder import small_model

KINDS = ["lstm", "stateless", "tied_reduced"]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_whole_sequence(kind):
    predictor = small_model(predictor=kind).predictor
    labels = torch.tensor([[3, 1, 10, 3, 3], [2, 2, 9, 0, 0]])
    whole = predictor(labels)
    assert whole.shape == (2, 6, 6)
    state, outs = predictor.initial_state(2), []
    for column in torch.cat((torch.zeros(2, 1, dtype=torch.int64), labels), dim=1).unbind(1):
        out, state = predictor.step(column, state)
        outs.append(out)
    assert torch.allclose(torch.stack(outs, dim=1), whole, atol=1e-12)


@pytest.mark.parametrize("kind", ["stateless", "tied_reduced"])
def test_a_sequence_goes_on_from_labels_that_came_before(kind):
    predictor = small_model(predictor=kind).predictor
    labels = torch.tensor([[3, 1, 10, 3, 3, 7, 2], [2, 2, 9, 1, 5, 4, 4]])
    size = predictor.context_size
    whole, tail = predictor(labels), predictor(labels[:, size:], labels[:, :size])
    assert torch.allclose(tail, whole[:, size:], atol=1e-12)
    assert torch.allclose(predictor(labels, torch.zeros(2, size, dtype=torch.int64)), whole, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_blank_and_minus_one_are_zero_vectors(kind):
    predictor = small_model(predictor=kind).predictor
    blank, _ = predictor.step(torch.tensor([0]), predictor.initial_state(1))
    minus_one, _ = predictor.step(torch.tensor([-1]), predictor.initial_state(1))
    last, _ = predictor.step(torch.tensor([10]), predictor.initial_state(1))
    assert torch.equal(blank, minus_one)
    assert not torch.allclose(blank, last)


@pytest.mark.parametrize("kind", ["stateless", "tied_reduced"])
def test_labels_beyond_the_context_are_forgotten(kind):
    predictor = small_model(predictor=kind).predictor
    one, other = predictor(torch.tensor([[5, 1, 2, 3]])), predictor(torch.tensor([[6, 1, 2, 3]]))
    assert not torch.equal(one[:, 1], other[:, 1])
    assert torch.equal(one[:, 4], other[:, 4])


def test_tied_reduced_predictor_follows_the_papers_formula():
    predictor = small_model().predictor
    matrix, position = predictor.embedding, predictor.position
    heads, context, _ = position.shape
    labels = [4, 7]
    for said in range(3):
        newest_first = labels[:said][::-1]
        total = torch.zeros(matrix.shape[1], dtype=torch.float64)
        for h in range(heads):
            for n, label in enumerate(newest_first[:context]):
                total += (matrix[label] @ position[h, n]) * matrix[label]
        out = functional.linear(total / (heads * context), predictor.linear.weight, predictor.linear.bias)
        out = functional.silu(functional.layer_norm(out, out.shape, predictor.norm.weight, predictor.norm.bias))
        assert torch.allclose(predictor(torch.tensor([labels]))[0, said], out, atol=1e-12)


def test_tied_matrix_is_one_in_memory_checkpoint_and_count():
    model = small_model()
    vocab_size, dim = model.joiner.output_weight.shape
    matrices = [name for name, p in model.named_parameters() if p.shape == (vocab_size, dim) and "heads" not in name]
    assert matrices == ["joiner.output.weight"]
    assert [name for name in model.state_dict() if name.startswith("predictor.")] == [
        "predictor.position", "predictor.linear.weight", "predictor.linear.bias", "predictor.norm.weight",
        "predictor.norm.bias",
    ]
    parts = params_by_part(model)
    assert parts["total"] == count_params(model) - count_params(model.heads)


def test_tying_survives_optimizer_checkpoint_and_copy():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.joiner(torch.ones(1, 6).double(), model.predictor(torch.tensor([[1, 2]]))[:, -1]).sum().backward()
    optimizer.step()
    assert model.predictor.embedding is model.joiner.output.weight
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    restored = small_model(seed=5)
    restored.load_state_dict(torch.load(file, weights_only=True))
    clone = copy.deepcopy(restored)
    for other in (restored, clone):
        assert other.predictor.embedding is other.joiner.output.weight
        assert torch.equal(other.predictor(torch.tensor([[1, 2]])), model.predictor(torch.tensor([[1, 2]])))
    assert clone.joiner.output.weight is not restored.joiner.output.weight
