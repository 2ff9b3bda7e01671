"""Parts that every program shares: exit codes, one-sentence errors, options from YAML files and `section.key=value`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 interrupted by a signal after saving (run again to go on).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from cascade.config.options import Config, ConfigError
from cascade.log import setup_logging
from cascade.processes.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, Interrupted
from cascade.processes.signals import catching, interrupt


def run_program(main: Callable[[], None]) -> None:
    """Run `main`; turn what a user can cause into one sentence on stderr and the right exit code.

    SIGTERM and a closed terminal interrupt it as Ctrl-C does, where it does not catch them itself.

    CASCADE_DEBUG=1 shows the traceback instead.
    """
    setup_logging()
    try:
        with catching(interrupt, (signal.SIGTERM, signal.SIGHUP)):
            try:
                main()
            except ImportError as error:  # a compiled module that is being loaded makes this of any other
                if _was_interrupted(error):
                    raise KeyboardInterrupt from error
                raise
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would fail again
        print("interrupted: nobody reads standard output any more", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("CASCADE_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error began as an interruption."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE...` and positional `section.key=value` overrides."""
    parser.add_argument("--config", nargs="+", default=[], metavar="YAML", help="config files, later ones win")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single options")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a training reads: --data, --tokens, --teacher, --init-from, --alignment."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="features, what compute_features wrote")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="what train_tokens wrote")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="the teacher's --exp-dir, for distillation")
    parser.add_argument(
        "--init-from", type=Path, metavar="CHECKPOINT",
        help="start from this model: an --exp-dir (its averaged.pt) or an epoch-N.pt in one; the encoders and features "
        "of the config must be its own, symbols that both vocabularies have keep their rows",
    )
    parser.add_argument(
        "--alignment", type=Path, metavar="CTM",
        help="where the training words lie, what align wrote of DIR/train_cuts.jsonl.gz; for augment.recombine_share",
    )


def config_from_arguments(arguments: argparse.Namespace) -> Config:
    """The config that `add_config_arguments`'s options describe.

    `--config a.yaml b.yaml x.y=1` is accepted too: what has an '=' is an override.
    """
    from cascade.config.load import load_config

    files = [word for word in arguments.config if "=" not in word]
    overrides = [word for word in arguments.config if "=" in word] + arguments.overrides
    return load_config(files, overrides)
