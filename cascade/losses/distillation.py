"""Distillation on lattice cells: KL(teacher || student) of the label distributions p(k | t, u).

Kinds: pruned, all V labels on a band of R positions per frame (ours); collapsed, the same cells with the classes next
label / blank / rest (2011.06110); one_best, all labels on the cells of the teacher's best path (2110.03334).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cascade.losses.log_probs import gather_log_probs
from cascade.losses.recursion import check_boundary
from cascade.losses.recursion_torch import lay_out_steps

KINDS = ("pruned", "collapsed", "one_best")


class JoinerInputs(NamedTuple):
    """What a joiner needs for logits = tanh(encoder[t] + predictor[u]) @ weight.T + bias."""

    encoder: Tensor
    """(N, T, D)"""
    predictor: Tensor
    """(N, U + 1, D)"""
    weight: Tensor
    """(V, D)"""
    bias: Tensor
    """(V,)"""


class Cells(NamedTuple):
    """A list of M lattice cells (n, t, u), each an (M,) int64 tensor."""

    utts: Tensor
    frames: Tensor
    positions: Tensor


def _joiner_logits(inputs: JoinerInputs, cells: Cells) -> Tensor:
    hidden = torch.tanh(inputs.encoder[cells.utts, cells.frames] + inputs.predictor[cells.utts, cells.positions])
    return torch.nn.functional.linear(hidden, inputs.weight, inputs.bias).float()


def _inside(frames: Tensor, positions: Tensor, boundary: Tensor) -> Tensor:
    s_begin, t_begin, s_end, t_end = (x[:, None, None] for x in boundary.unbind(1))
    return (frames >= t_begin) & (frames < t_end) & (positions >= s_begin) & (positions <= s_end)


def band_cells(ranges: Tensor, boundary: Tensor) -> tuple[Cells, Tensor]:
    """The valid cells (t < T_n, u <= U_n) of a band (N, T, R), and the mask (N, T, R) that picks them."""
    frames = torch.arange(ranges.shape[1], device=ranges.device)[None, :, None].expand_as(ranges)
    valid = _inside(frames, ranges, boundary)
    utts = torch.arange(ranges.shape[0], device=ranges.device)[:, None, None].expand_as(ranges)
    return Cells(utts[valid], frames[valid], ranges[valid]), valid


@torch.no_grad()
def one_best_cells(teacher: JoinerInputs, symbols: Tensor, boundary: Tensor, *, blank_id: int = 0) -> Cells:
    """The T + U cells of the most probable path through the teacher's whole (regular) lattice.

    Args:
      teacher: joiner inputs; symbols: (N, U) int64; boundary: (N, 4) int64.
    Returns:
      the cells of all utterances, in order; none for an utterance without frames.
    """
    num_utts, num_frames, _ = teacher.encoder.shape
    num_symbols = symbols.shape[1]
    boundary = check_boundary(boundary, num_utts, num_symbols, num_frames, symbols.device)
    positions = torch.arange(num_symbols + 1, device=symbols.device).expand(num_utts, num_frames, -1)
    cells, valid = band_cells(positions, boundary)
    padded = torch.nn.functional.pad(symbols, (0, 1), value=blank_id)
    px = torch.full(valid.shape, -torch.inf, device=symbols.device)  # (N, T, U+1)
    py = px.clone()
    label, blank = [], []
    for begin in range(0, cells.utts.shape[0], 4096):
        part = Cells(*(x[begin : begin + 4096] for x in cells))
        found = gather_log_probs(_joiner_logits(teacher, part), padded[part.utts, part.positions], blank_id)
        label.append(found[0])
        blank.append(found[1])
    if label:
        px[valid], py[valid] = torch.cat(label), torch.cat(blank)
    px = torch.nn.functional.pad(px[:, :, :-1].transpose(1, 2), (0, 1), value=-torch.inf)
    return _best_path(px, py.transpose(1, 2), boundary)


def _best_path(px: Tensor, py: Tensor, boundary: Tensor) -> Cells:
    """Viterbi over the steps k = s + t: px (N, U, T + 1), py (N, U + 1, T) -> the nodes that the best path leaves."""
    columns = torch.arange(px.shape[2], device=px.device)
    px = px.masked_fill(columns >= boundary[:, 3, None, None], -torch.inf)
    steps = lay_out_steps(px, py, boundary)
    best = torch.full_like(steps.ys[0], -torch.inf)  # (N, U+1)
    best[:, 0] = 0.0
    by_symbol = torch.zeros(steps.ys.shape, dtype=torch.bool, device=px.device)
    scores = [best]
    for k in range(1, steps.ys.shape[0]):
        stay = best + steps.ys[k]
        move = torch.nn.functional.pad(best[:, :-1], (1, 0), value=-torch.inf) + steps.xs[k]
        by_symbol[k] = move > stay
        best = torch.maximum(stay, move)
        scores.append(best)
    s_len, t_len = boundary[:, 2] - boundary[:, 0], boundary[:, 3] - boundary[:, 1]
    rows = torch.arange(px.shape[0], device=px.device)
    possible = torch.isfinite(torch.stack(scores)[s_len + t_len, rows, s_len])
    utts, frames, positions = [], [], []
    s = s_len.clone()
    for k in range(steps.ys.shape[0] - 1, 0, -1):
        active = possible & (k <= s_len + t_len)
        s = torch.where(active & by_symbol[k, rows, s], s - 1, s)
        utts.append(rows[active])
        positions.append((s + boundary[:, 0])[active])
        frames.append((k - 1 - s + boundary[:, 1])[active])
    if not utts:
        return Cells(rows[:0], rows[:0], rows[:0])
    cells = Cells(torch.cat(utts), torch.cat(frames), torch.cat(positions))
    order = torch.argsort(cells.utts * (px.shape[2] + px.shape[1] + 1) + cells.frames + cells.positions)
    return Cells(*(x[order] for x in cells))


def _class_log_probs(logits: Tensor, labels: Tensor, blank_id: int) -> Tensor:
    """(M, V) -> (M, 3) log-probs of next label, blank, rest; labels = blank_id: there is no next label."""
    log_probs = logits.log_softmax(dim=1)
    picked = torch.stack([labels, torch.full_like(labels, blank_id)], dim=1)  # (M, 2)
    label, blank = log_probs.gather(1, picked).unbind(1)
    label = label.masked_fill(labels == blank_id, -torch.inf)
    rest = log_probs.scatter(1, picked, -torch.inf).logsumexp(dim=1)
    return torch.stack([label, blank, rest], dim=1)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """(M, C) log-probs -> (M,) KL(teacher || student); a class of probability zero in both counts as 0."""
    probs = teacher.exp()
    gap = (teacher - student).masked_fill(torch.isneginf(teacher), 0.0)
    return (probs * gap).sum(dim=1)


def distillation_loss(
    student: JoinerInputs, teacher: JoinerInputs, symbols: Tensor, boundary: Tensor, ranges: Tensor, *, kind: str,
    temperature: float, cell_weights: Tensor | None = None, blank_id: int = 0, logits_budget_mb: float = 64.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of KL(teacher || student) over the valid cells of each utterance.

    Args:
      student, teacher: joiner inputs with the same N, T, U, V; D may differ. The teacher gets no gradient.
      symbols: (N, U) int64; boundary: (N, 4) int64 [0, 0, U_n, T_n].
      ranges: (N, T, R) int64 band for kinds pruned and collapsed; one_best has its own cells instead.
      kind: pruned | collapsed | one_best.
      temperature: divides the logits of both.
      cell_weights: (N, T, R) weights of the band's cells, None for 1 each; one_best weighs all its cells with 1.
    Returns:
      (N,) sums of weight * KL and (N,) sums of the weights; divide one's total by the other's for a mean.
    Raises:
      ValueError: unknown kind, temperature <= 0, or shapes that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"distillation kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not temperature > 0:
        raise ValueError(f"distillation temperature must be > 0, got {temperature}")
    if student.weight.shape[0] != teacher.weight.shape[0]:
        raise ValueError(
            f"teacher and student must have the same vocabulary, got {teacher.weight.shape[0]} and "
            f"{student.weight.shape[0]} labels; train both with one tokenizer"
        )
    if student.encoder.shape[:2] != teacher.encoder.shape[:2]:
        raise ValueError(
            f"teacher and student must have the same frames (N, T), got {tuple(teacher.encoder.shape[:2])} and "
            f"{tuple(student.encoder.shape[:2])}"
        )
    num_utts, num_frames, _ = student.encoder.shape
    boundary = check_boundary(boundary, num_utts, symbols.shape[1], num_frames, symbols.device)
    if kind == "one_best":
        cells = one_best_cells(teacher, symbols, boundary, blank_id=blank_id)
        weights = student.encoder.new_ones(cells.utts.shape[0])
    else:
        cells, valid = band_cells(ranges, boundary)
        weights = student.encoder.new_ones(cells.utts.shape[0]) if cell_weights is None else cell_weights[valid]
    with torch.no_grad():
        teacher_logits = _joiner_logits(teacher, cells) / temperature
    student_logits = _joiner_logits(student, cells) / temperature
    if kind == "collapsed":
        labels = torch.nn.functional.pad(symbols, (0, 1), value=blank_id)[cells.utts, cells.positions]
        labels = labels.masked_fill(cells.positions == boundary[cells.utts, 2], blank_id)
        kl = _kl(
            _class_log_probs(teacher_logits, labels, blank_id), _class_log_probs(student_logits, labels, blank_id)
        )
    else:
        kl = _kl(teacher_logits.log_softmax(dim=1), student_logits.log_softmax(dim=1))
    zeros = kl.new_zeros(num_utts)
    return zeros.index_add(0, cells.utts, kl * weights), zeros.index_add(0, cells.utts, weights.to(kl.dtype))
