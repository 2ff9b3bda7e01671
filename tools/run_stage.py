"""Run one step of a recipe, unless it is done already.

    python tools/run_stage.py --stamp FILE [--inputs PATH...] [--optional PATH...] [--outputs PATH...] [--force] \\
        -- COMMAND...

The stamp is written when COMMAND exits with 0. It holds the command's words, every input (the files that the command
names, --inputs, --optional where it exists), and its own time; so a step that takes an earlier step's stamp as its
input runs again whenever the earlier one really ran again. With the same words and inputs and all outputs in place,
the step is skipped; with other inputs it runs again and names them. Other words often mean a forgotten option, and
later steps would follow: it says what differs and ends with 2. --force runs it, but without --force among its own
words, because the program knows what of its earlier work still holds. What counts:
  - a file: its content up to 16 MB; above that, size and time of change
  - a directory: name, size and time of change of every file in it
  - the command: every word but --force, where its Python lies, and the options that say how it works and not on what
    (--num-jobs, --num-processes, --threads, --device)
It does not see the programs' own code: after editing that, use --force. A file that the command makes and names must
stand in --outputs, or it would count as an input that changed.

A step that was stopped or failed runs again; whether what it left behind is of use is the command's own business.

A signal is passed on to the command once. Exit codes: the command's own; 75 when a signal stopped it; 1 when an input
or another step's stamp is missing or the step is running already; 2 for wrong usage or other words than before.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_NOT_FOUND = 1, 2, 75, 127
WHOLE_CONTENT_BYTES = 16 * 2**20
HOW = ("--num-jobs", "--num-processes", "--threads", "--device")
"""Options that do not change what a command makes."""
SIGNAL_PAUSE_S = 1.0
"""A terminal's Ctrl-C reaches this program and its shell, which passes it on: within this time it is the same one."""


class StageError(Exception):
    """The step cannot be run; the message is one sentence."""


