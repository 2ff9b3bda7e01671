"""Checkpoints: written atomically, read with `weights_only=True`, averaged, turned back into a model.

A model directory is self-contained: `config.yaml`, `tokens/`, `epoch-N.pt`, `averaged.pt` (the final model) and, while
training goes on, `checkpoint.pt` (everything needed to resume). A `decoding.yaml` beside them overrides the decoding
section that the checkpoints carry.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import pickle
import shutil
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.config.load import config_from_dict, config_to_dict, load_decoding, read_decoding, save_options
from cascade.config.options import Config, ConfigError
from cascade.files import replacing
from cascade.models.build import build_model
from cascade.models.transducer import CascadedTransducer
from cascade.text.tokens import Tokenizer

FORMAT = 2


def save_file(values: dict[str, Any], path: str | Path) -> None:
    """Write next to `path`, then rename: a reader never sees half a file."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    os.replace(_write_partial(values, path), path)


def _write_partial(values: dict[str, Any], path: Path) -> Path:
    """Write to a file beside `path` and return it; what stands in `path` stays.

    Raises:
      OSError: the disk is full, the folder cannot be written: named with the path, and half a file removed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer hides the system's error in a RuntimeError
        partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
        raise OSError(f"{path} cannot be written ({reason}): free some space or choose another folder, then run the "
                      "same command again; earlier checkpoints are untouched") from error
    return partial


CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


def save_resumable(values: dict[str, Any], model_dir: Path, keep: bool = True) -> None:
    """Write checkpoint.pt; at any moment of it a whole one is there.

    keep: the one that was there becomes checkpoint-previous.pt, otherwise it goes.
    """
    path = model_dir / CHECKPOINT
    partial = _write_partial(values, path)
    if keep and path.is_file():
        link = model_dir / f"{PREVIOUS}.partial"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # no hard links on this file system
            shutil.copyfile(path, link)
        os.replace(link, model_dir / PREVIOUS)
    os.replace(partial, path)
    folder = os.open(model_dir, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new names, too, outlive a loss of power
    finally:
        os.close(folder)


def load_resumable(
    model_dir: Path, repair: bool = False, wanted: Callable[[dict[str, Any]], bool] = lambda values: True
) -> dict[str, Any] | None:
    """The newest checkpoint that can be read and is wanted; None when there is none.

    repair: rename a damaged one, so that it never takes the place of a good one.
    Raises:
      ValueError: all that are there are damaged.
      OSError: one cannot be read now.
    """
    paths = [path for path in (model_dir / CHECKPOINT, model_dir / PREVIOUS) if path.is_file()]
    good, problem = 0, None
    for path in paths:
        try:
            values = load_file(path)
        except ValueError as error:
            problem = error
            logging.warning("%s: %s", error, "trying the one before" if path != paths[-1] else "there is no other")
            if repair and path != paths[-1]:
                path.replace(path.with_name("checkpoint-damaged.pt"))
            continue
        good += 1
        if wanted(values):
            return values
    if problem is not None and not good:
        raise ValueError(f"{problem}; no checkpoint in {model_dir} can be read: start over with --force")
    return None


def num_non_finite(weights: dict[str, Tensor]) -> int:
    """Number of the weights that are not finite."""
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in weights.values() if tensor.is_floating_point())


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of tensors and builtin types onto the CPU.

    Raises:
      FileNotFoundError, ValueError: missing, damaged, or holding anything that is not plain data.
      OSError: it cannot be read now, which says nothing of the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch reads its archives without looking at their sums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} has another sum")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError,
        TypeError, OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place that no file has
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({type(error).__name__})") from error
    if isinstance(values, dict) and values.get("format") == 1:
        values = _from_format_1(values)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project (format {FORMAT} expected)")
    return values


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """Format 1 had training.blank_penalty, and averaging took it off the blank's bias: give the weights theirs back.

    An average is told by its content, whatever its name: its weights are a dict, those of a model an OrderedDict.
    What holds no model is returned as it is.
    """
    model, config, name = values.get("model"), values.get("config"), "joiner.output.bias"
    if not isinstance(model, dict) or not isinstance(config, dict) or name not in model or "training" not in config:
        return values
    training = dict(config["training"])
    penalty = training.pop("blank_penalty", 0.0)
    if penalty and not isinstance(model, OrderedDict):
        bias = model[name].clone()
        bias[0] += penalty
        model = model | {name: bias}
    config = config | {"training": training, "decoding": {"blank_penalty": penalty}}
    return values | {"format": FORMAT, "config": config, "model": model}


def model_values(model: CascadedTransducer, config: Config, epoch: int) -> dict[str, Any]:
    """The content of an epoch's checkpoint."""
    return {
        "format": FORMAT, "config": config_to_dict(config), "vocab_size": model.vocab_size, "epoch": epoch,
        "model": model.state_dict(),
    }


