"""tools/recipe.sh: options, messages and exit codes of every run.sh, with steps that only write what they were told."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = f"""#!/usr/bin/env bash
voice_dir=  # DIR a folder of voices
table=      # FILE a table
mini=       # a small part
num_parts=  # N parts
word=       # TEXT any text
pace=7      # N how fast
device=cpu  # NAME a device
hidden=8
. "{ROOT}/tools/recipe.sh"
log="$exp/log"
if stage 0 "data"; then
    step data --outputs "$log" -- python "$recipe/note.py" "$log" "data ${{corpus[*]}} quick=$quick"
fi
if stage 3 "train"; then
    step teacher --after data --outputs "$log" -- python "$recipe/note.py" "$log" "teacher $results" ${{force:+--force}}
fi
if stage 9 "report"; then
    step report --after data teacher --outputs "$log" -- python "$recipe/note.py" "$log" \\
        "report $voice_dir|$table|${{mini:+small}}|$num_parts|$word|$pace"
fi
recipe_end
"""
NOTE = """import os, signal, sys, time
with open(sys.argv[1], "a") as file:
    file.write(sys.argv[2] + "\\n")
name = sys.argv[2].split()[0]
if os.environ.get("SLEEP_IN") == name:
    time.sleep(60)
if os.environ.get("COUNT_IN") == name:
    heard = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: heard.append(print("heard", file=sys.stderr, flush=True)))
    print("ready", file=sys.stderr, flush=True)
    while not heard:  # not signal.pause(): the signal may come before it
        time.sleep(0.02)
    time.sleep(1)
    sys.exit(75)
