"""The most probable path through a joiner's whole lattice (Viterbi)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.losses.joiner_cells import BLANK_ID, CellJoiner, Cells, JoinerInputs, band_cells
from cascade.losses.log_probs import apply_topology, check_common, gather_log_probs
from cascade.losses.recursion import check_boundary
from cascade.losses.recursion_torch import lay_out_steps

_LATTICE_CELLS = 2**18
"""At most this many cells are looked at together, unless one utterance alone has more."""


class SymbolFrames(NamedTuple):
    """Frames in which the best path says its symbols."""

    frames: Tensor
    """(N, U) int64 the frame of each symbol, -1 for padding and for utterances without a path."""
    log_probs: Tensor
    """(N, U) the symbol's log-prob there, 0 where the frame is -1."""
    scores: Tensor
    """(N,) float64 log-prob of the whole path, blanks included; -inf if there is none."""


@torch.no_grad()
def one_best_cells(
    inputs: JoinerInputs, symbols: Tensor, boundary: Tensor, rnnt_type: str = "regular"
) -> Cells:  # fmt: skip
    """The cells that the best path leaves, by a blank or a symbol: T + U (regular), or one in each of the T frames.

    Two log-probs per cell of the whole lattice (N, T, U + 1) are kept, the logits of one slice.

    Args:
      inputs: the joiner, usually the teacher's; symbols: (N, U) int64; boundary: (N, 4) int64.
      rnnt_type: as for `best_symbol_frames`.
    Returns:
      the cells of all utterances, in the order of the paths; none for an utterance without a path.
    """
    check_common(symbols, BLANK_ID, inputs.weight.shape[0], rnnt_type)
    cells = []
    for part, begin, _, positions, _ in _best_paths(inputs, symbols, boundary, rnnt_type):
        utts, k = (positions >= 0).nonzero(as_tuple=True)
        s = positions[utts, k]
        t = k + begin[utts, 1] - (s if rnnt_type == "regular" else 0)
        cells.append(Cells(utts + part.start, t, s + begin[utts, 0]))
    return Cells(*(torch.cat(columns) for columns in zip(*cells, strict=True)))


@torch.no_grad()
def best_symbol_frames(
    inputs: JoinerInputs, symbols: Tensor, boundary: Tensor, rnnt_type: str = "regular"
) -> SymbolFrames:
    """The frame in which the best path says each symbol: a Viterbi alignment. Memory as `one_best_cells`.

    Args:
      inputs: the joiner; symbols: (N, U) int64; boundary: (N, 4) int64.
      rnnt_type: regular (any number of symbols in a frame) | modified | constrained (one at most).
    """
    check_common(symbols, BLANK_ID, inputs.weight.shape[0], rnnt_type)
    results = []
    for part, bounds, px, positions, scores in _best_paths(inputs, symbols, boundary, rnnt_type):
        ends = torch.where(positions.max(dim=1, keepdim=True).values >= 0, (bounds[:, 2] - bounds[:, 0])[:, None], -1)
        following = torch.cat((positions[:, 1:], torch.full_like(ends, -1)), dim=1)
        following = torch.where((following < 0) & (positions >= 0), ends, following)
        utts, k = (following > positions).nonzero(as_tuple=True)  # the steps that say something
        s, begin = positions[utts, k], bounds[utts]
        t = k + begin[:, 1] - (s if rnnt_type == "regular" else 0)
        frames = torch.full_like(symbols[part], -1)
        log_probs = px.new_zeros(frames.shape)
        frames[utts, s + begin[:, 0]] = t
        log_probs[utts, s + begin[:, 0]] = px[utts, s + begin[:, 0], t]
        results.append(SymbolFrames(frames, log_probs, scores))
    return SymbolFrames(*(torch.cat(columns) for columns in zip(*results, strict=True)))


def _best_paths(
    inputs: JoinerInputs, symbols: Tensor, boundary: Tensor, rnnt_type: str
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield groups of utterances whose arrays take a few megabytes: their slice, boundary, symbols' log-probs before
    the topology, and what `_best_path` says of them."""
    num_utts, num_frames, _ = inputs.encoder.shape
    boundary = check_boundary(boundary, num_utts, symbols.shape[1], num_frames, symbols.device)
    step = max(1, _LATTICE_CELLS // max(1, num_frames * (symbols.shape[1] + 1)))
    for part in (slice(begin, begin + step) for begin in range(0, num_utts, step)):
        group = inputs._replace(encoder=inputs.encoder[part], predictor=inputs.predictor[part])
        px, py = _whole_lattice(group, symbols[part], boundary[part])
        yield part, boundary[part], px, *_best_path(*apply_topology(px, py, rnnt_type, boundary[part]), boundary[part])


def _whole_lattice(inputs: JoinerInputs, symbols: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of symbols (N, U, T) and blanks (N, U + 1, T) of the joiner's whole lattice."""
    num_utts, num_frames, _ = inputs.encoder.shape
    positions = torch.arange(symbols.shape[1] + 1, device=symbols.device).expand(num_utts, num_frames, -1)
    cells, index = band_cells(positions, boundary)
    joiner = CellJoiner(inputs, cells)
    labels = torch.nn.functional.pad(symbols, (0, 1), value=BLANK_ID)[cells.utts, cells.positions]
    picked = torch.full((2, positions.numel()), -torch.inf, dtype=joiner.dtype, device=symbols.device)
    for rows in joiner.slices():
        logits = joiner.logits(joiner.hidden(rows))
        picked[0, index[rows]], picked[1, index[rows]] = gather_log_probs(logits, labels[rows], BLANK_ID)
    px, py = picked.view(2, *positions.shape).transpose(2, 3)  # (N, U+1, T)
    return px[:, :-1], py


def _best_path(px: Tensor, py: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor]:
    """The best path over the steps k = s + t (regular, px (N, U, T + 1)) or k = t (px (N, U, T)); py (N, U + 1, T).

    Returns:
      (N, K) int64 position, counted from s_begin, that each step leaves, -1 after the path's last step and where there
      is no path; (N,) float64 log-prob of the path.
    """
    columns = torch.arange(px.shape[2], device=px.device)
    steps = lay_out_steps(px.masked_fill(columns >= boundary[:, 3, None, None], -torch.inf), py, boundary)
    num_steps = steps.ys.shape[0] - 1
    rows = torch.arange(px.shape[0], device=px.device)
    s_len, t_len = boundary[:, 2] - boundary[:, 0], boundary[:, 3] - boundary[:, 1]
    path_lens = t_len + (s_len if px.shape[2] > py.shape[2] else 0)
    best = torch.full_like(steps.ys[0], -torch.inf)  # (N, U+1)
    best[:, 0] = 0.0
    by_symbol = torch.zeros(steps.ys.shape, dtype=torch.bool, device=px.device)
    scores = best[rows, s_len]
    for k in range(1, num_steps + 1):
        stay = best + steps.ys[k]
        move = torch.nn.functional.pad(best[:, :-1], (1, 0), value=-torch.inf) + steps.xs[k]
        by_symbol[k] = move > stay
        best = torch.maximum(stay, move)
        scores = torch.where(path_lens == k, best[rows, s_len], scores)
    scores = scores.masked_fill((path_lens == 0) & (s_len > 0), -torch.inf)
    possible = torch.isfinite(scores)
    s, positions = s_len.clone(), s_len.new_full((px.shape[0], num_steps), -1)
    for k in range(num_steps, 0, -1):
        active = possible & (k <= path_lens)
        s = torch.where(active & by_symbol[k, rows, s], s - 1, s)
        positions[:, k - 1] = torch.where(active, s, -1)
    return positions, scores
