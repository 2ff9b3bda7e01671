"""Train a cascaded transducer, alone or distilled from a teacher.

A `distillation:` section in the config makes the model a student and wants --teacher. Run again after an
interruption, training goes on where it stopped; with other options it starts over and keeps the earlier run in
DIR.previous.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
from pathlib import Path

import torch

from cascade.bin.cli import Interrupted, add_config_arguments, config_from_arguments, run_program
from cascade.checkpoint import load_file, restore_model
from cascade.config import Config, ConfigError, save_config
from cascade.data.storage import read_stats
from cascade.log import setup_logging
from cascade.models.build import build_model, params_by_part
from cascade.models.compress import init_from_teacher
from cascade.models.transducer import CascadedTransducer
from cascade.tokens import Tokenizer
from cascade.training.distributed import Processes
from cascade.training.trainer import Trainer


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
    if teacher_config.features != config.features:
        raise ValueError(f"--teacher {teacher_dir} was trained with other features: {teacher_config.features}")
    return teacher


def fingerprint(config: Config, tokens_dir: Path, data_dir: Path, teacher_dir: Path | None) -> str:
    """What a run depends on: config, tokens, data statistics, teacher."""
    digest = hashlib.sha256(repr(config).encode())
    files = [tokens_dir / "tokens.txt", data_dir / "stats.pt"]
    for path in files + ([teacher_dir / "averaged.pt"] if teacher_dir is not None else []):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def clear_other_run(exp_dir: Path, wanted: str, force: bool) -> None:
    """Move a run with other inputs, or any run under --force, out of the way: it stays in DIR.previous."""
    checkpoint = exp_dir / "checkpoint.pt"
    if not checkpoint.is_file() or (not force and load_file(checkpoint).get("fingerprint") == wanted):
        return
    previous = exp_dir.with_name(exp_dir.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    exp_dir.rename(previous)
    logging.warning(
        "%s held a run %s: starting over; the earlier run is in %s", exp_dir,
        "that --force discards" if force else "with other options or data", previous,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="features, what compute_features wrote")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="what train_tokens wrote")
    parser.add_argument("--exp-dir", type=Path, required=True, metavar="DIR", help="where the model goes")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="the teacher's --exp-dir, for distillation")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--force", action="store_true", help="start over even if a run is there")
    arguments = parser.parse_intermixed_args()
    config = config_from_arguments(arguments)
    if (config.distillation is None) != (arguments.teacher is None):
        raise ConfigError(
            "the config has a distillation section: name the teacher with --teacher DIR, or switch it off with "
            "distillation=null" if arguments.teacher is None else
            "--teacher is of use only with a distillation section in the config"
        )
    torch.set_flush_denormal(True)  # before the first parallel region: its threads inherit it
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    processes = Processes.from_environment()
    tokenizer = Tokenizer.load(arguments.tokens)
    stats = read_stats(arguments.data / "stats.pt")
    teacher = load_teacher(arguments.teacher, arguments.tokens, config) if arguments.teacher else None
    mark = fingerprint(config, arguments.tokens, arguments.data, arguments.teacher)
    if processes.is_first:
        clear_other_run(arguments.exp_dir, mark, arguments.force)
        arguments.exp_dir.mkdir(parents=True, exist_ok=True)
        setup_logging(arguments.exp_dir / "train.log")
        save_config(config, arguments.exp_dir / "config.yaml")
        shutil.copytree(arguments.tokens, arguments.exp_dir / "tokens", dirs_exist_ok=True)
    processes.barrier()

    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer.vocab_size)
    model.encoder.set_feature_stats(stats["mean"], stats["std"])
    for name, count in params_by_part(model).items():
        logging.info("parameters: %-18s %11s", name, f"{count:,}")
    trainer = Trainer(model, teacher, config, tokenizer, arguments.data, arguments.exp_dir, mark, processes)
    if not trainer.resume() and teacher is not None and config.distillation.init_from_teacher:
        for line in init_from_teacher(model, teacher):
            logging.info("start: %s", line)
    finished = trainer.run()
    processes.close()
    if not finished:
        raise Interrupted("training state is saved; run the same command again to go on")


if __name__ == "__main__":
    run_program(main)
