#!/usr/bin/env python
"""Train and measure the arms of an experiment: models that differ in a few options, with one or several seeds.

The arms stand in a YAML file; options are those of `train`:

    base:       {config: [data.yaml, teacher.yaml], note: as it is}   # files beside this one
    adamw:      {like: base, options: [training.optimizer=adamw]}
    student:    {config: [data.yaml, student.yaml], teacher: base}
    tuned:      {like: base, init_from: base, epoch: 7, options: [training.num_epochs=5]}
    recombined: {like: base, alignment: base, options: [augment.recombine_share=0.5]}
    letters:    {like: base, options: [tokens.kind=char]}         # has tokens of its own

A teacher, a model to start from (its final one, or that of an epoch) and a model that aligns the training utterances is
the arm of that name with the same seed. Every training is resumable: after a stop start the same command again. A row
of --out, once written, is not made again; of arms that run side by side each has an --only of its own.

dev_loss is the mean of both passes' pruned losses after the last epoch, whatever else an arm minimises; dev_cer counts
the characters of the three modes of greedy search together; the WER columns are of --manifest. The hypotheses (of beam
search with --beam) go to hyps/ beside the table. --compare A:B writes the difference of two arms, all modes and seeds
pooled, to comparisons.json. The report shows a runs.csv and a comparisons.json that lie beside RESULTS.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fcntl
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.checkpoint import load_file  # noqa: E402
from cascade.config.load import changed_numbers, changed_options, config_from_dict, load_config  # noqa: E402
from cascade.config.options import MODES, Config, ConfigError  # noqa: E402
from cascade.processes.exits import EXIT_INTERRUPTED, Interrupted  # noqa: E402

OTHER_ARMS = ("teacher", "init_from", "alignment")
KEYS = {"config", "like", "options", "epoch", "model", "note", *OTHER_ARMS}
LISTS = ("config", "options")
COUNT_TOO = ("training.num_epochs", "training.average_last", "training.precision", "decoding.")
"""Options of which `train` makes another model without starting over."""
KEPT = ("id", "ref", "hyp", "speaker")
METHODS = {"greedy": "greedy_search", "beam": "modified_beam_search"}
COLUMNS = [
    "arm", "note", "model", "seed", "steps", "minutes", "cpu_minutes", "num_params", "dev_loss", "dev_cer",
    *(f"wer_{mode}_{method}" for mode in MODES for method in METHODS), "test_set", "commit", "options",
]


def read_arms(path: Path) -> dict[str, dict[str, Any]]:
    """Read the arms of the file, each with what it takes from the arm it is like.

    Raises:
      ConfigError: no YAML, an unknown key or arm, or arms that need each other.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"--arms {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path} must map names to arms")
    raw = {str(name): arm for name, arm in raw.items()}

    def resolve(name: str, above: tuple[str, ...]) -> dict[str, Any]:
        if name in above:
            raise ConfigError(f"{path}: arm {name} needs itself: {' -> '.join((*above, name))}")
        arm, place = raw.get(name), f"{path}: {' -> '.join((*above, name))}"
        if not isinstance(arm, dict) or set(arm) - KEYS or not ("config" in arm or "like" in arm):
            raise ConfigError(
                f"{place} must be an arm with config or like, and no other keys than {', '.join(sorted(KEYS))}"
            )
        for key in set(arm) - {"epoch"}:
            values = arm[key] if key in LISTS else [arm[key]]
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise ConfigError(f"{place}: {key} must be {'a list of texts' if key in LISTS else 'a text'}")
        base = resolve(arm["like"], (*above, name)) if "like" in arm else {}
        for key in OTHER_ARMS:
            if key in arm:
                resolve(arm[key], (*above, name))
        return {**base, **arm, "options": [*base.get("options", []), *arm.get("options", [])]}

    return {name: resolve(name, ()) for name in raw}


