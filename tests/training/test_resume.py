"""A run that was ended at any moment, politely or not, comes to the same weights, bit for bit."""

import json
import os
import resource
import signal
import time

import pytest
import torch

from cascade.checkpoint import load_file, save_file
from cascade.training.step import Stepper
from tests.training.conftest import OPTIONS, Fork, run
from tests.training.test_train import same_weights

RUN = ["training.num_epochs=3", "training.save_every_minutes=0", "training.optimizer=muon", "training.max_bad_steps=2"]


def words(corpus, exp_dir, *options):
    inputs = ["--data", corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", exp_dir, "--threads", 1]
    return ["train", *inputs, *OPTIONS, *RUN, *options]


@pytest.fixture(scope="module")
def wholes(corpus, trained, tmp_path_factory):
    """{kind of run: (one that was never stopped, its options)}"""
    folder = tmp_path_factory.mktemp("whole")
    options = {
        "alone": [], "student": ["distillation.weight=2", "--teacher", trained],
        "mwer": ["mwer.nbest=4", "--init-from", trained],
    }
    for kind, extra in options.items():
        run(*words(corpus, folder / kind, *extra))
    return {kind: (folder / kind, extra) for kind, extra in options.items()}


@pytest.mark.parametrize("kind", ["alone", "student", "mwer"])
def test_a_run_stopped_by_signals_ends_with_the_same_bits_and_log(kind, wholes, corpus, tmp_path):
    whole, options = wholes[kind]
    losses, codes = tmp_path / "stopped" / "losses.jsonl", []
    for stop in (True, True, False):
        written = losses.stat().st_size if losses.is_file() else 0
        child = Fork(*words(corpus, tmp_path / "stopped", *options))
        if stop:
            deadline = time.monotonic() + 60
            while not losses.is_file() or losses.stat().st_size <= written:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            os.kill(child.pid, signal.SIGTERM)
        done = child.wait()
        codes.append(done.returncode)
    assert codes == [75, 75, 0], done.stderr
    assert same_weights(whole / "averaged.pt", tmp_path / "stopped" / "averaged.pt")
    rows = [(folder / "losses.jsonl").read_text() for folder in (whole, tmp_path / "stopped")]
    assert rows[0] == rows[1]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step(patch):
    real = Stepper.__call__
    patch.setattr(Stepper, "__call__", lambda self, batch, step, rate: kill() if step == 5 else real(
        self, batch, step, rate))


def half_way_through_a_checkpoint(patch):
    real, calls = torch.save, []

    def half(values, file):
        calls.append(1)
        if len(calls) < 4:
            return real(values, file)
        file.write(b"PK\x03\x04" + bytes(5000))
        file.flush()
        kill()

    patch.setattr(torch, "save", half)


def between_the_names_of_a_checkpoint(patch):
    real = os.replace

    def replace(source, target):
        real(source, target)
        if str(target).endswith("checkpoint-previous.pt") and load_file(target)["state"]["step"] == 4:
            kill()

    patch.setattr(os, "replace", replace)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("moment", [in_a_step, half_way_through_a_checkpoint, between_the_names_of_a_checkpoint])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(moment, num_workers, wholes, corpus, tmp_path):
    whole, command = wholes["alone"][0], words(corpus, tmp_path / "killed", f"data.num_workers={num_workers}")
    with pytest.MonkeyPatch.context() as patch:
        assert Fork(*command, before=lambda: moment(patch)).wait().returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "averaged.pt").exists()
    done = run(*command)
    assert "resuming in epoch" in done.stderr
    assert same_weights(whole / "averaged.pt", tmp_path / "killed" / "averaged.pt")
    rows = [json.loads(line) for line in (tmp_path / "killed" / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_a_run_killed_before_its_final_model_still_writes_its_summary(wholes, corpus, tmp_path):
    def kill_at_the_end(patch):
        patch.setattr("cascade.training.trainer.save_file", lambda values, path: kill()
                      if path.name == "averaged.pt" else save_file(values, path))

    command = words(corpus, tmp_path / "killed")
    with pytest.MonkeyPatch.context() as patch:
        assert Fork(*command, before=lambda: kill_at_the_end(patch)).wait().returncode == -signal.SIGKILL
    run(*command)
    assert same_weights(wholes["alone"][0] / "averaged.pt", tmp_path / "killed" / "averaged.pt")
    assert (tmp_path / "killed" / "train_summary.json").is_file()


def test_a_signal_to_the_whole_group_lets_the_training_save_before_its_loaders_end(corpus, tmp_path):
    child = Fork(*words(corpus, tmp_path / "model", "data.num_workers=2", "training.num_epochs=200"),
                 before=lambda: os.setpgid(0, 0))
    losses, deadline = tmp_path / "model" / "losses.jsonl", time.monotonic() + 60
    while not losses.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGTERM)
    done = child.wait()
    assert done.returncode == 75 and "Traceback" not in done.stderr, done.stderr


def test_log_rows_beyond_the_checkpoint_are_dropped(wholes, corpus, tmp_path):
    run(*words(corpus, tmp_path / "model"))
    (tmp_path / "model" / "averaged.pt").unlink()
    with open(tmp_path / "model" / "losses.jsonl", "a") as file:
        file.write(json.dumps({"step": 10**6, "epoch": 9, "split": "train", "loss": 1.0}) + "\n" + '{"step": 10000')
    run(*words(corpus, tmp_path / "model"))
    assert same_weights(wholes["alone"][0] / "averaged.pt", tmp_path / "model" / "averaged.pt")
    assert "1000" not in (tmp_path / "model" / "losses.jsonl").read_text()


def test_a_folder_that_cannot_be_written_is_one_sentence(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*words(corpus, tmp_path / "file" / "model"), check=False)
    assert done.returncode == 1 and str(tmp_path / "file") in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("num_bytes", [100, 1500, 20_000])
def test_a_disk_that_fills_ends_the_run_with_one_sentence_and_it_goes_on_when_there_is_room(
    num_bytes, wholes, corpus, tmp_path
):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    done = Fork(*words(corpus, tmp_path / "model"), before=fill).wait()
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("error: ") and "File too large" in last and str(tmp_path) in last, last
    run(*words(corpus, tmp_path / "model"))
    assert same_weights(wholes["alone"][0] / "averaged.pt", tmp_path / "model" / "averaged.pt")
