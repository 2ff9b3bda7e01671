"""Exit codes of every program."""

from __future__ import annotations

EXIT_FAILED, EXIT_USAGE = 1, 2
EXIT_INTERRUPTED = 75
"""A signal came, and the same command goes on from what is saved."""
EXIT_PEER_LOST = 70
"""Of a worker that ends because another one did; its launcher tells the cause."""


class Interrupted(Exception):
    """A signal came and everything needed to go on was saved."""
