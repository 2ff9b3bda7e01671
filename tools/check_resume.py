"""Kill a training again and again, at random moments, and compare its weights with those of a run left alone.

    python tools/check_resume.py --data EXP/fbank --tokens EXP/tokens --out DIR [--kills 20] [--seed 0] \\
        [--config YAML...] [section.key=value...]

Every kill is SIGKILL to the training and all its processes, at a random moment after it has begun or gone on to train,
so that steps, checkpoints, validation and averaging are all hit. Prints what was reached; exit code 0: the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.checkpoint import load_file, load_resumable  # noqa: E402


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one)["model"], load_file(other)["model"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def step_of(folder: Path) -> int:
    """Steps in the newest checkpoint that can be read."""
    values = load_resumable(folder) if folder.is_dir() else None
    return 0 if values is None else values["state"]["step"]


def failure(code: int, log: str) -> ValueError:
    """The last line of a training's log says why."""
    last = (log.splitlines() or ["it said nothing"])[-1]
    return ValueError(f"train ended with {code}: {last.removeprefix('error: ')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="what compute_features wrote")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="what train_tokens wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for both runs")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--config", nargs="+", default=[], metavar="YAML", help="as train's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as train's")
    arguments = parser.parse_intermixed_args()
    if arguments.out.exists():
        raise ValueError(f"--out {arguments.out} exists already: name a new folder")
    rng = random.Random(arguments.seed)
    command = [
        sys.executable, "-m", "cascade.bin.train", "--data", str(arguments.data), "--tokens", str(arguments.tokens),
        "--threads", "1", *(["--config", *arguments.config] if arguments.config else []), *arguments.overrides,
        "training.save_every_minutes=0.02", "--exp-dir",
    ]
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    done = subprocess.run([*command, str(whole)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise failure(done.returncode, done.stderr)
    seconds = 60 * json.loads((whole / "train_summary.json").read_text())["train_minutes"]
    kills = 0
    while True:
        log = arguments.out / "log"
        with open(log, "w") as file:
            process = subprocess.Popen([*command, str(killed)], stderr=file, start_new_session=True)
        while process.poll() is None and "parameters: total" not in log.read_text():
            time.sleep(0.01)
        try:
            process.wait(timeout=rng.uniform(0, 2 * seconds / arguments.kills) if kills < arguments.kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            left = sorted(path.name for path in killed.glob("*.partial")) if killed.is_dir() else []
            print(f"kill {kills}: step {step_of(killed)}{', in the middle of ' + ', '.join(left) if left else ''}")
            continue
        if process.returncode:
            raise failure(process.returncode, log.read_text())
        if not same_weights(whole / "averaged.pt", killed / "averaged.pt"):
            raise ValueError(f"{killed} came to other weights than {whole}")
        print(f"finished after {kills} kills: the same weights, bit for bit")
        if kills >= arguments.kills:
            return
        killed.rename(arguments.out / f"finished-{kills}")


if __name__ == "__main__":
    run_program(main)
