"""Train a token n-gram language model (modified Kneser-Ney) on plain text and write it as an ARPA file.

The text (.txt, .gz or .xz, UTF-8, one sentence a line) is normalised as transcripts are and cut into the tokens of
--tokens, the folder of stage 2; the ARPA file's words are these tokens. 30 million words take minutes and a few GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.text.ngram_training import train_ngram, write_arpa
from cascade.text.tokens import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, nargs="+", metavar="FILE", help="sentences, one a line")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="the tokenizer's folder, EXP/tokens")
    parser.add_argument("--order", type=int, required=True, metavar="N", help="tokens in the longest n-grams")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model, .arpa or .arpa.gz")
    parser.add_argument(
        "--prune", type=int, nargs="+", default=[0], metavar="C",
        help="leave out n-grams of order 1 (0), 2, 3, ... that the text has at most so often; the last value holds for "
        "higher orders (default: 0; 0 0 0 1 halves a model of order 4 and costs little)",
    )
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.tokens)
    orders = train_ngram(arguments.text, tokenizer, arguments.order, arguments.prune)
    write_arpa(orders, tokenizer, arguments.out)


if __name__ == "__main__":
    run_program(main)
