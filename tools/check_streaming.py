"""Does a stream say what the whole recording says? Every utterance of a manifest, in every mode and by both searches.

Streamed: raw samples in packets of random sizes into StreamingDecoder, several streams of different age in one batch
that they join and leave. Simulated: what `decode` does, whole-file features in padded batches under the masks of
streaming. Both hear the same tail of zeros after the last sample. Mode two_pass is compared by its final text, with the
simulated mode full. Exit code 1 if a token or a timestamp differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.audio.fbank import compute_fbank  # noqa: E402
from cascade.audio.io import read_audio  # noqa: E402
from cascade.bin.cli import EXIT_FAILED, run_program  # noqa: E402
from cascade.bin.model_arguments import (  # noqa: E402
    add_model_arguments,
    add_search_arguments,
    check_at_least,
    load_for_decoding,
)
from cascade.corpus.manifests import Utterance, read_manifest  # noqa: E402
from cascade.data.batches import collate  # noqa: E402
from cascade.measure.wer import Score, score  # noqa: E402
from cascade.models.torch_engine import TorchEngine, decode_batch  # noqa: E402
from cascade.models.transducer import CascadedTransducer  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.search.methods import METHODS, STREAMING_MODES, DecodingOptions, build_search  # noqa: E402
from cascade.stream.batch import StreamBatch  # noqa: E402
from cascade.stream.decoder import Final, StreamingDecoder  # noqa: E402
from cascade.text.tokens import Tokenizer  # noqa: E402

Said = list[tuple[int, int]]
"""(token, 40 ms frame from the recording's start)."""


@dataclass(frozen=True)
class Recording:
    """One utterance of the manifest; samples (num_samples,) float32 with the tail of zeros."""

    id: str
    text: str
    samples: np.ndarray


def read_recordings(manifest: Path, sampling_rate: int, tail_seconds: float) -> list[Recording]:
    """Every utterance of a MANIFEST.jsonl.

    Raises:
      ValueError: a line or recording that is unusable, or none at all.
    """
    tail = np.zeros(round(tail_seconds * sampling_rate), np.float32)
    recordings = []
    for line in read_manifest(manifest):
        if not isinstance(line, Utterance):
            raise ValueError(f"{manifest}: {line.id}: {line.reason}")
        samples, _ = read_audio(line.path, sampling_rate, line.start, line.end)
        recordings.append(Recording(line.id, line.text, np.concatenate((samples, tail))))
    if not recordings:
        raise ValueError(f"{manifest} holds no utterance")
    return recordings


def packets(samples: np.ndarray, rng: random.Random) -> Iterator[np.ndarray]:
    """One sample to one second at a time; half of the packets have 100 ms or less."""
    start = 0
    while start < len(samples):
        size = rng.choice([rng.randint(1, 1600), rng.randint(1, 16000), 1, 480])
        yield samples[start : start + size]
        start += size


def said(final: Final) -> Said:
    return [
        (token, segment.first_frame + frame)
        for segment in final.segments
        for token, frame in zip(segment.hypotheses[0].tokens, segment.hypotheses[0].timestamps, strict=True)
    ]


def stream_all(
    new_decoder: Any, batch: StreamBatch, recordings: list[Recording], sampling_rate: int, num_streams: int, seed: int
) -> list[Said]:
    """Stream the recordings in a random order, up to `num_streams` at once: each waits, hears a packet, or ends."""
    rng = random.Random(seed)
    waiting = list(enumerate(recordings))
    rng.shuffle(waiting)
    active: list[tuple[int, StreamingDecoder, Iterator[np.ndarray]]] = []
    found: list[Said] = [[] for _ in recordings]
    while waiting or active:
        while waiting and len(active) < num_streams:
            place, recording = waiting.pop()
            active.append((place, new_decoder(), packets(recording.samples, rng)))
        ended = []
        for entry in active:
            if rng.random() < 0.3:
                continue
            packet = next(entry[2], None)
            if packet is None:
                entry[1].end()
                ended.append(entry)
            else:
                entry[1].push(packet, sampling_rate)
        batch.run()
        for entry in ended:
            found[entry[0]] = said(entry[1].final())
            active.remove(entry)
    return found


def simulate_all(
    model: CascadedTransducer, options: DecodingOptions, tokenizer: Tokenizer, features: list[np.ndarray],
    batch_size: int,
) -> list[Said]:
    """Whole utterances (T_i, F), padded into batches of similar length, as `decode` does."""
    search = build_search(TorchEngine(model), options, tokenizer.unk_id)
    order = np.argsort([len(item) for item in features], kind="stable")
    found: list[Said] = [[] for _ in features]
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size].tolist()
        nothing: list[list[int]] = [[] for _ in places]
        batch = collate([features[place] for place in places], nothing, [], [])
        hypotheses = decode_batch(model, search, batch.features, batch.feature_lens, options)
        for place, item in zip(places, hypotheses, strict=True):
            found[place] = list(zip(item.tokens, item.timestamps, strict=True))
    return found


