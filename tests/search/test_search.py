import itertools

import pytest
import torch

from cascade.models.state import select_streams
from cascade.search import beam as beam_module
from cascade.search.beam import ModifiedBeamSearch, modified_beam_search
from cascade.search.greedy import GreedySearch, greedy_search
from cascade.search.hypothesis import join_search_states
from tests.search.toy_models import REAL, ToyTransducer, brute_force, plain_beam_search, random_encoder_out

KINDS = ("stateless", "lstm")
BACKENDS = ("torch", "numba")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


def assert_same(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.tokens == two.tokens
        assert one.timestamps == two.timestamps
        assert one.token_log_probs == pytest.approx(two.token_log_probs, abs=1e-9)
        assert one.log_prob == pytest.approx(two.log_prob, abs=1e-9)


def searches(model, unk_id=None):
    return [
        GreedySearch(model, unk_id=unk_id), ModifiedBeamSearch(model, beam=3, unk_id=unk_id, backend="torch"),
        ModifiedBeamSearch(model, beam=3, unk_id=unk_id),
    ]


def whole(search, encoder_out, lens):
    return search.results(search.advance(search.init(encoder_out.shape[0]), encoder_out, lens))


@pytest.mark.parametrize("kind", KINDS + REAL)
@pytest.mark.parametrize("unk_id", [None, 2])
def test_beam_that_covers_everything_equals_brute_force(kind, unk_id, backend):
    model = ToyTransducer(kind, vocab_size=3, seed=1)
    encoder_out = random_encoder_out(2, 4, seed=2)
    search = ModifiedBeamSearch(model, beam=96, unk_id=unk_id, backend=backend)
    found = search.n_best(search.advance(search.init(2), encoder_out, torch.tensor([4, 3])))
    for hypotheses, frames in zip(found, (encoder_out[0], encoder_out[1, :3]), strict=True):
        expected = brute_force(model, frames, blanks=(0,) if unk_id is None else (0, unk_id))
        assert {hypothesis.tokens for hypothesis in hypotheses} == set(expected)
        for hypothesis in hypotheses:
            assert hypothesis.log_prob == pytest.approx(expected[hypothesis.tokens], abs=1e-9)
        best = max(expected, key=lambda tokens: expected[tokens] / (len(tokens) + search.context_size))
        assert hypotheses[0].tokens == best
        assert sum(map(torch.exp, torch.tensor(list(expected.values())))) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS + REAL)
@pytest.mark.parametrize(
    ("beam", "blank_penalty", "unk_id"), [(1, 0.0, None), (2, -0.7, 3), (3, 0.0, 3), (8, 0.9, None)]
)
def test_every_beam_equals_a_search_in_plain_python(kind, beam, blank_penalty, unk_id, backend):
    model = ToyTransducer(kind, vocab_size=5, blank_bias=0.8, seed=31)
    encoder_out, lens = random_encoder_out(3, 9, seed=32), (9, 4, 7)
    search, num_merged = ModifiedBeamSearch(model, beam, blank_penalty, unk_id, backend), 0
    state = search.init(3)
    for start, end in ((0, 1), (1, 6), (6, 9)):  # merges of what different chunks said
        chunk_lens = torch.tensor([min(length, end) - min(length, start) for length in lens])
        state = search.advance(state, encoder_out[:, start:end], chunk_lens)
    for hypotheses, frames, length in zip(search.n_best(state), encoder_out, lens, strict=True):
        blanks = (0,) if unk_id is None else (0, unk_id)
        expected, merges = plain_beam_search(model, frames[:length], beam, blank_penalty, blanks)
        num_merged += merges
        found = {hypothesis.tokens: hypothesis for hypothesis in hypotheses}
        assert len(found) == len(hypotheses) == len(expected)
        assert_same([found[hypothesis.tokens] for hypothesis in expected], expected)
    assert beam < 8 or num_merged > 0


def test_compiled_search_with_few_slots_equals_torch(monkeypatch):
    beam_numba = pytest.importorskip("cascade.search.beam_numba")
    monkeypatch.setattr(beam_numba, "_MAX_SLOTS", 0)  # forget almost always
    for kind in REAL:
        model = ToyTransducer(kind, vocab_size=19, seed=33)
        encoder_out, lens = random_encoder_out(3, 40, seed=34), torch.tensor([40, 40, 22])
        lists = []
        for name in BACKENDS:
            search = ModifiedBeamSearch(model, beam=5, backend=name)
            lists.append(search.n_best(search.advance(search.init(3), encoder_out, lens)))
        for first, second in zip(*lists, strict=True):
            assert_same(first, second)


