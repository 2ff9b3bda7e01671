"""Find the largest data.batch_duration of a training that fits into this machine's memory.

Give it the --config, overrides, --data, --tokens, --teacher and --init-from of the real command. It takes real steps,
with the optimizer and the teacher if there is one, on the batches of the corpus that need the most: most frames, most
lattice cells, longest utterance. A tenth of the memory is left free. It prints the number of seconds and writes
nothing. With --num-processes the real command gives each process a GPU of its own, or a share of the cores: on CPUs,
which share one memory, divide by their number.
"""

from __future__ import annotations

import argparse
import math

from cascade.bin.cli import add_config_arguments, add_input_arguments, config_from_arguments, run_program
from cascade.bin.device_arguments import add_device_argument, open_device
from cascade.bin.model_arguments import check_values
from cascade.losses.backends import set_backend
from cascade.processes.group import Processes
from cascade.training.max_batch import largest_batch
from cascade.training.run_inputs import RunPaths, build_trainer, check_options, read_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    add_input_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    arguments = parser.parse_intermixed_args()
    check_values(arguments, threads=1)
    config = config_from_arguments(arguments)
    paths = RunPaths.from_arguments(arguments)
    check_options(config, paths)
    processes = Processes(device=open_device(arguments))
    set_backend(config.loss.backend, processes.device)
    trainer = build_trainer(config, paths, read_inputs(paths, config), {}, processes)
    best = largest_batch(trainer)
    print(f"data.batch_duration={math.floor(10 * best.batch_duration) / 10:.15g}")  # never more than what was tried


if __name__ == "__main__":
    run_program(main)
