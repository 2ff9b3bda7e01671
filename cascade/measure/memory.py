"""Memory that a model needs to decode one stream, each measured in a fresh process.

`python -m cascade.measure.memory JSON` is that process: it loads the model, streams for a while on one thread and
prints {"peak_memory_mb", "process_memory_mb"}: the peak resident set above what the libraries take, and all of it.
MB = 10^6 bytes.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cascade.config.options import ENCODER_FRAME_MS
from cascade.measure.compute import ModelSource, chunk_runner, open_model
from cascade.threads import limit_threads

_NUM_CHUNKS = 60
_MEGABYTE = 1e6


def measure_memory(
    sources: Sequence[ModelSource], chunk_ms: int, left_context_ms: int
) -> list[dict[str, float | None]]:
    """The need of each model, in the order of `sources`; None, with a warning, where it cannot be measured."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, json.dumps([asdict(source), chunk_ms, left_context_ms])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for source in sources
    ]  # fmt: skip
    rows = []
    for process in processes:
        out, error = process.communicate()
        if process.returncode == 0:
            rows.append(json.loads(out))
        else:
            last_line = (error.strip() or "no message").splitlines()[-1]
            logging.warning("memory was not measured: the process for it failed (%s)", last_line)
            rows.append({"peak_memory_mb": None, "process_memory_mb": None})
    return rows


def resident_bytes() -> tuple[int, int]:
    """Resident set of this process, now and at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, peak


def stream_once(source: ModelSource, chunk_ms: int, left_context_ms: int) -> None:
    """Load the model and let one stream of noise run."""
    run = chunk_runner(open_model(source), chunk_ms // ENCODER_FRAME_MS, left_context_ms // ENCODER_FRAME_MS)
    for _ in range(_NUM_CHUNKS):
        run()


def main() -> None:
    limit_threads(1)
    before, _ = resident_bytes()
    source, *contexts = json.loads(sys.argv[1])
    stream_once(ModelSource(**source), *contexts)
    _, peak = resident_bytes()
    megabytes = {"peak_memory_mb": (peak - before) / _MEGABYTE, "process_memory_mb": peak / _MEGABYTE}
    print(json.dumps({name: round(value, 1) for name, value in megabytes.items()}))


if __name__ == "__main__":
    main()
