import itertools
import math

import numpy as np
import pytest
import torch

from cascade.models.torch_engine import TorchEngine
from cascade.search.beam import ModifiedBeamSearch
from cascade.search.greedy import GreedySearch
from cascade.search.ngram import read_arpa
from cascade.search.scorer import NgramScorer, Rescoring
from tests.search.toy_models import REAL, ToyTransducer, random_encoder_out

BACKENDS = ("numpy", "numba")
UNK = 2
SMALL = r"""\data\
ngram 1=5
ngram 2=4
ngram 3=2

\1-grams:
-1.1	</s>
-99	<s>	-0.31
-0.9	a	-0.42
-0.8	b	-0.13
-2.5	<unk>	-0.05

\2-grams:
-0.35	<s> a	-0.21
-0.55	a b	-0.17
-0.45	b a
-0.95	b </s>

\3-grams:
-0.15	<s> a b
-0.50	a b </s>

\end\
"""


class TableScorer:
    """Scores by the last token, and by the last token where the segment ends. A state is (n, 1) last tokens."""

    def __init__(self, table, ends=None, blank_weight=0.0):
        self.table, self.blank_weight = np.asarray(table, np.float32), blank_weight
        self.ends = np.zeros(len(self.table)) if ends is None else np.asarray(ends)

    def initial(self, n):
        return np.zeros((n, 1), np.int64)

    def score(self, state):
        return self.table[state[:, 0]]

    def advance(self, state, parents, tokens):
        return np.where(tokens > 0, tokens, state[parents, 0])[:, None]

    def final(self, state):
        return self.ends[state[:, 0]]


def random_scorers(vocab_size, seed):
    generator = np.random.default_rng(seed)
    return [
        TableScorer(generator.normal(size=(vocab_size, vocab_size)), generator.normal(size=vocab_size), 0.6),
        TableScorer(generator.normal(size=(vocab_size, vocab_size)), blank_weight=-0.2),
    ]


@pytest.fixture(params=["tables", "n-gram, LODR"])
def scorers(request, tmp_path):
    """Two scorers over four symbols."""
    if request.param == "tables":
        return random_scorers(4, seed=2)
    (tmp_path / "lm.arpa").write_text(SMALL)
    model = read_arpa(tmp_path / "lm.arpa", ["<blk>", "<unk>", "a", "b"])
    return [NgramScorer(model, 0.7), NgramScorer(model, -0.3)]


