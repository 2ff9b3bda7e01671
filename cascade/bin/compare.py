"""Compare two systems on the same utterances: difference in WER with its 95 % interval, by paired bootstrap.

    compare teacher/hyps.jsonl student/hyps.jsonl
    compare a-seed1.jsonl b-seed1.jsonl a-seed2.jsonl b-seed2.jsonl      # several runs of A and B, pooled

The interval over speakers needs the speakers that `decode` writes where the manifest has them. The draws vary the test
set; how much a training with another seed would differ is seen from several runs only.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import check_values
from cascade.config.options import ConfigError
from cascade.measure.compare import Comparison, Interval, compare, read_hypotheses
from cascade.provenance import command_line, git_commit


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hyps", nargs="+", type=Path, metavar="HYPS.jsonl", help="A and B, again A and B, ...")
    parser.add_argument("--num-draws", type=int, default=10_000, metavar="N", help="bootstrap samples (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here too")
    arguments = parser.parse_args()
    if len(arguments.hyps) % 2:
        raise ConfigError(f"name the files in pairs, A then B, got {len(arguments.hyps)}")
    check_values(arguments, num_draws=100, seed=0)
    for path in arguments.hyps:
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found: name hyps.jsonl files that decode wrote")
    return arguments


def describe(result: Comparison, num_pairs: int) -> str:
    """The comparison as a few lines."""
    relative = "" if result.relative is None else f" ({result.relative:+.1f} % relative)"
    runs = "" if num_pairs == 1 else f", {num_pairs} runs each"
    lines = [
        f"A {result.wer_a:.2f} %, B {result.wer_b:.2f} % WER on {result.num_utterances} utterances, "
        f"{result.num_words} words{runs}",
        f"B - A: {result.difference:+.2f} points{relative}",
        _describe_interval(result.over_utterances, "utterances"),
    ]
    if result.over_speakers is None:
        lines.append("  over speakers: the files do not name two or more")
    else:
        lines.append(_describe_interval(result.over_speakers, "speakers"))
    return "\n".join(lines)


def _describe_interval(interval: Interval, groups: str) -> str:
    relative = ""
    if interval.relative_low is not None:
        relative = f" ({interval.relative_low:+.1f} to {interval.relative_high:+.1f} % relative)"
    return (
        f"  95 % interval over {interval.num_groups} {groups}: {interval.low:+.2f} to {interval.high:+.2f} points"
        f"{relative}; B is better in {100 * interval.share_better:.1f} % of the draws"
    )


def main() -> None:
    arguments = parse_arguments()
    systems = [read_hypotheses(path) for path in arguments.hyps]
    pairs = list(zip(systems[::2], systems[1::2], strict=True))
    result = compare(pairs, arguments.num_draws, arguments.seed)
    print(describe(result, len(pairs)))
    if arguments.json is not None:
        row = asdict(result) | {
            "difference": result.difference, "relative": result.relative,
            "files": [str(path) for path in arguments.hyps],
            "num_draws": arguments.num_draws, "seed": arguments.seed, "commit": git_commit(), "command": command_line(),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
