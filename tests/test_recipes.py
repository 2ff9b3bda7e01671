"""Every recipe loads, names real programs with real options and has the same stages; AN4 runs from end to end."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from cascade.config.load import load_config
from cascade.config.options import Config
from cascade.models.build import build_model, count_params
from tests.corpus.test_librispeech import FAKE_PYTHON
from tests.report.test_report import result

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(file.parent for file in ROOT.glob("egs/*/run.sh"))
AN4 = ROOT.parent / "shared" / "corpora" / "an4"

STAGES = {
    0: "data", 1: "features", 2: "tokens", 3: "train the teacher", 4: "train the student alone",
    5: "train the student, distilled", 6: "decode", 7: "latency", 8: "export", 9: "report",
}
"""Number of a stage and how its title begins, the same in every recipe."""

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def script(recipe: Path) -> str:
    """The text of run.sh."""
    return (recipe / "run.sh").read_text(encoding="utf-8")


def steps(recipe: Path) -> list[str]:
    """The commands of run.sh, one line each, comments left out."""
    text = re.sub(r"\\\n\s*", " ", script(recipe))
    return [line.strip() for line in text.splitlines() if re.match(r"\s*(step|python)\b", line)]


def test_there_is_a_recipe():
    assert RECIPES


@each_recipe
def test_script_is_sound_shell(recipe):
    path = recipe / "run.sh"
    assert os.access(path, os.X_OK), f"chmod +x {path}"
    assert script(recipe).startswith("#!/usr/bin/env bash\n")
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stderr == "", checked.stderr
    assert "tools/recipe.sh" in script(recipe), "options, set-up and steps come from tools/recipe.sh"
    for line in script(recipe).splitlines():
        # A folder with a space in its name must stay one word; ${option:+"words if it is given"} does so too.
        code = re.sub(r'\$\{\w+:\+|"\$\(.*\)[^"]*"|"[^"]*"|#.*', "", line)
        bare = re.findall(r"\$\{?(\w+)", code)
        assert not bare, f"{path}: put ${bare[0]} into double quotes: {line.strip()}"


@each_recipe
def test_script_holds_nothing_of_this_recipe_so_that_a_copy_works(recipe):
    for line in script(recipe).splitlines():
        assert line.startswith("#") or f"egs/{recipe.name}" not in line, f"write $recipe or $conf: {line}"


@each_recipe
def test_stages_have_the_same_numbers_in_every_recipe(recipe):
    found = re.findall(r'^if stage (\S+) "([^"]+)"; then$', script(recipe), re.MULTILINE)
    numbers = [int(number) for number, _ in found]
    assert numbers == list(STAGES)
    for number, title in found:
        assert title.startswith(STAGES[int(number)]), f"stage {number} is {STAGES[int(number)]}, not {title}"


@each_recipe
def test_help_shows_all_stages_at_once(recipe, tmp_path):
    shown = subprocess.run([recipe / "run.sh", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert shown.returncode == 0 and shown.stderr == ""
    for number, title in STAGES.items():
        assert f"  {number}  {title}" in shown.stdout


class ParserSeen(Exception):
    """Carries the parser of a program that was about to read its arguments."""


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The argument parser of a program, caught when it wants to parse."""
    def catch(parser: argparse.ArgumentParser, *_: object) -> None:
        raise ParserSeen(parser)

    program = importlib.import_module(module)
    for name in ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, catch)
    with pytest.raises(ParserSeen) as seen:
        program.main()
    return seen.value.args[0]


PROGRAMS = sorted({name for recipe in RECIPES for name in re.findall(r"python -m (\S+)", script(recipe))})


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_exist_and_know_the_options_that_recipes_give_them(program, monkeypatch):
    parser = parser_of(program, monkeypatch)
    assert parser.description and parser.format_help()
    known = {option for action in parser._actions for option in action.option_strings}
    required = {action.option_strings[-1] for action in parser._actions if action.required and action.option_strings}
    for recipe in RECIPES:
        for step in steps(recipe):
            if f"python -m {program} " in step:
                given = set(re.findall(r"(?<=[\s+])--[a-z][a-z-]*", step.split(f"python -m {program}", 1)[1]))
                assert given <= known, f"{recipe.name}: {program} does not know {given - known}"
                assert required <= given, f"{recipe.name}: {program} also wants {required - given}"


@each_recipe
def test_every_step_names_what_it_makes(recipe):
    names = []
    for step in steps(recipe):
        match = re.match(r'step ("[^"]+"|\S+) .*--outputs .* --\s+python ', step)
        assert match, f"step NAME [--after STEP...] --outputs PATH... -- python ...: {step}"
        names.append(match[1])
    assert len(names) == len(set(names)) > 5


@each_recipe
def test_a_report_needs_no_particular_model(recipe):
    (report,) = [step for step in steps(recipe) if step.startswith("step report ")]
    assert "--optional " in report and "--inputs" not in report and "--after" not in report


