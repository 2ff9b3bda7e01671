"""Time greedy and modified beam search on a model with random weights.

The blank bias is set so that every search says about the wanted number of tokens. Rows: {name, shape (N16_T250_...),
context_size, beam, ngram, threads, total_ms (median), cpu_ms (least processor time), tokens, floor_ms}; floor_ms is
the processor time of the joiner's matrix products alone, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade.bin.cli import run_program  # noqa: E402
from cascade.config.load import load_config  # noqa: E402
from cascade.models.build import build_model  # noqa: E402
from cascade.models.torch_engine import TorchEngine  # noqa: E402
from cascade.provenance import command_line, git_commit, machine  # noqa: E402
from cascade.search.beam import BACKENDS, ModifiedBeamSearch  # noqa: E402
from cascade.search.greedy import GreedySearch  # noqa: E402
from cascade.search.ngram import NgramModel, read_ngram  # noqa: E402
from cascade.search.scorer import NgramScorer  # noqa: E402
from cascade.text.tokens import Tokenizer  # noqa: E402
from cascade.threads import limit_threads  # noqa: E402


def time_ms(
    function: Callable[[], object], repeats: int, prepare: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Median wall-clock and least processor milliseconds of `repeats` calls, after one to warm up.

    On a busy machine the processor time is what a quiet one would need, per thread. `prepare` is called before each,
    outside of the time.
    """
    function()
    walls, processor = [], []
    for _ in range(repeats):
        prepare()
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        walls.append(1000 * (time.perf_counter() - wall))
        processor.append(1000 * (time.process_time() - cpu))
    return statistics.median(walls), min(processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4, 8], metavar="B", help="0 is greedy search")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="of beam search")
    parser.add_argument("--predictor", default="stateless", choices=("lstm", "stateless", "tied_reduced"))
    parser.add_argument("--context-size", type=int, default=2, metavar="N")
    parser.add_argument("--utterances", type=int, default=16, metavar="N")
    parser.add_argument("--frames", type=int, default=250, metavar="T")
    parser.add_argument("--tokens", type=float, default=65, metavar="U", help="wanted per utterance")
    parser.add_argument("--vocab-size", type=int, default=500, metavar="V")
    parser.add_argument("--dim", type=int, default=512, metavar="D")
    parser.add_argument(
        "--ngram", type=Path, metavar="ARPA", help="also with this language model, weight 0.3, nothing of it cached"
    )
    parser.add_argument("--tokens-dir", type=Path, metavar="DIR", help="its tokenizer; gives --vocab-size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    limit_threads(arguments.threads)
    ngram = None
    if arguments.ngram is not None:
        tokenizer = Tokenizer.load(arguments.tokens_dir)
        arguments.vocab_size = tokenizer.vocab_size
        ngram = read_ngram(arguments.ngram, [tokenizer.id_to_symbol(token) for token in range(tokenizer.vocab_size)])
    torch.manual_seed(1)
    config = load_config([], [
        "model.causal.num_layers=1", "model.noncausal.num_layers=1", f"model.joiner_dim={arguments.dim}",
        f"model.predictor.kind={arguments.predictor}", f"model.predictor.context_size={arguments.context_size}",
    ])
    model = build_model(config, arguments.vocab_size).eval()
    model.joiner.output.weight.data.normal_(0, 3 * arguments.dim**-0.5)
    encoder_out = torch.randn(arguments.utterances, arguments.frames, arguments.dim)
    lens = np.full(arguments.utterances, arguments.frames)
    rows = []
    for beam in arguments.beams:
        rows.append(time_search(model, encoder_out, lens, beam, arguments))
        if ngram is not None:
            rows.append(time_search(model, encoder_out, lens, beam, arguments, ngram))
            print(f"{'':<21} processor time {rows[-1]['cpu_ms'] / rows[-2]['cpu_ms']:.2f} of that without n-gram")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def time_search(
    model, encoder_out: torch.Tensor, lens: np.ndarray, beam: int, arguments, ngram: NgramModel | None = None
) -> dict:
    """Find the blank penalty by bisection, then time; prints and returns the row."""

    engine, frames = TorchEngine(model), encoder_out.numpy()
    scorers = [NgramScorer(ngram, 0.3)] if ngram is not None else []

    def decode(penalty: float):
        if beam:  # a new search: what the predictor says is not known yet
            search = ModifiedBeamSearch(engine, beam, penalty, scorers=scorers, backend=arguments.backend)
        else:
            search = GreedySearch(engine, penalty, scorers=scorers)
        return search.decode(frames, lens)

    low, high, tokens = -30.0, 30.0, 0.0
    for _ in range(12):
        penalty = (low + high) / 2
        tokens = sum(len(hypotheses[0].tokens) for hypotheses in decode(penalty)) / len(lens)
        low, high = (penalty, high) if tokens < arguments.tokens else (low, penalty)
        if abs(tokens - arguments.tokens) < 2:
            break
    hidden = np.random.default_rng(1).standard_normal((len(lens) * max(beam, 1), arguments.dim), np.float32)

    def products() -> None:
        for _ in range(encoder_out.shape[1]):
            hidden @ engine.weight.T

    total, processor = time_ms(lambda: decode(penalty), arguments.repeats, *([ngram.forget] if ngram else []))
    _, floor = time_ms(products, 5)
    row = {
        "name": "modified_beam_search" if beam else "greedy_search",
        "shape": f"N{len(lens)}_T{encoder_out.shape[1]}_V{arguments.vocab_size}_D{arguments.dim}",
        "backend": arguments.backend if beam else None,
        "predictor": arguments.predictor, "context_size": arguments.context_size, "beam": beam or None,
        "ngram": arguments.ngram.name if ngram is not None else None,
        "threads": arguments.threads, "total_ms": round(total, 1), "cpu_ms": round(processor, 1),
        "tokens": round(tokens, 1), "floor_ms": round(floor, 1),
        "commit": git_commit(), "command": command_line(), "machine": machine(),
    }
    print(
        f"{row['name']:<21} beam {row['beam'] or '-':>2} {row['ngram'] or '':<12} {total:8.1f} ms median "
        f"{processor:8.1f} ms processor "
        f"{floor:8.1f} ms floor {tokens:6.1f} tokens"
    )
    return row


if __name__ == "__main__":
    run_program(main)
