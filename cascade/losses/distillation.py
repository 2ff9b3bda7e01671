"""Distillation on lattice cells: KL(teacher || student) of the label distributions p(k | t, u).

Its weight in training is `distillation.weight`, applied in training/terms.py.

Kinds: pruned, all V labels on a band of R positions per frame (ours); collapsed, the same cells with the classes next
label / blank / rest (2011.06110); one_best, all labels on the cells of the teacher's best path (2110.03334).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cascade.losses.best_path import one_best_cells
from cascade.losses.joiner_cells import (
    BLANK_ID,
    CellJoiner,
    Cells,
    JoinerGradients,
    JoinerInputs,
    band_cells,
    check_inputs,
)
from cascade.losses.pruning import check_ranges
from cascade.losses.recursion import check_boundary

KINDS = ("pruned", "collapsed", "one_best")


class _Options(NamedTuple):
    collapsed: bool
    temperature: float
    budget_bytes: float


def _all_labels_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL (m,) and d KL / d student (m, V) of softmax(teacher), softmax(student); overwrites both.

    KL = sum p (log p - log q), its gradient is q - p.
    """
    teacher -= teacher.amax(dim=1, keepdim=True)
    student -= student.amax(dim=1, keepdim=True)
    gap = teacher - student
    p, q = teacher.exp_(), student.exp_()
    p_sum, q_sum = p.sum(dim=1, keepdim=True), q.sum(dim=1, keepdim=True)
    p /= p_sum
    kl = gap.mul_(p).sum(dim=1) + (q_sum / p_sum).log()[:, 0]
    return kl, q.div_(q_sum).sub_(p)


