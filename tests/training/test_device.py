"""train --device: refused before anything starts, told by log and summary; training on a GPU, where there is one."""

from __future__ import annotations

import json

import pytest
import torch

import cascade.device
from cascade.training import trainer
from cascade.training.trainer import Trainer
from tests.training.conftest import OPTIONS, run


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cascade.device, "has_nvidia_gpu", lambda: False)


@pytest.fixture
def no_workers(monkeypatch):
    def start(count: int) -> int:
        pytest.fail(f"{count} workers were started")

    monkeypatch.setattr("cascade.bin.train.run_workers", start)


@pytest.mark.parametrize("options", [(), ("--device", "auto"), ("--device", "cuda")])
def test_two_processes_on_one_gpu_are_refused_in_one_sentence_before_they_start(
    train, tmp_path, one_gpu, no_workers, options
):
    done = train(tmp_path / "exp", "--num-processes", 2, *options, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: 2 training processes")
    assert done.stderr.count("\n") == 1
    assert "one GPU is here: start 1" in done.stderr and "--device cpu" in done.stderr
    assert not (tmp_path / "exp").exists()


def test_processes_of_torchrun_without_a_gpu_each_are_refused_before_they_join(train, tmp_path, one_gpu, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    done = train(tmp_path / "exp", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: 2 training processes")


def test_a_cpu_build_on_a_machine_with_a_gpu_does_not_train_on_the_cpu_silently(train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cascade.device, "has_nvidia_gpu", lambda: True)
    done = train(tmp_path / "exp", check=False)
    assert done.returncode == 1 and "run tools/setup.sh again on this machine" in done.stderr
    assert not (tmp_path / "exp").exists()
    assert train(tmp_path / "exp", "--device", "cpu", "training.num_epochs=1").returncode == 0


def test_log_begins_with_the_device_and_the_summary_names_it(train, tmp_path):
    train(tmp_path, "--device", "cpu", "training.num_epochs=1")
    first = (tmp_path / "train.log").read_text().splitlines()[0]
    assert " INFO device: cpu, " in first and first.endswith(", 1 thread")
    assert json.loads((tmp_path / "train_summary.json").read_text())["device"] == "cpu"
    done = train(tmp_path / "dry", "--device", "cpu", "--dry-run")
    assert " INFO device: cpu, " in done.stderr.splitlines()[0]


def test_the_summary_has_the_commit_that_was_there_when_training_began(train, tmp_path, monkeypatch):
    trained = tmp_path / "epoch-1.pt"
    monkeypatch.setattr(trainer, "git_commit", lambda: "later" if trained.is_file() else "first")
    train(tmp_path, "training.num_epochs=1")
    assert trained.is_file() and json.loads((tmp_path / "train_summary.json").read_text())["commit"] == "first"


def test_the_largest_batch_is_that_of_the_device_asked_for(corpus, monkeypatch, no_gpu):
    seen = []

    def note(trainer: Trainer) -> None:
        seen.append(trainer.device.type)
        raise ValueError("as far as this test goes")

    monkeypatch.setattr("cascade.bin.max_batch.largest_batch", note)
    words = ["max_batch", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--threads", 1, *OPTIONS]
    done = run(*words, check=False)
    assert " INFO device: cpu, " in done.stderr.splitlines()[0] and seen == ["cpu"]
    done = run(*words, "--device", "cuda", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --device cuda needs an NVIDIA GPU")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("options", [(), ("training.num_epochs=1", "model.predictor.kind=lstm")])
def test_a_gpu_trains_to_the_losses_of_the_cpu(train, tmp_path, options):
    losses = []
    for device in ("cpu", "cuda"):
        train(tmp_path / device, "--device", device, *options)
        assert json.loads((tmp_path / device / "train_summary.json").read_text())["device"] == device
        lines = (tmp_path / device / "losses.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
