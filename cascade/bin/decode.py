"""Decode a test set with one pass and one search, or with all of them, and score it.

Whole utterances are decoded under the masks of streaming, which gives what a stream would give. --out gets hyps.jsonl
(one object per utterance: id, ref, speaker where it is known, hyp, tokens, timestamps in seconds, log-probabilities of
tokens and of the whole by the transducer alone, external_score that language models added), wer.txt (totals, by length,
every alignment) and result.json (one row of results.json). --nbest N adds nbest.jsonl (one object per utterance: id,
ref, nbest: hypotheses best first) and the oracle WER, that of the best choice among each utterance's N hypotheses, to
wer.txt and result.json. With --mode all or --method all the model is loaded once, and --out gets a folder MODE-METHOD
for each pair, with the same files as if it had been decoded alone.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values, load_for_decoding
from cascade.bin.score_arguments import add_score_arguments, score_options
from cascade.config.options import ConfigError
from cascade.corpus.cuts import split_name
from cascade.data.decode_batches import decode_batches
from cascade.files import check_writable
from cascade.log import progress
from cascade.measure.calibration import outcomes
from cascade.models.torch_engine import TorchEngine, n_best_batch
from cascade.models.transducer import MODES
from cascade.provenance import machine
from cascade.report.collect import describe_model
from cascade.report.decoding import calibration_fields, utterance_lines, write_decoding
from cascade.search.beam import ModifiedBeamSearch
from cascade.search.greedy import GreedySearch
from cascade.search.methods import METHODS, DecodingOptions, build_scorers, build_search
from cascade.stream.words import words_of

ALL = "all"


@dataclass
class Decoding:
    """One pair of a pass and a search, and what it has decoded so far."""

    options: DecodingOptions
    search: GreedySearch | ModifiedBeamSearch
    out: Path
    """Folder of its results."""
    lines: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Objects of hyps.jsonl and nbest.jsonl, one pair per utterance."""
    outcomes: list[tuple[float, bool]] = field(default_factory=list)
    """(Confidence before calibration, right) of each word."""
    seconds: float = 0.0


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="CUTS.jsonl.gz or MANIFEST.jsonl")
    parser.add_argument("--mode", choices=(*MODES, ALL), required=True)
    parser.add_argument("--method", choices=(*METHODS, ALL), required=True)
    add_search_arguments(parser)
    add_score_arguments(parser)
    parser.add_argument("--nbest", type=int, metavar="N", help="also N hypotheses each and their oracle WER; to --beam")
    parser.add_argument("--max-seconds", type=float, default=200.0, metavar="S", help="audio per batch (default 200)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    arguments = parser.parse_args(words)
    check_values(arguments, epoch=1, threads=1, avg=1, nbest=1)
    if arguments.nbest is not None and arguments.method != "modified_beam_search":
        raise ConfigError("--nbest needs --method modified_beam_search: greedy search has one hypothesis")
    if arguments.nbest is not None and arguments.nbest > arguments.beam:
        raise ConfigError(f"--nbest must be at most --beam ({arguments.beam}), got {arguments.nbest}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    modes = MODES if arguments.mode == ALL else (arguments.mode,)
    methods = METHODS if arguments.method == ALL else (arguments.method,)
    strictest = "look_ahead" if "look_ahead" in modes else modes[0]  # wrong contexts are told before the model is read
    search = {"method": methods[0], "beam": arguments.beam, **score_options(arguments)}
    model, config, tokenizer, options = load_for_decoding(arguments, strictest, **search)
    engine, scorers, decodings = TorchEngine(model), build_scorers(options, tokenizer), []
    for mode, method in product(modes, methods):
        chosen = replace(options, mode=mode, method=method)
        out = arguments.out / f"{mode}-{method}" if ALL in (arguments.mode, arguments.method) else arguments.out
        check_writable(out)  # said before hours are spent
        decodings.append(Decoding(chosen, build_search(engine, chosen, tokenizer.unk_id, scorers), out))
    batches = decode_batches(arguments.manifest, config, arguments.max_seconds)
    for batch in progress(batches, "decode"):
        for decoding in decodings:
            start = time.perf_counter()
            inputs = (model, decoding.search, batch.features, batch.feature_lens, decoding.options)
            n_best = [hypotheses[: arguments.nbest or 1] for hypotheses in n_best_batch(*inputs)]
            decoding.lines.extend(utterance_lines(batch.ids, batch.texts, n_best, tokenizer, batches.speakers))
            decoding.seconds += time.perf_counter() - start
            for text, hypotheses in zip(batch.texts, n_best, strict=True):
                decoding.outcomes += outcomes(text, words_of(hypotheses[0], tokenizer))
    if not decodings[0].lines:
        raise ValueError(
            f"{arguments.manifest} holds no utterance that can be decoded ({len(batches.problems)} set aside)"
        )
    system = {
        "model": arguments.exp_dir.resolve().name,
        "test_set": split_name(arguments.manifest),
        "token_kind": tokenizer.kind,
        **describe_model(model, arguments.exp_dir, config),
        "threads": torch.get_num_threads(),
        "machine": machine(model.device),
    }
    set_aside = [(problem.id, problem.reason) for problem in batches.problems]
    for decoding in decodings:
        metadata = system | calibration_fields(decoding.outcomes, decoding.options)
        results = (decoding.out, decoding.lines, decoding.options, metadata, set_aside, arguments.nbest)
        scored = write_decoding(*results)
        logging.info(
            "%s %s %s: WER %s, CER %s, %d utterances in %.1f s%s; see %s", system["model"], decoding.options.mode,
            decoding.options.method, scored.words, scored.characters, len(scored.utterances), decoding.seconds,
            f", {len(set_aside)} SET ASIDE" if set_aside else "", decoding.out / "wer.txt",
        )


if __name__ == "__main__":
    run_program(main)
