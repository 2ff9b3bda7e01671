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
NEEDED_GB = {"repository": 5.0, "temporary": 1.0}
NEEDED_GB_CUDA = {"repository": 10.0, "temporary": 4.0}  # while PyTorch's CUDA build is still to be installed
OPTIONAL = {
    "k2": ("k2's transducer loss (loss.backend=k2); ours has the same numbers",
           "build it for this torch; tools/check_k2.sh compares both in an environment of its own"),
    "kaldifeat": ("a second, equal extractor (features.extractor=kaldifeat)",
                  "tools/install_kaldifeat.sh builds it in some minutes"),
}


class Findings:
    """Rows of the report, in the order of looking."""

    def __init__(self):
        self.rows = []

    def add(self, section, name, value, status=OK, advice=""):
        self.rows.append({"section": section, "name": name, "value": str(value), "status": status, "advice": advice})

    def problems(self):
        return [row for row in self.rows if row["status"] == PROBLEM]


def probe():
    """What an interpreter knows of its own environment, printed as JSON: run by the environment's interpreter."""
    from importlib import util

    facts = {
        "python": platform.python_version(), "prefix": sys.prefix, "fits": environment.fits(),
        "versions": {name: environment.installed_version(name) for name in environment.read_pins()},
        "problems": environment.find_problems(imports=True),
        "optional": {name: util.find_spec(name) is not None for name in OPTIONAL}, "torch": None, "outside": [],
    }
    try:
        import torch

        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
                for gpu in devices if torch.cuda.is_available()]
        facts["torch"] = {"cuda": torch.version.cuda, "gpus": gpus}
    except Exception:  # whatever breaks is among the problems already
        pass
    paths = [getattr(sys.modules.get(name), "__file__", None) or sys.prefix for name in ("torch", "numpy", "lhotse")]
    facts["outside"] = [path for path in paths if not path.startswith(sys.prefix)]
    print(json.dumps(facts))


def find_interpreter():
    """The environment's interpreter, as set-up chooses it, or None."""
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and Path(active) != environment.VENV and not environment.check(Path(active, "bin", "python")):
        return Path(active, "bin", "python")
    own = environment.VENV / "bin" / "python"
    return own if own.exists() else None


def examine_environment(findings):
    """The interpreter, its packages against requirements.txt; what it says of itself, or None."""
    section, interpreter = "versions", find_interpreter()
    if interpreter is None:
        findings.add(section, "environment", "none yet", PROBLEM, f"{SETUP}: it makes .venv, in some minutes")
        return None
    try:
        done = subprocess.run(
            [str(interpreter), "-B", __file__, "--probe"], capture_output=True, text=True, timeout=180, cwd=str(ROOT)
        )
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = done.stderr.strip().splitlines()[-1:] if "done" in locals() else [str(error)]
        findings.add(section, "environment", interpreter, PROBLEM,
                     f"its Python does not run ({' '.join(said)}): {SETUP}, it repairs")
        return None
    findings.add(section, "environment", interpreter)
    findings.add(section, "Python", facts["python"], *(() if facts["fits"] else (PROBLEM, f"3.11 to 3.13: {SETUP}")))
    for name, wanted in environment.read_pins().items():
        version = facts["versions"][name]
        if version and version.split("+", 1)[0] == wanted:
            findings.add(section, name, version)
        else:
            findings.add(section, name, f"{version or 'missing'}, {wanted} is wanted", PROBLEM, SETUP)
    named = {row["name"] for row in findings.problems()}
    for problem in facts["problems"]:
        name = problem.replace("==", " ").split()[0]
        if name not in named:
            advice = "" if "remove it" in problem else f"{SETUP}: it repairs what does not import"
            findings.add(section, name, problem, PROBLEM, advice)
    return facts


def num_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine_devices(findings, facts):
    section = "devices"
    findings.add(section, "CPU", f"{num_cores()} cores, {platform.processor() or platform.machine()}")
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        total, free = (next(int(words[1]) / 1e6 for words in lines if words[0] == name)
                       for name in ("MemTotal:", "MemAvailable:"))
        status = (NOTE, "little: lower data.batch_duration, keep data.num_workers=0") if total < 4 else ()
        findings.add(section, "memory", f"{total:.1f} GB, {free:.1f} GB available", *status)
    except (OSError, StopIteration):
        pass
    torch = facts["torch"] if facts else None
    has_gpu = environment.has_nvidia_gpu(even_hidden=True)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    build = "no torch yet" if torch is None else f"torch's {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPU'} build"
    if torch and torch["gpus"]:
        for index, gpu in enumerate(torch["gpus"]):
            findings.add(section, f"GPU {index}", f"{gpu}; {build}")
    elif not has_gpu:
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
    needed_gb = NEEDED_GB_CUDA if cuda_comes else NEEDED_GB
    places = (
        ("repository", ROOT, "egs/*/exp goes here: free some, or put runs elsewhere with run.sh --exp-dir DIR"),
        ("temporary", Path(tempfile.gettempdir()), "free some, or point TMPDIR at a larger disk"),
    )
    for name, path, remedy in places:
        free, status = shutil.disk_usage(str(path)).free / 1e9, ()
        if not os.access(str(path), os.W_OK):
            status = (PROBLEM, "it cannot be written: change its owner, or use a copy of your own")
        elif free < needed_gb[name]:
            why = " that set-up with PyTorch's CUDA build needs" if cuda_comes else ""
            status = (PROBLEM, f"less than {needed_gb[name]:g} GB{why}: {remedy}")
        findings.add("disk", name, f"{free:.1f} GB free in {path}", *status)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(str(shared)).total < 1e9:
        findings.add("disk", "shared memory", "less than 1 GB in /dev/shm", NOTE,
                     "data.num_workers > 0 needs more: docker run --shm-size=8g, or --ipc=host")


def examine_optional(findings, facts):
    """Packages that nothing needs: what each would give, and how to get it."""
    for name, (gives, how) in OPTIONAL.items():
        if facts and facts["optional"][name]:
            findings.add("optional", name, f"installed: {gives}")
        else:
            findings.add("optional", name, f"not installed; it would give {gives}", NOTE, how)
    git = shutil.which("git")
    findings.add("optional", "git", git or "missing", *(() if git else (NOTE, "results then cannot name their commit")))


def examine_pitfalls(findings, facts):
    section, before = "pitfalls", len(findings.rows)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > num_cores():
            findings.add(section, name, value, PROBLEM, f"more threads than the {num_cores()} cores: unset it")
    if os.environ.get("OMP_NUM_THREADS") == "1" and num_cores() > 1:
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
    margin = " " * (2 + 9 + label + 2)
    for row in findings.rows:
        if row["section"] != section:
            section = row["section"]
            lines += ([""] if lines else []) + [section]
        first = f"  {row['status']:<9}{row['name']:<{label}}  "
        for text, begin, indent in ((row["value"], first, margin), (row["advice"], f"{margin}-> ", f"{margin}   ")):
            lines += textwrap.wrap(text, width, initial_indent=begin, subsequent_indent=indent,
                                   break_long_words=False, break_on_hyphens=False)
    names = list(dict.fromkeys(row["name"] for row in findings.problems()))
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
        probe()
        return
    findings = Findings()
    facts = examine_environment(findings)
    for examine in (examine_devices, examine_disk, examine_optional, examine_pitfalls):
        examine(findings, facts)
    ok = not findings.problems()
    if arguments.json:
        print(json.dumps({"ok": ok, "findings": findings.rows}, indent=1, ensure_ascii=False))
    else:
        print(table(findings, min(120, max(80, shutil.get_terminal_size((100, 20)).columns))))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
