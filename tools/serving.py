"""A server of a model as a process of its own, for the programs that measure and check it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS, END_SECONDS = 300, 5


@dataclass(frozen=True)
class Serving:
    """A server that listens."""

    process: subprocess.Popen
    url: str
    log: Path

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def resident_mb(self) -> float:
        """Resident set, in 10^6 bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s*(\d+)", status)[1]) * 1024 / 1e6


@contextlib.contextmanager
def serving(*options: object, core: int | None = None) -> Iterator[Serving]:
    """`serve` with these options on this machine; it is ended afterwards.

    Args:
      core: the only core that it may use.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "cascade.bin.serve", "--port", "0", *map(str, options)],
                stderr=file, cwd=Path.cwd(), env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        try:
            if core is not None:
                os.sched_setaffinity(process.pid, {core})
            end = time.monotonic() + START_SECONDS
            while (match := re.search(r"https?://[\d.]+:\d+", log.read_text())) is None:
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"error: the server did not start: {log.read_text().strip()}")
                time.sleep(0.05)
            yield Serving(process, match[0], log)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:  # it waits for streams that our own clients hold open
                process.kill()
                process.wait()
