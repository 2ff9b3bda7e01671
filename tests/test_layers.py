"""Who may import whom in cascade/, as data: imports go downwards only, and each big dependency has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BASE = {"config", "log", "provenance", "files", "threads"}
FRONT = BASE | {"device", "processes", "audio", "text"}
NETWORKS = FRONT | {"models", "losses", "checkpoint"}
RUNTIME = NETWORKS | {"search", "stream"}
RESULTS = RUNTIME | {"measure", "report"}
CORPUS = RESULTS | {"corpus", "data"}
# Room -> the other rooms of cascade/ that it may import.
MAY_IMPORT = {
    "config": set(),
    "files": set(),
    "log": set(),
    "nvidia": set(),
    "product": set(),
    "product_numba": set(),
    "provenance": set(),
    "threads": set(),
    "device": BASE | {"nvidia"},
    "processes": BASE | {"device"},
    "audio": BASE,
    "text": BASE,
    "models": BASE | {"product"},
    "losses": BASE,
    "checkpoint": NETWORKS,
    "search": FRONT | {"product", "product_numba"},
    "stream": FRONT | {"models", "search"},
    "measure": RUNTIME,
    "report": RESULTS,
    "corpus": FRONT | {"report"},
    "data": RUNTIME | {"corpus", "measure"},
    "training": CORPUS,
    "export": CORPUS,
    "recognizer": RUNTIME | {"export"},
    "server": BASE | {"audio", "text", "stream", "recognizer"},
    "bin": CORPUS | {"training", "export", "recognizer", "server"},
    "__init__": {"recognizer"},
}

# Package from outside -> the only places of cascade/ that may import it.
DOORS = {
    "lhotse": ("corpus", "data", "audio"),
    "lilcom": ("data",),
    "kaldi_native_fbank": ("audio.fbank",),
    "kaldifeat": ("audio.fbank",),
    "soundfile": ("corpus", "data", "audio"),
    "sentencepiece": ("text.tokens",),
    "omegaconf": ("config.load",),
    "yaml": ("config.load",),
    "numba": ("losses.recursion_numba", "product_numba", "search.beam_numba", "search.ngram_numba"),
    "llvmlite": ("product_numba",),
    "k2": ("losses.rnnt_k2",),
    "tensorboard": ("training",),
    "matplotlib": ("report.plots", "corpus.statistics_plot"),
    "scipy": ("corpus", "data"),
    "tqdm": ("log",),
    "threadpoolctl": ("threads",),
    "onnx": ("export",),
    "onnxruntime": ("export",),
    "sherpa_onnx": ("export",),
    "aiohttp": ("server",),
}
EVERYWHERE = {"cascade", "torch", "numpy"} | sys.stdlib_module_names
NOWHERE = {"torchaudio"}  # it breaks lhotse
WITHOUT_TORCH = {"product", "product_numba", "search", "server", "stream", "text"}
"""Not even inside of functions."""


def modules() -> dict[str, Path]:
    """Dotted name below cascade -> file; a package goes by its folder's name."""
    package = ROOT / "cascade"
    files = {file: ".".join(file.relative_to(package).with_suffix("").parts) for file in sorted(package.rglob("*.py"))}
    return {name.removesuffix(".__init__"): file for file, name in files.items()}


def imports(name: str, file: Path) -> list[tuple[str, int]]:
    """Every imported dotted name with its line, those inside functions included; relative imports made absolute."""
    found = []
    package = ["cascade", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


MODULES = modules()
IMPORTS = {name: imports(name, file) for name, file in MODULES.items()}


def module_of(target: str) -> str | None:
    """The module of cascade/ that an imported dotted name means."""
    parts = target.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or None


def test_there_is_something_to_check():
    assert {"config", "models.transducer", "bin.train"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards_only(name):
    room = name.split(".")[0]
    assert room in MAY_IMPORT, f"cascade/{room} is a new room: say in MAY_IMPORT what it may import"
    wrong = []
    for target, line in IMPORTS[name]:
        if target.split(".")[0] == "cascade":
            other = (module_of(target) or room).split(".")[0]
            if other != room and other not in MAY_IMPORT[room]:
                wrong.append(f"{MODULES[name].relative_to(ROOT)}:{line}: {room} may not import {other} ({target})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", MODULES)
def test_each_dependency_has_its_door(name):
    wrong = []
    for target, line in IMPORTS[name]:
        package = "tensorboard" if target.startswith("torch.utils.tensorboard") else target.split(".")[0]
        doors = DOORS.get(package)
        if package in NOWHERE or (package == "torch" and name.split(".")[0] in WITHOUT_TORCH):
            wrong.append(f"{MODULES[name].relative_to(ROOT)}:{line}: {package} is not used here")
        elif doors is None and package not in EVERYWHERE:
            wrong.append(f"{MODULES[name].relative_to(ROOT)}:{line}: {package} is new: say in DOORS who may import it")
        elif doors is not None and not any(name == door or name.startswith(door + ".") for door in doors):
            wrong.append(f"{MODULES[name].relative_to(ROOT)}:{line}: only {', '.join(doors)} may import {package}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles():
    graph = {
        name: {module_of(target) for target, _ in found if target.split(".")[0] == "cascade"} - {None, name}
        for name, found in IMPORTS.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(error.args[1])}")


def test_streams_and_searches_load_neither_torch_nor_onnxruntime():
    names = [name for name in MODULES if name.split(".")[0] in ("audio", "text", "search", "stream")]
    assert {"audio.fbank", "search.beam_numba", "search.ngram_numba", "stream.batch", "text.tokens"} <= set(names)
    code = "; ".join(f"import cascade.{name}" for name in names)
    code += "; import sys; sys.exit(' '.join({'torch', 'onnxruntime'} & set(sys.modules)) or 0)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


def test_packages_are_marked_by_empty_files_and_nothing_is_called_utils():
    for name, file in MODULES.items():
        if file.name == "__init__.py" and name not in ("__init__", "bin"):  # the Recognizer; what a program lacks
            assert not file.read_text().strip(), f"{file} must be empty"
        assert "util" not in name.split(".")[-1], f"{file}: name it after what it does"
    folders = {file.parent for file in MODULES.values()}
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, f"no __init__.py in {missing}"


def test_linter_and_set_up_agree_on_the_python_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11,<3.14"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert "(3, 11) <= sys.version_info < (3, 14)" in (ROOT / "tools" / "setup.sh").read_text()
    assert "(3, 11) <= sys.version_info < (3, 14)" in (ROOT / "tools" / "environment.py").read_text()
