"""Examine this machine: versions, devices, disk, optional packages, pitfalls, and what to do about each problem.

    tools/doctor [--json]

Runs on any Python 3.8+ without packages. What the environment holds is asked of its own interpreter, in a process of
its own, so that a broken or missing one is a finding and not a crash. Changes nothing. Exit codes: 0 fine, 1 problems.
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
import textwrap
from pathlib import Path

import environment

ROOT = Path(__file__).resolve().parent.parent
OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
SETUP = "run tools/setup.sh"
NEEDED_GB = {"repository": 5, "temporary": 1}
NEEDED_GB_CUDA = {"repository": 10, "temporary": 4}  # while PyTorch's CUDA build is still to be installed
OPTIONAL = {
    "k2": "for loss.backend=k2, whose numbers ours has too: build it for this torch",
    "kaldifeat": "for features.extractor=kaldifeat, equal to the other: tools/install_kaldifeat.sh builds it",
}


class Findings:
    """Rows of the report, in the order of looking."""

    def __init__(self):
        self.rows = []

    def add(self, section, name, value, status=OK, advice=""):
        self.rows.append({"section": section, "name": name, "value": str(value), "status": status, "advice": advice})

    def problems(self):
        """The names of what is a problem."""
        return list(dict.fromkeys(row["name"] for row in self.rows if row["status"] == PROBLEM))


def probe():
    """Print as JSON what an interpreter knows of its environment; the environment's own runs this."""
    from importlib import util

    facts = {
        "python": platform.python_version(), "problems": environment.find_problems(imports=True), "torch": None,
        "versions": {name: environment.installed_version(name) for name in environment.read_pins()},
        "optional": {name: util.find_spec(name) is not None for name in OPTIONAL},
    }
    try:
        import torch

        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        facts["torch"] = {"cuda": torch.version.cuda, "gpus": [
            f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
            for gpu in devices if torch.cuda.is_available()
        ]}  # fmt: skip
    except Exception:  # whatever breaks is among the problems already
        pass
    files = [getattr(sys.modules.get(name), "__file__", None) or sys.prefix for name in ("torch", "numpy", "lhotse")]
    facts["outside"] = [path for path in files if not path.startswith(sys.prefix)]
    print(json.dumps(facts))


def examine_environment(findings):
    """The interpreter that set-up chooses, its packages against requirements.txt; what it says of itself, or None."""
    section = "versions"
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    interpreter = environment.VENV / "bin" / "python"
    if active and Path(active) != environment.VENV and not environment.check(Path(active, "bin", "python")):
        interpreter = Path(active, "bin", "python")
    if not interpreter.exists():
        findings.add(section, "environment", "none yet", PROBLEM, f"{SETUP}: it makes .venv, in some minutes")
        return None
    command, said = [str(interpreter), "-B", __file__, "--probe"], ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=str(ROOT))
        said = done.stderr.strip()
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (said or str(error)).splitlines()[-1]
        findings.add(section, "environment", interpreter, PROBLEM,
                     f"its Python does not run ({said}): {SETUP}, it repairs")
        return None
    findings.add(section, "environment", interpreter)
    findings.add(section, "Python", facts["python"])
    problems = {line.replace("==", " ").split()[0]: line for line in facts["problems"]}
    for name, version in facts["versions"].items():
        if name not in problems:
            findings.add(section, name, version)
    for name, problem in problems.items():
        findings.add(section, name, problem, PROBLEM, "" if "remove it" in problem else f"{SETUP}: it repairs this")
    return facts