def test_compiled_search_runs_the_predictor_once_per_context():
    pytest.importorskip("numba")
    model = ToyTransducer("real_stateless", vocab_size=4, seed=35)  # 16 contexts of two labels at most
    contexts, forward = [], model.predictor.forward_context

    def forward_context(context):
        contexts.extend(map(tuple, context.tolist()))
        return forward(context)

    search = ModifiedBeamSearch(model, beam=4)
    state = search.init(4)
    model.predictor.forward_context = forward_context
    hypothesis = search.results(search.advance(state, random_encoder_out(4, 50, seed=36), torch.tensor([50] * 4)))[0]
    assert len(hypothesis.tokens) > 10 and len(contexts) == len(set(contexts)) <= 15


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match=r"backend must be one of auto \| torch \| numba, got 'cuda'"):
        ModifiedBeamSearch(ToyTransducer("stateless", vocab_size=3), backend="cuda")


def test_blank_penalty_is_a_lower_blank_logit(backend):
    model = ToyTransducer("stateless", vocab_size=3, seed=3)
    encoder_out = random_encoder_out(1, 4, seed=4)
    search = ModifiedBeamSearch(model, beam=96, blank_penalty=1.5, backend=backend)
    found = search.n_best(search.advance(search.init(1), encoder_out, torch.tensor([4])))[0]
    model.joiner.output_bias[0] -= 1.5
    expected = brute_force(model, encoder_out[0])
    assert {h.tokens: pytest.approx(h.log_prob, abs=1e-9) for h in found} == expected
    plain = ToyTransducer("stateless", vocab_size=5, blank_bias=3.0, seed=3)
    frames, lens = random_encoder_out(1, 30, seed=4), torch.tensor([30])
    assert len(greedy_search(plain, frames, lens, blank_penalty=3.0)[0].tokens) > len(
        greedy_search(plain, frames, lens)[0].tokens
    )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_search_equals_beam_of_one(kind):
    # A beam of one keeps one continuation per frame, the best symbol, so it is greedy always, <unk> included.
    model = ToyTransducer(kind, vocab_size=7, blank_bias=1.0, seed=5)
    encoder_out, lens = random_encoder_out(5, 23, seed=6), torch.tensor([23, 0, 11, 23, 1])
    greedy = greedy_search(model, encoder_out, lens, unk_id=3)
    assert_same(greedy, modified_beam_search(model, encoder_out, lens, beam=1, unk_id=3))
    assert sum(len(hypothesis.tokens) for hypothesis in greedy) > 10
    assert all(3 not in hypothesis.tokens for hypothesis in greedy)
    assert greedy[1].tokens == () and greedy[1].log_prob == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (7, 1, 2, 13), (5, 0, 4)])
def test_chunk_by_chunk_equals_whole_utterance(kind, cuts):
    model = ToyTransducer(kind, vocab_size=9, blank_bias=1.0, seed=7)
    encoder_out, lens = random_encoder_out(4, 31, seed=8), torch.tensor([31, 17, 0, 26])
    for search in searches(model):
        state, start = search.init(4), 0
        for size in itertools.cycle(cuts):
            chunk_lens = (lens - start).clamp(0, size)
            state = search.advance(state, encoder_out[:, start : start + size], chunk_lens)
            start += size
            if start >= 31:
                break
        assert_same(search.results(state), whole(search, encoder_out, lens))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_composition_and_padding_do_not_change_a_result(kind):
    model = ToyTransducer(kind, vocab_size=19, blank_bias=1.0, seed=9)
    encoder_out, lens = random_encoder_out(5, 21, seed=10), torch.tensor([5, 21, 0, 13, 20])
    for search in searches(model, unk_id=4):
        together = whole(search, encoder_out, lens)
        alone = [
            whole(search, frames[None, :length], torch.tensor([length]))[0]
            for frames, length in zip(encoder_out, lens.tolist(), strict=True)
        ]
        assert_same(together, alone)
        noisy = torch.cat([encoder_out, torch.full((5, 6, 8), torch.nan, dtype=torch.float64)], dim=1)
        for row, length in zip(noisy, lens.tolist(), strict=True):
            row[length:] = torch.nan
        assert_same(together, whole(search, noisy, lens))


