"""Does an hour of audio cost the memory of a minute, keep its times, and say what its utterances say alone?

All utterances of a manifest, with pauses of quiet noise between them, make one cycle, a whole number of decoding blocks
long; cycles follow each other until the recording has --minutes, and `transcribe`'s own loop decodes its file. Since a
stream remembers a finite past, every cycle after the first must say the same at the same times: the differences are the
drift. Exit code 1 for more than --max-growth-mb of memory after the first cycle or more than 40 ms of drift.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import (  # noqa: E402
    add_model_arguments,
    add_search_arguments,
    check_values,
    load_for_decoding,
)
from cascade.config.options import ENCODER_FRAME_MS, ConfigError  # noqa: E402
from cascade.measure.wer import score  # noqa: E402
from cascade.processes.exits import EXIT_FAILED, Interrupted  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.search.methods import METHODS, STREAMING_MODES  # noqa: E402
from cascade.stream.batch import StreamBatch  # noqa: E402
from cascade.stream.decoder import StreamingDecoder  # noqa: E402
from cascade.stream.endpoint import EndpointOptions  # noqa: E402
from cascade.stream.inputs import PipeStop  # noqa: E402
from cascade.stream.transcripts import transcribe  # noqa: E402
from cascade.stream.words import Word, join_words  # noqa: E402
from cascade.text.tokens import Tokenizer  # noqa: E402
from tools.check_streaming import Recording, read_recordings, score_all, stream_all  # noqa: E402

MAX_DRIFT_MS = ENCODER_FRAME_MS
_QUIET = 2e-4
_SHORTEST_PAUSE, _LONGEST_PAUSE = 1.5, 2.5
_LEAD = 0.4
"""Seconds before an utterance from which on a word is counted as its own; a cycle begins there."""


@dataclass
class Cycle:
    """The utterances once, one after the other; starts in samples."""

    recordings: list[Recording]
    samples: np.ndarray
    starts: list[int]


@dataclass
class Watch:
    """Notes this process's memory after every minute of audio."""

    resident_mb: list[float] = field(default_factory=list)
    num_runs: int = 0

    def __call__(self, job: Any) -> None:
        self.num_runs += 1
        if self.num_runs % 60 == 0:  # a run of the batch hears a second
            self.resident_mb.append(_resident_mb())


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def make_cycle(recordings: list[Recording], rate: int, block_ms: int, seed: int) -> Cycle:
    """Utterances with pauses between, and behind the last one, up to a whole number of blocks."""
    generator = np.random.default_rng(seed)
    parts, starts, position = [], [], 0
    for recording in recordings:
        pause = round((generator.uniform(_SHORTEST_PAUSE, _LONGEST_PAUSE) if starts else _LEAD) * rate)
        starts.append(position + pause)
        parts += [np.zeros(pause, np.float32), recording.samples]
        position += pause + len(recording.samples)
    block = rate * block_ms // 1000
    rest = round(_SHORTEST_PAUSE * rate)
    parts.append(np.zeros(rest + -(position + rest) % block, np.float32))
    samples = np.concatenate(parts)
    return Cycle(recordings, samples + (_QUIET * generator.standard_normal(len(samples))).astype(np.float32), starts)


def write_cycles(path: Path, cycle: Cycle, rate: int, num_cycles: int) -> None:
    """A 16-bit WAV file."""
    data = (cycle.samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        for _ in range(num_cycles):
            file.writeframes(data)


def words_by_utterance(words: list[Word], cycle: Cycle, rate: int, num_cycles: int) -> list[list[list[Word]]]:
    """words[k][i]: those of utterance i in cycle k, by their start."""
    length = len(cycle.samples) / rate
    lead = _LEAD + ENCODER_FRAME_MS / 2000  # a word that starts with the cycle is in it, whatever rounding does
    starts = np.array([k * length + start / rate - lead for k in range(num_cycles) for start in cycle.starts])
    found: list[list[list[Word]]] = [[[] for _ in cycle.recordings] for _ in range(num_cycles)]
    for word in words:
        place = max(0, int(np.searchsorted(starts, word.start, side="right")) - 1)
        found[place // len(cycle.recordings)][place % len(cycle.recordings)].append(word)
    return found


def drift_of(found: list[list[list[Word]]], cycle_seconds: float) -> tuple[float, int]:
    """(largest time difference in seconds, utterances whose words differ) of all cycles to the second one."""
    largest, different = 0.0, 0
    for number, cycle in enumerate(found[2:], start=1):
        for one, other in zip(found[1], cycle, strict=True):
            if [word.word for word in one] != [word.word for word in other]:
                different += 1
                continue
            for left, right in zip(one, other, strict=True):
                shift = number * cycle_seconds
                largest = max(largest, abs(right.start - left.start - shift), abs(right.end - left.end - shift))
    return largest, different


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, cpu_only=True)
    add_search_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="MANIFEST.jsonl")
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
    return arguments


