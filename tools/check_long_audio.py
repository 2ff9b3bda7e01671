"""Check that an hour of audio costs the memory of a minute and keeps its times.

All utterances of a manifest, with pauses of quiet noise between them, make one cycle, a whole number of decoding blocks
long; one stream hears cycle after cycle until it has --minutes. Since it remembers a finite past, every cycle after the
first must say the same at the same times: the differences are the drift. Exit code 1 for more than --max-growth-mb of
memory after the first cycle or more than 40 ms of drift.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.device_arguments import open_device  # noqa: E402
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values  # noqa: E402
from cascade.config.options import ENCODER_FRAME_MS, ConfigError  # noqa: E402
from cascade.corpus.cuts import Speech, read_speech  # noqa: E402
from cascade.measure.memory import resident_bytes  # noqa: E402
from cascade.measure.wer import score  # noqa: E402
from cascade.processes.exits import EXIT_FAILED  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.recognizer import Recognizer  # noqa: E402
from cascade.search.methods import METHODS, STREAMING_MODES  # noqa: E402
from cascade.stream.words import Word, join_words  # noqa: E402
from cascade.text.tokens import Tokenizer  # noqa: E402
from tools.check_streaming import open_recognizer  # noqa: E402

_QUIET = 2e-4
_SHORTEST_PAUSE, _LONGEST_PAUSE = 1.5, 2.5
_LEAD = 0.4
"""Seconds before an utterance from which on a word is counted as its own; a cycle begins there."""


class Cycle(NamedTuple):
    """The utterances once, one after the other; starts in samples."""

    speech: list[Speech]
    samples: np.ndarray
    starts: list[int]


def make_cycle(speech: list[Speech], rate: int, block_ms: int, seed: int) -> Cycle:
    """Utterances with pauses between, and behind the last one, up to a whole number of blocks."""
    generator = np.random.default_rng(seed)
    parts, starts, position = [], [], 0
    for utterance in speech:
        pause = round((generator.uniform(_SHORTEST_PAUSE, _LONGEST_PAUSE) if starts else _LEAD) * rate)
        starts.append(position + pause)
        parts += [np.zeros(pause, np.float32), utterance.samples]
        position += pause + len(utterance.samples)
    block = rate * block_ms // 1000
    rest = round(_SHORTEST_PAUSE * rate)
    samples = np.concatenate([*parts, np.zeros(rest + -(position + rest) % block, np.float32)])
    return Cycle(speech, samples + (_QUIET * generator.standard_normal(len(samples))).astype(np.float32), starts)


def stream_cycles(recognizer: Recognizer, cycle: Cycle, num_cycles: int) -> tuple[list[Word], list[float]]:
    """The words of so many cycles, heard second by second, and the resident megabytes after every minute."""
    stream, rate = recognizer.stream(keep_segments=False), recognizer.sampling_rate
    words: list[Word] = []
    resident_mb = []
    for number, start in enumerate(range(0, num_cycles * len(cycle.samples), rate), 1):
        places = np.arange(start, min(start + rate, num_cycles * len(cycle.samples)))
        partial = stream.accept(cycle.samples.take(places, mode="wrap"), rate)
        words += [word for segment in partial.segments for word in segment.words]
        if number % 60 == 0:
            resident_mb.append(resident_bytes()[0] / 1e6)
    return [*words, *stream.finish().words], resident_mb


def words_by_utterance(words: list[Word], cycle: Cycle, rate: int, num_cycles: int) -> list[list[list[Word]]]:
    """words[k][i]: those of utterance i in cycle k, by their start."""
    length = len(cycle.samples) / rate
    lead = _LEAD + ENCODER_FRAME_MS / 2000  # a word that starts with the cycle is in it, whatever rounding does
    starts = np.array([k * length + start / rate - lead for k in range(num_cycles) for start in cycle.starts])
    heard: list[list[list[Word]]] = [[[] for _ in cycle.speech] for _ in range(num_cycles)]
    for word in words:
        place = max(0, int(np.searchsorted(starts, word.start, side="right")) - 1)
        heard[place // len(cycle.speech)][place % len(cycle.speech)].append(word)
    return heard


def drift_of(heard: list[list[list[Word]]], cycle_seconds: float) -> tuple[float, int]:
    """(largest time difference in seconds, utterances whose words differ) of all cycles to the second one."""
    largest, different = 0.0, 0
    for number, cycle in enumerate(heard[2:], start=1):
        shift = number * cycle_seconds
        for first, later in zip(heard[1], cycle, strict=True):
            if [word.word for word in first] != [word.word for word in later]:
                different += 1
                continue
            for left, right in zip(first, later, strict=True):
                largest = max(largest, abs(right.start - left.start - shift), abs(right.end - left.end - shift))
    return largest, different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, cpu_only=True)
    add_search_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="CUTS.jsonl.gz or MANIFEST.jsonl")
    parser.add_argument("--mode", choices=STREAMING_MODES, default="two_pass")
    parser.add_argument("--method", choices=METHODS, default="greedy_search")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="at least this long (default 60)")
    parser.add_argument("--max-growth-mb", type=float, default=20.0, metavar="MB", help="allowed (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the pauses (default 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the row here")
    arguments = parser.parse_args()
    check_values(arguments, epoch=1, avg=1, threads=1)
    if not arguments.minutes > 0:
        raise ConfigError(f"--minutes must be positive, got {arguments.minutes}")
    open_device(arguments, "the memory of this process is watched, not a GPU's")
    recognizer = open_recognizer(arguments, mode=arguments.mode, method=arguments.method, device="cpu")
    tokenizer, rate = Tokenizer.load(arguments.exp_dir / "tokens"), recognizer.sampling_rate
    cycle = make_cycle(read_speech(arguments.manifest, rate), rate, arguments.look_ahead_ms, arguments.seed)
    seconds = len(cycle.samples) / rate
    num_cycles = max(3, math.ceil(60 * arguments.minutes / seconds))
    start = time.process_time()
    words, resident_mb = stream_cycles(recognizer, cycle, num_cycles)
    compute = time.process_time() - start
    heard = words_by_utterance(words, cycle, rate, num_cycles)
    drift, different = drift_of(heard, seconds)
    later_mb = [value for minute, value in enumerate(resident_mb, 1) if 60 * minute >= seconds]
    row = {
        "mode": arguments.mode, "method": arguments.method, "minutes": round(num_cycles * seconds / 60, 1),
        "num_cycles": num_cycles, "num_words": len(words), "num_utterances_that_differ": different,
        "wer_of_cycles": [
            score(
                (utterance.id, tokenizer.normalize(utterance.text), join_words(said))
                for utterance, said in zip(cycle.speech, utterances, strict=True)
            ).words.percent for utterances in heard
        ],
        "drift_ms": round(1000 * drift, 3), "growth_mb": round(max(later_mb) - later_mb[0], 1),
        "resident_mb_after_first_cycle": round(later_mb[0], 1), "rtf": round(compute / (num_cycles * seconds), 4),
        "commit": git_commit(), "command": command_line(), "machine": machine(),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    print(*(f"{name}: {value}" for name, value in row.items()), sep="\n")
    if row["growth_mb"] > arguments.max_growth_mb or row["drift_ms"] > ENCODER_FRAME_MS:
        print("error: memory or times are not steady", file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    run_program(main)
