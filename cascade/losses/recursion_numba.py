"""The lattice recursion compiled by numba, on the CPU: about fifty times faster than recursion_torch, equal to it.

Probabilities are added as such, not as logs, so that a lattice node costs two multiplications instead of an exp and a
log. To keep any range, a number is a pair (m, k) that means m * 2**(600 k) with m in [2**-300, 2**300), or m = 0.
Utterances are shared out to threads (the kernel releases Python's lock; numba's own thread pools are not used, because
they abort when two Python threads enter them).
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

_BIG = 2.0**300
_SMALL = 2.0**-300
_UP = 2.0**600
_DOWN = 2.0**-600
_LOG_UP = 600 * math.log(2.0)
_LIMIT = 277.0
"""A log-prob within +-_LIMIT has an exp in [2**-400, 2**400], so that no product below leaves the float64 range."""

_helper = numba.njit(cache=True)


@_helper
def _normalise(m, k):
    if m >= _BIG:
        return m * _DOWN, k + 1
    if m < _SMALL and m > 0.0:
        return m * _UP, k - 1
    return m, k


@_helper
def _times_exp(m, k, log_prob):
    """(m, k) * exp(log_prob), not normalised: m in [2**-700, 2**700]."""
    log_prob = np.float64(log_prob)  # else exp of a float32 is computed in float32, where exp(-104) is 0
    if -_LIMIT <= log_prob <= _LIMIT:
        return m * math.exp(log_prob), k
    if log_prob < -1e15:  # -inf, and what differs from it in nothing but name
        return 0.0, k
    if not log_prob < 1e15:  # +inf and nan
        return math.nan, 0
    whole = math.floor(log_prob / _LOG_UP + 0.5)
    # exp of at most 300 ln 2 = 208
    return m * math.exp(log_prob - whole * _LOG_UP), k + int(whole)


@_helper
def _add(m1, k1, m2, k2):
    """Sum of two numbers that _times_exp made, normalised."""
    if k1 == k2 or math.isnan(m1) or math.isnan(m2):
        return _normalise(m1 + m2, k1)
    if m1 == 0.0:
        return _normalise(m2, k2)
    if m2 == 0.0:
        return _normalise(m1, k1)
    m1, k1 = _normalise(m1, k1)
    m2, k2 = _normalise(m2, k2)
    if k1 == k2:
        return _normalise(m1 + m2, k1)
    if k1 == k2 + 1:
        return _normalise(m1 + m2 * _DOWN, k1)
    if k2 == k1 + 1:
        return _normalise(m2 + m1 * _DOWN, k2)
    if k1 > k2:
        return m1, k1
    return m2, k2


@_helper
def _posterior(m1, k1, m2, k2, least):
    """Product of a normalised number and one that _times_exp made, as a plain number; 0 if below `least`."""
    k = k1 + k2
    m = m1 * m2
    if k == -1:
        m *= _DOWN
    elif k == 1:
        m *= _UP
    elif k != 0:
        m = 0.0
    return m if not m < least else 0.0


@numba.njit(nogil=True, cache=True)
def _utterance(label, blank, start, modified, label_frames, s_begin, t_begin, s_end, t_end, least, d_label, d_blank,
               alpha_m, alpha_k, beta_m, beta_k):
    """Score of one utterance; posteriors into d_label, d_blank (zeros before) unless `least` is infinite.

    Nodes are (t, r), meaning s = start[t] + r; label, blank (T, R); transitions as in recursion_torch. Labels of the
    frames below label_frames count. alpha (T + 1, R) and beta (2, R) are scratch.
    """
    width = blank.shape[1]
    for t in range(t_begin, t_end + 1):
        low = max(0, s_begin - start[t])
        high = min(width - 1, s_end - start[t])
        for r in range(0, width):
            alpha_m[t, r] = 0.0
            alpha_k[t, r] = 0
        for r in range(low, high + 1):
            m1, k1, m2, k2 = 0.0, 0, 0.0, 0
            if t == t_begin and start[t] + r == s_begin:
                m1 = 1.0
            if t > t_begin:
                before = r + start[t] - start[t - 1]
                if 0 <= before < width:
                    m2, k2 = _times_exp(alpha_m[t - 1, before], alpha_k[t - 1, before], blank[t - 1, before])
                if modified and 0 < before <= width and start[t] + r > s_begin and t - 1 < label_frames:
                    below = before - 1
                    m1, k1 = _times_exp(alpha_m[t - 1, below], alpha_k[t - 1, below], label[t - 1, below])
            if not modified and r > low and t < label_frames:
                m1, k1 = _times_exp(alpha_m[t, r - 1], alpha_k[t, r - 1], label[t, r - 1])
            alpha_m[t, r], alpha_k[t, r] = _add(m1, k1, m2, k2)

    r_end = s_end - start[t_end]
    if r_end < 0 or r_end >= width or alpha_m[t_end, r_end] == 0.0:
        return -math.inf
    total_m, total_k = alpha_m[t_end, r_end], alpha_k[t_end, r_end]
    score = math.log(total_m) + total_k * _LOG_UP
    if least == math.inf:
        return score
    if not abs(score) < math.inf:
        least = -math.inf  # nan: let it through

    for t in range(t_end, t_begin - 1, -1):
        now, after = t & 1, (t + 1) & 1
        low = max(0, s_begin - start[t])
        high = min(width - 1, s_end - start[t])
        for r in range(width - 1, -1, -1):
            beta_m[now, r] = 0.0
            beta_k[now, r] = 0
            if r < low or r > high:
                continue
            if t == t_end and r == r_end:
                beta_m[now, r], beta_k[now, r] = _normalise(1.0 / total_m, -total_k)
                continue
            m1, k1, m2, k2 = 0.0, 0, 0.0, 0
            if t < t_end:
                behind = r + start[t] - start[t + 1]
                if 0 <= behind < width:
                    m2, k2 = _times_exp(beta_m[after, behind], beta_k[after, behind], blank[t, r])
                    d_blank[t, r] = _posterior(alpha_m[t, r], alpha_k[t, r], m2, k2, least)
            if start[t] + r < s_end and t < label_frames:
                if modified:
                    behind = r + 1 + start[t] - start[t + 1] if t < t_end else -1
                    if 0 <= behind < width:
                        m1, k1 = _times_exp(beta_m[after, behind], beta_k[after, behind], label[t, r])
                        d_label[t, r] = _posterior(alpha_m[t, r], alpha_k[t, r], m1, k1, least)
                elif r + 1 < width:
                    m1, k1 = _times_exp(beta_m[now, r + 1], beta_k[now, r + 1], label[t, r])
                    d_label[t, r] = _posterior(alpha_m[t, r], alpha_k[t, r], m1, k1, least)
            beta_m[now, r], beta_k[now, r] = _add(m1, k1, m2, k2)
    return score


def _utterances(label, blank, start, modified, label_frames, boundary, least, scores, d_label, d_blank, first, stride):
    """_utterance for n = first, first + stride, ...; label_frames -1: labels up to, not in, the utterance's end."""
    num_columns, width = blank.shape[1] + 1, blank.shape[2]
    alpha_m = np.empty((num_columns, width), np.float64)
    alpha_k = np.empty((num_columns, width), np.int64)
    beta_m = np.empty((2, width), np.float64)
    beta_k = np.empty((2, width), np.int64)
    for n in range(first, blank.shape[0], stride):
        s_begin, t_begin, s_end, t_end = boundary[n, 0], boundary[n, 1], boundary[n, 2], boundary[n, 3]
        frames = t_end if label_frames < 0 else label_frames
        scores[n] = _utterance(label[n], blank[n], start[n], modified, frames, s_begin, t_begin, s_end, t_end, least,
                               d_label[n], d_blank[n], alpha_m, alpha_k, beta_m, beta_k)


