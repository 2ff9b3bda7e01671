"""Needs and hours of a training, without starting it: nothing is written.

Everything is checked that can fail later, all problems are collected instead of the first one, then some real steps
are measured. Hours are the measured seconds per second of audio (padding included) times the audio of the run: an
estimate from N steps on this machine as busy as it is now, and no more than that.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cascade.config.options import SUBSAMPLING, Config, ConfigError
from cascade.data.batches import FRAMES_PER_SECOND
from cascade.data.storage import read_features
from cascade.models.build import count_params, params_by_part
from cascade.processes.group import Processes
from cascade.text.tokens import Tokenizer
from cascade.training.earlier_run import plan_run
from cascade.training.run_inputs import RunInputs, RunPaths, build_trainer, describe_inputs, read_inputs
from cascade.training.step import OutOfMemory
from cascade.training.step_timing import NUM_STEPS, checkpoint_bytes, estimate_seconds, measure, padded_frames
from cascade.training.trainer import Trainer

DISK_MARGIN = 1.1


@dataclass
class Report:
    """Result of a dry run."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    """(heading, text) in the order of printing; an empty heading continues the one above."""
    problems: list[str] = field(default_factory=list)
    """Problems that would make the training fail."""
    notes: list[str] = field(default_factory=list)
    """Facts that are worth knowing."""

    def add(self, heading: str, *texts: str) -> None:
        self.rows += [(heading if index == 0 else "", text) for index, text in enumerate(texts)]

    def __str__(self) -> str:
        rows = [*self.rows]
        for heading, texts in (("notes", self.notes), ("problems", self.problems or ["none"])):
            rows += [(heading if index == 0 else "", text) for index, text in enumerate(texts)]
        return "\n".join(f"{heading:<12}{text}".rstrip() for heading, text in rows)


def dry_run(config: Config, paths: RunPaths, processes: Processes, force: bool = False) -> Report:
    """Check, measure, print the report.

    Raises:
      ValueError: the training would fail; the report, printed before, says why.
    """
    if processes.world_size > 1:
        raise ConfigError("--dry-run measures one process: start it without torchrun")
    report = Report()
    inputs = _read(config, paths, report)
    if inputs is not None:
        trainer = _build(config, paths, inputs, processes, report)
        if trainer is not None:
            _check_data(trainer, paths, report)
            if not report.problems:
                _estimate(trainer, report)
    _check_exp_dir(config, paths, inputs is not None, force, report)
    print(f"dry run of {paths.exp_dir}: nothing is written\n\n{report}")
    if report.problems:
        raise ValueError(f"{len(report.problems)} problem(s) would stop this training, see above")
    return report


def _read(config: Config, paths: RunPaths, report: Report) -> RunInputs | None:
    """The inputs; None when one is missing or does not fit, each named in the report."""
    for name, path in (("train", paths.data), ("dev", paths.data)):
        if not (path / f"{name}_cuts.jsonl.gz").is_file():
            report.problems.append(f"--data {path} holds no {name}_cuts.jsonl.gz: run stage 1 (compute_features)")
    try:
        return read_inputs(paths, config)
    except (ValueError, OSError) as error:
        report.problems.append(" ".join(str(error).split()))
    return None


def _build(
    config: Config, paths: RunPaths, inputs: RunInputs, processes: Processes, report: Report
) -> Trainer | None:
    _check_tokens(config, inputs.tokenizer, report)
    try:
        trainer = build_trainer(config, paths, inputs, {}, processes)
    except (ValueError, OSError) as error:
        report.problems.append(" ".join(str(error).split()))
        return None
    parts = params_by_part(trainer.model)
    total = parts.pop("total")
    lines = [f"{name:<20}{count:>13,}" for name, count in parts.items()]
    heads = count_params(trainer.model) - total
    report.add("parameters", *lines, f"{'for decoding':<20}{total:>13,}", f"{'training heads':<20}{heads:>13,}")
    if inputs.source is not None:
        report.add("start", f"from the weights of {inputs.source.path}")
    return trainer


def _check_tokens(config: Config, tokenizer: Tokenizer, report: Report) -> None:
    for name in ("kind", "case", "normal_form", "strip_punctuation"):
        own, wanted = getattr(tokenizer, name), getattr(config.tokens, name)
        if own != wanted:
            report.problems.append(f"the tokenizer's {name} is {own}, tokens.{name}={wanted}: run stage 2 again")


def _check_data(trainer: Trainer, paths: RunPaths, report: Report) -> None:
    """Read every archive at its end, where a copy that stopped half-way breaks; the texts were encoded before."""
    batches, config = trainer.train_batches, trainer.config
    utterances = batches.utterances
    last = {utterance.features.path: utterance for utterance in utterances}  # the last utterance of each archive
    for utterance in last.values():
        try:
            read_features(utterance.features)
        except ValueError as error:
            report.problems.append(str(error))
    hours = sum(utterance.num_frames for utterance in utterances) / FRAMES_PER_SECOND / 3600
    lines = [f"train {len(utterances):>9,} utterances, {hours:.2f} h, speed copies included, in {len(last):,} archives"]
    left_out = batches.left_out
    if left_out:
        kinds = Counter(reason.split(":", 1)[0] for reason in left_out.values())
        text = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        lines.append(f"      {len(left_out):>9,} utterances are left out ({text})")
        share = len(left_out) / (len(left_out) + len(utterances) / max(1, len(set(config.data.speed_factors))))
        if share > config.data.max_quarantine_share:
            utterance, reason = next(iter(left_out.items()))
            report.problems.append(
                f"{100 * share:.1f} % of the training utterances do not fit the tokenizer, more than "
                f"data.max_quarantine_share={config.data.max_quarantine_share}, such as {utterance}: {reason}"
            )
    if not report.problems:
        try:
            dev = [len(batch.ids) for batch in trainer.dev()]
        except (ValueError, OSError) as error:
            report.problems.append(" ".join(str(error).split()))
        else:
            lines.append(f"dev   {sum(dev):>9,} utterances in {len(dev)} batches")
            if not dev:
                report.problems.append(f"--data {paths.data}: no dev utterance has fewer tokens than frames")
    dense = max(utterances, key=lambda utterance: len(utterance.tokens) / (utterance.num_frames // SUBSAMPLING))
    frames = dense.num_frames // SUBSAMPLING
    tokens = f"{len(dense.tokens)} token{'s' * (len(dense.tokens) > 1)}"
    lines.append(f"densest text: {tokens} in {frames} encoder frames, of {frames} that would fit ({dense.id})")
    report.add("data", *lines)
    if config.loss.ctc_scale:
        short = [
            utterance.id for utterance in utterances
            if _ctc_frames(utterance.tokens) > utterance.num_frames // SUBSAMPLING
        ]
        if short:
            report.notes.append(
                f"{len(short)} utterances have too few frames for CTC (a repeated token needs a blank between), such "
                f"as {short[0]}: their CTC loss counts as 0"
            )


def _ctc_frames(tokens: tuple[int, ...]) -> int:
    return len(tokens) + sum(one == other for one, other in zip(tokens, tokens[1:], strict=False))


def _estimate(trainer: Trainer, report: Report) -> None:
    batches, training = trainer.train_batches, trainer.config.training
    batches.set_epoch(training.num_epochs)  # a random order, after any sorted epochs
    plan = batches.plan()
    logging.info("measuring up to %d steps of %d", min(NUM_STEPS, len(plan)), len(plan))
    try:
        measured = measure(trainer, plan)
    except MemoryError as error:
        report.problems.append(f"{error}: lower data.batch_duration (now {trainer.config.data.batch_duration:g}) or "
                               f"data.max_duration (now {trainer.config.data.max_duration:g})")
        return
    except OutOfMemory as error:
        report.problems.append(str(error))
        return
    if measured.non_finite:
        report.notes.append(f"no finite loss, set aside in training: {', '.join(measured.non_finite[:5])}")
    sizes = padded_frames(trainer, plan)
    lengths = [batches.utterances[index].num_frames for indices in plan for index in indices]
    report.add(
        "steps", f"{len(plan):,} per epoch, {len(plan) * training.num_epochs:,} in {training.num_epochs} epochs",
        f"batches of {np.median([len(indices) for indices in plan]):.0f} utterances at the median, at most "
        f"{sizes.max() / FRAMES_PER_SECOND:.0f} s of audio; {100 * (1 - sum(lengths) / sizes.sum()):.0f} % is padding",
    )
    _report_warmups(trainer, len(plan) * training.num_epochs, report)
    device, seconds = trainer.device, measured.seconds
    threads = torch.get_num_threads()
    name = f"the CPU, {threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    report.add(
        "measured", f"{len(seconds)} steps on {name}: {np.median(seconds):.3g} s at the median, {seconds.min():.3g} to "
        f"{seconds.max():.3g} s; validation {measured.dev_seconds:.3g} s",
    )
    total = estimate_seconds(measured, float(sizes.sum()), trainer.config)
    report.add(
        "time", f"about {_duration(total)} ({_duration(total / training.num_epochs)} per epoch): an estimate from "
        f"{len(seconds)} steps, on this machine as busy as it is now",
    )
    where = "for the whole process"
    if device.type == "cuda":
        where = f"of {_size(torch.cuda.get_device_properties(device).total_memory)} on the GPU"
    report.add("memory", f"{_size(measured.peak_bytes)} {where} at the peak, with the largest and the longest batch")
    if batches.kept_bytes:
        report.add("", f"and up to {_size(batches.kept_bytes)} of features, kept in memory while training")
    _report_disk(trainer, report)


def _report_warmups(trainer: Trainer, num_steps: int, report: Report) -> None:
    config = trainer.config
    for name, steps in (("loss", config.loss.warmup_steps), ("training", config.training.warmup_steps)):
        if steps > num_steps / 2:
            report.notes.append(f"{name}.warmup_steps={steps} is more than half of the run's {num_steps:,} steps")


def _report_disk(trainer: Trainer, report: Report) -> None:
    epoch, most = checkpoint_bytes(trainer)
    folder = _existing(trainer.exp_dir)
    free = shutil.disk_usage(folder).free
    report.add(
        "disk", f"{_size(most)} for checkpoints at most ({_size(epoch)} an epoch, training.keep_epochs="
        f"{trainer.config.training.keep_epochs}); {_size(free)} are free",
    )
    archives = {utterance.features.path for utterance in trainer.train_batches.utterances}
    features = sum(Path(archive).stat().st_size for archive in archives)
    report.add("", f"{_size(features)} are taken by the training features")
    if most * DISK_MARGIN > free:
        report.problems.append(
            f"{folder} has {_size(free)} free, the checkpoints need {_size(most)}: free some, or lower "
            "training.keep_epochs"
        )


def _check_exp_dir(config: Config, paths: RunPaths, complete: bool, force: bool, report: Report) -> None:
    """Check what the real run would do with --exp-dir; complete: its inputs can be read, to compare them."""
    folder = _existing(paths.exp_dir)
    if paths.exp_dir.exists() and not paths.exp_dir.is_dir():
        report.problems.append(f"--exp-dir {paths.exp_dir} is a file: name a folder")
    elif not os.access(folder, os.W_OK | os.X_OK):
        report.problems.append(f"--exp-dir {paths.exp_dir} cannot be written: {folder} is not yours to write in")
    else:
        try:
            plan = plan_run(config, paths.exp_dir, describe_inputs(config, paths) if complete else {}, force)
            report.add("exp-dir", plan.summary, *plan.lines)
        except (ValueError, OSError) as error:
            report.problems.append(" ".join(str(error).split()))


def _existing(path: Path) -> Path:
    """The nearest folder that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
