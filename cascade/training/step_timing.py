"""Time, memory and disk of a training, from some of its real steps."""

from __future__ import annotations

import math
import resource
import time
from typing import NamedTuple

import numpy as np
import torch

from cascade.config.options import Config
from cascade.data.batches import FRAMES_PER_SECOND
from cascade.training.objective import VALIDATION_CONTEXT
from cascade.training.optim import Muon
from cascade.training.trainer import Trainer

NUM_STEPS = 12
SECONDS_FOR_STEPS = 120.0


class Measured(NamedTuple):
    """Time of the steps."""

    seconds: np.ndarray
    """(num_steps,) of the steps that count."""
    frames: np.ndarray
    """(num_steps,) feature frames of their batches, padding included."""
    dev_seconds: float
    """Validation once, estimated from some dev batches."""
    peak_bytes: int
    """Device memory, or this process's resident set on a CPU, the largest batches included."""
    non_finite: list[str]
    """Ids of utterances without a finite loss."""


def spread_order(count: int) -> list[int]:
    """0 .. count - 1 so that every beginning of the list is spread evenly (van der Corput's sequence).

    A measurement that runs out of time has then still seen short and long batches.
    """
    bits = max(1, (count - 1).bit_length())
    order = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits)]
    return [number for number in order if number < count]


def padded_frames(trainer: Trainer, plan: list[np.ndarray]) -> np.ndarray:
    """(num_batches,) feature frames of each batch, padding included."""
    lengths = np.array([utterance.num_frames for utterance in trainer.train_batches.utterances])
    return np.array([len(indices) * lengths[indices].max() for indices in plan])


def measure(trainer: Trainer, plan: list[np.ndarray], num_steps: int = NUM_STEPS) -> Measured:
    """Real optimizer steps on batches spread over all lengths, then on the largest and the longest batch.

    The first step, which compiles and allocates, does not count. Stops after SECONDS_FOR_STEPS, with one step at least.

    Raises:
      MemoryError: a batch does not fit.
    """
    batches, device = trainer.train_batches, trainer.device
    sizes = padded_frames(trainer, plan)
    by_size = np.argsort(sizes, kind="stable")
    ranks = np.linspace(0, len(plan) - 1, min(num_steps, len(plan))).round().astype(int)
    chosen = [int(by_size[ranks[position]]) for position in spread_order(len(ranks))]
    longest = max(range(len(plan)), key=lambda step: max(batches.utterances[row].num_frames for row in plan[step]))
    largest = int(by_size[-1])
    seconds, frames, non_finite = [], [], set()
    trainer.model.train()

    def step(index: int, number: int) -> float:
        batch = batches.load(plan[index])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.monotonic()
        result = trainer.take_step.attempt(batch, number, 0.01, num_parts=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if result is None:
            raise MemoryError(f"{len(batch.ids)} utterances of {batch.features.shape[1] / FRAMES_PER_SECOND:.1f} s "
                              f"do not fit into the memory of {device}")
        non_finite.update(result.impossible, result.non_finite)
        return time.monotonic() - start

    step(chosen[0], 0)
    begin = time.monotonic()
    for index in chosen:
        seconds.append(step(index, len(seconds)))
        frames.append(int(sizes[index]))
        if time.monotonic() - begin > SECONDS_FOR_STEPS:
            break
    for index in {largest, longest}:
        for number in numbers_of_all_passes(trainer):
            step(index, number)
    dev_seconds = _measure_dev(trainer)
    return Measured(np.array(seconds), np.array(frames), dev_seconds, peak_bytes(device), sorted(non_finite))


def numbers_of_all_passes(trainer: Trainer) -> range:
    """Step numbers among which each pass is drawn, most likely, where a step has one pass only."""
    return range(max(1, trainer.config.loss.pass_sampling * 4))


def peak_bytes(device: torch.device) -> int:
    """The most memory of the device that this process has taken so far, of a GPU since its statistics were reset; on a
    CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.no_grad()
def _measure_dev(trainer: Trainer) -> float:
    """Seconds of one validation, from its shortest, middle and longest batch."""
    batches = list(trainer.dev())
    total = sum(batch.features.shape[0] * batch.features.shape[1] for batch in batches)
    chosen = [batches[index] for index in sorted({0, len(batches) // 2, len(batches) - 1})]
    trainer.model.eval()
    start = time.monotonic()
    for batch in chosen:
        trainer.take_step.evaluate(batch, trainer.state.step, VALIDATION_CONTEXT)
    seconds = time.monotonic() - start
    trainer.model.train()
    return seconds * total / sum(batch.features.shape[0] * batch.features.shape[1] for batch in chosen)


def estimate_seconds(measured: Measured, epoch_frames: float, config: Config) -> float:
    """Seconds of the whole run: steps in proportion to their padded frames, plus the validations."""
    training = config.training
    steps = measured.seconds.sum() / measured.frames.sum() * epoch_frames * training.num_epochs
    return float(steps + measured.dev_seconds * math.ceil(training.num_epochs / training.validate_every_epochs))


def checkpoint_bytes(trainer: Trainer) -> tuple[int, int]:
    """(an epoch's file, the largest sum on disk of a run): kept epochs, the final model, and resumable ones.

    A resumable checkpoint holds AdamW's two moments, or Muon's one, too; a third one is written beside two old ones.
    """
    epoch = sum(tensor.numel() * tensor.element_size() for tensor in trainer.model.state_dict().values())
    moments = sum(
        (1 if isinstance(part, Muon) else 2) * parameter.numel() * parameter.element_size()
        for part in trainer.optimizer.parts for group in part.param_groups for parameter in group["params"]
    )
    training = trainer.config.training
    kept = min(training.keep_epochs + 1, training.num_epochs)  # a new one comes before the oldest goes
    return epoch, (kept + 1) * epoch + 3 * (epoch + moments)
