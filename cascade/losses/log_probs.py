"""From logits to the two log-probs per lattice cell, the next symbol's and the blank's, k2's semantics."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cascade.losses.recursion import check_boundary

RNNT_TYPES = ("regular", "modified", "constrained")


def check_common(symbols: Tensor, termination_symbol: int, vocab_size: int, rnnt_type: str) -> None:
    """Raise a ValueError for an unknown topology, or symbols that are no (N, S) int64 ids below vocab_size."""
    if rnnt_type not in RNNT_TYPES:
        raise ValueError(f"rnnt_type must be one of {', '.join(RNNT_TYPES)}, got {rnnt_type!r}")
    if not 0 <= termination_symbol < vocab_size:
        raise ValueError(f"termination_symbol must be in [0, {vocab_size}), got {termination_symbol}")
    if symbols.ndim != 2:
        raise ValueError(f"symbols must have shape (N, S), got {tuple(symbols.shape)}")
    if symbols.dtype != torch.int64:
        raise ValueError(f"symbols must be int64, got {symbols.dtype}; call symbols.long()")
    if symbols.numel() and not (0 <= int(symbols.min()) and int(symbols.max()) < vocab_size):
        raise ValueError(
            f"symbols must be in [0, {vocab_size}), got values from {int(symbols.min())} to {int(symbols.max())}; "
            "pad with any id in that range"
        )


def check_size(num_symbols: int, num_frames: int) -> None:
    """k2's limits on the padded tensors (not on single utterances): ValueError unless 1 <= S <= T."""
    if num_symbols < 1:
        raise ValueError("symbols must have at least one column (S >= 1); pad empty transcripts with any id")
    if num_frames < num_symbols:
        raise ValueError(
            f"the padded batch must have at least as many frames as symbols (T >= S), got T = {num_frames} and "
            f"S = {num_symbols}; pad the frames or remove the utterances with more symbols than frames"
        )


