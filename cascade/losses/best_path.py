"""The most probable path through a joiner's whole lattice (Viterbi)."""

import torch
from torch import Tensor

from cascade.losses.joiner_cells import CellJoiner, Cells, JoinerInputs, band_cells
from cascade.losses.log_probs import gather_log_probs
from cascade.losses.recursion import check_boundary
from cascade.losses.recursion_torch import lay_out_steps


@torch.no_grad()
def one_best_cells(inputs: JoinerInputs, symbols: Tensor, boundary: Tensor, *, blank_id: int = 0) -> Cells:
    """The T + U cells that the best path leaves, by a blank or a symbol, in the regular topology.

    Two log-probs per cell of the whole lattice (N, T, U + 1) are kept, the logits of one slice.

    Args:
      inputs: the joiner, usually the teacher's; symbols: (N, U) int64; boundary: (N, 4) int64.
    Returns:
      the cells of all utterances, in the order of the paths; none for an utterance without a path.
    """
    num_utts, num_frames, _ = inputs.encoder.shape
    boundary = check_boundary(boundary, num_utts, symbols.shape[1], num_frames, symbols.device)
    step = max(1, 2**18 // max(1, num_frames * (symbols.shape[1] + 1)))  # a few megabytes per array
    found = []
    for begin in range(0, num_utts, step):
        part = slice(begin, begin + step)
        some = inputs._replace(encoder=inputs.encoder[part], predictor=inputs.predictor[part])
        cells = _best_path(*_whole_lattice(some, symbols[part], boundary[part], blank_id), boundary[part])
        found.append(cells._replace(utts=cells.utts + begin))
    return Cells(*(torch.cat(columns) for columns in zip(*found, strict=True)))


def _whole_lattice(inputs: JoinerInputs, symbols: Tensor, boundary: Tensor, blank_id: int) -> tuple[Tensor, Tensor]:
    """Log-probs of symbols (N, U, T + 1) and blanks (N, U + 1, T) of the joiner's whole lattice."""
    num_utts, num_frames, _ = inputs.encoder.shape
    positions = torch.arange(symbols.shape[1] + 1, device=symbols.device).expand(num_utts, num_frames, -1)
    cells, index = band_cells(positions, boundary)
    joiner = CellJoiner(inputs, cells)
    labels = torch.nn.functional.pad(symbols, (0, 1), value=blank_id)[cells.utts, cells.positions]
    picked = torch.full((2, positions.numel()), -torch.inf, dtype=joiner.dtype, device=symbols.device)
    for rows in joiner.slices():
        logits = joiner.logits(joiner.hidden(rows))
        picked[0, index[rows]], picked[1, index[rows]] = gather_log_probs(logits, labels[rows], blank_id)
    px, py = picked.view(2, *positions.shape).transpose(2, 3)  # (N, U+1, T)
    return torch.nn.functional.pad(px[:, :-1], (0, 1), value=-torch.inf), py


def _best_path(px: Tensor, py: Tensor, boundary: Tensor) -> Cells:
    """px (N, U, T + 1), py (N, U + 1, T) -> the nodes that the best path leaves, found over the steps k = s + t."""
    columns = torch.arange(px.shape[2], device=px.device)
    steps = lay_out_steps(px.masked_fill(columns >= boundary[:, 3, None, None], -torch.inf), py, boundary)
    num_steps = steps.ys.shape[0] - 1
    rows = torch.arange(px.shape[0], device=px.device)
    s_len, path_lens = boundary[:, 2] - boundary[:, 0], (boundary[:, 2:] - boundary[:, :2]).sum(dim=1)
    best = torch.full_like(steps.ys[0], -torch.inf)  # (N, U+1)
    best[:, 0] = 0.0
    by_symbol = torch.zeros(steps.ys.shape, dtype=torch.bool, device=px.device)
    possible = path_lens == 0
    for k in range(1, num_steps + 1):
        stay = best + steps.ys[k]
        move = torch.nn.functional.pad(best[:, :-1], (1, 0), value=-torch.inf) + steps.xs[k]
        by_symbol[k] = move > stay
        best = torch.maximum(stay, move)
        possible |= (path_lens == k) & torch.isfinite(best[rows, s_len])
    s, nodes = s_len.clone(), []
    for k in range(num_steps, 0, -1):
        active = possible & (k <= path_lens)
        s = torch.where(active & by_symbol[k, rows, s], s - 1, s)
        nodes.append(torch.where(active, s, -1))
    if not nodes:
        return Cells(rows[:0], rows[:0], rows[:0])
    s = torch.stack(nodes[::-1], dim=1)  # (N, K) position left in step k
    utts, k = (s >= 0).nonzero(as_tuple=True)
    s = s[utts, k]
    return Cells(utts, k - s + boundary[utts, 1], s + boundary[utts, 0])
