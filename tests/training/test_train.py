"""The training program from outside: what it writes, how it resumes, what it says to mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from cascade.checkpoint import load_file, load_model
from tests.training.conftest import OPTIONS, run


def same_weights(one, other):
    one, other = load_file(one)["model"], load_file(other)["model"]
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A finished teacher with an LSTM predictor."""
    exp_dir = tmp_path_factory.mktemp("finished") / "teacher"
    run("train", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", exp_dir, "--threads", 1,
        *OPTIONS, "model.predictor.kind=lstm", "model.causal.num_layers=2")
    return exp_dir


def test_a_model_directory_is_self_contained(finished, corpus):
    model, config, tokenizer = load_model(finished)
    assert not model.training and tokenizer.vocab_size == model.vocab_size
    assert config.model.predictor.kind == "lstm"
    mean = torch.load(corpus / "fbank" / "stats.pt", weights_only=True)["mean"]
    assert torch.equal(model.encoder.feature_mean, mean)
    summary = json.loads((finished / "train_summary.json").read_text())
    assert summary["seed"] == 42 and summary["num_params"] > 0 and summary["command"].startswith("python -m cascade")
    rows = [json.loads(line) for line in (finished / "losses.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "dev"}
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert list((finished / "tensorboard").iterdir())


def test_the_final_model_is_the_mean_of_the_last_epochs(finished):
    epochs = [load_file(finished / f"epoch-{number}.pt")["model"] for number in (1, 2)]
    final = load_file(finished / "averaged.pt")["model"]
    for name, tensor in final.items():
        assert torch.allclose(tensor, (epochs[0][name] + epochs[1][name]) / 2, atol=1e-7)
    assert "predictor.embedding.weight" in final


@pytest.mark.parametrize("student", [False, True])
def test_a_run_stopped_by_a_signal_ends_with_the_same_bits(student, finished, corpus, train, tmp_path):
    options = ["distillation.weight=2", "--teacher", finished] if student else []
    train(tmp_path / "whole", *options, "training.num_epochs=4")
    command = [
        sys.executable, "-m", "cascade.bin.train", "--data", corpus / "fbank", "--tokens", corpus / "tokens",
        "--exp-dir", tmp_path / "stopped", "--threads", "1", *OPTIONS, *options, "training.num_epochs=4",
    ]
    losses = tmp_path / "stopped" / "losses.jsonl"
    codes = []
    for stop in (True, True, False):
        written = losses.stat().st_size if losses.is_file() else 0
        process = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
        while stop and process.poll() is None and (not losses.is_file() or losses.stat().st_size <= written):
            time.sleep(0.002)
        if stop:
            process.send_signal(signal.SIGTERM)
        codes.append(process.wait(timeout=120))
    assert codes == [75, 75, 0]
    assert same_weights(tmp_path / "whole" / "averaged.pt", tmp_path / "stopped" / "averaged.pt")
    steps = [[json.loads(line)["step"] for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()]
             for name in ("whole", "stopped")]
    assert steps[0] == steps[1]


def test_a_killed_run_goes_on_from_its_last_checkpoint(train, tmp_path):
    train(tmp_path / "whole", "training.save_every_minutes=0")
    train(tmp_path / "killed", "training.save_every_minutes=0")
    # What a kill in the middle leaves: no final model, and log rows newer than the checkpoint.
    exp_dir = tmp_path / "killed"
    (exp_dir / "averaged.pt").unlink()
    (exp_dir / "checkpoint.pt.partial").write_bytes(b"half a file")
    with open(exp_dir / "losses.jsonl", "a") as file:
        file.write(json.dumps({"step": 10**6, "epoch": 9, "split": "train", "loss": 1.0}) + "\n" + '{"step": 10000')
    train(exp_dir, "training.save_every_minutes=0")
    assert same_weights(tmp_path / "whole" / "averaged.pt", exp_dir / "averaged.pt")
    assert "1000" not in (exp_dir / "losses.jsonl").read_text()


def test_a_finished_run_keeps_what_it_says_of_itself(train, tmp_path):
    train(tmp_path / "model")
    files = [path for path in (tmp_path / "model").iterdir() if path.suffix in (".json", ".pt")]
    before = {path.name: path.read_bytes() for path in files}
    assert "finished already" in train(tmp_path / "model").stderr
    assert before == {name: (tmp_path / "model" / name).read_bytes() for name in before}


def test_other_options_start_over_and_keep_the_earlier_run(finished, train, tmp_path):
    exp_dir = tmp_path / "model"
    train(exp_dir)
    first = (exp_dir / "averaged.pt").read_bytes()
    done = train(exp_dir, "training.learning_rate=5e-4")
    assert "starting over" in done.stderr
    assert (tmp_path / "model.previous" / "averaged.pt").read_bytes() == first
    assert not same_weights(exp_dir / "averaged.pt", tmp_path / "model.previous" / "averaged.pt")


def test_distillation_starts_from_the_teacher_and_logs_its_loss(finished, train, tmp_path):
    done = train(tmp_path / "student", "distillation.weight=2", "--teacher", finished)
    assert "causal encoder: copied from the teacher, layers 1" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "student" / "losses.jsonl").read_text().splitlines()]
    assert all("causal_kd" in row and "noncausal_kd" in row for row in rows)


@pytest.mark.parametrize(("words", "message", "code"), [
    (["distillation.weight=1"], "--teacher DIR", 2),
    (["--teacher", "nowhere"], "only with a distillation section", 2),
    (["--teacher", "nowhere", "distillation.weight=1"], "holds no finished model", 1),
    (["model.causal.nlayers=3"], "nlayers", 2),
    (["--config", "missing.yaml"], "config file not found: missing.yaml", 2),
])
def test_mistakes_get_one_sentence(train, tmp_path, words, message, code):
    done = train(tmp_path / "model", *words, check=False)
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr


def test_two_processes_train_what_one_trains(train, corpus, tmp_path):
    options = [
        "training.num_epochs=1", "training.average_last=1", "model.causal.dropout=0", "model.noncausal.dropout=0",
        "model.predictor.dropout=0", "data.batch_duration=100", "data.num_buckets=1",
    ]
    train(tmp_path / "one", *options)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", "-m",
        "cascade.bin.train", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", tmp_path / "two",
        "--threads", "1", *OPTIONS, *options,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "averaged.pt")["model"] for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-5), name
