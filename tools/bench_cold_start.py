#!/usr/bin/env python
"""Measure a cold start: how long a fresh process takes to its first partial text, and what it takes of memory.

    python -m venv light && light/bin/pip install .            # without PyTorch
    python tools/bench_cold_start.py --onnx-dir DIR --exp-dir DIR --python light/bin/python --recording talk.wav \\
        --json FILE

A process starts Python, opens a Recognizer and hears the recording, all of which is there at once. A row of --json has
the engine (onnx; torch with --exp-dir, in the Python that runs this file), the medians over --repeats processes of
seconds from the start to the first partial, of processor seconds to there, and of the resident set there and at the
end, and the size of the packages in that Python (MB = 10^6 bytes). The processes of all rows take turns; the first of
each, which finds files that the system has not read yet, is left out. Seconds mean something on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import check_values  # noqa: E402
from cascade.files import replacing  # noqa: E402
from cascade.provenance import command_line, git_commit, processor  # noqa: E402

CHILD = """
import json, sys, sysconfig, time
from pathlib import Path

from cascade import Recognizer
from cascade.audio.io import read_audio

def resident_mb():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1.024e-3

recognizer = Recognizer(sys.argv[1], threads=1)
samples, _ = read_audio(sys.argv[2], recognizer.sampling_rate)
stream, packet, heard = recognizer.stream(), recognizer.sampling_rate // 100, 0
while stream.partial().decoded == 0 and heard < len(samples):
    stream.accept(samples[heard : heard + packet], recognizer.sampling_rate)
    heard += packet
print("first partial", flush=True)
seconds, first_mb, decoded = time.process_time(), resident_mb(), stream.partial().decoded
stream.accept(samples[heard:], recognizer.sampling_rate)
stream.finish()
files = [path.stat().st_size for path in Path(sysconfig.get_path("purelib")).rglob("*") if path.is_file()]
print(json.dumps({
    "cpu_seconds": seconds, "rss_first_partial_mb": first_mb, "rss_end_mb": resident_mb(),
    "packages_mb": sum(files) / 1e6, "decoded": decoded, "has_torch": "torch" in sys.modules,
}))
"""


def start_once(python: str | Path, folder: Path, recording: Path) -> dict[str, Any]:
    """Measure one fresh process.

    Raises:
      ValueError: it failed, or the recording ended before the first partial.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [str(python), "-c", CHILD, str(folder.resolve()), str(recording.resolve())]
    start = time.perf_counter()
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.sep
    ) as process:
        process.stdout.readline()
        seconds = time.perf_counter() - start
        out, error = process.communicate()
    if process.returncode:
        raise ValueError(f"{python} with {folder}: {(error.strip().splitlines() or ['no message'])[-1]}")
    row = json.loads(out)
    if not row.pop("decoded"):
        raise ValueError(f"{recording} is shorter than a chunk")
    return {"seconds": seconds, **row}


def measure(sources: dict[str, tuple[str | Path, Path]], recording: Path, repeats: int) -> list[dict[str, Any]]:
    """A row for each engine: its Python and its folder."""
    trials: dict[str, list[dict[str, Any]]] = {engine: [] for engine in sources}
    for repeat in range(repeats + 1):
        for engine, (python, folder) in sources.items():
            trial = start_once(python, folder, recording)
            if repeat:
                trials[engine].append(trial)
    provenance = {"machine": processor(), "commit": git_commit(), "command": command_line()}
    return [
        {"engine": engine, "folder": str(sources[engine][1])}
        | {name: round(statistics.median(each[name] for each in trials[engine]), 3) for name in trials[engine][0]}
        | provenance
        for engine in sources
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx-dir", type=Path, metavar="DIR", required=True, help="what export_onnx wrote")
    parser.add_argument("--exp-dir", type=Path, metavar="DIR", help="model directory, to compare with PyTorch")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="runs --onnx-dir (default: this one)")
    parser.add_argument("--recording", type=Path, metavar="FILE", required=True, help="of a second or more")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="processes of a row (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    check_values(arguments, repeats=1)
    sources: dict[str, tuple[str | Path, Path]] = {"onnx": (arguments.python, arguments.onnx_dir)}
    if arguments.exp_dir is not None:
        sources["torch"] = (sys.executable, arguments.exp_dir)
    rows = measure(sources, arguments.recording, arguments.repeats)
    for row in rows:
        print(
            "{engine:6s} first partial after {seconds:.2f} s ({cpu_seconds:.2f} s of processor time) and in "
            "{rss_first_partial_mb:.0f} MB, {rss_end_mb:.0f} MB at the end, packages {packages_mb:.0f} MB".format(**row)
        )
    if arguments.json is not None:
        with replacing(arguments.json) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
