"""A step is taken by all processes or by none: memory that runs out, numbers that are not finite."""

import json
import zipfile
from itertools import count

import numpy as np
import pytest
import torch

from cascade.checkpoint import FORMAT, PREVIOUS, load_file, load_resumable, save_file, save_resumable
from cascade.config.load import load_config
from cascade.processes.group import Processes
from cascade.training.metrics import Metrics
from cascade.training.objective import Objective
from cascade.training.optim import build_optimizer
from cascade.training.step import OutOfMemory, Stepper
from cascade.training.terms import Term
from tests.training.conftest import OPTIONS
from tests.training.test_objective import TOKENIZER, make, make_batch
from tests.training.test_train import same_weights

NO_DROPOUT = ["model.causal.dropout=0", "model.noncausal.dropout=0", "model.predictor.dropout=0"]


def stepper(*options, teacher=False):
    model, config = make(*NO_DROPOUT, *options)
    model.double()
    taught = make(*NO_DROPOUT, seed=1)[0].double() if teacher else None
    optimizer = build_optimizer(model, config.training)
    objective = Objective(model, config, taught, TOKENIZER)
    return Stepper(model, objective, optimizer, config, Processes(), torch.device("cpu"))


def batch_of(token_lens=(3, 2, 4, 1, 2), frames=(60, 44, 72, 40, 57)):
    batch = make_batch(token_lens, frames)
    batch.features = batch.features.double()
    return batch


OBJECTIVES = {
    "both passes, ctc": [], "without ctc": ["loss.ctc_scale=0"], "one pass": ["loss.pass_sampling=true"],
    "pruned KL": ["distillation.weight=2"],
    "student's ranges": ["distillation.weight=2", "distillation.ranges=student"],
    "uniform cells": ["distillation.weight=2", "distillation.cell_weight=uniform"],
    "one best": ["distillation.weight=2", "distillation.kind=one_best"],
    "collapsed": ["distillation.weight=2", "distillation.kind=collapsed"],
    "MWER": ["mwer.nbest=3"],
    "MWER of the full pass's hypotheses, one pass": ["mwer.hypotheses=full", "loss.pass_sampling=true"],
    "MWER and KL": ["mwer.loss_scale=0.5", "distillation.weight=2"],
}


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_parts_of_a_batch_are_as_good_as_the_whole(options):
    results = {}
    for num_parts in (1, 2, 4, 8):
        take = stepper(*options, teacher="distillation.weight=2" in options)
        results[num_parts] = take.attempt(batch_of(), 100, 0.5, num_parts), take.model.state_dict()
    sums, weights = results[1][0].sums, results[1][1]
    for num_parts in (2, 4, 8):
        for name, pair in results[num_parts][0].sums.items():
            assert pair == pytest.approx(sums[name], rel=1e-9), name
        for name, tensor in results[num_parts][1].items():
            assert torch.allclose(tensor, weights[name], rtol=0, atol=1e-9), name


class Activity:
    """A term of this test's own: the mean square of the causal pass's simple logits."""

    def __call__(self, name, outputs, batch, step):
        frames = outputs.passes[name].am[:, :5]
        return {"activity": Term(frames.square().sum(), float(frames.numel()), 100.0)} if name == "causal" else {}


