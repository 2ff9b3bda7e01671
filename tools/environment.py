"""The Python environment that everything here runs in: is it what requirements.txt pins, and how to make it so.

    tools/setup.sh                                  # finds a Python, which runs this file: makes or repairs .venv
    python tools/environment.py --check             # one line per problem of this interpreter's packages
    python tools/environment.py --check --imports   # also imports what compiled code can break, a few seconds

Runs on any Python 3 without packages, so that it can also judge an environment that is not fit. PyTorch should be its
CUDA build where an NVIDIA GPU is; SETUP_DEVICE=cuda says so without one, SETUP_DEVICE=cpu says that the CPU build will
do. PyPI has the CUDA build for Linux on x86_64; with an index that has the +cpu build too, pip prefers that.
"""

import fcntl
import importlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from cascade.nvidia import has_nvidia_gpu  # noqa: E402

REQUIREMENTS = ROOT / "requirements.txt"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
BASE = os.environ.get("SETUP_PYTHON") or sys.executable
"""Python to make .venv with."""
UNFINISHED = VENV / "unfinished"
"""There while pip works: where it was killed, packages may be half there, and .venv is made anew."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_MB, CUDA_MB = 3000, 8000
"""Free disk to ask for: .venv takes 1.6 GB with PyTorch's CPU build, and pip unpacks downloads beside it."""
CPU_BUILD = "torch is its CPU build"
COMPILED = (
    "torch", "numpy", "scipy.signal", "numba", "omegaconf", "lhotse", "lilcom", "soundfile", "kaldi_native_fbank",
    "sentencepiece", "matplotlib", "torch.utils.tensorboard", "onnx", "onnxruntime", "sherpa_onnx",
)
PROBE = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method='HEAD'), timeout=3)"
NO_NETWORK = r"ConnectionError|NameResolution|unreachable|Connection(Reset| refused)|[Tt]imed? ?out|ProxyError|SSLError"


class SetUpError(Exception):
    """The environment cannot be made ready; the message is one sentence."""


def read_pins():
    """{name: version} of requirements.txt."""
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", REQUIREMENTS.read_text(encoding="utf-8")))


def installed_version(name):
    """The version, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def wants_cuda():
    """Tell whether PyTorch should be its CUDA build."""
    chosen = os.environ.get("SETUP_DEVICE", "")
    return has_nvidia_gpu() if chosen not in ("cpu", "cuda") else chosen == "cuda"


def find_problems(imports=False):
    """One line per problem of this interpreter's packages; imports: also import what compiled code can break."""
    if not (3, 11) <= sys.version_info < (3, 14):
        return [f"Python 3.11, 3.12 or 3.13 is wanted, this is {platform.python_version()}"]
    problems = build_problems()
    for name, wanted in read_pins().items():
        version = installed_version(name)
        if version is None:
            problems.append(f"{name}=={wanted} is not installed")
        elif version.split("+", 1)[0] != wanted:  # a build tag such as 2.13.0+cpu is the same version
            problems.append(f"{name}=={wanted} is wanted, {version} is installed")
    if installed_version("torchaudio") is not None:
        problems.append("torchaudio is installed; it breaks lhotse: remove it with 'pip uninstall torchaudio'")
    for name in COMPILED if imports and not problems else ():
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken package raises is the finding
            problems.append(f"{name} cannot be imported: {' '.join(str(error).split())[:200]}")
    return problems


def build_problems():
    """One line if PyTorch is its CPU build where its CUDA build is wanted; torch is not imported."""
    torch = util.find_spec("torch")
    file = Path(torch.origin).with_name("version.py") if torch and torch.origin else None
    if not file or not re.search(r"(?m)^cuda\b[^=\n]*= *None", file.read_text(encoding="utf-8")) or not wants_cuda():
        return []
    why = "SETUP_DEVICE asks for CUDA" if os.environ.get("SETUP_DEVICE") == "cuda" else "an NVIDIA GPU is here"
    return [f"{CPU_BUILD}, and {why} (SETUP_DEVICE=cpu tools/setup.sh keeps it)"]


def say(text):
    print(f"setup: {text}", file=sys.stderr, flush=True)


def check(python, *words):
    """The problems of another interpreter's environment."""
    try:
        done = subprocess.run([str(python), __file__, "--check", *words], capture_output=True, text=True)
    except OSError:
        return ["it has no Python that runs"]
    return done.stdout.splitlines() or (["its Python does not run"] if done.returncode else [])


