"""Train and measure the arms of an experiment: models that differ in a few options, with one or several seeds.

The arms stand in a YAML file, options are those of the programs:

    base:     {config: [data.yaml, teacher.yaml]}               # files beside this one
    adamw:    {like: base, options: [training.optimizer=adamw]}
    longer:   {like: base, options: [training.num_epochs=40], model: teacher}
    student:  {config: [data.yaml, student.yaml], teacher: longer}
    tuned:    {like: base, init_from: base, options: [training.num_epochs=5]}
    letters:  {like: base, options: [tokens.kind=char]}         # has its own tokens

A teacher or a model to start from is the arm of that name with the same seed. Every training is resumable: start the
same command again after a stop. A row of --out, once written, is not made again. dev_loss is that of the last epoch,
dev_cer that of three modes together, both of the greedy search; WER columns are of --manifest.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import EXIT_INTERRUPTED, Interrupted, run_program  # noqa: E402
from cascade.config.load import load_config  # noqa: E402
from cascade.config.options import ConfigError  # noqa: E402
from cascade.models.transducer import MODES  # noqa: E402

KEYS = {"config", "like", "options", "teacher", "init_from", "model"}
METHODS = {"greedy": "greedy_search", "beam": "modified_beam_search"}
WER = [f"wer_{mode}_{method}" for mode in MODES for method in METHODS]
COLUMNS = [
    "arm", "model", "seed", "steps", "minutes", "cpu_minutes", "num_params", "dev_loss", "dev_cer", *WER, "test_set",
    "commit", "options",
]  # fmt: skip


def read_arms(path: Path) -> dict[str, dict[str, Any]]:
    """Every arm of the file with what it takes from the arm it is like.

    Raises:
      ConfigError: an unknown key or arm, or a circle of arms.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must map names to arms")
    arms: dict[str, dict[str, Any]] = {}

    def resolve(name: str, above: tuple[str, ...]) -> dict[str, Any]:
        if name not in raw:
            raise ConfigError(f"{path}: there is no arm {name!r}")
        if name in above:
            raise ConfigError(f"{path}: arm {name} is like itself")
        arm = raw[name]
        if not isinstance(arm, dict) or set(arm) - KEYS or not ("config" in arm or "like" in arm):
            raise ConfigError(f"{path}: arm {name} needs `config` or `like`, and may have {', '.join(sorted(KEYS))}")
        base = resolve(arm["like"], (*above, name)) if "like" in arm else {"options": []}
        options = [*base["options"], *arm.get("options", [])]
        return {**base, **arm, "options": options}

    for name in raw:
        arms[name] = resolve(name, ())
    for name, arm in arms.items():
        for key in ("teacher", "init_from"):
            if arm.get(key) is not None and arm[key] not in arms:
                raise ConfigError(f"{path}: {key} of arm {name} must be an arm, got {arm[key]!r}")
    return arms


def call(program: str, *words: str | Path) -> None:
    """Run one program of the package.

    Raises:
      Interrupted: a signal ended it after saving.
      OSError: it failed; it has said why.
    """
    command = [sys.executable, "-m", f"cascade.bin.{program}", *map(str, words)]
    logging.info("%s", " ".join(command[2:]))
    code = subprocess.run(command).returncode
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"{program} has saved; run the same command again to go on")
    if code:
        raise OSError(f"{program} ended with {code}, see above")


