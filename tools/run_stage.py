"""Run one step of a recipe, unless it is done already.

    python tools/run_stage.py --stamp FILE [--after NAME...] [--inputs PATH...] [--outputs PATH...] [--force] -- COMMAND
    python tools/run_stage.py --stamp FILE --done

The first becomes the COMMAND, if there is something to do; when that has ended with 0, the second makes the stamp. The
stamp holds the command's words, every input (the files that the command names, --inputs where they exist, the stamps of
the earlier steps --after) and its own time: a step runs again whenever an earlier one really ran again. With the same
words and inputs and all outputs in place the step is skipped; with other inputs it runs again and names them. Other
words often mean a forgotten option, and later steps would follow: it says what differs and ends with 2. --force runs
it, but without --force among its own words: the program knows what of its earlier work still holds. A YAML file counts
by its values, another file by its content, a directory by name, size and time of change of every file in it; --force
and the options that say how a command works and not on what (HOW) do not count. A file that the command makes and names
must stand in --outputs. The programs' own code does not count: after editing that, use --force.

Exit codes: the command's own; 1 when the step cannot be run; 2 for wrong usage or other words than before.
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
import sys
import time
from pathlib import Path

import yaml

HOW = ("--num-jobs", "--num-processes", "--threads", "--device")


class StageError(Exception):
    """The step cannot be run; the message is one sentence."""


def describe_path(path: Path) -> str:
    """A text that changes when this input does.

    Raises:
      StageError: it does not exist or cannot be read.
    """
    try:
        if path.is_dir():
            files = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
            states = [(file, file.lstat()) for file in files]
            content = "\0".join(f"{file.relative_to(path)} {s.st_size} {s.st_mtime_ns}" for file, s in states)
        elif path.suffix == ".yaml":
            content = json.dumps(yaml.safe_load(path.read_bytes()), sort_keys=True, default=str)
        else:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StageError(f"input {path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise StageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return hashlib.sha256(os.fsencode(content)).hexdigest()


def words_that_count(command: list[str]) -> list[str]:
    """The command line without what does not change what it makes."""
    pairs = zip(["", *command], command, strict=False)
    return [word for before, word in pairs if word != "--force" and not {before, word.partition("=")[0]} & {*HOW}]


def compare_words(old: list[str], new: list[str]) -> list[str]:
    """One line per option that is gone (-) or new (+), with its values; none for equal commands."""
    commands = []
    for words in (old, new):
        options: list[list[str]] = [[]]
        for word in words:
            options += [[]] if word.startswith("--") else []
            options[-1].append(word)
        commands.append([shlex.join(option) for option in options])
    return [f"  {line}" for line in difflib.ndiff(*commands) if line[0] in "+-"]


def lock_step(stamp: Path) -> None:
    """Take this step's lock for this process and the command that it becomes, an orphaned one included.

    Raises:
      StageError: another process has it.
    """
    handle = os.open(stamp.with_name(f".{stamp.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 32).decode()
        raise StageError(f"step {stamp.name} is still running ({holder}): wait for it or end it") from error
    os.set_inheritable(handle, True)
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()}".encode())


def missing_outputs(outputs: list[str]) -> list[str]:
    return [path for path in outputs if not os.path.exists(path)]


def begin_step(stamp: Path, begun: Path, arguments: argparse.Namespace) -> int:
    """Skip or refuse the step and return the exit code, or become its command.

    Raises:
      StageError: an earlier step is not done, an input or the command cannot be used, or the step is running already.
    """
    stamp.parent.mkdir(parents=True, exist_ok=True)
    lock_step(stamp)
    command, outputs = arguments.command, arguments.outputs
    for name in arguments.after:
        if not stamp.with_name(name).exists():
            raise StageError(f"step {stamp.name} needs step '{name}', which is not done: begin with an earlier --stage")
    made = {os.path.abspath(path) for path in outputs}
    paths = [str(stamp.with_name(name)) for name in arguments.after]
    paths += [path for path in arguments.inputs if os.path.exists(path)]
    paths += [word for word in command[1:] if os.path.isfile(word) and os.path.abspath(word) not in made]
    words, inputs = words_that_count(command), {path: describe_path(Path(path)) for path in paths}
    try:
        before = json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        before = None
    differences = compare_words(before["command"], words) if before else []
    if differences and not arguments.force:
        print(f"error: step {stamp.name} is done, with other words than now (- then, + now):", *differences,
              "give the options as before to keep it, or --force to run it again and then what follows from it",
              sep="\n", file=sys.stderr)
        return 2
    if differences:
        command = [word for word in command if word != "--force"]
    elif before and not arguments.force:
        old, gone = before["inputs"], missing_outputs(outputs)
        changed = sorted(name for name in old.keys() | inputs.keys() if old.get(name) != inputs.get(name))
        if not gone and not changed:
            print(f"{stamp.name}: done already", file=sys.stderr)
            return 0
        reason = f"{gone[0]} is gone" if gone else f"changed: {', '.join(changed)}"
        print(f"{stamp.name}: {reason}; making it again", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    begun.write_text(json.dumps({"command": words, "inputs": inputs, "outputs": outputs}))
    print(f"{stamp.name}: {shlex.join(command)}", file=sys.stderr, flush=True)
    program = sys.executable if command[0] == "python" else command[0]
    try:
        os.execvp(program, [program, *command[1:]])
    except OSError as error:
        raise StageError(f"{program} cannot be run: {error.strerror}") from error


def finish_step(stamp: Path, begun: Path) -> int:
    """Make the stamp of the step that has just run; a skipped one keeps its own.

    Raises:
      StageError: an output is missing.
    """
    if begun.exists():
        values = json.loads(begun.read_text(encoding="utf-8"))
        for path in missing_outputs(values.pop("outputs")):
            raise StageError(f"{stamp.name} ended without error but did not make {path}")
        begun.write_text(json.dumps(values | {"finished_ns": time.time_ns()}, indent=1), encoding="utf-8")
        begun.replace(stamp)
    return 0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; the command sets its own
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stamp", type=Path, required=True, help="file that says the step is done")
    parser.add_argument("--after", nargs="*", default=[], help="earlier steps whose results the command reads")
    parser.add_argument("--inputs", nargs="*", default=[], help="more files and directories that it reads")
    parser.add_argument("--outputs", nargs="*", default=[], help="what it makes; must exist for a skip")
    parser.add_argument("--force", action="store_true", help="run even if nothing changed, or the words did")
    parser.add_argument("--done", action="store_true", help="the command has ended with 0")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:split])
    arguments.command = words[split + 1:]
    if not arguments.done and not arguments.command:
        parser.error("a command is wanted after --")
    stamp, begun = arguments.stamp, arguments.stamp.with_name(f".{arguments.stamp.name}.begun")
    try:
        sys.exit(finish_step(stamp, begun) if arguments.done else begin_step(stamp, begun, arguments))
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
