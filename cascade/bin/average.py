"""Average the weights of several epochs of one run into a model file.

Without --out it replaces DIR/averaged.pt, the model that decoding takes by default.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.checkpoint import average_values, last_epochs, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", type=Path, required=True, metavar="DIR", help="a model directory")
    parser.add_argument("--epoch", type=int, required=True, metavar="N", help="last epoch of the average")
    parser.add_argument("--avg", type=int, metavar="K", help="how many epochs (default: 5, or all there are)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/averaged.pt")
    arguments = parser.parse_args()
    paths = last_epochs(arguments.exp_dir, arguments.epoch, arguments.avg or min(5, arguments.epoch))
    out = arguments.out or arguments.exp_dir / "averaged.pt"
    save_file(average_values(paths), out)
    logging.info("%s: the mean of %s", out, ", ".join(path.name for path in paths))


if __name__ == "__main__":
    run_program(main)
