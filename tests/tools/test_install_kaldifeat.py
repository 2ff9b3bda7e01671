"""tools/install_kaldifeat.sh says in one sentence what is missing; its build takes minutes and is not run here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install_kaldifeat.sh"


def run(*arguments, **environment):
    return subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


@pytest.mark.parametrize("arguments", [("--jobs", "0"), ("--jobs",), ("--jobs=x",), ("--fast",)])
def test_wrong_options_are_named(arguments):
    ended = run(*arguments)
    assert ended.returncode == 2 and arguments[0].split("=")[0] in ended.stderr and ended.stderr.count("\n") == 1


def test_a_missing_compiler_is_told_before_anything_is_made():
    ended = run(CXX="false")
    assert ended.returncode == 1 and ended.stdout == "" and ended.stderr.count("\n") == 1
    assert "no C++17 compiler: 'false' does not compile; install one" in ended.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_a_missing_make_is_told(tmp_path):
    for name in ("bash", "c++", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    ended = run(PATH=str(tmp_path), CXX=shutil.which("c++"))
    assert ended.returncode == 1 and "make was not found; install it" in ended.stderr


def test_help_explains_what_is_built():
    ended = run("--help")
    assert ended.returncode == 0 and "--jobs N" in ended.stdout and "2 wrong usage" in ended.stdout
