"""Plan a student: keep the non-causal encoder, cut the causal encoder and the predictor to a share of the teacher.

Prints an exact parameter table and writes the student's YAML, with a distillation section, to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import check_values
from cascade.config.load import changed_options, load_config, save_options
from cascade.config.options import Config, DistillationConfig
from cascade.models.compress import config_params, plan_student


def parameter_table(teacher: Config, student: Config, vocab_size: int) -> str:
    """Parameters by part, teacher, student and ratio, as aligned text."""
    sizes = [config_params(config, vocab_size) for config in (teacher, student)]
    rows = [f"{'part':<20}{'teacher':>14}{'student':>14}{'ratio':>8}"]
    for part, size in sizes[0].items():
        rows.append(f"{part:<20}{size:>14,}{sizes[1][part]:>14,}{sizes[1][part] / size:>8.3f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", nargs="+", required=True, metavar="YAML", help="the teacher's config files")
    parser.add_argument("--target", type=float, default=0.5, help="student / teacher parameters (default: 0.5)")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="tokens with blank (default: tokens.vocab_size)")
    parser.add_argument("--out", type=Path, metavar="YAML", help="write the student's config here")
    arguments = parser.parse_args()
    check_values(arguments, vocab_size=3)
    teacher = load_config(arguments.teacher)
    vocab_size = arguments.vocab_size or teacher.tokens.vocab_size
    student = plan_student(teacher, arguments.target, vocab_size)
    print(parameter_table(teacher, student, vocab_size))
    changes = changed_options(teacher, student)
    print("changed: " + ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items()))
    if arguments.out:
        options = changed_options(Config(), dataclasses.replace(student, distillation=DistillationConfig()))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        save_options({name: new for name, (_, new) in options.items()}, arguments.out)
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_program(main)