def test_streams_of_different_age_share_a_batch():
    model = ToyTransducer("lstm", vocab_size=9, blank_bias=0.5, seed=11)
    encoder_out, eight = random_encoder_out(3, 24, seed=12), torch.tensor([8])
    for search in searches(model):
        old = search.advance(search.init(2), encoder_out[:2, :8], eight.repeat(2))
        state = join_search_states(old, search.init(1))
        mixed = torch.cat([encoder_out[:2, 8:16], encoder_out[2:, :8]])
        state = search.advance(state, mixed, eight.repeat(3))
        state = select_streams(state, torch.tensor([2, 0]))  # stream 1 leaves
        mixed = torch.stack([encoder_out[2, 8:16], encoder_out[0, 16:]])
        state = search.advance(state, mixed, eight.repeat(2))
        expected = [
            whole(search, encoder_out[2:, :16], torch.tensor([16]))[0],
            whole(search, encoder_out[:1], torch.tensor([24]))[0],
        ]
        assert_same(search.results(state), expected)


@pytest.mark.parametrize("multiplier", [0, 1])
def test_colliding_hashes_do_not_merge_different_tokens(monkeypatch, multiplier, backend):
    model = ToyTransducer("stateless", vocab_size=6, blank_bias=0.5, seed=13)
    encoder_out, lens = random_encoder_out(3, 12, seed=14), torch.tensor([12, 12, 9])
    expected = ModifiedBeamSearch(model, beam=8)
    expected_lists = expected.n_best(expected.advance(expected.init(3), encoder_out, lens))
    monkeypatch.setattr(beam_module, "_HASH_MULTIPLIER", multiplier)
    search = ModifiedBeamSearch(model, beam=8, backend=backend)
    for found, wanted in zip(
        search.n_best(search.advance(search.init(3), encoder_out, lens)), expected_lists, strict=True
    ):
        assert_same(found, wanted)


