"""--num-processes: workers that save and stop together, and end together when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cascade.checkpoint import load_file
from cascade.processes import launch as launching
from tests.training.conftest import OPTIONS
from tests.training.test_step import NO_DROPOUT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def launch(corpus):
    """launch(exp_dir, *words): the training program with two processes, as a process of its own."""
    started = []

    def call(exp_dir, *words) -> subprocess.Popen:
        command = [sys.executable, "-m", "cascade.bin.train", "--data", corpus / "fbank", "--tokens", corpus / "tokens"]
        command += ["--exp-dir", exp_dir, "--num-processes", "2", *OPTIONS, *words]
        environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
        started.append(subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also where nohup started the tests
            start_new_session=True,
        ))
        return started[-1]

    yield call
    for process in started:
        process.kill()


def workers_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the children, in the order of their ranks."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, text.split()))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90  # on a machine that does much else
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.slow
def test_processes_stop_together_at_a_signal_and_end_with_the_same_bits(launch, tmp_path):
    whole = launch(tmp_path / "whole", "training.num_epochs=3")
    stopped = launch(tmp_path / "stopped", "training.num_epochs=3")
    wait_for(tmp_path / "stopped" / "epoch-1.pt", stopped)
    os.killpg(stopped.pid, signal.SIGTERM)  # as a job scheduler does
    errors = stopped.communicate(timeout=90)[1]
    if stopped.returncode == 75:
        assert errors.count("interrupted: training state is saved") == 1, errors
        errors += launch(tmp_path / "stopped", "training.num_epochs=3").communicate(timeout=90)[1]
        assert "resuming in epoch" in errors
    assert whole.communicate(timeout=90)[1].count("parameters: total") == 1
    models = [load_file(tmp_path / name / "averaged.pt")["model"] for name in ("whole", "stopped")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_is_told(launch, tmp_path):
    process = launch(tmp_path, "training.num_epochs=500")
    wait_for(tmp_path / "epoch-1.pt", process)
    workers = workers_of(process)
    os.kill(workers[1], signal.SIGKILL)
    errors = process.communicate(timeout=90)[1]
    assert process.returncode == 1 and errors.endswith("error: a training process was ended by SIGKILL\n")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_ends_the_others_and_is_named(launch, tmp_path, monkeypatch, rank):
    monkeypatch.setenv("CASCADE_RANK_TIMEOUT", "12")
    process = launch(tmp_path, "training.num_epochs=500")
    wait_for(tmp_path / "epoch-1.pt", process)
    workers = workers_of(process)
    os.kill(workers[rank], signal.SIGSTOP)
    errors = process.communicate(timeout=90)[1]
    assert process.returncode == 1, errors
    said = f"error: training process {rank} (id {workers[rank]}) has not answered for 12 s"
    assert errors.splitlines()[-1].startswith(said) and "ended by SIGKILL" not in errors
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.slow
def test_a_launcher_that_was_stopped_itself_suspects_nobody(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("CASCADE_RANK_TIMEOUT", "12")
    process = launch(tmp_path, "training.num_epochs=500")
    wait_for(tmp_path / "epoch-1.pt", process)
    everyone = [process.pid, *workers_of(process)]
    for number in (signal.SIGSTOP, signal.SIGCONT):  # as a scheduler that suspends a job
        for pid in everyone:
            os.kill(pid, number)
        time.sleep(16)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=90)[1]
    assert process.returncode == 75, errors


@pytest.mark.slow
def test_a_second_training_of_several_processes_is_refused(launch, tmp_path):
    first = launch(tmp_path / "model", "training.num_epochs=500")
    wait_for(tmp_path / "model" / "epoch-1.pt", first)
    second = launch(tmp_path / "model", "training.num_epochs=500", "--force")
    errors = second.communicate(timeout=90)[1]
    said = f"error: a training is running in {tmp_path / 'model'} (process {workers_of(first)[0]}): wait for it or "
    said += "end it"
    assert second.returncode == 1 and errors.splitlines()[-1] == said and "Traceback" not in errors, errors
    assert first.poll() is None and sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


def test_a_limit_that_is_no_number_is_told(train, tmp_path, monkeypatch):
    monkeypatch.setenv("CASCADE_RANK_TIMEOUT", "soon")
    done = train(tmp_path, "--num-processes", 2, check=False)
    assert done.returncode == 2 and "CASCADE_RANK_TIMEOUT must be a number of seconds, got 'soon'" in done.stderr


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(launch, tmp_path):
    process = launch(tmp_path, "training.num_epochs=500")
    wait_for(tmp_path / "epoch-1.pt", process)
    workers = workers_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_told_once(launch, tmp_path):
    process = launch(tmp_path, "--tokens", tmp_path.with_name("nowhere"))
    errors = process.communicate(timeout=90)[1]
    assert process.returncode == 1 and errors.startswith("error: ") and errors.count("\n") == 1, errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_training_begins_is_an_interruption(launch, tmp_path, number):
    process = launch(tmp_path)
    deadline = time.monotonic() + 60
    while len(workers_of(process)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate(timeout=90)[1]
    assert process.returncode == 75 and "Traceback" not in errors, errors


@pytest.mark.parametrize(("ends", "code"), [
    (("sys.exit(2)", "sys.exit(70)"), 2),  # its own mistake, as one process would tell it
    (("sys.exit(1)", "sys.exit(2)"), 1),
    (("sys.exit(70)", "sys.exit(2)"), 1),
    (("os.kill(os.getpid(), 9)", "sys.exit(70)"), 1),
    (("sys.exit(75)", "sys.exit(0)"), 75),
    (("sys.exit(0)", "sys.exit(0)"), 0),
])
def test_the_exit_code_is_that_of_the_first_process_when_it_failed_by_itself(monkeypatch, ends, code):
    def start(count, program, others):
        return [
            launching.Worker([sys.executable, "-S", "-c", f"import os, sys; {end}"], {}, others) for end in ends
        ]

    monkeypatch.setattr(launching, "_start", start)
    assert launching.run_workers(2) == code


def test_torchrun_starts_its_processes_itself(train, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = train(tmp_path, "--num-processes", 2, check=False)
    assert done.returncode == 2 and "--num-processes is not for torchrun" in done.stderr
    monkeypatch.delenv("WORLD_SIZE")
    done = train(tmp_path, "--num-processes", 0, check=False)
    assert done.returncode == 2 and "--num-processes must be at least 1, got 0" in done.stderr
    done = train(tmp_path, "--num-processes", 2, "--dry-run", check=False)
    assert done.returncode == 2 and "--dry-run measures one process" in done.stderr


@pytest.mark.slow
def test_two_machines_that_meet_at_a_rendezvous_train_what_one_process_trains(train, corpus, tmp_path):
    options = [
        *NO_DROPOUT, "training.num_epochs=1", "training.average_last=1", "data.batch_duration=100",
        "data.num_buckets=1", "training.optimizer=muon",
    ]
    train(tmp_path / "one", *options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "test",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "cascade.bin.train", "--data",
        corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", tmp_path / "two", "--threads", "1", *OPTIONS,
        *options,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    machines = [
        subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    errors = [machine.communicate(timeout=90)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    one, two = (load_file(tmp_path / name / "averaged.pt")["model"] for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-5), name
