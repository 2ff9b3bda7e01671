"""A step of a recipe runs once, runs again exactly when something it depends on changed, and never ends half-way."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.run_stage import StageError, compare_words, describe_path, words_that_count

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "run_stage.py"
APPEND = "import sys; open(sys.argv[1], 'a').write('ran\\n')"


def words(tmp_path: Path, *command: str, options: tuple = ()) -> list[str]:
    stamp = str(tmp_path / "stamps" / "step")
    return [sys.executable, str(PROGRAM), "--stamp", stamp, *map(str, options), "--", *command]


def run(tmp_path: Path, *command: str, options: tuple = ()) -> subprocess.CompletedProcess:
    """Run a step and, as recipes do, make its stamp when it has ended with 0."""
    done = subprocess.run(words(tmp_path, *command, options=options), capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        end = subprocess.run([*words(tmp_path)[:-1], "--done"], capture_output=True, text=True, timeout=60)
        done.returncode, done.stderr = end.returncode, done.stderr + end.stderr
    return done


def count_runs(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def step(tmp_path):
    """Run a step that adds a line to a log; returns how often it ran so far."""

    def run_step(*extra: str, options: tuple = ()) -> int:
        options = ("--outputs", tmp_path / "log", *options)
        done = run(tmp_path, sys.executable, "-c", APPEND, str(tmp_path / "log"), *extra, options=options)
        assert done.returncode == 0, done.stderr
        return count_runs(tmp_path)

    return run_step


def test_finished_step_is_skipped(step):
    assert [step(), step(), step()] == [1, 1, 1]


def test_step_runs_again_when_forced(step):
    assert [step(), step(options=("--force",)), step()] == [1, 2, 2]


def test_an_input_may_be_missing_and_counts_where_it_is_there(step, tmp_path):
    file = tmp_path / "maybe"
    options = ("--inputs", file)
    runs = [step(options=options), step(options=options)]
    for content in ("one", "two"):
        file.write_text(content)
        runs += [step(options=options), step(options=options)]
    file.unlink()
    assert [*runs, step(options=options)] == [1, 1, 2, 2, 3, 3, 4]


def test_other_words_than_a_finished_steps_are_refused_until_forced(step, tmp_path):
    assert step("--noise-dir", "/the noises", "--seed", "1") == 1
    stamp = (tmp_path / "stamps" / "step").read_bytes()
    command = [sys.executable, "-c", APPEND, str(tmp_path / "log"), "--seed", "2"]
    done = run(tmp_path, *command, options=("--outputs", tmp_path / "log"))
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: step step is done, with other words than now (- then, + now):",
        "  - --noise-dir '/the noises'", "  - --seed 1", "  + --seed 2",
        "give the options as before to keep it, or --force to run it again and then what follows from it",
    ]
    assert count_runs(tmp_path) == 1 and (tmp_path / "stamps" / "step").read_bytes() == stamp
    assert step("--seed", "2", options=("--force",)) == 2
    assert step("--seed", "2") == 2


def finish(tmp_path, name, *words, after=(), options=()):
    """Run the step `name`, which does nothing."""
    call = [sys.executable, str(PROGRAM), "--stamp", str(tmp_path / name)]
    done = subprocess.run(
        [*call, "--after", *after, *options, "--", "python", "-c", "", *words], capture_output=True, text=True
    )
    if done.returncode == 0:
        subprocess.run([*call, "--done"], check=True)
    return done


def test_how_a_step_works_is_no_part_of_it(step):
    assert step("--num-jobs", "8", "--threads=4", "x", "--device", "cuda") == 1
    assert step("--num-jobs", "2", "x") == 1
    assert step("x", "--num-processes", "3", "--device=cpu", "--threads", "1") == 1


def test_a_step_whose_words_changed_runs_without_its_own_force(tmp_path):
    show = (sys.executable, "-c", "import sys; print(sys.argv[1:])")
    run(tmp_path, *show, "a")
    assert run(tmp_path, *show, "b", "--force", options=("--force",)).stdout.strip() == "['b']"
    assert run(tmp_path, *show, "b", "--force", options=("--force",)).stdout.strip() == "['b', '--force']"


def test_an_input_that_changed_is_named(tmp_path):
    conf = tmp_path / "conf.yaml"
    conf.write_text("a: 1")
    command = [sys.executable, "-c", "", str(conf)]
    run(tmp_path, *command)
    conf.write_text("a: 2")
    assert f"step: changed: {conf}; making it again" in run(tmp_path, *command).stderr


def test_a_yaml_file_counts_by_its_values(step, tmp_path):
    conf = tmp_path / "conf.yaml"
    conf.write_text("a: 1\nb: [x, 2.0]\n")
    assert step(str(conf)) == 1
    conf.write_text("# why\nb:\n  - x   # a comment\n  - 2.0\na: 1\n")
    assert step(str(conf)) == 1
    conf.write_text("a: 1\nb: [x, 2.5]\n")
    assert step(str(conf)) == 2
    conf.write_text("a: [1")
    done = run(tmp_path, sys.executable, "-c", "", str(conf))
    assert done.returncode == 1 and "conf.yaml is not YAML" in done.stderr and "Traceback" not in done.stderr


def test_command_of_a_forced_run_counts_as_the_same(step):
    assert [step("--force", options=("--force",)), step()] == [1, 1]


def test_step_runs_again_when_a_file_named_in_its_command_changes(step, tmp_path):
    conf = tmp_path / "conf.yaml"
    conf.write_text("a: 1")
    assert [step(str(conf)), step(str(conf))] == [1, 1]
    conf.write_text("a: 2")
    assert [step(str(conf)), step(str(conf))] == [2, 2]


def test_step_runs_again_when_a_listed_input_changes(step, tmp_path):
    folder = tmp_path / "folder" / "inner"
    folder.mkdir(parents=True)
    options = ("--inputs", tmp_path / "folder")
    assert [step(options=options), step(options=options)] == [1, 1]
    (folder / "new").write_text("x")
    assert [step(options=options), step(options=options)] == [2, 2]
    (folder / "new").write_text("xy")
    assert step(options=options) == 3


def test_step_runs_again_when_its_output_is_gone(step, tmp_path):
    assert step() == 1
    (tmp_path / "log").unlink()
    assert [step(), step()] == [1, 1]


def test_later_step_runs_again_when_the_earlier_one_did(tmp_path):
    def again() -> bool:
        return "done already" not in finish(tmp_path, "later", after=["earlier"]).stderr

    finish(tmp_path, "earlier")
    assert [again(), again()] == [True, False]
    finish(tmp_path, "earlier")  # skipped
    assert not again()
    finish(tmp_path, "earlier", options=["--force"])
    assert [again(), again()] == [True, False]


def test_a_step_that_was_cut_off_after_its_command_runs_again(step, tmp_path):
    assert step() == 1
    command = [sys.executable, "-c", APPEND, str(tmp_path / "log")]
    forced = words(tmp_path, *command, options=("--outputs", tmp_path / "log", "--force"))
    subprocess.run(forced, check=True, capture_output=True)  # and no --done
    assert [step(), step()] == [3, 3]


@pytest.mark.parametrize("code", [1, 3, 75])
def test_failed_step_passes_its_exit_code_on_and_is_not_done(tmp_path, code):
    for _ in range(2):
        assert run(tmp_path, sys.executable, "-c", f"print('x'); raise SystemExit({code})").returncode == code
    assert not (tmp_path / "stamps" / "step").exists()


def test_failure_of_a_forced_run_takes_the_old_stamp_away(step, tmp_path):
    step()
    log = tmp_path / "log"
    log.unlink()
    log.mkdir()
    done = run(
        tmp_path, sys.executable, "-c", APPEND, str(log), options=("--outputs", log, "--force")
    )
    assert done.returncode == 1 and not (tmp_path / "stamps" / "step").exists()


def test_step_that_did_not_make_its_output_has_failed(tmp_path):
    done = run(tmp_path, sys.executable, "-c", "", options=("--outputs", tmp_path / "absent"))
    assert done.returncode == 1 and "did not make" in done.stderr and not (tmp_path / "stamps" / "step").exists()


def test_missing_earlier_step_is_one_sentence_that_names_it(tmp_path):
    done = finish(tmp_path, "fbank", after=["data"])
    assert done.returncode == 1
    assert done.stderr.startswith("error: step fbank needs step 'data', which is not done")
    assert done.stderr.count("\n") == 1


def test_unknown_command_is_named(tmp_path):
    done = run(tmp_path, "no-such-program")
    assert done.returncode == 1 and "no-such-program" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", ["", "--stamp x", "--stamp x --", "--stamp x --oops -- true", "-- true"])
def test_wrong_usage_exits_with_2(wrong):
    assert subprocess.run([sys.executable, str(PROGRAM), *wrong.split()], capture_output=True).returncode == 2


def test_words_reach_the_command_unchanged(tmp_path):
    awkward = ["a b", "$HOME", "*", "'", '"', "; exit 9", "", "--stamp", "--", "é\n"]
    done = run(tmp_path, sys.executable, "-c", "import sys; print(repr(sys.argv[1:]))", *awkward)
    assert done.stdout.strip() == repr(awkward)


def start(tmp_path: Path, code: str) -> subprocess.Popen:
    """Start a step and wait until its program has made the file `up`."""
    up = tmp_path / "up"
    process = subprocess.Popen(words(tmp_path, sys.executable, "-c", code, str(up)), start_new_session=True)
    deadline = time.monotonic() + 30
    while not up.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_step_that_still_runs_without_its_recipe_is_refused_and_runs_when_it_ended(tmp_path):
    process = start(tmp_path, "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)")
    done = run(tmp_path, sys.executable, "-c", "")
    assert done.returncode == 1 and f"still running (process {process.pid})" in done.stderr
    process.kill()
    process.wait()
    assert run(tmp_path, sys.executable, "-c", "").returncode == 0
    assert (tmp_path / "stamps" / "step").exists()


WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORD, max_size=4), st.lists(WORD, max_size=4))
def test_no_words_differ_only_for_equal_commands(first, second):
    assert (compare_words(["tool", *first], ["tool", *second]) == []) == (first == second)
    assert words_that_count(["tool", *first]) == ["tool", *first]  # they are too short for an option to be left out


def test_absent_path_cannot_be_described(tmp_path):
    with pytest.raises(StageError, match="absent"):
        describe_path(tmp_path / "absent")
