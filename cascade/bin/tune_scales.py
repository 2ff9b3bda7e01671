"""Find the weights of a language model and of LODR on a dev set, and keep them in decoding.yaml beside the model.

The set is encoded once and searched many times: without a language model, with every --lm-scales without LODR, then
from the best on to better neighbours in both scales. A table of what was tried goes to standard output. decode,
transcribe, serve and export_onnx then take the files and scales from decoding.yaml, unless options replace them. A set
that is reported on must not be tuned on: give dev, never test. What is best for one pass and search is near the best
for others, not equal to it.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values, load_for_decoding
from cascade.checkpoint import update_decoding
from cascade.config.options import ConfigError
from cascade.data.decode_batches import decode_batches
from cascade.log import progress
from cascade.measure.wer import Score, score
from cascade.models.torch_engine import TorchEngine, encode_batch
from cascade.models.transducer import MODES
from cascade.report.markdown import table
from cascade.search.methods import METHODS, DecodingOptions, build_scorers, build_search
from cascade.search.ngram import read_ngram

LM_SCALES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LODR_SCALES = (0.0, 0.1, 0.2, 0.3, 0.4)
Point = tuple[int, int]
"""Places of a language model's and of LODR's scale in their lists."""


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="a dev set, as for decode")
    parser.add_argument("--ngram", type=Path, required=True, metavar="FILE", help="what train_ngram wrote")
    parser.add_argument("--lodr", type=Path, metavar="FILE", help="bigram of the training transcripts (default: none)")
    parser.add_argument("--mode", choices=MODES, default="full", help="the pass to tune for (default full)")
    parser.add_argument("--method", choices=METHODS, default="modified_beam_search", help="default: %(default)s")
    add_search_arguments(parser)
    parser.add_argument("--rescore", action="store_true", help="tune for --rescore of the other programs")
    for name, values in (("lm", LM_SCALES), ("lodr", LODR_SCALES)):
        parser.add_argument(
            f"--{name}-scales", type=float, nargs="+", default=values, metavar="X",
            help=f"default: {' '.join(f'{value:g}' for value in values)}",
        )
    parser.add_argument("--max-seconds", type=float, default=200.0, metavar="S", help="audio per batch (default 200)")
    arguments = parser.parse_args(words)
    check_values(arguments, epoch=1, avg=1)
    for name in ("ngram", "lodr"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{name} {path} not found")
    for name in ("lm_scales", "lodr_scales"):
        values = sorted(set(getattr(arguments, name)))
        if not 0 <= values[0] <= values[-1] < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be numbers of at least 0, got {values}")
        setattr(arguments, name, sorted({0.0, *values}))
    if not arguments.rescore and arguments.lm_scales[1:] and arguments.lodr_scales[-1] >= 1 + arguments.lm_scales[1]:
        raise ConfigError("--lodr-scales must be less than 1 + the smallest of --lm-scales")
    return arguments


def climb(errors: Callable[[Point], int], num_lm: int, num_lodr: int) -> Point:
    """The place with the fewest errors: the best scale of the language model without LODR, then step by step the best
    of the eight places around it, as long as that has fewer errors; of equal ones the one with the smaller scales."""
    best = min(((place, 0) for place in range(num_lm)), key=errors)
    while True:
        near = [(best[0] + lm, best[1] + lodr) for lm in (-1, 0, 1) for lodr in (-1, 0, 1)]
        inside = [(lm, lodr) for lm, lodr in near if 0 <= lm < num_lm and 0 <= lodr < num_lodr and (lm or not lodr)]
        better = min(inside, key=lambda point: (errors(point), point))
        if errors(better) >= errors(best):
            return best
        best = better


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    search = {"mode": arguments.mode, "method": arguments.method, "beam": arguments.beam}
    DecodingOptions(**search, rescore=arguments.rescore)  # a wrong one is said before the model is read
    model, config, tokenizer, options = load_for_decoding(
        arguments, ngram=arguments.ngram, lm_scale=1.0, lodr=arguments.lodr, lodr_scale=0.0, **search
    )
    engine, encoded, read = TorchEngine(model), [], cache(read_ngram)
    build_scorers(replace(options, lodr_scale=0.0 if arguments.lodr is None else 0.1), tokenizer, read)  # both files
    batches = decode_batches(arguments.manifest, config, arguments.max_seconds)
    for batch in progress(batches, "encode"):
        frames, lens = encode_batch(model, batch.features, batch.feature_lens, options)
        texts = [tokenizer.normalize(text) for text in batch.texts]
        encoded.append((batch.ids, texts, frames.cpu().numpy(), lens.cpu().numpy()))
    if not encoded:
        raise ValueError(f"{arguments.manifest} holds no utterance that can be decoded")
    lodr_scales = arguments.lodr_scales if arguments.lodr is not None else [0.0]
    rows = []

    @cache
    def measure(point: Point) -> Score:
        lm_scale, lodr_scale = arguments.lm_scales[point[0]], lodr_scales[point[1]]
        chosen = replace(
            options, lm_scale=lm_scale, lodr_scale=lodr_scale if lm_scale else 0.0,
            rescore=arguments.rescore and lm_scale > 0,
        )
        start = time.perf_counter()
        scored = decode_encoded(chosen, encoded, engine, tokenizer, build_scorers(chosen, tokenizer, read))
        counts = scored.words
        rows.append([f"{lm_scale:g}", f"{lodr_scale:g}", f"{counts.percent or 0:.2f}", *map(str, (
            counts.errors, counts.insertions, counts.deletions, counts.substitutions,
        ))])  # fmt: skip
        logging.info("lm_scale %g, lodr_scale %g: WER %s in %.1f s", lm_scale, lodr_scale, counts,
                     time.perf_counter() - start)
        return scored

    best = climb(lambda point: measure(point).words.errors, len(arguments.lm_scales), len(lodr_scales))
    print(table(["lm_scale", "lodr_scale", "WER %", "errors", "ins", "del", "sub"], rows, left=0))
    scales = {"lm_scale": arguments.lm_scales[best[0]], "lodr_scale": lodr_scales[best[1]]}
    files = {name: getattr(arguments, name) for name in ("ngram", "lodr") if getattr(arguments, name) is not None}
    files = {name: os.path.relpath(path.resolve(), arguments.exp_dir.resolve()) for name, path in files.items()}
    path = update_decoding(arguments.exp_dir, blank_penalty=options.blank_penalty, **files, **scales)
    print(f"{path}: " + ", ".join(f"{name} {value:g}" for name, value in scales.items()))


def decode_encoded(options, encoded, engine, tokenizer, scorers) -> Score:
    """Search all batches of (ids, texts, (N, T, D) frames, (N,) lengths) and score what was found."""
    search, said = build_search(engine, options, tokenizer.unk_id, scorers), []
    for ids, texts, frames, lens in encoded:
        tokens = [hypotheses[0].tokens for hypotheses in search.decode(frames, lens)]
        said += zip(ids, texts, map(tokenizer.decode, tokens), strict=True)
    return score(said)


if __name__ == "__main__":
    run_program(main)
