"""The options of programs that run a trained model: which one, with which context, by which search."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.bin.device_arguments import add_device_argument, open_device
from cascade.bin.score_arguments import score_options
from cascade.config.options import Config, ConfigError
from cascade.recognizer import EXPORTED, Recognizer
from cascade.search.methods import (
    DEFAULT_CHUNK_MS,
    DEFAULT_LOOK_AHEAD_MS,
    DecodingOptions,
    default_left_context_ms,
)
from cascade.stream.endpoint import EndpointOptions
from cascade.text.tokens import Tokenizer

if TYPE_CHECKING:  # programs that run exported files do without torch
    from cascade.models.transducer import CascadedTransducer


def add_model_arguments(parser: argparse.ArgumentParser, or_onnx: bool = False, cpu_only: bool = False) -> None:
    """Add --exp-dir (or_onnx: or --onnx-dir), --epoch, --avg, the contexts, --blank-penalty and --device
    (`add_device_argument`)."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--exp-dir", type=Path, metavar="DIR", help="model directory, of one training")
    if or_onnx:
        source.add_argument("--onnx-dir", type=Path, metavar="DIR", help="what export_onnx wrote: no PyTorch model")
        parser.add_argument("--int8", action="store_true", help="run --onnx-dir's files in 8 bits (export_onnx --int8)")
    parser.add_argument("--epoch", type=int, metavar="N", help="use this epoch (default: the averaged final model)")
    parser.add_argument("--avg", type=int, default=1, metavar="K", help="average K epochs up to --epoch (default 1)")
    parser.add_argument("--chunk-ms", type=int, default=DEFAULT_CHUNK_MS, metavar="MS", help="causal chunk (320)")
    parser.add_argument(
        "--look-ahead-ms", type=int, default=DEFAULT_LOOK_AHEAD_MS, metavar="MS", help="look-ahead block (640)"
    )
    parser.add_argument(
        "--left-context-ms", type=int, metavar="MS", help="left context (default: the longest finite one in training)"
    )
    add_blank_penalty(parser)
    add_device_argument(parser, cpu_only)


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --beam."""
    parser.add_argument("--beam", type=int, default=4, metavar="B", help="of modified_beam_search (default 4)")


def add_blank_penalty(parser: argparse.ArgumentParser) -> None:
    """Add --blank-penalty, which replaces the model's own."""
    parser.add_argument(
        "--blank-penalty", type=float, metavar="P",
        help="off the blank's logit (default: the model's decoding.blank_penalty)",
    )


def check_values(arguments: argparse.Namespace, **minimum: int) -> None:
    """Check what programs have in common: minimal values, --avg with --epoch only, --int8 with --onnx-dir only,
    --max-seconds, files to read.

    Raises:
      ConfigError, FileNotFoundError: the option, its value, and what it must be.
    """
    for name, least in minimum.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if "avg" in arguments and arguments.epoch is None and arguments.avg != 1:
        raise ConfigError(f"--avg {arguments.avg} needs --epoch N")
    if "onnx_dir" in arguments and arguments.onnx_dir is None and getattr(arguments, "int8", False):
        raise ConfigError("--int8 needs --onnx-dir DIR, which export_onnx --int8 wrote")
    if "max_seconds" in arguments and not arguments.max_seconds > 0:
        raise ConfigError(f"--max-seconds must be positive, got {arguments.max_seconds}")
    for name in ("manifest", "alignment"):
        path = getattr(arguments, name, None)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{name} {path} not found")


def open_recognizer(arguments: argparse.Namespace, mode: str, endpoint: EndpointOptions) -> Recognizer:
    """The model or the exported files that the options name, with `--method`, `--beam` and scores.

    Raises:
      As `Recognizer`.
    """
    folder = arguments.onnx_dir or arguments.exp_dir
    if arguments.onnx_dir is not None and not (folder / EXPORTED).is_file():
        raise FileNotFoundError(f"{folder / EXPORTED} not found: --onnx-dir is a folder that export_onnx wrote")
    as_built = {"chunk_ms": DEFAULT_CHUNK_MS, "look_ahead_ms": DEFAULT_LOOK_AHEAD_MS, "left_context_ms": None}
    options = {name: getattr(arguments, name) for name in as_built if getattr(arguments, name) != as_built[name]}
    if arguments.blank_penalty is not None:
        options["blank_penalty"] = arguments.blank_penalty  # 0 replaces the model's own
    return Recognizer(
        folder, endpoint=endpoint, device=arguments.device, threads=arguments.threads, epoch=arguments.epoch,
        average=arguments.avg, int8=arguments.int8, mode=mode, method=arguments.method, beam=arguments.beam, **options,
        **score_options(arguments),
    )


def load_for_decoding(
    arguments: argparse.Namespace, mode: str, *, why_cpu: str | None = None, **search: object
) -> tuple[CascadedTransducer, Config, Tokenizer, DecodingOptions]:
    """The model that the options name, on its device, and how to decode with it.

    Args:
      mode: the pass.
      why_cpu: see `open_device`.
      search: other options of DecodingOptions, where they matter; None: as the model has it.
    Raises:
      ConfigError: options that do not fit together, found before the model is read.
      FileNotFoundError, ValueError: as `load_model` and `choose_device`.
    """
    names = ("chunk_ms", "look_ahead_ms", "left_context_ms", "blank_penalty")
    given = {"mode": mode, **{name: getattr(arguments, name) for name in names}, **search}
    given = {name: value for name, value in given.items() if value is not None}
    DecodingOptions(**{"left_context_ms": arguments.chunk_ms} | given)
    from cascade.checkpoint import load_model

    device = open_device(arguments, why_cpu)
    model, config, tokenizer = load_model(arguments.exp_dir, arguments.epoch, arguments.avg)
    model.to(device)
    given.setdefault("left_context_ms", default_left_context_ms(config, arguments.chunk_ms))
    return model, config, tokenizer, DecodingOptions.for_model(config, **given)
