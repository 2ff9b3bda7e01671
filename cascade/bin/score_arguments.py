"""The options of programs that search with scores from outside: an n-gram language model, LODR, hotwords."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from cascade.config.options import DECODING_FILES, DecodingConfig


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --ngram and what follows here; what is not given is as the model's decoding section has it."""
    group = parser.add_argument_group("scores from outside (default: the model's decoding section)")
    group.add_argument("--ngram", type=Path, metavar="FILE", help="language model over tokens, what train_ngram wrote")
    group.add_argument("--lm-scale", type=float, metavar="A", help="its weight, which tune_scales finds; 0: without it")
    group.add_argument("--lodr", type=Path, metavar="FILE", help="bigram of the training transcripts, subtracted")
    group.add_argument("--lodr-scale", type=float, metavar="B", help="its weight, at least 0; 0: without it")
    group.add_argument(
        "--rescore", action="store_true", default=None,
        help="both rank the N-best of each segment (--beam 8 to 12) instead of entering the search",
    )
    group.add_argument("--hotwords", type=Path, metavar="FILE", help="phrases to prefer, one a line, or 'phrase :2.5'")
    group.add_argument("--hotword-scale", type=float, metavar="S", help="the boost of phrases that name none")


def score_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of DecodingOptions that these options set.

    Raises:
      FileNotFoundError: a file is missing; said before the model is read.
    """
    for name in DECODING_FILES:
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{name} {path} not found")
    names = {field.name for field in fields(DecodingConfig)} - {"blank_penalty"} | {"rescore"}
    return {name: value for name, value in vars(arguments).items() if name in names and value is not None}
