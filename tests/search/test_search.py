import itertools

import numpy as np
import pytest
import torch

from cascade.models.torch_engine import TorchEngine
from cascade.search import rows as rows_module
from cascade.search.beam import ModifiedBeamSearch
from cascade.search.greedy import GreedySearch
from tests.search.toy_models import REAL, ToyTransducer, brute_force, plain_beam_search, random_encoder_out

KINDS = ("stateless", "lstm")
BACKENDS = ("numpy", "numba")


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


def beam_search(model, *options, **named):
    return ModifiedBeamSearch(TorchEngine(model), *options, **named)


def searches(model, unk_id=None):
    return [
        GreedySearch(TorchEngine(model), unk_id=unk_id), beam_search(model, 3, unk_id=unk_id, backend="numpy"),
        beam_search(model, 3, unk_id=unk_id),
    ]


def n_best(search, encoder_out, lens):
    return search.decode(encoder_out.numpy(), np.array(lens))


def whole(search, encoder_out, lens):
    return [hypotheses[0] for hypotheses in n_best(search, encoder_out, lens)]


def join(search, count):
    return [search.join() for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS + REAL)
@pytest.mark.parametrize("unk_id", [None, 2])
def test_beam_that_covers_everything_equals_brute_force(kind, unk_id, backend):
    model = ToyTransducer(kind, vocab_size=3, seed=1)
    encoder_out = random_encoder_out(2, 4, seed=2)
    search = beam_search(model, beam=96, unk_id=unk_id, backend=backend)
    found = n_best(search, encoder_out, [4, 3])
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
    search, num_merged = beam_search(model, beam, blank_penalty, unk_id, backend=backend), 0
    rows = join(search, 3)
    for start, end in ((0, 1), (1, 6), (6, 9)):  # merges of what different chunks said
        chunk_lens = np.array([min(length, end) - min(length, start) for length in lens])
        search.advance(rows, encoder_out[:, start:end].numpy(), chunk_lens)
    for hypotheses, frames, length in zip(search.n_best(rows), encoder_out, lens, strict=True):
        blanks = (0,) if unk_id is None else (0, unk_id)
        expected, merges = plain_beam_search(model, frames[:length], beam, blank_penalty, blanks)
        num_merged += merges
        found = {hypothesis.tokens: hypothesis for hypothesis in hypotheses}
        assert len(found) == len(hypotheses) == len(expected)
        assert_same([found[hypothesis.tokens] for hypothesis in expected], expected)
    assert beam < 8 or num_merged > 0


def test_search_with_few_slots_equals_one_with_many(monkeypatch, backend):
    for kind in REAL:
        model = ToyTransducer(kind, vocab_size=19, seed=33)
        encoder_out, lens = random_encoder_out(3, 40, seed=34), [40, 40, 22]
        expected = n_best(beam_search(model, 5, backend=backend), encoder_out, lens)
        monkeypatch.setattr(rows_module, "_MAX_SLOTS", 0)  # forget almost always
        found = n_best(beam_search(model, 5, backend=backend), encoder_out, lens)
        monkeypatch.undo()
        for first, second in zip(found, expected, strict=True):
            assert_same(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_predictor_runs_once_per_context(kind, backend):
    model = ToyTransducer(kind, vocab_size=4, seed=35)
    search, labels = beam_search(model, backend=backend), []
    step = search.slots._predictor.step

    def watched(new, state):
        labels.extend(new.tolist())
        return step(new, state)

    search.slots._predictor.step = watched
    hypothesis = whole(search, random_encoder_out(4, 50, seed=36), [50] * 4)[0]
    assert len(hypothesis.tokens) > 10
    assert kind == "lstm" or 0 < len(labels) <= 15  # 16 contexts of two labels, one of which nobody can say
    count = len(labels)
    whole(search, random_encoder_out(4, 50, seed=36), [50] * 4)  # the same utterances again: all is known
    assert len(labels) == count


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match=r"backend must be one of auto \| numpy \| numba, got 'cuda'"):
        beam_search(ToyTransducer("stateless", vocab_size=3), backend="cuda")


