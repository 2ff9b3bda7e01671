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
from cascade.config.options import FRAME_SHIFT_MS, SUBSAMPLING
from cascade.corpus.quarantine import EMPTY_TEXT, TOO_MANY_TOKENS, UNKNOWN_CHARACTERS, Problem
from cascade.data.alignments import TimedWord, write_aligned_cuts, write_ctm
from cascade.data.batches import Batch
from cascade.data.decode_batches import decode_batches
from cascade.files import replacing
from cascade.log import progress
from cascade.measure.alignment import align_batch
from cascade.models.transducer import MODES
from cascade.provenance import command_line, git_commit, machine
from cascade.search.hypothesis import Hypothesis
from cascade.stream.words import words_of
from cascade.text.tokens import Tokenizer

_MOST_CELLS = 2**23
"""Frames times tokens of one utterance: about 1 GB of memory."""
NO_PATH = "no path"


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


def reason_against(text: str, num_frames: int, tokenizer: Tokenizer, rnnt_type: str) -> str | None:
    """The reason why an utterance of so many encoder frames cannot be aligned, or None."""
    if not text.strip():
        return f"{EMPTY_TEXT}: the reference has no word"
    tokens = tokenizer.encode(text)
    if tokenizer.unk_id in tokens:
        return f"{UNKNOWN_CHARACTERS}: the tokenizer lacks {' '.join(sorted(tokenizer.unknown_characters(text)))}"
    if rnnt_type != "regular" and len(tokens) > num_frames:
        return f"{TOO_MANY_TOKENS}: {len(tokens)} tokens, {num_frames} encoder frames"
    if num_frames * (len(tokens) + 1) > _MOST_CELLS:
        return f"{NO_PATH}: {num_frames} frames and {len(tokens)} tokens need too much memory, cut the audio into parts"
    return None


def timed_words(hypothesis: Hypothesis, tokenizer: Tokenizer, duration: float) -> list[TimedWord]:
    words = words_of(hypothesis, tokenizer, duration=duration)
    return [TimedWord(word.word, word.start, word.end, word.confidence) for word in words]


def align(arguments: argparse.Namespace) -> tuple[dict[str, list[TimedWord]], list[Problem], dict]:
    """The words of every utterance by id, what was set aside, and what the summary says of how."""
    model, config, tokenizer, options = load_for_decoding(arguments, arguments.mode)
    rnnt_type, split = config.loss.rnnt_type, arguments.manifest.name.split(".")[0]
    batches = decode_batches(arguments.manifest, config, arguments.max_seconds)
    alignments: dict[str, list[TimedWord]] = {}
    problems: list[Problem] = []

    def set_aside(name: str, reason: str) -> None:
        logging.warning("%s is left out: %s", name, reason)
        problems.append(Problem(name, split, str(arguments.manifest), reason))

    def align_rows(batch: Batch) -> None:
        rows = []
        for row, (name, text) in enumerate(zip(batch.ids, batch.texts, strict=True)):
            num_frames = int(batch.feature_lens[row]) // SUBSAMPLING
            reason = reason_against(text, num_frames, tokenizer, rnnt_type)
            if reason is None:
                rows.append(row)
            else:
                set_aside(name, reason)
        if not rows:
            return
        tokens = [tokenizer.encode(batch.texts[row]) for row in rows]
        lens = batch.feature_lens[rows]
        for row, hypothesis in zip(
            rows, align_batch(model, batch.features[rows], lens, tokens, options, rnnt_type), strict=True
        ):
            if hypothesis is None:
                set_aside(batch.ids[row], f"{NO_PATH}: the model gives every path probability zero")
                continue
            duration = int(batch.feature_lens[row]) * FRAME_SHIFT_MS / 1000
            alignments[batch.ids[row]] = timed_words(hypothesis, tokenizer, duration)

    for batch in progress(batches, "align"):
        align_rows(batch)
    settings = {"mode": options.mode, "rnnt_type": rnnt_type, "blank_penalty": options.blank_penalty}
    settings |= {"chunk_ms": options.chunk_ms, "device": model.device.type}
    settings["look_ahead_ms"] = options.look_ahead_ms if options.mode == "look_ahead" else None
    settings["machine"] = machine(model.device)
    return dict(sorted(alignments.items())), batches.problems + problems, settings


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    alignments, problems, settings = align(arguments)
    if not alignments:
        raise ValueError(f"{arguments.manifest} holds no utterance that can be aligned ({len(problems)} set aside)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_ctm(arguments.out / "alignment.ctm", alignments)
    if arguments.manifest.suffix != ".jsonl":
        write_aligned_cuts(arguments.manifest, arguments.out / "cuts.jsonl.gz", alignments)
    num_words = sum(map(len, alignments.values()))
    summary = {
        "num_utterances": len(alignments), "num_words": num_words, "num_set_aside": len(problems), **settings,
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
