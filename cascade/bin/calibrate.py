"""Make word confidences mean something: fit a map of them to a dev set, and keep it in decoding.yaml beside the model.

A word with confidence 0.8 is then right about four times in five, on speech like dev's. decode, transcribe,
serve and export_onnx take the map from decoding.yaml. It is fitted to one pass and search, the ones whose text counts.
The expected calibration error (ECE) is printed before and after; after, it is that of each half of the utterances with
the map of the other half. Where too few words are recognised, confidences stay the transducer's own, an earlier map
is gone. Hypotheses never change. A set that is reported on must not be fitted on: give dev, never test.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values, load_for_decoding
from cascade.bin.score_arguments import add_score_arguments, score_options
from cascade.checkpoint import update_decoding
from cascade.data.decode_batches import decode_batches
from cascade.log import progress
from cascade.measure.calibration import expected_calibration_error, fit_calibration, outcomes
from cascade.models.torch_engine import TorchEngine, decode_batch
from cascade.models.transducer import MODES
from cascade.search.hypothesis import UNCALIBRATED
from cascade.search.methods import METHODS, build_scorers, build_search
from cascade.stream.words import words_of

MIN_WORDS = 20
"""Recognised words that two numbers can be fitted to."""


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="a dev set, as for decode")
    parser.add_argument("--mode", choices=MODES, default="full", help="default full, which says the final text")
    parser.add_argument("--method", choices=METHODS, default="greedy_search", help="default: %(default)s")
    add_search_arguments(parser)
    add_score_arguments(parser)
    parser.add_argument("--max-seconds", type=float, default=200.0, metavar="S", help="audio per batch (default 200)")
    arguments = parser.parse_args(words)
    check_values(arguments, epoch=1, avg=1)
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    search = {"method": arguments.method, "beam": arguments.beam, **score_options(arguments)}
    model, config, tokenizer, options = load_for_decoding(arguments, arguments.mode, **search)
    search = build_search(TorchEngine(model), options, tokenizer.unk_id, build_scorers(options, tokenizer))
    scored = []  # an utterance each
    for batch in progress(decode_batches(arguments.manifest, config, arguments.max_seconds), "decode"):
        results = decode_batch(model, search, batch.features, batch.feature_lens, options)
        scored += [outcomes(text, words_of(each, tokenizer)) for text, each in zip(batch.texts, results, strict=True)]
    everything = sum(scored, [])
    enough = len(everything) >= MIN_WORDS
    calibration = fit_calibration(everything) if enough else UNCALIBRATED
    path = update_decoding(
        arguments.exp_dir, confidence_slope=calibration.slope, confidence_offset=calibration.offset
    )
    if not enough:
        print(f"{len(everything)} words recognised, {MIN_WORDS} are needed: confidences stay as they are; see {path}")
        return
    halves, unseen = [sum(scored[place::2], []) for place in (0, 1)], []
    for half, other in (halves, halves[::-1]):
        if half and other:
            map_of_other = fit_calibration(other)
            unseen += [(float(map_of_other(confidence)), right) for confidence, right in half]
    before, after = expected_calibration_error(everything), expected_calibration_error(unseen)
    share = 100 * sum(right for _, right in everything) / len(everything)
    print(
        f"{len(everything)} words, {share:.1f} % right, ECE {100 * before:.2f} %"
        + ("" if after is None else f", calibrated {100 * after:.2f} %")
        + f"\n{path}: confidence_slope {calibration.slope:.4f}, confidence_offset {calibration.offset:.4f}"
    )


if __name__ == "__main__":
    run_program(main)