def test_without_numba_numpy_searches(monkeypatch, caplog):
    from cascade.search import beam_numpy, compiled

    monkeypatch.setitem(__import__("sys").modules, "cascade.search.beam_numba", None)
    monkeypatch.delattr("cascade.search.beam_numba", raising=False)
    compiled.compiled.cache_clear()
    model = ToyTransducer("stateless", vocab_size=3)
    assert beam_search(model)._kernels is beam_numpy
    assert "numba is not installed: the search uses plain numpy" in caplog.text
    with pytest.raises(ValueError, match="backend numba needs the package numba: pip install numba"):
        beam_search(model, backend="numba")
    compiled.compiled.cache_clear()


def test_blank_penalty_is_a_lower_blank_logit(backend):
    model = ToyTransducer("stateless", vocab_size=3, seed=3)
    encoder_out = random_encoder_out(1, 4, seed=4)
    found = n_best(beam_search(model, beam=96, blank_penalty=1.5, backend=backend), encoder_out, [4])[0]
    model.joiner.output_bias[0] -= 1.5
    expected = brute_force(model, encoder_out[0])
    assert {h.tokens: pytest.approx(h.log_prob, abs=1e-9) for h in found} == expected
    plain = ToyTransducer("stateless", vocab_size=5, blank_bias=3.0, seed=3)
    frames, engine = random_encoder_out(1, 30, seed=4), TorchEngine(plain)
    more, fewer = (whole(GreedySearch(engine, penalty), frames, [30])[0] for penalty in (3.0, 0.0))
    assert len(more.tokens) > len(fewer.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_search_equals_beam_of_one(kind):
    # A beam of one keeps one continuation per frame, the best symbol, so it is greedy always, <unk> included.
    model = ToyTransducer(kind, vocab_size=7, blank_bias=1.0, seed=5)
    encoder_out, lens = random_encoder_out(5, 23, seed=6), [23, 0, 11, 23, 1]
    greedy = whole(GreedySearch(TorchEngine(model), unk_id=3), encoder_out, lens)
    assert_same(greedy, whole(beam_search(model, beam=1, unk_id=3), encoder_out, lens))
    assert sum(len(hypothesis.tokens) for hypothesis in greedy) > 10
    assert all(3 not in hypothesis.tokens for hypothesis in greedy)
    assert greedy[1].tokens == () and greedy[1].log_prob == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (7, 1, 2, 13), (5, 0, 4)])
def test_chunk_by_chunk_equals_whole_utterance(kind, cuts):
    model = ToyTransducer(kind, vocab_size=9, blank_bias=1.0, seed=7)
    encoder_out, lens = random_encoder_out(4, 31, seed=8), np.array([31, 17, 0, 26])
    for search in searches(model):
        rows, start = join(search, 4), 0
        for size in itertools.cycle(cuts):
            search.advance(rows, encoder_out[:, start : start + size].numpy(), (lens - start).clip(0, size))
            start += size
            if start >= 31:
                break
        assert_same(search.results(rows), whole(search, encoder_out, lens))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_composition_and_padding_do_not_change_a_result(kind):
    model = ToyTransducer(kind, vocab_size=19, blank_bias=1.0, seed=9)
    encoder_out, lens = random_encoder_out(5, 21, seed=10), [5, 21, 0, 13, 20]
    for search in searches(model, unk_id=4):
        together = whole(search, encoder_out, lens)
        alone = [
            whole(search, frames[None, :length], [length])[0]
            for frames, length in zip(encoder_out, lens, strict=True)
        ]
        assert_same(together, alone)
        noisy = torch.cat([encoder_out, torch.full((5, 6, 8), torch.nan, dtype=torch.float64)], dim=1)
        for row, length in zip(noisy, lens, strict=True):
            row[length:] = torch.nan
        assert_same(together, whole(search, noisy, lens))


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_different_age_join_wait_and_leave(kind):
    model = ToyTransducer(kind, vocab_size=9, blank_bias=0.5, seed=11)
    encoder_out = random_encoder_out(3, 24, seed=12).numpy()
    for search in searches(model):
        first, second = join(search, 2)
        search.advance([second, first], encoder_out[[1, 0], :8], np.array([8, 8]))
        third = search.join()
        search.advance([first, third], np.stack([encoder_out[0, 8:16], encoder_out[2, :8]]), np.array([8, 8]))
        search.leave(second)
        search.advance([third], encoder_out[2:, 8:16], np.array([8]))
        again = search.join()  # in the place that is free
        search.advance([again, first], np.stack([encoder_out[1, :8], encoder_out[0, 16:]]), np.array([8, 8]))
        assert again == second
        heard = ((0, 24), (2, 16), (1, 8))
        expected = [search.decode(encoder_out[n : n + 1, :t], np.array([t]))[0][0] for n, t in heard]
        assert_same(search.results([first, third, again]), expected)


