"""Stage 0: check every utterance of the raw manifests, set the bad ones aside, write lhotse cuts of the good ones.

Reads DIR/*.jsonl (one per split; train and dev must be there): one object per line with id, path (absolute or
relative to the manifest), text and optionally speaker, start, end (seconds). Each recording is decoded once.
Writes OUT/<split>_cuts.jsonl.gz and OUT/quarantine.jsonl with a reason for each utterance set aside: unreadable or
truncated audio, empty text, wrong duration, duplicate id, malformed line. Another sampling rate is resampled and
several channels are averaged: counted, not set aside. Exits with 1 when more than data.max_quarantine_share of a split
is bad. Prints the statistics of what is left (hours, speakers, words, durations, characters, what splits share), which
OUT/statistics.txt, .json and .png keep.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from cascade.bin.cli import add_config_arguments, config_from_arguments, run_program
from cascade.bin.model_arguments import check_values
from cascade.config.options import Config
from cascade.corpus.cuts import CUTS_SUFFIX, Cut, split_name, validate, write_cuts
from cascade.corpus.manifests import read_manifest
from cascade.corpus.quarantine import Problem, check_share, log_counts, write_quarantine
from cascade.corpus.statistics import SplitStatistics, write_statistics
from cascade.corpus.statistics_plot import draw_statistics
from cascade.log import progress
from cascade.text.normal import normalizer

REQUIRED_SPLITS = ("train", "dev")
_BLOCK = 1000  # utterances handed to the threads at a time

log = logging.getLogger(__name__)


def prepare_split(
    manifest: Path, cuts_path: Path, config: Config, num_jobs: int, max_utterances: int | None = None
) -> tuple[int, list[Problem], SplitStatistics]:
    """Validate one split and write its cuts in the manifest's order; log what was set aside, resampled or mixed down.

    Returns:
      The number of utterances in the manifest, the problems, the statistics of the others.
    """
    split = manifest.stem
    lines = list(read_manifest(manifest))
    if max_utterances is not None and len(lines) > max_utterances:
        lines = [lines[index * len(lines) // max_utterances] for index in range(max_utterances)]
        log.info("%s: only %d utterances, evenly spaced, are used", split, max_utterances)
    check = partial(_check_line, split=split, config=config)
    problems: list[Problem] = []
    notes: Counter[str] = Counter()
    statistics = SplitStatistics(split, normalizer(config.tokens))

    def good_cuts() -> Iterator[Cut]:
        for result in progress(_in_threads(check, lines, num_jobs), f"checking {split}", total=len(lines)):
            if isinstance(result, Problem):
                problems.append(result)
                continue
            cut, note = result
            notes.update([note] if note else [])
            supervision = cut.supervisions[0]
            statistics.add(cut.id, cut.duration, supervision.text, supervision.speaker)
            yield cut

    write_cuts(cuts_path, good_cuts())
    statistics.num_set_aside = len(problems)
    log_counts(split, len(lines), problems)
    for note, count in sorted(notes.items()):
        log.info("%s: %d utterances %s", split, count, note)
    return len(lines), problems, statistics


def _check_line(line, split: str, config: Config):
    return line if isinstance(line, Problem) else validate(line, split, config)


def _in_threads(function, values: Iterable, num_jobs: int) -> Iterator:
    """Decoding happens in libsndfile, outside of Python's lock: threads are enough."""
    values = iter(values)
    with ThreadPoolExecutor(num_jobs) as pool:
        while block := list(islice(values, _BLOCK)):
            yield from pool.map(function, block)


def prepare(
    manifest_dir: Path, out: Path, config: Config, num_jobs: int = 2, max_utterances: int | None = None
) -> list[SplitStatistics]:
    """Stage 0 on a folder of manifests; the statistics of its splits, train first.

    Raises:
      ValueError: a split is missing, or too much of one is bad (the quarantine file is written all the same).
    """
    manifests = sorted(manifest_dir.glob("*.jsonl"))
    missing = [split for split in REQUIRED_SPLITS if split not in {manifest.stem for manifest in manifests}]
    if missing:
        raise ValueError(f"{manifest_dir} must hold {' and '.join(f'{split}.jsonl' for split in missing)}")
    checked = out / ".checked"  # nothing takes the place of an earlier run's cuts before every split has passed
    results = {
        path.stem: prepare_split(path, checked / f"{path.stem}{CUTS_SUFFIX}", config, num_jobs, max_utterances)
        for path in manifests
    }
    quarantine = out / "quarantine.jsonl"
    write_quarantine(quarantine, [problem for _, problems, _ in results.values() for problem in problems])
    for split, (num_total, problems, _) in results.items():
        check_share(split, num_total, problems, config.data, quarantine)
    for split in results:
        (checked / f"{split}{CUTS_SUFFIX}").replace(out / f"{split}{CUTS_SUFFIX}")
    shutil.rmtree(checked)
    for path in sorted(out.glob(f"*{CUTS_SUFFIX}")):
        if split_name(path) not in results:
            log.warning("%s is of an earlier run, without %s.jsonl now: remove it, or later stages use it", path,
                        split_name(path))
    first = [*REQUIRED_SPLITS, *sorted(results.keys() - set(REQUIRED_SPLITS))]
    return [results[split][2] for split in first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest-dir", type=Path, required=True, metavar="DIR", help="folder of <split>.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the cuts, EXP/data")
    parser.add_argument("--num-jobs", type=int, default=2, metavar="N", help="threads that decode (default 2)")
    parser.add_argument("--max-utterances", type=int, metavar="N", help="use N evenly spaced ones of each split")
    add_config_arguments(parser)
    arguments = parser.parse_intermixed_args()
    check_values(arguments, num_jobs=1, max_utterances=1)
    splits = prepare(
        arguments.manifest_dir, arguments.out, config_from_arguments(arguments), arguments.num_jobs,
        arguments.max_utterances,
    )
    print(write_statistics(splits, arguments.out))
    draw_statistics(splits, arguments.out / "statistics.png")


if __name__ == "__main__":
    run_program(main)
