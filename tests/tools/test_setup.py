"""tools/setup.sh: which build of PyTorch is installed where, with pip, disk, GPU and PyTorch's index all pretended."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNSET = ("PYTHON", "VIRTUAL_ENV", "CONDA_", "CUDA_", "SETUP_", "PIP_")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(UNSET)}
PYTHON = f"""#!/bin/bash
# Python, but `-m venv` copies this script, `-m pip` installs the build that $PIP_GIVES says and notes its words.
case "$*" in
    "-m venv --clear "*) rm -rf "${{*: -1}}"; mkdir -p "${{*: -1}}/bin" && cp "$0" "${{*: -1}}/bin/python" ;;
    "-m pip "*)
        echo "$*" >>"$NOTES"
        case "$PIP_GIVES" in
            offline) echo "ERROR: NewConnectionError"; exit 1 ;;
            cuda) build="'13.0'" ;;
            cpu) build=None ;;
        esac
        [[ "$*" != *--extra-index-url* ]] || build=None
        mkdir -p "$PYTHONPATH/torch" "$PYTHONPATH/torch-2.13.0.dist-info"
        touch "$PYTHONPATH/torch/__init__.py"
        echo "cuda: str = $build" >"$PYTHONPATH/torch/version.py"
        printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 2.13.0\\n' >"$PYTHONPATH/torch-2.13.0.dist-info/METADATA"
        echo pip >"$PYTHONPATH/torch-2.13.0.dist-info/INSTALLER"
        ;;
    "-c "*https://*) exit "$INDEX_CODE" ;;
    "-c import pip") exit 0 ;;
    *) exec {sys.executable} -B -S "$@" ;;  # -S: none of the packages here
