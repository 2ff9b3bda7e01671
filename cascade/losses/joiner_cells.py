"""The joiner on a list of lattice cells, slice by slice, with its gradients written out.

A step's time and memory go into the joiner, not into the recursion. Only valid cells are computed (no padding), in
slices that stay in the processor's cache, and no (cells, V) log-softmax is ever kept.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLANK_ID = 0
"""Of what is trained here; k2's functions (`rnnt`) take any."""


class JoinerInputs(NamedTuple):
    """Inputs of a joiner, logits = tanh(encoder[t] + predictor[u]) @ weight.T + bias."""

    encoder: Tensor
    """(N, T, D)"""
    predictor: Tensor
    """(N, U + 1, D)"""
    weight: Tensor
    """(V, D)"""
    bias: Tensor
    """(V,)"""


class Cells(NamedTuple):
    """A list of M lattice cells (n, t, u), each field an (M,) int64 tensor."""

    utts: Tensor
    frames: Tensor
    positions: Tensor


def band_cells(ranges: Tensor, boundary: Tensor) -> tuple[Cells, Tensor]:
    """The valid cells of a band: frames before the utterance's end, positions up to its last.

    Args:
      ranges: (N, T, R) int64 positions; boundary: (N, 4) int64 [s_begin, t_begin, s_end, t_end].
    Returns:
      the M cells, and their (M,) indices into the flattened (N, T, R).
    """
    s_begin, t_begin, s_end, t_end = (x[:, None, None] for x in boundary.unbind(1))
    num_utts, num_frames, width = ranges.shape
    frames = torch.arange(num_frames, device=ranges.device)[None, :, None]
    valid = (frames >= t_begin) & (frames < t_end) & (ranges >= s_begin) & (ranges <= s_end)
    index = valid.flatten().nonzero()[:, 0]
    frame_rows = index // width
    utts = frame_rows // num_frames
    return Cells(utts, frame_rows - utts * num_frames, ranges.flatten()[index]), index


def check_inputs(inputs: JoinerInputs, name: str) -> None:
    """Raise a ValueError unless the four tensors fit together."""
    encoder, predictor, weight, bias = inputs
    dim = encoder.shape[-1]
    if encoder.ndim != 3 or predictor.ndim != 3 or predictor.shape[::2] != encoder.shape[::2]:
        raise ValueError(
            f"{name}: encoder (N, T, D) and predictor (N, U + 1, D) must agree in N and D, got {tuple(encoder.shape)} "
            f"and {tuple(predictor.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != dim or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: joiner weight must be (V, {dim}) and bias (V,), got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )


class CellJoiner:
    """The joiner's forward on cells. Computes in float32 (float64 for float64 inputs)."""

    def __init__(self, inputs: JoinerInputs, cells: Cells) -> None:
        encoder, predictor, weight, bias = inputs
        self.dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
        self._encoder = encoder.detach().to(self.dtype).flatten(0, 1)  # (N T, D)
        self._predictor = predictor.detach().to(self.dtype).flatten(0, 1)  # (N (U+1), D)
        self.weight, self.bias = weight.detach().to(self.dtype), bias.detach().to(self.dtype)
        self._minus_one = self.weight.new_tensor(-1.0)
        self.num_cells = cells.utts.shape[0]
        self._scratch: dict[str, Tensor] = {}
        self.encoder_rows = cells.utts * encoder.shape[1] + cells.frames
        self.predictor_rows = cells.utts * predictor.shape[1] + cells.positions

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    def slices(self, num_rows: int | None = None) -> Iterator[slice]:
        """Row slices of about two megabytes per matrix."""
        rows = self._slice_rows
        total = self.num_cells if num_rows is None else num_rows
        for begin in range(0, total, rows):
            yield slice(begin, min(begin + rows, total))

    @property
    def _slice_rows(self) -> int:
        return max(256, 2**19 // max(self.vocab_size, self.dim))

    def scratch(self, name: str, num_rows: int, width: int) -> Tensor:
        """Uninitialised (num_rows, width) workspace, the same memory for every slice."""
        if name not in self._scratch:
            self._scratch[name] = self.weight.new_empty(min(self._slice_rows, self.num_cells), width)
        return self._scratch[name][:num_rows]

    def free_scratch(self) -> None:
        """Give the workspaces back."""
        self._scratch.clear()

    def hidden(self, rows: slice | Tensor) -> Tensor:
        """(m, D) tanh of the sums for the cells at `rows`, in a workspace."""
        encoder_rows, predictor_rows = self.encoder_rows[rows], self.predictor_rows[rows]
        num_rows = encoder_rows.shape[0]
        x = self.scratch("hidden", num_rows, self.dim)
        torch.index_select(self._encoder, 0, encoder_rows, out=x)
        other = self.scratch("predictor", num_rows, self.dim)
        x += torch.index_select(self._predictor, 0, predictor_rows, out=other)
        # tanh(x) = 2 sigmoid(2 x) - 1: sigmoid is several times faster than tanh on the CPU
        return torch.add(self._minus_one, x.mul_(2.0).sigmoid_(), alpha=2.0, out=x)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(m, D) -> (m, V), into `out` or a workspace."""
        out = self.scratch("logits", hidden.shape[0], self.vocab_size) if out is None else out
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


class JoinerGradients:
    """Sums of the gradients of a CellJoiner's inputs over slices of cells."""

    def __init__(self, joiner: CellJoiner) -> None:
        self._joiner = joiner
        self._encoder = torch.zeros_like(joiner._encoder)
        self._predictor = torch.zeros_like(joiner._predictor)
        self._weight = torch.zeros_like(joiner.weight)
        self._bias = torch.zeros_like(joiner.bias)

    def add(self, d_logits: Tensor, hidden: Tensor, rows: slice | Tensor) -> None:
        """Add the gradients of the cells at `rows`, from d loss / d logits (m, V) and their hidden (m, D)."""
        joiner = self._joiner
        self._weight.addmm_(d_logits.t(), hidden)
        self._bias += d_logits.sum(dim=0)
        grad = torch.mm(d_logits, joiner.weight, out=joiner.scratch("predictor", hidden.shape[0], joiner.dim))
        grad = torch.ops.aten.tanh_backward.grad_input(grad, hidden, grad_input=grad)
        self._encoder.index_add_(0, joiner.encoder_rows[rows], grad)
        self._predictor.index_add_(0, joiner.predictor_rows[rows], grad)

    def results(self, inputs: JoinerInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums in the shapes and types of `inputs`."""
        sums = self._encoder, self._predictor, self._weight, self._bias
        return tuple(total.view(x.shape).to(x.dtype) for total, x in zip(sums, inputs, strict=True))