sys.exit(int(os.environ.get("CODE", 5)) if os.environ.get("FAIL_IN") == name else 0)
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe in a folder whose name has a space."""
    folder = tmp_path / "my recipe"
    (folder / "conf").mkdir(parents=True)
    (folder / "note.py").write_text(NOTE)
    (folder / "run.sh").write_text(RUN)
    (folder / "run.sh").chmod(0o755)
    return folder


def run(recipe: Path, *options: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(recipe / "run.sh"), *options], cwd=cwd or recipe.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )


def log(recipe: Path, exp: str = "exp") -> list[str]:
    return [line.split()[0] for line in (recipe / exp / "log").read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--speed 3", "--speed"), ("3", "'3'"), ("--stage", "--stage"), ("--stage x", "'x'"), ("--stage=", "--stage"),
        ("--stage -1", "'-1'"), ("--stage 1.5", "'1.5'"), ("--stage 10", "10"), ("--stop-stage three", "'three'"),
        ("--stage 3 --stop-stage 2", "--stop-stage 2"), ("--corpus-dir", "--corpus-dir"), ("--exp-dir=", "--exp-dir"),
        ("--corpus-dir no/such/folder", "'no/such/folder'"), ("--exp-dir my\0recipe/note.py", "note.py"),
        ("--stage 99999999999999999999", "--stage"), ("--hidden 9", "'--hidden'"),
        ("--quick=1", "--quick takes no value"), ("--stag 1", "'--stag'"),
        ("--voice-dir", "--voice-dir"), ("--voice-dir no/folder", "'no/folder'"), ("--voice-dir=", "--voice-dir"),
        ("--table my\0recipe", "'my recipe'"), ("--table=no.tsv", "'no.tsv'"), ("--mini=yes", "--mini takes no value"),
        ("--num-parts 00", "at least 1"),
        ("--num-parts 1.5", "'1.5'"), ("--device gpu", "'gpu'"), ("--device", "--device"), ("--word=", "--word"),
    ],
)
def test_wrong_option_is_one_sentence_that_names_it_and_exits_with_2(recipe, options, named):
    done = run(recipe, *[word.replace("\0", " ") for word in options.split(" ")])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and named in done.stderr
    assert not (recipe / "exp").exists()


def test_help_lists_every_option_and_stage_and_runs_nothing(recipe):
    done = run(recipe, "--help")
    assert done.returncode == 0 and done.stderr == ""
    options = ("--stage N", "--stop-stage N", "--corpus-dir DIR", "--exp-dir DIR", "--quick", "--force", "--help")
    own = ("--voice-dir DIR    a folder of voices\n", "--mini             a small part\n",
           "--pace N           how fast (otherwise: 7)\n")
    for text in (*options, *own, "  0  data\n", "  3  train\n", "  9  report\n"):
        assert text in done.stdout
    assert done.stdout.index("--help ") < done.stdout.index("--voice-dir DIR  ") < done.stdout.index("  0  data")
    assert not (recipe / "exp").exists()


def test_stages_run_in_order_and_a_second_run_skips_them(recipe):
    assert run(recipe).returncode == 0
    assert log(recipe) == ["data", "teacher", "report"]
    again = run(recipe)
    assert again.returncode == 0 and again.stderr.count("done already") == 3
    assert log(recipe) == ["data", "teacher", "report"]


def test_force_runs_the_chosen_stages_again_and_what_depends_on_them_follows(recipe):
    run(recipe)
    run(recipe, "--stage", "3", "--stop-stage", "3", "--force")
    run(recipe)
    assert log(recipe) == ["data", "teacher", "report", "teacher", "report"]


def test_a_forgotten_option_redoes_nothing_until_forced(recipe):
    (recipe.parent / "voices").mkdir()
    assert run(recipe, "--voice-dir", "voices").returncode == 0
    done = run(recipe)
    assert done.returncode == 2 and "step report is done, with other words" in done.stderr
    assert "voices" in done.stderr and "--force" in done.stderr and "Traceback" not in done.stderr
    assert log(recipe) == ["data", "teacher", "report"]
    assert run(recipe, "--voice-dir", "voices").stderr.count("done already") == 3
    assert run(recipe, "--stage", "9", "--force").returncode == 0
    assert run(recipe).stderr.count("done already") == 3
    assert log(recipe) == ["data", "teacher", "report", "report"]


def test_only_the_chosen_stages_run(recipe):
    assert run(recipe, "--stage=0", "--stop-stage=03").returncode == 0
    assert log(recipe) == ["data", "teacher"]


def test_a_stage_whose_earlier_step_is_missing_says_so(recipe):
    done = run(recipe, "--stage", "3")
    assert done.returncode == 1 and "needs step 'data'" in done.stderr


def test_folders_are_relative_to_where_the_user_stands(recipe):
    (recipe.parent / "the corpus").mkdir()
    done = run(recipe, "--corpus-dir", "the corpus", "--exp-dir", "an exp", "--quick")
    assert done.returncode == 0, done.stderr
    lines = (recipe.parent / "an exp" / "log").read_text().splitlines()
    assert lines[0] == f"data --corpus-dir {recipe.parent / 'the corpus'} quick=1"
    assert lines[1] == f"teacher {recipe.parent / 'an exp'}"


@pytest.mark.parametrize("form", ["--{}\0{}", "--{}={}"])
def test_own_options_become_variables_and_paths_absolute(recipe, form):
    (recipe.parent / "the noises").mkdir()
    (recipe.parent / "a table.tsv").write_text("")
    values = {"voice-dir": "the noises", "table": "a table.tsv", "num-parts": "3", "word": "--a b=c", "pace": "09"}
    options = [word for item in values.items() for word in form.format(*item).split("\0")]
    done = run(recipe, *options, "--mini")
    assert done.returncode == 0, done.stderr
    last = (recipe / "exp" / "log").read_text().splitlines()[-1]
    assert last == f"report {recipe.parent}/the noises|{recipe.parent}/a table.tsv|small|3|--a b=c|9"


def test_own_options_not_given_are_empty_whatever_the_environment_says(recipe):
    assert run(recipe, mini="1", voice_dir="/", pace="1").returncode == 0
    assert (recipe / "exp" / "log").read_text().splitlines()[-1] == "report |||||7"


def test_quick_run_stays_away_from_the_results_of_the_real_one(recipe):
    run(recipe, "--quick")
    lines = (recipe / "exp" / "quick" / "log").read_text().splitlines()
    assert lines[0] == f"data --download-dir {recipe}/download quick=1"
    assert lines[1] == f"teacher {recipe}/exp/quick"


@pytest.mark.parametrize("code", ["1", "75"])
def test_failing_step_stops_the_recipe_with_its_exit_code_and_runs_again(recipe, code):
    done = run(recipe, FAIL_IN="teacher", CODE=code)
    assert done.returncode == int(code) and "stage 3" in done.stderr
    assert run(recipe).returncode == 0
    assert log(recipe) == ["data", "teacher", "teacher", "report"]


LOSING_WAIT = """lost=""
wait() {
    local status=0
    builtin wait "$@" || status=$?
    if [ -n "$lost" ]; then status=255; fi
    lost="$signalled"
    return "$status"
}
"""


def begin(recipe: Path, *options: str) -> subprocess.Popen:
    """Start the recipe in a session of its own and wait until it is in the middle of stage 3."""
    process = subprocess.Popen(
        [str(recipe / "run.sh"), *options], env={**os.environ, "SLEEP_IN": "teacher"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (recipe / "exp" / "log").exists() or log(recipe)[-1:] != ["teacher"]:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("whole_group", [False, True])
def test_signal_stops_the_recipe_with_75_and_the_same_command_goes_on(recipe, number, whole_group):
    process = begin(recipe)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "run the same command again" in said
    assert run(recipe).returncode == 0
    assert log(recipe) == ["data", "teacher", "teacher", "report"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_step_hears_a_signal_once_although_terminal_and_shell_both_send_it(recipe, number):
    process = subprocess.Popen(
        [str(recipe / "run.sh")], env={**os.environ, "COUNT_IN": "teacher"}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )
    for line in process.stderr:
        if line == "ready\n":
            break
    for send in (os.killpg, os.kill):
        send(process.pid, number)
        time.sleep(0.1)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and said.count("heard") == 1, said


def test_an_exit_code_that_bash_loses_while_a_signal_comes_is_that_of_an_interruption(recipe):
    source = f'. "{ROOT}/tools/recipe.sh"\n'
    assert source in RUN
    (recipe / "run.sh").write_text(RUN.replace(source, source + LOSING_WAIT))
    process = begin(recipe)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and "run the same command again" in said, said