def num_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine_devices(findings, facts):
    section = "devices"
    findings.add(section, "CPU", f"{num_cores()} cores, {platform.processor() or platform.machine()}")
    if Path("/proc/meminfo").is_file():
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) / 1e6 for name in ("MemTotal", "MemAvailable"))
        status = (NOTE, "little: lower data.batch_duration, keep data.num_workers=0") if total < 4 else ()
        findings.add(section, "memory", f"{total:.1f} GB, {free:.1f} GB available", *status)
    torch = facts["torch"] if facts else None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    build = "no torch yet" if torch is None else f"torch's {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPU'} build"
    if torch and torch["gpus"]:
        for index, gpu in enumerate(torch["gpus"]):
            findings.add(section, f"GPU {index}", f"{gpu}; {build}")
    elif not environment.has_nvidia_gpu(even_hidden=True):
        findings.add(section, "GPU", f"no NVIDIA GPU; {build}", NOTE,
                     "fine for egs/an4 and egs/commands; LibriSpeech's 960 h want GPUs")
    elif hidden is not None and hidden.strip() in ("", "-1"):
        findings.add(section, "GPU", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", NOTE, "unset it to train on the GPU")
    elif torch is None:
        findings.add(section, "GPU", f"an NVIDIA GPU; {build}", NOTE, "tools/setup.sh takes torch's CUDA build")
    elif not torch["cuda"]:
        findings.add(section, "GPU", "there is an NVIDIA GPU, but this torch is the CPU build", PROBLEM,
                     f"{SETUP} on this machine: it replaces the CPU build; until then --device cpu")
    else:
        findings.add(section, "GPU", f"there is an NVIDIA GPU, but {build} cannot use it", PROBLEM,
                     "the driver is too old for this CUDA or not loaded: compare nvidia-smi's CUDA version; until "
                     "then --device cpu")


def examine_disk(findings, facts):
    torch = facts["torch"] if facts else None
    cuda_comes = environment.wants_cuda() and not (torch and torch["cuda"])
    for name, path, remedy in (
        ("repository", ROOT, "egs/*/exp goes here: free some, or put runs elsewhere with run.sh --exp-dir DIR"),
        ("temporary", Path(tempfile.gettempdir()), "free some, or point TMPDIR at a larger disk"),
    ):
        free, needed = shutil.disk_usage(str(path)).free / 1e9, (NEEDED_GB_CUDA if cuda_comes else NEEDED_GB)[name]
        status = ()
        if not os.access(str(path), os.W_OK):
            status = (PROBLEM, "it cannot be written: change its owner, or use a copy of your own")
        elif free < needed:
            why = " that set-up with PyTorch's CUDA build needs" if cuda_comes else ""
            status = (PROBLEM, f"less than {needed} GB{why}: {remedy}")
        findings.add("disk", name, f"{free:.1f} GB free in {path}", *status)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(str(shared)).total < 1e9:
        findings.add("disk", "shared memory", "less than 1 GB in /dev/shm", NOTE,
                     "data.num_workers > 0 needs more: docker run --shm-size=8g, or --ipc=host")


def examine_optional(findings, facts):
    for name, advice in OPTIONAL.items():
        there = bool(facts and facts["optional"][name])
        findings.add("optional", name, "installed" if there else "not installed", OK if there else NOTE, advice)
    git = shutil.which("git")
    findings.add("optional", "git", git or "missing", *(() if git else (NOTE, "results then cannot name their commit")))


def examine_pitfalls(findings, facts):
    section, before, cores = "pitfalls", len(findings.rows), num_cores()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > cores:
            findings.add(section, name, value, PROBLEM, f"more threads than the {cores} cores: unset it")
    if os.environ.get("OMP_NUM_THREADS") == "1" and cores > 1:
        findings.add(section, "OMP_NUM_THREADS", "1", NOTE, "training uses one core: unset it, or train --threads N")
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        findings.add(section, "OMP_WAIT_POLICY", "active", NOTE, "several times slower where other work is running")
    for name, status in (("PYTHONPATH", NOTE), ("PYTHONHOME", PROBLEM)):
        value = os.environ.get(name)
        if value and any(Path(part or ".").resolve() != ROOT for part in value.split(os.pathsep)):
            findings.add(section, name, value, status, "other packages may come first: unset it if an import surprises")
    if facts and facts["outside"]:
        findings.add(section, "packages outside", ", ".join(facts["outside"]), PROBLEM,
                     "they hide the pinned ones: unset PYTHONPATH, set PYTHONNOUSERSITE=1")
    given = os.environ.get("NUMBA_CACHE_DIR")
    cache = Path(given or ROOT / "cascade" / "losses" / "__pycache__")
    folder = next(path for path in (cache, *cache.parents) if path.is_dir())
    private = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade" / "numba"
    state = folder.stat()
    if state.st_mode & stat.S_IWOTH or (given and state.st_uid not in (0, os.getuid())):
        findings.add(section, "numba's cache", f"others may write to {folder}", PROBLEM,
                     f"what they put there is run as you: NUMBA_CACHE_DIR={private}")
    elif not os.access(str(folder), os.W_OK):
        findings.add(section, "numba's cache", f"{folder} cannot be written", NOTE,
                     f"each start compiles the loss again, some seconds: NUMBA_CACHE_DIR={private}")
    if len(findings.rows) == before:
        findings.add(section, "none", "threads, paths and caches are as they should be")


def table(findings, width):
    """One line per finding, what to do below it; sections under each other."""
    lines, section = [], None
    label = max(len(row["name"]) for row in findings.rows)
    margin = " " * (label + 13)
    for row in findings.rows:
        if row["section"] != section:
            section = row["section"]
            lines += ([""] if lines else []) + [section]
        first = f"  {row['status']:<9}{row['name']:<{label}}  "
        for text, begin, indent in ((row["value"], first, margin), (row["advice"], f"{margin}-> ", f"{margin}   ")):
            lines += textwrap.wrap(text, width, initial_indent=begin, subsequent_indent=indent,
                                   break_long_words=False, break_on_hyphens=False)
    names = findings.problems()
    plural = "s" if len(names) > 1 else ""
    return "\n".join([*lines, "", f"{len(names)} problem{plural}: {', '.join(names)}" if names else "no problems"])


def main():
    parser = argparse.ArgumentParser(
        prog="tools/doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        return probe()
    findings = Findings()
    facts = examine_environment(findings)
    for examine in (examine_devices, examine_disk, examine_optional, examine_pitfalls):
        examine(findings, facts)
    ok = not findings.problems()
    if arguments.json:
        print(json.dumps({"ok": ok, "findings": findings.rows}, indent=1, ensure_ascii=False))
    else:
        print(table(findings, min(120, max(80, shutil.get_terminal_size((100, 20)).columns))))
    sys.exit(not ok)


if __name__ == "__main__":
    main()
