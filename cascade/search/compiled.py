"""Kernels that numba compiles, where it is installed; each stands beside the same in plain numpy."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np

BACKENDS = ("auto", "numpy", "numba")


@cache
def compiled(name: str, user: str, dtype: np.dtype | None = None) -> ModuleType | None:
    """A module of this package, its kernels compiled, or None (with one warning) where numba is missing or fails.

    Args:
      user: what runs on it, for the warning.
      dtype: of the logits, for kernels that know several.
    """
    try:
        module = import_module(f"cascade.search.{name}")
        module.compile_kernels(*filter(None, [dtype]))
        return module
    except ImportError:
        problem = "numba is not installed"
    except Exception as error:  # a compiler can fail in many ways; numpy gives the same hypotheses
        problem = f"numba failed ({error})"
    logging.getLogger(__name__).warning("%s: %s uses plain numpy, which is slower", problem, user)
    return None


def search_kernels(backend: str, dtype: np.dtype) -> ModuleType:
    """beam_numba or beam_numpy.

    Args:
      backend: numpy | numba | auto: numba where it is installed.
    Raises:
      ValueError: an unknown backend, or numba where it cannot be had.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {' | '.join(BACKENDS)}, got {backend!r}")
    kernels = None if backend == "numpy" else compiled("beam_numba", "the search", dtype)
    if backend == "numba" and kernels is None:
        raise ValueError("backend numba needs the package numba: pip install numba")
    return kernels or import_module("cascade.search.beam_numpy")
