"""Parts of a job in several processes."""

import os
import signal

import pytest

from cascade.processes.parts import compute_parts


def number_and_process(number: int) -> tuple[int, int]:
    if number < 0:
        raise ValueError(f"{number} is below zero")
    return number, os.getpid()


@pytest.mark.parametrize(("num_jobs", "fresh"), [(1, False), (2, False), (1, True), (2, True)])
def test_every_part_is_done_once_and_fresh_ones_in_a_process_each(num_jobs, fresh):
    done = list(compute_parts(number_and_process, iter(range(5)), num_jobs, fresh=fresh))
    assert sorted(number for number, _ in done) == [0, 1, 2, 3, 4]
    processes = {process for _, process in done}
    assert len(processes) == 5 if fresh else len(processes) <= num_jobs
    assert (os.getpid() in processes) == (num_jobs == 1 and not fresh)


def kill_own_process(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_killed_process_is_an_error_and_no_hang(fresh):
    with pytest.raises(OSError, match="a process was killed"):
        list(compute_parts(kill_own_process, iter(range(6)), 3, fresh=fresh))


def test_what_a_part_raises_reaches_the_caller():
    with pytest.raises(ValueError, match="-1 is below zero"):
        list(compute_parts(number_and_process, iter((1, -1)), 2, fresh=True))
