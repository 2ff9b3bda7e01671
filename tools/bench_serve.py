"""Clients that speak in real time against `serve`: how late its texts come, and how many streams a core carries.

    python tools/bench_serve.py --wav DIR --exp-dir exp/student --onnx-dir exp/export --json rows.json

The server has a core of its own; the clients are processes on another. Each client sends turns of speech in packets of
40 ms, commits after every turn and goes on with the next one at once, by the clock, whatever the server does.

- The lag of a chunk: from when its last sample is due until a `cascade.partial` (or the turn's end) comes whose
  `decoded_ms` covers it, whether or not its text has changed. The frames of a chunk need a few samples beyond it, so
  that one packet more has to come: packets are a part of the lag, as they are for every client.
- The time of a final: from when a turn's last sample is due, with the commit behind it, to the final text.
- Times count from the schedule, not from the sending: a server that makes its clients wait cannot hide it.
  client_late_ms_p99 says how far behind the clients were.

Without --streams it looks for the largest number of streams whose 95th percentile of lags stays below --limit-ms; every
trial is a row, and `largest` marks the one that was found.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.audio.io import read_audio  # noqa: E402
from cascade.bin.cli import run_program  # noqa: E402
from cascade.config.options import ConfigError  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from tools.serving import Serving, serving  # noqa: E402

RATE = 16000
PACKET_MS = 40
TURN_SECONDS = 8.0
MOST_PROCESSES = 4
PATIENCE_SECONDS = 60.0
"""The last finals may take so long."""
PERCENTILES = (50, 95, 99)
LATE_MS = 40.0
LINE = (
    "%(model)s, %(engine)s, %(precision)s, %(mode)s, %(streams)d streams: lag %(partial_lag_ms_p50)s, "
    "%(partial_lag_ms_p95)s, %(partial_lag_ms_p99)s ms (p50, p95, p99), final %(final_ms_p95)s ms (p95), %(errors)d "
    "errors, %(cpu_share)s of the core, %(rss_mb)s MB"
)


@dataclass
class Heard:
    """What clients measured, in seconds."""

    lags: list[float] = field(default_factory=list)
    finals: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, other: Heard) -> None:
        for name, values in vars(other).items():
            getattr(self, name).extend(values)


@dataclass(frozen=True)
class Load:
    """What a process of clients is to do.

    Args:
      url: of the server.
      starts: when each client begins to speak, on the clock of `time.monotonic`.
      seconds: for how long; the last turn is spoken to its end.
      turns: (num_samples,) int16 each; client number n begins with the n-th.
    """

    url: str
    starts: Sequence[float]
    seconds: float
    chunk_ms: int
    turns: Sequence[np.ndarray]


class Client:
    """One speaker."""

    def __init__(self, load: Load, number: int) -> None:
        self._load, self._number, self.heard = load, number, Heard()
        self._chunks: deque[tuple[float, float]] = deque()  # (ms of the connection, when they were due), to be covered
        self._ends: deque[float] = deque()  # when turns were due to end that have no final

    async def talk(self, web: aiohttp.ClientSession) -> Heard:
        try:
            async with web.ws_connect(f"{self._load.url}/v1/realtime", max_msg_size=0) as socket:
                audio = {"input": {"format": {"type": "audio/pcm", "rate": RATE}}}
                session = {"type": "transcription", "audio": audio, "include": ["cascade.partial"]}
                await socket.send_json({"type": "session.update", "session": session})
                listening = asyncio.create_task(self._listen(socket))
                await self._speak(socket)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        while self._ends and not listening.done():
                            await asyncio.sleep(0.02)
                listening.cancel()
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            self.heard.errors.append(str(error))
        self.heard.errors += ["a final did not come"] * len(self._ends)
        return self.heard

    async def _speak(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        due = begin = self._load.starts[self._number]
        size, before, turns = PACKET_MS * RATE // 1000, 0.0, self._load.turns
        first = self._number % len(turns)
        for samples in itertools.cycle([*turns[first:], *turns[:first]]):
            boundaries = deque(range(self._load.chunk_ms, 1000 * len(samples) // RATE + 1, self._load.chunk_ms))
            for start in range(0, len(samples), size):
                packet = samples[start : start + size]
                due += len(packet) / RATE
                await asyncio.sleep(due - time.monotonic())
                self.heard.late.append(max(0.0, time.monotonic() - due))
                while boundaries and boundaries[0] <= 1000 * (start + len(packet)) / RATE:
                    self._chunks.append((before + boundaries.popleft(), due))
                await socket.send_bytes(packet.tobytes())
            self._ends.append(due)
            await socket.send_json({"type": "input_audio_buffer.commit"})
            before += 1000 * len(samples) / RATE
            if due - begin >= self._load.seconds:
                return

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            now, event = time.monotonic(), json.loads(message.data)
            while self._chunks and self._chunks[0][0] <= event.get("decoded_ms", -1) + 1:  # milliseconds are rounded
                self.heard.lags.append(now - self._chunks.popleft()[1])
            if event["type"] == "cascade.finished":
                self.heard.finals.append(now - self._ends.popleft())
            elif event["type"] == "error" or event["type"].endswith(".failed"):
                self.heard.errors.append(event["error"]["message"])
                return
        self.heard.errors.append(f"the server closed with {socket.close_code}")


def run_clients(load: Load, numbers: Sequence[int], core: int) -> Heard:
    """In a process of its own: some of the clients."""
    os.sched_setaffinity(0, {core})

    async def main() -> list[Heard]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as web:
            return await asyncio.gather(*(Client(load, number).talk(web) for number in numbers))

    heard = Heard()
    for each in asyncio.run(main()):
        heard.add(each)
    return heard


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    values = 1000 * np.percentile(seconds, PERCENTILES) if len(seconds) else [None] * len(PERCENTILES)
    return {f"{name}_ms_p{share}": None if value is None else round(float(value), 1)
            for share, value in zip(PERCENTILES, values, strict=True)}  # fmt: skip


def measure(
    server: Serving, pool: ProcessPoolExecutor, streams: int, seconds: float, chunk_ms: int,
    turns: Sequence[np.ndarray], core: int,
) -> dict[str, Any]:  # fmt: skip
    """The row of one trial, without what all trials of a server have in common."""
    begin = time.monotonic() + 2.0 + 0.02 * streams  # all can connect before
    phases = np.random.default_rng(streams).uniform(0.0, 1.0, streams)  # people do not begin together
    load = Load(server.url, list(begin + phases), seconds, chunk_ms, turns)
    parts = [range(streams)[part::MOST_PROCESSES] for part in range(min(streams, MOST_PROCESSES))]
    futures = [pool.submit(run_clients, load, part, core) for part in parts]
    time.sleep(max(0.0, begin + 1.0 - time.monotonic()))  # all speak
    cpu, start, resident = server.cpu_seconds, time.monotonic(), 0.0
    while time.monotonic() < begin + seconds:
        time.sleep(0.25)
        resident = max(resident, server.resident_mb)
    share = (server.cpu_seconds - cpu) / (time.monotonic() - start)
    heard = Heard()
    for future in futures:
        heard.add(future.result())
    for error in sorted(set(heard.errors)):
        logging.warning("%d of %d streams: %s", heard.errors.count(error), streams, error)
    while json.load(urllib.request.urlopen(f"{server.url}/ready"))["streams"]:
        time.sleep(0.1)
    return {
        "streams": streams, **percentiles("partial_lag", heard.lags), **percentiles("final", heard.finals),
        "errors": len(heard.errors), "cpu_share": round(share, 3), "rss_mb": round(resident, 1),
        "client_late_ms_p99": percentiles("late", heard.late)["late_ms_p99"], "num_chunks": len(heard.lags),
        "num_finals": len(heard.finals),
    }  # fmt: skip


def next_streams(rows: Sequence[dict[str, Any]], limit_ms: float) -> int | None:
    """The number of streams to try next; None when the largest is known to a sixteenth."""
    good = {row["streams"]: row["cpu_share"] for row in rows if is_good(row, limit_ms)}
    bad = [row["streams"] for row in rows if not is_good(row, limit_ms)]
    most, least = max(good, default=0), min(bad, default=None)
    if least is None:  # by its share of the core, a little less than would fit; a busy core carries more than it seems
        return max(most + 1, 5 * most // 4, min(4 * most, int(0.9 * most / max(good[most], 1e-3)))) if good else 1
    return None if least - most <= max(1, most // 16) else (most + least) // 2


def is_good(row: dict[str, Any], limit_ms: float) -> bool:
    return not row["errors"] and row["partial_lag_ms_p95"] is not None and row["partial_lag_ms_p95"] < limit_ms


def trials(options: argparse.Namespace, server: Serving, chunk_ms: int, turns: Sequence[np.ndarray]) -> Iterator[dict]:
    """A row for each trial of this server, as they are measured."""
    with ProcessPoolExecutor(MOST_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        wait([pool.submit(time.sleep, 1.0) for _ in range(MOST_PROCESSES)])  # until all processes are there
        rows: list[dict[str, Any]] = []
        asked = iter(options.streams) if options.streams else None
        while (streams := next(asked, None) if asked else next_streams(rows, options.limit_ms)) is not None:
            row = measure(server, pool, streams, options.seconds, chunk_ms, turns, options.client_core)
            rows.append(row)
            yield row


def read_turns(paths: Sequence[Path], limit: int = 64, seconds: float = TURN_SECONDS) -> list[np.ndarray]:
    """Recordings joined to (num_samples,) int16 turns of at least `seconds`, with pauses of 0.4 s between."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [file for file in files if file in paths or file.suffix.lower() in (".wav", ".flac")]
    if not files:
        raise ConfigError("--wav: no .wav or .flac there")
    pause, turns, parts = np.zeros(round(0.4 * RATE), np.float32), [], []
    for file in files:
        parts += [read_audio(file, RATE)[0], pause]
        if sum(map(len, parts)) >= seconds * RATE or file == files[-1]:
            turns.append(np.round(32767 * np.clip(np.concatenate(parts), -1, 1)).astype(np.int16))
            parts = []
        if len(turns) == limit:
            break
    return turns


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", type=Path, nargs="+", default=[], metavar="DIR", help="model directories: torch")
    parser.add_argument("--onnx-dir", type=Path, nargs="+", default=[], metavar="DIR", help="exported folders: onnx")
    parser.add_argument("--int8", action="store_true", help="the exported folders in 8 bits, too")
    parser.add_argument("--wav", type=Path, nargs="+", required=True, metavar="PATH", help="recordings or folders")
    parser.add_argument("--mode", nargs="+", default=["two_pass"], metavar="MODE", help="of serve (default two_pass)")
    parser.add_argument("--streams", type=int, nargs="+", metavar="N", help="try these only (default: find the most)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="a trial takes (default 30)")
    parser.add_argument("--limit-ms", type=float, default=400.0, metavar="MS", help="of the 95th percentile (400)")
    parser.add_argument("--server-core", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--client-core", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, after each trial")
    arguments = parser.parse_args()
    if not arguments.exp_dir and not arguments.onnx_dir:
        raise ConfigError("--exp-dir or --onnx-dir: name a model")
    cores = os.sched_getaffinity(0)
    if arguments.server_core == arguments.client_core or not {arguments.server_core, arguments.client_core} <= cores:
        raise ConfigError(f"--server-core and --client-core must be two of this machine's cores {sorted(cores)}")
    if arguments.streams and min(arguments.streams) < 1:
        raise ConfigError(f"--streams must be at least 1, got {min(arguments.streams)}")
    return arguments


def servers(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[object], int]]:
    """What rows of a server have in common, its options, its chunk in ms."""
    for mode in arguments.mode:
        shared = {"mode": mode, "engine": "torch", "precision": "float32", "chunk_ms": 320}
        for folder in arguments.exp_dir:
            yield {"model": folder.resolve().name, **shared}, ["--exp-dir", folder, "--mode", mode], 320
        for folder, precision in itertools.product(arguments.onnx_dir, ("float32", "int8")[: 1 + arguments.int8]):
            metadata = json.loads((folder / "export.json").read_text(encoding="utf-8"))
            shared = {"mode": mode, "engine": "onnx", "precision": precision, "chunk_ms": metadata["chunk_ms"]}
            options = ["--onnx-dir", folder, "--mode", mode, *(["--int8"] if precision == "int8" else [])]
            yield {"model": folder.resolve().name, **shared}, options, metadata["chunk_ms"]


def write(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    arguments = parse_arguments()
    turns = read_turns(arguments.wav)
    source = {
        "packet_ms": PACKET_MS, "seconds": arguments.seconds, "limit_ms": arguments.limit_ms, "commit": git_commit(),
        "command": command_line(), "machine": machine(),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for shared, options, chunk_ms in servers(arguments):
        first = len(rows)
        with serving(*options, "--device", "cpu", "--max-streams", 100000, core=arguments.server_core) as server:
            for row in trials(arguments, server, chunk_ms, turns):
                rows.append({**shared, **row, "largest": False, **source})
                logging.info(LINE, rows[-1])
                if row["client_late_ms_p99"] > LATE_MS:
                    logging.warning("the clients were late by %s ms: this machine is busy", row["client_late_ms_p99"])
                write(rows, arguments.json)
        good = [row for row in rows[first:] if is_good(row, arguments.limit_ms)]
        if good and not arguments.streams:
            max(good, key=lambda row: row["streams"])["largest"] = True
            write(rows, arguments.json)


if __name__ == "__main__":
    run_program(main)
