"""Provenance of a number: the command, the commit, the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def git_commit() -> str:
    """Short hash of the checkout this package lies in, with `-dirty` for uncommitted changes; "unknown" elsewhere."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here, capture_output=True, text=True,
            check=True, timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].strip() if names else model
    return model


def instruction_sets() -> list[str]:
    """Which of AVX2, AVX512 and VNNI the processor has, which decide how fast 8 bits are; empty where unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    sets = {"AVX2": {"avx2"}, "AVX512": {"avx512f"}, "VNNI": {"avx512_vnni", "avx_vnni"}}
    return [name for name, any_of in sets.items() if any_of & flags]


def machine(device: torch.device | None = None) -> str:
    """Processor, core count and the versions that matter for speed, in one line; the GPU first if `device` is one."""
    import torch

    gpu = f"{torch.cuda.get_device_name(device)}, " if device is not None and device.type == "cuda" else ""
    return f"{gpu}{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def command_line() -> str:
    """This program's command, as a shell would read it, with paths below the current folder made relative."""
    program = Path(sys.argv[0])
    here = f"{Path.cwd()}{os.sep}"
    words = [word.removeprefix(here) for word in sys.argv[1:]]
    parts = program.with_suffix("").parts
    if "cascade" in parts:
        name = ".".join(parts[len(parts) - 1 - parts[::-1].index("cascade"):])
        return shlex.join(["python", "-m", name, *words])
    return shlex.join(["python", str(program).removeprefix(here), *words])