class Experiment:
    """The arms, and where they lie."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.arms = arguments, read_arms(arguments.arms)

    def folder(self, name: str, seed: int) -> Path:
        return self.arguments.exp_dir / f"{name}-seed{seed}"

    def words(self, name: str, seed: int) -> list[str]:
        """--config and overrides of an arm."""
        arm = self.arms[name]
        files = [str(self.arguments.arms.parent / file) for file in arm["config"]]
        without_teacher = [] if arm.get("teacher") else ["distillation=null"]
        return ["--config", *files, *without_teacher, *arm["options"], f"seed={seed}"]

    def tokens(self, name: str, seed: int) -> Path:
        """The tokens of an arm: --tokens, or its own where its options ask for others."""
        if not any(option.startswith("tokens.") for option in self.arms[name]["options"]):
            return self.arguments.tokens
        folder = self.arguments.exp_dir / f"{name}-tokens"
        if not (folder / "tokens.txt").is_file():
            call("train_tokens", "--data", self.arguments.text, "--out", folder, *self.words(name, seed))
        return folder

    def train(self, name: str, seed: int) -> Path:
        """The trained model of an arm, those that it needs first."""
        arm, folder = self.arms[name], self.folder(name, seed)
        others: list[str | Path] = []
        for key, flag in (("teacher", "--teacher"), ("init_from", "--init-from")):
            if arm.get(key) is not None:
                others += [flag, self.train(arm[key], seed)]
        if not (folder / "averaged.pt").is_file():
            call(
                "train", "--data", self.arguments.data, "--tokens", self.tokens(name, seed), "--exp-dir", folder,
                "--device", self.arguments.device, "--num-processes", str(self.arguments.num_processes), *others,
                *self.words(name, seed),
            )  # fmt: skip
        return folder

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """One row of --out."""
        folder, arguments = self.train(name, seed), self.arguments
        methods = "all" if arguments.beam else METHODS["greedy"]
        sets = {"dev": arguments.data / "dev_cuts.jsonl.gz", "test": arguments.manifest}
        rows: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        for split, manifest in sets.items():
            out = folder / "decode" / split
            call(
                "decode", "--exp-dir", folder, "--manifest", manifest, "--mode", "all", "--method", methods,
                "--out", out, "--device", arguments.device, "--threads", "1",
            )  # fmt: skip
            rows[split] = {}
            for path in out.glob("*/result.json"):
                row = json.loads(path.read_text(encoding="utf-8"))
                rows[split][row["mode"], row["method"]] = row
        dev = [row for (_, method), row in rows["dev"].items() if method == METHODS["greedy"]]
        characters = sum(row["num_characters"] for row in dev)
        losses = map(json.loads, (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines())
        summary = json.loads((folder / "train_summary.json").read_text(encoding="utf-8"))
        arm = self.arms[name]
        return {
            "arm": name, "model": arm.get("model") or ("student" if arm.get("teacher") else "teacher"), "seed": seed,
            "steps": summary["steps"], "minutes": summary["train_minutes"], "cpu_minutes": summary["cpu_minutes"],
            "num_params": summary["num_params"], "commit": summary["commit"],
            "dev_loss": [line["loss"] for line in losses if line["split"] == "dev"][-1],
            "dev_cer": round(sum(row["cer"] * row["num_characters"] for row in dev) / characters, 3),
            **{
                f"wer_{mode}_{short}": rows["test"].get((mode, method), {}).get("wer")
                for mode in MODES for short, method in METHODS.items()
            },
            "test_set": next(iter(rows["test"].values()))["test_set"], "options": " ".join(arm["options"]),
        }  # fmt: skip


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append to the table; several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def rows_of(path: Path) -> set[tuple[str, int]]:
    """(arm, seed) of the rows that are there."""
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8", newline="") as file:
        return {(row["arm"], int(row["seed"])) for row in csv.DictReader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, required=True, metavar="YAML", help="what to train, see above")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms (default: all of the file)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="features, with dev_cuts.jsonl.gz")
    parser.add_argument("--text", type=Path, metavar="DIR", help="stage 0's data, for arms with tokens of their own")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR")
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="what the WER columns are of")
    parser.add_argument("--beam", action="store_true", help="decode with beam search too")
    parser.add_argument("--exp-dir", type=Path, required=True, metavar="DIR", help="where the models go")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV", help="the table, appended to")
    parser.add_argument("--num-processes", type=int, default=1, metavar="N", help="of every training")
    parser.add_argument("--device", default="cpu", help="auto | cpu | cuda (default cpu)")
    arguments = parser.parse_args()
    experiment = Experiment(arguments)
    names = arguments.only or list(experiment.arms)
    for name in names:
        if name not in experiment.arms:
            raise ConfigError(f"--only: {arguments.arms} has no arm {name!r}")
        words = experiment.words(name, 1)[1:]  # a wrong option is said before hours are spent
        load_config([word for word in words if "=" not in word], [word for word in words if "=" in word])
    for seed in arguments.seeds:
        for name in names:
            if (name, seed) not in rows_of(arguments.out):
                add_row(arguments.out, experiment.measure(name, seed))


if __name__ == "__main__":
    run_program(main)
