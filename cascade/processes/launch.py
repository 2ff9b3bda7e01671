"""Several processes on this machine that train one model, started by the training program itself.

On CPUs, two processes of one thread each get through about one and a half times as much speech as one process with two
threads. torchrun remains the way for several machines.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import FrameType

from cascade.config.options import ConfigError

EXIT_INTERRUPTED = 75
EXIT_PEER_LOST = 70  # of a worker that ends because another one did
PATIENCE_S = 2.0  # for the others to fail by themselves, as they do when all miss the same file
PR_SET_PDEATHSIG = 1  # of Linux' prctl
_MARK = "CASCADE_WORKER"


def is_worker() -> bool:
    """This process was started by `run_workers`."""
    return _MARK in os.environ


def check_count(count: int) -> None:
    """
    Raises:
      ConfigError: not a positive number, or torchrun has started this process already.
    """
    if count < 1:
        raise ConfigError(f"--num-processes must be at least 1, got {count}")
    if count > 1 and "WORLD_SIZE" in os.environ and not is_worker():
        raise ConfigError("--num-processes is not for torchrun, which starts the processes itself: leave it out")


def run_workers(count: int) -> int:
    """Run this very command `count` times, as the ranks of one training; return the exit code to end with.

    SIGINT, SIGTERM and SIGHUP are passed on, so that the workers save and stop together (75). When one fails the others
    are ended. Rank 0 writes to stderr; what the others had to say follows at the end, unless rank 0 failed by itself,
    whose exit code is then that of all.
    """
    wanted: list[int] = []

    passed_on: set[int] = set()

    def remember(number: int, frame: FrameType | None) -> None:
        # A closed terminal asks for the same as a polite kill.
        wanted.append(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
            signal.signal(number, remember)
    with tempfile.TemporaryFile("w+") as others:
        workers = _start(count, others)
        codes: list[int | None] = [None] * count
        failed_at = None
        while None in codes:
            for number in wanted[:]:
                wanted.remove(number)
                passed_on.add(number)
                for rank, worker in enumerate(workers):
                    if codes[rank] is None:
                        worker.send_signal(number)
            codes = [worker.poll() for worker in workers]
            # A worker that has not begun to train ends by the signal itself: nothing is lost.
            codes = [EXIT_INTERRUPTED if code is not None and -code in passed_on else code for code in codes]
            if any(code not in (None, 0, EXIT_INTERRUPTED) for code in codes):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > PATIENCE_S:
                    codes = [EXIT_PEER_LOST if _end(worker) else worker.returncode for worker in workers]
            time.sleep(0.05)
        if codes[0] in (0, EXIT_INTERRUPTED, EXIT_PEER_LOST):
            others.seek(0)
            sys.stderr.writelines(line for line in others if not line.startswith("interrupted:"))  # rank 0 says so
    for code in set(codes):
        if code < 0:
            print(f"error: a training process was ended by {signal.Signals(-code).name}", file=sys.stderr)
    if all(code in (0, EXIT_INTERRUPTED) for code in codes):
        return max(codes)
    return codes[0] if codes[0] > 0 and codes[0] not in (EXIT_INTERRUPTED, EXIT_PEER_LOST) else 1


def _end(worker: subprocess.Popen) -> bool:
    """Kill a worker that still runs; False when it had ended."""
    if worker.poll() is not None:
        return False
    worker.kill()
    worker.wait()
    return True


def _start(count: int, others) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    environment = {
        "OMP_NUM_THREADS": str(threads), **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count), _MARK: "1",
    }
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    command = [sys.executable, "-m", "cascade.bin.train", *sys.argv[1:]]
    return [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True,
            stdin=subprocess.DEVNULL, stderr=None if rank == 0 else others, preexec_fn=end_with_parent,
        ) for rank in range(count)
    ]
