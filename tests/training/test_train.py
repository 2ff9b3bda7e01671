"""The training program from outside: what it writes, how it resumes, what it says to mistakes."""

import gzip
import json
import sys
import types

import pytest
import torch

from cascade.checkpoint import load_file, load_model
from cascade.losses import recursion_torch
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


def test_a_finished_run_keeps_what_it_says_of_itself(train, tmp_path):
    train(tmp_path / "model")
    files = [path for path in (tmp_path / "model").iterdir() if path.suffix in (".json", ".pt")]
    before = {path.name: path.read_bytes() for path in files}
    assert "finished already" in train(tmp_path / "model").stderr
    assert before == {name: (tmp_path / "model" / name).read_bytes() for name in before}


def test_another_decoding_section_is_taken_and_starts_nothing_over(train, tmp_path):
    teacher = tmp_path / "teacher"
    runs = {
        teacher: [], tmp_path / "student": ["distillation.weight=2", "--teacher", teacher],
        tmp_path / "tuned": ["--init-from", teacher],
    }  # fmt: skip
    for folder, options in runs.items():
        train(folder, *options)
    before = load_file(teacher / "averaged.pt")["model"]
    done = train(teacher, "decoding.blank_penalty=0.5")
    assert "finished already" in done.stderr and "starting over" not in done.stderr
    for epoch in (None, 1, 2):
        assert load_model(teacher, epoch)[1].decoding.blank_penalty == 0.5
    after = load_file(teacher / "averaged.pt")["model"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for folder, options in list(runs.items())[1:]:
        assert "finished already" in train(folder, *options).stderr


def test_models_are_read_for_their_decoding_section_only_when_it_is_another(train, tmp_path, monkeypatch):
    train(tmp_path)
    train(tmp_path, "decoding.blank_penalty=0.5")
    monkeypatch.setattr("cascade.training.earlier_run.carry_decoding", lambda *_: pytest.fail("read again"))
    assert "finished already" in train(tmp_path, "decoding.blank_penalty=0.5").stderr


def test_a_run_that_goes_on_with_another_decoding_section_ends_with_it(train, tmp_path):
    train(tmp_path)
    (tmp_path / "averaged.pt").unlink()  # as if it had been stopped before the final model was written
    assert "resuming" in train(tmp_path, "decoding.blank_penalty=0.5").stderr
    assert load_model(tmp_path)[1].decoding.blank_penalty == 0.5


def test_distillation_starts_from_the_teacher_and_logs_its_loss(finished, train, tmp_path):
    done = train(tmp_path / "student", "distillation.weight=2", "--teacher", finished)
    assert "causal encoder: copied from the teacher, layers 1" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "student" / "losses.jsonl").read_text().splitlines()]
    assert all("causal_kd" in row and "noncausal_kd" in row for row in rows)


def test_the_dev_loss_is_that_of_the_means_of_all_batches(finished, train, tmp_path):
    train(tmp_path / "student", "distillation.weight=2", "--teacher", finished, "data.batch_duration=0.1",
          "training.num_epochs=1", "training.average_last=1", "loss.causal_weight=0.25", "loss.simple_scale=0.5")
    rows = [json.loads(line) for line in (tmp_path / "student" / "losses.jsonl").read_text().splitlines()]
    row, weights = rows[-1], {"simple": 0.5, "pruned": 1.0, "ctc": 0.3, "kd": 2.0}
    passes = {"causal": 0.25, "noncausal": 0.75}
    expected = sum(passes[name] * weights[part] * row[f"{name}_{part}"] for name in passes for part in weights)
    assert row["split"] == "dev" and row["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("content", "message"), [(None, "cuts not found"), (b"", "holds no utterance with tokens")])
def test_a_dev_set_that_cannot_be_used_is_said_before_the_first_step(corpus, train, tmp_path, content, message):
    (tmp_path / "fbank").mkdir()
    for name in ("train_cuts.jsonl.gz", "stats.pt"):
        (tmp_path / "fbank" / name).symlink_to(corpus / "fbank" / name)
    if content is not None:
        (tmp_path / "fbank" / "dev_cuts.jsonl.gz").write_bytes(gzip.compress(content))
    done = train(tmp_path / "model", "--data", tmp_path / "fbank", check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "model" / "losses.jsonl").exists()


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


def test_a_missing_k2_is_said_before_any_work(train, tmp_path):
    done = train(tmp_path / "model", "loss.backend=k2", check=False)
    assert done.returncode == 1 and "error: loss.backend=k2 needs the package k2" in done.stderr
    assert not (tmp_path / "model").exists()


def test_k2s_loss_is_one_option_and_another_training(train, tmp_path, monkeypatch):
    def recursion(px, py, boundary, return_grad):
        scores, *occupancies = recursion_torch.forward_backward(px, py, boundary, return_grad)
        batches.append(len(scores))
        return scores.to(px.dtype), [occupancy.to(px.dtype) for occupancy in occupancies]

    batches, short = [], ("training.num_epochs=1", "training.average_last=1")
    monkeypatch.setitem(sys.modules, "k2", types.SimpleNamespace(mutual_information_recursion=recursion))
    train(tmp_path / "model", "loss.backend=k2", *short)
    assert batches
    batches.clear()
    assert "loss.backend: k2, now auto" in train(tmp_path / "model", *short).stderr and not batches
    last = [load_file(tmp_path / name / "averaged.pt")["model"] for name in ("model.previous-1", "model")]
    assert all(torch.allclose(last[0][name], last[1][name], atol=1e-3) for name in last[1])