@cache
def _kernel(dtype: torch.dtype):
    """_utterances compiled for one type and any strides, so that every layout does not get its own compilation."""
    number = numba.float64 if dtype == torch.float64 else numba.float32
    values, ids = numba.types.Array(number, 3, "A"), numba.types.Array(numba.int64, 2, "A")
    signature = numba.void(
        values, values, ids, numba.boolean, numba.int64, ids, numba.float64, numba.types.Array(numba.float64, 1, "C"),
        values, values, numba.int64, numba.int64,
    )
    return numba.njit(signature, nogil=True, cache=True)(_utterances)


_pool: ThreadPoolExecutor | None = None
_pool_owner = (0, 0)


def _run_threads(work, num_tasks: int, num_nodes: int) -> None:
    """Run work(first, stride) once per thread: as many as torch uses, but none for less than some milliseconds' work.

    (torch's own threads spin for a while after each operation; on a machine with as many cores as threads, another
    thread first has to win a core from them.)
    """
    global _pool, _pool_owner
    threads = min(torch.get_num_threads(), num_tasks, 1 + num_nodes // 200_000)
    if threads <= 1:
        work(0, 1)
        return
    owner = (os.getpid(), threads)  # a forked child has no threads of its parent's pool
    if _pool is None or _pool_owner != owner:
        _pool, _pool_owner = ThreadPoolExecutor(threads - 1, thread_name_prefix="cascade-loss"), owner
    others = [_pool.submit(work, i, threads) for i in range(1, threads)]
    work(0, threads)
    for other in others:
        other.result()


def forward_backward(
    label: Tensor, blank: Tensor, start: Tensor | None, boundary: Tensor, *, modified: bool, label_frames: int,
    need_occupancy: bool, least: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and posteriors of lattices or bands of them.

    Args:
      label: (N, T or T + 1, R) log-probs of symbols, blank: (N, T, R) of blanks; float32 or float64, any strides.
      start: (N, T + 1) int64 position of r = 0, non-decreasing; None for 0.
      boundary: (N, 4) int64.
      label_frames: symbols may leave the frames below this number; -1: those before the utterance's end.
      least: posteriors below this become 0.
    Returns:
      scores (N,) float64, posteriors like label and blank (zeros where nothing passes or need_occupancy is false).
    """
    d_label, d_blank = torch.zeros_like(label), torch.zeros_like(blank)
    if start is None:
        start = boundary.new_zeros(1).expand(blank.shape[0], blank.shape[1] + 1)
    scores = torch.empty(blank.shape[0], dtype=torch.float64)
    arrays = [x.detach().numpy() for x in (label, blank, start)]
    outputs = [x.numpy() for x in (scores, d_label, d_blank)]
    limits = boundary.numpy()
    least = float(least) if need_occupancy else math.inf

    kernel = _kernel(blank.dtype)

    def work(first: int, stride: int) -> None:
        kernel(*arrays, modified, label_frames, limits, least, *outputs, first, stride)

    _run_threads(work, blank.shape[0], blank.numel())
    return scores, d_label, d_blank
