"""The transducer loss of one pass, as training calls it: simple loss, prune ranges, joiner, pruned loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from cascade.losses.log_probs import get_rnnt_logprobs_smoothed
from cascade.losses.pruning import do_rnnt_pruning, get_rnnt_logprobs_pruned, get_rnnt_prune_ranges
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


class _ScaleGradient(torch.autograd.Function):
    """x with `scale` times its gradient (x may hold -inf, so that no sum does this)."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def _lattice_loss(px: Tensor, py: Tensor, boundary: Tensor, fastemit_lambda: float):
    """Loss (N,) with zero gradients for impossible utterances, and the occupancies with zeros for those."""
    if fastemit_lambda:
        px = _ScaleGradient.apply(px, 1.0 + fastemit_lambda)
    scores, (px_grad, py_grad) = mutual_information_recursion(px, py, boundary, return_grad=True)
    impossible = torch.isneginf(scores.detach())
    loss = -scores.masked_fill(impossible, -torch.inf)  # the fill has no gradient
    if bool(impossible.any()):
        px_grad = px_grad.masked_fill(impossible[:, None, None], 0.0)
        py_grad = py_grad.masked_fill(impossible[:, None, None], 0.0)
    return loss, px_grad, py_grad


def transducer_loss(
    am: Tensor, lm: Tensor, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor, symbols: Tensor,
    boundary: Tensor, *, prune_range: int, lm_scale: float, am_scale: float, rnnt_type: str,
    delay_penalty: float = 0.0, fastemit_lambda: float = 0.0, logits_budget_mb: float = 64.0,
    ranges: Tensor | None = None, blank_id: int = 0,
) -> TransducerLoss:
    """Simple and pruned loss of one pass; the joiner is logits = tanh(encoder[t] + predictor[u]) @ weight.T + bias.

    Args:
      am: (N, T, V), lm: (N, U + 1, V) logits of the additive joiner.
      encoder: (N, T, D), predictor: (N, U + 1, D) inputs of the joiner; weight: (V, D), bias: (V,).
      symbols: (N, U) int64, padded with any id. boundary: (N, 4) int64 [0, 0, U_n, T_n].
      prune_range: positions R per frame. lm_scale, am_scale: smoothing of the simple loss.
      rnnt_type: regular | modified | constrained.
      delay_penalty: reward of early symbols. fastemit_lambda: gradients of symbols times (1 + lambda) (2010.11148).
      logits_budget_mb: keep the band's logits for the backward up to this size (10^6 bytes), else recompute them.
      ranges: (N, T, R) band to use instead of the simple loss's own.
    Returns:
      TransducerLoss; an impossible utterance has loss +inf and zero gradients.
    Raises:
      ValueError: arguments that do not fit together.
    """
    boundary = check_boundary(boundary, am.shape[0], symbols.shape[1], am.shape[1], am.device)
    px, py = get_rnnt_logprobs_smoothed(lm, am, symbols, blank_id, lm_scale, am_scale, boundary, rnnt_type)
    px = add_delay_penalty(px, am.shape[1], boundary, delay_penalty)
    simple, px_grad, py_grad = _lattice_loss(px, py, boundary, fastemit_lambda)
    if ranges is None:
        ranges = get_rnnt_prune_ranges(px_grad, py_grad, boundary, prune_range)
    am_pruned, lm_pruned = do_rnnt_pruning(encoder, predictor, ranges)
    logits = torch.nn.functional.linear(torch.tanh(am_pruned + lm_pruned), weight, bias)
    px, py = get_rnnt_logprobs_pruned(logits, symbols, ranges, blank_id, boundary, rnnt_type)
    px = add_delay_penalty(px, am.shape[1], boundary, delay_penalty)
    pruned, px_grad, py_grad = _lattice_loss(px, py, boundary, fastemit_lambda)
    nodes = py_grad.clone()  # leaving (s, t) by a blank or by a symbol
    nodes[:, :-1] += px_grad[:, :, : am.shape[1]]
    occupancy = nodes.transpose(1, 2).gather(2, ranges)
    return TransducerLoss(simple, pruned, ranges, occupancy)
