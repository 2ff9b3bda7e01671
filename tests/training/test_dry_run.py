"""train --dry-run: what it checks, what its estimates are made of, and that it writes nothing."""

import re
import shutil

import numpy as np
import pytest
import torch

from cascade.config.load import load_config
from cascade.processes.group import Processes
from cascade.training import step_timing
from cascade.training.objective import Objective
from cascade.training.run_inputs import RunPaths, build_trainer, read_inputs
from cascade.training.step_timing import (
    Measured,
    checkpoint_bytes,
    estimate_seconds,
    measure,
    padded_frames,
    spread_order,
)
from tests.training.conftest import OPTIONS, run


def files(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def trainer(corpus, tmp_path):
    config = load_config([], OPTIONS)
    paths = RunPaths(corpus / "fbank", corpus / "tokens", tmp_path / "model")
    return build_trainer(config, paths, read_inputs(paths, config), "", Processes())


@pytest.fixture
def copied(corpus, tmp_path):
    """A copy of the tiny corpus that a test may damage."""
    shutil.copytree(corpus, tmp_path / "corpus")
    return tmp_path / "corpus"


def dry_run(corpus, exp_dir, *words):
    return run("train", "--data", corpus / "fbank", "--tokens", corpus / "tokens", "--exp-dir", exp_dir, "--threads", 1,
               *OPTIONS, *words, "--dry-run", check=False)


def test_a_good_run_gets_its_numbers_and_no_file_is_written(corpus, tmp_path, capsys):
    before = files(corpus)
    done = dry_run(corpus, tmp_path / "model")
    shown = capsys.readouterr().out
    assert done.returncode == 0, shown + done.stderr
    assert not list(tmp_path.iterdir()) and files(corpus) == before
    for heading in ("parameters", "data", "steps", "measured", "time", "memory", "disk", "exp-dir"):
        assert re.search(rf"^{heading} ", shown, re.MULTILINE), heading
    assert re.search(r"^problems +none$", shown, re.MULTILINE)
    steps = re.search(r"(\d+) per epoch, (\d+) in 2 epochs", shown)
    assert int(steps[2]) == 2 * int(steps[1])
    num_steps = re.search(r"measured +(\d+) steps", shown)[1]
    assert f"an estimate from {num_steps} steps" in shown


def test_the_estimate_is_made_from_measured_steps(trainer, monkeypatch):
    clock, plan = [0.0], trainer.train_batches.plan()
    real, taken = trainer.take_step.attempt, []

    def slow(batch, *arguments, **options):
        taken.append(batch.features.shape[0] * batch.features.shape[1])
        clock[0] += taken[-1] / 1000  # a millisecond of this clock per frame
        return real(batch, *arguments, **options)

    monkeypatch.setattr(trainer.take_step, "attempt", slow)
    monkeypatch.setattr(step_timing.time, "monotonic", lambda: clock[0])
    measured = measure(trainer, plan)
    sizes = padded_frames(trainer, plan)
    assert sorted(measured.frames) == sorted(sizes)
    assert np.allclose(measured.seconds, measured.frames / 1000) and measured.dev_seconds == 0
    assert max(sizes) in taken[-2:]
    seconds = estimate_seconds(measured, sizes.sum(), trainer.config)
    assert seconds == pytest.approx(trainer.config.training.num_epochs * sizes.sum() / 1000)


def test_validations_count_once_for_each_epoch_that_has_one(trainer):
    measured = Measured(np.array([1.0, 3.0]), np.array([100, 300]), 7.0, 0, [])
    config = load_config([], [*OPTIONS, "training.num_epochs=5", "training.validate_every_epochs=2"])
    assert estimate_seconds(measured, 1000.0, config) == pytest.approx(5 * 10.0 + 3 * 7.0)


def test_a_measurement_out_of_time_has_seen_short_and_long_batches(trainer, monkeypatch):
    assert sorted(spread_order(12)) == list(range(12)) and spread_order(1) == [0]
    assert max(spread_order(12)[:3]) - min(spread_order(12)[:3]) >= 8
    monkeypatch.setattr(step_timing, "SECONDS_FOR_STEPS", -1.0)
    assert len(measure(trainer, trainer.train_batches.plan()).seconds) == 1


def test_the_disk_estimate_is_what_a_run_leaves_behind(trainer, train, tmp_path):
    epoch, most = checkpoint_bytes(trainer)
    train(tmp_path / "run")
    left = {path.name: path.stat().st_size for path in (tmp_path / "run").glob("*.pt")}
    overhead = 80_000  # names and config: nothing beside real weights, much beside these
    assert epoch <= left["epoch-2.pt"] <= epoch + overhead
    resumable = left["checkpoint.pt"]
    assert abs(sum(left.values()) + resumable - most) <= (len(left) + 1) * overhead


@pytest.mark.parametrize(("damage", "message"), [
    (lambda root: (root / "fbank" / "dev_cuts.jsonl.gz").unlink(), "no dev_cuts.jsonl.gz: run stage 1"),
    (lambda root: (root / "fbank" / "stats.pt").unlink(), "feature statistics not found"),
    (lambda root: (root / "tokens" / "tokens.txt").unlink(), "tokens.txt not found"),
    (lambda root: torch.save({"mean": torch.zeros(40), "std": torch.ones(40)}, root / "fbank" / "stats.pt"),
     "has 40 mel bins, features.num_mel_bins=80"),
])
def test_a_missing_or_unfit_input_is_found(copied, tmp_path, capsys, damage, message):
    damage(copied)
    done = dry_run(copied, tmp_path / "model")
    assert done.returncode == 1 and message in capsys.readouterr().out
    assert "would stop this training" in done.stderr and not (tmp_path / "model").exists()


def test_a_truncated_archive_is_found(corpus, tmp_path, capsys):
    archives = sorted((corpus / "fbank" / "train").glob("*.lca"))
    content = archives[0].read_bytes()
    try:
        archives[0].write_bytes(content[: len(content) // 2])
        done = dry_run(corpus, tmp_path / "model")
    finally:
        archives[0].write_bytes(content)
    assert done.returncode == 1 and "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["tokens.case=lower"], "the tokenizer's case is keep, tokens.case=lower: run stage 2 again"),
    (["data.speed_factors=[1.0,2.0]", "data.max_quarantine_share=0"], None),
    (["--init-from", "nowhere"], "no such file"),
    (["--teacher", "nowhere", "distillation.weight=1"], "holds no finished model"),
])
def test_problems_of_options_are_listed_with_their_remedy(corpus, tmp_path, capsys, words, message):
    done = dry_run(corpus, tmp_path / "model", *words)
    shown = capsys.readouterr().out
    if message is None:
        assert done.returncode == 0, shown
    else:
        assert done.returncode == 1 and re.search(r"^problems ", shown, re.MULTILINE) and message in shown


def test_texts_that_the_tokenizer_lacks_are_a_problem_when_they_are_many(copied, tmp_path, capsys):
    lines = (copied / "tokens" / "tokens.txt").read_text().splitlines()
    (copied / "tokens" / "tokens.txt").write_text("\n".join(lines[:-1]) + "\n")
    assert dry_run(copied, tmp_path / "model").returncode == 1
    shown = capsys.readouterr().out
    assert re.search(r"utterances are left out \(unknown characters \d+\)", shown)
    assert "more than data.max_quarantine_share=0.05" in shown
    assert dry_run(copied, tmp_path / "model", "data.max_quarantine_share=1").returncode == 0


def test_an_earlier_run_is_recognised_and_stays_as_it_is(corpus, train, tmp_path, capsys):
    train(tmp_path / "model")
    before = files(tmp_path)
    assert dry_run(corpus, tmp_path / "model").returncode == 0
    assert "this very run is there" in capsys.readouterr().out
    assert dry_run(corpus, tmp_path / "model", "training.learning_rate=1e-4").returncode == 0
    shown = capsys.readouterr().out
    assert "it is kept as model.previous-1" in shown and "training.learning_rate: 0.001, now 0.0001" in shown
    assert files(tmp_path) == before


def test_with_one_pass_a_step_the_largest_batch_takes_steps_of_both(corpus, tmp_path, monkeypatch):
    config = load_config([], [*OPTIONS, "loss.pass_sampling=true"])
    paths = RunPaths(corpus / "fbank", corpus / "tokens", tmp_path / "model")
    trainer = build_trainer(config, paths, read_inputs(paths, config), "", Processes())
    plan, real, seen = trainer.train_batches.plan(), Objective.__call__, set()

    def noted(self, batch, step, context, passes=("dev",)):
        seen.update((batch.features.shape[0] * batch.features.shape[1], name) for name in passes)
        return real(self, batch, step, context, *([] if passes == ("dev",) else [passes]))

    monkeypatch.setattr(Objective, "__call__", noted)
    measure(trainer, plan, num_steps=1)
    largest = padded_frames(trainer, plan).max()
    assert {(largest, "causal"), (largest, "noncausal")} <= seen


@pytest.mark.parametrize(("most", "code"), [(1, 0), (0, 1)])
def test_a_dev_batch_that_does_not_fit_is_measured_in_parts(corpus, tmp_path, capsys, monkeypatch, most, code):
    real = Objective.__call__

    def full(self, batch, *arguments):
        if not self.model.training and len(batch.ids) > most:
            raise torch.OutOfMemoryError("no memory")
        return real(self, batch, *arguments)

    monkeypatch.setattr(Objective, "__call__", full)
    done = dry_run(corpus, tmp_path / "model", "data.batch_duration=100")
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("a single utterance of dev does not fit" in capsys.readouterr().out) == bool(code)


def test_a_batch_that_does_not_fit_is_a_problem_with_its_remedy(corpus, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Objective, "__call__", full)
    assert dry_run(corpus, tmp_path / "model").returncode == 1
    assert "do not fit into the memory of cpu: lower data.batch_duration (now 4)" in capsys.readouterr().out
