"""Train a cascaded transducer, alone or distilled from a teacher.

A `distillation:` section in the config makes the model a student and wants --teacher. Run again after an
interruption, training goes on where it stopped. With options or data that change its numbers it starts over, says what
differs, and keeps the earlier run as DIR.previous-1, -2, ...: none is removed. Other options (intervals, workers) are
free; those of `decoding` are written into the models that are there. With more training.num_epochs it trains on; with
another training.average_last it averages the kept epochs anew. --init-from starts from the weights of a trained model
instead of random ones (fine-tuning). --dry-run checks all, measures a few steps, estimates hours and disk, and writes
nothing. While a training runs in DIR, a second one is refused.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from cascade.bin.cli import add_config_arguments, add_input_arguments, config_from_arguments, run_program
from cascade.bin.device_arguments import add_device_argument
from cascade.bin.model_arguments import check_values
from cascade.config.load import save_config
from cascade.config.options import Config, ConfigError
from cascade.device import choose_device, describe_device, has_bfloat16, takes_bfloat16
from cascade.files import writing_to
from cascade.log import setup_logging
from cascade.losses.backends import set_backend
from cascade.models.build import params_by_part
from cascade.processes.exits import Interrupted
from cascade.processes.group import Processes
from cascade.processes.launch import check_count, is_worker, run_workers
from cascade.threads import limit_threads
from cascade.training.dry_run import dry_run
from cascade.training.earlier_run import carry_on, make_room, plan_run
from cascade.training.run_inputs import RunInputs, RunPaths, build_trainer, check_options, describe_inputs, read_inputs
from cascade.training.run_lock import only_training_in


def log_device(config: Config, processes: Processes) -> None:
    """Log the device; the first line of train.log."""
    others = f", {processes.world_size} processes" if processes.world_size > 1 else ""
    low = takes_bfloat16(config.training.precision, processes.device)
    logging.info("device: %s%s%s", describe_device(processes.device), others, ", products in bfloat16" if low else "")
    if low and not has_bfloat16(processes.device):
        logging.warning("this device has no instructions for bfloat16: training.precision=float32 is faster here")


def train(config: Config, paths: RunPaths, inputs: RunInputs, processes: Processes, force: bool) -> bool:
    """Train in paths.exp_dir, from the start or from where an earlier call stopped. False = stopped by a signal."""
    described = describe_inputs(config, paths)
    if processes.is_first:
        plan = plan_run(config, paths.exp_dir, described, force)
        config = plan.config
        make_room(plan, paths.exp_dir)
        paths.exp_dir.mkdir(parents=True, exist_ok=True)
        setup_logging(paths.exp_dir / "train.log")
        log_device(config, processes)
        for line in (plan.summary, *plan.lines):
            logging.log(logging.WARNING if plan.action == "start over" else logging.INFO, "%s: %s", paths.exp_dir, line)
        carry_on(plan, paths.exp_dir)
        save_config(config, paths.exp_dir / "config.yaml")
        shutil.copytree(paths.tokens, paths.exp_dir / "tokens", dirs_exist_ok=True)
    config = processes.from_first(config)
    trainer = build_trainer(config, paths, inputs, described, processes)
    for name, count in params_by_part(trainer.model).items():
        logging.info("parameters: %-18s %11s", name, f"{count:,}")
    trainer.resume()
    return trainer.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    add_input_arguments(parser)
    parser.add_argument("--exp-dir", type=Path, required=True, metavar="DIR", help="where the model goes")
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument(
        "--num-processes", type=int, default=1, metavar="N",
        help="processes on this machine, each with batches of its own: one for each GPU, or for each CPU core",
    )
    parser.add_argument("--force", action="store_true", help="start over; the run that is there is kept, see above")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, measure some steps, estimate hours, memory and disk"
    )
    arguments = parser.parse_intermixed_args()
    config = config_from_arguments(arguments)
    exp_dir = arguments.exp_dir.resolve()  # "." has no name, and a link's target is what is kept as DIR.previous-1
    paths = RunPaths.from_arguments(arguments, exp_dir)
    check_count(arguments.num_processes)
    check_options(config, paths)
    check_values(arguments, threads=1)
    if arguments.num_processes > 1 and arguments.dry_run:
        raise ConfigError("--dry-run measures one process: leave --num-processes out")
    if arguments.num_processes > 1 and not is_worker():
        choose_device(arguments.device, arguments.num_processes)  # before any of them starts
        sys.exit(run_workers(arguments.num_processes))
    torch.set_flush_denormal(True)  # before the first parallel region: its threads inherit it
    if arguments.threads is not None:
        limit_threads(arguments.threads)
    processes = Processes.from_environment(arguments.device)
    set_backend(config.loss.backend, processes.device)
    if not processes.is_first:
        logging.getLogger().setLevel(logging.WARNING)
    if arguments.dry_run:
        log_device(config, processes)
        dry_run(config, paths, processes, arguments.force)
        processes.close()
        return
    with writing_to(paths.exp_dir):
        inputs = read_inputs(paths, config)
        with only_training_in(paths.exp_dir) if processes.is_first else nullcontext():
            finished = train(config, paths, inputs, processes, arguments.force)
    processes.close()
    if not finished:
        raise Interrupted("training state is saved; run the same command again to go on")


if __name__ == "__main__":
    run_program(main)