def describe_path(path: Path) -> str:
    """What a change of this input is told from.

    Raises:
      StageError: it does not exist or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if path.is_dir():
            files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
            for file in sorted(files):
                state = file.lstat()
                digest.update(os.fsencode(f"{file.relative_to(path)} {state.st_size} {state.st_mtime_ns}\0"))
        elif path.stat().st_size > WHOLE_CONTENT_BYTES:
            return f"{path.stat().st_size} {path.stat().st_mtime_ns}"
        else:
            digest.update(path.read_bytes())
    except OSError as error:
        raise StageError(f"input {path} cannot be read ({error.strerror}): run the earlier stages first") from error
    return digest.hexdigest()


def plain_words(command: list[str]) -> list[str]:
    """The command line without where its Python lies."""
    return ["python" if Path(command[0]).name.startswith("python") else command[0], *command[1:]]


def words_that_count(command: list[str]) -> list[str]:
    """The command line without what does not change what it makes."""
    words, before = [], ""
    for word in plain_words(command):
        if word != "--force" and before not in HOW and word.partition("=")[0] not in HOW:
            words.append(word)
        before = word
    return words


def describe_inputs(command: list[str], inputs: list[Path], outputs: list[Path]) -> dict[str, str]:
    """{name: description} of the inputs that are listed and of the files that the command names."""
    made = {path.absolute() for path in outputs}
    named = [Path(word) for word in command[1:] if os.path.isfile(word) and Path(word).absolute() not in made]
    return {str(path): describe_path(path) for path in [*inputs, *named]}


def read_stamp(path: Path) -> dict | None:
    """What a stamp holds; None where there is none to rely on."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stamp["command"], str):  # of an earlier version, which did not list its inputs
            stamp = {**stamp, "command": shlex.split(stamp["command"]), "inputs": None}
        return {key: stamp[key] for key in ("command", "inputs", "finished_ns")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compare_words(old: list[str], new: list[str]) -> list[str]:
    """The words that are gone and those that are new, each with the option before it."""
    lines = []
    for kind, *ends in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for sign, words, begin, end in (("-", old, *ends[:2]), ("+", new, *ends[2:])):
            if kind != "equal" and begin < end:
                is_value = not words[begin].startswith("--") and begin > 0 and words[begin - 1].startswith("--")
                lines.append(f"  {sign} {shlex.join(words[begin - is_value:end])}")
    return lines


def changed_inputs(stamp: dict, inputs: dict[str, str]) -> list[str]:
    """The names of the inputs that differ from the stamp's; where it lists none, of those that are newer than it."""
    if stamp["inputs"] is None:
        return [name for name in inputs if newest_ns(Path(name)) > stamp["finished_ns"]]
    names = stamp["inputs"].keys() | inputs.keys()
    return sorted(name for name in names if stamp["inputs"].get(name) != inputs.get(name))


def newest_ns(path: Path) -> int:
    files = [path, *(path.rglob("*") if path.is_dir() else ())]
    return max(file.lstat().st_mtime_ns for file in files)


def later_steps(stamp: Path) -> list[str]:
    """The finished steps that read this one's results, directly or not."""
    reads = {path: (read_stamp(path) or {}).get("inputs") or {} for path in sorted(stamp.parent.glob("[!.]*"))}
    found = [str(stamp)]
    for name in found:
        found += [str(path) for path, inputs in reads.items() if name in inputs and str(path) not in found]
    return [Path(name).name for name in found[1:]]


def short_list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def write_stamp(path: Path, values: dict) -> None:
    """Write a stamp so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def lock_step(stamp: Path) -> int:
    """Take this step's lock; the command inherits it, so it also holds while an orphaned command still runs."""
    stamp.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(stamp.with_name(f".{stamp.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 32).decode().strip() or "another process"
        os.close(handle)
        raise StageError(f"step {stamp.name} is still running ({holder}): wait for it or end it") from error
    return handle


def run_command(command: list[str], lock: int) -> int:
    """Run the command in its own process group, pass signals on to it, and return the exit code to end with."""
    child: subprocess.Popen | None = None
    passed_on: dict[int, float] = {}

    def pass_on(number: int, _frame: object) -> None:
        # A closed terminal asks for the same as a polite kill: save and stop.
        wanted = signal.SIGTERM if number == signal.SIGHUP else number
        now = time.monotonic()
        repeated = now - passed_on.get(wanted, -SIGNAL_PAUSE_S) < SIGNAL_PAUSE_S
        passed_on[wanted] = now
        if child is not None and not repeated:
            child.send_signal(wanted)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
            signal.signal(number, pass_on)
    try:
        child = subprocess.Popen(command, pass_fds=(lock,), process_group=0, stdin=subprocess.DEVNULL)
        os.pwrite(lock, f"process {child.pid}".encode(), 0)
    except OSError as error:
        print(f"error: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_FOUND
    for number in passed_on:  # what came before there was a child
        child.send_signal(number)
    code = child.wait()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Terminal and shell both send it: a late one would kill Python while it ends, where it has no handlers.
        signal.signal(number, signal.SIG_IGN)
    os.ftruncate(lock, 0)
    for number in passed_on:
        print(f"passed {signal.Signals(number).name} on to the step, which ended with {code}", file=sys.stderr)
    if code and passed_on and (code < 0 or code == 128 + max(passed_on)):
        return EXIT_INTERRUPTED
    return 128 - code if code < 0 else code


def run_step(arguments: argparse.Namespace) -> int:
    """Skip, run or refuse the step; return the exit code.

    Raises:
      StageError: an input is missing or the step is running already.
    """
    stamp, outputs = arguments.stamp, arguments.outputs
    lock = lock_step(stamp)
    command, before = arguments.command, read_stamp(stamp)
    listed = arguments.inputs + [path for path in arguments.optional if path.exists()]
    words, inputs = words_that_count(command), describe_inputs(command, listed, outputs)
    differences = compare_words(words_that_count(before["command"]), words) if before else []
    if differences and not arguments.force:
        later = later_steps(stamp)
        print(
            f"error: step {stamp.name} is done, with other words than now (- then, + now):", *differences,
            "give the options as before to keep it, or --force to run it again"
            + (f" and then what follows from it ({short_list(later)})" if later else ""), sep="\n", file=sys.stderr,
        )
        return EXIT_USAGE
    if differences:
        command = [word for word in command if word != "--force"]
    elif before and not arguments.force:
        missing, changed = [path for path in outputs if not path.exists()], changed_inputs(before, inputs)
        if not missing and not changed:
            print(f"{stamp.name}: done already", file=sys.stderr)
            return 0
        reason = f"{missing[0]} is gone" if missing else f"changed: {short_list(changed)}"
        print(f"{stamp.name}: {reason}; making it again", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    print(f"{stamp.name}: {shlex.join(plain_words(command))}", file=sys.stderr, flush=True)
    begin = time.monotonic()
    code = run_command(command, lock)
    if code:
        return code
    missing = [path for path in outputs if not path.exists()]
    if missing:
        raise StageError(f"{stamp.name} ended without error but did not make {missing[0]}")
    write_stamp(stamp, {
        "command": words, "inputs": inputs, "seconds": round(time.monotonic() - begin, 1),
        "finished_ns": time.time_ns(),
    })
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="run_stage.py --stamp FILE [--inputs PATH...] [--optional PATH...] [--outputs PATH...] [--force] "
              "-- COMMAND...",
    )
    parser.add_argument("--stamp", type=Path, required=True, help="file that says the step is done")
    paths = {"type": Path, "nargs": "*", "default": [], "action": "extend"}
    parser.add_argument("--inputs", **paths, help="files, directories, stamps of earlier steps")
    parser.add_argument("--optional", **paths, help="inputs that may be missing")
    parser.add_argument("--outputs", **paths, help="what the command makes; must exist for a skip")
    parser.add_argument("--force", action="store_true", help="run even if nothing changed, or the words did")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:split])
    arguments.command = words[split + 1:]
    if not arguments.command:
        parser.error("a command is wanted after --")
    # A shell's background command starts with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(run_step(arguments))
    except KeyboardInterrupt:
        print("stopped before the step began", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