def call(program: str, *words: object) -> None:
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
    """The arms of a file and the folders of their models, EXP/NAME-seedN."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.arms = arguments, read_arms(arguments.arms)

    def words(self, name: str, seed: int) -> list[str]:
        """--config and overrides of an arm."""
        arm = self.arms[name]
        files = [str(self.arguments.arms.parent / file) for file in arm["config"]]
        alone = [] if "teacher" in arm else ["distillation=null"]
        return ["--config", *files, *alone, *arm["options"], f"seed={seed}"]

    def config(self, name: str, seed: int) -> Config:
        words = self.words(name, seed)[1:]
        return load_config([word for word in words if "=" not in word], [word for word in words if "=" in word])

    def has_own_tokens(self, name: str) -> bool:
        return any(option.startswith("tokens.") for option in self.arms[name]["options"])

    def check(self, name: str) -> None:
        """
        Raises:
          ConfigError: options that are none, or no text for an arm's tokens.
        """
        self.config(name, 1)
        if self.has_own_tokens(name) and self.arguments.text is None:
            raise ConfigError(f"arm {name} has tokens of its own: name the folder of stage 0's data with --text")

    def tokens(self, name: str) -> Path:
        """--tokens, or the arm's own tokens where its options ask for others."""
        if not self.has_own_tokens(name):
            return self.arguments.tokens
        folder = self.arguments.exp_dir / f"{name}-tokens"
        if not (folder / "tokenizer.json").is_file():
            call("train_tokens", "--data", self.arguments.text, "--out", folder, *self.words(name, 1))
        return folder

    def alignment(self, name: str, seed: int) -> Path:
        """The training utterances aligned by an arm's model."""
        model = self.train(name, seed)
        if not (model / "align" / "alignment.json").is_file():
            call("align", "--exp-dir", model, "--manifest", self.arguments.data / "train_cuts.jsonl.gz", "--mode",
                 "streaming", "--threads", 1, "--device", self.arguments.device, "--out", model / "align")
        return model / "align" / "alignment.ctm"

    def train(self, name: str, seed: int) -> Path:
        """The folder of an arm's trained model; the arms that it needs are trained first."""
        arm, folder, arguments = self.arms[name], self.arguments.exp_dir / f"{name}-seed{seed}", self.arguments
        if (folder / "averaged.pt").is_file():
            self.check_trained(name, seed, folder)
            return folder
        words: list[object] = []
        if "teacher" in arm:
            words += ["--teacher", self.train(arm["teacher"], seed)]
        if "init_from" in arm:
            start = self.train(arm["init_from"], seed)
            words += ["--init-from", start / f"epoch-{arm['epoch']}.pt" if "epoch" in arm else start]
        if "alignment" in arm:
            words += ["--alignment", self.alignment(arm["alignment"], seed)]
        call("train", "--data", arguments.data, "--tokens", self.tokens(name), "--exp-dir", folder, "--device",
             arguments.device, "--num-processes", arguments.num_processes, "--threads", 1, *words,
             *self.words(name, seed))
        return folder

    def check_trained(self, name: str, seed: int, folder: Path) -> None:
        """
        Raises:
          ConfigError: the finished model in the arm's folder has other options or tokens than the arm.
        """
        old, new = config_from_dict(load_file(folder / "averaged.pt")["config"]), self.config(name, seed)
        old = dataclasses.replace(old, seed=seed)  # the folder's name says it; a recipe's model, put here, has its own
        own = (*COUNT_TOO, "tokens.") if self.has_own_tokens(name) else COUNT_TOO
        changed = {key: values for key, values in changed_options(old, new).items() if key.startswith(own)}
        lines = [f"{key}: {before}, now {now}" for key, (before, now) in (changed_numbers(old, new) | changed).items()]
        if (folder / "tokens" / "tokens.txt").read_bytes() != (self.tokens(name) / "tokens.txt").read_bytes():
            lines.append("other tokens")
        if lines:
            raise ConfigError(f"{folder} holds a finished model that is not arm {name} ({'; '.join(lines)}): move the "
                              "folder away to train the arm, or name another --exp-dir")

    def decode(self, folder: Path, split: str, manifest: Path) -> dict[tuple[str, str], dict[str, Any]]:
        """{(mode, method): result} of all modes."""
        out, method = folder / "decode" / split, "all" if self.arguments.beam else METHODS["greedy"]
        call("decode", "--exp-dir", folder, "--manifest", manifest, "--mode", "all", "--method", method, "--out", out,
             "--device", self.arguments.device, "--threads", 1)
        pairs = [(mode, each) for mode in MODES for each in METHODS.values() if method in ("all", each)]
        return {pair: json.loads((out / "-".join(pair) / "result.json").read_text(encoding="utf-8")) for pair in pairs}

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """One row of --out."""
        folder, arm = self.train(name, seed), self.arms[name]
        dev = self.decode(folder, "dev", self.arguments.data / "dev_cuts.jsonl.gz")
        test = self.decode(folder, "test", self.arguments.manifest)
        for mode in MODES:
            self.keep_hypotheses(folder / "decode" / "test", name, seed, mode)
        greedy = [row for (_, method), row in dev.items() if method == METHODS["greedy"]]
        characters = sum(row["num_characters"] for row in greedy)
        losses = map(json.loads, (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines())
        last = [line for line in losses if line["split"] == "dev"][-1]
        summary = json.loads((folder / "train_summary.json").read_text(encoding="utf-8"))
        return {
            "arm": name, "note": arm.get("note", ""), "seed": seed,
            "model": arm.get("model", "student" if "teacher" in arm else "teacher"),
            "steps": summary["steps"], "minutes": summary["train_minutes"], "cpu_minutes": summary["cpu_minutes"],
            "num_params": summary["num_params"], "commit": summary["commit"],
            "dev_loss": round((last["causal_pruned"] + last["noncausal_pruned"]) / 2, 4),
            "dev_cer": round(sum(row["cer"] * row["num_characters"] for row in greedy) / characters, 3),
            **{f"wer_{mode}_{short}": test.get((mode, method), {}).get("wer")
               for mode in MODES for short, method in METHODS.items()},
            "test_set": next(iter(test.values()))["test_set"], "options": " ".join(arm["options"]),
        }


    @property
    def best_method(self) -> str:
        return METHODS["beam" if self.arguments.beam else "greedy"]

    def hypotheses(self, name: str, seed: int, mode: str) -> Path:
        return self.arguments.out.parent / "hyps" / f"{name}-seed{seed}-{mode}-{self.best_method}.jsonl"

    def keep_hypotheses(self, decoded: Path, name: str, seed: int, mode: str) -> None:
        """Copy what `compare` needs to hyps/."""
        lines = (decoded / f"{mode}-{self.best_method}" / "hyps.jsonl").read_text(encoding="utf-8").split("\n")
        utterances = [{key: each[key] for key in KEPT if key in each} for each in map(json.loads, filter(None, lines))]
        path = self.hypotheses(name, seed, mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in utterances), encoding="utf-8")

    def compare(self, pair: str) -> dict[str, Any]:
        """Difference of arm B from arm A, modes and seeds pooled; pair: A:B."""
        a, b = pair.split(":")
        seeds = self.arguments.seeds
        files = [self.hypotheses(name, seed, mode) for seed in seeds for mode in MODES for name in (a, b)]
        out = self.arguments.exp_dir / f"compare-{a}-{b}.json"
        call("compare", *files, "--json", out)
        result = json.loads(out.read_text(encoding="utf-8"))
        del result["command"]  # the files say it all
        return {"a": a, "b": b, "seeds": seeds, **result}


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append to the table; several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.seek(0, 2) == 0:
            writer.writeheader()
        writer.writerow(row)


