"""The transducer loss of one pass, as training calls it: simple loss, prune ranges, joiner, pruned loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from cascade.losses.backends import band_forward_backward
from cascade.losses.joiner_cells import (
    BLANK_ID,
    CellJoiner,
    JoinerGradients,
    JoinerInputs,
    band_cells,
    check_inputs,
)
from cascade.losses.log_probs import check_common, smoothed_log_probs
from cascade.losses.pruning import check_ranges, choose_ranges, labels_on_band
from cascade.losses.recursion import check_boundary, mutual_information_recursion
from cascade.losses.rnnt import add_delay_penalty


class TransducerLoss(NamedTuple):
    """Per utterance negative log-likelihoods, and the band they were computed on."""

    simple: Tensor
    """(N,) smoothed loss of the additive joiner; +inf where no path exists."""
    pruned: Tensor
    """(N,) loss of the joiner on the band; +inf where no path exists."""
    ranges: Tensor
    """(N, T, R) int64 positions of the band."""
    occupancy: Tensor
    """(N, T, R) posterior of being in each cell of the band, without gradient; zeros for an impossible utterance."""


class _Options(NamedTuple):
    rnnt_type: str
    delay_penalty: float
    budget_bytes: float


def _simple_loss(
    am: Tensor, lm: Tensor, symbols: Tensor, boundary: Tensor, lm_scale: float, am_scale: float, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed simple loss (N,) with zero gradients for impossible utterances, and its occupancies."""
    px, py = smoothed_log_probs(lm, am, symbols, BLANK_ID, lm_scale, am_scale, boundary, options.rnnt_type)
    px = add_delay_penalty(px, am.shape[1], boundary, options.delay_penalty)
    scores, (px_grad, py_grad) = mutual_information_recursion(px, py, boundary, return_grad=True)
    return -scores.masked_fill(torch.isneginf(scores.detach()), -torch.inf), px_grad, py_grad  # the fill: no gradient


class _BandLoss(torch.autograd.Function):
    """Joiner, log-softmax and recursion on the band in one function that keeps as little as possible."""

    @staticmethod
    def forward(ctx, encoder, predictor, weight, bias, symbols, ranges, boundary, options: _Options):
        inputs = JoinerInputs(encoder, predictor, weight, bias)
        cells, index = band_cells(ranges, boundary)
        joiner = CellJoiner(inputs, cells)
        labels = labels_on_band(symbols, ranges, BLANK_ID).flatten()[index]
        logits_bytes = joiner.num_cells * joiner.vocab_size * joiner.weight.element_size()
        keep_logits = logits_bytes <= options.budget_bytes
        exps = joiner.weight.new_empty(joiner.num_cells, joiner.vocab_size) if keep_logits else None
        picked = torch.full((2, ranges.numel()), -torch.inf, dtype=joiner.dtype, device=ranges.device)
        norms = joiner.weight.new_empty(2, joiner.num_cells)  # the maximum and the sum of the exps of every cell
        for rows in joiner.slices():
            logits = joiner.logits(joiner.hidden(rows), None if exps is None else exps[rows])
            label, blank = logits.gather(1, labels[rows, None])[:, 0], logits[:, BLANK_ID].clone()
            norms[0, rows] = torch.amax(logits, dim=1)
            torch.sum(logits.sub_(norms[0, rows, None]).exp_(), dim=1, out=norms[1, rows])
            log_sum = norms[1, rows].log() + norms[0, rows]
            picked[0, index[rows]] = label - log_sum
            picked[1, index[rows]] = blank - log_sum
        joiner.free_scratch()
        scores, d_label, d_blank = _band_occupancy(picked.view(2, *ranges.shape), ranges, boundary, options)
        occupancy = d_label + d_blank
        if options.rnnt_type == "constrained":  # a symbol also takes its target's blank in the same frame
            d_blank[:, :, 1:] += d_label[:, :, :-1]
        d_picked = torch.stack([d_label.flatten()[index], d_blank.flatten()[index]])
        ctx.save_for_backward(*inputs, cells.utts, labels, norms, d_picked, exps)
        ctx.joiner = joiner
        ctx.mark_non_differentiable(occupancy)
        return -scores.to(joiner.dtype), occupancy

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _):
        *inputs, utts, labels, norms, d_picked, exps = ctx.saved_tensors
        joiner = ctx.joiner
        d_picked = -d_picked * grad_loss.to(joiner.dtype)[utts]  # d loss / d log-prob of label and blank
        total = d_picked.sum(dim=0)
        factors = -total / norms[1]
        active = (total != 0).nonzero()[:, 0]
        gradients = JoinerGradients(joiner)
        skip = active.shape[0] < 0.75 * joiner.num_cells  # cells that no path visits cost nothing here
        for part in joiner.slices(active.shape[0] if skip else None):
            rows = active[part] if skip else part
            hidden = joiner.hidden(rows)  # cheaper to compute again than to keep
            if exps is None:
                d_logits = joiner.logits(hidden).sub_(norms[0, rows, None]).exp_()
                d_logits *= factors[rows, None]
            else:
                kept = exps[rows]
                out = joiner.scratch("logits", kept.shape[0], joiner.vocab_size)
                d_logits = torch.mul(kept, factors[rows, None], out=out)
            d_logits.scatter_add_(1, labels[rows, None], d_picked[0, rows, None])
            d_logits[:, BLANK_ID] += d_picked[1, rows]
            gradients.add(d_logits, hidden, rows)
        joiner.free_scratch()
        return *gradients.results(JoinerInputs(*inputs)), None, None, None, None


