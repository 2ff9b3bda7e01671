"""The largest batch of a training that fits into a device's memory, found by taking real steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cascade.data.batches import FRAMES_PER_SECOND, plan_batches
from cascade.training.step import OutOfMemory
from cascade.training.step_timing import numbers_of_all_passes, peak_bytes
from cascade.training.trainer import Trainer

KEPT_FREE = 0.1
"""Share of the memory that a step must leave: batches of other shapes and fragments need some."""
PRECISION = 1.05


class Trial(NamedTuple):
    """Steps on the hardest batches of one size."""

    batch_duration: float
    """Seconds of audio, padding included."""
    fits: bool
    peak_bytes: float
    """Memory at the peak; nan where the device ran out of it."""


def available_bytes(device: torch.device) -> float:
    """Memory that this process may come to take: the GPU's, or on a CPU what it has and what is free."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    free = [
        1024 * int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    ]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and group.read_text().strip().isdigit():
        free.append(int(group.read_text()) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(free) + peak_bytes(device)


def hardest_batches(trainer: Trainer, batch_duration: float) -> list[np.ndarray]:
    """Indices of the batches of this size with the most frames, the most lattice cells and the longest utterance."""
    utterances, config = trainer.train_batches.utterances, trainer.config
    num_frames = np.array([utterance.num_frames for utterance in utterances])
    num_tokens = np.array([len(utterance.tokens) for utterance in utterances])
    plan = plan_batches(num_frames, batch_duration * FRAMES_PER_SECOND, config.data.num_buckets, config.seed, epoch=1)
    sizes = [
        [len(rows) * num_frames[rows].max() for rows in plan],
        [len(rows) * num_frames[rows].max() * (num_tokens[rows].max() + 1) for rows in plan],
        [num_frames[rows].max() for rows in plan],
    ]
    return [plan[index] for index in sorted({int(np.argmax(size)) for size in sizes})]


def trials(trainer: Trainer) -> Iterator[Trial]:
    """Try larger and larger batches until one does not fit, then between the last two, to within 5 %.

    On a CPU, which has no clear end of memory, a size is not tried when the sizes before say that it would not fit.

    Raises:
      OutOfMemory: not even the longest utterance alone fits.
    """
    limit = (1 - KEPT_FREE) * available_bytes(trainer.device)
    utterances = trainer.train_batches.utterances
    longest = max(utterance.num_frames for utterance in utterances) / FRAMES_PER_SECOND
    whole = sum(utterance.num_frames for utterance in utterances) / FRAMES_PER_SECOND
    start, size, good, bad = peak_bytes(trainer.device), longest, 0.0, float("inf")
    slope = 0.0
    while size > good * PRECISION:
        expected = start + slope * size
        if trainer.device.type == "cpu" and expected > limit:
            trial = Trial(size, False, expected)
        else:
            trial = _try(trainer, size, limit)
        yield trial
        if trial.fits:
            good, slope = size, max(slope, (trial.peak_bytes - start) / size)
        else:
            bad = size
        if good >= whole:
            return
        size = min(2 * good, whole) if bad == float("inf") else (good + bad) / 2
        if not good:
            raise OutOfMemory(
                f"the longest utterance alone ({longest:.1f} s) does not fit into the memory of {trainer.device}: "
                "lower data.max_duration, or take a smaller model"
            )
        if bad / good <= PRECISION:
            return


def _try(trainer: Trainer, batch_duration: float, limit: float) -> Trial:
    if trainer.device.type == "cuda":  # or the peak of a size that was too large would count for all after it
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(trainer.device)
    trainer.model.train()
    for indices in hardest_batches(trainer, batch_duration):
        batch = trainer.train_batches.load(indices)
        for step in numbers_of_all_passes(trainer):
            if trainer.take_step.attempt(batch, step, 0.0, num_parts=1) is None:
                trainer.model.zero_grad(set_to_none=True)
                return Trial(batch_duration, False, float("nan"))
    peak = peak_bytes(trainer.device)
    return Trial(batch_duration, peak <= limit, peak)


def largest_batch(trainer: Trainer) -> Trial:
    """The largest trial that fits; every trial is logged."""
    best = None
    for trial in trials(trainer):
        memory = "no memory left" if np.isnan(trial.peak_bytes) else f"{trial.peak_bytes / 1e9:.2f} GB"
        logging.info("%7.1f s of audio: %s, %s", trial.batch_duration, memory, "fits" if trial.fits else "too large")
        if trial.fits and (best is None or trial.batch_duration > best.batch_duration):
            best = trial
    return best