def test_stage_9_reports_what_is_there(tmp_path):
    folder = tmp_path / "teacher" / "decode" / "full-greedy_search"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result("teacher", "full", "greedy_search")))
    command = [ROOT / "egs" / "an4" / "run.sh", "--stage", "9", "--exp-dir", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "student has not finished training: run stage 5" in (tmp_path / "RESULTS.md").read_text()


def configs(recipe: Path) -> dict[str, list[Path]]:
    """The files that each kind of program gets, with and without --quick."""
    conf = recipe / "conf"
    found = {"data": [conf / "data.yaml"]}
    for model in ("teacher", "student"):
        found[model] = [conf / "data.yaml", conf / f"{model}.yaml"]
    return found | {f"{name} quick": [*files, conf / "quick.yaml"] for name, files in found.items()}


@pytest.mark.parametrize(
    ("recipe", "name"), list(product(RECIPES, configs(RECIPES[0]))), ids=lambda value: getattr(value, "name", value)
)
def test_configs_load_and_their_models_can_be_built(recipe, name):
    config = load_config(configs(recipe)[name])
    assert isinstance(config, Config)
    if name != "data":
        assert (config.distillation is not None) == name.startswith("student")
        if name.endswith("quick"):
            assert count_params(build_model(config, 50)) < 200_000


@each_recipe
def test_every_config_file_is_used_and_documented(recipe):
    for file in sorted((recipe / "conf").rglob("*.yaml")):
        name = file.relative_to(recipe / "conf").as_posix()
        assert f'"$conf/{name}"' in script(recipe), f"{file} is used by no stage"
        assert file.read_text().startswith("#"), f"{file}: begin with a comment that says what it is for"
        load_config([file])


@each_recipe
def test_student_is_about_half_of_its_teacher(recipe):
    found = configs(recipe)
    sizes = {name: count_params(build_model(load_config(found[name]), 100)) for name in ("teacher", "student")}
    assert sizes["student"] <= 0.52 * sizes["teacher"], sizes


@each_recipe
def test_recipe_has_its_readme_and_nothing_but_thin_parts(recipe):
    text = (recipe / "README.md").read_text()
    assert re.search(r"egs/[\w.-]+/run\.sh", text), "say how to run it (a copy may still name the recipe it came from)"
    python = [file.relative_to(recipe).as_posix() for file in recipe.rglob("*.py") if "exp" not in file.parts]
    assert set(python) <= {"local/prepare.py"}, "Python belongs into cascade/, a recipe has local/prepare.py"


@pytest.mark.parametrize(("recipe", "options", "training", "decoding"), [
    *((name, options, "--device cpu --num-processes 2 ", "--device cpu ")
      for name in ("an4", "commands") for options in ([], ["--device", "cpu"])),
    ("commands", ["--device=auto"], "--device auto --force", "--device auto "),
    ("an4", ["--device", "cuda"], "--device cuda --force", "--device cuda "),
    ("tsv", ["--device", "cuda", "--num-processes", "3"], "--device cuda --num-processes 3 ", "--device cuda "),
    ("tsv", [], "", ""),
])
def test_recipes_of_cpu_results_train_on_the_cpu_and_device_changes_that(
    recipe, options, training, decoding, tmp_path
):
    for name in ("tools/recipe.sh", f"egs/{recipe}/run.sh"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in (("tools/setup.sh", '#!/bin/sh\necho "$FAKE"\n'), ("python", FAKE_PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for stamp in ("data", "fbank", "tokens"):
        (tmp_path / "exp" / "stamps").mkdir(parents=True, exist_ok=True)
        (tmp_path / "exp" / "stamps" / stamp).touch()
    command = [tmp_path / "egs" / recipe / "run.sh", "--exp-dir", "exp", "--force", *options]
    environment = {**os.environ, "LOG": str(tmp_path / "log"), "FAKE": str(tmp_path / "python")}
    done = subprocess.run(
        [*command, "--stage", "3", "--stop-stage", "6"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "log").read_text().splitlines()
    for program, count, words in (("train", 3, training), ("decode", 18, decoding)):
        found = [line for line in commands if f"cascade.bin.{program} " in line]
        assert len(found) == count
        for line in found:
            assert words in line and ("--device" in line) == bool(words), line


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "corpus"), [
    ("commands", None),
    pytest.param("an4", AN4, marks=pytest.mark.skipif(not AN4.is_dir(), reason=f"no copy of AN4 in {AN4}")),
])
def test_quick_runs_from_end_to_end_and_a_second_run_does_nothing(recipe, corpus, tmp_path):
    exp = tmp_path / "an exp"
    command = [ROOT / "egs" / recipe / "run.sh", "--quick", "--exp-dir", exp.name]
    if corpus is not None:
        command += ["--corpus-dir", os.path.relpath(corpus, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=900)
    assert first.returncode == 0, first.stderr[-3000:]
    rows = json.loads((exp / "results.json").read_text())
    found = {(row["model"], row["mode"], row["method"]) for row in rows}
    models, modes = ("teacher", "student_alone", "student"), ("streaming", "look_ahead", "full")
    assert found == set(product(models, modes, ("greedy_search", "modified_beam_search")))
    for row in rows:
        assert row["num_words"] > 0 and row["wer"] is not None
        timed = (row["mode"], row["method"]) == ("streaming", "greedy_search")
        assert row["chunk_compute_ms_p50"] > 0 if timed else True
    assert list((exp / "student" / "export").glob("*.onnx"))
    assert (exp / "RESULTS.md").read_text().strip() and list((exp / "plots").glob("*.png"))

    def times():
        return {path: path.stat().st_mtime_ns for path in exp.rglob("*") if path.is_file() and path.suffix != ".lock"}

    before = times()
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert second.returncode == 0 and second.stderr.count("done already") == len(list((exp / "stamps").glob("[!.]*")))
    assert times() == before
