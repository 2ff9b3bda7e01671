"""Examine this machine: versions, devices, disk, pitfalls, and what to do about each problem.

    tools/doctor [--json]

What the environment holds is asked of its own interpreter, in a process of its own, so that a broken or missing one is
a finding and not a crash. Changes nothing. Exit codes: 0 fine, 1 problems.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import environment

from cascade.nvidia import has_nvidia_gpu

ROOT = Path(__file__).resolve().parent.parent
OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"


def probe():
    """Print as JSON what an interpreter knows of its environment; the environment's own runs this."""
    facts = {
        "python": platform.python_version(), "problems": environment.find_problems(imports=True),
        "versions": {name: environment.installed_version(name) for name in environment.read_pins()},
        "gpus": [], "gpu_problem": "",
    }
    try:
        import torch

        from cascade.device import choose_device

        if choose_device("auto").type == "cuda":
            gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            facts["gpus"] = [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}" for gpu in gpus]
    except ValueError as error:
        facts["gpu_problem"] = str(error)
    except Exception:  # whatever breaks is among the problems already
        pass
    files = [getattr(sys.modules.get(name), "__file__", None) or sys.prefix for name in ("torch", "numpy", "lhotse")]
    facts["outside"] = ", ".join(path for path in files if not path.startswith(sys.prefix))
    print(json.dumps(facts))


# Findings: (name, value) or (name, value, status, advice).


def examine_environment(interpreter, facts, said):
    """Report what the environment's own interpreter says of itself; without facts, what became of it."""
    if not interpreter.exists():
        yield "environment", "none yet", PROBLEM, "run tools/setup.sh: it makes .venv, in some minutes"
    elif not facts:
        yield "environment", interpreter, PROBLEM, f"its Python does not run ({said}): run tools/setup.sh, it repairs"
    else:
        yield "environment", interpreter
        yield "Python", facts["python"]
        problems = {line.replace("==", " ").split()[0]: line for line in facts["problems"]}
        yield from ((name, version) for name, version in facts["versions"].items() if name not in problems)
        for name, problem in problems.items():
            yield name, problem, PROBLEM, "run tools/setup.sh; if that does not help, remove .venv first"


def examine_devices(facts):
    yield "CPU", f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}"
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) / 1e6 for name in ("MemTotal", "MemAvailable"))
    little = (NOTE, "little: lower data.batch_duration, keep data.num_workers=0")
    yield "memory", f"{total:.1f} GB, {free:.1f} GB available", *(little if total < 4 else ())
    for index, gpu in enumerate(facts.get("gpus", ())):
        yield f"GPU {index}", gpu
    if facts.get("gpu_problem"):
        yield "GPU", "an NVIDIA GPU that PyTorch cannot use", PROBLEM, facts["gpu_problem"]
    elif not facts.get("gpus"):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
        value = "hidden by CUDA_VISIBLE_DEVICES" if hidden else "not asked for" if has_nvidia_gpu() else "no NVIDIA GPU"
        yield "GPU", value, NOTE, "fine for egs/an4 and egs/commands; LibriSpeech's 960 h want GPUs"


def examine_disk():
    for name, path, needed, remedy in (
        ("repository", ROOT, 5, "egs/*/exp goes here: free some, or put runs elsewhere with run.sh --exp-dir DIR"),
        ("temporary", Path(tempfile.gettempdir()), 1, "free some, or point TMPDIR at a larger disk"),
    ):
        free, status = shutil.disk_usage(path).free / 1e9, ()
        if not os.access(path, os.W_OK):
            status = (PROBLEM, "it cannot be written: change its owner, or use a copy of your own")
        elif free < needed:
            status = (PROBLEM, f"less than {needed} GB: {remedy}")
        yield name, f"{free:.1f} GB free in {path}", *status
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < 1e9:
        advice = "data.num_workers > 0 needs more: docker run --shm-size=8g, or --ipc=host"
        yield "shared memory", "less than 1 GB in /dev/shm", NOTE, advice


def examine_pitfalls(facts):
    cores = len(os.sched_getaffinity(0))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > cores:
            yield name, value, PROBLEM, f"more threads than the {cores} cores: unset it"
        elif value == "1" and cores > 1:
            yield name, value, NOTE, "training uses one core: unset it, or train --threads N"
    if shutil.which("git") is None:
        yield "git", "missing", NOTE, "results then cannot name their commit"
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        yield "OMP_WAIT_POLICY", "active", NOTE, "several times slower where other work is running"
    for name, status in (("PYTHONPATH", NOTE), ("PYTHONHOME", PROBLEM)):
        value = os.environ.get(name)
        if value and any(Path(part or ".").resolve() != ROOT for part in value.split(os.pathsep)):
            yield name, value, status, "other packages may come first: unset it if an import surprises"
    if facts.get("outside"):
        advice = "they hide the pinned ones: unset PYTHONPATH, set PYTHONNOUSERSITE=1"
        yield "packages outside", facts["outside"], PROBLEM, advice
    cache = Path(os.environ.get("NUMBA_CACHE_DIR") or ROOT / "cascade" / "losses" / "__pycache__")
    folder = next(path for path in (cache, *cache.parents) if path.is_dir())
    private = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade" / "numba"
    if folder.stat().st_mode & stat.S_IWOTH or folder.stat().st_uid not in (0, os.getuid()):
        advice = f"what they put there is run as you: NUMBA_CACHE_DIR={private}"
        yield "numba's cache", f"others may write to {folder}", PROBLEM, advice
    elif not os.access(folder, os.W_OK):
        advice = f"each start compiles the loss again, some seconds: NUMBA_CACHE_DIR={private}"
        yield "numba's cache", f"{folder} cannot be written", NOTE, advice


def show(findings):
    """Print one line per finding, what to do below it."""
    label = max(len(finding["name"]) for finding in findings)
    for finding in findings:
        begin = f"{finding['status']:<9}{finding['section']:<10}{finding['name']:<{label}}  "
        print(begin + finding["value"])
        if finding["advice"]:
            print(f"{'':<{len(begin)}}-> {finding['advice']}")
    names = list(dict.fromkeys(finding["name"] for finding in findings if finding["status"] == PROBLEM))
    print(f"\n{len(names)} problem{'s' * (len(names) > 1)}: {', '.join(names)}" if names else "\nno problems")


def main():
    parser = argparse.ArgumentParser(
        prog="tools/doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        return probe()
    interpreter, facts, said = environment.choose_environment(), {}, ""
    try:
        done = subprocess.run([interpreter, "-B", __file__, "--probe"], capture_output=True, text=True, cwd=ROOT)
        said = (done.stderr.strip() or "it says nothing").splitlines()[-1]
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        said = said or str(error)
    sections = {
        "versions": examine_environment(interpreter, facts, said), "devices": examine_devices(facts),
        "disk": examine_disk(), "pitfalls": examine_pitfalls(facts),
    }
    findings = [
        {"section": section, "name": name, "value": str(value), "status": rest[0] if rest else OK,
         "advice": rest[1] if rest else ""}
        for section, rows in sections.items() for name, value, *rest in rows
    ]  # fmt: skip
    ok = all(finding["status"] != PROBLEM for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": ok, "findings": findings}, indent=1, ensure_ascii=False))
    else:
        show(findings)
    sys.exit(not ok)


if __name__ == "__main__":
    main()
