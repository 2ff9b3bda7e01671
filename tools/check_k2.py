#!/usr/bin/env python
"""The two sides of tools/check_k2.sh: inputs and compare run here, k2 in k2's own Python (3.9).

Each case is a file DIR/NAME.npz with inputs and, later, DIR/NAME.k2.npz with what k2 made of them.
"""

from __future__ import annotations  # the k2 side runs in Python 3.9

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

TYPES = ("regular", "modified", "constrained")


def make_inputs(folder, num_cases, seed):
    """Write random cases: sizes, topology, boundaries (also with begin offsets or no path), penalty, scales, type."""
    rng = np.random.default_rng(seed)
    for i in range(num_cases):
        n, t, s, v = (int(rng.integers(low, high)) for low, high in ((1, 5), (4, 40), (1, 12), (3, 30)))
        rnnt_type = TYPES[i % 3]
        dtype = "float64" if i % 2 else "float32"
        t = max(t, s)  # k2 refuses batches with T < S
        shortest = 1 if i % 5 == 4 else min(s + 1, t)  # some without a path
        t_end, s_end = rng.integers(shortest, t + 1, n), rng.integers(1, s + 1, n)
        begin = np.zeros((2, n), int)
        if i % 4 == 3:
            begin = rng.integers(0, s_end), rng.integers(0, np.maximum(1, t_end - s_end))
        boundary = np.stack([*begin, s_end, t_end], axis=1)
        meta = {
            "rnnt_type": rnnt_type, "delay_penalty": float(rng.choice([0.0, 0.01])),
            "lm_only_scale": float(rng.choice([0.0, 0.25])), "am_only_scale": float(rng.choice([0.0, 0.1])),
            "s_range": int(rng.integers(2, 7)), "blank": int(rng.choice([0, v - 1])),
        }
        width = t + 1 if rnnt_type == "regular" else t
        np.savez(
            folder / f"case{i:03d}.npz", meta=json.dumps(meta), boundary=boundary.astype(np.int64),
            symbols=rng.integers(0, v, (n, s)), am=rng.normal(0, 2, (n, t, v)).astype(dtype),
            lm=rng.normal(0, 2, (n, s + 1, v)).astype(dtype), logits=rng.normal(0, 2, (n, t, s + 1, v)).astype(dtype),
            am_d=rng.normal(0, 1, (n, t, 6)).astype(dtype), lm_d=rng.normal(0, 1, (n, s + 1, 6)).astype(dtype),
            joiner=rng.normal(0, 1, (6, v)).astype(dtype), px=rng.normal(-1, 1, (n, s, width)).astype(dtype),
            py=rng.normal(-1, 1, (n, s + 1, t)).astype(dtype),
        )


def compute(module, path, given_ranges=None):
    """All functions of `module` (k2 or cascade.losses.rnnt) on one case; a dictionary of arrays."""
    with np.load(path) as data:
        x = {key: torch.from_numpy(data[key]) for key in data.files if key != "meta"}
        meta = json.loads(str(data["meta"]))
    results = {}

    def record(name, loss, leaves):
        results[f"{name}_loss"] = loss
        results.update({f"{name}_grad{i}": g for i, g in enumerate(torch.autograd.grad(loss.sum(), leaves))})

    px, py = x["px"].requires_grad_(), x["py"].requires_grad_()
    scores, grads = module.mutual_information_recursion(px, py, x["boundary"], return_grad=True)
    results["recursion_occupancy0"], results["recursion_occupancy1"] = grads
    record("recursion", scores, (px, py))
    joint = module.joint_mutual_information_recursion([px, py[:, 1:, :1] + px], [py, py * 0.5], x["boundary"])
    results["joint"] = joint
    options = {"boundary": x["boundary"], "rnnt_type": meta["rnnt_type"], "delay_penalty": meta["delay_penalty"],
               "reduction": "none"}
    lm, am, blank = x["lm"].requires_grad_(), x["am"].requires_grad_(), meta["blank"]
    record("simple", module.rnnt_loss_simple(lm, am, x["symbols"], blank, **options), (lm, am))
    loss, grads = module.rnnt_loss_smoothed(
        lm, am, x["symbols"], blank, meta["lm_only_scale"], meta["am_only_scale"], return_grad=True, **options
    )
    record("smoothed", loss, (lm, am))
    logits = x["logits"].requires_grad_()
    record("full", module.rnnt_loss(logits, x["symbols"], blank, **options), (logits,))
    if given_ranges is None:
        ranges = module.get_rnnt_prune_ranges(grads[0], grads[1], x["boundary"], meta["s_range"])
        results["prune_grad0"], results["prune_grad1"] = grads
    else:
        # from k2's occupancies: where two windows tie, rounding would decide
        ranges = module.get_rnnt_prune_ranges(*given_ranges, x["boundary"], meta["s_range"])
    results["ranges"] = ranges
    am_pruned, lm_pruned = module.do_rnnt_pruning(x["am_d"], x["lm_d"], ranges)
    logits = (torch.tanh(am_pruned + lm_pruned) @ x["joiner"]).requires_grad_()
    record("pruned", module.rnnt_loss_pruned(logits, x["symbols"], ranges, blank, **options), (logits,))
    return {key: value.detach().numpy() for key, value in results.items()}


def run_k2(folder):
    """Write k2's results beside every case."""
    import k2

    for path in sorted(folder.glob("case???.npz")):
        np.savez(path.with_suffix(".k2.npz"), **compute(k2, path))


def largest_error(found, expected):
    """Largest difference over max(1, |expected|); infinite where the infinite or not finite places differ."""
    if found.shape != expected.shape:
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite]):
        return float("inf")
    error = np.abs(found[finite] - expected[finite]) / np.maximum(1.0, np.abs(expected[finite]))
    return float(error.max()) if error.size else 0.0


def compare(folder):
    """Compare all backends with k2's files; the number of values that differ by more than allowed."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cascade.losses import backends, rnnt

    worst, bad = {}, 0
    paths = sorted(folder.glob("case???.npz"))
    for path in paths:
        with np.load(path.with_suffix(".k2.npz")) as data:
            expected = {key: data[key] for key in data.files}
        prune = [torch.from_numpy(expected.pop(f"prune_grad{i}")) for i in (0, 1)]
        for backend in ("torch", "numba"):
            with backends.use_backend(backend):
                found = compute(rnnt, path, prune)
            for key, reference in expected.items():
                wide = expected["recursion_loss"].dtype == np.float64
                error = largest_error(found[key], reference)
                worst[wide] = max(worst.get(wide, 0.0), error)
                if not error <= (1e-9 if wide else 1e-4):
                    bad += 1
                    print(f"{path.stem} {backend} {key}: differs by {error:.2e}", file=sys.stderr)
    limits = ", ".join(f"{'float64' if wide else 'float32'} {error:.1e}" for wide, error in sorted(worst.items()))
    print(f"check_k2: {len(paths)} cases, torch and numba backends, largest difference: {limits}; {bad} too large")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("inputs", "k2", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--seed", type=int, help="default: a new one, printed")
    args = parser.parse_args()
    if args.step == "inputs":
        seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
        print(f"check_k2: seed {seed}")
        make_inputs(args.folder, args.cases, seed)
    elif args.step == "k2":
        run_k2(args.folder)
    elif compare(args.folder):
        sys.exit(1)


if __name__ == "__main__":
    main()