def _band_occupancy(
    picked: Tensor, ranges: Tensor, boundary: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(2, N, T, R) label and blank log-probs -> scores (N,) float64, posteriors of both (N, T, R)."""
    label, blank = picked
    if options.rnnt_type == "constrained":
        label = label + torch.nn.functional.pad(blank[:, :, 1:], (0, 1), value=-torch.inf)
    label = add_delay_penalty(label.transpose(1, 2), label.shape[1], boundary, options.delay_penalty).transpose(1, 2)
    scores, d_label, d_blank = band_forward_backward(
        label, blank, ranges, boundary, modified=options.rnnt_type != "regular",
        # what lies far below the rounding of a sum of posteriors is not worth a row of two matrix products
        least=torch.finfo(label.dtype).eps ** 1.5,
    )
    return scores, d_label, d_blank


def transducer_loss(
    am: Tensor, lm: Tensor, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor, symbols: Tensor,
    boundary: Tensor, *, prune_range: int, lm_scale: float, am_scale: float, rnnt_type: str,
    delay_penalty: float = 0.0, logits_budget_mb: float = 64.0, ranges: Tensor | None = None,
) -> TransducerLoss:
    """Simple and pruned loss of one pass; the joiner is logits = tanh(encoder[t] + predictor[u]) @ weight.T + bias.

    Args:
      am: (N, T, V), lm: (N, U + 1, V) logits of the additive joiner.
      encoder: (N, T, D), predictor: (N, U + 1, D) inputs of the joiner; weight: (V, D), bias: (V,).
      symbols: (N, U) int64, padded with any id. boundary: (N, 4) int64 [0, 0, U_n, T_n].
      prune_range: positions R per frame. lm_scale, am_scale: smoothing of the simple loss.
      rnnt_type: regular | modified | constrained.
      delay_penalty: reward of early symbols.
      logits_budget_mb: keep the band's logits for the backward up to this size (10^6 bytes), else recompute them.
      ranges: (N, T, R) band to use instead of the simple loss's own.
    Returns:
      TransducerLoss; an impossible utterance has loss +inf and zero gradients.
    Raises:
      ValueError: arguments that do not fit together.
    """
    joiner = JoinerInputs(encoder, predictor, weight, bias)
    with torch.autocast(am.device.type, enabled=False):
        options = _options(joiner, symbols, rnnt_type, delay_penalty, logits_budget_mb)
        if encoder.shape[:2] != am.shape[:2] or predictor.shape[:2] != lm.shape[:2]:
            raise ValueError(
                f"am {tuple(am.shape)} and encoder {tuple(encoder.shape)}, lm {tuple(lm.shape)} and predictor "
                f"{tuple(predictor.shape)} must agree in their first two dimensions"
            )
        boundary = check_boundary(boundary, am.shape[0], symbols.shape[1], am.shape[1], am.device)
        simple, px_grad, py_grad = _simple_loss(am, lm, symbols, boundary, lm_scale, am_scale, options)
        if ranges is None:
            ranges = choose_ranges(px_grad, py_grad, boundary, prune_range)
        else:
            check_ranges(ranges, am.shape[0], am.shape[1], symbols.shape[1])
        pruned, occupancy = _BandLoss.apply(*joiner, symbols, ranges, boundary, options)
        return TransducerLoss(simple, pruned, ranges, occupancy)


def has_alignment(boundary: Tensor, rnnt_type: str, prune_range: int) -> Tensor:
    """(N,) whether the lengths leave a path through the band: U <= T, in the regular topology U <= (R - 1) T.

    Args:
      boundary: (N, 4) int64 [0, 0, U_n, T_n]. prune_range: R, at least 2.
    """
    num_symbols, num_frames = boundary[:, 2], boundary[:, 3]
    return num_symbols <= num_frames * (prune_range - 1 if rnnt_type == "regular" else 1)


def pruned_loss(
    encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor, symbols: Tensor, ranges: Tensor,
    boundary: Tensor | None = None, *, rnnt_type: str = "regular", delay_penalty: float = 0.0,
    logits_budget_mb: float = 64.0,
) -> tuple[Tensor, Tensor]:
    """The pruned part of transducer_loss alone, on a given band; arguments as there.

    Returns:
      losses (N,) and occupancy (N, T, R).
    """
    joiner = JoinerInputs(encoder, predictor, weight, bias)
    with torch.autocast(encoder.device.type, enabled=False):
        options = _options(joiner, symbols, rnnt_type, delay_penalty, logits_budget_mb)
        boundary = check_boundary(boundary, encoder.shape[0], symbols.shape[1], encoder.shape[1], encoder.device)
        check_ranges(ranges, encoder.shape[0], encoder.shape[1], symbols.shape[1])
        return _BandLoss.apply(*joiner, symbols, ranges, boundary, options)


def _options(
    joiner: JoinerInputs, symbols: Tensor, rnnt_type: str, delay_penalty: float, logits_budget_mb: float
) -> _Options:
    """Check what both entry points share."""
    check_inputs(joiner, "transducer loss")
    check_common(symbols, BLANK_ID, joiner.weight.shape[0], rnnt_type)
    if symbols.shape != (joiner.predictor.shape[0], joiner.predictor.shape[1] - 1):
        raise ValueError(
            f"symbols must be (N, U) for predictor (N, U + 1, D), got {tuple(symbols.shape)} and "
            f"{tuple(joiner.predictor.shape)}"
        )
    return _Options(rnnt_type, delay_penalty, logits_budget_mb * 1e6)
