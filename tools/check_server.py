"""A server among bad clients: slow, silent, deaf, vanishing and malformed ones, next to good ones, for some minutes.

    python tools/check_server.py --exp-dir exp/student --wav DIR --minutes 10

Good clients of all three protocols send recordings, each another one, and must get the text that `Recognizer` gives:
nothing of one client may reach another. In the end no stream and no file may be held, memory may not have grown by more
than --max-growth-mb, the log may hold no traceback, and the server must still answer and end with 0 at a signal.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade import Recognizer  # noqa: E402
from cascade.bin.cli import run_program  # noqa: E402
from cascade.config.options import ConfigError  # noqa: E402
from cascade.processes.exits import EXIT_FAILED  # noqa: E402
from cascade.recognizer import EXPORTED  # noqa: E402
from tools.bench_serve import RATE, read_turns  # noqa: E402
from tools.serving import Serving, serving  # noqa: E402
from tools.visitors import IDLE, MAX_STREAMS, PATIENCE, UPLOAD_MB, Visitors  # noqa: E402


def read_recordings(model: Path, paths: Sequence[Path]) -> list[tuple[np.ndarray, str]]:
    """Recordings with the text that the model says of them; those of one text once."""
    recognizer = Recognizer(model, threads=1, device="cpu")
    recordings: dict[str, np.ndarray] = {}
    for samples in read_turns(paths, limit=12, seconds=2.0):
        stream = recognizer.stream()
        stream.accept(samples, RATE)
        recordings.setdefault(stream.finish().text, samples)
    recordings.pop("", None)
    if len(recordings) < 2:
        raise ConfigError("--wav: the model hears nothing there, or the same in all recordings")
    return [(samples, text) for text, samples in recordings.items()]


async def visit(
    server: Serving, recordings: Sequence[tuple[np.ndarray, str]], seconds: float, seed: int
) -> tuple[list[float], Counter[str], list[str]]:
    """Clients come and go; returns the resident set in MB, second by second, the visits by kind, what went wrong."""
    end, visits, wrong, resident = time.monotonic() + seconds, Counter(), [], []
    async with Visitors(server.url, recordings, seed) as visitors:

        async def come(kind: Callable[[], Awaitable[None]]) -> None:
            visits[kind.__name__] += 1
            try:
                await kind()
            except Exception as error:
                wrong.append(f"{kind.__name__}: {type(error).__name__} {error}".strip())

        async def come_again(kinds: Sequence[Callable[[], Awaitable[None]]], number: int) -> None:
            while time.monotonic() < end:
                await come(kinds[number % len(kinds)])
                number += 1

        async def watch() -> None:
            while time.monotonic() < end:
                resident.append(server.resident_mb)
                await asyncio.sleep(1.0)

        await asyncio.gather(
            watch(), *(come_again(visitors.good, number) for number in range(6)),
            *(come_again(visitors.bad, number) for number in range(len(visitors.bad))),
        )  # fmt: skip
        limit = time.monotonic() + IDLE + PATIENCE
        while (streams := (await (await visitors.web.get(f"{server.url}/ready")).json())["streams"]):
            if time.monotonic() > limit:
                wrong.append(f"{streams} streams are held by nobody")
                break
            await asyncio.sleep(0.2)
        for kind in visitors.good:
            await come(kind)
    return resident, visits, wrong


def growth(resident: Sequence[float]) -> float:
    """MB by which the mean of the last fifth is above that of the middle one: buffers grow to their size before."""
    fifth = max(1, len(resident) // 5)
    return float(np.mean(resident[-fifth:]) - np.mean(resident[2 * fifth : 3 * fifth]))


def open_files(server: Serving) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def check(model: Path, paths: Sequence[Path], seconds: float, max_growth_mb: float, seed: int) -> list[str]:
    """What is wrong, a sentence each."""
    recordings = read_recordings(model, paths)
    source = "--onnx-dir" if (model / EXPORTED).is_file() else "--exp-dir"
    options = [source, model, "--device", "cpu", "--max-streams", MAX_STREAMS, "--idle", IDLE, "--max-upload-mb",
               UPLOAD_MB]  # fmt: skip
    with serving(*options) as server:
        files = open_files(server)
        resident, visits, wrong = asyncio.run(visit(server, recordings, seconds, seed))
        time.sleep(1.0)
        grown, files = growth(resident), open_files(server) - files
        server.process.send_signal(signal.SIGTERM)
        code, log = server.process.wait(PATIENCE), server.log.read_text()
    print(f"{sum(visits.values())} visits ({', '.join(f'{count} {kind}' for kind, count in sorted(visits.items()))})")
    print("MB by tenths of the time:", *(f"{float(np.mean(part)):.0f}" for part in np.array_split(resident, 10)))
    print(f"memory: {resident[0]:.0f} MB at first, {resident[-1]:.0f} MB in the end, grown by {grown:.1f} MB")
    wrong = [f"{message} ({count} times)" for message, count in Counter(wrong).items()]
    if grown > max_growth_mb:
        wrong.append(f"memory grew by {grown:.1f} MB")
    if files > 4:
        wrong.append(f"{files} files stay open")
    if "Traceback" in log:
        wrong.append(f"the log has a traceback: {log[log.index('Traceback'):][:3000]}")
    if code:
        wrong.append(f"the server ended with {code}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--exp-dir", type=Path, metavar="DIR", help="model directory")
    source.add_argument("--onnx-dir", type=Path, metavar="DIR", help="what export_onnx wrote")
    parser.add_argument("--wav", type=Path, nargs="+", required=True, metavar="PATH", help="recordings or folders")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="default 10")
    parser.add_argument("--max-growth-mb", type=float, default=20.0, metavar="MB", help="default 20")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = arguments.exp_dir or arguments.onnx_dir
    wrong = check(model, arguments.wav, 60 * arguments.minutes, arguments.max_growth_mb, arguments.seed)
    for message in wrong:
        print(f"error: {message}", file=sys.stderr)
    if wrong:
        sys.exit(EXIT_FAILED)
    print("every good client got its text, no stream and no file is held")


if __name__ == "__main__":
    run_program(main)
