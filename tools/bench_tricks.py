#!/usr/bin/env python
"""Time each trick on private interfaces or memory against its plain form: python tools/bench_tricks.py --json FILE.

Both forms run in turn in one process; the median processor time of each counts, so that a busy machine does not matter.
A trick that brings less than 5 % of the step that it is part of has no place.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.config.load import load_config  # noqa: E402
from cascade.models.build import build_model  # noqa: E402
from cascade.models.dropout import Dropout  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402

Pair = tuple[str, Callable[[], object], Callable[[], object]]
"""What is timed, its plain form, its form with the trick."""


def byte_dropout() -> Pair:
    """models/dropout.py: eight masks from one draw, in a training step of a small causal encoder."""
    small = ["model.d_model=144", *(f"model.causal.{x}" for x in ("num_layers=4", "feedforward_dim=576"))]
    own = build_model(load_config([], small), 500).train()
    plain = copy.deepcopy(own)
    for parent in list(plain.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Dropout):
                setattr(parent, name, torch.nn.Dropout(child.threshold / 256))
    features, lens = torch.randn(16, 360, 80), torch.full((16,), 360)

    def step(model) -> Callable[[], object]:
        return lambda: model.encoder.forward_causal(features, lens, 8, 32)[0].square().mean().backward()

    return "forward and backward, 16 x 3.6 s, 4 layers of 144", step(plain), step(own)


TRICKS = {"dropout": byte_dropout}


def time_pair(plain: Callable[[], object], trick: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median processor milliseconds of both, called in turn after one call to warm up."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        marks = [time.process_time()]
        for function in (plain, trick):
            function()
            marks.append(time.process_time())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    before, after = (1000 * statistics.median(column) for column in zip(*times[1:], strict=True))
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--names", nargs="+", choices=TRICKS, default=list(TRICKS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    rows = []
    for name in arguments.names:
        torch.manual_seed(1)
        what, plain, trick = TRICKS[name]()
        before, after = time_pair(plain, trick, arguments.repeats)
        rows.append({
            "name": name, "step": what, "plain_cpu_ms": round(before, 1), "cpu_ms": round(after, 1),
            "ratio": round(after / before, 3), "threads": arguments.threads, "commit": git_commit(),
            "command": command_line(), "machine": machine(),
        })
        print(f"{name:<11} {before:8.1f} ms plain {after:8.1f} ms with it, ratio {after / before:.3f}  ({what})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
