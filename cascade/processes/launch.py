"""Several processes on this machine that train one model, started by the training program itself.

On CPUs, two processes of one thread each get through more speech than one process with two threads. On several machines
torchrun starts them.

A worker that ends takes the others with it within seconds. One that stands still without ending (SIGSTOP, a frozen
container, a swapping machine) is told from its heartbeat, which a thread of it sends every second: after
CASCADE_RANK_TIMEOUT seconds without one (45; 0: never, for debuggers) all are ended. The thread keeps beating where a
worker computes, writes or waits, however long; that one waits for ever is only noticed by the others' collectives
(`group.group_timeout`).
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

from cascade.config.options import ConfigError
from cascade.processes.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PEER_LOST
from cascade.processes.signals import catching

PATIENCE_S = 2.0  # for the others to fail by themselves, as they do when all miss the same file
PR_SET_PDEATHSIG = 1  # of Linux' prctl
_PIPE = "CASCADE_WORKER"
_BEAT_S = 1.0
_LOOK_S = 0.05


def seconds_from_environment(name: str, default: float) -> float:
    """
    Raises:
      ConfigError: the variable is not a number of seconds.
    """
    text = os.environ.get(name) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"the environment's {name} must be a number of seconds, got {text!r}")
    return seconds


def is_worker() -> bool:
    """True in a process that `run_workers` started."""
    return _PIPE in os.environ


def check_count(count: int) -> None:
    """
    Raises:
      ConfigError: not a positive number, or torchrun has started this process already.
    """
    if count < 1:
        raise ConfigError(f"--num-processes must be at least 1, got {count}")
    if count > 1 and "WORLD_SIZE" in os.environ and not is_worker():
        raise ConfigError("--num-processes is not for torchrun, which starts the processes itself: leave it out")


def start_heartbeat() -> None:
    """Tell `run_workers`, of which this process is a worker, every second that it runs, until it begins to exit."""
    pipe, exiting = int(os.environ[_PIPE]), threading.Event()

    def beat() -> None:
        with open(pipe, "wb", buffering=0) as beats:
            while not exiting.wait(_BEAT_S):
                beats.write(b".")

    def stop() -> None:  # Python stops its threads before it clears up, which may take long
        exiting.set()
        thread.join(_BEAT_S)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    atexit.register(stop)


class Worker:
    """One rank as its launcher sees it."""

    def __init__(self, command: list[str], environment: dict[str, str], stderr: IO[str] | None) -> None:
        self._pulse, pipe = os.pipe()
        os.set_blocking(self._pulse, False)
        libc = ctypes.CDLL(None)
        self.process = subprocess.Popen(
            command, env={**environment, _PIPE: str(pipe)}, pass_fds=(pipe,), start_new_session=True,
            stdin=subprocess.DEVNULL, stderr=stderr,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # it ends with its parent
        )
        os.close(pipe)
        self.code: int | None = None
        self.silence_s: float | None = None
        """Since the last heartbeat; None before the first one and when the worker exits."""

    def look(self, seconds: float) -> None:
        """Take in what happened in the last `seconds`: heartbeats, the end."""
        try:
            self.silence_s = 0.0 if os.read(self._pulse, 4096) else None
        except BlockingIOError:
            if self.silence_s is not None:
                self.silence_s += seconds
        if self.code is None:
            self.code = self.process.poll()

    def end(self) -> None:
        """Kill it, unless it has ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            self.code = EXIT_PEER_LOST


def run_workers(count: int, program: Sequence[str] = ("-m", "cascade.bin.train")) -> int:
    """Run `program` `count` times with the words of this command, as the ranks of one training.

    Returns the exit code to end with.

    Signals are passed on, so that the workers save and stop together (75). When one fails or stands still the others
    are ended. Rank 0 writes to stderr; what the others had to say follows at the end, unless rank 0 failed by itself,
    whose exit code is then that of all.

    Raises:
      ConfigError: CASCADE_RANK_TIMEOUT is not a number.
    """
    limit = seconds_from_environment("CASCADE_RANK_TIMEOUT", 45) or float("inf")
    wanted: list[int] = []
    passed_on: set[int] = set()
    failed_s, looked, silent = 0.0, time.monotonic(), ""
    with catching(wanted.append), tempfile.TemporaryFile("w+") as others:
        workers = _start(count, program, others)
        while any(worker.code is None for worker in workers):
            for number in wanted[:]:
                wanted.remove(number)
                passed_on.add(number)
                for worker in workers:
                    worker.process.send_signal(number)
            time.sleep(_LOOK_S)
            looked, before = time.monotonic(), looked
            seconds = min(looked - before, _BEAT_S)  # this process itself may have been stopped in between
            for rank, worker in enumerate(workers):
                worker.look(seconds)
                if worker.code is not None and -worker.code in passed_on:
                    worker.code = EXIT_INTERRUPTED  # it had not begun to train: nothing is lost
                if worker.code is None and (worker.silence_s or 0) > limit:
                    silent = f"training process {rank} (id {worker.process.pid}) has not answered for {limit:g} s"
            if any(worker.code not in (None, 0, EXIT_INTERRUPTED) for worker in workers):
                failed_s += seconds
            if silent or failed_s > PATIENCE_S:
                for worker in workers:
                    worker.end()
        codes = [worker.code for worker in workers]
        if codes[0] in (0, EXIT_INTERRUPTED, EXIT_PEER_LOST):
            others.seek(0)
            sys.stderr.writelines(line for line in others if not line.startswith("interrupted:"))  # rank 0 says so
    for code in set(codes):
        if code < 0:
            print(f"error: a training process was ended by {signal.Signals(-code).name}", file=sys.stderr)
    if silent:
        print(
            f"error: {silent}, it is stopped or the machine is too busy: all are ended; run the same command again to "
            "go on from the last checkpoint", file=sys.stderr,
        )
        return EXIT_FAILED
    if set(codes) <= {0, EXIT_INTERRUPTED} | ({EXIT_PEER_LOST} if passed_on else set()):
        return EXIT_INTERRUPTED if any(codes) else 0
    return codes[0] if codes[0] > 0 and codes[0] not in (EXIT_INTERRUPTED, EXIT_PEER_LOST) else EXIT_FAILED


def _start(count: int, program: Sequence[str], others: IO[str]) -> list[Worker]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    environment = {
        "OMP_NUM_THREADS": str(threads), **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
    }
    command = [sys.executable, *program, *sys.argv[1:]]
    return [
        Worker(command, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, others if rank else None)
        for rank in range(count)
    ]
