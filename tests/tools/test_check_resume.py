"""What the tool says when the training itself fails."""

import subprocess

import pytest

from tools import check_resume


def test_a_training_that_fails_is_said_with_its_cause(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="INFO begins\nerror: stats.pt is damaged\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    words = ["--data", tmp_path, "--tokens", tmp_path, "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["check_resume", *map(str, words)])
    with pytest.raises(ValueError, match="^train ended with 1: stats.pt is damaged$"):
        check_resume.main()
