"""Threads of the CPU: one limit for PyTorch's operators and numpy's matrix products."""

from __future__ import annotations

import os
import sys

from threadpoolctl import threadpool_limits


def limit_threads(count: int) -> None:
    """Let every library of this process that computes use `count` threads at most, those loaded later included."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(count)
    threadpool_limits(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
