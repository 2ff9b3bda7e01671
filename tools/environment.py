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
from functools import cache
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from cascade.nvidia import has_nvidia_gpu  # noqa: E402

REQUIREMENTS = ROOT / "requirements.txt"
VENV = ROOT / ".venv"
PYTHON_VERSIONS = ((3, 11), (3, 12), (3, 13))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_MB, CUDA_MB = 3000, 8000
"""Free disk to ask for: .venv takes 1.6 GB with PyTorch's CPU build, and pip unpacks downloads beside it."""
CPU_BUILD = "is PyTorch's CPU build"
UNWANTED = {"torchaudio": "it breaks lhotse: remove it with 'pip uninstall torchaudio'"}
COMPILED = (
    "torch", "numpy", "scipy.signal", "numba", "omegaconf", "lhotse", "lilcom", "soundfile", "kaldi_native_fbank",
    "sentencepiece", "matplotlib", "torch.utils.tensorboard", "onnx", "onnxruntime", "sherpa_onnx",
)
PROBE = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method='HEAD'), timeout=3)"
NO_NETWORK = r"ConnectionError|NameResolution|unreachable|Connection(Reset| refused)|[Tt]imed? ?out|ProxyError|SSLError"


class SetUpError(Exception):
    """The environment cannot be made ready; the message is one sentence."""


def read_pins(path=REQUIREMENTS):
    """{name: version} of the lines `name==version`; anything else in the file is an error."""
    pins = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        line = line.split("#", 1)[0].strip()
        if line:
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line)
            if match is None:
                raise ValueError(f"{path}: every requirement is written name==version, got {line!r}")
            pins[match[1]] = match[2]
    return pins


def installed_version(name):
    """The version, None where it is missing, "" where it is only half installed: installers write INSTALLER last."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return package.version if package.version and package.read_text("INSTALLER") is not None else ""


def fits():
    """True where the pins were measured on this interpreter's version."""
    return sys.version_info[:2] in PYTHON_VERSIONS


def wants_cuda():
    """True where PyTorch should be its CUDA build."""
    chosen = os.environ.get("SETUP_DEVICE", "")
    return has_nvidia_gpu() if chosen not in ("cpu", "cuda") else chosen == "cuda"


def find_problems(imports=False):
    """One line per problem of this interpreter's packages; imports: also import what compiled code can break."""
    if not fits():
        return [f"Python 3.11, 3.12 or 3.13 is wanted, this is {sys.version.split()[0]}"]
    problems = []
    for name, wanted in read_pins().items():
        version = installed_version(name)
        if not version:
            problems.append(f"{name}=={wanted} is {'not' if version is None else 'only half'} installed")
        elif version.split("+", 1)[0] != wanted:  # a build tag such as 2.13.0+cpu is the same version
            problems.append(f"{name}=={wanted} is wanted, {version} is installed")
    for name, reason in UNWANTED.items():
        if installed_version(name) is not None:
            problems.append(f"{name} is installed; {reason}")
    for name in () if problems else sorted({module.split(".")[0] for module in COMPILED}):
        if util.find_spec(name) is None:
            problems.append(f"{name} is installed but its files are missing")
    for name in () if problems or not imports else COMPILED:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken package raises is the finding
            problems.append(f"{name} cannot be imported: {' '.join(str(error).split())[:200]}")
    return problems


def build_problems():
    """One line if PyTorch is its CPU build where its CUDA build is wanted; torch is not imported."""
    spec = util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
    if file is None or not file.is_file() or not wants_cuda():
        return []
    cuda = re.search(r"(?m)^cuda\b[^=\n]*= *(.*)$", file.read_text(encoding="utf-8"))
    if cuda is None or cuda[1].strip() != "None":
        return []
    why = "SETUP_DEVICE asks for CUDA" if os.environ.get("SETUP_DEVICE") == "cuda" else "an NVIDIA GPU is here"
    return [f"torch {CPU_BUILD}, and {why}"]


def say(text):
    print(f"setup: {text}", file=sys.stderr, flush=True)


def base_python():
    """The interpreter to make .venv with."""
    return os.environ.get("SETUP_PYTHON") or sys.executable


def check(python, *words):
    """The problems of another interpreter's environment."""
    try:
        done = subprocess.run([str(python), __file__, "--check", *words], capture_output=True, text=True)
    except OSError:
        return ["it has no Python that runs"]
    return done.stdout.splitlines() or (["its Python does not run"] if done.returncode else [])


@cache
def index_options():
    """pip's options that give the wanted build of PyTorch.

    Raises:
      SetUpError: there is no room for it.
    """
    options, needed_mb, build = [], CPU_MB, "PyTorch's CPU build"
    if platform.system() == "Linux":
        if wants_cuda():
            needed_mb, build = CUDA_MB, "PyTorch's CUDA build"
        elif subprocess.run([base_python(), "-c", PROBE, f"{CPU_INDEX}/torch/"], stderr=subprocess.DEVNULL).returncode:
            say(f"{CPU_INDEX} does not answer: PyTorch comes from the default index, perhaps as its larger CUDA build")
            needed_mb, build = CUDA_MB, "PyTorch's CUDA build, which the default index may give"
        else:
            options = ["--extra-index-url", CPU_INDEX]
    df = subprocess.run(["df", "-Pm", str(ROOT)], capture_output=True, text=True).stdout.splitlines()
    free_mb = int(df[1].split()[3]) if len(df) > 1 else CUDA_MB
    if free_mb < needed_mb:
        need = f"the environment needs about {needed_mb} MB with {build}"
        raise SetUpError(f"{ROOT} has {free_mb} MB of free disk space, {need}.")
    return options


