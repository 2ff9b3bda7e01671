"""Collect an experiment's results: results.json, RESULTS.md and plots/*.png.

Reads EXP/{teacher,student_alone,student}/: decode/**/result.json, latency.json, train_summary.json, losses.jsonl,
export/export.json, and EXP/latency_full_size.json where there is one. What is missing is named with the stage that
makes it, here and at the top of RESULTS.md. runs.csv and comparisons.json of tools/run_arms.py in --out
become a section about several seeds.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.report.collect import collect, write_rows
from cascade.report.markdown import write_report
from cascade.report.plots import draw_plots
from cascade.report.seeds import seeds_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", type=Path, required=True, metavar="EXP", help="holds the three model directories")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: EXP)")
    parser.add_argument("--title", metavar="TEXT", help="of RESULTS.md (default: the folder's name)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.exp_dir
    experiment = collect(arguments.exp_dir)
    for sentence in experiment.missing:
        logging.warning("%s", sentence)
    out.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(experiment, out)
    write_rows(experiment.rows, out / "results.json")
    text = write_report(experiment, arguments.title or out.resolve().name, plots, seeds_section(out))
    (out / "RESULTS.md").write_text(text, encoding="utf-8")
    logging.info("wrote results.json (%d rows), RESULTS.md and %d plots to %s", len(experiment.rows), len(plots), out)


if __name__ == "__main__":
    run_program(main)
