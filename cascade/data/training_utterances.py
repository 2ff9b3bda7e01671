"""Utterances to train on: what is kept in memory of a cut, and which of them can be used with a tokenizer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cascade.config.options import SUBSAMPLING, Config
from cascade.corpus.cuts import read_cuts, transcript
from cascade.corpus.quarantine import token_problem
from cascade.data.storage import Stored, stored
from cascade.text.tokens import Tokenizer

log = logging.getLogger(__name__)


class TrainingUtterance(NamedTuple):
    """Fields of a cut that stay in memory, which has room for the 281 k utterances of LibriSpeech in three speeds."""

    id: str
    text: str
    tokens: tuple[int, ...]
    num_frames: int
    features: Stored
    original_id: str
    """The id without the speed."""
    voice: str
    """The speaker and the speed of the copy; utterances without a speaker count as one speaker's."""


def read_utterances(
    cuts_path: str | Path, tokenizer: Tokenizer, config: Config
) -> Iterator[tuple[TrainingUtterance, int]]:
    """Yield (utterance, samples at speed 1) of each cut."""
    for cut in read_cuts(cuts_path):
        if cut.features is None:
            raise ValueError(f"{cuts_path}: {cut.id} has no stored features; run stage 1 (compute_features)")
        if cut.features.num_features != config.features.num_mel_bins:
            raise ValueError(
                f"{cuts_path}: {cut.features.num_features} mel bins, but features.num_mel_bins="
                f"{config.features.num_mel_bins}: run stage 1 again"
            )
        text = tokenizer.normalize(transcript(cut))
        tokens = tuple(tokenizer.encode(text))
        custom = cut.custom or {}
        speed = custom.get("speed", 1.0)
        speaker = next((supervision.speaker for supervision in cut.supervisions), None)
        voice = sys.intern(f"{speaker} {speed}")
        original_id = custom.get("utterance", cut.id)
        features = stored(cut.features)
        utterance = TrainingUtterance(cut.id, text, tokens, cut.features.num_frames, features, original_id, voice)
        yield utterance, round(cut.num_samples * speed)


def usable(
    utterances: Iterator[tuple[TrainingUtterance, int]], tokenizer: Tokenizer, config: Config
) -> tuple[list[TrainingUtterance], dict[str, str]]:
    """Utterances to train on, and {utterance id: reason} of those left out, each with all its speed copies."""
    kept: list[TrainingUtterance] = []
    bad: dict[str, str] = {}
    for utterance, num_samples in utterances:
        kept.append(utterance)
        rate, speeds = config.features.sampling_rate, config.data.speed_factors
        problem = token_problem(utterance.text, num_samples, rate, speeds, tokenizer)
        if problem is not None:
            bad[utterance.original_id] = problem
    if bad:
        log.warning("%d training utterances do not fit the tokenizer and are left out, as stage 2 has listed", len(bad))
    fitting = [utterance for utterance in kept if utterance.original_id not in bad]
    usable = [utterance for utterance in fitting if len(utterance.tokens) <= utterance.num_frames // SUBSAMPLING]
    if len(usable) < len(fitting):
        log.info("%d fast copies have fewer frames than tokens and are left out", len(fitting) - len(usable))
    return usable, bad