def test_a_copied_row_goes_on_by_itself():
    model = ToyTransducer("lstm", vocab_size=9, blank_bias=0.5, seed=11)
    encoder_out, eight = random_encoder_out(2, 16, seed=12).numpy(), np.array([8])
    for search in searches(model):
        row, other = join(search, 2)
        search.advance([row], encoder_out[:1, :8], eight)
        search.copy(row, other)
        search.advance([other], encoder_out[1:, 8:], eight)
        search.advance([row], encoder_out[:1, 8:], eight)
        mixed = np.concatenate((encoder_out[:1, :8], encoder_out[1:, 8:]), axis=1)
        expected = [best for best, *_ in search.decode(np.concatenate((encoder_out[:1], mixed)), np.array([16, 16]))]
        assert_same(search.results([row, other]), expected)
        assert expected[0].tokens != expected[1].tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_restarted_row_keeps_the_last_labels_if_it_said_any(kind):
    model = ToyTransducer(kind, vocab_size=9, blank_bias=0.5, seed=11)
    encoder_out = random_encoder_out(1, 24, seed=12).numpy()
    for search in searches(model):
        row, other = join(search, 2)
        search.advance([row], encoder_out[:, :12], np.array([12]))
        (best,) = search.results([row])
        slot = np.zeros(1, np.int64)
        for label in best.tokens:
            slot = search.slots.after(slot, np.array([label]))
        assert best.tokens and search.results([row])[0] == best
        search.places.slots[other] = slot
        search.restart(row)
        assert search.results([row])[0].tokens == () and search.num_frames[row] == 0
        search.advance([row, other], np.repeat(encoder_out[:, 12:], 2, axis=0), np.array([12, 12]))
        one, two = search.results([row, other])
        assert_same([one], [two])
        search.restart(row, keep_context=False)
        search.advance([row], encoder_out[:, 12:], np.array([12]))
        assert_same(search.results([row]), search.decode(encoder_out[:, 12:], np.array([12]))[0][:1])
        search.restart(other, keep_context=False)
        search.restart(other)  # it said nothing
        assert not search.places.slots[other].any()
        search.places.slots[other] = slot
        search.restart(other, over_silence=True)
        assert (search.places.slots[other] == slot).all() and slot.any()


def test_stable_tokens_are_those_of_all_hypotheses():
    model = ToyTransducer("stateless", vocab_size=9, blank_bias=1.0, seed=7)
    for search in searches(model):
        row, encoder_out = search.join(), random_encoder_out(1, 40, seed=8).numpy()
        search.advance([row], encoder_out, np.array([40]))
        hypotheses = [hypothesis.tokens for hypothesis in search.n_best([row])[0]]
        stable = search.stable_tokens(row)
        assert len(stable) > 3 and all(tokens[: len(stable)] == stable for tokens in hypotheses)
        assert len(hypotheses) == 1 or len({tokens[len(stable) : len(stable) + 1] for tokens in hypotheses}) > 1


