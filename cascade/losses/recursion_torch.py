"""The lattice recursion in plain torch: the readable reference, and what serves any device.

The lattice has nodes (s, t): s symbols said, t frames consumed. From (s, t) a blank moves to (s, t + 1) with log-prob
py[s, t]. A symbol moves to (s + 1, t) in the regular topology, to (s + 1, t + 1) in the modified and constrained ones,
with log-prob px[s, t]. With alpha(s, t) the log-sum over all ways from the begin node to (s, t) (1211.3711, eq. 16):

    regular    alpha(s, t) = log_add(alpha(s - 1, t)     + px[s - 1, t],     alpha(s, t - 1) + py[s, t - 1])
    modified   alpha(s, t) = log_add(alpha(s - 1, t - 1) + px[s - 1, t - 1], alpha(s, t - 1) + py[s, t - 1])

Number the steps k = s + t (regular) or k = t (modified): both lines then read step k - 1 only, so that one loop over k
handles the whole batch and all s at once. Everything is float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Lattice(NamedTuple):
    """Result of the forward-backward over a batch of lattices."""

    scores: Tensor
    """(N,) float64 log-prob of reaching the end node; -inf if no way leads there."""
    px_occupancy: Tensor | None
    """(N, S, T or T + 1) float64 posterior of every symbol transition, d scores / d px; zeros for an impossible one."""
    py_occupancy: Tensor | None
    """(N, S + 1, T) float64 posterior of every blank transition, d scores / d py."""


class Steps(NamedTuple):
    """Transitions by the step k in which they arrive at s; s counts from s_begin."""

    xs: Tensor
    """(K + 1, N, S + 1) float64 log-probs of arriving by a symbol, -inf outside the boundary."""
    ys: Tensor
    """(K + 1, N, S + 1) the same by a blank."""
    x_source: Tensor
    """(N, K + 1, S + 1) index into px flattened to (N, -1), 0 where not valid."""
    y_source: Tensor
    """(N, K + 1, S + 1) the same for py."""
    x_valid: Tensor
    """(N, K + 1, S + 1) bool."""
    y_valid: Tensor
    """(N, K + 1, S + 1) bool."""


def lay_out_steps(px: Tensor, py: Tensor, boundary: Tensor) -> Steps:
    """Sort the transitions of px, py (as in forward_backward) by step."""
    num_utts, num_symbols, px_width = px.shape
    num_frames = py.shape[2]
    regular = px_width == num_frames + 1
    num_steps = num_frames + (num_symbols if regular else 0)
    s_begin, t_begin, s_end, t_end = (x[:, None, None] for x in boundary.unbind(1))
    k = torch.arange(num_steps + 1, device=px.device)[None, :, None]
    s = torch.arange(num_symbols + 1, device=px.device)[None, None, :] + s_begin  # (N, 1, S+1) absolute s of arrival
    t = t_begin + k - (s - s_begin if regular else 0)  # (N, K+1, S+1) absolute t of arrival
    inside = (s <= s_end) & (t <= t_end) & (t >= t_begin)
    x_t = t if regular else t - 1
    x_valid = inside & (s > s_begin) & (x_t >= t_begin)
    y_valid = inside & (t > t_begin)
    x_source = torch.where(x_valid, (s - 1) * px_width + x_t, 0)
    y_source = torch.where(y_valid, s * num_frames + t - 1, 0)

    def lay_out(source: Tensor, valid: Tensor, values: Tensor) -> Tensor:
        if values.shape[1] * values.shape[2] == 0:
            return torch.full(source.shape, -torch.inf, dtype=torch.float64, device=px.device).transpose(0, 1)
        laid = values.reshape(num_utts, -1).gather(1, source.reshape(num_utts, -1)).view(source.shape).double()
        return laid.masked_fill_(~valid, -torch.inf).transpose(0, 1).contiguous()

    xs, ys = lay_out(x_source, x_valid, px), lay_out(y_source, y_valid, py)
    return Steps(xs, ys, x_source, y_source, x_valid, y_valid)


def forward_backward(px: Tensor, py: Tensor, boundary: Tensor, need_occupancy: bool = True) -> Lattice:
    """Sum over all paths and, if asked for, the posterior of every transition.

    Args:
      px: (N, S, T + 1) regular or (N, S, T) modified log-probs of symbols.
      py: (N, S + 1, T) log-probs of blanks.
      boundary: (N, 4) int64 [s_begin, t_begin, s_end, t_end].
    """
    num_utts, num_symbols, px_width = px.shape
    num_frames = py.shape[2]
    regular = px_width == num_frames + 1
    xs, ys, x_source, y_source, x_valid, y_valid = lay_out_steps(px, py, boundary)
    num_steps = xs.shape[0] - 1

    alpha = torch.full_like(xs, -torch.inf)
    alpha[0, :, 0] = 0.0
    for k in range(1, num_steps + 1):
        torch.add(alpha[k - 1], ys[k], out=alpha[k])
        # a symbol arrives at s from s - 1
        alpha[k, :, 1:] = torch.logaddexp(alpha[k, :, 1:], alpha[k - 1, :, :-1] + xs[k, :, 1:])
    s_len, t_len = boundary[:, 2] - boundary[:, 0], boundary[:, 3] - boundary[:, 1]
    end_step = t_len + s_len if regular else t_len
    utts = torch.arange(num_utts, device=px.device)
    scores = alpha[end_step, utts, s_len]
    if not need_occupancy:
        return Lattice(scores, None, None)

    beta = torch.full_like(xs, -torch.inf)
    beta[end_step, utts, s_len] = 0.0  # no valid transition leaves the end node
    for k in range(num_steps, 0, -1):
        onward = beta[k] + ys[k]
        onward[:, :-1] = torch.logaddexp(onward[:, :-1], beta[k, :, 1:] + xs[k, :, 1:])
        torch.maximum(beta[k - 1], onward, out=beta[k - 1])

    possible = torch.isfinite(scores) | torch.isnan(scores)
    norm = torch.where(possible, scores, torch.inf)[:, None]  # exp(... - inf) = 0 for impossible utterances
    y_post = (alpha[:-1] + ys[1:] + beta[1:] - norm).exp_()  # (K, N, S+1)
    x_post = (alpha[:-1, :, :-1] + xs[1:, :, 1:] + beta[1:, :, 1:] - norm).exp_()  # (K, N, S)

    def lay_back(post: Tensor, source: Tensor, valid: Tensor, shape: torch.Size) -> Tensor:
        out = torch.zeros(num_utts, shape[1] * shape[2], dtype=torch.float64, device=px.device)
        if out.shape[1] == 0:
            return out.view(shape)
        post = post.transpose(0, 1) * valid
        return out.scatter_add_(1, source.reshape(num_utts, -1), post.reshape(num_utts, -1)).view(shape)

    px_occupancy = lay_back(x_post, x_source[:, 1:, 1:], x_valid[:, 1:, 1:], px.shape)
    py_occupancy = lay_back(y_post, y_source[:, 1:], y_valid[:, 1:], py.shape)
    return Lattice(scores, px_occupancy, py_occupancy)
