import errno
import os

import pytest
import torch

from cascade.checkpoint import (
    FORMAT,
    average_values,
    epoch_path,
    last_epochs,
    load_file,
    load_model,
    load_resumable,
    save_file,
    save_resumable,
)
from cascade.config.load import config_from_dict
from cascade.training.earlier_run import carry_decoding
from tests.tiny_run import make_model_dir


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_file({"format": FORMAT, "x": torch.ones(2)}, path)

    def fill_the_disk(values, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="disk full"):
        save_file({"format": FORMAT, "x": torch.zeros(2)}, path)
    assert torch.equal(load_file(path)["x"], torch.ones(2))


def test_damaged_foreign_and_malicious_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole.pt"
    save_file({"format": FORMAT, "x": torch.ones(1000)}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:500])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save({"format": FORMAT, "x": Malicious()}, tmp_path / "malicious.pt")
    for name in ("cut.pt", "text.pt", "foreign.pt", "malicious.pt"):
        with pytest.raises(ValueError, match=name):
            load_file(tmp_path / name)
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_file(tmp_path / "nothing.pt")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, number):
    for _ in range(2):
        save_resumable({"format": FORMAT, "x": torch.zeros(2)}, tmp_path)

    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("zipfile.ZipFile", fail)
    with pytest.raises(OSError, match=rf"{os.strerror(number)}: .*checkpoint\.pt"):
        load_resumable(tmp_path, repair=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint-previous.pt"}


def test_the_tied_matrix_is_averaged_once_and_stays_tied(tmp_path):
    model_dir = make_model_dir(tmp_path / "model", epochs=3)
    values = average_values(last_epochs(model_dir, 3, 3))
    name = "joiner.output.weight"
    mean = sum(load_file(epoch_path(model_dir, epoch))["model"][name].double() for epoch in (1, 2, 3)) / 3
    assert torch.allclose(values["model"][name].double(), mean, atol=1e-7)
    model, _, _ = load_model(model_dir, epoch=3, average=3)
    assert model.predictor.embedding is model.joiner.output.weight
    assert torch.equal(model.joiner.output.weight, values["model"][name])


def test_averaging_leaves_the_weights_alone_however_often(tmp_path):
    model_dir = make_model_dir(tmp_path / "model", epochs=2, overrides=["decoding.blank_penalty=0.75"])
    paths, name = last_epochs(model_dir, 2, 2), "joiner.output.bias"
    mean = sum(load_file(path)["model"][name].double() for path in paths) / 2
    once = average_values(paths)
    assert torch.equal(once["model"][name], mean.float())
    save_file(once, epoch_path(model_dir, 3))
    save_file(once, epoch_path(model_dir, 4))
    twice = average_values(last_epochs(model_dir, 4, 2))
    assert all(torch.equal(tensor, once["model"][key]) for key, tensor in twice["model"].items())
    assert twice["config"]["decoding"]["blank_penalty"] == 0.75
    model, config, _ = load_model(model_dir, epoch=4, average=2)
    assert torch.equal(model.joiner.output.bias, once["model"][name]) and config.decoding.blank_penalty == 0.75


def as_format_1(values, penalty):
    """The values as format 1 wrote them: the penalty among the options of training, and taken off an average."""
    config = {name: dict(section) if isinstance(section, dict) else section
              for name, section in values["config"].items() if name != "decoding"}
    if penalty is not None:
        config["training"]["blank_penalty"] = penalty
    return values | {"format": 1, "config": config}


def test_files_of_format_1_get_their_weights_and_their_penalty_back(tmp_path):
    model_dir, name = make_model_dir(tmp_path / "model", epochs=2), "joiner.output.bias"
    paths = last_epochs(model_dir, 2, 2)
    whole = average_values(paths)
    stored = load_file(paths[1])["model"][name]
    burnt = as_format_1(whole, 0.75)
    burnt["model"] = dict(whole["model"], **{name: whole["model"][name].clone()})
    burnt["model"][name][0] -= 0.75
    for path in paths:
        save_file(as_format_1(load_file(path), 0.75), path)
    save_file(load_file(paths[1]) | {"state": {}, "optimizer": {}}, model_dir / "checkpoint.pt")
    save_file(burnt, model_dir / "averaged.pt")
    save_file(burnt, model_dir / "epoch-9.pt")  # renamed, it is still an average
    for path in (model_dir / "averaged.pt", model_dir / "epoch-9.pt"):
        values = load_file(path)
        assert torch.allclose(values["model"][name], whole["model"][name], atol=1e-6)
        assert values["format"] == FORMAT and config_from_dict(values["config"]).decoding.blank_penalty == 0.75
    for path in (paths[1], model_dir / "checkpoint.pt"):
        assert torch.equal(load_file(path)["model"][name], stored)
    model, config, _ = load_model(model_dir, epoch=2, average=2)
    assert torch.equal(model.joiner.output.bias, whole["model"][name]) and config.decoding.blank_penalty == 0.75
    again = average_values([model_dir / "averaged.pt"])["model"]
    assert torch.allclose(again[name], whole["model"][name], atol=1e-6)


@pytest.mark.parametrize("penalty", [None, 0.0])
def test_files_of_format_1_without_a_penalty_load_unchanged(tmp_path, penalty):
    model_dir = make_model_dir(tmp_path / "model")
    values = average_values(last_epochs(model_dir, 2, 2))
    save_file(as_format_1(values, penalty), model_dir / "averaged.pt")
    found = load_file(model_dir / "averaged.pt")
    assert config_from_dict(found["config"]) == config_from_dict(values["config"])
    assert all(torch.equal(tensor, values["model"][name]) for name, tensor in found["model"].items())
    load_model(model_dir)


def test_a_file_of_format_1_without_a_model_is_no_checkpoint(tmp_path):
    for values in ({"format": 1}, {"format": 1, "config": {}, "model": {}}, {"format": 3}):
        torch.save(values, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"x.pt is not a checkpoint of this project \(format 2 expected\)"):
            load_file(tmp_path / "x.pt")


def test_the_files_of_a_run_carry_its_decoding_section_and_keep_their_weights(tmp_path):
    model_dir = make_model_dir(tmp_path / "model")
    files = [model_dir / "averaged.pt", *last_epochs(model_dir, 2, 2)]
    before = [load_file(path)["model"] for path in files]
    config = load_model(make_model_dir(tmp_path / "other", overrides=["decoding.blank_penalty=2"]))[1]
    carry_decoding(model_dir, config)
    for path, weights in zip(files, before, strict=True):
        values = load_file(path)
        assert config_from_dict(values["config"]) == config
        assert all(torch.equal(tensor, weights[name]) for name, tensor in values["model"].items())
    times = [path.stat().st_mtime_ns for path in files]
    carry_decoding(model_dir, config)
    assert [path.stat().st_mtime_ns for path in files] == times


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


def test_a_file_without_a_model_under_the_name_of_one_is_told(tmp_path):
    model_dir = make_model_dir(tmp_path / "model")
    save_file({"format": 2, "step": 3}, model_dir / "averaged.pt")
    with pytest.raises(ValueError, match="holds no model"):
        load_model(model_dir)
    (model_dir / "epoch-final.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks epoch-9.pt; epochs there: \[1"):
        load_model(model_dir, epoch=9)
    with pytest.raises(IsADirectoryError, match="is a folder: name a file"):
        save_file({}, model_dir)
    assert not (tmp_path / "model.partial").exists()
