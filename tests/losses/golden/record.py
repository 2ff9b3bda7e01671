"""What the golden files hold, computed by any module with k2's functions.

    python tests/losses/golden/record.py [--folder DIR]      # k2's own Python (3.9), see README.md: outputs anew
    python tests/losses/golden/record.py --folder DIR --new 24 [--seed N]     # any Python: cases with random inputs
"""

from __future__ import annotations  # k2's side runs in Python 3.9

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch

INPUTS = ("in_", "mi_px", "mi_py", "mi_w", "jmi_px2", "jmi_py2")
REDUCTIONS = ("none", "mean", "sum")


def load(path):
    """(meta, {name: array}) of one file."""
    with np.load(path) as data:
        return json.loads(str(data["meta"])), {key: data[key] for key in data.files if key != "meta"}


def is_input(key):
    return key.startswith("in_") or key in INPUTS


class Case:
    """The inputs of one file and everything `module` (k2 or cascade.losses.rnnt) makes of them, in `results`."""

    def __init__(self, module, meta, arrays, prune_grads=None, device="cpu"):
        """
        Args:
          meta, arrays: what load returned.
          prune_grads: (px_grad, py_grad) to choose the prune ranges from, instead of the module's own: where two
            windows tie, rounding decides between them.
          device: where it is computed.
        """
        self.module, self.meta, self.arrays, self.prune_grads = module, meta, arrays, prune_grads
        self.results, self.device = {}, device
        self.symbols, self.blank = self.tensor("in_symbols"), meta["termination_symbol"]
        self.boundary = self.tensor("in_boundary") if meta["boundary_passed"] else None
        self.options = {"boundary": self.boundary, "rnnt_type": meta["rnnt_type"]}

    def tensor(self, key, grad=False):
        return torch.from_numpy(self.arrays[key].copy()).to(self.device).requires_grad_(grad)

    def put(self, **values):
        self.results.update({key: value.detach() for key, value in values.items()})

    def put_losses(self, prefix, loss):
        self.put(**{f"{prefix}_loss_{reduction}": loss(reduction=reduction) for reduction in REDUCTIONS})

    def compute(self):
        self._simple("simple", self.module.get_rnnt_logprobs, self.module.rnnt_loss_simple, {})
        scales = {name: self.meta[name] for name in ("lm_only_scale", "am_only_scale")}
        self._simple("smoothed", self.module.get_rnnt_logprobs_smoothed, self.module.rnnt_loss_smoothed, scales)
        self._full()
        for s_range in self.meta["s_ranges"]:
            self._pruned(s_range)
        self._recursion()
        return self.results

    def _simple(self, prefix, log_probs, loss_function, scales):
        lm, am = self.tensor("in_lm", grad=True), self.tensor("in_am", grad=True)
        px, py = log_probs(lm, am, self.symbols, self.blank, **scales, **self.options)

        def loss(reduction, return_grad=False):
            return loss_function(lm, am, self.symbols, self.blank, delay_penalty=self.meta["delay_penalty"],
                                 reduction=reduction, return_grad=return_grad, **scales, **self.options)

        self.put_losses(prefix, loss)
        value, (px_grad, py_grad) = loss(self.meta["grad_reduction"], return_grad=True)
        d_am, d_lm = torch.autograd.grad(value.sum(), (am, lm))
        names = ("px", "py", "px_grad", "py_grad", "d_am", "d_lm")
        values = (px, py, px_grad, py_grad, d_am, d_lm)
        self.put(**{f"{prefix}_{name}": value for name, value in zip(names, values)})  # noqa: B905  (Python 3.9)

    def _with_gradient(self, prefix, loss, logits):
        self.put_losses(prefix, loss)
        value = loss(reduction=self.meta["grad_reduction"]).sum()
        self.put(**{f"{prefix}_d_logits": torch.autograd.grad(value, logits)[0]})

    def _full(self):
        logits = self.tensor("in_logits", grad=True)

        def loss(reduction):
            return self.module.rnnt_loss(logits, self.symbols, self.blank, delay_penalty=self.meta["delay_penalty"],
                                         reduction=reduction, **self.options)

        self._with_gradient("full", loss, logits)

    def _pruned(self, s_range):
        prefix = f"pruned{s_range}"
        grads = self.prune_grads or (self.results["smoothed_px_grad"], self.results["smoothed_py_grad"])
        ranges = self.module.get_rnnt_prune_ranges(*grads, self.tensor("in_boundary"), s_range)
        am, lm = self.module.do_rnnt_pruning(self.tensor("in_am_d"), self.tensor("in_lm_d"), ranges)
        logits = (torch.tanh(am + lm) @ self.tensor("in_W")).requires_grad_()
        arguments = logits, self.symbols, ranges, self.blank
        px, py = self.module.get_rnnt_logprobs_pruned(*arguments, **self.options)
        values = {"ranges": ranges, "am_pruned": am, "lm_pruned": lm, "logits": logits, "px": px, "py": py}
        self.put(**{f"{prefix}_{name}": value for name, value in values.items()})

        def loss(reduction):
            return self.module.rnnt_loss_pruned(*arguments, delay_penalty=self.meta["delay_penalty"],
                                                reduction=reduction, **self.options)

        self._with_gradient(prefix, loss, logits)

    def _recursion(self):
        px, py = self.tensor("mi_px", grad=True), self.tensor("mi_py", grad=True)
        scores, grads = self.module.mutual_information_recursion(px, py, self.boundary, return_grad=True)
        d_px, d_py = torch.autograd.grad((scores * self.tensor("mi_w")).sum(), (px, py))
        self.put(mi_scores=scores, mi_px_grad=grads[0], mi_py_grad=grads[1], mi_d_px=d_px, mi_d_py=d_py)
        pairs = [px, self.tensor("jmi_px2")], [py, self.tensor("jmi_py2")]
        self.put(jmi_scores=self.module.joint_mutual_information_recursion(*pairs, self.boundary))


