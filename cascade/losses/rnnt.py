"""Transducer losses with k2's names, arguments and semantics (https://github.com/k2-fsa/k2, rnnt_loss.py).

N utterances, T frames, S symbols, V tokens with the blank (`termination_symbol`), R positions per frame in the band.
Every loss is the negative log-prob; reduction none gives (N,), mean and sum a scalar. +inf: no path exists.
"""

import torch
from torch import Tensor

from cascade.losses.log_probs import get_rnnt_logprobs, get_rnnt_logprobs_joint, get_rnnt_logprobs_smoothed
from cascade.losses.pruning import do_rnnt_pruning, get_rnnt_logprobs_pruned, get_rnnt_prune_ranges
from cascade.losses.recursion import joint_mutual_information_recursion, mutual_information_recursion

__all__ = [
    "do_rnnt_pruning",
    "get_rnnt_logprobs",
    "get_rnnt_logprobs_joint",
    "get_rnnt_logprobs_pruned",
    "get_rnnt_logprobs_smoothed",
    "get_rnnt_prune_ranges",
    "joint_mutual_information_recursion",
    "mutual_information_recursion",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
]


def add_delay_penalty(px: Tensor, num_frames: int, boundary: Tensor | None, delay_penalty: float) -> Tensor:
    """Reward early symbols: px[b, s, t] += delay_penalty * ((T_b - 1) / 2 - t) (2211.00490)."""
    if delay_penalty < 0:
        raise ValueError(f"delay_penalty must be >= 0, got {delay_penalty}")
    if delay_penalty == 0:
        return px
    t = torch.arange(px.shape[2], device=px.device)
    if boundary is None:
        middle = torch.full((1, 1, 1), (num_frames - 1) / 2, device=px.device, dtype=px.dtype)
    else:
        # float32 also for float64 px, as k2 has it: 0.1 differs between the two in the ninth digit
        middle = ((boundary[:, 3] - 1).float() / 2)[:, None, None]
    return px + ((middle - t) * delay_penalty).to(px.dtype)


def reduce_loss(loss: Tensor, reduction: str) -> Tensor:
    """Apply none | mean | sum to the (N,) losses."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _loss(
    px: Tensor, py: Tensor, boundary: Tensor | None, delay_penalty: float, reduction: str, return_grad: bool = False
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    reduce_loss(px.new_zeros(1), reduction)  # complain before the work
    px = add_delay_penalty(px, py.shape[2], boundary, delay_penalty)
    result = mutual_information_recursion(px, py, boundary, return_grad)
    if return_grad:
        return reduce_loss(-result[0], reduction), result[1]
    return reduce_loss(-result, reduction)


def rnnt_loss_simple(
    lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int, boundary: Tensor | None = None,
    rnnt_type: str = "regular", delay_penalty: float = 0.0, reduction: str = "mean", return_grad: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Loss of the additive joiner, logits(s, t) = lm(s) + am(t).

    Args:
      lm: (N, S + 1, V), am: (N, T, V), symbols: (N, S) int64, boundary: (N, 4) int64 or None.
      return_grad: also return (px_grad, py_grad), the occupancies that get_rnnt_prune_ranges needs.
    Returns:
      the loss, or (loss, (px_grad, py_grad)).
    Raises:
      ValueError: arguments that do not fit together.
    """
    px, py = get_rnnt_logprobs(lm, am, symbols, termination_symbol, rnnt_type, boundary)
    return _loss(px, py, boundary, delay_penalty, reduction, return_grad)


def rnnt_loss_smoothed(
    lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int, lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1, boundary: Tensor | None = None, rnnt_type: str = "regular",
    delay_penalty: float = 0.0, reduction: str = "mean", return_grad: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """rnnt_loss_simple on the log-probs of get_rnnt_logprobs_smoothed."""
    px, py = get_rnnt_logprobs_smoothed(
        lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale, boundary, rnnt_type
    )
    return _loss(px, py, boundary, delay_penalty, reduction, return_grad)


def rnnt_loss(
    logits: Tensor, symbols: Tensor, termination_symbol: int, boundary: Tensor | None = None,
    rnnt_type: str = "regular", delay_penalty: float = 0.0, reduction: str = "mean",
) -> Tensor:
    """Loss of a full lattice: logits (N, T, S + 1, V), symbols (N, S) int64."""
    px, py = get_rnnt_logprobs_joint(logits, symbols, termination_symbol, boundary, rnnt_type)
    return _loss(px, py, boundary, delay_penalty, reduction)


def rnnt_loss_pruned(
    logits: Tensor, symbols: Tensor, ranges: Tensor, termination_symbol: int, boundary: Tensor | None = None,
    rnnt_type: str = "regular", delay_penalty: float = 0.0, reduction: str = "mean",
) -> Tensor:
    """Loss of a pruned lattice: logits (N, T, R, V) on the band `ranges` (N, T, R)."""
    px, py = get_rnnt_logprobs_pruned(logits, symbols, ranges, termination_symbol, boundary, rnnt_type)
    return _loss(px, py, boundary, delay_penalty, reduction)
