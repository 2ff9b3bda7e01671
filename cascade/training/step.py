"""One optimizer step, taken or not by all processes together: global means, parts that fit into memory, bad numbers."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch

from cascade.config.options import Config
from cascade.data.batches import FRAMES_PER_SECOND, Batch
from cascade.models.transducer import CascadedTransducer
from cascade.processes.group import Processes
from cascade.training.objective import Context, Losses, Objective
from cascade.training.optim import Optimizer


class StepResult(NamedTuple):
    """Outcome of a step."""

    sums: dict[str, tuple[float, float]]
    """{name: (sum, count)} of this process, for the log; empty when the step was not taken."""
    impossible: list[str]
    """Utterances of this process without an alignment."""
    problem: str
    """Reason why the step was not taken, on every process; empty when it was."""
    non_finite: list[str]
    """Utterances of this process whose loss is not finite."""


class OutOfMemory(ValueError):
    """A single utterance does not fit."""


class Stepper:
    """Takes optimizer steps; a step is the same whatever number of processes and parts share its batch."""

    def __init__(
        self, model: CascadedTransducer, objective: Objective, optimizer: Optimizer, config: Config,
        processes: Processes, device: torch.device,
    ) -> None:
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.config, self.processes, self.device = config, processes, device
        self.largest_part = math.inf
        """Padded feature frames that fit into memory at once; falls when they do not."""

    def __call__(self, batch: Batch, step: int, rate: float) -> StepResult:
        """
        Args:
          batch: this process's utterances.
          step: seeds the geometry, the pass and the dropout.
          rate: learning rate as a share of its peak.
        Raises:
          OutOfMemory: not even a part of one utterance fits.
        """
        num_parts = 1
        if math.isfinite(self.largest_part):
            num_parts = 2 ** max(0, math.ceil(math.log2(self._largest_size(batch) / self.largest_part)))
        while True:
            result = self.attempt(batch, step, rate, num_parts)
            if result is not None:
                return result
            self._shrink(batch, num_parts)
            num_parts *= 2

    def _largest_size(self, batch: Batch) -> float:
        """Padded feature frames of the largest batch of all processes."""
        return self.processes.max(batch.features.shape[0] * batch.features.shape[1])

    def _shrink(self, batch: Batch, num_parts: int) -> None:
        """Allow half of what was tried, on all processes.

        Raises:
          OutOfMemory: the parts are single utterances already.
        """
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.processes.max(float(len(batch.ids))) <= num_parts:
            longest = float(batch.feature_lens.max()) / FRAMES_PER_SECOND
            raise OutOfMemory(
                f"a single utterance does not fit into the memory of {self.device} (the longest here has {longest:.1f} "
                "s): lower data.max_duration and prepare the data again, or take a smaller model"
            )
        self.largest_part = self._largest_size(batch) / num_parts / 2
        logging.warning(
            "out of memory: from now on at most %.0f s of audio at once, larger batches in parts (slower); a smaller "
            "data.batch_duration does without them", self.largest_part / FRAMES_PER_SECOND,
        )

    def attempt(self, batch: Batch, step: int, rate: float, num_parts: int) -> StepResult | None:
        """The step in `num_parts` parts; None when some process ran out of memory."""
        context, passes = self.objective.draw(step)
        self.model.zero_grad(set_to_none=True)
        parts = batch.split(num_parts) if num_parts > 1 else [batch]
        losses, counts, failure = [], {}, ""
        try:
            for number, part in enumerate(parts):
                losses.append(self._losses(part, number, step, context, passes, keep=num_parts == 1))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            failure = _memory_failure(error)
        names = [*losses[0].terms] if losses else []
        non_finite = [name for loss in losses for name in loss.non_finite]
        sums = [sum(float(loss.terms[name].total.detach()) for loss in losses) for name in names]
        if not failure and not all(map(math.isfinite, sums)):
            non_finite = non_finite or batch.ids
        local = [sum(loss.terms[name].count for loss in losses) for name in names]
        failed, broken = self.processes.sum([float(bool(failure)), float(len(non_finite))])
        if failed:
            return None
        counts = dict(zip(names, self.processes.sum(local), strict=True))
        if broken:
            return self._refuse(losses, non_finite, f"the loss of {broken:.0f} utterances is not finite")
        try:
            for number, part in enumerate(parts):
                loss = losses[0] if num_parts == 1 else self._losses(part, number, step, context, passes, keep=True)
                terms = loss.terms.items()
                total = sum(term.total * (term.weight / max(counts[name], 1e-10)) for name, term in terms)
                total.backward()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            failure = _memory_failure(error)
        if self.processes.world_size > 1 and self.processes.sum([float(bool(failure))])[0]:
            failure = "another process"
        if failure:
            return None
        try:
            self.processes.sum_gradients(self.model)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.max_grad_norm)
            if not torch.isfinite(norm):
                return self._refuse(losses, non_finite, f"the norm of the gradient is {float(norm)}")
            self.optimizer.step(rate)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise OutOfMemory(
                f"{_memory_failure(error)}, in the optimizer, whose needs do not depend on the batch: lower "
                "data.batch_duration all the same, or take a smaller model"
            ) from error
        means = {name: (value, count) for name, value, count in zip(names, sums, local, strict=True)}
        weights = {name: term.weight for name, term in losses[0].terms.items()}
        share = sum(weights[name] * value / max(counts[name], 1e-10) for name, (value, _) in means.items())
        tokens = f"{passes[0]}_simple"  # counts them
        means["loss"] = (share * counts[tokens], means[tokens][1])  # shares add up over the processes
        means |= {"grad_norm": (float(norm), 1.0), "learning_rate": (rate * self.config.training.learning_rate, 1.0)}
        return StepResult(means, [name for loss in losses for name in loss.impossible], "", [])

    @torch.no_grad()
    def evaluate(self, batch: Batch, step: int, context: Context) -> list[Losses]:
        """Losses of both passes without a step, in as many parts as the memory wants; this process's business alone.

        Raises:
          OutOfMemory: a single utterance does not fit.
        """
        num_parts = 1
        while True:
            try:
                return [self.objective(part.to(self.device), step, context) for part in batch.split(num_parts)]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                problem = _memory_failure(error)
            if num_parts >= len(batch.ids):
                raise OutOfMemory(f"a single utterance of dev does not fit into the memory of {self.device}: {problem}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            num_parts *= 2

    def _losses(
        self, part: Batch, number: int, step: int, context: Context, passes: tuple[str, ...], keep: bool
    ) -> Losses:
        """The losses of one part; keep: for a backward pass."""
        rank_step = (self.config.seed * 1_000_003 + step) * 4096 + self.processes.rank
        torch.manual_seed(rank_step + 2**40 * number)
        with torch.set_grad_enabled(keep):
            return self.objective(part.to(self.device), step, context, passes)

    def _refuse(self, losses: list[Losses], non_finite: list[str], problem: str) -> StepResult:
        self.model.zero_grad(set_to_none=True)
        return StepResult({}, [name for loss in losses for name in loss.impossible], problem, non_finite)


def _memory_failure(error: Exception) -> str:
    """Name what ran out of memory; raise any other error again."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return str(error).splitlines()[0] if str(error) else "memory"
    raise error