def score_all(recordings: list[Recording], found: list[Said], tokenizer: Tokenizer) -> Score:
    return score(
        (recording.id, tokenizer.normalize(recording.text), tokenizer.decode([token for token, _ in item]))
        for recording, item in zip(recordings, found, strict=True)
    )


def last_words_missed(scored: Score) -> int:
    """Utterances whose last reference word has no counterpart: what a recogniser that cuts the end would lose."""
    return sum(bool(item.alignment) and item.alignment[-1][1] is None for item in scored.utterances)


def compare(
    recordings: list[Recording], streamed: list[Said], simulated: list[Said], tokenizer: Tokenizer
) -> dict[str, Any]:
    """What a row says about one mode and search."""
    for recording, left, right in zip(recordings, streamed, simulated, strict=True):
        if left != right:
            logging.warning("%s: streamed %s, simulated %s", recording.id, left, right)
    pairs = list(zip(streamed, simulated, strict=True))
    scores = {name: score_all(recordings, found, tokenizer) for name, found in
              (("streamed", streamed), ("simulated", simulated))}
    return {
        "num_utterances": len(recordings),
        "num_tokens": sum(map(len, simulated)),
        "num_same_tokens": sum([token for token, _ in left] == [token for token, _ in right] for left, right in pairs),
        "num_identical": sum(left == right for left, right in pairs),
        **{f"wer_{name}": scored.words.percent for name, scored in scores.items()},
        **{f"last_words_missed_{name}": last_words_missed(scored) for name, scored in scores.items()},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_search_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="MANIFEST.jsonl")
    parser.add_argument("--modes", nargs="+", choices=STREAMING_MODES, default=STREAMING_MODES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tail-seconds", type=float, default=0.8, metavar="S", help="zeros at the end (default 0.8)")
    parser.add_argument("--num-streams", type=int, default=6, metavar="N", help="streams at once (default 6)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="whole utterances at once (16)")
    parser.add_argument("--seed", type=int, default=1, help="of packets and of the streams' order (default 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    arguments = parser.parse_args()
    check_at_least(arguments, epoch=1, avg=1, num_streams=1, batch_size=1, threads=1)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    model, config, tokenizer, base = load_for_decoding(arguments, "two_pass", beam=arguments.beam)
    rate = config.features.sampling_rate
    recordings = read_recordings(arguments.manifest, rate, arguments.tail_seconds)
    features = [compute_fbank(recording.samples, config.features).numpy() for recording in recordings]
    rows, simulated = [], {}
    print(f"{'mode':<11}{'method':<22}{'identical':>11}{'same tokens':>13}{'WER streamed':>14}{'WER simulated':>15}")
    for mode in arguments.modes:
        for method in arguments.methods:
            options = replace(base, mode=mode, method=method)
            whole = replace(options, mode="full" if mode == "two_pass" else mode)
            if whole not in simulated:
                simulated[whole] = simulate_all(model, whole, tokenizer, features, arguments.batch_size)
            start = time.perf_counter()
            batch = StreamBatch(model, tokenizer, options)
            streamed = stream_all(
                lambda batch=batch: StreamingDecoder(model, config, tokenizer, batch=batch),
                batch, recordings, rate, arguments.num_streams, arguments.seed,
            )
            row = {"mode": mode, "method": method} | compare(recordings, streamed, simulated[whole], tokenizer)
            rows.append(row)
            identical = f"{row['num_identical']}/{row['num_utterances']}"
            print(
                f"{mode:<11}{method:<22}{identical:>11}{row['num_same_tokens']:>13}"
                f"{row['wer_streamed']:>14.3f}{row['wer_simulated']:>15.3f}", flush=True,
            )
            logging.info("%s %s streamed in %.1f s", mode, method, time.perf_counter() - start)
    if arguments.json is not None:
        about = {
            "model": arguments.exp_dir.resolve().name, "chunk_ms": base.chunk_ms, "look_ahead_ms": base.look_ahead_ms,
            "left_context_ms": base.left_context_ms, "blank_penalty": base.blank_penalty,
            "tail_seconds": arguments.tail_seconds, "device": model.device.type, "commit": git_commit(),
            "command": command_line(), "machine": machine(model.device),
        }
        arguments.json.write_text(json.dumps([row | about for row in rows], indent=2) + "\n", encoding="utf-8")
    if any(row["num_identical"] < row["num_utterances"] for row in rows):
        print("error: what was streamed differs from what was simulated", file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    run_program(main)
