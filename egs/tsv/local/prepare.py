"""Write train, dev and test.jsonl of a corpus that is one table, in a form of cascade/corpus/tables.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.corpus.manifests import write_about, write_manifest
from cascade.corpus.tables import read_table, utterances_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tsv", type=Path, required=True, metavar="FILE", help="path text [split] ...: see README.md")
    parser.add_argument("--audio-dir", type=Path, metavar="DIR", help="where relative paths start (default: the table)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the split, if the table has none (42)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the manifests")
    arguments = parser.parse_args()
    splits = utterances_of(read_table(arguments.tsv, arguments.audio_dir), arguments.seed)
    for split, utterances in splits.items():
        write_manifest(arguments.out / f"{split}.jsonl", utterances)
    write_about(arguments.out, f"the table {arguments.tsv.name}", "not stated")


if __name__ == "__main__":
    run_program(main)
