"""Viterbi alignments are the best of all paths, in every topology."""

import itertools

import pytest
import torch

from cascade.losses.best_path import best_symbol_frames
from cascade.losses.joiner_cells import JoinerInputs

U, V, DIM = 3, 5, 4
BOUNDARY = torch.tensor(
    [[0, 0, 3, 6], [0, 0, 2, 4], [0, 0, 0, 5], [0, 0, 3, 2], [0, 0, 1, 0], [1, 1, 3, 6], [0, 0, 3, 3]]
)
N, T = BOUNDARY.shape[0], 6


def make_inputs(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (N, T, DIM), (N, U + 1, DIM), (V, DIM), (V,)
    inputs = JoinerInputs(*(2 * torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes))
    return inputs, torch.randint(1, V, (N, U), generator=generator)


def best_of_all_paths(inputs, symbols, n, rnnt_type):
    """Score every choice of one frame per symbol; returns (score, frames, log-probs), score -inf without a path."""
    hidden = torch.tanh(inputs.encoder[n][:, None] + inputs.predictor[n][None])
    log_probs = (hidden @ inputs.weight.T + inputs.bias).log_softmax(dim=-1)  # (T, U+1, V)
    s_begin, t_begin, s_end, t_end = BOUNDARY[n].tolist()
    choose = itertools.combinations_with_replacement if rnnt_type == "regular" else itertools.combinations
    best = (-float("inf"), [], [])
    for frames in choose(range(t_begin, t_end), s_end - s_begin):
        s, score, said = s_begin, 0.0, []
        for t in range(t_begin, t_end):
            here = frames.count(t)
            for _ in range(here):
                said.append(float(log_probs[t, s, symbols[n, s]]))
                score, s = score + said[-1], s + 1
            if rnnt_type != "modified" or not here:  # the blank that ends the frame; a symbol has ended it already
                score += float(log_probs[t, s, 0])
        if score > best[0]:
            best = (score, list(frames), said)
    return best


@pytest.mark.parametrize("rnnt_type", ["regular", "modified", "constrained"])
@pytest.mark.parametrize("seed", range(4))
def test_alignment_is_the_best_of_all_paths(rnnt_type, seed):
    inputs, symbols = make_inputs(seed)
    found = best_symbol_frames(inputs, symbols, BOUNDARY, rnnt_type)
    for n in range(N):
        score, frames, log_probs = best_of_all_paths(inputs, symbols, n, rnnt_type)
        begin, end = int(BOUNDARY[n, 0]), int(BOUNDARY[n, 2])
        assert float(found.scores[n]) == pytest.approx(score, abs=1e-9)
        expected = [-1] * U
        expected[begin : begin + len(frames)] = frames
        assert found.frames[n].tolist() == expected
        if frames:
            assert found.log_probs[n, begin:end].tolist() == pytest.approx(log_probs, abs=1e-9)


def test_an_utterance_without_a_path_says_so_and_harms_no_other():
    inputs, symbols = make_inputs(1)
    modified = best_symbol_frames(inputs, symbols, BOUNDARY, "modified")
    assert torch.isfinite(modified.scores).tolist() == [True, True, True, False, False, True, True]
    assert modified.frames[6].tolist() == [0, 1, 2]  # as many symbols as frames: one way only
    alone = best_symbol_frames(
        inputs._replace(encoder=inputs.encoder[:1], predictor=inputs.predictor[:1]), symbols[:1], BOUNDARY[:1],
        "modified",
    )
    assert alone.frames.tolist() == modified.frames[:1].tolist()


def test_batches_in_parts_give_the_same(monkeypatch):
    inputs, symbols = make_inputs(2)
    whole = best_symbol_frames(inputs, symbols, BOUNDARY, "modified")
    monkeypatch.setattr("cascade.losses.best_path._LATTICE_CELLS", 1)
    for one, other in zip(whole, best_symbol_frames(inputs, symbols, BOUNDARY, "modified"), strict=True):
        assert torch.equal(one, other)
