"""tools/doctor: what it finds, before and after set-up, and what it advises."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
UNSET = ("OMP_", "MKL_", "PYTHON", "VIRTUAL_ENV", "CONDA_")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(UNSET)}


@pytest.fixture
def tree(tmp_path):
    """A checkout with the doctor and the pins, without an environment, in a folder whose name has a space."""
    root = tmp_path / "my checkout"
    (root / "tools").mkdir(parents=True)
    for name in ("tools/doctor", "tools/doctor.py", "tools/environment.py", "tools/setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "cascade", root / "cascade", ignore=shutil.ignore_patterns("__pycache__"))
    return root


def with_environment(tree):
    """Give a checkout this interpreter's environment as its .venv."""
    (tree / ".venv").symlink_to(sys.prefix)
    return tree


def doctor(tree, *words, **environment):
    path = os.pathsep.join([str(Path(sys.executable).parent), CLEAN["PATH"]])
    return subprocess.run(
        [str(tree / "tools" / "doctor"), *words], capture_output=True, text=True, timeout=120,
        env={**CLEAN, "PATH": path, **environment}, cwd=tree.parent,
    )


def findings(done):
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0) and done.returncode in (0, 1), done.stderr
    return {row["name"]: row for row in report["findings"]}


def test_before_set_up_it_says_to_set_up(tree):
    done = doctor(tree)
    assert done.returncode == 1 and "tools/setup.sh" in done.stdout and "Traceback" not in done.stderr
    assert "1 problem: environment" in done.stdout
    rows = findings(doctor(tree, "--json"))
    assert rows["environment"]["status"] == "PROBLEM" and rows["repository"]["section"] == "disk"
    assert not list(tree.rglob("__pycache__"))


def test_every_pin_stands_in_the_table_with_its_version(tree):
    done = doctor(with_environment(tree))
    pins = [line.split("==") for line in (tree / "requirements.txt").read_text().splitlines() if "==" in line]
    for name, version in pins:
        assert any(name in line.split() and version in line for line in done.stdout.splitlines()), name


def test_other_versions_are_problems_and_problems_make_the_exit_code(tree):
    pins = (tree / "requirements.txt").read_text()
    (tree / "requirements.txt").write_text(pins.replace("tqdm==", "tqdm==9") + "no-such-package-of-ours==1.0\n")
    done = doctor(with_environment(tree), "--json")
    rows = findings(done)
    assert done.returncode == 1
    assert rows["tqdm"]["status"] == "PROBLEM" and "is wanted" in rows["tqdm"]["value"]
    assert rows["no-such-package-of-ours"]["status"] == "PROBLEM"
    assert all("tools/setup.sh" in rows[name]["advice"] for name in ("tqdm", "no-such-package-of-ours"))
    assert rows["numpy"]["status"] == "ok"


def test_a_broken_interpreter_is_a_finding(tree):
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    (tree / ".venv" / "bin" / "python").chmod(0o755)
    done = doctor(tree, "--json")
    row = findings(done)["environment"]
    assert done.returncode == 1 and row["status"] == "PROBLEM" and "broken" in row["advice"]


def test_torchaudio_is_a_problem(tree, tmp_path):
    package = tmp_path / "packages" / "torchaudio-2.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.0\n")
    row = findings(doctor(with_environment(tree), "--json", PYTHONPATH=str(tmp_path / "packages")))["torchaudio"]
    assert row["status"] == "PROBLEM" and "pip uninstall torchaudio" in row["value"]


@pytest.mark.parametrize(("name", "value", "status"), [
    ("OMP_NUM_THREADS", "9999", "PROBLEM"), ("OMP_WAIT_POLICY", "active", "note"), ("PYTHONPATH", "/else", "note"),
])
def test_pitfalls_of_the_shell_are_named_with_their_remedy(tree, name, value, status):
    row = findings(doctor(tree, "--json", **{name: value}))[name]
    assert (row["section"], row["status"]) == ("pitfalls", status) and row["advice"]
    assert name not in findings(doctor(tree, "--json"))


def test_a_cache_of_code_that_others_may_write_to_is_a_problem(tree, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    for cache in (shared, shared / "numba"):
        options = {"NUMBA_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(tmp_path / "private")}
        row = findings(doctor(tree, "--json", **options))["numba's cache"]
        assert row["status"] == "PROBLEM" and f"NUMBA_CACHE_DIR={tmp_path}/private/cascade/numba" in row["advice"]
    (shared / "numba").mkdir(mode=0o700)
    assert "numba's cache" not in findings(doctor(tree, "--json", NUMBA_CACHE_DIR=str(shared / "numba")))


def test_nothing_is_run_from_a_folder_of_tmp_whose_name_is_known():
    for path in [*(ROOT / "tools").iterdir(), *(ROOT / "egs").rglob("*.sh"), *ROOT.glob("**/README.md")]:
        if path.is_file() and ".venv" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="replace")
            found = re.findall(r"(?:CACHE\w*|dir)=\S*(?:/tmp|TMPDIR)\S*", text)
            assert not found, f"{path}: another user of the machine could put code there: {found[0]}"


def test_without_any_python_it_says_what_to_install(tree, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(shutil.which(name))
    done = doctor(tree, PATH=str(tools), HOME=str(tmp_path), PYENV_ROOT=str(tmp_path))
    assert done.returncode == 1 and "no Python 3.11, 3.12 or 3.13 with its venv module: install one" in done.stderr


def test_a_gpu_that_a_cpu_build_cannot_use_is_a_problem_that_set_up_mends(tree, tmp_path):
    if torch.version.cuda is not None:
        pytest.skip("this torch is not a CPU build")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), CLEAN["PATH"]])
    rows = findings(doctor(with_environment(tree), "--json", PATH=path, CUDA_VISIBLE_DEVICES="0"))
    assert rows["GPU"]["status"] == "PROBLEM" and "CPU build" in rows["GPU"]["advice"]
    assert "run tools/setup.sh again on this machine" in rows["GPU"]["advice"]
    hidden = findings(doctor(tree, "--json", PATH=path, CUDA_VISIBLE_DEVICES=""))["GPU"]
    assert hidden["status"] == "note" and "hidden by CUDA_VISIBLE_DEVICES" in hidden["value"]
