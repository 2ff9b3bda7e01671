"""The options of programs that search with scores from outside: an n-gram language model and LODR."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cascade.search.methods import DecodingOptions


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --ngram, --lm-scale, --lodr, --lodr-scale, --rescore; the model's decoding section has what is not given."""
    group = parser.add_argument_group("scores from outside (default: the model's decoding section)")
    group.add_argument("--ngram", type=Path, metavar="ARPA", help="language model over tokens, what train_ngram wrote")
    group.add_argument("--lm-scale", type=float, metavar="A", help="its weight, which tune_scales finds; 0: without it")
    group.add_argument("--lodr", type=Path, metavar="ARPA", help="bigram of the training transcripts, subtracted")
    group.add_argument("--lodr-scale", type=float, metavar="B", help="its weight, at least 0; 0: without it")
    group.add_argument(
        "--rescore", action="store_true", default=None,
        help="both rank the N-best of each segment (--beam 8 to 12) instead of entering the search",
    )


def score_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of DecodingOptions that these options set.

    Raises:
      FileNotFoundError: a file is missing; said before the model is read.
    """
    for name in ("ngram", "lodr"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{name} {path} not found")
    given = {name: getattr(arguments, name) for name in ("ngram", "lm_scale", "lodr", "lodr_scale", "rescore")}
    return {name: value for name, value in given.items() if value is not None}


def score_fields(options: DecodingOptions) -> dict[str, Any]:
    """What a row of results.json says of the scores: names of files, null for what was not used."""
    return {
        "ngram": Path(options.ngram).name if options.lm_scale else None,
        "lm_scale": options.lm_scale or None,
        "lodr_scale": options.lodr_scale or None,
        "hotwords": None,
        "rescore": options.rescore,
    }