def brute_force_with_scores(model, encoder_out, scorers, blanks):
    """Total and acoustic log-probability of every token sequence over (T, D), from all its paths."""
    weight, sums = sum(scorer.blank_weight for scorer in scorers), {}
    for path in itertools.product(range(model.vocab_size), repeat=len(encoder_out)):
        out, state = model.predictor.step(torch.zeros(1, dtype=torch.int64), model.predictor.initial_state(1))
        tokens, total, acoustic, states = (), 0.0, 0.0, [scorer.initial(1) for scorer in scorers]
        for frame, symbol in zip(encoder_out, path, strict=True):
            log_probs = model.joiner(frame[None], out).log_softmax(dim=-1)[0]
            acoustic += float(log_probs[symbol])
            if symbol in blanks:
                total += float(log_probs[symbol]) * (1 + weight)
                continue
            said = 1 - sum(math.exp(log_probs[blank]) for blank in blanks)
            total += float(log_probs[symbol]) + weight * math.log(said)
            for place, scorer in enumerate(scorers):
                total += float(scorer.score(states[place])[0, symbol])
                states[place] = scorer.advance(states[place], np.array([0]), np.array([symbol]))
            tokens += (symbol,)
            out, state = model.predictor.step(torch.tensor([symbol]), state)
        total += sum(float(scorer.final(state)[0]) for scorer, state in zip(scorers, states, strict=True))
        sums[tokens] = np.logaddexp(sums.get(tokens, (-np.inf, -np.inf)), (total, acoustic))
    return sums


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["stateless", "lstm", REAL[2]])
@pytest.mark.parametrize("unk_id", [None, UNK])
def test_beam_that_covers_everything_equals_brute_force_with_scores(kind, unk_id, backend, scorers):
    model = ToyTransducer(kind, vocab_size=4, seed=1)
    encoder_out = random_encoder_out(2, 3, seed=3)
    search = ModifiedBeamSearch(TorchEngine(model), 100, unk_id=unk_id, scorers=scorers, backend=backend)
    found = search.decode(encoder_out.numpy(), np.array([3, 2]))
    for hypotheses, frames in zip(found, (encoder_out[0], encoder_out[1, :2]), strict=True):
        expected = brute_force_with_scores(model, frames, scorers, (0,) if unk_id is None else (0, unk_id))
        assert {hypothesis.tokens for hypothesis in hypotheses} == set(expected)
        for hypothesis in hypotheses:
            total, acoustic = expected[hypothesis.tokens]
            assert hypothesis.log_prob == pytest.approx(acoustic, abs=1e-9)
            assert hypothesis.external_score == pytest.approx(total - acoustic, abs=1e-5)  # float32 scores
        scores = [expected[item.tokens][0] / (len(item.tokens) + search.context_size) for item in hypotheses]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_only_the_scorer_wants_enters_the_beam_from_below(backend):
    model = ToyTransducer("stateless", vocab_size=9, seed=4)
    encoder_out, lens = random_encoder_out(1, 8, seed=5).numpy(), np.array([8])
    plain = ModifiedBeamSearch(TorchEngine(model), 2, backend=backend)
    label = min(range(1, 9), key=lambda token: sum(h.tokens.count(token) for h in plain.decode(encoder_out, lens)[0]))
    assert all(label not in hypothesis.tokens for hypothesis in plain.decode(encoder_out, lens)[0])
    table = np.zeros((9, 9))
    table[:, label] = 12.0
    search = ModifiedBeamSearch(TorchEngine(model), 2, scorers=[TableScorer(table)], backend=backend)
    best = search.decode(encoder_out, lens)[0][0]
    assert label in best.tokens and best.external_score == pytest.approx(12.0 * best.tokens.count(label))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scorers_that_say_nothing_change_nothing(backend):
    model, encoder_out = ToyTransducer("lstm", vocab_size=9, seed=6), random_encoder_out(3, 20, seed=7).numpy()
    lens, silence = np.array([20, 7, 13]), TableScorer(np.zeros((9, 9)))
    for make in (GreedySearch, lambda *args, **named: ModifiedBeamSearch(*args, backend=backend, **named)):
        found = make(TorchEngine(model), unk_id=UNK, scorers=[silence]).decode(encoder_out, lens)
        expected = make(TorchEngine(model), unk_id=UNK).decode(encoder_out, lens)
        for first, second in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert (first.tokens, first.timestamps) == (second.tokens, second.timestamps)
            assert first.log_prob == pytest.approx(second.log_prob, abs=1e-9)
            assert first.external_score == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_search_leaves_blanks_to_the_transducer_and_labels_to_the_scores(scorers, backend):
    model = ToyTransducer("stateless", vocab_size=4, blank_bias=1.0, seed=8)
    encoder_out, weight = random_encoder_out(1, 25, seed=10), sum(scorer.blank_weight for scorer in scorers)
    search = GreedySearch(TorchEngine(model), unk_id=UNK, scorers=scorers, backend=backend)
    ((hypothesis,),) = search.decode(encoder_out.numpy(), np.array([25]))
    out, state = model.predictor.step(torch.tensor([0]), model.predictor.initial_state(1))
    tokens, frames, acoustic, external, changed = [], [], 0.0, 0.0, 0
    states = [scorer.initial(1) for scorer in scorers]
    for number, frame in enumerate(encoder_out[0]):
        log_probs = model.joiner(frame[None], out).log_softmax(dim=-1)[0].numpy()
        symbol = own = int(log_probs.argmax())
        if symbol not in (0, UNK):
            scores = sum(scorer.score(state)[0] for scorer, state in zip(scorers, states, strict=True))
            ranked = log_probs + scores
            ranked[[0, UNK]] = -np.inf
            symbol = int(ranked.argmax())
            changed += symbol != own
            external += scores[symbol] + weight * math.log(1 - math.exp(log_probs[0]) - math.exp(log_probs[UNK]))
            tokens.append(symbol)
            frames.append(number)
            out, state = model.predictor.step(torch.tensor([symbol]), state)
            states = [
                scorer.advance(state, np.array([0]), np.array([symbol]))
                for scorer, state in zip(scorers, states, strict=True)
            ]
        else:
            external += weight * log_probs[symbol]
        acoustic += log_probs[symbol]
    assert len(tokens) > 5 and changed and (hypothesis.tokens, hypothesis.timestamps) == (tuple(tokens), tuple(frames))
    assert hypothesis.log_prob == pytest.approx(acoustic, abs=1e-9)
    ends = sum(float(scorer.final(state)[0]) for scorer, state in zip(scorers, states, strict=True))
    assert hypothesis.external_score == pytest.approx(external + ends, abs=1e-5)


