"""The pruned lattice (2206.13236): which R symbols each frame keeps, and log-probs on them, k2's semantics."""

import torch
from torch import Tensor

from cascade.losses.backends import spread
from cascade.losses.log_probs import apply_topology, check_common, check_size, gather_log_probs
from cascade.losses.recursion import check_boundary


def get_rnnt_prune_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor | None, s_range: int) -> Tensor:
    """Choose per frame the s_range neighbouring symbol positions that hold most of the occupancy.

    The first position starts at 0, never falls, and rises by less than s_range per frame, so that every frame's band
    touches the next one's; by at most 1 where a frame has at most one symbol (modified, constrained).

    Args:
      px_grad, py_grad: occupancies of the simple lattice: (N, S, T + 1) or (N, S, T), and (N, S + 1, T).
      boundary: (N, 4) int64 or None.
      s_range: positions per frame, at least 2 (1 suffices for modified and constrained); at most S + 1 are returned.
    Returns:
      (N, T, min(s_range, S + 1)) int64 positions, contiguous in the last dimension.
    Raises:
      ValueError: s_range too small, or shapes that do not fit.
    """
    check_size(px_grad.shape[1], py_grad.shape[2])
    return choose_ranges(px_grad, py_grad, boundary, s_range)


def choose_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor | None, s_range: int) -> Tensor:
    """get_rnnt_prune_ranges without k2's limits on the size of the batch."""
    num_utts, num_symbols, px_width = px_grad.shape
    num_frames = py_grad.shape[2]
    if py_grad.shape[:2] != (num_utts, num_symbols + 1) or px_width not in (num_frames, num_frames + 1):
        raise ValueError(f"px_grad {tuple(px_grad.shape)} and py_grad {tuple(py_grad.shape)} do not fit together")
    least = 1 if px_width == num_frames else 2
    if s_range < least:
        raise ValueError(f"s_range must be at least {least} for this rnnt_type, got {s_range}")
    boundary = check_boundary(boundary, num_utts, num_symbols, num_frames, px_grad.device)
    s_range = min(s_range, num_symbols + 1)
    # a window that starts at s holds all blanks of its rows, and loses the symbol that enters it from below
    blanks = py_grad.unfold(1, s_range, 1).sum(dim=3)  # (N, S + 2 - s_range, T)
    entering = torch.nn.functional.pad(px_grad[:, : num_symbols + 1 - s_range, :num_frames], (0, 0, 1, 0))
    first = (blanks - entering).argmax(dim=1)  # (N, T)
    last_start = (boundary[:, 2:3] - s_range + 1).clamp(min=0)
    frames = torch.arange(num_frames, device=px_grad.device)
    first = torch.where(frames < boundary[:, 3:4] - 1, first, last_start)
    first = _limit_steps(first, s_range - 1 if px_width == num_frames + 1 else 1)
    return first[:, :, None] + torch.arange(s_range, device=px_grad.device)


def _limit_steps(first: Tensor, most: int) -> Tensor:
    """Lower `first` (N, T) until it starts at 0, never falls, and rises by at most `most` per frame."""
    ramp = most * torch.arange(first.shape[1], device=first.device)
    first = _least_of_rest(first)
    return ramp - _least_of_rest(ramp - first).clamp(min=0)


def _least_of_rest(x: Tensor) -> Tensor:
    """(N, T) -> (N, T): the minimum over this and all later frames."""
    return x.flip(1).cummin(dim=1).values.flip(1)


def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Line up encoder and predictor outputs on the band.

    Args:
      am: (N, T, C), lm: (N, S + 1, C), ranges: (N, T, R).
    Returns:
      two (N, T, R, C) tensors: am repeated (a view) and lm picked by ranges.
    """
    check_ranges(ranges, am.shape[0], am.shape[1], lm.shape[1] - 1)
    am_pruned = am[:, :, None, :].expand(-1, -1, ranges.shape[2], -1)
    utts = torch.arange(lm.shape[0], device=lm.device)[:, None, None]
    return am_pruned, lm[utts, ranges]


def check_ranges(ranges: Tensor, num_utts: int, num_frames: int, num_symbols: int) -> None:
    """Raise a ValueError unless ranges is an (N, T, R) int64 tensor of contiguous positions in [0, S]."""
    if ranges.ndim != 3 or ranges.shape[:2] != (num_utts, num_frames) or ranges.dtype != torch.int64:
        raise ValueError(
            f"ranges must be int64 of shape ({num_utts}, {num_frames}, R), got {ranges.dtype} {tuple(ranges.shape)}"
        )
    if ranges.numel() and not (0 <= int(ranges.min()) and int(ranges.max()) <= num_symbols):
        raise ValueError(f"ranges must be in [0, {num_symbols}], got {int(ranges.min())} to {int(ranges.max())}")


def get_rnnt_logprobs_pruned(
    logits: Tensor, symbols: Tensor, ranges: Tensor, termination_symbol: int, boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Log-probs on the band, -inf outside of it.

    Args:
      logits: (N, T, R, V) of the joiner on the pruned encoder and predictor outputs.
      symbols: (N, S) int64. ranges: (N, T, R) from get_rnnt_prune_ranges.
      others, returns: as in get_rnnt_logprobs.
    """
    if logits.ndim != 4:
        raise ValueError(f"logits must have shape (N, T, R, V), got {tuple(logits.shape)}")
    num_utts, num_frames, prune_range, vocab_size = logits.shape
    check_common(symbols, termination_symbol, vocab_size, rnnt_type)
    if symbols.shape[0] != num_utts:
        raise ValueError(f"symbols must have {num_utts} rows as logits has, got {tuple(symbols.shape)}")
    num_symbols = symbols.shape[1]
    check_size(num_symbols, num_frames)
    check_ranges(ranges, num_utts, num_frames, num_symbols)
    if ranges.shape[2] != prune_range:
        raise ValueError(f"logits have R = {prune_range} but ranges {ranges.shape[2]}; both come from one s_range")
    labels = labels_on_band(symbols, ranges, termination_symbol)
    label, blank = gather_log_probs(logits, labels, termination_symbol)
    px, py = spread(label, ranges, num_symbols)[:, :-1], spread(blank, ranges, num_symbols)
    return apply_topology(px, py, rnnt_type, boundary)


def labels_on_band(symbols: Tensor, ranges: Tensor, termination_symbol: int) -> Tensor:
    """(N, S), (N, T, R) -> (N, T, R): the symbol that follows each position; the blank's id after the last."""
    padded = torch.nn.functional.pad(symbols, (0, 1), value=termination_symbol)  # (N, S + 1)
    return padded.gather(1, ranges.flatten(1)).view(ranges.shape)
