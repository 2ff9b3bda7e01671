"""Time greedy and modified beam search, on random weights or on what a trained model hears in real speech.

Random weights say the wanted number of tokens: the blank's bias is set for each search. With --exp-dir and --manifest
the search runs on that model's full pass, with its blank penalty. --ngram times every search without and with a
language model, in turns. Rows: {name, shape (N16_T4000_...: utterances, frames of all), exp_dir, backend, context_size,
beam, ngram, threads, total_ms and cpu_ms (medians, wall clock and processor), ratio (median over turns: processor time
by that without n-gram), tokens (per utterance), floor_ms}; floor_ms is the processor time of the joiner's matrix
products alone, each frame once for each place of the beam, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.bin.model_arguments import check_values  # noqa: E402
from cascade.checkpoint import load_model  # noqa: E402
from cascade.config.load import load_config  # noqa: E402
from cascade.config.options import ConfigError  # noqa: E402
from cascade.data.decode_batches import decode_batches  # noqa: E402
from cascade.models.build import build_model  # noqa: E402
from cascade.models.torch_engine import TorchEngine, encode_batch  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.search.beam import ModifiedBeamSearch  # noqa: E402
from cascade.search.compiled import BACKENDS, search_kernels  # noqa: E402
from cascade.search.greedy import GreedySearch  # noqa: E402
from cascade.search.methods import DecodingOptions  # noqa: E402
from cascade.search.ngram import read_ngram  # noqa: E402
from cascade.search.scorer import NgramScorer  # noqa: E402
from cascade.text.tokens import Tokenizer  # noqa: E402
from cascade.threads import limit_threads  # noqa: E402

PENALTIES = (-30.0, 30.0)
"""Where the blank penalty of random weights is looked for."""


class Heard(NamedTuple):
    """What searches run on."""

    engine: TorchEngine
    batches: list[tuple[np.ndarray, np.ndarray]]
    """(N, T, D) frames and their (N,) lengths."""
    unk_id: int | None
    blank_penalty: float | None
    """None: the one that makes a search say the wanted number of tokens."""

    @property
    def num_utterances(self) -> int:
        return sum(len(lens) for _, lens in self.batches)


def random_model(arguments: argparse.Namespace) -> Heard:
    torch.manual_seed(1)
    config = load_config([], [
        "model.causal.num_layers=1", "model.noncausal.num_layers=1", f"model.joiner_dim={arguments.dim}",
        f"model.predictor.kind={arguments.predictor}", f"model.predictor.context_size={arguments.context_size}",
    ])
    model = build_model(config, arguments.vocab_size).eval()
    model.joiner.output.weight.data.normal_(0, 3 * arguments.dim**-0.5)
    encoder_out = torch.randn(arguments.utterances, arguments.frames, arguments.dim).numpy()
    return Heard(TorchEngine(model), [(encoder_out, np.full(arguments.utterances, arguments.frames))], None, None)


def trained_model(arguments: argparse.Namespace) -> Heard:
    model, config, tokenizer = load_model(arguments.exp_dir)
    options = DecodingOptions.for_model(config, mode="full", ngram=None, lm_scale=0.0)
    batches = decode_batches(arguments.manifest, config, max_seconds=200.0, max_utterances=arguments.utterances)
    encoded = [encode_batch(model, batch.features, batch.feature_lens, options) for batch in batches]
    arrays = [(out.numpy(), lens.numpy()) for out, lens in encoded]
    return Heard(TorchEngine(model), arrays, tokenizer.unk_id, options.blank_penalty)


def time_turns(functions: Sequence[Callable[[], object]], repeats: int) -> np.ndarray:
    """(functions, repeats, 2) wall-clock and processor milliseconds, in turns, after one call of each to warm up.

    On a busy machine the processor time is what a quiet one would need, per thread.
    """
    times = np.zeros((len(functions), 1 + repeats, 2))
    for turn in range(1 + repeats):
        for number, function in enumerate(functions):
            before = np.array([time.perf_counter(), time.process_time()])
            function()
            times[number, turn] = 1000 * (np.array([time.perf_counter(), time.process_time()]) - before)
    return times[:, 1:]


def time_searches(
    heard: Heard, beam: int, scorers: Sequence[list[NgramScorer]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time one search with each of these lists of scorers, the first without any; prints and returns the rows."""
    engine, num_utterances = heard.engine, heard.num_utterances

    def decode(own: list[NgramScorer], penalty: float) -> float:
        if beam:  # a new search: what the predictor says is not known yet
            search = ModifiedBeamSearch(engine, beam, penalty, heard.unk_id, own, arguments.backend)
        else:
            search = GreedySearch(engine, penalty, heard.unk_id, own, arguments.backend)
        found = [hypotheses[0] for frames, lens in heard.batches for hypotheses in search.decode(frames, lens)]
        return sum(len(hypothesis.tokens) for hypothesis in found) / num_utterances

    penalties = [heard.blank_penalty] * len(scorers)
    for place, own in enumerate(scorers):
        low, high = PENALTIES
        while penalties[place] is None:
            middle = (low + high) / 2
            tokens = decode(own, middle)
            low, high = (middle, high) if tokens < arguments.tokens else (low, middle)
            if abs(tokens - arguments.tokens) < 0.5 or high - low < 0.01:
                penalties[place] = middle
    hidden = np.ones((num_utterances * max(beam, 1), engine.weight.shape[1]), engine.weight.dtype)
    product = search_kernels(arguments.backend if beam else "numpy", hidden.dtype).Product(engine.weight, engine.bias)
    num_frames = sum(int(lens.sum()) for _, lens in heard.batches)

    def products() -> None:
        for _ in range(round(num_frames / num_utterances)):
            product(hidden)

    functions = [partial(decode, own, penalty) for own, penalty in zip(scorers, penalties, strict=True)]
    times = time_turns([products, *functions], arguments.repeats)
    ratios = np.median(times[1:, :, 1] / times[1, :, 1], axis=1)
    rows = []
    for own, penalty, (wall, cpu), ratio in zip(scorers, penalties, np.median(times[1:], axis=1), ratios, strict=True):
        rows.append({
            "name": "modified_beam_search" if beam else "greedy_search",
            "shape": f"N{num_utterances}_T{num_frames}_V{engine.weight.shape[0]}_D{engine.weight.shape[1]}",
            "exp_dir": arguments.exp_dir and str(arguments.exp_dir),
            "backend": arguments.backend if beam else None, "context_size": engine.predictor.context_size,
            "beam": beam or None, "ngram": arguments.ngram.name if own else None, "threads": arguments.threads,
            "total_ms": round(wall, 1), "cpu_ms": round(cpu, 1), "ratio": round(ratio, 3),
            "tokens": round(decode(own, penalty), 1), "floor_ms": round(float(np.median(times[0, :, 1])), 1),
            "commit": git_commit(), "command": command_line(), "machine": machine(),
        })
        print("{name:<21} beam {beam!s:<4} {ngram!s:<12} {total_ms:8.1f} ms {cpu_ms:8.1f} ms processor, x {ratio:.2f}, "
              "{floor_ms:8.1f} ms floor {tokens:6.1f} tokens".format(**rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4, 8], metavar="B", help="0 is greedy search")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="numpy: of the n-gram too")
    parser.add_argument("--exp-dir", type=Path, metavar="DIR", help="a trained model instead of random weights")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="what it hears: CUTS.jsonl.gz or MANIFEST.jsonl")
    parser.add_argument("--utterances", type=int, default=16, metavar="N", help="at most (default 16)")
    parser.add_argument("--ngram", type=Path, metavar="FILE", help="also with this language model, weight 0.3")
    parser.add_argument("--tokens-dir", type=Path, metavar="DIR", help="the n-gram's tokenizer (default: --exp-dir's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    weights = parser.add_argument_group("random weights")
    weights.add_argument("--predictor", default="stateless", choices=("lstm", "stateless", "tied_reduced"))
    weights.add_argument("--context-size", type=int, default=2, metavar="N")
    weights.add_argument("--frames", type=int, default=250, metavar="T")
    weights.add_argument("--tokens", type=float, default=65, metavar="U", help="wanted per utterance")
    weights.add_argument("--vocab-size", type=int, default=500, metavar="V")
    weights.add_argument("--dim", type=int, default=512, metavar="D")
    arguments = parser.parse_args()
    if (arguments.exp_dir is None) != (arguments.manifest is None):
        raise ConfigError("--exp-dir and --manifest belong together: a trained model and what it hears")
    check_values(arguments, repeats=1)
    limit_threads(arguments.threads)
    scorers: list[list[NgramScorer]] = [[]]
    if arguments.ngram is not None:
        folder = arguments.tokens_dir or arguments.exp_dir and arguments.exp_dir / "tokens"
        if folder is None:
            raise ConfigError("--ngram needs --tokens-dir DIR, its tokenizer")
        tokenizer = Tokenizer.load(folder)
        arguments.vocab_size = tokenizer.vocab_size
        ngram = read_ngram(arguments.ngram, [tokenizer.id_to_symbol(token) for token in range(tokenizer.vocab_size)])
        if arguments.backend == "numpy":
            ngram.kernels = None
        scorers.append([NgramScorer(ngram, 0.3)])
    heard = random_model(arguments) if arguments.exp_dir is None else trained_model(arguments)
    rows = [row for beam in arguments.beams for row in time_searches(heard, beam, scorers, arguments)]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