def test_rescoring_ranks_what_the_transducer_alone_finds_and_a_segment_goes_on_from_its_choice(scorers):
    model, lens = ToyTransducer("stateless", vocab_size=4, seed=1), np.array([9, 6])
    engine, encoder_out = TorchEngine(model), random_encoder_out(2, 9, seed=3).numpy()
    plain = ModifiedBeamSearch(engine, 8, unk_id=UNK)
    search = ModifiedBeamSearch(engine, 8, unk_id=UNK, scorers=[Rescoring(scorer) for scorer in scorers])
    changed = False
    for found, expected in zip(search.decode(encoder_out, lens), plain.decode(encoder_out, lens), strict=True):
        assert {item.tokens: item.log_prob for item in found} == {item.tokens: item.log_prob for item in expected}
        for item in found:
            external = 0.0
            for scorer in scorers:
                state = scorer.initial(1)
                for token in item.tokens:
                    external += float(scorer.score(state)[0, token])
                    state = scorer.advance(state, np.array([0]), np.array([token]))
                external += float(scorer.final(state)[0])
            assert item.external_score == pytest.approx(external, abs=1e-5)
        assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
        changed |= found[0].tokens != expected[0].tokens
    assert changed
    rows = [(each, each.join()) for each in (search, plain)]
    for each, row in rows:
        each.advance([row], encoder_out[:1], lens[:1])
    shown, own = (each.results([row], final=False)[0] for each, row in rows)
    assert (shown.tokens, shown.external_score) == (own.tokens, 0.0)
    best = search.results([rows[0][1]])[0]
    search.restart(rows[0][1])
    np.testing.assert_array_equal(search.slots.states[0][search.places.slots[rows[0][1], 0]], best.tokens[-2:])


@pytest.mark.parametrize("beam", [0, 3])
def test_scorers_follow_streams_through_chunks_copies_and_restarts(beam):
    model, scorers = ToyTransducer("stateless", vocab_size=9, seed=11), random_scorers(9, seed=12)
    engine, encoder_out = TorchEngine(model), random_encoder_out(2, 20, seed=13).numpy()
    search = ModifiedBeamSearch(engine, beam, scorers=scorers) if beam else GreedySearch(engine, scorers=scorers)
    row, other = search.join(), search.join()
    search.advance([other, row], encoder_out[:, :7], np.array([7, 3]))
    search.advance([row], encoder_out[1:, 3:], np.array([17]))
    search.copy(row, other)
    (expected,) = search.decode(encoder_out[1:], np.array([20]))
    for found in search.n_best([row, other]):
        assert [item.tokens for item in found] == [item.tokens for item in expected]
        assert [item.score for item in found] == pytest.approx([item.score for item in expected], abs=1e-5)
    search.restart(row, keep_context=False)
    search.advance([row], encoder_out[:1], np.array([20]))
    assert search.results([row])[0].tokens == search.decode(encoder_out[:1], np.array([20]))[0][0].tokens
    partial, final = search.results([other], final=False)[0], search.results([other])[0]
    assert partial.tokens != final.tokens or partial.external_score != final.external_score
