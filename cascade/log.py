"""Log lines for people and files, and a progress bar that shows on a terminal only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def setup_logging(log_file: str | Path | None = None) -> None:
    """Send INFO and above to stderr, and to `log_file` (appended) where one is given."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    logging.raiseExceptions = False  # a log file on a full disk must not hide what the program has to say
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S",
        handlers=handlers, force=True,
    )


def progress(items: Iterable, description: str, total: int | None = None) -> tqdm:
    """A progress bar over `items` on a terminal; silent elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=description, total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)
