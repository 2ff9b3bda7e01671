"""Stage 2: train the tokenizer on the transcripts of train, then check every transcript against it.

Reads DATA/<split>_cuts.jsonl.gz (stage 0), writes the tokenizer's folder OUT. Training utterances with characters
(kind word: words) that it lacks, or with more tokens than encoder frames at the slowest speed, are added to
DATA/quarantine.jsonl; training leaves them out by the same rule. Utterances of other splits always count in the error
rate: for them there is only a warning.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cascade.bin.cli import add_config_arguments, config_from_arguments, run_program
from cascade.config.options import Config
from cascade.corpus.cuts import CUTS_SUFFIX, read_cuts, transcript
from cascade.corpus.quarantine import (
    TOKEN_KINDS,
    UNKNOWN_CHARACTERS,
    Problem,
    check_share,
    log_counts,
    read_quarantine,
    token_problem,
    write_quarantine,
)
from cascade.text.tokens import Tokenizer, train_tokenizer

BYTES_HINT = " or tokens.byte_fallback=true"

log = logging.getLogger(__name__)


def train_tokens(data: Path, out: Path, config: Config) -> Tokenizer:
    """Stage 2 on a folder of validated cuts.

    Raises:
      ValueError: no cuts of train, or more than data.max_quarantine_share of them does not fit the tokenizer.
    """
    tokenizer = train_tokenizer(map(transcript, read_cuts(data / f"train{CUTS_SUFFIX}")), config.tokens, out)
    log.info("%s tokenizer with %d tokens in %s", tokenizer.kind, tokenizer.vocab_size, out)
    quarantine = data / "quarantine.jsonl"
    problems, num_total = _check_train(data / f"train{CUTS_SUFFIX}", tokenizer, config)
    others = [problem for problem in read_quarantine(quarantine) if problem.kind not in TOKEN_KINDS]
    write_quarantine(quarantine, others + problems)
    log_counts("train", num_total, problems)
    if any(problem.kind == UNKNOWN_CHARACTERS for problem in problems):
        log.warning("a larger tokens.vocab_size%s keeps them", BYTES_HINT if config.tokens.kind != "word" else "")
    for path in sorted(data.glob(f"*{CUTS_SUFFIX}")):
        split = path.name.removesuffix(CUTS_SUFFIX)
        if split != "train":
            _warn_of_unknown(split, path, tokenizer)
    check_share("train", num_total, problems, config.data, quarantine)
    return tokenizer


def _check_train(path: Path, tokenizer: Tokenizer, config: Config) -> tuple[list[Problem], int]:
    problems, num_total = [], 0
    for cut in read_cuts(path):
        num_total += 1
        reason = token_problem(
            transcript(cut), cut.num_samples, config.features.sampling_rate, config.data.speed_factors, tokenizer
        )
        if reason is not None:
            problems.append(Problem(cut.id, "train", cut.recording.sources[0].source, reason))
    return problems, num_total


def _warn_of_unknown(split: str, path: Path, tokenizer: Tokenizer) -> None:
    unknown: set[str] = set()
    count = 0
    for cut in read_cuts(path):
        lacking = tokenizer.unknown_characters(transcript(cut))
        count += bool(lacking)
        unknown |= lacking
    if count:
        shown = " ".join(sorted(unknown)[:20]) + (" ..." if len(unknown) > 20 else "")
        log.warning("%s: %d utterances have what the tokenizer lacks, an error each: %s", split, count, shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of stage 0, EXP/data")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the tokenizer, EXP/tokens")
    add_config_arguments(parser)
    arguments = parser.parse_intermixed_args()
    train_tokens(arguments.data, arguments.out, config_from_arguments(arguments))


if __name__ == "__main__":
    run_program(main)