def install(python, problems, *words, remedy=""):
    """Let pip install these words; torch, where it is among the problems, as the wanted build.

    Raises:
      SetUpError: pip fails.
    """
    index = index_options() if any(re.match(r"torch\b", line) for line in problems) else []
    log = VENV / "setup.log"
    command = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *index, *words]
    variables = {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with open(log, "w", encoding="utf-8") as file:
        environment = {"PIP_RETRIES": "2", **os.environ, **variables}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code == 0:
        return
    said = log.read_text(encoding="utf-8", errors="replace")
    errors = [line for line in said.splitlines() if "ERROR" in line or "Error" in line]
    if re.search("No space left|Errno 28|Disk quota", said):
        raise SetUpError(f"the disk is full: free some GB under {ROOT} and in TMPDIR, then run this again.")
    if re.search(NO_NETWORK, said):
        raise SetUpError("packages could not be downloaded: is there a network, and does it need a proxy (HTTPS_PROXY) "
                         f"or a mirror (PIP_INDEX_URL)? Then run this again{remedy}; pip's output: {log}")
    raise SetUpError(f"pip: {(errors or ['no error line'])[-1][:300]}{remedy}; pip's whole output: {log}")


def replace_cpu_build(python, problem):
    """Put PyTorch's CUDA build in the place of its CPU build; nothing is removed before all of it is downloaded.

    Raises:
      SetUpError: it cannot be installed.
    """
    pin = f"torch=={read_pins()['torch']}"
    keep = "or set SETUP_DEVICE=cpu to keep the CPU build"
    say(f"{problem}: installing the CUDA build (some minutes)")
    install(python, [problem], "--force-reinstall", "-c", str(REQUIREMENTS), pin, remedy=(
        f", {keep}; without a network here, run SETUP_DEVICE=cuda tools/setup.sh on a machine that has one"))
    if any(CPU_BUILD in line for line in check(python)):
        raise SetUpError(
            f"pip's index gave {pin} as its CPU build again: see PIP_INDEX_URL and PIP_EXTRA_INDEX_URL, {keep}."
        )


def make_ready():
    """Make or repair .venv; its interpreter.

    Raises:
      SetUpError: it cannot be.
    """
    python = VENV / "bin" / "python"
    if not check(python):
        return python
    with open(REQUIREMENTS) as lock:  # two set-ups at the same time would write into each other's packages
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        problems = check(python)
        if not problems:
            return python
        if VENV.exists():
            say(f"{VENV}: {problems[0]}")
        if not python.exists() or subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode:
            say(f"making {VENV} with {base_python()}")
            index_options()  # is there room?
            command = [base_python(), "-m", "venv", "--clear", str(VENV)]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise SetUpError(f"{' '.join(command)}: {(made.stdout + made.stderr).strip()[-300:]}")
            problems = check(python)
        if any(CPU_BUILD not in line for line in problems):
            say("installing the packages of requirements.txt (some minutes the first time)")
            install(python, problems, "-r", str(REQUIREMENTS))
            problems = check(python)
        for problem in problems:
            if CPU_BUILD in problem:
                replace_cpu_build(python, problem)
        problems = check(python, "--imports")
        # A package that says it is installed and yet does not import was cut off half-way: install it again, alone.
        said = "\n".join(problems).replace("_", "-")
        broken = [f"{name}=={version}" for name, version in read_pins().items() if re.search(rf"(?m)^{name}\b", said)]
        if broken:
            say(f"repairing {' '.join(broken)}")
            install(python, problems, "--force-reinstall", "--no-deps", *broken)
            problems = check(python, "--imports")
        if problems:
            raise SetUpError(f"{problems[0]}; if nothing else helps, remove {VENV} and run this again.")
        return python


def set_up():
    """Choose the environment and make it ready; its interpreter.

    Raises:
      SetUpError: it cannot be.
    """
    device = os.environ.get("SETUP_DEVICE", "")
    if device not in ("", "cpu", "cuda"):
        raise SetUpError(f"SETUP_DEVICE must be cpu or cuda, got '{device}'.")
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and Path(active) != VENV:
        python = Path(active, "bin", "python")
        problems = check(python)
        if not problems:
            say(f"taking the active environment as it is: {active}")
            return python
        say(f"the active environment {active} does not satisfy requirements.txt ({problems[0]}); using {VENV}")
    return make_ready()


def main():
    if "--check" in sys.argv[1:]:
        problems = find_problems("--imports" in sys.argv[1:]) + (build_problems() if fits() else [])
        print("\n".join(problems), end="\n" if problems else "")
        sys.exit(1 if problems else 0)
    try:
        python = set_up()
    except SetUpError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        sys.exit(1)
    if sys.stdout.isatty():
        say(f"ready; to use it in this shell: source '{python.parent}/activate'")
    print(python)


if __name__ == "__main__":
    main()
