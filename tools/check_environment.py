"""Does this interpreter's environment hold exactly what requirements.txt pins?

    python tools/check_environment.py            # versions, a tenth of a second
    python tools/check_environment.py --imports  # also imports what compiled code can break, a few seconds
    python tools/check_environment.py --wants-cuda  # exits with 0 where PyTorch should be its CUDA build, else with 1

Prints one line per problem and exits with 1; prints nothing and exits with 0 when all is well. Runs on any
Python 3 without packages, so that it can also judge an environment that is not fit.

PyTorch should be its CUDA build where an NVIDIA GPU is. SETUP_DEVICE=cuda says so without one, as on a login node,
SETUP_DEVICE=cpu says that the CPU build will do.
"""

import importlib
import os
import re
import sys
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from cascade.nvidia import has_nvidia_gpu  # noqa: E402

REQUIREMENTS = ROOT / "requirements.txt"
CPU_BUILD = "is PyTorch's CPU build"
PYTHON_VERSIONS = ((3, 11), (3, 12), (3, 13))
UNWANTED = {"torchaudio": "it breaks lhotse: remove it with 'pip uninstall torchaudio'"}
COMPILED = (
    "torch", "numpy", "scipy.signal", "numba", "omegaconf", "lhotse", "lilcom", "soundfile", "kaldi_native_fbank",
    "sentencepiece", "matplotlib", "torch.utils.tensorboard", "onnx", "onnxruntime", "sherpa_onnx",
)


def read_pins(path):
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


def version_problems(pins):
    """One line per pin that is absent, half-installed or of another version, and per unwanted package."""
    problems = []
    for name, wanted in pins.items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name}=={wanted} is not installed")
            continue
        found = distribution.version
        # A build tag such as 2.13.0+cpu is the same version. Installers write INSTALLER last.
        if found is None or distribution.read_text("INSTALLER") is None:
            problems.append(f"{name}=={wanted} is only half installed")
        elif found.split("+", 1)[0] != wanted:
            problems.append(f"{name}=={wanted} is wanted, {found} is installed")
    for name, reason in UNWANTED.items():
        try:
            problems.append(f"{name} {metadata.version(name)} is installed; {reason}")
        except metadata.PackageNotFoundError:
            pass
    return problems


def missing_modules(modules):
    """One line per module whose files are gone although its package counts as installed."""
    names = sorted({module.split(".")[0] for module in modules})
    return [f"{name} is installed but its files are missing" for name in names if util.find_spec(name) is None]


def wants_cuda():
    """Whether PyTorch should be its CUDA build here."""
    chosen = os.environ.get("SETUP_DEVICE", "")
    return has_nvidia_gpu() if chosen not in ("cpu", "cuda") else chosen == "cuda"


def build_problems():
    """One line if PyTorch is its CPU build where its CUDA build is wanted; torch is not imported."""
    spec = util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return []
    found = re.search(r"(?m)^cuda\b[^=\n]*= *(.*)$", file.read_text(encoding="utf-8"))
    if found is None or found[1].strip() != "None" or not wants_cuda():
        return []
    why = "SETUP_DEVICE asks for CUDA" if os.environ.get("SETUP_DEVICE") == "cuda" else "an NVIDIA GPU is here"
    return [f"torch {CPU_BUILD}, and {why}"]


def import_problems(modules):
    """One line per module that is installed but cannot be imported."""
    problems = []
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken package raises is the finding
            problems.append(f"{name} cannot be imported: {' '.join(str(error).split())[:200]}")
    return problems


def fits():
    """Is this interpreter one that the pins were measured on?"""
    return sys.version_info[:2] in PYTHON_VERSIONS


def installed_versions(names):
    """{name: version, or None where it is missing or half installed}."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def find_problems(imports=False):
    """One line per problem of this interpreter's environment; imports: also import what compiled code can break."""
    if not fits():
        return [f"Python 3.11, 3.12 or 3.13 is wanted, this is {sys.version.split()[0]}"]
    found = version_problems(read_pins(REQUIREMENTS)) or missing_modules(COMPILED)
    return found or (import_problems(COMPILED) if imports else [])


def main():
    if "--wants-cuda" in sys.argv[1:]:
        sys.exit(0 if wants_cuda() else 1)
    found = find_problems("--imports" in sys.argv[1:])
    found += build_problems() if fits() else []
    print("\n".join(found), end="\n" if found else "")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