def test_a_new_term_joins_the_objective_and_is_stepped_down_with_the_others():
    means = {}
    for kind in ("plain", "whole", "parts"):
        take = stepper()
        if kind != "plain":
            take.objective.terms.append(Activity())
        for step in range(3):
            result = take.attempt(batch_of(), step, 0.5, num_parts=2 if kind == "parts" else 1)
            means[kind, step] = {name: value / count for name, (value, count) in result.sums.items()}
    assert means["whole", 0].keys() - means["plain", 0].keys() == {"causal_activity"}
    first = means["whole", 0]
    assert first["loss"] > means["plain", 0]["loss"] and first["causal_pruned"] == means["plain", 0]["causal_pruned"]
    assert means["parts", 2] == pytest.approx(means["whole", 2], rel=1e-6)
    assert means["whole", 2]["causal_activity"] < first["causal_activity"]
    assert means["whole", 2]["causal_simple"] != means["plain", 2]["causal_simple"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_what_is_tried_and_takes_the_same_step(where, monkeypatch, caplog):
    whole, halved = stepper(), stepper()
    whole(batch_of(), 7, 1.0)
    limit = 2 * 72  # frames: two utterances of the longest length
    forward, backward = Objective.__call__, torch.Tensor.backward
    size = []

    def small_memory(self, batch, *arguments):
        size[:] = [batch.features.shape[0] * batch.features.shape[1]]
        if where == "forward" and size[0] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, *arguments)

    def small_backward(self):
        if where == "backward" and size[0] > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        backward(self)

    monkeypatch.setattr(Objective, "__call__", small_memory)
    monkeypatch.setattr(torch.Tensor, "backward", small_backward)
    assert not halved(batch_of(), 7, 1.0).problem
    assert caplog.text.count("out of memory") == 2 and halved.largest_part == 5 * 72 / 4
    for name, tensor in halved.model.state_dict().items():
        assert torch.allclose(tensor, whole.model.state_dict()[name], rtol=0, atol=1e-9), name
    halved(batch_of(), 8, 1.0)  # tries what fits at once
    assert caplog.text.count("out of memory") == 2
    limit = 10
    with pytest.raises(OutOfMemory, match="a single utterance does not fit.*longest here has 0.7 s.*max_duration"):
        halved(batch_of(), 9, 1.0)


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def wrong(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Objective, "__call__", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        stepper()(batch_of(), 7, 1.0)


@pytest.mark.parametrize("broken", ["features", "gradient"])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(broken):
    take = stepper()
    before = {name: tensor.clone() for name, tensor in take.model.state_dict().items()}
    batch = batch_of()
    if broken == "features":
        batch.features[2, 3, 1] = np.inf
    else:
        take.model.predictor.position.register_hook(lambda gradient: gradient * torch.inf)
    result = take(batch, 7, 1.0)
    assert result.problem and not result.sums
    assert result.non_finite == (["utt-2"] if broken == "features" else [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in take.model.state_dict().items())
    assert not take.optimizer.parts[0].state


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): makes the features of these steps not finite; counts every call, repetitions too."""
    calls, forward = count(), Objective.__call__

    def install(is_bad):
        def call(self, batch, *arguments):
            if self.model.training and is_bad(next(calls)):
                batch.features[0, 0] = torch.nan
            return forward(self, batch, *arguments)

        monkeypatch.setattr(Objective, "__call__", call)

    return install


def test_single_bad_steps_are_skipped_and_their_batches_kept(train, tmp_path, poison):
    poison(lambda call: call in (2, 5))
    done = train(tmp_path / "model", "training.max_bad_steps=2")
    assert done.stderr.count("skipped: the loss of 1 utterances is not finite") == 2
    assert "more tokens than its frames" not in done.stderr
    folder = tmp_path / "model" / "bad_batches"
    lines = [json.loads(line) for line in (folder / "ids-rank-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 5]
    kept = load_file(folder / "step-2-rank-0.pt")
    assert kept["ids"] == lines[0]["ids"] and kept["ids"][0] == lines[0]["non_finite"][0]
    assert torch.isnan(kept["features"][0, 0]).all() and (tmp_path / "model" / "averaged.pt").is_file()


def test_divergence_goes_back_once_with_half_the_rate(train, tmp_path, poison):
    poison(lambda call: call in (4, 5, 6))
    done = train(tmp_path / "model", "training.max_bad_steps=3")
    assert "training diverged (3 steps in a row were not finite" in done.stderr
    assert "back to step 4, with half the learning rate" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "model" / "losses.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == sorted(set(steps)) and load_resumable(tmp_path / "model")["state"]["rate_scale"] == 0.5


def test_a_run_that_diverges_again_ends_with_its_cause_and_no_model(train, tmp_path, poison):
    poison(lambda call: call >= 4)
    done = train(tmp_path / "model", "training.max_bad_steps=3", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: training diverged again with half the learning rate: 3 steps in a row")
    assert "bad_batches" in last and not (tmp_path / "model" / "averaged.pt").exists()
    good = load_resumable(tmp_path / "model")
    assert all(torch.isfinite(tensor).all() for tensor in good["model"].values())


def test_weights_that_overflow_are_not_saved(train, tmp_path, monkeypatch):
    steps, real = count(), Stepper.__call__

    def overflow(self, batch, step, rate):
        result = real(self, batch, step, rate)
        if next(steps) == 5:
            torch.nn.init.constant_(self.model.joiner.output.weight, torch.inf)
        return result

    monkeypatch.setattr(Stepper, "__call__", overflow)
    done = train(tmp_path / "model", "training.save_every_minutes=0")
    assert "training diverged (weights are not finite after step 6): back to step 5" in done.stderr
    assert (tmp_path / "model" / "averaged.pt").is_file()


def test_bad_steps_at_an_epochs_end_do_not_hide_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    steps, real = count(), Stepper.__call__

    def swell(self, batch, step, rate):
        result = real(self, batch, step, rate)
        if next(steps) == 5:
            torch.nn.init.constant_(self.model.joiner.output.weight, 3e38)  # finite, and nothing finite comes of it
        return result

    monkeypatch.setattr(Stepper, "__call__", swell)
    done = train(tmp_path / "model", "training.num_epochs=3", "training.max_bad_steps=50")
    assert "dev: the losses of 3 utterances are not finite" in done.stderr
    assert "back to step 4, with half the learning rate" in done.stderr
    model = load_file(tmp_path / "model" / "averaged.pt")["model"]
    assert all(tensor.abs().max() < 1e3 for tensor in model.values() if tensor.is_floating_point())
    assert "NaN" not in (tmp_path / "model" / "losses.jsonl").read_text()


def test_an_utterance_of_dev_that_is_not_finite_is_said_and_left_out(train, tmp_path, monkeypatch):
    from cascade.training import trainer

    def spoiled(*arguments):
        for batch in real(*arguments):
            batch.features[0, 5] = torch.nan
            yield batch

    real = trainer.dev_batches
    monkeypatch.setattr(trainer, "dev_batches", spoiled)
    done = train(tmp_path / "model", "loss.ctc_scale=0", "data.batch_duration=0.1")  # every utterance a batch
    assert "dev: the losses of 3 utterances are not finite: dev-" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "model" / "losses.jsonl").read_text().splitlines()]
    assert all("loss" not in row or row["loss"] > 0.5 for row in rows)


@pytest.mark.parametrize("program", ["average", "decode"])
def test_a_model_that_is_not_finite_is_never_averaged_or_run(train, corpus, tmp_path, program):
    from tests.training.conftest import run

    train(tmp_path / "model")
    for name in ("epoch-2.pt", "averaged.pt"):
        values = load_file(tmp_path / "model" / name)
        values["model"]["joiner.output.bias"][3] = torch.nan
        save_file(values, tmp_path / "model" / name)
    words = {
        "average": ["average", "--exp-dir", tmp_path / "model", "--epoch", 2, "--avg", 2],
        "decode": ["decode", "--exp-dir", tmp_path / "model", "--manifest", corpus / "fbank" / "test_cuts.jsonl.gz",
                   "--mode", "full", "--method", "greedy_search", "--out", tmp_path / "out"],
    }
    done = run(*words[program], check=False)
    assert done.returncode == 1 and "not finite" in done.stderr and "Traceback" not in done.stderr


def test_metrics_survive_a_round_over_one_process():
    metrics = Metrics()
    metrics.add({"loss": (3.0, 2.0)})
    assert metrics.over(Processes()).means() == {"loss": 1.5}


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def blank_out(path):
    """Zeros in the middle, where the weights are; the archive's frame stays whole."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    start = largest.header_offset + 30 + len(largest.filename) + 200
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, blank_out])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(damage, train, tmp_path):
    options = ["training.num_epochs=3", "training.save_every_minutes=0"]
    train(tmp_path / "whole", *options)
    train(tmp_path / "model", *options)
    (tmp_path / "model" / "averaged.pt").unlink()
    newest = tmp_path / "model" / "checkpoint.pt"
    damage(newest)
    done = train(tmp_path / "model", *options)
    assert "checkpoint.pt is damaged" in done.stderr and "trying the one before" in done.stderr
    assert (tmp_path / "model" / "checkpoint-damaged.pt").is_file() and load_file(tmp_path / "model" / PREVIOUS)
    assert same_weights(tmp_path / "whole" / "averaged.pt", tmp_path / "model" / "averaged.pt")
    for name in ("checkpoint.pt", PREVIOUS):
        (tmp_path / "model" / name).write_bytes(b"")
    done = train(tmp_path / "model", *options, check=False)
    assert done.returncode == 1 and "start over with --force" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("links", [True, False])
def test_a_whole_checkpoint_is_there_at_every_moment_of_saving(tmp_path, monkeypatch, links):
    import os

    config = load_config(overrides=OPTIONS)
    seen = []

    def look(name, real):
        def call(*arguments, **options):
            result = real(*arguments, **options)
            seen.append((load_resumable(tmp_path) or {}).get("number"))
            return result
        monkeypatch.setattr(os, name, call)

    save_resumable({"format": FORMAT, "number": 0, "config": config.seed}, tmp_path)
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError("no links here")))
    for name in ("replace", "fsync") + (("link",) if links else ()):
        look(name, getattr(os, name))
    save_resumable({"format": FORMAT, "number": 1}, tmp_path)
    assert seen and set(seen) == {0, 1} and seen == sorted(seen)
    assert load_file(tmp_path / PREVIOUS)["number"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, "checkpoint.pt"]


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(train, tmp_path):
    import resource

    options = ["training.save_every_minutes=0"]
    train(tmp_path / "model", *options)
    before = load_resumable(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint.pt cannot be written \(File too large\): free some space"):
            save_resumable(before, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = load_resumable(tmp_path / "model")
    assert after["state"] == before["state"] and not (tmp_path / "model" / "checkpoint.pt.partial").exists()