def judge(
    words: list[Word], watch: Watch, cycle: Cycle, num_cycles: int, rate: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What the row says about the long recording."""
    seconds = len(cycle.samples) / rate
    found = words_by_utterance(words, cycle, rate, num_cycles)
    scores = [
        score(
            (item.id, tokenizer.normalize(item.text), join_words(heard))
            for item, heard in zip(cycle.recordings, cycle_words, strict=True)
        ).words.percent
        for cycle_words in found
    ]
    drift, different = drift_of(found, seconds)
    after = [number for number in range(len(watch.resident_mb)) if (number + 1) * 60 >= seconds]
    first = watch.resident_mb[after[0]]
    return {
        "minutes": round(num_cycles * seconds / 60, 1),
        "num_cycles": num_cycles,
        "num_words": len(words),
        "wer_of_cycles": scores,
        "num_utterances_that_differ": different,
        "drift_ms": round(1000 * drift, 3),
        "resident_mb_after_first_cycle": round(first, 1),
        "growth_mb": round(max(watch.resident_mb[place] for place in after) - first, 1),
        "resident_mb_per_minute": [round(value, 1) for value in watch.resident_mb],
    }


def main() -> None:
    arguments = parse_arguments()
    model, config, tokenizer, options = load_for_decoding(
        arguments, arguments.mode, why_cpu="the memory of this process is watched, not a GPU's",
        method=arguments.method, beam=arguments.beam,
    )
    rate = config.features.sampling_rate
    recordings = read_recordings(arguments.manifest, rate, 0.0)
    cycle = make_cycle(recordings, rate, options.look_ahead_ms, arguments.seed)
    num_cycles = max(3, math.ceil(60 * arguments.minutes * rate / len(cycle.samples)))
    batch, watch = StreamBatch(model, tokenizer, options, EndpointOptions()), Watch()

    def new_decoder() -> StreamingDecoder:
        return StreamingDecoder(model, config, tokenizer, batch=batch)

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, PipeStop() as stop:
        path = Path(folder) / "long.wav"
        write_cycles(path, cycle, rate, num_cycles)
        transcripts = list(transcribe([str(path)], rate, new_decoder, 1, None, watch, stop))
    if stop.asked:
        raise Interrupted("nothing was measured")
    if transcripts[0].error is not None:
        raise ValueError(transcripts[0].error)
    compute = time.process_time() - start
    words = [word for segment in transcripts[0].segments for word in segment.words]
    row = {"mode": options.mode, "method": options.method, "blank_penalty": options.blank_penalty}
    row |= judge(words, watch, cycle, num_cycles, rate, tokenizer)
    alone = stream_all(new_decoder, batch, recordings, rate, num_streams=4, seed=arguments.seed)
    row |= {
        "wer_single_files": score_all(recordings, alone, tokenizer).words.percent,
        "rtf": round(compute / (num_cycles * len(cycle.samples) / rate), 4),
        "model": arguments.exp_dir.resolve().name, "device": model.device.type,
        "commit": git_commit(), "command": command_line(), "machine": machine(),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    for name, value in row.items():
        print(f"{name}: {value}")
    if row["growth_mb"] > arguments.max_growth_mb or row["drift_ms"] > MAX_DRIFT_MS:
        print("error: memory or times are not steady", file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    run_program(main)
