"""Find where a trained model hears the words of the references (Viterbi alignment), as CTM.

--out gets alignment.ctm (a line per word: utterance, channel, start, duration, word, confidence; seconds from the
utterance's start), alignment.json (counts, and every utterance that was set aside with its reason) and, when the
manifest is one of cuts, cuts.jsonl.gz: the same cuts with the alignment in their supervisions.

A word lasts from the frame in which the model says its first token to the end of the frame of its last one, as in
`transcribe`: a transducer says a token once, when it is sure of it, so that words are shorter than they were spoken.
For augment.recombine_share, which cuts before words, --mode streaming finds the times that vary least.
The confidence is the geometric mean of the tokens' probabilities. Utterances that have no path (more tokens than
frames), tokens that the model does not know, or no words are set aside.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from cascade.bin.cli import run_program
from cascade.bin.model_arguments import add_model_arguments, check_values, load_for_decoding
from cascade.data.alignments import write_aligned_cuts, write_ctm
from cascade.data.decode_batches import decode_batches
from cascade.data.forced_alignment import align_manifest
from cascade.files import replacing
from cascade.models.transducer import MODES
from cascade.provenance import command_line, git_commit, machine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="CUTS.jsonl.gz or MANIFEST.jsonl")
    parser.add_argument("--mode", choices=MODES, default="full", help="the pass that aligns (default full)")
    parser.add_argument("--max-seconds", type=float, default=200.0, metavar="S", help="audio per batch (default 200)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    arguments = parser.parse_args()
    check_values(arguments, epoch=1, threads=1, avg=1)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    model, config, tokenizer, options = load_for_decoding(arguments, arguments.mode)
    batches = decode_batches(arguments.manifest, config, arguments.max_seconds)
    inputs = (arguments.manifest, batches, model, tokenizer, options, config.loss.rnnt_type)
    alignments, problems = align_manifest(*inputs)
    if not alignments:
        raise ValueError(f"{arguments.manifest} holds no utterance that can be aligned ({len(problems)} set aside)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_ctm(arguments.out / "alignment.ctm", alignments)
    if arguments.manifest.suffix != ".jsonl":
        write_aligned_cuts(arguments.manifest, arguments.out / "cuts.jsonl.gz", alignments)
    num_words = sum(map(len, alignments.values()))
    summary = {
        "num_utterances": len(alignments), "num_words": num_words, "num_set_aside": len(problems),
        "mode": options.mode, "rnnt_type": config.loss.rnnt_type, "blank_penalty": options.blank_penalty,
        "chunk_ms": options.chunk_ms, "device": model.device.type,
        "look_ahead_ms": options.look_ahead_ms if options.mode == "look_ahead" else None,
        "machine": machine(model.device),
        "set_aside": [asdict(problem) for problem in problems], "commit": git_commit(), "command": command_line(),
    }
    with replacing(arguments.out / "alignment.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    logging.info(
        "aligned %d words of %d utterances in %.1f s%s; see %s", num_words, len(alignments),
        time.perf_counter() - start, f", {len(problems)} SET ASIDE" if problems else "",
        arguments.out / "alignment.ctm",
    )


if __name__ == "__main__":
    run_program(main)
