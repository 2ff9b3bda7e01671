"""The training loop: deterministic, resumable at any step, the same bits as a run that never stopped."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cascade.checkpoint import (
    average_values,
    epoch_path,
    last_epochs,
    load_resumable,
    model_values,
    num_non_finite,
    save_file,
    save_resumable,
)
from cascade.config.options import Config
from cascade.data.batches import Batch, TrainBatches, dev_batches
from cascade.device import takes_bfloat16
from cascade.log import progress
from cascade.models.build import count_params, params_by_part
from cascade.models.transducer import CascadedTransducer
from cascade.processes.group import Processes
from cascade.processes.signals import StopRequest
from cascade.provenance import command_line, git_commit, machine
from cascade.text.tokens import Tokenizer
from cascade.training.bad_batches import save_bad_batch
from cascade.training.metrics import Metrics, MetricWriter
from cascade.training.objective import VALIDATION_CONTEXT, Objective
from cascade.training.optim import build_optimizer, rate_share
from cascade.training.step import Stepper


@dataclass
class TrainState:
    """Everything that changes while training, besides weights and optimizer."""

    epoch: int = 1
    """The epoch under way, from 1."""
    batch: int = 0
    """Batches of this epoch that are done by this number of processes."""
    step: int = 0
    """Optimizer steps that are done or were skipped."""
    seconds: float = 0.0
    """Time spent training."""
    cpu_seconds: float = 0.0
    """Processor time of all processes."""
    epoch_parts: list[list[int]] = field(default_factory=list)
    """[number of processes, batches of each] of earlier parts of this epoch, under other numbers of processes."""
    bad_steps: int = 0
    """Steps in a row that were skipped because their numbers were not finite."""
    rate_scale: float = 1.0
    """Of the learning rates; halved when training diverges."""
    largest_part: float = float("inf")
    """Padded feature frames that fit into memory at once."""


class Diverged(ValueError):
    """Training cannot go on: its numbers are not finite."""


class Trainer:
    """Trains one model; distillation is the same loop with a teacher in the objective."""

    def __init__(
        self, model: CascadedTransducer, teacher: CascadedTransducer | None, config: Config, tokenizer: Tokenizer,
        data_dir: Path, exp_dir: Path, inputs: dict[str, str | None], processes: Processes, start: Sequence[str] = (),
        alignment: Path | None = None,
    ) -> None:
        """`start` says for the log where the model's weights come from; `alignment` is for augment.recombine_share."""
        self.processes, self.device, self.inputs = processes, processes.device, inputs
        self.model, self.config, self.exp_dir = model.to(self.device), config, exp_dir
        teacher = teacher.to(self.device) if teacher is not None else None
        self.objective = Objective(model, config, teacher, tokenizer)
        self.optimizer = build_optimizer(
            model, config.training, processes.rank, processes.world_size, processes.sum_in_place
        )
        self.take_step = Stepper(model, self.objective, self.optimizer, config, processes, self.device)
        self.low = takes_bfloat16(config.training.precision, self.device)
        self.state = TrainState()
        self.metrics = Metrics()
        self.train_batches = TrainBatches(
            data_dir / "train_cuts.jsonl.gz", tokenizer, config, processes.rank, processes.world_size,
            stats={"mean": model.encoder.feature_mean.cpu()},  # so that what SpecAugment masks is 0 after normalising
            alignment=alignment,
        )
        self.dev_cuts = data_dir / "dev_cuts.jsonl.gz"
        self.dev = lambda: dev_batches(self.dev_cuts, tokenizer, config, processes.rank, processes.world_size)
        self.start = start
        self.set_aside: set[str] = set()
        self.writer: MetricWriter | None = None
        self.problem = ""
        self.newest_is_good = True
        self.clock = Clock()
        self.commit = git_commit()  # of the code that runs: another may be checked out while it does

    def resume(self) -> bool:
        """Go on from the newest good checkpoint of the first process, if there is one; False = a fresh start."""
        values = load_resumable(self.exp_dir, repair=True) if self.processes.is_first else None
        values = self.processes.from_first(values)
        if values is None:
            for line in self.start:
                logging.info("start: %s", line)
            return False
        self._restore(values)
        logging.info("resuming in epoch %d after batch %d", self.state.epoch, self.state.batch)
        return True

    def _restore(self, values: dict[str, Any]) -> None:
        self.model.load_state_dict(values["model"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.state = TrainState(**values["state"])
        self.newest_is_good = not self.state.bad_steps
        before = values.get("processes", self.processes.world_size)
        if self.state.batch and before != self.processes.world_size:
            logging.info("the epoch began with %d processes, %d go on with the rest", before, self.processes.world_size)
            self.state.epoch_parts.append([before, self.state.batch])
            self.state.batch = 0
        if values.get("bfloat16", self.low) != self.low:
            now, then = ("bfloat16", "float32") if self.low else ("float32", "bfloat16")
            logging.warning("products are in %s from here on, they were in %s before: other numbers", now, then)
        self.take_step.largest_part = self.state.largest_part
        self.metrics = Metrics()
        if self.processes.is_first:  # they are the sums of all processes
            self.metrics.add({name: (total, values["counts"][name]) for name, total in values["sums"].items()})
        self.set_aside = set(values["set_aside"])
        self.clock = Clock()

    def _values(self) -> dict[str, Any]:
        """The content of a resumable checkpoint, on every process."""
        metrics = self.metrics.over(self.processes)
        seconds, cpu_seconds = self.clock.take()
        self.state.seconds += seconds
        self.state.cpu_seconds += self.processes.sum([cpu_seconds])[0]
        self.state.largest_part = self.take_step.largest_part
        return model_values(self.model, self.config, self.state.epoch) | {
            "optimizer": self.optimizer.state_dict(), "state": asdict(self.state), "sums": metrics.sums,
            "counts": metrics.counts, "set_aside": self._gather_set_aside(), "inputs": self.inputs,
            "processes": self.processes.world_size, "bfloat16": self.low,
        }

    def _gather_set_aside(self) -> list[str]:
        """Ids that any process has set aside; the first one says those of the others."""
        ids = set().union(*self.processes.gather(sorted(self.set_aside)))
        self._set_aside(ids)
        return sorted(ids)

    def _set_aside(self, ids: set[str]) -> None:
        for utterance in sorted(ids - self.set_aside):
            logging.info("utterance %s has more tokens than its frames allow: set aside", utterance)
        self.set_aside |= ids

    def save(self) -> None:
        """Write a resumable checkpoint; what is saved between bad steps never replaces the last one without."""
        values = self._values()
        if self.processes.is_first:
            save_resumable(values, self.exp_dir, keep=self.newest_is_good or not self.state.bad_steps)
        self.newest_is_good = not self.state.bad_steps

    def run(self) -> bool:
        """Train to the end. False = a signal came, everything is saved.

        Raises:
          Diverged: the numbers stay not finite.
          ValueError, OSError: no dev set that can be used, said before the first step.
        """
        training = self.config.training
        finished = self.state.epoch > training.num_epochs and (self.exp_dir / "averaged.pt").is_file()
        if self.processes.from_first(finished):
            logging.info("%s is finished already", self.exp_dir)
            return True
        if self.processes.is_first and next(self.dev(), None) is None:
            raise ValueError(
                f"{self.dev_cuts} holds no utterance with tokens, and frames enough for them: give the corpus a dev "
                "set, and run stages 0 and 1 again"
            )
        self.clock = Clock()
        self._share_start()
        self.writer = MetricWriter(self.exp_dir, self.state.step) if self.processes.is_first else None
        self.last_save = time.monotonic()
        try:
            with StopRequest() as stop_request:
                while self.state.epoch <= training.num_epochs:
                    if self._run_epoch(stop_request) == "stopped":
                        name = stop_request.name or "a signal to another process"
                        logging.info("stopped by %s after step %d", name, self.state.step)
                        return False
                if self.processes.is_first:
                    self._finish()
                self.processes.barrier()
                return True
        finally:
            if self.writer is not None:
                self.writer.close()

    def _share_start(self) -> None:
        """Begin with the first process's weights on all of them; a diverging run can go back to them."""
        values = self._values()
        if self.state.step == 0 and self.processes.is_first:
            save_resumable(values, self.exp_dir)
        if self.processes.world_size > 1:
            weights = {name: tensor.cpu() for name, tensor in values["model"].items()}  # each has a GPU of its own
            self.model.load_state_dict(self.processes.from_first(weights))

    def _run_epoch(self, stop_request: StopRequest) -> str:
        """finished | stopped (by a signal) | went back (to a checkpoint)."""
        epoch, training = self.state.epoch, self.config.training
        self.train_batches.set_epoch(epoch, self.state.epoch_parts)
        total, done_before = len(self.train_batches), self.train_batches.share_done
        self.model.train()
        bar = progress(range(self.state.batch, total), f"epoch {epoch}/{training.num_epochs}")
        with self.train_batches.loading(skip=self.state.batch) as batches:
            for _ in bar:
                share = done_before + (1 - done_before) * self.state.batch / total
                self.step(next(batches), (epoch - 1 + share) / training.num_epochs)
                self.state.batch += 1
                if self.state.step % training.log_every_steps == 0:
                    self._log("train")
                late = time.monotonic() - self.last_save > 60 * training.save_every_minutes
                stop, late = self.processes.sum([float(stop_request.asked), float(late and not self.state.bad_steps)])
                if self.state.bad_steps >= training.max_bad_steps or ((stop or late) and not self._is_finite()):
                    bar.close()
                    self._go_back()
                    return "went back"
                if stop or late:
                    self.save()
                    self.last_save = time.monotonic()
                if stop:
                    return "stopped"
        bar.close()
        if not self._is_finite():
            self._go_back()
            return "went back"
        if epoch % training.validate_every_epochs == 0 or epoch == training.num_epochs or self.state.bad_steps:
            if self._validate() and self.state.bad_steps:
                self._go_back()
                return "went back"
        if self.processes.is_first:
            save_file(model_values(self.model, self.config, epoch), epoch_path(self.exp_dir, epoch))
            epoch_path(self.exp_dir, epoch - training.keep_epochs).unlink(missing_ok=True)
        self.state.epoch, self.state.batch, self.state.epoch_parts = epoch + 1, 0, []
        self.save()
        return "finished"

    def step(self, batch: Batch, run_share: float) -> None:
        """One optimizer step; one whose numbers are not finite is skipped and its batch saved."""
        rate = self.state.rate_scale * rate_share(self.config.training, self.state.step, run_share)
        result = self.take_step(batch, self.state.step, rate)
        self._set_aside(set(result.impossible))
        if result.problem:
            self.state.bad_steps += 1
            self.problem = f"step {self.state.step}: {result.problem}"
            path = save_bad_batch(self.exp_dir, batch, self.state.step, self.processes.rank, result)
            logging.warning("step %d skipped: %s; its batch is in %s", self.state.step, result.problem, path)
        else:
            self.state.bad_steps = 0
            self.metrics.add(result.sums)
        self.state.step += 1

    def _is_finite(self) -> bool:
        return not num_non_finite(self.model.state_dict())

    def _go_back(self) -> None:
        """Load the last checkpoint and go on with half the learning rate.

        Raises:
          Diverged: that was done already.
        """
        if self._is_finite():
            cause = f"{self.state.bad_steps} steps in a row were not finite, the last one: {self.problem}"
        else:
            cause = f"weights are not finite after step {self.state.step}"
        if self.state.rate_scale < 1:
            raise Diverged(
                f"training diverged again with half the learning rate: {cause}; the batches are in "
                f"{self.exp_dir / 'bad_batches'}, the last good checkpoint stays. Look at the data, or lower "
                "training.learning_rate and training.muon_learning_rate"
            )
        values = None
        if self.processes.is_first:
            values = load_resumable(self.exp_dir, wanted=lambda values: not values["state"]["bad_steps"])
        values = self.processes.from_first(values)
        if values is None:
            raise Diverged(f"training diverged, and no checkpoint from before it is there: {cause}")
        self._restore(values)
        self.state.rate_scale, self.state.bad_steps = self.state.rate_scale / 2, 0
        logging.warning(
            "training diverged (%s): back to step %d, with half the learning rate", cause, self.state.step
        )
        if self.writer is not None:
            self.writer.close()
            self.writer = MetricWriter(self.exp_dir, self.state.step)
        self.save()

    def _log(self, split: str, weights: dict[str, float] | None = None) -> None:
        """weights: of the terms, for a loss that is made of their means."""
        means = self.metrics.over(self.processes).means()
        if weights and means:
            means["loss"] = sum(weights[name] * mean for name, mean in means.items())
        if self.writer is not None:
            self.writer.write(split, self.state.epoch, self.state.step, means)
        self.metrics = Metrics()

    def _validate(self) -> bool:
        """Dev losses of both passes in a fixed geometry; whether some of them are not finite.

        What is not finite is left out and said.
        """
        self.model.eval()
        train_metrics, self.metrics = self.metrics, Metrics()
        broken: list[str] = []
        weights: dict[str, float] = {}
        for batch in self.dev():
            for losses in self.take_step.evaluate(batch, self.state.step, VALIDATION_CONTEXT):
                broken += losses.non_finite
                weights |= {name: term.weight for name, term in losses.terms.items()}
                terms = {name: (float(term.total), term.count) for name, term in losses.terms.items()}
                if all(math.isfinite(total) for total, _ in terms.values()):
                    self.metrics.add(terms)
        broken = [name for names in self.processes.gather(broken) for name in names]
        if broken:
            logging.warning("dev: the losses of %d utterances are not finite: %s", len(broken), ", ".join(broken[:5]))
        self._log("dev", weights)
        self.metrics = train_metrics
        self.model.train()
        return bool(broken)

    def _finish(self) -> None:
        """Average the last epochs into the final model and say what the run was."""
        training = self.config.training
        count = min(training.average_last, training.num_epochs)
        average = average_values(last_epochs(self.exp_dir, training.num_epochs, count), self.config)
        parts = params_by_part(self.model)
        summary = {
            "train_minutes": round(self.state.seconds / 60, 2), "cpu_minutes": round(self.state.cpu_seconds / 60, 2),
            "seed": self.config.seed, "num_params": parts["total"],
            "num_params_training": count_params(self.model) - parts["total"], "epochs": training.num_epochs,
            "steps": self.state.step, "set_aside": sorted(self.set_aside), "processes": self.processes.world_size,
            "device": self.device.type, "threads": torch.get_num_threads() * self.processes.world_size,
            "commit": self.commit, "command": command_line(), "machine": machine(self.device),
        }
        (self.exp_dir / "train_summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        save_file(average, self.exp_dir / "averaged.pt")  # last: with it the run counts as finished
        logging.info("finished %s: %.1f minutes", self.exp_dir, self.state.seconds / 60)


class Clock:
    """Wall and processor seconds since it was asked last, ended loader processes included."""

    def __init__(self) -> None:
        self.marks = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.monotonic(), sum(usage.ru_utime + usage.ru_stime for usage in used)

    def take(self) -> tuple[float, float]:
        before, self.marks = self.marks, self._now()
        return self.marks[0] - before[0], self.marks[1] - before[1]
