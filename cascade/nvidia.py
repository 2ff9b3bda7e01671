"""Detection of an NVIDIA GPU with the standard library alone: set-up asks before torch is there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

DEV = Path("/dev")


def has_nvidia_gpu() -> bool:
    """Tell whether the driver shows a GPU, and CUDA_VISIBLE_DEVICES does not hide all of them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    if any(DEV.glob("nvidia[0-9]*")):
        return True
    program = shutil.which("nvidia-smi")  # WSL has the program and no such files
    if program is None:
        return False
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and done.stdout.startswith("GPU")
