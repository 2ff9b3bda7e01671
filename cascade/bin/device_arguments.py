"""The option --device of every program that runs a model."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from cascade.config.options import ConfigError
from cascade.device import CHOICES, choose_device, describe_device
from cascade.threads import limit_threads

if TYPE_CHECKING:
    import torch


def add_device_argument(parser: argparse.ArgumentParser, cpu_only: bool = False) -> None:
    """Add --device. cpu_only: the program runs on the CPU by its nature and says so."""
    what = "auto is the CPU here, cuda is refused" if cpu_only else "auto (default): the GPU where there is one"
    parser.add_argument("--device", choices=CHOICES, default="auto", help=what)


def open_device(arguments: argparse.Namespace, why_cpu: str | None = None) -> torch.device:
    """The device that --device asks for, which becomes the first line of the log; sets --threads, if given.

    Args:
      why_cpu: why it must be the CPU this time, a clause; None: any device will do.
    Raises:
      ConfigError, ValueError: as `choose_device`; --device cuda with why_cpu.
    """
    import torch

    if why_cpu is not None and arguments.device == "cuda":
        raise ConfigError(f"--device cuda cannot be: {why_cpu}; take --device cpu or leave it out")
    if getattr(arguments, "threads", None) is not None:
        limit_threads(arguments.threads)
    torch.set_flush_denormal(True)  # before the first parallel region: its threads inherit it
    device = torch.device("cpu") if why_cpu is not None else choose_device(arguments.device)
    logging.info("device: %s", describe_device(device))
    return device
