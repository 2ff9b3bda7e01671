"""Forced alignment of the utterances of a manifest: the times of the words of each reference, or why it has none."""

from __future__ import annotations

import logging
from pathlib import Path

from cascade.config.options import FRAME_SHIFT_MS, SUBSAMPLING
from cascade.corpus.cuts import split_name
from cascade.corpus.quarantine import EMPTY_TEXT, TOO_MANY_TOKENS, UNKNOWN_CHARACTERS, Problem
from cascade.data.alignments import TimedWord
from cascade.data.batches import Batch
from cascade.data.decode_batches import DecodeBatches
from cascade.log import progress
from cascade.measure.alignment import align_batch
from cascade.models.transducer import CascadedTransducer
from cascade.search.methods import DecodingOptions
from cascade.stream.words import words_of
from cascade.text.tokens import Tokenizer

_MOST_CELLS = 2**23
"""Frames times tokens of one utterance: about 1 GB of memory."""
NO_PATH = "no path"


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


def align_utterances(
    batch: Batch, model: CascadedTransducer, tokenizer: Tokenizer, options: DecodingOptions, rnnt_type: str
) -> list[list[TimedWord] | str]:
    """The words of each utterance of a batch, or the reason why it has none."""
    num_frames = (batch.feature_lens // SUBSAMPLING).tolist()
    reasons = [reason_against(*pair, tokenizer, rnnt_type) for pair in zip(batch.texts, num_frames, strict=True)]
    no_path = f"{NO_PATH}: the model gives every path probability zero"
    aligned: list[list[TimedWord] | str] = [reason or no_path for reason in reasons]
    rows = [row for row, reason in enumerate(reasons) if reason is None]
    if not rows:
        return aligned
    tokens, lens = [tokenizer.encode(batch.texts[row]) for row in rows], batch.feature_lens[rows]
    hypotheses = align_batch(model, batch.features[rows], lens, tokens, options, rnnt_type)
    for row, hypothesis in zip(rows, hypotheses, strict=True):
        if hypothesis is not None:
            words = words_of(hypothesis, tokenizer, duration=int(batch.feature_lens[row]) * FRAME_SHIFT_MS / 1000)
            aligned[row] = [TimedWord(word.word, word.start, word.end, word.confidence) for word in words]
    return aligned


def align_manifest(
    manifest: Path, batches: DecodeBatches, model: CascadedTransducer, tokenizer: Tokenizer, options: DecodingOptions,
    rnnt_type: str,
) -> tuple[dict[str, list[TimedWord]], list[Problem]]:
    """Align all utterances of a manifest.

    Args:
      batches: its utterances.
      options: the pass, its contexts and the blank penalty.
      rnnt_type: the topology that the model was trained with, regular | modified | constrained.
    Returns:
      the words by utterance id, in the order of the ids, and what was set aside.
    """
    alignments: dict[str, list[TimedWord]] = {}
    problems: list[Problem] = []
    for batch in progress(batches, "align"):
        aligned = align_utterances(batch, model, tokenizer, options, rnnt_type)
        for name, words in zip(batch.ids, aligned, strict=True):
            if isinstance(words, str):
                logging.warning("%s is left out: %s", name, words)
                problems.append(Problem(name, split_name(manifest), str(manifest), words))
            else:
                alignments[name] = words
    return dict(sorted(alignments.items())), batches.problems + problems
