"""Compare what streams say with what whole recordings say: every utterance, in every mode and by both searches.

`decode` says the whole recordings, in padded batches under the masks of streaming. The streams hear raw samples in
packets of random sizes; several streams of different age share a batch, which they join and leave. The final text of
mode two_pass is compared with mode full. Exit code 1 if a token or a timestamp differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin import decode  # noqa: E402
from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values  # noqa: E402
from cascade.config.options import ENCODER_FRAME_MS  # noqa: E402
from cascade.corpus.cuts import Speech, read_speech  # noqa: E402
from cascade.processes.exits import EXIT_FAILED  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.recognizer import Recognizer  # noqa: E402
from cascade.search.methods import METHODS, STREAMING_MODES  # noqa: E402
from cascade.stream.decoder import Final  # noqa: E402
from cascade.text.tokens import Tokenizer  # noqa: E402


def packets(samples: np.ndarray, rng: random.Random) -> Iterator[np.ndarray]:
    """One sample to one second at a time; half of the packets have 100 ms or less."""
    start = 0
    while start < len(samples):
        size = rng.choice([rng.randint(1, 1600), rng.randint(1, 16000), 1, 480])
        yield samples[start : start + size]
        start += size


def open_recognizer(arguments: argparse.Namespace, **options: Any) -> Recognizer:
    """The model that the options name."""
    for name in ("beam", "chunk_ms", "look_ahead_ms", "left_context_ms", "blank_penalty"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    return Recognizer(
        arguments.exp_dir, epoch=arguments.epoch, average=arguments.avg, threads=arguments.threads, **options
    )


def stream_all(recognizer: Recognizer, speech: list[Speech], num_streams: int, seed: int) -> dict[str, Final]:
    """Stream utterances in a random order, up to `num_streams` at once: each waits, hears a packet, or ends."""
    rng, finals = random.Random(seed), {}
    waiting, active = rng.sample(speech, len(speech)), {}
    while waiting or active:
        while waiting and len(active) < num_streams:
            utterance = waiting.pop()
            active[utterance.id] = recognizer.stream(), packets(utterance.samples, rng)
        ended = []
        for name, (stream, rest) in active.items():
            if rng.random() < 0.3:
                continue
            packet = next(rest, None)
            if packet is None:
                stream.end()
                ended.append(name)
            else:
                stream.push(packet, recognizer.sampling_rate)
        recognizer.advance()
        finals |= {name: active.pop(name)[0].final() for name in ended}
    return finals


def decode_all(arguments: argparse.Namespace, out: Path) -> None:
    """Let `decode` write OUT/MODE-METHOD for every mode and method."""
    words = ["--manifest", arguments.manifest, "--mode", "all", "--method", "all", "--out", out]
    for name in ("exp_dir", "epoch", "avg", "beam", "chunk_ms", "look_ahead_ms", "left_context_ms", "blank_penalty",
                 "threads", "device"):
        if getattr(arguments, name) is not None:
            words += [f"--{name.replace('_', '-')}", getattr(arguments, name)]
    decode.main(list(map(str, words)))


def compare(finals: dict[str, Final], decoded: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Count the utterances and tokens of hyps.jsonl that the streams say alike; different ones are logged."""
    lines = [json.loads(line) for line in decoded.read_text(encoding="utf-8").splitlines()]
    num_identical = num_tokens = 0
    for line in lines:
        streamed = [
            (tokenizer.id_to_symbol(token), round((segment.first_frame + frame) * ENCODER_FRAME_MS / 1000, 2))
            for segment in finals[line["id"]].segments
            for token, frame in zip(segment.hypotheses[0].tokens, segment.hypotheses[0].timestamps, strict=True)
        ]
        whole = list(zip(line["tokens"], line["timestamps"], strict=True))
        num_tokens += len(whole)
        num_identical += streamed == whole
        if streamed != whole:
            logging.warning("%s: streamed %s, decoded %s", line["id"], streamed, whole)
    return {"num_utterances": len(lines), "num_tokens": num_tokens, "num_identical": num_identical}


def conclude(rows: list[dict[str, Any]], total: str, difference: str, file: Path | None) -> None:
    """Write the rows; exit with code 1 if fewer are identical than row[total]."""
    if file is not None:
        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if any(row["num_identical"] < row[total] for row in rows):
        print(f"error: {difference}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_search_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="CUTS.jsonl.gz or MANIFEST.jsonl")
    parser.add_argument("--modes", nargs="+", choices=STREAMING_MODES, default=STREAMING_MODES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--num-streams", type=int, default=6, metavar="N", help="streams at once (default 6)")
    parser.add_argument("--seed", type=int, default=1, help="of packets and of the streams' order (default 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    arguments = parser.parse_args()
    check_values(arguments, epoch=1, avg=1, num_streams=1, threads=1)
    rows, tokenizer = [], Tokenizer.load(arguments.exp_dir / "tokens")
    with tempfile.TemporaryDirectory() as folder:
        decode_all(arguments, Path(folder))
        for mode, method in product(arguments.modes, arguments.methods):
            recognizer = open_recognizer(arguments, mode=mode, method=method, endpoint=None, device=arguments.device)
            speech = read_speech(arguments.manifest, recognizer.sampling_rate)
            finals = stream_all(recognizer, speech, arguments.num_streams, arguments.seed)
            decoded = Path(folder) / f"{'full' if mode == 'two_pass' else mode}-{method}"
            wer = json.loads((decoded / "result.json").read_text())["wer"]
            row = {"mode": mode, "method": method, **compare(finals, decoded / "hyps.jsonl", tokenizer), "wer": wer}
            rows.append(row | {"commit": git_commit(), "command": command_line(), "machine": machine()})
            print(f"{mode:<11}{method:<22}{row['num_identical']:>5} of {row['num_utterances']} identical, WER {wer}")
    conclude(rows, "num_utterances", "what was streamed differs from what was decoded at once", arguments.json)


if __name__ == "__main__":
    run_program(main)