def _collapsed_kl(teacher: Tensor, student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """KL and gradient as _all_labels_kl's for the classes label, blank, rest; a blank as label: there is no next one.

    With class probabilities P of the teacher and Q of the student, d KL / d student_k = q_k (1 - P_c / Q_c), where c is
    the class of k. Overwrites both, too.
    """
    picked = torch.stack([labels, torch.full_like(labels, BLANK_ID)], dim=1)  # (m, 2)
    has_label = labels != BLANK_ID
    tiny = torch.finfo(teacher.dtype).tiny

    def classes(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        total = probs.sum(dim=1, keepdim=True)
        two = probs.gather(1, picked)
        # not 1 - label - blank, which leaves nothing but rounding where the two are sure
        rest = probs.scatter_(1, picked, 0.0).sum(dim=1, keepdim=True)
        label, blank = two.unbind(1)
        three = torch.stack([label * has_label, blank, rest[:, 0]], dim=1) / total  # (m, 3)
        return probs.div_(total), three, three.clamp(min=tiny).log()

    _, p_classes, p_logs = classes(teacher)
    probs, q_classes, q_logs = classes(student)
    kl = (p_classes * (p_logs - q_logs)).sum(dim=1)
    grad = probs.mul_(1.0 - p_classes[:, 2:] / q_classes[:, 2:].clamp(min=tiny))
    sure = q_classes - p_classes
    grad.scatter_(1, picked[:, 1:], sure[:, 1:2])
    grad.scatter_(1, picked[:, :1], torch.where(has_label, sure[:, 0], sure[:, 1])[:, None])
    return kl, grad


class _CellKL(torch.autograd.Function):
    """KL (M,) per cell; keeps its gradient by the student's logits within the budget, else computes it again."""

    @staticmethod
    def forward(ctx, encoder, predictor, weight, bias, teacher: JoinerInputs, cells: Cells, labels, options: _Options):
        student = JoinerInputs(encoder, predictor, weight, bias)
        joiners = CellJoiner(student, cells), CellJoiner(teacher, cells)
        joiner = joiners[0]
        grads_bytes = joiner.num_cells * joiner.vocab_size * joiner.weight.element_size()
        keep = any(ctx.needs_input_grad) and grads_bytes <= options.budget_bytes
        grads = joiner.weight.new_empty(joiner.num_cells, joiner.vocab_size) if keep else None
        kl = joiner.weight.new_empty(joiner.num_cells)
        for rows in joiner.slices():
            out = None if grads is None else grads[rows]
            kl[rows], _ = _slice_kl(joiners, joiner.hidden(rows), rows, labels, options, out)
        for each in joiners:
            each.free_scratch()
        ctx.save_for_backward(*student, labels, grads)
        ctx.joiners, ctx.options = joiners, options
        return kl

    @staticmethod
    def backward(ctx, grad_kl: Tensor):
        *student, labels, grads = ctx.saved_tensors
        joiner, options = ctx.joiners[0], ctx.options
        factors = grad_kl.to(joiner.dtype)[:, None] / options.temperature
        gradients = JoinerGradients(joiner)
        for rows in joiner.slices():
            hidden = joiner.hidden(rows)
            if grads is None:
                grad = _slice_kl(ctx.joiners, hidden, rows, labels, options)[1].mul_(factors[rows])
            else:
                kept = grads[rows]
                grad = torch.mul(kept, factors[rows], out=joiner.scratch("logits", kept.shape[0], joiner.vocab_size))
            gradients.add(grad, hidden, rows)
        joiner.free_scratch()
        return *gradients.results(JoinerInputs(*student)), None, None, None, None


def _slice_kl(
    joiners: tuple[CellJoiner, CellJoiner], hidden: Tensor, rows: slice, labels: Tensor, options: _Options,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL (m,) and its gradient (m, V) by the tempered student logits for one slice; the gradient lies in `out`."""
    student, teacher = joiners
    teacher_logits = teacher.logits(teacher.hidden(rows)).to(student.dtype)
    student_logits = student.logits(hidden, out)
    if options.temperature != 1.0:
        teacher_logits /= options.temperature
        student_logits /= options.temperature
    if options.collapsed:
        return _collapsed_kl(teacher_logits, student_logits, labels[rows])
    return _all_labels_kl(teacher_logits, student_logits)


def distillation_loss(
    student: JoinerInputs, teacher: JoinerInputs, symbols: Tensor, boundary: Tensor, ranges: Tensor, *, kind: str,
    temperature: float, cell_weights: Tensor | None = None, rnnt_type: str = "regular", logits_budget_mb: float = 64.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of KL(teacher || student) over the valid cells of each utterance.

    Args:
      student, teacher: joiner inputs with the same N, T, U, V; D may differ. The teacher gets no gradient.
      symbols: (N, U) int64; boundary: (N, 4) int64 [0, 0, U_n, T_n].
      ranges: (N, T, R) int64 band for kinds pruned and collapsed; one_best has its own cells instead.
      kind: pruned | collapsed | one_best.
      temperature: divides the logits of both.
      cell_weights: (N, T, R) weights of the band's cells, None for 1 each; one_best weighs all its cells with 1.
      rnnt_type: regular | modified | constrained, the topology of one_best's path.
    Returns:
      (N,) sums of weight * KL and (N,) sums of the weights; divide one's total by the other's for a mean.
    Raises:
      ValueError: shapes that do not fit.
    """
    assert kind in KINDS and temperature > 0, (kind, temperature)
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
    check_inputs(student, "distillation student")
    check_inputs(teacher, "distillation teacher")
    num_utts, num_frames, _ = student.encoder.shape
    boundary = check_boundary(boundary, num_utts, symbols.shape[1], num_frames, symbols.device)
    with torch.autocast(symbols.device.type, enabled=False):
        if kind == "one_best":
            cells = one_best_cells(teacher, symbols, boundary, rnnt_type)
            weights = torch.ones(cells.utts.shape[0], device=symbols.device)
        else:
            check_ranges(ranges, num_utts, num_frames, symbols.shape[1])
            cells, weights = _weighted_cells(ranges, boundary, cell_weights)
        labels = torch.nn.functional.pad(symbols, (0, 1), value=BLANK_ID)[cells.utts, cells.positions]
        labels = labels.masked_fill(cells.positions == boundary[cells.utts, 2], BLANK_ID)
        teacher = JoinerInputs(*(x.detach() for x in teacher))
        options = _Options(kind == "collapsed", temperature, logits_budget_mb * 1e6)
        kl = _CellKL.apply(*student, teacher, cells, labels, options)
        weights = weights.to(kl.dtype)
        zeros = kl.new_zeros(num_utts)
        return zeros.index_add(0, cells.utts, kl * weights), zeros.index_add(0, cells.utts, weights)


def _weighted_cells(ranges: Tensor, boundary: Tensor, cell_weights: Tensor | None) -> tuple[Cells, Tensor]:
    """The valid cells of the band whose weight is not zero, and their weights (M,)."""
    cells, index = band_cells(ranges, boundary)
    if cell_weights is None:
        return cells, torch.ones(index.shape[0], device=ranges.device)
    if cell_weights.shape != ranges.shape:
        raise ValueError(f"cell_weights must be (N, T, R) = {tuple(ranges.shape)}, got {tuple(cell_weights.shape)}")
    weights = cell_weights.detach().flatten()[index]
    heavy = weights.nonzero()[:, 0]
    return Cells(*(column[heavy] for column in cells)), weights[heavy]
