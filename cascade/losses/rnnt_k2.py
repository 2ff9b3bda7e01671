"""The recursion of the real k2, for comparison; the only door to k2.

k2 needs a build that matches Python, torch and CUDA exactly; nothing else in this project imports it.
"""

from types import ModuleType

from torch import Tensor

from cascade.losses.recursion_torch import Lattice


def load() -> ModuleType:
    """Import k2; ValueError says what to install where it is missing."""
    try:
        import k2
    except ImportError as error:
        raise ValueError(
            f"loss.backend=k2 needs the package k2 ({error}): install the build for your Python and torch, see "
            "https://k2-fsa.github.io/k2/installation, or set loss.backend=auto"
        ) from error
    return k2


def forward_backward(px: Tensor, py: Tensor, boundary: Tensor, need_occupancy: bool = True) -> Lattice:
    """Lattice of recursion_torch.forward_backward in k2's arithmetic (float32 sums for float32 log-probs)."""
    k2 = load()
    px, py = px.detach().contiguous(), py.detach().contiguous()
    scores, grads = k2.mutual_information_recursion(px, py, boundary.contiguous(), return_grad=True)
    if not need_occupancy:
        return Lattice(scores.double(), None, None)
    possible = (scores > -float("inf"))[:, None, None]
    px_occupancy, py_occupancy = (grad.masked_fill(~possible, 0.0) for grad in grads)
    return Lattice(scores.double(), px_occupancy, py_occupancy)
