"""A GPU computes what the CPU computes: losses, gradients, a training step, streams, beam search."""

import copy
import random

import pytest
import torch

from cascade.losses.distillation import KINDS, distillation_loss
from cascade.losses.joiner_cells import JoinerInputs
from cascade.losses.transducer import transducer_loss
from cascade.models.state import state_tensors
from cascade.models.torch_engine import TorchEngine
from cascade.search.beam import ModifiedBeamSearch
from cascade.search.greedy import GreedySearch
from cascade.training.objective import PASSES, Context, Objective
from tests.models.test_encoder import largest_difference, random_batch, run_blocks, run_chunks, small_model
from tests.training.test_objective import TOKENIZER, make, make_batch
from tests.training.test_step import NO_DROPOUT

DEVICE = torch.device("cuda")
BOUNDARY = torch.tensor([[0, 0, 9, 40], [0, 0, 4, 31], [0, 0, 0, 3], [0, 0, 9, 4]])
"""The last utterance has more tokens than frames."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(autouse=True)
def full_precision():
    """Products in float32 itself, not in TF32 with its ten bits."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def inputs(seed, dtype, dim=6, vocab=7):
    """am, lm, encoder, predictor, weight, bias on the CPU, and symbols."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 40, vocab), (4, 10, vocab), (4, 40, dim), (4, 10, dim), (vocab, dim), (vocab,))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return tensors, torch.randint(1, vocab, (4, 9), generator=generator)


def close(found, expected, dtype):
    assert found.device.type == DEVICE.type and found.dtype == expected.dtype
    exact = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.cpu(), expected, **exact)


@pytest.mark.parametrize("budget", [64.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rnnt_type", ["regular", "modified", "constrained"])
def test_transducer_losses_and_gradients_on_a_gpu_are_those_of_the_cpu(rnnt_type, dtype, budget):
    tensors, symbols = inputs(0, dtype)
    found, ranges = {}, None
    for device in (torch.device("cpu"), DEVICE):
        leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in tensors]
        loss = transducer_loss(
            *leaves, symbols.to(device), BOUNDARY.to(device), prune_range=4, lm_scale=0.25, am_scale=0.1,
            rnnt_type=rnnt_type, delay_penalty=0.01, logits_budget_mb=budget,
            ranges=None if ranges is None else ranges.to(device),
        )
        ranges = loss.ranges  # of the CPU: where two windows tie, rounding decides between them
        total = sum(part.masked_fill(torch.isinf(part), 0.0).sum() for part in (loss.simple, loss.pruned))
        grads = torch.autograd.grad(total, leaves)
        found[device.type] = [loss.simple.detach(), loss.pruned.detach(), loss.occupancy, *grads]
    assert bool(torch.isinf(found["cpu"][1]).any()) == (rnnt_type != "regular")
    for value, expected in zip(found[DEVICE.type], found["cpu"], strict=True):
        close(value, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_distillation_on_a_gpu_is_that_of_the_cpu(kind, dtype):
    (tensors, symbols), (others, _) = inputs(1, dtype), inputs(2, dtype, dim=8)
    boundary = BOUNDARY[:3]
    first = torch.arange(40).div(7, rounding_mode="floor").clamp(max=6).expand(3, 40)
    ranges = first[:, :, None] + torch.arange(4)
    found = {}
    for device in (torch.device("cpu"), DEVICE):
        student = JoinerInputs(*(x.to(device, copy=True).requires_grad_() for x in trim(tensors)))
        teacher = JoinerInputs(*(x.to(device) for x in trim(others)))
        sums, counts = distillation_loss(student, teacher, symbols[:3].to(device), boundary.to(device),
                                         ranges.to(device), kind=kind, temperature=1.5)
        found[device.type] = [sums.detach(), counts, *torch.autograd.grad(sums.sum(), student)]
    for value, expected in zip(found[DEVICE.type], found["cpu"], strict=True):
        close(value, expected, dtype)


def trim(tensors):
    """The joiner's inputs of the first three utterances."""
    _, _, encoder, predictor, weight, bias = tensors
    return encoder[:3], predictor[:3], weight, bias


