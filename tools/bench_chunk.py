"""What a chunk of one stream costs, part by part, and what is left beside features, networks, joiner and predictor.

    python tools/bench_chunk.py --exp-dir exp/random/student --wav DIR

Recordings come in as packets of one chunk; endpoints cut them into segments, as in `transcribe` and the server.
One thread of an idle machine, by the wall clock: asking for the processor's time would cost a system call. The rest is
packets, batches, states, search and the words of partial results. Rows: {mode, method, beam, streams, model, chunk_ms:
milliseconds per chunk and stream, and of these features_ms, network_ms, joiner_ms, predictor_ms, rest_ms, rest_share}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.audio.packets import AudioInput  # noqa: E402
from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values  # noqa: E402
from cascade.checkpoint import load_model  # noqa: E402
from cascade.export.onnx_engine import OnnxEngine  # noqa: E402
from cascade.models.torch_engine import TorchEngine  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.search.beam import ModifiedBeamSearch  # noqa: E402
from cascade.search.methods import METHODS, STREAMING_MODES, DecodingOptions, default_left_context_ms  # noqa: E402
from cascade.stream.batch import StreamBatch  # noqa: E402
from cascade.stream.decoder import StreamingDecoder  # noqa: E402
from cascade.stream.endpoint import EndpointOptions  # noqa: E402
from cascade.threads import limit_threads  # noqa: E402
from tools.bench_serve import read_turns  # noqa: E402

PARTS = ("features", "network", "joiner", "predictor")
SHOWN = (
    "{mode:<10} {method:<20} {chunk_ms:7.2f} ms a chunk: features {features_ms:.2f}, network {network_ms:.2f}, "
    "joiner {joiner_ms:.2f}, predictor {predictor_ms:.2f}, the rest {rest_ms:.2f} ms, {rest_share:.1%}"
)
WARM_UP_CHUNKS = 20
spent: Counter[str] = Counter()
"""Nanoseconds of each part."""


def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter_ns()
        try:
            return function(*arguments, **named)
        finally:
            spent[part] += time.perf_counter_ns() - start

    return call


class ClockedEngine:
    """An engine whose networks note their time."""

    def __init__(self, engine: Any) -> None:
        self.num_mel_bins, self.whole_chunks, self.bias = engine.num_mel_bins, engine.whole_chunks, engine.bias
        self.weight, self.predictor = engine.weight, clocked_predictor(engine.predictor)
        self.full, self.project = clocked("network", engine.full), clocked("joiner", engine.project)
        self._engine = engine

    def causal_rows(self, left: int) -> Any:
        return self._clock(self._engine.causal_rows(left))

    def block_rows(self, left: int) -> Any:
        return self._clock(self._engine.block_rows(left))

    def _clock(self, rows: Any) -> Any:
        rows._step = clocked("network", rows._step)
        return rows


def clocked_predictor(predictor: Any) -> Any:
    """A predictor that notes its time, and whose copies do."""
    return SimpleNamespace(
        context_size=predictor.context_size, initial=predictor.initial, step=clocked("predictor", predictor.step),
        with_product=lambda product: clocked_predictor(predictor.with_product(product)),
    )


def clock_search(search: Any) -> None:
    """Let a search note the joiner's time; beam search has its tanh in a kernel."""
    if not isinstance(search, ModifiedBeamSearch):
        search.logits_of = clocked("joiner", search.logits_of)
    else:
        search.output_layer = clocked("joiner", search.output_layer)
        kernels = vars(search._kernels)
        search._kernels = SimpleNamespace(**kernels | {"join_rows": clocked("joiner", search._kernels.join_rows)})


def measure(
    engine: Any, config: Any, tokenizer: Any, options: DecodingOptions, samples: np.ndarray, streams: int
) -> dict[str, float]:
    """The times of a row."""
    rate = config.features.sampling_rate
    batch = StreamBatch(ClockedEngine(engine), tokenizer, options, EndpointOptions())
    for search in {batch.mode.search, batch.mode.text_search}:
        clock_search(search)
    new_decoder = partial(StreamingDecoder, batch.engine, config, tokenizer, batch=batch, keep_segments=False)
    decoders = [new_decoder() for _ in range(streams)]
    size, total, chunks = rate * options.chunk_ms // 1000, 0, 0
    for number in range(len(samples) // size):
        if number == WARM_UP_CHUNKS:
            total, chunks = 0, 0
            spent.clear()
        start = time.perf_counter_ns()
        for place, decoder in enumerate(decoders):
            begin = (number + place * len(samples) // size // streams) * size % (len(samples) - size)
            decoder.push(samples[begin : begin + size], rate)
        batch.run()
        for decoder in decoders:
            decoder.partial()
        total += time.perf_counter_ns() - start
        chunks += streams
    parts = {f"{part}_ms": spent[part] / 1e6 / chunks for part in PARTS}
    rest = total / 1e6 / chunks - sum(parts.values())
    row = {"chunk_ms": total / 1e6 / chunks, **parts, "rest_ms": rest}
    return {name: round(value, 3) for name, value in (row | {"rest_share": rest / row["chunk_ms"]}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, or_onnx=True, cpu_only=True)
    add_search_arguments(parser)
    parser.add_argument("--wav", type=Path, nargs="+", required=True, metavar="PATH", help="recordings or folders")
    parser.add_argument("--modes", nargs="+", choices=STREAMING_MODES, default=list(STREAMING_MODES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--streams", type=int, default=1, metavar="N", help="in one batch")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S", help="of audio for each row (120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    arguments = parser.parse_args()
    check_values(arguments, beam=1, streams=1)
    limit_threads(1)
    AudioInput.accept = clocked("features", AudioInput.accept)
    rows = []
    for mode in arguments.modes:
        for method in arguments.methods:
            if arguments.onnx_dir is not None:
                engine = OnnxEngine(arguments.onnx_dir, arguments.int8)
                config, tokenizer, times = engine.config, engine.tokenizer, engine.times
            else:
                model, config, tokenizer = load_model(arguments.exp_dir)
                engine, times = TorchEngine(model), {"chunk_ms": arguments.chunk_ms}
                times["left_context_ms"] = default_left_context_ms(config, arguments.chunk_ms)
            turns = read_turns(arguments.wav, limit=1000)
            samples = np.concatenate(turns)[: round(arguments.seconds * config.features.sampling_rate)]
            options = DecodingOptions.for_model(config, mode=mode, method=method, beam=arguments.beam, **times)
            rows.append({
                "mode": mode, "method": method, "beam": arguments.beam if "beam" in method else None,
                "streams": arguments.streams, "model": str(arguments.exp_dir or arguments.onnx_dir),
                **measure(engine, config, tokenizer, options, samples, arguments.streams),
                "commit": git_commit(), "command": command_line(), "machine": machine(),
            })  # fmt: skip
            print(SHOWN.format(**rows[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
