#!/usr/bin/env python
"""Join manifests of several corpora into the table that egs/tsv trains on:

    python tools/join_manifests.py \\
        --train egs/an4/exp/manifests/train.jsonl egs/librispeech/exp/manifests/train.jsonl \\
        --dev egs/librispeech/exp/manifests/dev.jsonl --out all.tsv

Each recipe writes its manifests in stage 0; what a line must hold stands in cascade/corpus/manifests.py. A split that
is not named is cut out of train by egs/tsv. Speakers of one name are one within a folder of manifests, and
different ones in different folders.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.corpus.manifests import read_manifest  # noqa: E402
from cascade.corpus.quarantine import Problem  # noqa: E402
from cascade.corpus.splits import SPLITS  # noqa: E402
from cascade.corpus.tables import COLUMNS  # noqa: E402
from cascade.files import replacing  # noqa: E402


def lines_of(manifest: Path, split: str, corpus: int) -> list[str]:
    """The table's lines for a manifest.

    Raises:
      FileNotFoundError: no such manifest.
      ValueError: a line that is no utterance, or no utterance at all.
    """
    lines, num_timed = [], 0
    for each in read_manifest(manifest):
        if isinstance(each, Problem):
            raise ValueError(each.reason)
        num_timed += each.words is not None
        path, text = str(each.path.resolve()), " ".join(each.text.split())
        if {"\t", "\n", "\r"} & set(path):
            raise ValueError(f"{manifest}: a table cannot hold a path with tabs or line ends, {path!r}")
        speaker = each.speaker and " ".join(f"{corpus}-{each.speaker}".split())
        cells = ("" if cell is None else str(cell) for cell in (path, text, split, speaker, each.start, each.end))
        quoted = ('"' + cell.replace('"', '""') + '"' if cell.startswith('"') else cell for cell in cells)
        lines.append("\t".join(quoted))
    if not lines:
        raise ValueError(f"{manifest} has no utterances")
    if num_timed:
        logging.warning("%s: the words' times of %d utterances are left out, a table has none", manifest, num_timed)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=Path, nargs="+", default=[], metavar="FILE", required=split == "train",
                            help=f"manifests whose utterances are for {split}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table")
    arguments = parser.parse_args()
    chosen = [(split, manifest) for split in SPLITS for manifest in getattr(arguments, split)]
    folders = list(dict.fromkeys(manifest.resolve().parent for _, manifest in chosen))
    lines = ["\t".join(COLUMNS)]
    for split, manifest in chosen:
        lines += lines_of(manifest, split, 1 + folders.index(manifest.resolve().parent))
    with replacing(arguments.out) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    logging.info("%s: %d utterances of %d manifests", arguments.out, len(lines) - 1, len(chosen))


if __name__ == "__main__":
    run_program(main)
