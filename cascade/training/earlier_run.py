"""Plan for the run that --exp-dir holds already: go on, average its epochs anew, or start over beside it.

It starts over where other numbers would come out: with another input file, or another value of an option whose field is
not marked as `goes_on`. The checkpoint carries its config and the hashes of its files by name; what it does
not carry (an option or a kind of file that is newer than it) counts as the default, or as unchanged. No run is ever
removed.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cascade.checkpoint import (
    CHECKPOINT,
    average_values,
    epoch_path,
    last_epochs,
    load_file,
    load_resumable,
    save_file,
)
from cascade.config.load import changed_numbers, config_from_dict, config_to_dict
from cascade.config.options import Config, ConfigError
from cascade.training.run_inputs import Inputs


class Plan(NamedTuple):
    """Action and config of a training."""

    action: Literal["begin", "start over", "go on", "average", "nothing"]
    config: Config
    """The one asked for; training.num_epochs is not less than the epochs that are done."""
    summary: str
    """The action in one line."""
    lines: tuple[str, ...] = ()
    """Differences from the earlier run that matter, one line for each."""
    values: dict[str, Any] | None = None
    """The checkpoint to go on with, with this config; None = it needs no change."""
    new_decoding: bool = False
    """The models that are there carry another decoding section than this config."""


def plan_run(config: Config, exp_dir: Path, inputs: Inputs, force: bool) -> Plan:
    """Compare what is asked for with what is there. Writes nothing.

    Raises:
      ConfigError: the final average needs epochs that were not kept.
      ValueError: all checkpoints are damaged.
    """
    if not any(any(exp_dir.glob(pattern)) for pattern in ("checkpoint*.pt", "averaged.pt", "epoch-*.pt")):
        return Plan("begin", config, "no run is there: it begins with epoch 1")
    if force:
        return _start_over(config, exp_dir, [])
    values = load_resumable(exp_dir)
    if values is None:
        return _start_over(config, exp_dir, [f"{CHECKPOINT}: gone, so that nothing can go on"])
    try:
        old = config_from_dict(values["config"])
    except ConfigError as error:
        return _start_over(config, exp_dir, [str(error)])
    lines = [f"{name}: {before}, now {now}" for name, (before, now) in changed_numbers(old, config).items()]
    lines += _changed_inputs(values.get("inputs", {}), inputs)
    if lines:
        return _start_over(config, exp_dir, lines)
    return _continue(config, old, exp_dir, values | {"inputs": inputs})


def _start_over(config: Config, exp_dir: Path, lines: list[str]) -> Plan:
    name = previous_dir(exp_dir).name
    earlier = "another run" if lines else "a run"
    return Plan("start over", config, f"{earlier} is there: starting over, it is kept as {name}", tuple(lines))


def _changed_inputs(old: Inputs, new: Inputs) -> list[str]:
    """One line for each input that both know and that is not the same."""
    lines = []
    for name, now in new.items():
        before = old.get(name, now)
        if before != now:
            what = f"{before}, now {now}" if name.startswith("tokenizer ") else "another one than before"
            lines.append(f"{name}: {'none before' if before is None else 'none now' if now is None else what}")
    return lines


def _continue(config: Config, old: Config, exp_dir: Path, values: dict[str, Any]) -> Plan:
    done, asked = values["state"]["epoch"] - 1, config.training.num_epochs
    last = max(asked, done)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, num_epochs=last))
    before = old.training.num_epochs
    lines = []
    if asked < done:
        lines.append(f"training.num_epochs: {asked}, but {done} epochs are done and stay; cascade.bin.average makes a "
                     "model of earlier ones, another --exp-dir a run of its own")
    elif asked != before and last == done:
        lines.append(f"training.num_epochs: {before}, now {asked}: it ends with the epochs that are done, after a "
                     f"learning rate planned for {before}")
    elif asked != before:
        lines.append(f"training.num_epochs: {before}, now {asked}: from here on the learning rate follows the schedule "
                     f"of a run of {asked} epochs")
    averages = [min(options.average_last, last) for options in (old.training, config.training)]
    if done < last or before > done or not (exp_dir / "averaged.pt").is_file():
        action, summary = "go on", f"this very run is there: it goes on (epoch {min(done + 1, last)} of {last})"
    elif averages[0] == averages[1]:
        action, summary = "nothing", "this very run is there, and finished"
    else:
        action, summary = "average", "this very run is there, and finished: its last epochs are averaged anew"
        lines.append(f"training.average_last: {old.training.average_last}, now {config.training.average_last}")
    new_decoding = old.decoding != config.decoding
    if action == "nothing" and not new_decoding:
        return Plan(action, config, summary, tuple(lines))
    if action != "nothing":
        _check_epochs(config, exp_dir, done)
    current = values | {"config": config_to_dict(config)}
    changed = current if current["config"] != values["config"] else None
    return Plan(action, config, summary, tuple(lines), changed, new_decoding)


def _check_epochs(config: Config, exp_dir: Path, done: int) -> None:
    """The epochs that are done and that the final average needs must be there."""
    last, count = config.training.num_epochs, min(config.training.average_last, config.training.num_epochs)
    needed = range(last - count + 1, min(last, done) + 1)
    missing = [number for number in needed if not epoch_path(exp_dir, number).is_file()]
    if missing:
        possible = last - missing[-1]
        raise ConfigError(
            f"training.average_last={count} needs {', '.join(f'epoch-{number}.pt' for number in missing)}, which "
            f"{exp_dir} has not kept (training.keep_epochs): "
            + (f"at most training.average_last={possible} is possible" if possible else "it cannot be averaged")
        )


def previous_dir(exp_dir: Path) -> Path:
    """DIR.previous-1, or the first number that is free."""
    number = 1
    while (path := exp_dir.with_name(f"{exp_dir.name}.previous-{number}")).exists() or path.is_symlink():
        number += 1
    return path


def make_room(plan: Plan, exp_dir: Path) -> None:
    """Move a run that this one does not go on with; it is for the first process."""
    if plan.action == "start over":
        exp_dir.rename(previous_dir(exp_dir))


def carry_on(plan: Plan, exp_dir: Path) -> None:
    """Bring what stays up to date, before training goes on; it is for the first process."""
    if plan.action in ("begin", "start over"):
        return
    if plan.new_decoding:
        carry_decoding(exp_dir, plan.config)
    if plan.values is None:
        return
    final, training = exp_dir / "averaged.pt", plan.config.training
    if plan.action == "average":
        count = min(training.average_last, training.num_epochs)
        save_file(average_values(last_epochs(exp_dir, training.num_epochs, count), plan.config), final)
        logging.info("%s: the mean of the last %d of %d epochs", final, count, training.num_epochs)
    elif final.is_file():
        values = load_file(final)
        if values["config"]["training"]["num_epochs"] != training.num_epochs:  # this run's is not there yet
            kept = exp_dir / f"averaged-{values['epoch']}-epochs.pt"
            final.replace(kept)
            logging.info("the final model with fewer or more epochs is kept as %s", kept)
    save_file(plan.values, exp_dir / CHECKPOINT)


def carry_decoding(exp_dir: Path, config: Config) -> None:
    """Let all models of a run carry this decoding section; their weights do not depend on it."""
    section = config_to_dict(config)["decoding"]
    for path in sorted([*exp_dir.glob("epoch-*.pt"), *exp_dir.glob("averaged*.pt")]):
        try:
            values = load_file(path)
        except ValueError as error:
            logging.warning("%s: it keeps its decoding section", error)
            continue
        if values["config"].get("decoding") != section:
            save_file(values | {"config": values["config"] | {"decoding": section}}, path)
            logging.info("%s: decoding is now %s", path, section)