def average_values(paths: list[Path], config: Config | None = None) -> dict[str, Any]:
    """The mean, in float64, of the weights of several epochs of one run; tied matrices are stored once and stay tied.

    Args:
      config: of the run that they belong to, which the average carries; None = the first one's.
    Raises:
      ValueError: the files come from models of different shape, or hold weights that are not finite.
    """
    first = load_file(paths[0])
    sums = {name: tensor.double() for name, tensor in first["model"].items()}
    for path in paths[1:]:
        weights = load_file(path)["model"]
        if {name: tensor.shape for name, tensor in weights.items()} != {n: t.shape for n, t in sums.items()}:
            raise ValueError(f"{path} and {paths[0]} hold models of different shape")
        for name, tensor in weights.items():
            sums[name] += tensor
    if num_non_finite(sums):
        raise ValueError(f"{', '.join(path.name for path in paths)} in {paths[0].parent}: weights are not finite "
                         "numbers, their training diverged; there is nothing to average")
    model: dict[str, Tensor] = {
        name: (total / len(paths)).to(first["model"][name].dtype) for name, total in sums.items()
    }
    options = first["config"] if config is None else config_to_dict(config)
    return first | {"config": options, "model": model, "epoch": load_file(paths[-1])["epoch"]}


def with_decoding_in_force(config: Config, model_dir: Path) -> Config:
    """A checkpoint's config with the decoding section in force: decoding.yaml beside the model overrides its own.

    The section's paths, which count from the model's folder, count from the current one then.

    Raises:
      ConfigError: decoding.yaml is damaged, or has options or values that are none.
    """
    path = model_dir / "decoding.yaml"
    decoding = load_decoding(path, config.decoding) if path.is_file() else config.decoding
    return dataclasses.replace(config, decoding=decoding.beside(model_dir))


def update_decoding(model_dir: Path, **values: Any) -> Path:
    """Set options in the decoding.yaml beside a model, and keep the others that it has; returns its path."""
    path = model_dir / "decoding.yaml"
    with replacing(path) as temporary:
        save_options({**(read_decoding(path) if path.is_file() else {}), **values}, temporary)
    return path


def epoch_path(model_dir: str | Path, epoch: int) -> Path:
    return Path(model_dir) / f"epoch-{epoch}.pt"


def last_epochs(model_dir: str | Path, epoch: int, count: int) -> list[Path]:
    """The checkpoints of the `count` epochs that end with `epoch`.

    Raises:
      ConfigError: fewer epochs than one, or than `count`.
      FileNotFoundError: one of them is missing; the message lists what is there.
    """
    if count < 1 or epoch < count:
        raise ConfigError(f"--avg must lie between 1 and --epoch ({epoch}), got {count}")
    paths = [epoch_path(model_dir, number) for number in range(epoch - count + 1, epoch + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        numbers = (path.stem.removeprefix("epoch-") for path in Path(model_dir).glob("epoch-*.pt"))
        there = sorted(int(number) for number in numbers if number.isdecimal())
        raise FileNotFoundError(f"{model_dir} lacks {', '.join(missing)}; epochs there: {there or 'none'}")
    return paths


def restore_model(values: dict[str, Any]) -> tuple[CascadedTransducer, Config]:
    """A model in eval mode out of a checkpoint's values.

    Raises:
      ValueError: no model, or weights of another version of the code.
    """
    if missing := {"config", "vocab_size", "model"} - values.keys():
        raise ValueError(f"it holds no model (no {min(missing)})")
    config = config_from_dict(values["config"])
    model = build_model(config, values["vocab_size"])
    try:
        model.load_state_dict(values["model"])
    except RuntimeError as error:
        raise ValueError("the checkpoint's weights do not fit this version of the model: train again") from error
    if num_non_finite(values["model"]):
        raise ValueError("the model's weights are not finite numbers: its training diverged, train again")
    return model.eval(), config


def load_model(
    model_dir: str | Path, epoch: int | None = None, average: int = 1
) -> tuple[CascadedTransducer, Config, Tokenizer]:
    """A trained model in eval mode with its config, whose decoding section is the one in force, and its tokenizer.

    Args:
      model_dir: what training called --exp-dir.
      epoch: average the `average` epochs that end with this one; None = the final model, `averaged.pt`.
    Raises:
      FileNotFoundError, ValueError: the directory, a checkpoint or decoding.yaml is missing or damaged.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise FileNotFoundError(f"no such model directory: {model_dir}")
    if epoch is None:
        path = model_dir / "averaged.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found: training has not finished there; name an epoch with --epoch N")
        values = load_file(path)
    else:
        values = average_values(last_epochs(model_dir, epoch, average))
    model, config = restore_model(values)
    tokenizer = Tokenizer.load(model_dir / "tokens")
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"{model_dir}: the model has {model.vocab_size} tokens, tokens/ has {tokenizer.vocab_size}; "
            "they belong to different runs"
        )
    return model, with_decoding_in_force(config, model_dir), tokenizer