def rows_of(path: Path) -> set[tuple[str, int]]:
    """(arm, seed) of the rows that are there."""
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != COLUMNS:
            raise ConfigError(f"--out {path} is another kind of table: name a new file")
        return {(row["arm"], int(row["seed"])) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, required=True, metavar="YAML", help="what to train, see above")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms (default: all of the file)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], metavar="N", help="(default 1 2)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="features, with dev_cuts.jsonl.gz")
    parser.add_argument("--text", type=Path, metavar="DIR", help="stage 0's data, for arms with tokens of their own")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR")
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="what the WER columns are of")
    parser.add_argument("--compare", nargs="+", default=[], metavar="A:B", help="pairs of arms of --only and --seeds")
    parser.add_argument("--beam", action="store_true", help="decode with beam search too")
    parser.add_argument("--exp-dir", type=Path, required=True, metavar="DIR", help="where the models go")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV", help="the table, appended to")
    parser.add_argument("--num-processes", type=int, default=1, metavar="N", help="of every training (default 1)")
    parser.add_argument("--device", default="cpu", help="auto | cpu | cuda (default cpu)")
    arguments = parser.parse_args()
    experiment = Experiment(arguments)
    names = arguments.only or list(experiment.arms)
    if unknown := set(names) - set(experiment.arms):
        raise ConfigError(f"--only: {arguments.arms} has no arm {', '.join(sorted(unknown))}")
    for pair in arguments.compare:
        if len(pair.split(":")) != 2 or set(pair.split(":")) - set(names):
            raise ConfigError(f"--compare takes two arms of this run as A:B, got {pair}")
    for name in experiment.arms:
        experiment.check(name)  # a wrong option is said before hours are spent
    for seed in arguments.seeds:
        for name in names:
            if (name, seed) not in rows_of(arguments.out):
                add_row(arguments.out, experiment.measure(name, seed))
    if arguments.compare:
        rows = [experiment.compare(pair) for pair in arguments.compare]
        path = arguments.out.with_name("comparisons.json")
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
