#!/usr/bin/env python
"""Time our own dropout, eight masks from one draw, against torch's: python tools/bench_tricks.py --json FILE.

Both run in turn in one process; the median processor time of each counts, so that a busy machine does not matter. What
brings less than 5 % of the step that it is part of has no place.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.config.load import load_config  # noqa: E402
from cascade.models.build import build_model  # noqa: E402
from cascade.models.dropout import Dropout  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.threads import limit_threads  # noqa: E402


def small_encoders() -> list[Callable[[], object]]:
    """A training step, 16 x 3.6 s in 4 causal layers of 144: with torch's dropout and with ours."""
    options = ["model.d_model=144", *(f"model.causal.{option}" for option in ("num_layers=4", "feedforward_dim=576"))]
    own = build_model(load_config([], options), 500).train()
    plain = copy.deepcopy(own)
    for parent in list(plain.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Dropout):
                setattr(parent, name, torch.nn.Dropout(child.threshold / 256))
    features, lens = torch.randn(16, 360, 80), torch.full((16,), 360)

    def step(model) -> Callable[[], object]:
        return lambda: model.encoder.forward_causal(features, lens, 8, 32)[0].square().mean().backward()

    return [step(plain), step(own)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the row here")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    limit_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(1)
    steps, times = small_encoders(), []
    for _ in range(arguments.repeats + 1):
        marks = [time.process_time()]
        for step in steps:
            step()
            marks.append(time.process_time())
        times.append(np.diff(marks))
    before, after = 1000 * np.median(times[1:], axis=0)  # the first one warms up
    row = {
        "name": "dropout", "plain_cpu_ms": round(before, 1), "cpu_ms": round(after, 1),
        "ratio": round(after / before, 3), "threads": arguments.threads, "commit": git_commit(),
        "command": command_line(), "machine": machine(),
    }
    print(f"dropout {before:8.1f} ms plain {after:8.1f} ms with it, ratio {after / before:.3f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([row], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
