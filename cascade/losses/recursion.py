"""The lattice recursion as a differentiable function: checks, autograd, k2's treatment of impossible utterances.

k2's semantics (https://github.com/k2-fsa/k2, mutual_information_recursion), written anew.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.losses import recursion_torch
from cascade.losses.backends import forward_backward
from cascade.losses.recursion_torch import Lattice


def check_boundary(boundary: Tensor | None, num_utts: int, num_symbols: int, num_frames: int, device) -> Tensor:
    """Return `boundary` as (N, 4) int64 [s_begin, t_begin, s_end, t_end]; None means the whole lattice.

    Raises:
      ValueError: wrong shape or type, or an utterance that leaves the lattice.
    """
    if boundary is None:
        whole = torch.tensor([0, 0, num_symbols, num_frames], dtype=torch.int64, device=device)
        return whole.expand(num_utts, 4)
    if boundary.ndim != 2 or boundary.shape != (num_utts, 4):
        raise ValueError(f"boundary must have shape ({num_utts}, 4), got {tuple(boundary.shape)}")
    if boundary.dtype != torch.int64:
        raise ValueError(f"boundary must be int64, got {boundary.dtype}; call boundary.long()")
    s_begin, t_begin, s_end, t_end = boundary.unbind(1)
    good = (s_begin >= 0) & (s_begin <= s_end) & (s_end <= num_symbols)
    good &= (t_begin >= 0) & (t_begin <= t_end) & (t_end <= num_frames)
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise ValueError(
            f"boundary of utterance {row} is {boundary[row].tolist()}, but [s_begin, t_begin, s_end, t_end] must "
            f"satisfy 0 <= s_begin <= s_end <= {num_symbols} and 0 <= t_begin <= t_end <= {num_frames}"
        )
    return boundary


def check_lattice(px: Tensor, py: Tensor, boundary: Tensor | None) -> Tensor:
    """Check the shapes of a lattice and return its boundary as a tensor; ValueError says what is wrong."""
    if px.ndim != 3 or py.ndim != 3:
        raise ValueError(f"px and py must have 3 dimensions, got shapes {tuple(px.shape)} and {tuple(py.shape)}")
    num_utts, num_symbols, px_width = px.shape
    num_frames = py.shape[2]
    if py.shape[:2] != (num_utts, num_symbols + 1) or px_width not in (num_frames, num_frames + 1):
        raise ValueError(
            "px must be (N, S, T + 1) (regular) or (N, S, T) (modified, constrained) for py (N, S + 1, T), "
            f"got px {tuple(px.shape)} and py {tuple(py.shape)}"
        )
    if px.dtype != py.dtype or not px.dtype.is_floating_point:
        raise ValueError(f"px and py must have the same floating point type, got {px.dtype} and {py.dtype}")
    return check_boundary(boundary, num_utts, num_symbols, num_frames, px.device)


def _follow_impossible(lattice: Lattice, px: Tensor, py: Tensor, boundary: Tensor) -> None:
    """Give impossible utterances the finite occupancies that k2 gives them, in place.

    k2 walks back from the end node; where all ways in have probability zero it follows the blank, in the first frame
    the symbol. From the first node that can be reached on, the posteriors are the usual ones.
    """
    regular = px.shape[2] == py.shape[2] + 1
    for row in torch.isneginf(lattice.scores).nonzero().flatten().tolist():
        s_begin, t_begin, s_end, t_end = boundary[row].tolist()
        for t in range(t_end - 1, t_begin - 1, -1):
            lattice.py_occupancy[row, s_end, t] = 1.0
            part = torch.tensor([[s_begin, t_begin, s_end, t]], device=px.device)
            reached = recursion_torch.forward_backward(px[row : row + 1], py[row : row + 1], part)
            if not torch.isneginf(reached.scores[0]):
                lattice.px_occupancy[row] += reached.px_occupancy[0].to(px.dtype)
                lattice.py_occupancy[row] += reached.py_occupancy[0].to(py.dtype)
                break
        else:
            if regular:
                lattice.px_occupancy[row, s_begin:s_end, t_begin] = 1.0


class _MutualInformation(torch.autograd.Function):
    """scores and occupancies; the gradient of the scores is the occupancies, those have none."""

    @staticmethod
    def forward(ctx, px: Tensor, py: Tensor, boundary: Tensor, need_occupancy: bool):
        lattice = forward_backward(px, py, boundary, need_occupancy)
        if not need_occupancy:
            none = px.new_empty(0)
            return lattice.scores.to(px.dtype), none, none
        if bool(torch.isneginf(lattice.scores).any()):
            _follow_impossible(lattice, px, py, boundary)
        px_occupancy, py_occupancy = lattice.px_occupancy, lattice.py_occupancy
        ctx.save_for_backward(px_occupancy, py_occupancy)
        ctx.mark_non_differentiable(px_occupancy, py_occupancy)
        return lattice.scores.to(px.dtype), px_occupancy, py_occupancy

    @staticmethod
    def backward(ctx, grad_scores: Tensor, _px, _py):
        px_occupancy, py_occupancy = ctx.saved_tensors
        grad = grad_scores[:, None, None]
        return px_occupancy * grad, py_occupancy * grad, None, None


def mutual_information_recursion(
    px: Tensor, py: Tensor, boundary: Tensor | None = None, return_grad: bool = False
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Log-prob of all paths through each lattice, k2's function of this name.

    Args:
      px: (N, S, T + 1) (regular) or (N, S, T) (modified, constrained) log-probs of symbols.
      py: (N, S + 1, T) log-probs of blanks.
      boundary: (N, 4) int64 [s_begin, t_begin, s_end, t_end], or None for the whole lattice.
      return_grad: also return d scores / d px and d scores / d py.
    Returns:
      (N,) scores, or (scores, (px_grad, py_grad)); -inf for an impossible utterance.
    Raises:
      ValueError: shapes, types or boundaries that do not fit.
    """
    boundary = check_lattice(px, py, boundary)
    need = return_grad or (torch.is_grad_enabled() and (px.requires_grad or py.requires_grad))
    scores, px_grad, py_grad = _MutualInformation.apply(px, py, boundary, need)
    return (scores, (px_grad, py_grad)) if return_grad else scores


def joint_mutual_information_recursion(
    px: Sequence[Tensor], py: Sequence[Tensor], boundary: Tensor | None = None
) -> Tensor:
    """Split the log-prob of the lattice whose transitions are the sums of several log-probs, k2's function.

    Args:
      px, py: sequences of tensors as in mutual_information_recursion, all of the same shapes.
    Returns:
      (len(px), N): row i is the posterior mean of part i along the paths; row 0 also holds the rest (the entropy of the
      paths), so that the sum over rows is the score of the summed lattice. The gradient of row i reaches part i only.
    """
    total, occupancies = mutual_information_recursion(sum(px), sum(py), boundary, return_grad=True)
    rows = [
        sum((x.masked_fill(post == 0, 0.0) * post).sum(dim=(1, 2)) for x, post in zip(pair, occupancies, strict=True))
        for pair in zip(px, py, strict=True)
    ]
    rows[0] = rows[0] + (total - sum(rows)).detach()
    return torch.stack(rows)
