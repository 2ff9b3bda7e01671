import os

import pytest
import torch

from cascade.checkpoint import average_values, epoch_path, last_epochs, load_file, load_model, save_file
from tests.decoding.tiny_run import make_model_dir


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_file({"format": 1, "x": torch.ones(2)}, path)

    def fill_the_disk(values, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="disk full"):
        save_file({"format": 1, "x": torch.zeros(2)}, path)
    assert torch.equal(load_file(path)["x"], torch.ones(2))


def test_damaged_foreign_and_malicious_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole.pt"
    save_file({"format": 1, "x": torch.ones(1000)}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:500])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save({"format": 1, "x": Malicious()}, tmp_path / "malicious.pt")
    for name in ("cut.pt", "text.pt", "foreign.pt", "malicious.pt"):
        with pytest.raises(ValueError, match=name):
            load_file(tmp_path / name)
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_file(tmp_path / "nothing.pt")


def test_the_tied_matrix_is_averaged_once_and_stays_tied(tmp_path):
    model_dir = make_model_dir(tmp_path / "model", epochs=3)
    values = average_values(last_epochs(model_dir, 3, 3))
    name = "joiner.output.weight"
    mean = sum(load_file(epoch_path(model_dir, epoch))["model"][name].double() for epoch in (1, 2, 3)) / 3
    assert torch.allclose(values["model"][name].double(), mean, atol=1e-7)
    model, _, _ = load_model(model_dir, epoch=3, average=3)
    assert model.predictor.embedding is model.joiner.output.weight
    assert torch.equal(model.joiner.output.weight, values["model"][name])


def test_what_is_decoded_has_the_blank_penalty_and_the_checkpoints_do_not(tmp_path):
    model_dir = make_model_dir(tmp_path / "model", epochs=2)
    plain = average_values(last_epochs(model_dir, 2, 2))["model"]["joiner.output.bias"]
    for path in last_epochs(model_dir, 2, 2):
        values = load_file(path)
        values["config"]["training"]["blank_penalty"] = 0.75
        save_file(values, path)
    model, _, _ = load_model(model_dir, epoch=2, average=2)
    assert torch.allclose(plain - model.joiner.output.bias, torch.tensor([0.75] + [0.0] * (len(plain) - 1)), atol=1e-6)
    alone, _, _ = load_model(model_dir, epoch=2)
    stored = load_file(epoch_path(model_dir, 2))["model"]["joiner.output.bias"]
    assert float(stored[0] - alone.joiner.output.bias[0]) == pytest.approx(0.75, abs=1e-6)


def test_missing_epochs_are_named_with_what_is_there(tmp_path):
    model_dir = make_model_dir(tmp_path / "model", epochs=2)
    with pytest.raises(FileNotFoundError, match=r"lacks epoch-3.pt; epochs there: \[1, 2\]"):
        load_model(model_dir, epoch=3, average=2)
    with pytest.raises(ValueError, match="--avg must lie between 1 and --epoch"):
        load_model(model_dir, epoch=1, average=2)
    (model_dir / "averaged.pt").unlink()
    with pytest.raises(FileNotFoundError, match="training has not finished"):
        load_model(model_dir)


def test_a_model_and_foreign_tokens_are_told_apart(tmp_path):
    model_dir = make_model_dir(tmp_path / "model")
    with open(model_dir / "tokens" / "tokens.txt", "a", encoding="utf-8") as file:
        file.write("▁MORE 7\n")
    with pytest.raises(ValueError, match="they belong to different runs"):
        load_model(model_dir)


def test_weights_of_another_version_are_refused_in_one_sentence(tmp_path):
    model_dir = make_model_dir(tmp_path / "model")
    values = load_file(model_dir / "averaged.pt")
    del values["model"]["encoder.causal.norm.weight"]
    save_file(values, model_dir / "averaged.pt")
    with pytest.raises(ValueError, match="do not fit this version"):
        load_model(model_dir)
