"""Parts of a job in several processes: each part is whole or absent, and Ctrl-C ends them all."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from cascade.processes.signals import ignore_signals
from cascade.threads import limit_threads


class Stopped(Exception):
    """The parent was interrupted: the part is dropped."""


_stop_event = None  # set in worker processes


def check_stopped() -> None:
    """Raise in a process whose parent was interrupted; the work on a part calls it every second or so.

    Raises:
      Stopped: the parent was interrupted.
    """
    if _stop_event is not None and _stop_event.is_set():
        raise Stopped


def compute_parts(
    work: Callable[[Any], Any], parts: Iterator[Any], num_jobs: int, *, fresh: bool = False
) -> Iterator[Any]:
    """Yield what `work` returns for each part, as it is done; only two parts per process are in memory at a time.

    Args:
      work: a function of a module, which processes can import.
      parts: what it takes, one after the other; can be pickled.
      num_jobs: processes; below 2 this one computes.
      fresh: every part has a process of its own, however many at a time, because what `work` uses keeps state.
    Raises:
      OSError: a process was killed.
    """
    if num_jobs < 2 and not fresh:
        yield from map(work, parts)
        return
    # Not by fork: a copy of a process that has run torch may hang.
    context = multiprocessing.get_context("forkserver" if fresh else "spawn")
    if fresh:
        context.set_forkserver_preload([__name__])  # torch takes seconds to import: once for all processes
    stop = context.Event()
    with ProcessPoolExecutor(
        num_jobs, mp_context=context, initializer=_start_worker, initargs=(stop,),
        max_tasks_per_child=1 if fresh else None,
    ) as pool:
        running: set[Future] = set()
        try:
            while True:
                running |= {pool.submit(work, part) for part in islice(parts, 2 * num_jobs - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            for child in multiprocessing.active_children():  # Python 3.12 sends SIGTERM, which workers ignore
                child.kill()
            advice = "" if fresh else ": run again with --num-jobs 1"
            raise OSError("a process was killed, perhaps for lack of memory" + advice) from error
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(stop) -> None:
    global _stop_event
    _stop_event = stop
    limit_threads(1)
    ignore_signals()
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
