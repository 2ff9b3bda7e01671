"""The package can be installed, needs what it says, and names, versions and licences stand in one place or agree."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES_OF = {"llvmlite": "numba", "kaldi_native_fbank": "kaldi-native-fbank", "sherpa_onnx": "sherpa-onnx"}
"""Packages whose modules are called otherwise."""
BY_HAND = {"k2", "kaldifeat"}
"""What cascade imports only where someone has built it."""
TOOLS_ALONE = {"espeakng-loader"}
"""What only tools/ loads: pinned, and no dependency of the package."""


EXTRAS = PROJECT["project"]["optional-dependencies"]
OTHER_EXTRAS = re.compile(rf"{PROJECT['project']['name']}\[([a-z,]+)\]")
"""How an extra takes others in."""


def test_dependencies_and_extras_are_the_pinned_packages_without_versions():
    names = [*PROJECT["project"]["dependencies"], *(name for names in EXTRAS.values() for name in names)]
    others = {extra for name in names if (match := OTHER_EXTRAS.fullmatch(name)) for extra in match[1].split(",")}
    assert others < set(EXTRAS)
    names = [name for name in names if not OTHER_EXTRAS.fullmatch(name)]
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names) and len(names) == len(set(names))
    pins = re.findall(r"(?m)^([A-Za-z0-9._-]+)==", (ROOT / "requirements.txt").read_text())
    assert sorted(names) == sorted(set(pins) - TOOLS_ALONE)


def test_every_import_of_the_package_is_a_dependency_or_an_extra():
    extras = (names for extra, names in EXTRAS.items() if extra != "test")
    declared = {*PROJECT["project"]["dependencies"], *(name for names in extras for name in names)}
    for file in (ROOT / "cascade").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {module.split(".")[0] for module in modules} - {"cascade"} - set(sys.stdlib_module_names):
                assert MODULES_OF.get(name, name) in declared | BY_HAND, f"{file} imports {name}"


def test_one_top_level_package_is_installed_with_everything_in_it():
    assert PROJECT["tool"]["setuptools"]["packages"]["find"] == {"include": ["cascade", "cascade.*"]}
    files = [path for path in (ROOT / "cascade").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    web = [path for path in files if path.parent == ROOT / "cascade" / "server" / "web"]
    assert web and PROJECT["tool"]["setuptools"]["package-data"] == {"cascade.server": ["web/*"]}
    suffixes = {path.suffix for path in files if path not in web}
    assert suffixes == {".py", ".md"}, "other files need package-data in pyproject.toml"


def test_the_citation_agrees_with_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for key in ("version", "license"):
        assert citation[key] == PROJECT["project"][key]
    assert (ROOT / "README.md").read_text(encoding="utf-8").startswith(f"# {citation['title']}\n")
    assert "2312.09842" in citation["references"][0]["url"]


def test_the_workflow_calls_what_continuous_integration_runs_here():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert {"run": "bash .ci/run"} in jobs["tests"]["steps"]
    pythons = [step["with"]["python-version"] for step in jobs["tests"]["steps"] if "with" in step]
    assert [*pythons, *jobs["set-up"]["strategy"]["matrix"]["python"]] == ["3.11", "3.12", "3.13"]
