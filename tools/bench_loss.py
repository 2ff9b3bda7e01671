#!/usr/bin/env python
"""Time and memory of the transducer losses beside other packages: python tools/bench_loss.py --json FILE.

Every row is measured in a fresh process: one warm-up step, then `--steps` steps, of which the fastest counts (a busy
machine only ever adds time); with --rounds the rows are measured in turn several times. total_ms is the pruned step:
joiner, pruned loss and their gradients on a given band, as every package does it; torchaudio has no pruned loss, so
that its row is the joiner on the full lattice and its loss. parts: forward_ms, backward_ms; simple_ms, the smoothed
simple loss with its gradients and the prune ranges; full_ms and full_peak_mb, rnnt_loss on full-lattice logits with
their gradient (where they fit); of ours also kd_KIND_ms and kd_KIND_peak_mb, the distillation loss with its gradients
on the same band (one_best: on the teacher's best path). peak_mb: peak resident set above the state before the step, MB
= 10^6 bytes.

A peer that lives in another Python (k2's wheels need an old one) is named by --peer-python k2=/path/to/python.
"""

from __future__ import annotations  # the measuring part also runs in the old Python of a peer

import argparse
import ctypes
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import time

SHAPES = {
    "B8_T250_S60_V500": {"n": 8, "t": 250, "s": 60, "v": 500, "d": 512, "r": 5},
    "B32_T400_S80_V500": {"n": 32, "t": 400, "s": 80, "v": 500, "d": 512, "r": 5},
}
NAMES = ("ours", "plain", "k2", "fast_rnnt", "torchaudio")
FULL_LIMIT_MB = 1000  # the full lattice of larger shapes is not measured
KINDS = ("pruned", "collapsed", "one_best")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def make_inputs(torch, n, t, s, v, d, r):
    """Random inputs as leaf tensors; all utterances have full length."""
    gen = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=gen) * scale).requires_grad_()

    symbols = torch.randint(1, v, (n, s), generator=gen)
    boundary = torch.tensor([[0, 0, s, t]] * n)
    return {
        "am": randn(n, t, v), "lm": randn(n, s + 1, v), "encoder": randn(n, t, d), "predictor": randn(n, s + 1, d),
        "weight": randn(v, d, scale=0.05), "bias": randn(v), "symbols": symbols, "boundary": boundary,
    }


class K2Like:
    """The steps with k2's interface; `module` offers k2's functions."""

    def __init__(self, module, torch, inputs, prune_range):
        self.module, self.torch, self.x, self.prune_range = module, torch, inputs, prune_range

    def simple(self):
        x = self.x
        loss, grads = self.module.rnnt_loss_smoothed(
            x["lm"], x["am"], x["symbols"], 0, lm_only_scale=0.25, am_only_scale=0.0, boundary=x["boundary"],
            reduction="sum", return_grad=True,
        )
        loss.backward()
        self.ranges = self.module.get_rnnt_prune_ranges(grads[0], grads[1], x["boundary"], self.prune_range)

    def forward(self):
        x = self.x
        am, lm = self.module.do_rnnt_pruning(x["encoder"], x["predictor"], self.ranges)
        logits = self.torch.nn.functional.linear(self.torch.tanh(am + lm), x["weight"], x["bias"])
        return self.module.rnnt_loss_pruned(
            logits, x["symbols"], self.ranges, 0, boundary=x["boundary"], reduction="sum"
        )

    def full(self, logits):
        x = self.x
        return self.module.rnnt_loss(logits, x["symbols"], 0, boundary=x["boundary"], reduction="sum")


class Ours(K2Like):
    """The training entry point on the same band."""

    def forward(self):
        from cascade.losses.transducer import pruned_loss

        x = self.x
        return pruned_loss(
            x["encoder"], x["predictor"], x["weight"], x["bias"], x["symbols"], self.ranges, x["boundary"]
        )[0].sum()

    def distil(self, kind, teacher):
        from cascade.losses.distillation import distillation_loss
        from cascade.losses.joiner_cells import JoinerInputs

        x = self.x
        student = JoinerInputs(x["encoder"], x["predictor"], x["weight"], x["bias"])
        kl, _ = distillation_loss(
            student, JoinerInputs(*teacher), x["symbols"], x["boundary"], self.ranges, kind=kind, temperature=1.0
        )
        return kl.sum()


