"""Training on recombined utterances, from `align` to the final model."""

import signal

import pytest

from tests.training.conftest import OPTIONS, Fork, run
from tests.training.test_resume import in_a_step
from tests.training.test_train import same_weights


def test_training_with_an_alignment_is_resumable_and_starts_over_with_another_one(train, trained, corpus, tmp_path):
    run("align", "--exp-dir", trained, "--manifest", corpus / "fbank" / "train_cuts.jsonl.gz", "--mode", "streaming",
        "--out", tmp_path, "--threads", 1)
    words = ["augment.recombine_share=0.8", "--alignment", tmp_path / "alignment.ctm"]
    train(tmp_path / "whole", *words)
    assert not same_weights(tmp_path / "whole" / "averaged.pt", trained / "averaged.pt")
    command = ["train", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", tmp_path / "parts",
               "--threads", 1, *OPTIONS, "training.save_every_minutes=0", *words]
    with pytest.MonkeyPatch.context() as patch:
        assert Fork(*command, before=lambda: in_a_step(patch)).wait().returncode == -signal.SIGKILL
    assert "resuming in epoch" in train(tmp_path / "parts", *words).stderr
    assert same_weights(tmp_path / "whole" / "averaged.pt", tmp_path / "parts" / "averaged.pt")
    with open(tmp_path / "alignment.ctm", "a") as file:
        file.write(";; another file\n")
    done = train(tmp_path / "whole", *words)
    assert "alignment: another one than before" in done.stderr and (tmp_path / "whole.previous-1").is_dir()


def test_recombination_without_an_alignment_and_an_alignment_without_recombination_are_refused(train, tmp_path):
    share, path = "augment.recombine_share=0.5", tmp_path / "alignment.ctm"
    for words, message in (
        ([share], "name the CTM file that align made of EXP/fbank/train_cuts.jsonl.gz with --alignment FILE"),
        (["--alignment", path], "--alignment is of use only with augment.recombine_share above 0"),
        ([share, "--alignment", path], f"--alignment {path} does not exist"),
    ):
        done = train(tmp_path / "model", *words, check=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr
