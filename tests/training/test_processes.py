"""N processes train what one process trains with the same global batch. The processes are threads here, so that float64
and every option can be compared within seconds; test_launch.py and test_train.py start real ones."""

import copy
import json
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cascade.checkpoint import load_resumable
from cascade.config.load import load_config
from cascade.processes.group import Processes
from cascade.training.run_inputs import RunPaths, build_trainer, read_inputs
from tests.training.conftest import OPTIONS
from tests.training.test_step import NO_DROPOUT, OBJECTIVES

ONE_BATCH = ["data.batch_duration=100", "data.num_buckets=1", "training.num_epochs=2", "training.log_every_steps=1"]


class Threads(Processes):
    """Processes of one address space; the collectives are those of the real ones, their transport is not."""

    def __init__(self, rank, world_size, barrier, board):
        super().__init__(rank, world_size)
        self._barrier, self._board = barrier, board

    def gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        values = [self._board[rank] for rank in range(self.world_size)]
        self._barrier.wait()
        return values

    def sum_in_place(self, tensor):
        if self.world_size > 1:
            tensor.copy_(sum(self.gather(tensor.clone())))

    def max(self, value):
        return max(self.gather(value))

    def from_first(self, value):
        return copy.deepcopy(self.gather(value)[0])


def in_threads(world_size, work):
    """[work(processes of rank r)]; an exception of one ends all and is raised."""
    barrier, board, results, errors = threading.Barrier(world_size), {}, [None] * world_size, []

    def run(rank):
        try:
            results[rank] = work(Threads(rank, world_size, barrier, board))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


def doubled(batches, spoil):
    """Batches in float64; the utterance `spoil` gets too few frames for its tokens."""
    for batch in batches:
        batch.features = batch.features.double()
        if spoil in batch.ids:
            batch.feature_lens[batch.ids.index(spoil)] = 4
        yield batch


class Run:
    """Trains tiny models in float64 with any number of processes."""

    def __init__(self, corpus, options, teacher=None):
        self.corpus, self.teacher = corpus, teacher
        self.config = load_config(overrides=[*OPTIONS, *NO_DROPOUT, *ONE_BATCH, "loss.rnnt_type=modified", *options])

    def trainer(self, exp_dir, processes, spoil=""):
        paths = RunPaths(self.corpus / "fbank", self.corpus / "tokens", exp_dir, self.teacher)
        trainer = build_trainer(self.config, paths, read_inputs(paths, self.config), "", processes)
        trainer.model.double()
        if trainer.objective.teacher is not None:
            trainer.objective.teacher.double()
        loading, dev = trainer.train_batches.loading, trainer.dev

        @contextmanager
        def doubled_loading(skip=0):
            with loading(skip) as batches:
                yield doubled(batches, spoil)

        trainer.train_batches.loading = doubled_loading
        trainer.dev = lambda: doubled(dev(), spoil)
        return trainer

    def __call__(self, exp_dir, world_size, spoil=""):
        """Weights, log rows and set-aside utterances, the same on every rank."""
        exp_dir.mkdir()
        lock = threading.Lock()

        def work(processes):
            with lock:  # the random start comes from torch's global generator
                trainer = self.trainer(exp_dir, processes, spoil)
            return finish(trainer)

        results = in_threads(world_size, work)
        for weights, set_aside in results[1:]:
            assert set_aside == results[0][1]
            assert all(torch.equal(weights[name], results[0][0][name]) for name in weights)
        rows = [json.loads(line) for line in (exp_dir / "losses.jsonl").read_text().splitlines()]
        return *results[0], rows


def finish(trainer):
    """What Trainer.run does, without signals, which belong to the main thread."""
    from cascade.training.metrics import MetricWriter

    trainer._share_start()
    trainer.writer = MetricWriter(trainer.exp_dir, trainer.state.step) if trainer.processes.is_first else None
    trainer.last_save = float("inf")
    while trainer.state.epoch <= trainer.config.training.num_epochs:
        assert trainer._run_epoch(SimpleNamespace(asked=False)) == "finished"
    if trainer.writer is not None:
        trainer.writer.close()
    return trainer.model.state_dict(), trainer.set_aside


