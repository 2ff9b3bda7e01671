"""Every recipe loads, names real programs with real options and has the same stages; AN4 runs from end to end."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest

from cascade.config.load import load_config
from cascade.config.options import Config
from cascade.models.build import build_model, count_params
from tests.recipe_commands import commands_of
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


OPTIONS = {
    "an4": [], "commands": [], "tsv": ["--large", "--num-processes=3"],
    "librispeech": ["--small", "--musan", "--epochs=1", "--num-processes=3", "--lm"],
}
"""Own options of recipes that reach their programs or choose other files; --tsv is given wherever there is one."""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """commands(RECIPE): the words of every command that it runs, without and with all its options."""

    @lru_cache
    def collect(recipe: str) -> list[list[str]]:
        folder = tmp_path_factory.mktemp(recipe)
        (folder / "data.tsv").touch()
        table = [f"--tsv={folder}/data.tsv"] if "tsv=" in script(ROOT / "egs" / recipe) else []
        every = [*table, *OPTIONS.get(recipe, []), "--quick", "--force", "--corpus-dir=.", "--rir-dir=."]
        lines = commands_of(recipe, folder / "plain", *table) + commands_of(recipe, folder / "every", *every)
        return [line.split() for line in lines]

    return collect


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


@each_recipe
def test_own_values_come_after_those_of_the_recipe(recipe, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("training: {num_epochs: 1}\n")
    table = ["--tsv", str(own)] if recipe.name == "tsv" else []
    lines = commands_of(recipe, tmp_path / "run", *table, "--extra-conf", str(own), "--stop-stage", "5")
    configured = [line.split(" --config ", 1)[1].split() for line in lines if " --config " in line]
    assert len(configured) >= 6
    for words in configured:
        assert [word for word in words if word.endswith(".yaml")][-1] == str(own)


@each_recipe
def test_programs_exist_and_know_the_words_that_recipes_give_them(recipe, commands, monkeypatch):
    programs = {}
    for words in commands(recipe.name):
        if words[0] == "-m":
            name = words[1]
            programs[name] = programs.get(name) or parser_of(name, monkeypatch)
            monkeypatch.undo()
            programs[name].parse_args(words[2:])
        else:
            assert words[0].endswith("local/prepare.py") and words[0].startswith("egs/books/")
    own = {"align", "train_ngram", "tune_scales"}  # egs/an4 recombines aligned words, librispeech has a language model
    assert {name.rpartition(".")[2] for name in programs} - own == {
        "prepare_data", "compute_features", "train_tokens", "train", "calibrate", "decode", "latency", "export_onnx",
        "report",
    }


@each_recipe
def test_a_recipe_shows_every_stage_with_its_command(recipe):
    stages = re.split(r"^if stage ", script(recipe), flags=re.MULTILINE)[1:]
    shown = ("prepare_data", "compute_features", "train_tokens", "train teacher", "train student_alone",
             'train student --teacher "$exp/teacher"', "decode", "latency", "export_onnx student", "report")
    for stage, command in zip(stages, shown, strict=True):
        assert re.search(rf"^ +{re.escape(command)}", stage, re.MULTILINE), stage


def test_every_step_names_what_it_makes():
    texts = [(ROOT / "tools" / "recipe.sh").read_text(), *map(script, RECIPES)]
    text = re.sub(r"\\\n\s*", " ", "\n".join(texts))
    steps = re.findall(r"^ +step (.*)$", text, re.MULTILINE)
    assert len(steps) > 10
    for step in steps:
        assert re.match(r'("[^"]+"|\S+) .*--outputs .* --\s+python ', step), f"step NAME ... --outputs ...: {step}"


@each_recipe
def test_a_recipe_says_what_its_corpus_is_for_the_model_card(recipe):
    assert "write_about(" in (recipe / "local" / "prepare.py").read_text()


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
        found[model] = [*found.get("teacher", found["data"]), conf / f"{model}.yaml"]
    return found | {f"{name} quick": [*files, ROOT / "egs" / "quick.yaml"] for name, files in found.items()}


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
def test_every_config_file_is_used_and_documented(recipe, commands):
    used = {word for words in commands(recipe.name) for word in words if word.endswith(".yaml")}
    files = sorted((recipe / "conf").rglob("*.yaml"))
    of_others = {word for word in used if word.startswith("egs/librispeech/conf/")}
    own = {f"egs/books/{file.relative_to(recipe).as_posix()}" for file in files}
    assert used - of_others == {"egs/quick.yaml", *own} and all((ROOT / file).is_file() for file in of_others)
    for file in [*files, ROOT / "egs" / "quick.yaml"]:
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


@pytest.mark.parametrize(("recipe", "options", "training"), [
    *((name, options, "--device cpu --num-processes 2 ")
      for name in ("an4", "commands") for options in ([], ["--device", "cpu"])),
    ("commands", ["--device=auto"], "--device auto "),
    ("an4", ["--device", "cuda"], "--device cuda "),
    ("tsv", ["--device", "cuda", "--num-processes", "3"], "--device cuda --num-processes 3 "),
    ("tsv", [], "--device auto "),
])
def test_recipes_of_cpu_results_train_on_the_cpu_and_device_changes_that(recipe, options, training, tmp_path):
    lines = commands_of(recipe, tmp_path, "--stage", "3", "--stop-stage", "6", *options)
    device = " ".join(training.split()[:2])
    for program, words in (("train", training), ("decode", f"{device} ")):
        chosen = [line for line in lines if f"cascade.bin.{program} " in line]
        assert len(chosen) >= 3 and all(words in line for line in chosen), chosen
        assert all(("--num-processes" in line) == ("--num-processes" in words) for line in chosen), chosen


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
        assert row["num_words"] > 0 and row["wer"] is not None and {"ece", "ece_uncalibrated"} <= row.keys()
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