def test_a_training_step_on_a_gpu_is_that_of_the_cpu():
    options = ["loss.ctc_scale=0.3", "distillation.weight=1", "mwer.loss_scale=1"]
    (model, config), (teacher, _) = make(*options), make(*options, seed=1)
    found = {}
    for device in (torch.device("cpu"), DEVICE):
        own, batch = copy.deepcopy(model).to(device), make_batch().to(device)
        objective = Objective(own, config, copy.deepcopy(teacher).to(device), TOKENIZER)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
        rows = []
        for step in range(2):
            terms = objective(batch, 100 + step, Context(4, 8, None), PASSES).terms
            rows.append({name: float(term.total.detach()) / term.count for name, term in terms.items()})
            optimizer.zero_grad()
            sum(term.weight * term.total / term.count for term in terms.values()).backward()
            optimizer.step()
        found[device.type] = rows
        assert all(parameter.device.type == device.type for parameter in own.parameters())
    names = ("simple", "pruned", "ctc", "kd", "mwer", "word_errors")
    assert set(found["cpu"][0]) == {f"{name}_{term}" for name in PASSES for term in names}
    assert found["cpu"][0]["causal_pruned"] != found["cpu"][1]["causal_pruned"]
    for row, expected in zip(found[DEVICE.type], found["cpu"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_output_on_a_gpu_equals_the_whole_utterance_there_and_on_the_cpu(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = small_model(rng.choice(["left", "centred"]), 5, seed)
    features, lens = random_batch(rng)
    chunk, left, blocks = rng.randint(1, 12), rng.choice([0, 5, 16]), rng.randint(1, 4)
    expected, out_lens = model.encoder.forward_causal(features, lens, chunk, left)
    gpu_model, on_gpu = copy.deepcopy(model).to(DEVICE), (features.to(DEVICE), lens.to(DEVICE))
    causal, gpu_lens = gpu_model.encoder.forward_causal(*on_gpu, chunk, left)
    streamed = run_chunks(gpu_model, *on_gpu, chunk, left)
    assert streamed.device.type == DEVICE.type
    assert all(tensor.device.type == DEVICE.type for tensor in state_tensors(gpu_model.encoder.initial_state(2, 4)))
    assert largest_difference(streamed, causal, gpu_lens) < 1e-9
    assert largest_difference(streamed.cpu(), expected, out_lens) < 1e-9
    noncausal = gpu_model.encoder.forward_noncausal(causal, gpu_lens, chunk * blocks, left)
    in_blocks = run_blocks(gpu_model, streamed, gpu_lens, chunk * blocks, left)
    assert largest_difference(in_blocks, noncausal, gpu_lens) < 1e-9


@pytest.mark.parametrize("predictor", ["tied_reduced", "stateless", "lstm"])
@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_search_with_a_model_on_a_gpu_finds_what_it_finds_on_the_cpu(kind, predictor):
    model = small_model(predictor=predictor)
    model.joiner.encoder_proj.weight.data *= 8.0  # so that the best symbol changes from frame to frame
    model.joiner.output.weight.data *= 4.0
    torch.manual_seed(3)
    features, lens = torch.randn(3, 120, 10, dtype=torch.float64), torch.tensor([120, 77, 9])
    found = []
    for device in (torch.device("cpu"), DEVICE):
        own = copy.deepcopy(model).to(device)
        engine = TorchEngine(own)
        search = GreedySearch(engine) if kind == "greedy" else ModifiedBeamSearch(engine, beam=4)
        with torch.inference_mode():
            out, out_lens = own.encode(features.to(device), lens.to(device), "full", 4, 8)
            rows = [search.join() for _ in range(3)]
            for start in range(0, out.shape[1], 8):  # from chunk to chunk, as in a stream
                piece = out[:, start : start + 8]
                piece_lens = (out_lens - start).clamp(0, piece.shape[1])
                search.advance(rows, piece.cpu().numpy(), piece_lens.cpu().numpy())
            found.append(search.results(rows))
    assert any(hypothesis.tokens for hypothesis in found[0])
    for one, other in zip(*found, strict=True):
        assert (one.tokens, one.timestamps) == (other.tokens, other.timestamps)
        assert other.log_prob == pytest.approx(one.log_prob, abs=1e-9)
        assert other.token_log_probs == pytest.approx(one.token_log_probs, abs=1e-9)


@pytest.mark.parametrize("predictor", ["lstm", "tied_reduced"])
def test_products_in_bfloat16_on_a_gpu_change_losses_by_rounding_only(predictor):
    found = {}
    for precision in ("float32", "bfloat16"):
        model, config = make(*NO_DROPOUT, f"model.predictor.kind={predictor}", f"training.precision={precision}")
        terms = Objective(model.to(DEVICE).train(), config)(make_batch().to(DEVICE), 100, Context(4, 8, None)).terms
        sum(term.total for term in terms.values()).backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        found[precision] = {name: term.total.item() for name, term in terms.items()}
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05, abs=0.2)
