"""Train a token n-gram language model (modified Kneser-Ney) on text; write it as an ARPA file or as arrays (.npz).

The text (.txt, .gz or .xz, UTF-8, one sentence a line, or the transcripts of CUTS.jsonl.gz or MANIFEST.jsonl) is
normalised as transcripts are and cut into the tokens of --tokens, the folder of stage 2; the ARPA file's words are
these tokens. 30 million words take minutes and a few GB. Programs that decode read both kinds of file, but millions of
n-grams take minutes from an ARPA file and a moment from arrays. A language model that knows a test set by heart
measures nothing: --held-out says how many of its word sequences are in the text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.config.options import ConfigError
from cascade.corpus.cuts import read_cuts, transcript
from cascade.corpus.manifests import read_manifest
from cascade.corpus.quarantine import Problem
from cascade.search.ngram import read_arpa
from cascade.text.ngram_training import train_ngram, write_arpa
from cascade.text.overlap import shared_sequences
from cascade.text.tokens import Tokenizer

HELD_OUT_LENGTH = 6
"""Words of the sequences that --held-out counts."""


def read_transcripts(path: Path) -> list[str]:
    """The transcripts of cuts or of a manifest.

    Raises:
      ValueError: a line of a manifest is no utterance, or a damaged file of cuts.
    """
    if path.suffix == ".jsonl":
        utterances = list(read_manifest(path))
        if wrong := next((each for each in utterances if isinstance(each, Problem)), None):
            raise ValueError(f"{wrong.reason} (cuts end in .jsonl.gz)")
        return [utterance.text for utterance in utterances]
    return [transcript(cut) for cut in read_cuts(path)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, nargs="+", metavar="FILE", help="sentences or transcripts")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="the tokenizer's folder, EXP/tokens")
    parser.add_argument("--order", type=int, required=True, metavar="N", help="tokens in the longest n-grams")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model: .arpa, .arpa.gz or .npz")
    parser.add_argument(
        "--prune", type=int, nargs="+", default=[0], metavar="C",
        help="leave out n-grams of order 1 (0), 2, 3, ... that the text has at most so often; the last value holds for "
        "higher orders (default: 0; 0 0 0 1 halves a model of order 4 and costs little)",
    )
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE",
        help=f"cuts or a manifest: print the share of their sequences of {HELD_OUT_LENGTH} words that the text has",
    )
    arguments = parser.parse_args()
    for path in (*arguments.text, *filter(None, [arguments.held_out])):
        if not path.exists():
            raise FileNotFoundError(f"{path} not found")
    if arguments.held_out is not None and (pipes := [path for path in arguments.text if not path.is_file()]):
        raise ConfigError(f"--held-out reads the text twice, and {pipes[0]} is no file: write it to one first")
    if arguments.out.suffix not in (".arpa", ".gz", ".npz") or arguments.out.is_dir():
        raise ConfigError(f"--out must be a file that ends in .arpa, .arpa.gz or .npz, got {arguments.out}")
    held_out = [] if arguments.held_out is None else read_transcripts(arguments.held_out)
    tokenizer = Tokenizer.load(arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        texts = []
        for number, path in enumerate(arguments.text):
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                lines, path = read_transcripts(path), Path(folder, f"{number}.txt")
                path.write_text("".join(f"{' '.join(line.split())}\n" for line in lines), encoding="utf-8")
            texts.append(path)
        orders = train_ngram(texts, tokenizer, arguments.order, arguments.prune)
        if arguments.out.suffix == ".npz":
            arpa = Path(folder, "lm.arpa")
            symbols = [tokenizer.id_to_symbol(token) for token in range(tokenizer.vocab_size)]
            write_arpa(orders, tokenizer, arpa)
            read_arpa(arpa, symbols).save(arguments.out, symbols)
        else:
            write_arpa(orders, tokenizer, arguments.out)
        if arguments.held_out is not None:
            num_shared, total = shared_sequences(held_out, texts, tokenizer.normalize, HELD_OUT_LENGTH)
            if not total:
                print(f"{arguments.held_out} has no sequence of {HELD_OUT_LENGTH} words: nothing was compared")
            else:
                print(f"{100 * num_shared / total:.2f} % of {arguments.held_out} is in the text: {num_shared} of "
                      f"{total} different sequences of {HELD_OUT_LENGTH} words")


if __name__ == "__main__":
    run_program(main)