def same(one, other):
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=1e-9), name


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_processes_train_log_and_set_aside_what_one_does(corpus, trained, tmp_path, options, optimizer):
    teacher = trained if "distillation.weight=2" in options else None
    options = [*options, f"training.optimizer={optimizer}", "loss.warmup_steps=1"]
    if teacher is not None:
        options += ["distillation.init_from_teacher=false"]
    run = Run(corpus, options, teacher)
    spoil = "train-0" if optimizer == "muon" else ""
    weights, set_aside, rows = run(tmp_path / "one", 1, spoil)
    assert set_aside == ({spoil} if spoil else set())
    others, set_aside_too, rows_too = run(tmp_path / "more", 2 if optimizer == "adamw" else 3, spoil)
    same(weights, others)
    assert set_aside_too == set_aside
    assert [row.keys() for row in rows_too] == [row.keys() for row in rows]
    for row, other in zip(rows, rows_too, strict=True):
        assert list(other.values())[3:] == pytest.approx(list(row.values())[3:], rel=1e-6, abs=2e-6)


def test_processes_begin_with_the_weights_of_the_first(corpus, tmp_path):
    run = Run(corpus, [])

    def work(processes):
        trainer = run.trainer(tmp_path, processes)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += processes.rank
        trainer._share_start()
        return trainer.model.state_dict()

    first, second = in_threads(2, work)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gradient_that_no_process_has_stays_missing():
    def work(processes):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2)) for _ in range(3)])
        model[0].grad, model[2].grad = torch.ones(2), torch.tensor([processes.rank, 5.0])
        processes.sum_gradients(model)
        return [parameter.grad for parameter in model]

    for grads in in_threads(2, work):
        assert grads[0].tolist() == [2, 2] and grads[1] is None and grads[2].tolist() == [1, 10]


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_processes_goes_on_inside_an_epoch(corpus, tmp_path, counts):
    run = Run(corpus, ["data.batch_duration=4", "training.num_epochs=2", "data.num_buckets=2"])
    seen = []

    def work(processes):
        trainer = run.trainer(tmp_path, processes)
        trainer.resume()
        loading, lock = trainer.train_batches.loading, threading.Lock()

        @contextmanager
        def noted(skip=0):
            def note(batch):
                with lock:
                    seen.extend((trainer.state.epoch, name) for name in batch.ids)
                return batch

            with loading(skip) as batches:
                yield map(note, batches)

        trainer.train_batches.loading = noted
        if processes.world_size == counts[0] and trainer.state.step == 0:
            trainer._share_start()
            trainer.train_batches.set_epoch(1)
            batches = trainer.train_batches.iterate()
            for _ in range(2 if counts[0] == 1 else 1):
                trainer.step(next(batches), 0.0)
                trainer.state.batch += 1
            trainer.save()
            return None
        return finish(trainer)

    for world_size in counts:
        in_threads(world_size, work)
    names = {name for _, name in seen}
    assert sorted(seen) == sorted((epoch, name) for epoch in (1, 2) for name in names)  # each once in each epoch
    assert load_resumable(tmp_path)["state"]["epoch"] == 3
    rows = [json.loads(line) for line in (Path(tmp_path) / "losses.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows if row["split"] == "train"}) >= 2


def test_memory_that_runs_out_in_one_process_halves_the_batch_of_all(corpus, tmp_path, monkeypatch):
    from cascade.training.objective import Objective

    run, real = Run(corpus, ["training.num_epochs=1"]), Objective.__call__
    weights, _, _ = run(tmp_path / "one", 1)

    def small(self, batch, *arguments):
        if threading.current_thread().name.endswith("-small") and len(batch.ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, *arguments)

    monkeypatch.setattr(Objective, "__call__", small)
    (tmp_path / "two").mkdir()
    lock = threading.Lock()

    def work(processes):
        with lock:
            trainer = run.trainer(tmp_path / "two", processes)
        if processes.rank:
            threading.current_thread().name += "-small"
        return *finish(trainer), trainer.take_step.largest_part

    first, second = in_threads(2, work)
    same(weights, first[0])
    assert first[2] == second[2] < float("inf")


def test_a_resumed_run_remembers_what_fits_into_memory(corpus, tmp_path):
    run = Run(corpus, [])
    trainer = run.trainer(tmp_path, Processes())
    trainer.take_step.largest_part = 123.0
    trainer.save()
    again = run.trainer(tmp_path, Processes())
    assert again.resume() and again.take_step.largest_part == 123.0
