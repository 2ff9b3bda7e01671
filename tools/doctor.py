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

import check_environment

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
    "espeakng_loader": ("the synthetic speech of egs/commands", "pip install espeakng-loader"),
}
OMP_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "KMP_BLOCKTIME", "OPENBLAS_NUM_THREADS")


class Findings:
    """What was found, in the order of looking."""

    def __init__(self):
        self.rows = []

    def add(self, section, name, value, status=OK, advice=""):
        self.rows.append({"section": section, "name": name, "value": str(value), "status": status, "advice": advice})

    def problems(self):
        return [row for row in self.rows if row["status"] == PROBLEM]


def probe():
    """What an interpreter knows of its own environment, printed as JSON: run by the environment's interpreter."""
    import site
    from importlib import util

    pins = check_environment.read_pins(check_environment.REQUIREMENTS)
    facts = {
        "python": platform.python_version(), "prefix": sys.prefix, "fits": check_environment.fits(),
        "versions": check_environment.installed_versions(pins),
        "problems": check_environment.find_problems(imports=True),
        "optional": {name: util.find_spec(name) is not None for name in OPTIONAL},
        "user_site": bool(site.ENABLE_USER_SITE) and Path(site.getusersitepackages()).is_dir(),
        "torch": None, "outside": [],
    }
    try:
        import torch
    except Exception:  # whatever breaks is among the problems already
        print(json.dumps(facts))
        return
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "bytes": properties.total_memory,
                         "capability": f"{properties.major}.{properties.minor}"})
    facts["torch"] = {"cuda": torch.version.cuda, "gpus": gpus}
    try:
        import soundfile

        facts["audio_formats"] = sorted(soundfile.available_formats())
    except Exception:
        facts["audio_formats"] = []
    paths = [getattr(sys.modules.get(name), "__file__", None) or sys.prefix for name in ("torch", "numpy", "lhotse")]
    facts["outside"] = [path for path in paths if not path.startswith(sys.prefix)]
    print(json.dumps(facts))


def find_interpreter():
    """(the environment's interpreter or None, how it was found): as tools/setup.sh chooses it."""
    venv = ROOT / ".venv" / "bin" / "python"
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and Path(active) != ROOT / ".venv":
        candidate = Path(active) / "bin" / "python"
        if candidate.exists() and _run([str(candidate), str(ROOT / "tools" / "check_environment.py")])[0] == 0:
            return candidate, f"the active environment {active}"
    if venv.exists():
        return venv, str(ROOT / ".venv")
    return None, ""