def test_n_best_holds_different_sequences_best_first():
    model = ToyTransducer("lstm", vocab_size=6, blank_bias=0.5, seed=15)
    search = ModifiedBeamSearch(model, beam=6)
    state = search.advance(search.init(2), random_encoder_out(2, 20, seed=16), torch.tensor([20, 15]))
    for hypotheses, length in zip(search.n_best(state), (20, 15), strict=True):
        assert len({hypothesis.tokens for hypothesis in hypotheses}) == len(hypotheses) > 1
        scores = [hypothesis.log_prob / (len(hypothesis.tokens) + 1) for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for hypothesis in hypotheses:
            assert len(hypothesis.tokens) == len(hypothesis.timestamps) == len(hypothesis.token_log_probs)
            assert list(hypothesis.timestamps) == sorted(set(hypothesis.timestamps))  # one symbol per frame
            assert all(0 <= frame < length for frame in hypothesis.timestamps)
            assert all(log_prob <= 0 for log_prob in hypothesis.token_log_probs)


def test_token_log_probs_are_those_of_the_symbol_at_its_frame():
    model = ToyTransducer("stateless", vocab_size=9, seed=17)
    encoder_out = random_encoder_out(1, 15, seed=18)
    for search in searches(model):
        hypothesis = whole(search, encoder_out, torch.tensor([15]))[0]
        out, state = model.predictor.step(torch.tensor([0]), model.predictor.initial_state(1))
        assert len(hypothesis.tokens) > 3
        for token, frame, log_prob in zip(
            hypothesis.tokens, hypothesis.timestamps, hypothesis.token_log_probs, strict=True
        ):
            expected = model.joiner(encoder_out[:, frame], out).log_softmax(dim=-1)[0, token]
            assert log_prob == pytest.approx(float(expected), abs=1e-9)
            out, state = model.predictor.step(torch.tensor([token]), state)


def test_predictor_runs_only_for_hypotheses_that_grew():
    model = ToyTransducer("stateless", vocab_size=9, blank_bias=30.0, seed=19)
    encoder_out, lens = random_encoder_out(4, 12, seed=20), torch.tensor([12] * 4)
    assert all(hypothesis.tokens == () for hypothesis in greedy_search(model, encoder_out, lens))
    assert model.predictor.num_calls == 1  # the start alone


def test_long_streams_keep_their_precision():
    model = ToyTransducer("stateless", vocab_size=9, blank_bias=1.0, seed=21).float()
    search = ModifiedBeamSearch(model, beam=3)
    state = search.init(1)
    chunk = random_encoder_out(1, 16, seed=22).float()
    for _ in range(40):
        state = search.advance(state, chunk, torch.tensor([16]))
        assert float(state.log_probs.max()) == 0.0
    assert float(state.log_prob_offset) < -100


def test_beam_below_one_is_an_error():
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        ModifiedBeamSearch(ToyTransducer("stateless", vocab_size=3), beam=0)


def test_no_streams_give_no_results():
    for search in searches(ToyTransducer("stateless", vocab_size=3)):
        assert whole(search, torch.zeros(0, 5, 8, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)) == []


@pytest.mark.parametrize("count", [1, 4, 7])
def test_top_equals_topk(count):
    torch.manual_seed(23)
    for num_blocks in (1, 5, 40):
        values = torch.randn(3, 16 * num_blocks)
        found, index = beam_module._top(values, count)
        assert torch.equal(found, values.topk(count, dim=1).values)
        assert torch.equal(values.gather(1, index), found)


def tied_model(kind, dtype, seed):
    """Symbols in pairs of equal scores, whatever was said: 1 and 2, 3 and 4, ...; 41 symbols, exact arithmetic."""
    model = ToyTransducer(kind, vocab_size=41, seed=seed).to(dtype)
    for parameter in model.predictor.parameters():
        parameter.zero_()
    rows = torch.randint(0, 8, (21,), generator=torch.Generator().manual_seed(seed))
    pairs = (torch.arange(41) + 1) // 2
    model.joiner.output_weight.copy_(torch.nn.functional.one_hot(rows, 8)[pairs])  # one term a sum: no rounding
    model.joiner.output_bias.copy_((pairs % 3).to(dtype) / 4)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beam", [1, 4, 7])
def test_of_equal_scores_the_higher_hypothesis_and_the_lower_symbol_come_first(kind, dtype, beam, backend):
    for seed in range(4):
        model = tied_model(kind, dtype, seed)
        encoder_out = random_encoder_out(2, 3, seed=seed).round().to(dtype)
        search = ModifiedBeamSearch(model, beam=beam, backend=backend)
        state = search.advance(search.init(2), encoder_out, torch.tensor([3, 3]))
        found = [[item.tokens for item in hypotheses] for hypotheses in search.n_best(state)]
        for frames, hypotheses in zip(encoder_out, found, strict=True):
            expected, _ = plain_beam_search(model, frames, beam)
            ranked = sorted(expected, key=lambda item: -item.log_prob / (len(item.tokens) + search.context_size))
            assert hypotheses == [item.tokens for item in ranked]


def test_where_all_is_equal_everybody_says_blank_first(backend):
    model = ToyTransducer("stateless", vocab_size=100)
    for parameter in model.parameters():
        parameter.zero_()
    search = ModifiedBeamSearch(model, beam=3, backend=backend)
    state = search.advance(search.init(1), torch.zeros(1, 2, 8, dtype=torch.float64), torch.tensor([2]))
    (found,) = search.n_best(state)
    assert sorted((item.tokens, item.timestamps) for item in found) == [((), ()), ((1,), (1,)), ((2,), (1,))]
    greedy = GreedySearch(model)
    assert whole(greedy, torch.zeros(1, 2, 8, dtype=torch.float64), torch.tensor([2]))[0].tokens == ()


def test_greedy_search_says_the_lowest_of_equal_symbols():
    for seed in range(8):
        model = tied_model("stateless", torch.float32, seed)
        encoder_out = random_encoder_out(3, 9, seed=seed).round().float()
        for hypothesis in whole(GreedySearch(model), encoder_out, torch.tensor([9, 9, 9])):
            assert all(token % 2 for token in hypothesis.tokens)
        found = whole(GreedySearch(model), encoder_out, torch.tensor([9, 9, 9]))
        logits = model.joiner(encoder_out, torch.zeros(8))
        expected = [[int((row == row.max()).nonzero()[0]) for row in stream] for stream in logits]
        assert [list(item.tokens) for item in found] == [[token for token in row if token] for row in expected]
