#!/usr/bin/env python
"""Measure training steps of a conf: python tools/bench_train.py --config A.yaml --data DIR --tokens DIR --json FILE.

Both optimizers, each with products in float32 and in bfloat16, take turns on the same batches, spread over all lengths,
in one process and in as many as --num-processes says, each with --threads. A row of --json holds seconds of speech,
padding not counted, per second and per second of processor time, and the share of the matrix product's peak: the
floating-point operations of the products of a step, per second, against those of a product of two 1024 x 1024 float32
matrices measured between the steps. On a busy machine the rows of one call can be compared with each other, not with
those of another day.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import add_config_arguments, add_input_arguments, config_from_arguments, run_program  # noqa: E402
from cascade.config.options import Config  # noqa: E402
from cascade.data.batches import FRAMES_PER_SECOND  # noqa: E402
from cascade.losses.backends import set_backend  # noqa: E402
from cascade.processes.group import Processes  # noqa: E402
from cascade.processes.launch import is_worker, run_workers  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.threads import limit_threads  # noqa: E402
from cascade.training.run_inputs import RunPaths, build_trainer, check_options, read_inputs  # noqa: E402
from cascade.training.trainer import Trainer  # noqa: E402

ARMS = [(optimizer, precision) for precision in ("float32", "bfloat16") for optimizer in ("adamw", "muon")]
SIDE = 1024
NOT_COUNTED = {
    torch.ops.aten.addmm_: lambda total, left, right, **more: 2 * left[0] * left[1] * right[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda query, key, value, *more, **options: sdpa_flop_count(query, key, value),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, query, key, value, *more, **options: sdpa_backward_flop_count(grad, query, key, value),
}
"""What torch's counter takes for 0: the joiner's sums of gradients, and attention on a CPU."""


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    marks = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - marks[0], time.process_time() - marks[1]


def spread_batches(trainer: Trainer, count: int) -> list[np.ndarray]:
    """Choose so many batches of the epoch, from the smallest to the largest by their number of frames."""
    plan = trainer.train_batches.plan()
    frames = [sum(trainer.train_batches.utterances[index].num_frames for index in indices) for indices in plan]
    order = np.argsort(frames, kind="stable")
    return [plan[order[place]] for place in np.linspace(0, len(plan) - 1, count).round().astype(int)]


def measure(config: Config, paths: RunPaths, num_steps: int, processes: Processes) -> list[dict[str, Any]]:
    """One row per optimizer and precision, for all processes together."""
    inputs, trainers = read_inputs(paths, config), {}
    for arm in ARMS:
        training = dataclasses.replace(config.training, optimizer=arm[0], precision=arm[1])
        trainers[arm] = build_trainer(dataclasses.replace(config, training=training), paths, inputs, {}, processes)
        trainers[arm].model.train()
    first = trainers[ARMS[0]]
    first.train_batches.set_epoch(config.data.sorted_epochs + 1)
    plan = spread_batches(first, num_steps + 1)
    left, right = torch.randn(2, SIDE, SIDE)
    spent = {arm: np.zeros(2) for arm in (*ARMS, "product")}
    flops, frames = dict.fromkeys(ARMS, 0), 0
    for step, indices in enumerate([plan[-1], *plan[:-1]]):  # the first compiles and allocates: it does not count
        batch = first.train_batches.load(indices)
        for arm in ARMS if step % 2 else ARMS[::-1]:
            processes.barrier()
            used = seconds_of(partial(trainers[arm].take_step.attempt, batch, step, 0.01, num_parts=1))
            if step:
                spent[arm] += used
        if step:
            spent["product"] += seconds_of(partial(torch.mm, left, right))
            frames += int(batch.feature_lens.sum())
        if step == num_steps // 2 + 1:  # of a batch of middle size, in proportion to its frames
            for arm in ARMS:
                with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED) as counter:
                    trainers[arm].take_step.attempt(batch, step, 0.01, num_parts=1)
                flops[arm] = counter.get_total_flops() / int(batch.feature_lens.sum())
    peak = 2 * SIDE**3 * num_steps / spent["product"][1]
    speech = processes.sum([frames / FRAMES_PER_SECOND])[0]
    rows = []
    for arm in ARMS:
        wall, cpu = processes.max(spent[arm][0]), processes.sum([spent[arm][1]])[0]
        rows.append({
            "optimizer": arm[0], "precision": arm[1], "processes": processes.world_size,
            "threads": torch.get_num_threads(), "steps": num_steps, "speech_per_second": round(speech / wall, 2),
            "speech_per_cpu_second": round(speech / cpu, 2),
            "share_of_peak": round(flops[arm] * speech * FRAMES_PER_SECOND / cpu / peak, 3),
            "peak_gflops": round(peak / 1e9, 1), "commit": git_commit(), "command": command_line(),
            "machine": machine(processes.device),
        })
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    add_input_arguments(parser)
    parser.add_argument("--num-processes", type=int, default=2, metavar="N", help="besides one process (default 2)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of each process (default 1)")
    parser.add_argument("--num-steps", type=int, default=20, metavar="N", help="of each kind (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    arguments = parser.parse_intermixed_args()
    config = config_from_arguments(arguments)
    paths = RunPaths.from_arguments(arguments)
    check_options(config, paths)
    set_backend(config.loss.backend)
    torch.set_flush_denormal(True)
    limit_threads(arguments.threads)
    processes = Processes.from_environment("cpu")
    rows = measure(config, paths, arguments.num_steps, processes)
    if not processes.is_first:
        processes.close()
        return
    for row in rows:
        logging.info("%(optimizer)s, %(precision)s, %(processes)d process(es) of %(threads)d thread(s): "
                     "%(speech_per_second)g s of speech per second, %(speech_per_cpu_second)g per second of processor "
                     "time, %(share_of_peak)g of the peak", row)
    if arguments.json is not None:
        before = json.loads(arguments.json.read_text()) if is_worker() and arguments.json.is_file() else []
        arguments.json.write_text(json.dumps(before + rows, indent=2) + "\n")
    processes.close()
    if not is_worker() and arguments.num_processes > 1 and (code := run_workers(arguments.num_processes, sys.argv[:1])):
        sys.exit(code)


if __name__ == "__main__":
    run_program(main)
