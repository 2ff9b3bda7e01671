"""A second training in one --exp-dir is refused, and nothing that is left of a killed one blocks the next."""

import os
import signal

import pytest

from cascade.training.run_lock import only_training_in


def test_a_second_training_is_refused_in_one_sentence_and_changes_nothing(train, tmp_path):
    exp_dir = tmp_path / "model"
    train(exp_dir)
    with only_training_in(exp_dir):
        for words in ([], ["seed=7"], ["--force"]):
            done = train(exp_dir, *words, check=False)
            assert done.returncode == 1
            said = f"a training is running in {exp_dir} (process {os.getpid()}): wait for it or end it"
            assert done.stderr.splitlines()[-1] == f"error: {said}"
        train(exp_dir, "seed=7", "--dry-run")
        train(tmp_path / "other", "training.num_epochs=1", "training.average_last=1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]
    assert "starting over" in train(exp_dir, "seed=7").stderr


def test_a_process_that_outlives_a_killed_training_does_not_keep_its_lock(tmp_path):
    reader, writer = os.pipe()
    stop, stopper = os.pipe()
    trainer = os.fork()
    if not trainer:
        with only_training_in(tmp_path / "model"):
            if not os.fork():  # a loader
                os.close(stopper)
                os.write(writer, b"x")
                os.read(stop, 1)
                os._exit(0)
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(OSError, match=rf"process {trainer}\)"), only_training_in(tmp_path / "model"):
        pass
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    with only_training_in(tmp_path / "model"):  # the loader is still there
        pass
    os.close(stopper)
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_parent_cannot_be_written_holds_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    (tmp_path / "model").mkdir()
    with only_training_in(tmp_path / "model"):
        assert [path.name for path in (tmp_path / "model").iterdir()] == [".model.lock"]
    assert not list((tmp_path / "model").iterdir())
