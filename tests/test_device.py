"""--device: what is chosen where, the sentences that refuse, what programs write; that models run on a GPU, if any."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import cascade.device
from cascade import nvidia
from cascade.bin import align, decode, export_onnx, latency, transcribe
from cascade.config.options import ConfigError
from cascade.device import CHOICES, choose_device, describe_device
from cascade.processes import group
from cascade.processes.group import Processes
from tests.tiny_run import call
from tools import check_long_audio

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture
def gpus(monkeypatch):
    """gpus(usable, present=True): so many GPUs that torch can use; present: the machine has one."""

    def pretend(usable: int, present: bool = True, build: str | None = "13.0") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(cascade.device, "has_nvidia_gpu", lambda: present)

    return pretend


@pytest.mark.parametrize(("choice", "usable", "present", "expected"), [
    ("auto", 0, False, "cpu"), ("auto", 1, True, "cuda:0"), ("cpu", 1, True, "cpu"), ("cpu", 0, True, "cpu"),
    ("cuda", 2, True, "cuda:0"), ("cpu", 0, False, "cpu"),
])
def test_auto_is_the_gpu_where_torch_can_use_one_and_the_others_are_what_they_say(
    gpus, choice, usable, present, expected
):
    gpus(usable, present)
    assert choose_device(choice) == torch.device(expected)


def test_each_process_has_its_own_gpu(gpus):
    gpus(2)
    assert [choose_device("auto", 2, rank) for rank in (0, 1)] == [torch.device("cuda", rank) for rank in (0, 1)]


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_take_the_cpu_silently(gpus, choice):
    gpus(0, build=None)
    with pytest.raises(ValueError, match=r"CPU build.*run tools/setup.sh again on this machine, or .* --device cpu$"):
        choose_device(choice)
    gpus(0, build="12.1")
    with pytest.raises(ValueError, match=r"CUDA 12.1\) cannot use it: its driver is not loaded.* --device cpu$"):
        choose_device(choice)


def test_cuda_without_a_gpu_is_wrong_usage(gpus):
    gpus(0, present=False)
    with pytest.raises(ConfigError, match=r"--device cuda needs an NVIDIA GPU.*--device cpu$"):
        choose_device("cuda")


@pytest.mark.parametrize("choice", ["auto", "cuda"])
@pytest.mark.parametrize(("usable", "words"), [(1, "one GPU is here: start 1,"), (3, "3 GPUs are here: start 3,")])
def test_more_processes_than_gpus_is_wrong_usage(gpus, choice, usable, words):
    gpus(usable)
    with pytest.raises(ConfigError, match=f"4 training processes.* {words} .*--device cpu$"):
        choose_device(choice, 4)
    assert choose_device("cpu", 4).type == "cpu"


@pytest.mark.parametrize(("environment", "expected"), [
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 2),  # torchrun, one machine
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 2),  # torchrun, two machines
    ({"WORLD_SIZE": "3", "CASCADE_WORKER": "1", "LOCAL_RANK": "0"}, 3),  # --num-processes
    ({"WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 2),  # started by something else
])
def test_processes_of_this_machine_need_a_gpu_each_before_they_join(gpus, monkeypatch, environment, expected):
    for name, value in {"RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    joined, own = [], []
    monkeypatch.setattr(group.distributed, "init_process_group", lambda name, **_: joined.append(name))
    monkeypatch.setattr(group.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", own.append)
    gpus(expected - 1)
    with pytest.raises(ConfigError, match=f"{expected} training processes on this machine need a GPU each"):
        Processes.from_environment("auto")
    assert joined == own == []
    gpus(expected)
    processes = Processes.from_environment("auto")
    assert processes.device == torch.device("cuda", int(environment["LOCAL_RANK"]))
    assert joined == ["nccl"] and own == [processes.device]
    assert Processes.from_environment("cpu").device.type == "cpu" and joined == ["nccl", "gloo"]


def test_the_driver_or_its_program_shows_a_gpu_and_an_empty_list_of_devices_hides_it(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvidia, "DEV", tmp_path)
    assert not nvidia.has_nvidia_gpu()
    (tmp_path / "nvidiactl").touch()  # there without a GPU, too
    assert not nvidia.has_nvidia_gpu()
    program = tmp_path / "nvidia-smi"
    for text, expected in (("echo 'GPU 0: NVIDIA H100'", True), ("echo no devices; exit 6", False)):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        assert nvidia.has_nvidia_gpu() == expected
    (tmp_path / "nvidia3").touch()  # a container may hold the fourth one alone
    assert nvidia.has_nvidia_gpu()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not nvidia.has_nvidia_gpu()


def test_the_device_is_described_by_its_name(gpus, monkeypatch):
    threads = torch.get_num_threads()
    assert describe_device(torch.device("cpu")).endswith(f", {threads} thread{'s' * (threads > 1)}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 {device.index}")
    assert describe_device(torch.device("cuda", 1)) == "cuda:1, NVIDIA H100 1"


@pytest.mark.parametrize("program", ["decode", "align", "transcribe", "latency", "export_onnx"])
def test_the_device_is_the_first_line_of_the_log(run_dir, tmp_path, monkeypatch, caplog, program):
    manifest = ["--manifest", run_dir / "test.jsonl"]
    words = {
        "decode": [*manifest, "--mode", "full", "--method", "greedy_search", "--out", tmp_path],
        "align": [*manifest, "--out", tmp_path],
        "transcribe": [run_dir / "0.wav"],
        "latency": ["--num-chunks", 2, "--no-memory"],
        "export_onnx": ["--out", tmp_path, "--no-check"],
    }[program]
    caplog.set_level("INFO")
    words = ["--exp-dir", run_dir / "student", "--device", "cpu", *words]
    call(monkeypatch, sys.modules[f"cascade.bin.{program}"], *words)
    assert caplog.messages[0].startswith("device: cpu, ")
    rows = {"decode": tmp_path / "result.json", "align": tmp_path / "alignment.json",
            "latency": run_dir / "student" / "latency.json"}
    if program in rows:
        assert json.loads(rows[program].read_text())["device"] == "cpu"


@pytest.mark.parametrize(("program", "words", "why"), [
    (latency, [], "latency is the compute of CPU threads"),
    (export_onnx, ["--out", "x"], "onnxruntime on the CPU"),
    (check_long_audio, ["--manifest", __file__], "memory of this process"),
    (transcribe, ["x.wav"], "onnxruntime runs exported files on the CPU"),
])
def test_what_runs_on_the_cpu_alone_refuses_cuda_and_takes_the_cpu_by_itself(
    gpus, run_dir, tmp_path, monkeypatch, caplog, program, words, why
):
    gpus(1)
    (tmp_path / "export.json").touch()
    words = [*(["--onnx-dir", tmp_path] if program is transcribe else ["--exp-dir", run_dir / "nowhere"]), *words]
    with pytest.raises(ConfigError, match=f"--device cuda cannot be: .*{why}.*; take --device cpu or leave it out"):
        call(monkeypatch, program, *words, "--device", "cuda")
    caplog.set_level("INFO")
    with pytest.raises((FileNotFoundError, ValueError)):  # nothing is there; the device was chosen before
        call(monkeypatch, program, *words)
    assert caplog.messages[0].startswith("device: cpu, ")


def test_other_devices_are_wrong_usage(run_dir, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, align, "--exp-dir", run_dir / "student", "--manifest", run_dir / "test.jsonl", "--device",
             "gpu", "--out", "x")  # fmt: skip
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--device" in said and all(choice in said for choice in CHOICES)


@needs_gpu
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("mode", ["streaming", "look_ahead", "full"])
@pytest.mark.parametrize("method", ["greedy_search", "modified_beam_search"])
def test_a_gpu_decodes_what_the_cpu_decodes(run_dir, tmp_path, monkeypatch, model, mode, method):
    lines = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        call(monkeypatch, decode, "--exp-dir", run_dir / model, "--manifest", run_dir / "test.jsonl", "--mode", mode,
             "--method", method, "--device", device, "--out", out)  # fmt: skip
        lines[device] = [json.loads(line) for line in (out / "hyps.jsonl").read_text().splitlines()]
        assert json.loads((out / "result.json").read_text())["device"] == device
    for one, other in zip(lines["cpu"], lines["cuda"], strict=True):
        assert (one["tokens"], one["timestamps"]) == (other["tokens"], other["timestamps"])
        assert one["log_probs"] == pytest.approx(other["log_probs"], abs=2e-2)


@needs_gpu
@pytest.mark.parametrize("mode", ["streaming", "look_ahead", "full", "two_pass"])
def test_a_gpu_transcribes_what_the_cpu_transcribes(run_dir, monkeypatch, capsys, mode):
    texts = []
    for device in ("cpu", "cuda"):
        call(monkeypatch, transcribe, "--exp-dir", run_dir / "student", "--mode", mode, "--device", device,
             *(run_dir / f"{number}.wav" for number in range(4)))  # fmt: skip
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0]


@needs_gpu
def test_a_gpu_aligns_as_the_cpu_does(run_dir, tmp_path, monkeypatch):
    ctm = []
    for device in ("cpu", "cuda"):
        call(monkeypatch, align, "--exp-dir", run_dir / "student", "--manifest", run_dir / "test.jsonl", "--device",
             device, "--out", tmp_path / device)  # fmt: skip
        lines = (tmp_path / device / "alignment.ctm").read_text().splitlines()
        ctm.append([line.split()[:5] for line in lines])
    assert ctm[0] == ctm[1]