def _run(command, timeout=180):
    """(exit code, stdout, stderr); -1 when it cannot be run or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=str(ROOT))
    except (OSError, subprocess.SubprocessError) as error:
        return -1, "", str(error)
    return done.returncode, done.stdout, done.stderr


def examine_environment(findings):
    """The interpreter, its packages against requirements.txt; what it says of itself, or None."""
    section = "versions"
    interpreter, where = find_interpreter()
    if interpreter is None:
        findings.add(section, "environment", "none yet", PROBLEM, f"{SETUP}: it makes .venv, in some minutes")
        version = platform.python_version()
        if not check_environment.fits():
            findings.add(section, "Python", f"{version} ({sys.executable})", NOTE,
                         "3.11, 3.12 or 3.13 is needed: install one, tools/setup.sh looks for it")
        else:
            findings.add(section, "Python", f"{version} ({sys.executable})")
        return None
    code, out, err = _run([str(interpreter), "-B", str(ROOT / "tools" / "doctor.py"), "--probe"])
    try:
        facts = json.loads(out.strip().splitlines()[-1]) if code == 0 else None
    except (ValueError, IndexError):
        facts = None
    if facts is None:
        last = (err.strip().splitlines() or [f"exit code {code}"])[-1]
        findings.add(section, "environment", where, PROBLEM, f"its Python does not run ({last}): {SETUP}, it repairs")
        return None
    findings.add(section, "environment", where)
    findings.add(section, "Python", facts["python"], *(() if facts["fits"] else (PROBLEM, f"3.11 to 3.13: {SETUP}")))
    pins = check_environment.read_pins(check_environment.REQUIREMENTS)
    for name, wanted in pins.items():
        found = facts["versions"][name]
        if found is None:
            findings.add(section, name, f"missing, {wanted} is wanted", PROBLEM, SETUP)
        elif found.split("+", 1)[0] != wanted:
            findings.add(section, name, f"{found}, {wanted} is wanted", PROBLEM, f"{SETUP}: it installs the pinned one")
        else:
            findings.add(section, name, found)
    named = {row["name"] for row in findings.problems()}
    for problem in facts["problems"]:
        name = problem.replace("==", " ").split()[0]
        if name not in named:
            advice = "" if "remove it" in problem else f"{SETUP}: it repairs what does not import"
            findings.add(section, name, problem, PROBLEM, advice)
    return facts


def examine_devices(findings, facts):
    section = "devices"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    usable = min(cores, quota) if quota else cores
    text = f"{cores} cores, {cpu_name()}" + (f"; this container may use {quota:g} of them" if quota else "")
    findings.add(section, "CPU", text)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > usable + 0.5:
        findings.add(section, "load", f"{load:.1f} on {usable:g} cores", NOTE,
                     "other work is running: times measured now are too long")
    total, free = memory_bytes()
    if total:
        status = (NOTE, "little: lower data.batch_duration, keep data.num_workers=0") if total < 4e9 else ()
        findings.add(section, "memory", f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB available", *status)
    torch = facts["torch"] if facts else None
    has_gpu = check_environment.has_nvidia_gpu(even_hidden=True)
    if torch is None:
        findings.add(section, "GPU", "an NVIDIA GPU is here" if has_gpu else "no NVIDIA GPU is here",
                     *((NOTE, "tools/setup.sh takes torch's CUDA build") if has_gpu else ()))
        return
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU only"
    for index, gpu in enumerate(torch["gpus"]):
        findings.add(section, f"GPU {index}", f"{gpu['name']}, {gpu['bytes'] / 1e9:.0f} GB, "
                                              f"compute capability {gpu['capability']}")
    if torch["gpus"]:
        findings.add(section, "torch build", build)
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if has_gpu and hidden is not None and hidden.strip() in ("", "-1"):
        findings.add(section, "GPU", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", NOTE, "unset it to train on the GPU")
    elif has_gpu and not torch["cuda"]:
        findings.add(section, "GPU", "there is an NVIDIA GPU, but this torch is the CPU build", PROBLEM,
                     f"{SETUP} on this machine: it replaces the CPU build; until then --device cpu")
    elif has_gpu:
        findings.add(section, "GPU", f"there is an NVIDIA GPU, but torch ({build}) cannot use it", PROBLEM,
                     "the driver is too old for this CUDA or not loaded: compare nvidia-smi's CUDA version; until "
                     "then --device cpu")
    else:
        findings.add(section, "GPU", f"none; torch build: {build}", NOTE,
                     "fine for egs/an4 and egs/commands; LibriSpeech's 960 h want GPUs")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_quota():
    """Cores that a container's cgroup allows; None = no limit known."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory_bytes():
    """(total, available), a container's limit included; zeros where /proc is missing."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total, free = values.get("MemTotal", 0), values.get("MemAvailable", 0)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(0, limit - used))
    except (OSError, ValueError):
        pass
    return total, free


def examine_disk(findings, facts):
    torch = facts["torch"] if facts else None
    cuda_comes = check_environment.wants_cuda() and not (torch and torch["cuda"])
    needed_gb = NEEDED_GB_CUDA if cuda_comes else NEEDED_GB
    places = (
        ("repository", ROOT, "egs/*/exp goes here: free some, or put runs elsewhere with run.sh --exp-dir DIR"),
        ("temporary", Path(tempfile.gettempdir()), "free some, or point TMPDIR at a larger disk"),
    )
    for name, path, remedy in places:
        free = shutil.disk_usage(str(path)).free / 1e9
        writable = os.access(str(path), os.W_OK)
        status = ()
        if not writable:
            status = (PROBLEM, "it cannot be written: change its owner, or use a copy of your own")
        elif free < needed_gb[name]:
            why = " that set-up with PyTorch's CUDA build needs" if cuda_comes else ""
            status = (PROBLEM, f"less than {needed_gb[name]:g} GB{why}: {remedy}")
        findings.add("disk", name, f"{free:.1f} GB free in {path}", *status)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(str(shared)).total < 1e9:
        findings.add("disk", "shared memory", f"{shutil.disk_usage(str(shared)).total / 1e6:.0f} MB in /dev/shm", NOTE,
                     "data.num_workers > 0 needs more: docker run --shm-size=8g, or --ipc=host")


def examine_optional(findings, facts):
    """Nothing here is needed: what each would give, and how to get it."""
    installed = facts["optional"] if facts else {}
    pins = check_environment.read_pins(check_environment.REQUIREMENTS)
    for name, (gives, how) in OPTIONAL.items():
        if name.replace("_", "-") in pins:
            continue
        if installed.get(name):
            findings.add("optional", name.replace("_", "-"), f"installed: {gives}")
        else:
            findings.add("optional", name.replace("_", "-"), f"not installed; it would give {gives}", NOTE, how)
    git = shutil.which("git")
    findings.add("optional", "git", git or "missing", *(() if git else (NOTE, "results then cannot name their commit")))
    formats = (facts or {}).get("audio_formats") or []
    if formats:
        known = [name for name in ("WAV", "FLAC", "OGG", "MP3", "NIST", "AIFF") if name in formats]
        findings.add("optional", "audio files", f"{' '.join(known)} are read by libsndfile: no ffmpeg, no sox needed")


def examine_pitfalls(findings, facts):
    section = "pitfalls"
    before = len(findings.rows)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in OMP_VARIABLES:
        value = os.environ.get(name)
        if value is None:
            continue
        if name.endswith("NUM_THREADS") and value.isdigit() and int(value) > cores:
            findings.add(section, name, value, PROBLEM, f"more threads than the {cores} cores: unset it")
        elif name == "OMP_NUM_THREADS" and value == "1" and cores > 1:
            findings.add(section, name, value, NOTE, "training uses one core only: unset it, or train --threads N")
        elif name == "OMP_WAIT_POLICY" and value.lower() == "active":
            findings.add(section, name, value, NOTE, "fast on an idle machine, several times slower on a busy one")
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and facts and Path(active) != Path(facts["prefix"]):
        findings.add(section, "active environment", active, NOTE,
                     "it lacks what requirements.txt pins, so run.sh takes .venv; by hand: source .venv/bin/activate")
    python = shutil.which("python") or shutil.which("python3")
    if facts and python and not str(Path(python)).startswith(facts["prefix"]):
        findings.add(section, "two Pythons", f"a shell's python is {python}", NOTE,
                     f"commands by hand want {facts['prefix']}/bin/python: source {facts['prefix']}/bin/activate")
    for name in ("PYTHONPATH", "PYTHONHOME"):
        value = os.environ.get(name)
        own = name == "PYTHONPATH" and all(Path(part or ".").resolve() == ROOT for part in (value or "").split(":"))
        if value and not own:
            status = PROBLEM if name == "PYTHONHOME" else NOTE
            findings.add(section, name, value, status, "other packages may come first: unset it if an import surprises")
    if facts and facts["outside"]:
        findings.add(section, "packages outside", ", ".join(facts["outside"]), PROBLEM,
                     "they hide the pinned ones: unset PYTHONPATH, set PYTHONNOUSERSITE=1")
    elif facts and facts["user_site"]:
        findings.add(section, "user packages", "~/.local packages are visible", NOTE, "PYTHONNOUSERSITE=1 hides them")
    named = os.environ.get("NUMBA_CACHE_DIR")
    cache = Path(named or ROOT / "cascade" / "losses" / "__pycache__")
    folder = next(path for path in (cache, *cache.parents) if path.is_dir())
    private = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade" / "numba"
    state = folder.stat()
    if state.st_mode & stat.S_IWOTH or (named and state.st_uid not in (0, os.getuid())):
        findings.add(section, "numba's cache", f"others may write to {folder}", PROBLEM,
                     f"what they put there is run as you: NUMBA_CACHE_DIR={private}")
    elif not os.access(str(folder), os.W_OK):
        findings.add(section, "numba's cache", f"{folder} cannot be written", NOTE,
                     f"each start compiles the loss again, some seconds: NUMBA_CACHE_DIR={private}")
    encoding = sys.getfilesystemencoding().lower()
    if encoding not in ("utf-8", "utf8"):
        findings.add(section, "locale", f"file names are {encoding}", PROBLEM, "export LC_ALL=C.UTF-8")
    if len(findings.rows) == before:
        findings.add(section, "none", "threads, paths, locale and caches are as they should be")


def examine():
    findings = Findings()
    facts = examine_environment(findings)
    examine_devices(findings, facts)
    examine_disk(findings, facts)
    examine_optional(findings, facts)
    examine_pitfalls(findings, facts)
    return findings


def table(findings, width):
    """One line per finding, what to do below it; sections under each other."""
    lines, section = [], None
    label = max(len(row["name"]) for row in findings.rows)
    margin = 2 + 9 + label + 2
    for row in findings.rows:
        if row["section"] != section:
            section = row["section"]
            lines += ([""] if lines else []) + [section]
        lines += textwrap.wrap(
            row["value"], width, initial_indent=f"  {row['status']:<9}{row['name']:<{label}}  ",
            subsequent_indent=" " * margin, break_long_words=False, break_on_hyphens=False,
        )
        if row["advice"]:
            lines += textwrap.wrap(
                row["advice"], width, initial_indent=" " * margin + "-> ", subsequent_indent=" " * (margin + 3),
                break_long_words=False, break_on_hyphens=False,
            )
    problems = findings.problems()
    if problems:
        lines += ["", f"{len(problems)} problem{'s' * (len(problems) > 1)}: "
                      + ", ".join(dict.fromkeys(row["name"] for row in problems))]
    else:
        lines += ["", "no problems"]
    return "\n".join(lines)


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
    findings = examine()
    ok = not findings.problems()
    if arguments.json:
        print(json.dumps({"ok": ok, "findings": findings.rows}, indent=1, ensure_ascii=False))
    else:
        print(table(findings, min(120, max(80, shutil.get_terminal_size((100, 20)).columns))))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
