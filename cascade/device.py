"""Devices: what --device means, and what a user is told when that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.config.options import ConfigError
from cascade.nvidia import has_nvidia_gpu
from cascade.provenance import processor

if TYPE_CHECKING:  # options of programs that do without it stand here too
    import torch

CHOICES = ("auto", "cpu", "cuda")
ON_THE_CPU = "or take the CPU with --device cpu"


def choose_device(choice: str, num_processes: int = 1, local_rank: int = 0) -> torch.device:
    """The device of one of `num_processes` processes on this machine, a GPU each.

    Args:
      choice: cpu | cuda | auto: the GPU where torch can use one, else the CPU.
    Raises:
      ConfigError: cuda where there is no GPU; more processes than GPUs.
      ValueError: auto or cuda where an NVIDIA GPU is here that torch cannot use. Nobody would want the CPU silently.
    """
    import torch

    assert choice in CHOICES, choice
    if choice == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and has_nvidia_gpu():
        raise ValueError(f"an NVIDIA GPU is here, but {_why_not()}, {ON_THE_CPU}")
    if count == 0 and choice == "cuda":
        raise ConfigError(f"--device cuda needs an NVIDIA GPU, and none is here (tools/doctor says more): {ON_THE_CPU}")
    if count == 0:
        return torch.device("cpu")
    if num_processes > count:
        gpus = "one GPU is" if count == 1 else f"{count} GPUs are"
        raise ConfigError(
            f"{num_processes} training processes on this machine need a GPU each, and {gpus} here: start {count}, "
            f"{ON_THE_CPU}"
        )
    return torch.device("cuda", local_rank)


def _why_not() -> str:
    import torch

    if torch.version.cuda is None:
        return (
            "this PyTorch is the CPU build, perhaps set up on a machine without one: run tools/setup.sh again on this "
            "machine"
        )
    return (
        f"this PyTorch (CUDA {torch.version.cuda}) cannot use it: its driver is not loaded or too old, compare "
        "nvidia-smi's CUDA version"
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16, which others imitate slowly."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def takes_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether training.precision means products in bfloat16 on this device."""
    return precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))


def describe_device(device: torch.device) -> str:
    """The device in words, for logs: the GPU's name, or the processor's and the number of threads."""
    import torch

    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device}, {processor()}, {threads} thread{'s' * (threads > 1)}"