def widen(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32: sums of many small numbers do not survive in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def apply_topology(px: Tensor, py: Tensor, rnnt_type: str, boundary: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring (N, S, T) symbol log-probs into the shape and meaning of the topology.

    regular: a column T of -inf is added and column boundary[:, 3] filled with -inf: no symbol without a frame.
    constrained: a symbol also takes the blank of its target state in the same frame.
    """
    if boundary is not None:
        check_boundary(boundary, *px.shape, px.device)
    if rnnt_type == "regular":
        px = torch.cat([px, px.new_full((*px.shape[:2], 1), -torch.inf)], dim=2)
        if boundary is not None:
            columns = torch.arange(px.shape[2], device=px.device)
            px = px.masked_fill(columns == boundary[:, 3, None, None], -torch.inf)
    elif rnnt_type == "constrained":
        px = px + py[:, 1:]
    return px, py


def _pick(x: Tensor, symbols: Tensor) -> Tensor:
    """(N, T, V), (N, S) -> (N, S, T): log-prob of every symbol in every frame."""
    return x.gather(2, symbols[:, None, :].expand(-1, x.shape[1], -1)).transpose(1, 2)


def _log_normalizers(lm_probs: Tensor, am_probs: Tensor) -> Tensor:
    """(N, S + 1, T) log of the inner products; `tiny` keeps the log finite, as in k2."""
    return (lm_probs @ am_probs.transpose(1, 2) + torch.finfo(lm_probs.dtype).tiny).log()


def get_rnnt_logprobs(
    lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int, rnnt_type: str = "regular",
    boundary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the simple joiner, logits(s, t) = lm(s) + am(t), normalised by one matrix product.

    Args:
      lm: (N, S + 1, V) prediction-side logits.
      am: (N, T, V) acoustic logits.
      symbols: (N, S) int64, padded with any id.
      termination_symbol: the blank's id.
      rnnt_type: regular | modified | constrained.
      boundary: (N, 4) int64 or None.
    Returns:
      px (N, S, T + 1) (regular) or (N, S, T), py (N, S + 1, T): log-probs of symbols and blanks.
    Raises:
      ValueError: arguments that do not fit together.
    """
    check_size(symbols.shape[1], am.shape[1])
    return smoothed_log_probs(lm, am, symbols, termination_symbol, 0.0, 0.0, boundary, rnnt_type)


def get_rnnt_logprobs_smoothed(
    lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int, lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1, boundary: Tensor | None = None, rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """get_rnnt_logprobs interpolated with the log-probs of lm alone and of am times a unigram.

    The unigram is k2's: the mean of softmax(lm) over the WHOLE batch, padded positions included; with
    am_only_scale > 0 the loss of an utterance therefore depends (a little) on its batch.

    Args:
      lm_only_scale, am_only_scale: shares of the two, the rest goes to the joint log-probs.
      others: as in get_rnnt_logprobs.
    """
    check_size(symbols.shape[1], am.shape[1])
    return smoothed_log_probs(
        lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale, boundary, rnnt_type
    )


def smoothed_log_probs(
    lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int, lm_only_scale: float, am_only_scale: float,
    boundary: Tensor | None, rnnt_type: str,
) -> tuple[Tensor, Tensor]:
    """get_rnnt_logprobs_smoothed without k2's limits on the size of the batch."""
    if lm.ndim != 3 or am.ndim != 3 or lm.shape[::2] != am.shape[::2] or symbols.shape != (len(lm), lm.shape[1] - 1):
        raise ValueError(
            "lm must be (N, S + 1, V), am (N, T, V) and symbols (N, S), got "
            f"{tuple(lm.shape)}, {tuple(am.shape)} and {tuple(symbols.shape)}"
        )
    check_common(symbols, termination_symbol, am.shape[2], rnnt_type)
    if lm_only_scale < 0 or am_only_scale < 0 or lm_only_scale + am_only_scale > 1:
        raise ValueError(
            "lm_only_scale and am_only_scale must be >= 0 with a sum of at most 1, "
            f"got {lm_only_scale} and {am_only_scale}"
        )
    lm, am = widen(lm), widen(am)
    am_max, lm_max = am.amax(dim=2, keepdim=True), lm.amax(dim=2, keepdim=True)
    am_probs, lm_probs = (am - am_max).exp(), (lm - lm_max).exp()
    normalizers = _log_normalizers(lm_probs, am_probs) + lm_max + am_max.transpose(1, 2)
    px_am, px_lm = _pick(am, symbols), lm[:, :-1].gather(2, symbols[:, :, None])  # (N, S, T), (N, S, 1)
    py_am, py_lm = am[:, None, :, termination_symbol], lm[:, :, termination_symbol, None]  # (N, 1, T), (N, S+1, 1)
    joint_scale = 1.0 - lm_only_scale - am_only_scale
    px = (px_am + px_lm - normalizers[:, :-1]) * joint_scale
    py = (py_am + py_lm - normalizers) * joint_scale
    if lm_only_scale or am_only_scale:
        lm_sums = lm_probs.sum(dim=2, keepdim=True)  # (N, S+1, 1)
    if lm_only_scale:
        lm_norm = lm_sums.log() + lm_max
        px = px + (px_lm - lm_norm[:, :-1]) * lm_only_scale
        py = py + (py_lm - lm_norm) * lm_only_scale
    if am_only_scale:
        unigram = (lm_probs / lm_sums).mean(dim=(0, 1)) + torch.finfo(lm.dtype).tiny  # (V,)
        am_norm = ((am_probs @ unigram).log() + am_max[..., 0])[:, None, :]  # (N, 1, T)
        log_unigram = unigram.log()
        px = px + (px_am + log_unigram[symbols][:, :, None] - am_norm) * am_only_scale
        py = py + (py_am + log_unigram[termination_symbol] - am_norm) * am_only_scale
    return apply_topology(px, py, rnnt_type, boundary)


class _GatherLogProbs(torch.autograd.Function):
    """log_softmax(logits) at two places per row, without the log_softmax: rows are handled in slices of a megabyte."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, blank: int) -> tuple[Tensor, Tensor]:
        log_sums = torch.empty(logits.shape[0], dtype=widen(logits[:0]).dtype, device=logits.device)
        scratch = log_sums.new_empty(_slice_rows(logits), logits.shape[1])
        for rows in _slices(logits):
            part = scratch[: rows.stop - rows.start].copy_(logits[rows])
            largest = part.amax(dim=1)
            torch.sum(part.sub_(largest[:, None]).exp_(), dim=1, out=log_sums[rows])
            log_sums[rows].log_().add_(largest)
        label_log_probs = logits.gather(1, labels[:, None])[:, 0] - log_sums
        blank_log_probs = logits[:, blank] - log_sums
        ctx.save_for_backward(logits, log_sums, labels)
        ctx.blank = blank
        return label_log_probs, blank_log_probs

    @staticmethod
    def backward(ctx, grad_label: Tensor, grad_blank: Tensor) -> tuple[Tensor, None, None]:
        logits, log_sums, labels = ctx.saved_tensors
        grad = torch.empty_like(logits)
        total = -(grad_label + grad_blank)
        for rows in _slices(logits):
            part = grad[rows] if grad.dtype == log_sums.dtype else None
            part = torch.sub(logits[rows], log_sums[rows, None], out=part).exp_().mul_(total[rows, None])
            part.scatter_add_(1, labels[rows, None], grad_label[rows, None])
            part[:, ctx.blank] += grad_blank[rows]
            if grad.dtype != log_sums.dtype:
                grad[rows] = part
        return grad, None, None


def _slice_rows(logits: Tensor) -> int:
    return max(64, 2**18 // max(1, logits.shape[1]))


def _slices(logits: Tensor) -> Iterator[slice]:
    rows = _slice_rows(logits)
    for begin in range(0, logits.shape[0], rows):
        yield slice(begin, min(begin + rows, logits.shape[0]))


def gather_log_probs(logits: Tensor, labels: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """log_softmax(logits)[labels] and [blank] per cell.

    Args:
      logits: (..., V), any floating point type.
      labels: (...) int64.
    Returns:
      two tensors (...), float32 (float64 for float64 logits).
    """
    label, blank_lp = _GatherLogProbs.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), blank)
    return label.view(labels.shape), blank_lp.view(labels.shape)


def get_rnnt_logprobs_joint(
    logits: Tensor, symbols: Tensor, termination_symbol: int, boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Log-probs of a full lattice of logits.

    Args:
      logits: (N, T, S + 1, V).
      others, returns: as in get_rnnt_logprobs.
    """
    if logits.ndim != 4:
        raise ValueError(f"logits must have shape (N, T, S + 1, V), got {tuple(logits.shape)}")
    num_utts, num_frames, num_states, vocab_size = logits.shape
    check_common(symbols, termination_symbol, vocab_size, rnnt_type)
    if symbols.shape != (num_utts, num_states - 1):
        raise ValueError(f"symbols must be {(num_utts, num_states - 1)} for these logits, got {tuple(symbols.shape)}")
    check_size(num_states - 1, num_frames)
    labels = torch.nn.functional.pad(symbols, (0, 1), value=termination_symbol)  # no symbol follows the last
    label, blank = gather_log_probs(logits, labels[:, None, :].expand(-1, num_frames, -1), termination_symbol)
    return apply_topology(label[:, :, :-1].transpose(1, 2), blank.transpose(1, 2), rnnt_type, boundary)