def rewrite(module, path):
    """Replace the outputs in one file by what `module` computes from its inputs."""
    meta, arrays = load(path)
    results = Case(module, meta, arrays).compute()
    keys = [key for key in arrays if not is_input(key)] or list(results)
    outputs = {key: results[key].numpy() for key in keys}
    np.savez_compressed(path, meta=json.dumps(meta), **{**arrays, **outputs})


def make_inputs(folder, num_cases, seed):
    """Write random cases: sizes, topology, boundaries (also with begin offsets or no path), penalty, scales, type."""
    rng = np.random.default_rng(seed)
    for number in range(num_cases):
        n, t, s, v = (int(rng.integers(low, high)) for low, high in ((1, 5), (4, 40), (1, 12), (3, 30)))
        t = max(t, s)  # k2 refuses batches with T < S
        rnnt_type = ("regular", "modified", "constrained")[number % 3]
        dtype = "float64" if number % 2 else "float32"
        shortest = 1 if number % 5 == 4 else min(s + 1, t)  # some without a path
        t_end, s_end = rng.integers(shortest, t + 1, n), rng.integers(1, s + 1, n)
        begin = np.zeros((2, n), int)
        if number % 4 == 3:
            begin = rng.integers(0, s_end), rng.integers(0, np.maximum(1, t_end - s_end))
        meta = {
            "rnnt_type": rnnt_type, "dtype": dtype, "boundary_passed": True, "grad_reduction": "sum",
            "delay_penalty": float(rng.choice([0.0, 0.01])), "lm_only_scale": float(rng.choice([0.0, 0.25])),
            "am_only_scale": float(rng.choice([0.0, 0.1])), "s_ranges": [int(rng.integers(2, 7))],
            "termination_symbol": int(rng.choice([0, v - 1])),
        }
        width = t + 1 if rnnt_type == "regular" else t
        scores, pairs = (0, 2), (-1, 1)  # mean, deviation
        arrays = {
            "in_am": (scores, n, t, v), "in_lm": (scores, n, s + 1, v), "in_logits": (scores, n, t, s + 1, v),
            "in_am_d": ((0, 1), n, t, 6), "in_lm_d": ((0, 1), n, s + 1, 6), "in_W": ((0, 1), 6, v),
            "mi_px": (pairs, n, s, width), "mi_py": (pairs, n, s + 1, t), "mi_w": ((0, 1), n),
            "jmi_px2": (pairs, n, s, width), "jmi_py2": (pairs, n, s + 1, t),
        }
        np.savez(
            folder / f"case{number:03d}.npz", meta=json.dumps(meta), in_symbols=rng.integers(0, v, (n, s)),
            in_boundary=np.stack([*begin, s_end, t_end], axis=1).astype(np.int64),
            **{key: rng.normal(*values, shape).astype(dtype) for key, (values, *shape) in arrays.items()},
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--new", type=int, metavar="N", help="make so many cases without outputs")
    parser.add_argument("--seed", type=int, help="default: a new one, printed")
    arguments = parser.parse_args()
    if arguments.new:
        seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
        print(f"{arguments.new} cases with seed {seed}")
        make_inputs(arguments.folder, arguments.new, seed)
        return
    import k2

    for path in sorted(arguments.folder.glob("case*.npz")):
        rewrite(k2, path)
        print(path.name)


if __name__ == "__main__":
    main()