esac
"""


@pytest.fixture
def setup(tmp_path):
    """setup(**what): run set-up in a checkout that pins torch alone.

    gpu: nvidia-smi shows one; free_mb: of the disk; index: PyTorch's index answers; pip: the build that the default
    index gives, or offline. Other words are variables of the environment.
    """
    root, fakes = tmp_path / "my checkout", tmp_path / "bin"
    for folder in (root / "tools", root / "cascade", fakes, tmp_path / "packages"):
        folder.mkdir(parents=True)
    for name in ("tools/setup.sh", "tools/environment.py", "cascade/__init__.py", "cascade/nvidia.py"):
        shutil.copy(ROOT / name, root / name)
    checks = (root / "tools" / "environment.py").read_text()
    (root / "tools" / "environment.py").write_text(checks.split("COMPILED = (")[0] + "COMPILED = ()\n" + checks[
        checks.index("\n)\n", checks.index("COMPILED = (")) + 3:])  # fmt: skip
    (root / "requirements.txt").write_text("torch==2.13.0\n")
    scripts = {
        "python3": PYTHON, "df": '#!/bin/sh\necho head\necho "disk 0 0 $FREE_MB 0 /"\n',
        "nvidia-smi": '#!/bin/sh\n[ -n "$GPU" ] && echo "GPU 0: NVIDIA H100"\n',
    }
    for name, text in scripts.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)

    def call(*arguments, gpu=False, free_mb=9000, index=True, pip="cuda", **variables):
        environment = {
            **CLEAN, "PATH": f"{fakes}{os.pathsep}{CLEAN['PATH']}", "PYTHONPATH": str(tmp_path / "packages"),
            "NOTES": str(tmp_path / "notes"), "FREE_MB": str(free_mb), "GPU": "1" if gpu else "",
            "INDEX_CODE": "0" if index else "1", "PIP_GIVES": pip, **variables,
        }  # fmt: skip
        (tmp_path / "notes").write_text("")
        done = subprocess.run(
            ["bash", str(root / "tools" / "setup.sh"), *arguments], capture_output=True, text=True, timeout=60,
            env=environment,
        )
        done.pip = (tmp_path / "notes").read_text().splitlines()
        version = tmp_path / "packages" / "torch" / "version.py"
        done.build = version.read_text().split("= ")[1].strip().strip("'") if version.is_file() else "none"
        assert done.returncode in (0, 1), done.stderr
        assert (done.stdout == f"{root}/.venv/bin/python\n") == (done.returncode == 0), done.stderr
        return done

    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU, which cannot be pretended away")
    return call


def test_where_no_gpu_is_the_cpu_build_comes_and_a_second_call_installs_nothing(setup):
    first = setup(free_mb=3100)
    assert first.returncode == 0 and first.build == "None" and len(first.pip) == 1, first.stderr
    again = setup()
    assert again.returncode == 0 and again.pip == [] and again.stderr == ""


def test_a_first_set_up_says_each_thing_once_and_nothing_of_an_environment_that_never_was(setup):
    done = setup(index=False)
    assert done.stderr.count("does not answer") == 1 and "has no Python" not in done.stderr, done.stderr


def test_where_a_gpu_is_the_cuda_build_comes(setup):
    done = setup(gpu=True)
    assert done.returncode == 0 and done.build == "13.0" and "--extra-index-url" not in done.pip[0], done.stderr
    assert setup(gpu=True).pip == [] and setup().pip == []


def test_a_cpu_build_of_another_machine_is_replaced_where_a_gpu_is_and_only_it(setup):
    setup()
    done = setup(gpu=True)
    assert done.returncode == 0 and done.build == "13.0", done.stderr
    assert len(done.pip) == 1 and "--force-reinstall" in done.pip[0] and done.pip[0].endswith("torch==2.13.0")
    assert "torch is its CPU build, and an NVIDIA GPU is here" in done.stderr
    assert setup(gpu=True).pip == []


def test_without_a_network_the_cpu_build_stays_and_the_remedies_are_told(setup):
    setup()
    done = setup(gpu=True, pip="offline")
    assert done.returncode == 1 and done.build == "None"
    assert "is there a network" in done.stderr and "SETUP_DEVICE=cpu tools/setup.sh keeps it" in done.stderr
    kept = setup(gpu=True, SETUP_DEVICE="cpu")
    assert kept.returncode == 0 and kept.pip == []


def test_an_index_that_gives_the_cpu_build_again_is_told(setup):
    setup()
    done = setup(gpu=True, pip="cpu")
    assert done.returncode == 1 and len(done.pip) == 1 and "its CPU build" in done.stderr.splitlines()[-1]


def test_a_login_node_can_ask_for_the_cuda_build_and_keeps_it(setup):
    assert setup(SETUP_DEVICE="cuda").build == "13.0"
    assert setup().pip == [] and setup(gpu=True).pip == []
    wrong = setup(SETUP_DEVICE="gpu")
    assert wrong.returncode == 1 and wrong.stderr == "setup failed: SETUP_DEVICE must be cpu or cuda, got 'gpu'.\n"
    wrong = setup("cuda")
    assert wrong.returncode == 1 and "tools/setup.sh takes no arguments, got 'cuda'" in wrong.stderr and wrong.pip == []


def test_gpus_that_are_hidden_want_no_cuda_build(setup):
    setup()
    done = setup(gpu=True, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and done.pip == []


@pytest.mark.parametrize(("what", "needed"), [
    ({}, 3000), ({"gpu": True}, 8000), ({"index": False}, 8000), ({"SETUP_DEVICE": "cuda"}, 8000),
])
def test_disk_is_asked_for_by_the_build_that_will_come_before_anything_is_made(setup, tmp_path, what, needed):
    done = setup(free_mb=needed - 1, **what)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and f"has {needed - 1} MB of free disk space" in last and f"about {needed} MB" in last
    assert done.pip == [] and not (tmp_path / "my checkout" / ".venv").exists()
    assert setup(free_mb=needed, **what).returncode == 0


def test_replacing_a_cpu_build_asks_for_the_disk_of_the_cuda_build(setup):
    setup()
    done = setup(gpu=True, free_mb=7000)
    assert done.returncode == 1 and "about 8000 MB are needed" in done.stderr and done.pip == []
    assert done.build == "None"


def test_a_set_up_that_was_killed_is_made_anew(setup, tmp_path):
    setup()
    (tmp_path / "my checkout" / ".venv" / "unfinished").touch()
    done = setup()
    assert done.returncode == 0 and "an earlier set-up was cut off" in done.stderr and "making" in done.stderr
    assert setup().stderr == ""
