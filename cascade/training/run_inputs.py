"""Inputs of a training run: its folders, what is read from them, whether the parts fit together."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from cascade.checkpoint import load_file, restore_model
from cascade.config.load import changed_options
from cascade.config.options import Config, ConfigError
from cascade.corpus.cut_checks import hash_utterances
from cascade.data.storage import read_stats
from cascade.models.encoder import check_encoders
from cascade.models.transducer import CascadedTransducer
from cascade.processes.group import Processes
from cascade.text.tokens import Tokenizer
from cascade.training.start import Source, checkpoint_file, read_source, start_model
from cascade.training.trainer import Trainer

Inputs = dict[str, str | None]
"""Inputs of a run by name: a hash or a value; None = it has no such thing."""


class RunPaths(NamedTuple):
    """The folders of a run."""

    data: Path
    """Features, what stage 1 wrote."""
    tokens: Path
    """The tokenizer, what stage 2 wrote."""
    exp_dir: Path
    """Folder of the model."""
    teacher: Path | None = None
    """The teacher's model directory, for distillation."""
    init_from: Path | None = None
    """The model to start from: a model directory or a checkpoint in one."""
    alignment: Path | None = None
    """Words of the training utterances with their times (CTM), for augment.recombine_share."""

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace, exp_dir: Path = Path(os.devnull)) -> RunPaths:
        """The folders that `add_input_arguments`'s options name; without exp_dir for what writes none."""
        return cls(
            arguments.data, arguments.tokens, exp_dir, arguments.teacher, arguments.init_from, arguments.alignment
        )


class RunInputs(NamedTuple):
    """Content of the folders of a run."""

    tokenizer: Tokenizer
    stats: dict[str, torch.Tensor]
    teacher: CascadedTransducer | None
    source: Source | None


def check_options(config: Config, paths: RunPaths) -> None:
    """Check that flags and config fit together.

    Raises:
      ConfigError: they contradict each other, or there is no such encoder.
    """
    check_encoders(config.model)
    if (config.distillation is None) != (paths.teacher is None):
        raise ConfigError(
            "the config has a distillation section: name the teacher with --teacher DIR, or switch it off with "
            "distillation=null" if paths.teacher is None else
            "--teacher is of use only with a distillation section in the config"
        )
    if paths.init_from is not None and config.distillation is not None and config.distillation.init_from_teacher:
        raise ConfigError(
            "--init-from and distillation.init_from_teacher=true both say where the student starts: set "
            "distillation.init_from_teacher=false, or leave --init-from out"
        )
    if config.mwer is not None and paths.init_from is None:
        raise ConfigError(
            "the config has an mwer section, which fine-tunes a trained model: name it with --init-from MODEL, or "
            "switch the section off with mwer=null"
        )
    if (config.augment.recombine_share > 0) != (paths.alignment is not None):
        raise ConfigError(
            f"augment.recombine_share={config.augment.recombine_share:g} wants the times of the training words: name "
            "the CTM file that align made of EXP/fbank/train_cuts.jsonl.gz with --alignment FILE"
            if paths.alignment is None else "--alignment is of use only with augment.recombine_share above 0"
        )
    exp_dir = paths.exp_dir.resolve()
    for flag, path in (  # starting over would take it along
        ("--data", paths.data), ("--tokens", paths.tokens), ("--teacher", paths.teacher),
        ("--init-from", paths.init_from), ("--alignment", paths.alignment),
    ):
        if path is not None and exp_dir in (path.resolve(), *path.resolve().parents):
            raise ConfigError(f"{flag} {path} lies in --exp-dir {paths.exp_dir}: choose another --exp-dir")
    if paths.teacher is not None and paths.teacher.resolve() in exp_dir.parents:  # a new teacher would take it along
        raise ConfigError(f"--exp-dir {paths.exp_dir} lies in --teacher {paths.teacher}: choose another --exp-dir")
    if paths.alignment is not None and not paths.alignment.is_file():
        raise ConfigError(f"--alignment {paths.alignment} does not exist: align writes it, as alignment.ctm")


def load_teacher(teacher_dir: Path, tokens_dir: Path, config: Config) -> CascadedTransducer:
    """The trained teacher, after checking that its posteriors can be compared with the student's.

    Raises:
      FileNotFoundError, ValueError: no finished training there; other tokens or features than the student's.
    """
    path = teacher_dir / "averaged.pt"
    if not path.is_file():
        raise FileNotFoundError(f"--teacher {teacher_dir} holds no finished model; train it first (stage 3)")
    teacher, teacher_config = restore_model(load_file(path))
    if (teacher_dir / "tokens" / "tokens.txt").read_bytes() != (tokens_dir / "tokens.txt").read_bytes():
        raise ValueError(f"--teacher {teacher_dir} was trained with other tokens than {tokens_dir}: retrain it")
    changed = [name for name in changed_options(teacher_config, config) if name.startswith("features.")]
    if set(changed) - {"features.extractor"}:  # all extractors give the same features
        raise ValueError(f"--teacher {teacher_dir} was trained with other features: {teacher_config.features}")
    return teacher


def read_inputs(paths: RunPaths, config: Config) -> RunInputs:
    """Read and check everything but the cuts.

    Raises:
      ValueError, OSError: something is missing, damaged, or does not fit the rest.
    """
    tokenizer = Tokenizer.load(paths.tokens)
    stats = read_stats(paths.data / "stats.pt", config.features.num_mel_bins)
    teacher = load_teacher(paths.teacher, paths.tokens, config) if paths.teacher is not None else None
    source = read_source(paths.init_from, config) if paths.init_from is not None else None
    return RunInputs(tokenizer, stats, teacher, source)


def describe_inputs(config: Config, paths: RunPaths) -> Inputs:
    """Files by name that a run depends on besides its config. Of models only the weights count.

    Raises:
      ValueError, OSError: a file is missing or damaged.
    """
    noise = paths.data / "noise" / "index.json"
    tokenizer = json.loads((paths.tokens / "tokenizer.json").read_text(encoding="utf-8"))
    return {
        "tokens.txt": _hash_file(paths.tokens / "tokens.txt"),
        **{f"tokenizer {name}": str(value) for name, value in tokenizer.items() if name != "vocab_size"},
        "data statistics": _hash_file(paths.data / "stats.pt"),
        "training utterances": hash_utterances(paths.data / "train_cuts.jsonl.gz"),
        "noise": _hash_file(noise) if config.augment.noise_share and noise.is_file() else None,
        "alignment": None if paths.alignment is None else _hash_file(paths.alignment),
        "teacher": None if paths.teacher is None else _hash_weights(paths.teacher / "averaged.pt"),
        "init-from": None if paths.init_from is None else _hash_weights(checkpoint_file(paths.init_from)),
    }


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash_weights(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path)["model"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_trainer(
    config: Config, paths: RunPaths, inputs: RunInputs, described: Inputs, processes: Processes
) -> Trainer:
    """A trainer with the model that the run begins with. Writes nothing."""
    model, start = start_model(config, inputs.tokenizer, inputs.stats, inputs.teacher, inputs.source)
    return Trainer(
        model, inputs.teacher, config, inputs.tokenizer, paths.data, paths.exp_dir, described, processes, start,
        paths.alignment,
    )
