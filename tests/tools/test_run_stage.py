"""A step of a recipe runs once, runs again exactly when something it depends on changed, and never ends half-way."""

from __future__ import annotations

import json
import os
import shlex
import signal
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
    return subprocess.run(words(tmp_path, *command, options=options), capture_output=True, text=True, timeout=60)


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


def test_an_optional_input_may_be_missing_and_counts_where_it_is_there(step, tmp_path):
    file = tmp_path / "maybe"
    options = ("--optional", file)
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
        "give the options as before to keep it, or --force to run it again",
    ]
    assert count_runs(tmp_path) == 1 and (tmp_path / "stamps" / "step").read_bytes() == stamp
    assert step("--seed", "2", options=("--force",)) == 2
    assert step("--seed", "2") == 2


def test_later_steps_that_would_follow_are_named(tmp_path):
    def finish(name, *words, after=()):
        options = [word for other in after for word in ("--inputs", str(tmp_path / other))]
        command = [sys.executable, str(PROGRAM), "--stamp", str(tmp_path / name), *options]
        return subprocess.run([*command, "--", sys.executable, "-c", "", *words], capture_output=True, text=True)

    for name, *after in (("data",), ("fbank", "data"), ("tokens", "data"), ("teacher", "fbank", "tokens"), ("other",)):
        finish(name, after=after)
    assert "(fbank, tokens, teacher)" in finish("data", "x").stderr
    assert "(teacher)" in finish("fbank", "x", after=["data"]).stderr
    assert "follows" not in finish("other", "x").stderr


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


def test_a_stamp_of_an_earlier_version_is_done_unless_its_words_changed_or_its_inputs_are_newer(step, tmp_path):
    conf, log, stamp = tmp_path / "conf.yaml", tmp_path / "log", tmp_path / "stamps" / "step"
    conf.write_text("a: 1")
    assert step(str(conf)) == 1
    old = json.loads(stamp.read_text())
    words = ["python", "-c", APPEND, str(log), str(conf), "--num-jobs", "64", "--force"]
    old |= {"fingerprint": "0" * 64, "command": shlex.join(words)}
    del old["inputs"]
    stamp.write_text(json.dumps(old))
    assert step(str(conf)) == 1
    done = run(tmp_path, sys.executable, "-c", APPEND, str(log), str(conf), "x", options=("--outputs", log))
    assert done.returncode == 2 and "  + x\n" in done.stderr
    os.utime(conf, ns=(old["finished_ns"] + 1, old["finished_ns"] + 1))
    assert [step(str(conf)), step(str(conf))] == [2, 2]


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


def test_later_step_runs_again_when_the_earlier_one_did(step, tmp_path):
    earlier = ["--stamp", str(tmp_path / "earlier"), "--", sys.executable, "-c", ""]

    def run_earlier(*options: str) -> None:
        subprocess.run([sys.executable, str(PROGRAM), *options, *earlier], check=True, capture_output=True)

    run_earlier()
    options = ("--inputs", tmp_path / "earlier")
    assert [step(options=options), step(options=options)] == [1, 1]
    run_earlier()  # skipped
    assert step(options=options) == 1
    run_earlier("--force")
    assert step(options=options) == 2


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


def test_missing_input_is_one_sentence(tmp_path):
    done = run(tmp_path, sys.executable, "-c", "", options=("--inputs", tmp_path / "absent"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: input") and done.stderr.count("\n") == 1


def test_unknown_command_is_named(tmp_path):
    done = run(tmp_path, "no-such-program")
    assert done.returncode == 127 and "no-such-program" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", ["", "--stamp x", "--stamp x --", "--stamp x --oops -- true", "-- true"])
def test_wrong_usage_exits_with_2(wrong):
    assert subprocess.run([sys.executable, str(PROGRAM), *wrong.split()], capture_output=True).returncode == 2


def test_words_reach_the_command_unchanged(tmp_path):
    awkward = ["a b", "$HOME", "*", "'", '"', "; exit 9", "", "--stamp", "--", "é\n"]
    done = run(tmp_path, sys.executable, "-c", "import sys; print(repr(sys.argv[1:]))", *awkward)
    assert done.stdout.strip() == repr(awkward)


HANDLER = """
import signal, sys, time
count = 0
def handle(number, frame):
    global count
    count += 1
for name in ("SIGINT", "SIGTERM"):
    signal.signal(getattr(signal, name), handle)
open(sys.argv[1], "w").close()
while not count:
    time.sleep(0.02)
time.sleep(0.3)
print(count)
sys.exit(75)
"""


def start(tmp_path: Path, code: str, **keywords) -> subprocess.Popen:
    """Start a step and wait until its program has made the file `up`."""
    up = tmp_path / "up"
    up.unlink(missing_ok=True)
    process = subprocess.Popen(
        words(tmp_path, sys.executable, "-c", code, str(up)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **keywords,
    )
    deadline = time.monotonic() + 30
    while not up.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_reaches_the_command_once_although_terminal_and_shell_both_send_it(tmp_path, number):
    process = start(tmp_path, HANDLER)
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=30)
    assert (out.strip(), process.returncode) == ("1", 75)
    assert not (tmp_path / "stamps" / "step").exists()


def test_command_ended_by_a_signal_counts_as_interrupted(tmp_path):
    process = start(tmp_path, "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_come_to_the_very_end_do_not_change_the_exit_code(tmp_path, number):
    process = start(tmp_path, "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)")
    while process.poll() is None:
        process.send_signal(number)
    assert process.returncode == 75, process.communicate()


def test_ctrl_c_works_in_a_shell_background_job(tmp_path):
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    process = start(tmp_path, "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)", **ignored)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_step_whose_orphan_still_runs_is_refused_and_runs_when_it_ended(tmp_path):
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    process = start(tmp_path, code)
    process.kill()
    process.wait()
    done = run(tmp_path, sys.executable, "-c", "")
    orphan = int((tmp_path / "up").read_text())
    assert done.returncode == 1 and f"still running (process {orphan})" in done.stderr
    os.kill(orphan, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while run(tmp_path, sys.executable, "-c", "").returncode:
        assert time.monotonic() < deadline
    assert (tmp_path / "stamps" / "step").exists()


WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORD, max_size=4), st.lists(WORD, max_size=4))
def test_no_words_differ_only_for_equal_commands(first, second):
    assert (compare_words(["tool", *first], ["tool", *second]) == []) == (first == second)
    assert words_that_count(["tool", *first]) == ["tool", *first]  # they are too short for an option to be left out


def test_words_do_not_say_where_python_lies():
    assert words_that_count(["/a/bin/python", "x"]) == words_that_count(["/b/python3.12", "x"])
    assert words_that_count(["/a/bin/python", "x"]) != words_that_count(["/a/bin/sox", "x"])


def test_absent_path_cannot_be_described(tmp_path):
    with pytest.raises(StageError, match="absent"):
        describe_path(tmp_path / "absent")