class Torchaudio:
    """Full lattice only."""

    def __init__(self, module, torch, inputs, prune_range):
        self.module, self.torch, self.x = module, torch, inputs

    def simple(self):
        pass

    def forward(self):
        x = self.x
        hidden = self.torch.tanh(x["encoder"][:, :, None] + x["predictor"][:, None])
        return self.full(self.torch.nn.functional.linear(hidden, x["weight"], x["bias"]))

    def full(self, logits):
        boundary = self.x["boundary"].int()
        return self.module.functional.rnnt_loss(
            logits, self.x["symbols"].int(), boundary[:, 3].contiguous(), boundary[:, 2].contiguous(), blank=0,
            reduction="sum",
        )


def load(name, torch, inputs, prune_range):
    """The steps of package `name`; ImportError where it is missing."""
    if name in ("ours", "plain"):
        sys.path.insert(0, ROOT)
        from cascade.losses import backends, rnnt

        backends.set_backend("auto" if name == "ours" else "torch")
        return (Ours if name == "ours" else K2Like)(rnnt, torch, inputs, prune_range)
    module = __import__(name)
    return (Torchaudio if name == "torchaudio" else K2Like)(module, torch, inputs, prune_range)


def resident_mb(field):
    """VmRSS or VmHWM of this process in MB."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024 / 1e6
    raise OSError(field + " is not in /proc/self/status")


def measure_peak(step):
    """Peak resident set of step() above the state before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from here
    before = resident_mb("VmRSS")
    step()
    return resident_mb("VmHWM") - before


def measure_step(step, steps):
    """Fastest (total, parts...) in ms of step(), which returns the marks that it took, and its peak in MB."""
    step()  # warms up
    peak_mb = measure_peak(step)
    runs = [step() for _ in range(steps)]
    pairs = [[(marks[0], marks[-1]), *zip(marks, marks[1:])] for marks in runs]  # noqa: B905  (Python 3.9)
    times = [[1e3 * (end - begin) for begin, end in row] for row in pairs]
    return [round(value, 2) for value in min(times)], round(peak_mb, 1)


