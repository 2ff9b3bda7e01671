"""Stage 1: log-mel fbank of every split, with speed-perturbed copies of train, and the statistics of train.

Reads DATA/<split>_cuts.jsonl.gz (stage 0), writes OUT/<split>_cuts.jsonl.gz with stored features and OUT/stats.pt.
With --noise-dir, OUT/noise holds the features of noises, which training then mixes into augment.noise_share of the
utterances; without it, training has none. With --rir-dir, augment.rir_share of the training copies is put into rooms.
features.extractor chooses what computes the fbank.
Interrupted, it exits with 75; the same command finishes what is missing.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cascade.bin.cli import add_config_arguments, config_from_arguments, run_program
from cascade.bin.model_arguments import check_values
from cascade.config.options import Config
from cascade.corpus.cuts import CUTS_SUFFIX
from cascade.data.noise import remove_noise, store_noise
from cascade.data.rooms import read_rooms
from cascade.data.storage import store_split
from cascade.threads import limit_threads

log = logging.getLogger(__name__)


def compute_features(
    data: Path, out: Path, config: Config, num_jobs: int = 2, noise_dir: Path | None = None, rir_dir: Path | None = None
) -> None:
    """Stage 1 on a folder of validated cuts.

    Raises:
      ValueError: no cuts of train, no usable audio in noise_dir or rir_dir.
    """
    splits = sorted(path.name.removesuffix(CUTS_SUFFIX) for path in data.glob(f"*{CUTS_SUFFIX}"))
    if "train" not in splits:
        raise ValueError(f"{data} must hold train{CUTS_SUFFIX}; run stage 0 (prepare_data) first")
    rooms = read_rooms(rir_dir, config) if rir_dir is not None else None
    if noise_dir is not None:
        store_noise(noise_dir, out, config.features, num_jobs)
    else:
        remove_noise(out)
    for split in splits:
        store_split(data / f"{split}{CUTS_SUFFIX}", out, split, config, num_jobs, rooms)
        log.info("%s: features stored in %s", split, out / f"{split}{CUTS_SUFFIX}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of stage 0, EXP/data")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the features, EXP/fbank")
    parser.add_argument("--noise-dir", type=Path, metavar="DIR", help="noises of any format and rate, e.g. MUSAN")
    parser.add_argument("--rir-dir", type=Path, metavar="DIR", help="room impulse responses")
    parser.add_argument("--num-jobs", type=int, default=2, metavar="N", help="processes (default 2)")
    add_config_arguments(parser)
    arguments = parser.parse_intermixed_args()
    check_values(arguments, num_jobs=1)
    limit_threads(1)  # the processes are what runs in parallel
    compute_features(
        arguments.data, arguments.out, config_from_arguments(arguments), arguments.num_jobs, arguments.noise_dir,
        arguments.rir_dir,
    )


if __name__ == "__main__":
    run_program(main)