def index_options():
    """pip's options that give the wanted build of PyTorch.

    Raises:
      SetUpError: there is no room for it.
    """
    options, needed_mb, build = [], CUDA_MB, "PyTorch's CUDA build"
    if not wants_cuda():
        if subprocess.run([BASE, "-c", PROBE, f"{CPU_INDEX}/torch/"], stderr=subprocess.DEVNULL).returncode:
            say(f"{CPU_INDEX} does not answer: PyTorch comes from the default index, perhaps as its larger CUDA build")
            build += ", which the default index may give"
        else:
            options, needed_mb, build = ["--extra-index-url", CPU_INDEX], CPU_MB, "PyTorch's CPU build"
    df = subprocess.run(["df", "-Pm", str(ROOT)], capture_output=True, text=True).stdout.split()
    free_mb = int(df[-3]) if len(df) > 6 else CUDA_MB
    if free_mb < needed_mb:
        raise SetUpError(f"{ROOT} has {free_mb} MB of free disk space, about {needed_mb} MB are needed with {build}.")
    return options


def install(*words):
    """Let pip install these words into .venv.

    Raises:
      SetUpError: pip fails.
    """
    log = VENV / "setup.log"
    command = [str(PYTHON), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *words]
    variables = {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    UNFINISHED.touch()
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={"PIP_RETRIES": "2", **os.environ, **variables},
            close_fds=False,  # pip keeps the lock, should it outlive this process
        ).returncode
    output = log.read_text(encoding="utf-8", errors="replace")
    no_network = code and re.search(NO_NETWORK, output)
    if code == 0 or no_network:  # pip downloads everything before it changes anything
        UNFINISHED.unlink()
    if no_network:
        reason = "packages could not be downloaded: is there a network, a proxy (HTTPS_PROXY), a mirror (PIP_INDEX_URL)"
        raise SetUpError(f"{reason}? Then run this again; pip's output: {log}")
    if code:
        errors = [line for line in output.splitlines() if re.search("ERROR|Error", line)] or ["it failed"]
        raise SetUpError(f"pip: {errors[-1][:300]}; pip's output: {log}")


def make_ready():
    """Make or repair .venv.

    Raises:
      SetUpError: it cannot be.
    """
    if not UNFINISHED.exists() and not check(PYTHON):
        return
    with open(REQUIREMENTS) as lock:  # two set-ups at the same time would write into each other's packages
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        problems = ["an earlier set-up was cut off"] if UNFINISHED.exists() else check(PYTHON)
        if not problems:
            return
        if VENV.exists():
            say(f"{VENV}: {problems[0]}")
        ends = UNFINISHED.exists() or not PYTHON.exists()
        if ends or subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True).returncode:
            say(f"making {VENV} with {BASE}")
            index = index_options()
            command = [BASE, "-m", "venv", "--clear", str(VENV)]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise SetUpError(f"{' '.join(command)}: {(made.stdout + made.stderr).strip()[-300:]}")
            problems = check(PYTHON)
        else:
            index = index_options() if any(line.startswith("torch") for line in problems) else []
        for problem in [line for line in problems if line.startswith(CPU_BUILD)]:
            say(f"{problem}: installing the CUDA build (some minutes)")
            install("--force-reinstall", "-c", str(REQUIREMENTS), f"torch=={read_pins()['torch']}")
            problems = check(PYTHON)
        if any(not line.startswith(CPU_BUILD) for line in problems):
            say("installing the packages of requirements.txt (some minutes the first time)")
            install(*index, "-r", str(REQUIREMENTS))
        for problem in check(PYTHON, "--imports"):
            raise SetUpError(f"{problem}; if nothing else helps, remove {VENV} and run this again.")


def choose_environment():
    """The interpreter of the active environment where that satisfies the pins, otherwise .venv's."""
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if not active or Path(active) == VENV:
        return PYTHON
    problems = check(Path(active, "bin", "python"))
    if problems:
        say(f"the active environment {active} does not satisfy requirements.txt ({problems[0]}); using {VENV}")
        return PYTHON
    say(f"taking the active environment as it is: {active}")
    return Path(active, "bin", "python")


def main():
    if "--check" in sys.argv[1:]:
        problems = find_problems("--imports" in sys.argv[1:])
        print("\n".join(problems), end="\n" if problems else "")
        sys.exit(1 if problems else 0)
    try:
        if sys.argv[1:]:
            raise SetUpError(f"tools/setup.sh takes no arguments, got '{sys.argv[1]}': see its first lines.")
        if os.environ.get("SETUP_DEVICE", "") not in ("", "cpu", "cuda"):
            raise SetUpError(f"SETUP_DEVICE must be cpu or cuda, got '{os.environ['SETUP_DEVICE']}'.")
        python = choose_environment()
        if python == PYTHON:
            make_ready()
    except SetUpError as error:
        sys.exit(f"setup failed: {error}")
    if sys.stdout.isatty():
        say(f"ready; to use it in this shell: source '{python.parent}/activate'")
    print(python)


if __name__ == "__main__":
    main()
