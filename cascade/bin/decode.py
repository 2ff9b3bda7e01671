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
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import add_model_arguments, add_search_arguments, check_values, load_for_decoding
from cascade.bin.score_arguments import add_score_arguments, score_fields, score_options
from cascade.config.options import ENCODER_FRAME_MS, ConfigError
from cascade.corpus.quarantine import Problem
from cascade.data.decode_batches import decode_batches
from cascade.log import progress
from cascade.measure.wer import Score, oracle, score, write_score
from cascade.models.torch_engine import TorchEngine, n_best_batch
from cascade.models.transducer import MODES
from cascade.provenance import command_line, git_commit, machine
from cascade.report.collect import describe_model
from cascade.search.beam import ModifiedBeamSearch
from cascade.search.greedy import GreedySearch
from cascade.search.hypothesis import Hypothesis
from cascade.search.methods import METHODS, DecodingOptions, build_scorers, build_search
from cascade.text.tokens import Tokenizer

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


def hypothesis_fields(hypothesis: Hypothesis, tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields of one hypothesis in hyps.jsonl and nbest.jsonl; times in seconds."""
    return {
        "hyp": tokenizer.decode(hypothesis.tokens),
        "tokens": [tokenizer.id_to_symbol(token) for token in hypothesis.tokens],
        "timestamps": [round(frame * ENCODER_FRAME_MS / 1000, 2) for frame in hypothesis.timestamps],
        "log_probs": [round(log_prob, 4) for log_prob in hypothesis.token_log_probs],
        "log_prob": round(hypothesis.log_prob, 4),
        "external_score": round(hypothesis.external_score, 4),
    }


def utterance_lines(
    ids: list[str], texts: list[str], n_best: list[list[Hypothesis]], tokenizer: Tokenizer, speakers: dict[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The objects of hyps.jsonl and nbest.jsonl for one batch; the reference in the form in which it is scored."""
    for name, text, hypotheses in zip(ids, texts, n_best, strict=True):
        utterance = {"id": name, "ref": tokenizer.normalize(text)}
        if name in speakers:
            utterance["speaker"] = speakers[name]
        fields = [hypothesis_fields(hypothesis, tokenizer) for hypothesis in hypotheses]
        ranked = [
            {**values, "score": round(hypothesis.score, 6)}
            for values, hypothesis in zip(fields, hypotheses, strict=True)
        ]
        yield {**utterance, **fields[0]}, {**utterance, "nbest": ranked}


def oracle_fields(n_best: list[dict[str, Any]], wanted: int | None) -> tuple[dict[str, Any], list[str]]:
    """The oracle's part of result.json and wer.txt; nothing where --nbest was not given."""
    if wanted is None:
        return {}, []
    best = oracle((line["id"], line["ref"], [values["hyp"] for values in line["nbest"]]) for line in n_best)
    row = {"nbest": wanted, "oracle_wer": None if best.percent is None else round(best.percent, 3)}
    return row, [f"Oracle WER, the best of {wanted}: {best}"]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object per line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def result_row(
    arguments: argparse.Namespace, options: DecodingOptions, of_model: dict[str, Any], token_kind: str, scored: Score,
    bad: list[Problem], device: torch.device,
) -> dict[str, Any]:
    """One row of results.json; what only other programs measure is null until `report` fills it in."""
    words = scored.words
    is_beam = options.method == "modified_beam_search"
    return {
        "model": arguments.exp_dir.resolve().name,
        "mode": options.mode,
        "method": options.method,
        "test_set": arguments.manifest.name.split(".")[0].removesuffix("_cuts"),
        "wer": None if words.percent is None else round(words.percent, 3),
        "cer": None if scored.characters.percent is None else round(scored.characters.percent, 3),
        "token_kind": token_kind,
        "num_words": words.reference,
        "num_characters": scored.characters.reference,
        "errors": words.errors,
        "ins": words.insertions,
        "del": words.deletions,
        "sub": words.substitutions,
        "num_utterances": len(scored.utterances),
        "num_set_aside": len(bad),
        **of_model,
        "chunk_ms": options.chunk_ms,
        "look_ahead_ms": options.look_ahead_ms if options.mode == "look_ahead" else None,
        "left_context_ms": options.left_context_ms,
        "beam": options.beam if is_beam else None,
        "blank_penalty": options.blank_penalty,
        **score_fields(options),
        "chunk_compute_ms_p50": None,
        "chunk_compute_ms_p95": None,
        "chunk_compute_ms_p99": None,
        "rtf": None,
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
        "command": command_line(),
        "machine": machine(device),
    }


def write_results(
    arguments: argparse.Namespace, decoding: Decoding, of_model: dict[str, Any], token_kind: str, bad: list[Problem],
    device: torch.device,
) -> None:
    """Score one decoding and write its folder."""
    options, out = decoding.options, decoding.out
    decoding.lines.sort(key=lambda pair: pair[0]["id"])
    lines, n_best_lines = [line for line, _ in decoding.lines], [line for _, line in decoding.lines]
    scored = score((line["id"], line["ref"], line["hyp"]) for line in lines)
    oracle_row, notes = oracle_fields(n_best_lines, arguments.nbest)
    row = result_row(arguments, options, of_model, token_kind, scored, bad, device) | oracle_row
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "hyps.jsonl", lines)
    if arguments.nbest is not None:
        write_lines(out / "nbest.jsonl", n_best_lines)
    notes += [f"Set aside: {len(bad)}" + (" (not in the totals)" if bad else "")]
    notes += [f"  {problem.id}: {problem.reason}" for problem in bad]
    with open(out / "wer.txt", "w", encoding="utf-8") as file:
        write_score(scored, file, notes)
    (out / "result.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    logging.info(
        "%s %s %s: WER %s, CER %s, %d utterances in %.1f s%s; see %s", row["model"], options.mode, options.method,
        scored.words, scored.characters, len(lines), decoding.seconds, f", {len(bad)} SET ASIDE" if bad else "",
        out / "wer.txt",
    )


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
        decodings.append(Decoding(chosen, build_search(engine, chosen, tokenizer.unk_id, scorers), out))
    batches = decode_batches(arguments.manifest, config, arguments.max_seconds)
    for batch in progress(batches, "decode"):
        for decoding in decodings:
            start = time.perf_counter()
            inputs = (model, decoding.search, batch.features, batch.feature_lens, decoding.options)
            n_best = [hypotheses[: arguments.nbest or 1] for hypotheses in n_best_batch(*inputs)]
            decoding.lines.extend(utterance_lines(batch.ids, batch.texts, n_best, tokenizer, batches.speakers))
            decoding.seconds += time.perf_counter() - start
    if not decodings[0].lines:
        raise ValueError(
            f"{arguments.manifest} holds no utterance that can be decoded ({len(batches.problems)} set aside)"
        )
    of_model = describe_model(model, arguments.exp_dir, config)
    for decoding in decodings:
        write_results(arguments, decoding, of_model, tokenizer.kind, batches.problems, model.device)


if __name__ == "__main__":
    run_program(main)
