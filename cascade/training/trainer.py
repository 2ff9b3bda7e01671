"""The training loop: deterministic, resumable at any step, the same bits as a run that never stopped."""

from __future__ import annotations

import json
import logging
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cascade.checkpoint import average_values, epoch_path, last_epochs, load_file, model_values, save_file
from cascade.config import Config
from cascade.data.batches import Batch, TrainBatches, dev_batches
from cascade.log import progress
from cascade.models.build import count_params, params_by_part
from cascade.models.transducer import CascadedTransducer
from cascade.provenance import command_line, git_commit, machine
from cascade.tokens import Tokenizer
from cascade.training.distributed import Processes
from cascade.training.metrics import Metrics, MetricWriter
from cascade.training.objective import VALIDATION_CONTEXT, Objective
from cascade.training.optim import build_optimizer, rate_share


@dataclass
class TrainState:
    """Everything that changes while training, besides weights and optimizer."""

    epoch: int = 1
    """The epoch under way, from 1."""
    batch: int = 0
    """Batches of this epoch that are done."""
    step: int = 0
    """Optimizer steps that are done."""
    seconds: float = 0.0
    """Time spent training."""


class SignalWatch:
    """Remembers SIGINT and SIGTERM, so that the loop can stop between two steps; a second one interrupts at once."""

    def __init__(self) -> None:
        self.name = ""
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Trainer:
    """Trains one model; distillation is the same loop with a teacher in the objective."""

    def __init__(
        self, model: CascadedTransducer, teacher: CascadedTransducer | None, config: Config, tokenizer: Tokenizer,
        data_dir: Path, exp_dir: Path, fingerprint: str, processes: Processes,
    ) -> None:
        self.processes, self.device, self.fingerprint = processes, processes.device, fingerprint
        self.model, self.config, self.exp_dir = model.to(self.device), config, exp_dir
        self.objective = Objective(model, config, teacher.to(self.device) if teacher is not None else None)
        self.optimizer = build_optimizer(
            model, config.training, processes.rank, processes.world_size, processes.sum_in_place
        )
        self.state = TrainState()
        self.metrics = Metrics()
        self.train_batches = TrainBatches(
            data_dir / "train_cuts.jsonl.gz", tokenizer, config, processes.rank, processes.world_size,
            stats={"mean": model.encoder.feature_mean.cpu()},  # so that what SpecAugment masks is 0 after normalising
        )
        self.dev = lambda: dev_batches(data_dir / "dev_cuts.jsonl.gz", tokenizer, config)
        self.set_aside: set[str] = set()

    @property
    def checkpoint_path(self) -> Path:
        return self.exp_dir / "checkpoint.pt"

    def resume(self) -> bool:
        """Go on from checkpoint.pt if there is one; False = a fresh start."""
        if not self.checkpoint_path.is_file():
            return False
        values = load_file(self.checkpoint_path)
        self.model.load_state_dict(values["model"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.state = TrainState(**values["state"])
        before = values.get("processes", self.processes.world_size)
        if self.state.batch and before != self.processes.world_size:  # each process has batches of its own
            raise ValueError(
                f"{self.exp_dir} stopped inside an epoch of {before} processes, this are {self.processes.world_size}: "
                f"go on with --num-processes {before}, or start over with --force"
            )
        self.metrics.sums, self.metrics.counts = values["sums"], values["counts"]
        self.set_aside = set(values["set_aside"])
        logging.info("resuming in epoch %d after batch %d", self.state.epoch, self.state.batch)
        return True

    def save(self) -> None:
        if self.processes.is_first:
            values = model_values(self.model, self.config, self.state.epoch) | {
                "optimizer": self.optimizer.state_dict(), "state": asdict(self.state), "sums": self.metrics.sums,
                "counts": self.metrics.counts, "set_aside": sorted(self.set_aside), "fingerprint": self.fingerprint,
                "processes": self.processes.world_size,
            }
            save_file(values, self.checkpoint_path)

    def run(self) -> bool:
        """Train to the end. False = a signal came, everything is saved."""
        training = self.config.training
        if self.state.epoch > training.num_epochs and (self.exp_dir / "averaged.pt").is_file():
            logging.info("%s is finished already", self.exp_dir)
            return True
        self.writer = MetricWriter(self.exp_dir, self.state.step) if self.processes.is_first else None
        watch = SignalWatch()
        self.last_save = time.monotonic()
        try:
            while self.state.epoch <= training.num_epochs:
                if not self._run_epoch(watch):
                    logging.info("stopped by %s after step %d", watch.name, self.state.step)
                    return False
            if self.processes.is_first:
                self._finish()
            self.processes.barrier()
            return True
        finally:
            watch.restore()
            if self.writer is not None:
                self.writer.close()

    def _run_epoch(self, watch: SignalWatch) -> bool:
        epoch, training = self.state.epoch, self.config.training
        self.train_batches.set_epoch(epoch)
        total = self.train_batches.num_batches(epoch)
        self.model.train()
        started, seconds_before = time.monotonic(), self.state.seconds
        batches = iter(self.train_batches.iterate(skip=self.state.batch))
        bar = progress(range(self.state.batch, total), f"epoch {epoch}/{training.num_epochs}")
        for _ in bar:
            self.step(next(batches, None), (epoch - 1 + self.state.batch / total) / training.num_epochs)
            self.state.batch += 1
            self.state.seconds = seconds_before + time.monotonic() - started
            if self.state.step % training.log_every_steps == 0:
                self._log("train")
            stop = self.processes.sum([float(bool(watch.name))], self.device)[0] > 0
            if stop or time.monotonic() - self.last_save > 60 * training.save_every_minutes:
                self.save()
                self.last_save = time.monotonic()
            if stop:
                return False
        bar.close()
        if epoch % training.validate_every_epochs == 0 or epoch == training.num_epochs:
            self._validate()
        self.state.seconds = seconds_before + time.monotonic() - started
        if self.processes.is_first:
            save_file(model_values(self.model, self.config, epoch), epoch_path(self.exp_dir, epoch))
            epoch_path(self.exp_dir, epoch - training.keep_epochs).unlink(missing_ok=True)
        self.state.epoch, self.state.batch = epoch + 1, 0
        self.save()
        return True

    def step(self, batch: Batch | None, run_share: float) -> None:
        """One optimizer step. A rank without a batch takes part with zeros."""
        step, training = self.state.step, self.config.training
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 4096 + self.processes.rank)
        context, passes = self.objective.draw(step)
        self.model.zero_grad(set_to_none=True)
        num_tokens = 0.0
        if batch is not None:
            batch = batch.to(self.device)
            loss, sums, impossible = self.objective(batch, step, context, passes)
            loss.backward()
            num_tokens = float(batch.token_lens.sum())
            self.metrics.add(sums)
            for utterance in set(impossible) - self.set_aside:
                logging.warning("utterance %s has more tokens than its frames allow: set aside", utterance)
                self.set_aside.add(utterance)
        num_tokens = self.processes.sum([num_tokens], self.device)[0]
        self.processes.sum_gradients(self.model)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= max(num_tokens, 1.0)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)
        rate = rate_share(training, step, run_share)
        if torch.isfinite(norm):
            self.optimizer.step(rate)
        else:
            logging.warning("step %d skipped: the gradient is not finite (norm %s)", step, float(norm))
        self.metrics.add({"grad_norm": (float(norm), 1.0), "learning_rate": (rate * training.learning_rate, 1.0)})
        self.state.step += 1

    def _log(self, split: str) -> None:
        if self.writer is not None:
            self.writer.write(split, self.state.epoch, self.state.step, self.metrics.means())
        self.metrics = Metrics()

    @torch.no_grad()
    def _validate(self) -> None:
        """Dev losses of both passes in a fixed geometry."""
        self.model.eval()
        train_metrics, self.metrics = self.metrics, Metrics()
        for batch in self.dev():
            _, sums, _ = self.objective(batch.to(self.device), self.state.step, VALIDATION_CONTEXT)
            self.metrics.add(sums)
        self._log("dev")
        self.metrics = train_metrics
        self.model.train()

    def _finish(self) -> None:
        """Average the last epochs into the final model and say what the run was."""
        training = self.config.training
        count = min(training.average_last, training.num_epochs)
        save_file(average_values(last_epochs(self.exp_dir, training.num_epochs, count)), self.exp_dir / "averaged.pt")
        parts = params_by_part(self.model)
        summary = {
            "train_minutes": round(self.state.seconds / 60, 2), "seed": self.config.seed, "num_params": parts["total"],
            "num_params_training": count_params(self.model) - parts["total"], "epochs": training.num_epochs,
            "steps": self.state.step, "set_aside": sorted(self.set_aside), "processes": self.processes.world_size,
            "threads": torch.get_num_threads() * self.processes.world_size,
            "commit": git_commit(), "command": command_line(), "machine": machine(),
        }
        (self.exp_dir / "train_summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        logging.info("finished %s: %.1f minutes", self.exp_dir, self.state.seconds / 60)