def measure(name, shape, threads, steps, full):
    """One row; runs in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    sizes = SHAPES[shape]
    inputs = make_inputs(torch, **sizes)
    package = load(name, torch, inputs, sizes["r"])
    leaves = [x for x in inputs.values() if x.requires_grad]

    def timed(*functions):
        """A step that leaves no gradients behind: each function takes what the one before returned."""

        def step():
            value, marks = None, [time.perf_counter()]
            for function in functions:
                value = function(value)
                marks.append(time.perf_counter())
            for leaf in leaves:
                leaf.grad = None
            return marks

        return step

    def backward(loss):
        loss.backward()

    (simple_ms, *_), _ = measure_step(timed(lambda _: package.simple()), steps)
    (total_ms, forward_ms, backward_ms), peak_mb = measure_step(timed(lambda _: package.forward(), backward), steps)
    parts = {"forward_ms": forward_ms, "backward_ms": backward_ms}
    if name != "torchaudio":
        parts["simple_ms"] = simple_ms
    if name == "ours":
        gen = torch.Generator().manual_seed(2)
        teacher = [torch.randn(*inputs[key].shape, generator=gen) * (0.05 if key == "weight" else 1.0)
                   for key in ("encoder", "predictor", "weight", "bias")]
        for kind in KINDS:
            step = timed(lambda _, kind=kind: package.distil(kind, teacher), backward)
            (parts[f"kd_{kind}_ms"], *_), parts[f"kd_{kind}_peak_mb"] = measure_step(step, max(2, steps // 4))
    shape_of_logits = sizes["n"], sizes["t"], sizes["s"] + 1, sizes["v"]
    if full and math.prod(shape_of_logits) * 4 / 1e6 <= FULL_LIMIT_MB:
        logits = torch.randn(*shape_of_logits, generator=torch.Generator().manual_seed(1)).requires_grad_()
        leaves.append(logits)
        step = timed(lambda _: package.full(logits), backward)
        (parts["full_ms"], *_), parts["full_peak_mb"] = measure_step(step, max(3, steps // 4))
    return {"name": name, "shape": shape, "threads": threads, "total_ms": total_ms, "parts": parts,
            "peak_mb": peak_mb}


def run_row(python, name, shape, threads, steps, full):
    """Start the measuring process; the row, or a string with the reason why there is none."""
    command = [python, os.path.abspath(__file__), "--measure", name, "--shapes", shape, "--threads", str(threads),
               "--steps", str(steps)] + ([] if full else ["--skip-full"])
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
        return lines[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the rows (default: standard output only)")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES), help="packages to measure")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=10, help="steps per process, the fastest counts")
    parser.add_argument("--rounds", type=int, default=1, help="measure all rows this many times in turn, keep the best")
    parser.add_argument("--peer-python", nargs="+", default=[], metavar="NAME=PYTHON", help="interpreter of a package")
    parser.add_argument("--skip-full", action="store_true", help="leave the full-lattice loss out")
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


def collect(args, pythons):
    """Measure every row, all of them once per round, and keep the fastest; writes --json after each."""
    best, missing = {}, set()
    for _, *key in itertools.product(range(args.rounds), args.shapes, args.threads, args.names):
        shape, threads, name = key = tuple(key)
        if name in missing:
            continue
        row = run_row(pythons.get(name, sys.executable), name, shape, threads, args.steps, not args.skip_full)
        if isinstance(row, str):
            if "ModuleNotFoundError" in row or "ImportError" in row:
                missing.add(name)
            print(f"skipped {name} {shape}, {threads} threads: {row}", file=sys.stderr)
            continue
        if key not in best or row["total_ms"] < best[key]["total_ms"]:
            best[key] = row
        if args.json:
            with open(args.json, "w") as out:
                json.dump(list(best.values()), out, indent=1)
    return list(best.values())


def print_tables(rows):
    """Command, machine, commit and two Markdown tables: all packages, ratios to fast_rnnt at the same shape and
    threads; the distillation losses of ours."""
    from cascade.provenance import command_line, git_commit, machine
    from cascade.report.markdown import table

    base = {(row["shape"], row["threads"]): row for row in rows if row["name"] == "fast_rnnt"}
    rows.sort(key=lambda row: (row["shape"], row["threads"], NAMES.index(row["name"])))
    cells, kd_cells = [], []
    for row in rows:
        key, parts = (row["shape"], str(row["threads"])), row["parts"]
        other = base.get(key, {"total_ms": None, "parts": {}})
        pairs = (row["total_ms"], other["total_ms"]), (parts.get("full_ms"), other["parts"].get("full_ms"))
        ratio, full_ratio = (f"{mine / theirs:.2f}" if mine and theirs else "" for mine, theirs in pairs)
        full = [str(parts.get(name, "")) for name in ("simple_ms", "full_ms", "full_peak_mb")]
        step = [str(row["total_ms"]), str(row["peak_mb"])]
        cells.append([*key, row["name"], step[0], ratio, step[1], *full[:2], full_ratio, full[2]])
        if row["name"] == "ours":
            kd_cells.append([*key, *step, *(str(parts[f"kd_{kind}_{what}"]) for kind in KINDS
                                            for what in ("ms", "peak_mb"))])  # fmt: skip
    print(f"`{command_line()}`, {machine()}, commit {git_commit()}. Fastest step of each process.\n")
    print(table(["shape", "threads", "name", "pruned step ms", "ratio", "peak MB", "simple ms", "full lattice ms",
                 "ratio", "peak MB"], cells))  # fmt: skip
    if kd_cells:
        header = [word for kind in KINDS for word in (f"KL {kind} ms", "peak MB")]
        print("\n" + table(["shape", "threads", "pruned step ms", "peak MB", *header], kd_cells))


def main():
    args = parse_arguments()
    if args.measure:
        print(json.dumps(measure(args.measure, args.shapes[0], args.threads[0], args.steps, not args.skip_full)))
        return
    sys.path.insert(0, ROOT)
    print_tables(collect(args, dict(pair.split("=", 1) for pair in args.peer_python)))


if __name__ == "__main__":
    main()
