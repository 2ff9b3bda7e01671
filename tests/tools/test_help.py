"""The programs under tools/ start from anywhere with the interpreter of the environment alone, installed or not."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PROGRAMS = [path.name for path in sorted(TOOLS.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_shown_from_another_folder(name, tmp_path):
    ended = subprocess.run([sys.executable, TOOLS / name, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0 and ended.stderr == "" and ended.stdout