def test_memory_of_endless_streams_is_bounded():
    model = ToyTransducer("lstm", vocab_size=9, seed=7)
    encoder_out = random_encoder_out(2, 16, seed=8).numpy()
    for search in searches(model):
        rows, sizes = join(search, 2), []
        for chunk in range(120):
            search.advance(rows, encoder_out, np.array([16, 9]))
            if chunk % 5 == 4:
                search.restart(rows[chunk % 2])
            sizes.append(len(search.entries.chains.before))
        assert sizes[-1] == sizes[30] < 2000
        assert len(search.results(rows)[0].tokens) > 20


@pytest.mark.parametrize("multiplier", [0, 1])
def test_colliding_hashes_do_not_merge_different_tokens(multiplier, backend):
    model = ToyTransducer("stateless", vocab_size=6, blank_bias=0.5, seed=13)
    encoder_out, lens = random_encoder_out(3, 12, seed=14), [12, 12, 9]
    expected = n_best(beam_search(model, beam=8), encoder_out, lens)
    search = beam_search(model, beam=8, backend=backend)
    search.hash_multiplier = multiplier
    for found, wanted in zip(n_best(search, encoder_out, lens), expected, strict=True):
        assert_same(found, wanted)


def test_n_best_holds_different_sequences_best_first():
    model = ToyTransducer("lstm", vocab_size=6, blank_bias=0.5, seed=15)
    found = n_best(beam_search(model, beam=6), random_encoder_out(2, 20, seed=16), [20, 15])
    for hypotheses, length in zip(found, (20, 15), strict=True):
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
        hypothesis = whole(search, encoder_out, [15])[0]
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
    found = whole(GreedySearch(TorchEngine(model)), random_encoder_out(4, 12, seed=20), [12] * 4)
    assert all(hypothesis.tokens == () for hypothesis in found)
    assert model.predictor.num_calls == 1  # the start alone


def test_beam_below_one_is_an_error():
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        beam_search(ToyTransducer("stateless", vocab_size=3), beam=0)


def test_no_streams_give_no_results():
    for search in searches(ToyTransducer("stateless", vocab_size=3)):
        assert whole(search, torch.zeros(0, 5, 8, dtype=torch.float64), np.zeros(0, np.int64)) == []


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
        search = beam_search(model, beam=beam, backend=backend)
        found = [[item.tokens for item in hypotheses] for hypotheses in n_best(search, encoder_out, [3, 3])]
        for frames, hypotheses in zip(encoder_out, found, strict=True):
            expected, _ = plain_beam_search(model, frames, beam)
            ranked = sorted(expected, key=lambda item: -item.log_prob / (len(item.tokens) + search.context_size))
            assert hypotheses == [item.tokens for item in ranked]


def test_where_all_is_equal_everybody_says_blank_first(backend):
    model = ToyTransducer("stateless", vocab_size=100)
    for parameter in model.parameters():
        parameter.zero_()
    zeros = torch.zeros(1, 2, 8, dtype=torch.float64)
    (found,) = n_best(beam_search(model, beam=3, backend=backend), zeros, [2])
    assert sorted((item.tokens, item.timestamps) for item in found) == [((), ()), ((1,), (1,)), ((2,), (1,))]
    assert whole(GreedySearch(TorchEngine(model)), zeros, [2])[0].tokens == ()


def test_greedy_search_says_the_lowest_of_equal_symbols():
    for seed in range(8):
        model = tied_model("stateless", torch.float32, seed)
        encoder_out = random_encoder_out(3, 9, seed=seed).round().float()
        for hypothesis in whole(GreedySearch(TorchEngine(model)), encoder_out, [9, 9, 9]):
            assert all(token % 2 for token in hypothesis.tokens)
        found = whole(GreedySearch(TorchEngine(model)), encoder_out, [9, 9, 9])
        logits = model.joiner(encoder_out, torch.zeros(8))
        expected = [[int((row == row.max()).nonzero()[0]) for row in stream] for stream in logits]
        assert [list(item.tokens) for item in found] == [[token for token in row if token] for row in expected]
