"""Backends of the lattice recursion behind one interface, with an automatic choice.

    auto    numba on the CPU where it is installed and works, else torch; torch on other devices
    torch   plain torch, any device, the readable reference
    numba   CPU only; an error elsewhere, and where it cannot be had
    k2      the real k2 (its own float32 arithmetic), never chosen silently
"""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from cascade.config.options import ConfigError
from cascade.losses import recursion_torch
from cascade.losses.recursion_torch import Lattice

BACKENDS = ("auto", "torch", "numba", "k2")
_CPU = torch.device("cpu")
_chosen = "auto"


def set_backend(name: str, device: torch.device = _CPU) -> None:
    """Choose the backend of all losses of this process, which will be computed on `device`.

    Raises:
      ConfigError: a backend that the device has not.
      ValueError: unknown name, or a backend whose package is missing (the message says what to install).
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"loss backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "numba" and _numba_module() is None:
        raise ValueError("loss.backend=numba needs the package numba: pip install numba, or set loss.backend=auto")
    _check_device(name, device)
    if name == "k2":
        from cascade.losses import rnnt_k2

        rnnt_k2.load()
    _chosen = name


def _check_device(name: str, device: torch.device) -> None:
    if name == "numba" and device.type != "cpu":
        raise ConfigError(f"loss.backend=numba computes on the CPU, not on {device}: set loss.backend=auto")


@cache
def _numba_module() -> ModuleType | None:
    """recursion_numba after a trial run, or None (with one warning) where numba is missing or cannot compile."""
    try:
        from cascade.losses import recursion_numba

        boundary = torch.tensor([[0, 0, 1, 1]])
        recursion_numba.forward_backward(
            torch.zeros(1, 2, 1).transpose(1, 2), torch.zeros(1, 2, 1).transpose(1, 2), None, boundary,
            modified=False, label_frames=2, need_occupancy=True, least=0.0,
        )
        return recursion_numba
    except ImportError:
        logging.getLogger(__name__).warning("numba is not installed: the losses use plain torch, which is slower")
    except Exception as error:  # a compiler can fail in many ways; the torch backend gives the same numbers
        logging.getLogger(__name__).warning("numba failed (%s): the losses use plain torch, which is slower", error)
    return None


def _fast_module(device: torch.device) -> ModuleType | None:
    _check_device(_chosen, device)
    if device.type != "cpu" or _chosen not in ("auto", "numba"):
        return None
    return _numba_module()


def _least(dtype: torch.dtype) -> float:
    """Posteriors below this count as 0, since products with denormal numbers run many times slower.

    The margin of 1e12 keeps products with probabilities down to 1e-12 normal, too.
    """
    return torch.finfo(dtype).tiny * 1e12


def _flush(x: Tensor, dtype: torch.dtype, least: float) -> Tensor:
    x = x.to(dtype)
    return x.masked_fill_(x < least, 0.0)


def forward_backward(
    px: Tensor, py: Tensor, boundary: Tensor, need_occupancy: bool = True, least: float | None = None
) -> Lattice:
    """Score lattices; inputs as in recursion_torch.forward_backward, checked before.

    Args:
      least: occupancies below this become 0; None: only the denormal numbers and what lies near them.
    Returns:
      Lattice with float64 scores and occupancies in px's type, denormal ones flushed; zeros for impossible utterances.
    """
    least = _least(px.dtype) if least is None else least
    if _chosen == "k2":
        from cascade.losses import rnnt_k2

        lattice = rnnt_k2.forward_backward(px, py, boundary, need_occupancy)
    elif (fast := _fast_module(px.device)) is not None:
        regular = px.shape[2] == py.shape[2] + 1
        scores, d_label, d_blank = fast.forward_backward(
            px.transpose(1, 2), py.transpose(1, 2), None, boundary, modified=not regular, label_frames=px.shape[2],
            need_occupancy=need_occupancy, least=least,
        )
        return Lattice(scores, d_label.transpose(1, 2), d_blank.transpose(1, 2))
    else:
        lattice = recursion_torch.forward_backward(px, py, boundary, need_occupancy)
    if not need_occupancy:
        return lattice
    px_occupancy, py_occupancy = (_flush(x, px.dtype, least) for x in lattice[1:])
    return Lattice(lattice.scores, px_occupancy, py_occupancy)


def spread(values: Tensor, ranges: Tensor, num_symbols: int) -> Tensor:
    """(N, T, R) values at ranges -> (N, S + 1, T), -inf elsewhere."""
    full = values.new_full((*values.shape[:2], num_symbols + 1), -torch.inf)
    return full.scatter(2, ranges, values).transpose(1, 2)


def band_forward_backward(
    label: Tensor, blank: Tensor, ranges: Tensor, boundary: Tensor, *, modified: bool, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Score bands of lattices.

    Args:
      label, blank: (N, T, R) log-probs of the next symbol and of the blank in each cell.
      ranges: (N, T, R) int64 contiguous positions; boundary: (N, 4) int64.
      modified: a symbol takes a frame (modified and constrained topologies).
      least: posteriors below this become 0.
    Returns:
      scores (N,) float64; posteriors (N, T, R) of symbols and blanks in label's type, zeros for impossible utterances.
    """
    num_symbols = int(max(int(boundary[:, 2].max()), int(ranges.max()))) if ranges.numel() else 0
    if (fast := _fast_module(label.device)) is not None:
        last = boundary[:, 2:3] - ranges.shape[2] + 1  # the end column holds only the end node
        start = torch.cat([ranges[:, :, 0], last], dim=1)
        ends = boundary[:, 3:4]
        start.scatter_(1, ends, last)
        return fast.forward_backward(
            label, blank, start, boundary, modified=modified, label_frames=-1, need_occupancy=True,
            least=least,
        )
    px, py = spread(label, ranges, num_symbols)[:, :-1], spread(blank, ranges, num_symbols)
    if not modified:
        px = torch.nn.functional.pad(px, (0, 1), value=-torch.inf)
        columns = torch.arange(px.shape[2], device=px.device)
        px = px.masked_fill(columns >= boundary[:, 3, None, None], -torch.inf)
    lattice = forward_backward(px.contiguous(), py.contiguous(), boundary, least=least)
    d_label = torch.nn.functional.pad(lattice.px_occupancy[:, :, : label.shape[1]], (0, 0, 0, 1))
    gather = [x.transpose(1, 2).gather(2, ranges) for x in (d_label, lattice.py_occupancy)]
    return lattice.scores, gather[0], gather[1]
