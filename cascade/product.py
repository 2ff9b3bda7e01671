"""Products with the constant matrices of predictor and joiner, in plain numpy: the reference of `product_numba`."""

from __future__ import annotations

import numpy as np


class Product:
    """x -> x W^T + b for a few rows x.

    Args:
      weight: (V, D); bias: (V,).
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        self._transposed, self._bias = np.ascontiguousarray(weight.T), bias  # so OpenBLAS takes half of the time

    def __call__(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(R, D) -> (R, V), written to `out` where it is given."""
        out = np.matmul(x, self._transposed, out=out)
        out += self._bias
        return out
